"""Prefetched rows are the same rows: order, state and end of the run."""

import pickle
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from small_text import STYLES, story

from sae_lightning.llm.sites import Kind, Site
from sae_lightning.stream.batches import BatchStream
from sae_lightning.stream.documents import SplitDocuments
from sae_lightning.stream.prefetch import PrefetchedRows
from sae_lightning.stream.rows import LLMRows
from sae_lightning.stream.source import Rows
from sae_lightning.stream.tokens import open_tokens

SITES = [Site(0, Kind.mlp), Site(1, Kind.resid)]
BATCH, BATCHES = 40, 20  # an update takes two LLM batches of up to 28 rows


def source(llm, style: str = "indexed") -> LLMRows:
    data = Dataset.from_dict({"text": story(5, documents=60)})
    data = data if style == "indexed" else data.to_iterable_dataset()
    tokens = open_tokens(SplitDocuments(data, data), llm.tokenizer, context=8, seed=3).train
    return LLMRows(llm, tokens, SITES, batch=4, max_norm=1.5)


def stream(rows) -> BatchStream:
    return BatchStream(rows, batch=BATCH, total_batches=BATCHES, pool=64, seed=7)


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x[site], y[site]) for x, y in zip(a, b, strict=True) for site in SITES
    )


@pytest.mark.parametrize("rows", [1, BATCH, 1000])
def test_batches_are_those_of_the_source_and_no_more_text_is_read(llm, rows):
    plain, ahead = stream(source(llm)), stream(PrefetchedRows(source(llm), rows))
    pairs = list(zip(plain, ahead, strict=True))
    assert len(pairs) == BATCHES
    assert same(*map(list, zip(*pairs, strict=True)))
    assert ahead.rows.inner.state_dict() == plain.rows.state_dict() == ahead.rows.state_dict()
    assert ahead.rows.llm_seconds > 0


def test_the_source_is_asked_what_it_would_be_asked_alone(llm):
    """Including the last call, by which a cache knows that it may close."""
    requests = []
    for wrap in (lambda rows: rows, lambda rows: PrefetchedRows(rows, BATCH)):
        rows, calls = source(llm), []
        inner = rows.next
        rows.next = lambda count, inner=inner, calls=calls: calls.append(count) or inner(count)
        list(stream(wrap(rows)))
        requests.append(calls)
    assert requests[0] == requests[1]


def test_an_update_finds_its_rows_begun(llm):
    rows = PrefetchedRows(source(llm), BATCH)
    for count in (800, 700, 600):
        rows.next(count)
        assert (
            BATCH
            <= sum(len(item.rows.sequence_ids) for item in rows._waiting)
            < BATCH + rows.max_rows
        )
    waiting = sum(len(item.rows.sequence_ids) for item in rows._waiting)
    read = rows.inner.llm_batches
    rows.next(waiting)
    assert rows.inner.llm_batches == read, "the run wants what waits and no more"


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("resumed_ahead", [True, False])
def test_resuming_is_exact_at_every_batch_with_and_without_reading_ahead(llm, style, resumed_ahead):
    reference = list(stream(source(llm, style)))
    whole = stream(PrefetchedRows(source(llm, style), BATCH))
    states = [pickle.dumps(whole.state_dict())]
    for _ in whole:
        states.append(pickle.dumps(whole.state_dict()))
    for served in range(0, BATCHES + 1, 4):
        rows = source(llm, style)
        rest = stream(PrefetchedRows(rows, BATCH) if resumed_ahead else rows)
        rest.load_state_dict(pickle.loads(states[served]))
        assert same(list(rest), reference[served:])


def test_a_state_loaded_in_the_middle_forgets_what_waited(llm):
    rows = PrefetchedRows(source(llm), BATCH)
    state = pickle.dumps(rows.state_dict())
    first = [rows.next(500).sequence_ids for _ in range(3)]
    rows.load_state_dict(pickle.loads(state))
    assert all(torch.equal(rows.next(500).sequence_ids, ids) for ids in first)


def test_closing_loses_no_row(llm):
    rows, plain = PrefetchedRows(source(llm), BATCH), source(llm)
    rows.next(500)
    plain.next(500)
    rows.close()
    assert rows.state_dict() == plain.state_dict()
    assert torch.equal(rows.next(400).sequence_ids, plain.next(400).sequence_ids)


def test_the_epoch_is_that_of_the_rows_handed_out(llm):
    rows, plain = PrefetchedRows(source(llm), 1000), source(llm)
    for _ in range(150):
        rows.next(10_000)
        plain.next(10_000)
        assert rows.epoch == plain.epoch
    assert rows.epoch > 1


class FakeTensor:
    """A fake GPU tensor that records who reads it, and in which stream."""

    def __init__(self, log: list[str], name: str):
        self.record_stream = lambda stream: log.append(f"{stream.name} reads {name}")


class FakeStream:
    """A fake CUDA stream that records what is enqueued, in the order of the CPU."""

    def __init__(self, log: list[str], name: str):
        self.log, self.name, self.batches = log, name, 0

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} marks {self.batches}")
        return f"mark {self.batches}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


def test_on_a_gpu_a_batch_is_waited_for_and_kept_before_it_is_handed_out(monkeypatch):
    log: list[str] = []
    current = [FakeStream(log, "default")]

    @contextmanager
    def inside(stream):
        current.append(stream)
        yield
        current.pop()

    def compute(count: int) -> Rows:
        current[-1].batches = source.batch = source.batch + 1
        log.append(f"{current[-1].name} computes {source.batch}")
        return Rows({s: FakeTensor(log, f"{source.batch} {s}") for s in SITES}, torch.zeros(3))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(log, "side"))
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    source = SimpleNamespace(sites=SITES, device=torch.device("cuda"), max_rows=3, epoch=1, batch=0)
    source.next, source.state_dict = compute, dict
    rows = PrefetchedRows(source, 3)
    for _ in range(2):
        rows.next(100)
        log.append("handed out")
    read = [[f"default reads {n} {site}" for site in SITES] for n in (1, 2)]
    assert log == [
        *("side waits for default", "side computes 1", "side marks 1"),
        *("side computes 2", "side marks 2"),
        *("default waits for mark 1", *read[0], "handed out"),
        *("side computes 3", "side marks 3"),
        *("default waits for mark 2", *read[1], "handed out"),
    ]


@pytest.mark.gpu
def test_on_a_gpu_rows_are_those_of_the_default_stream(llm):
    on_gpu = llm._replace(model=llm.model.to("cuda"))
    try:
        plain, ahead = stream(source(on_gpu)), stream(PrefetchedRows(source(on_gpu), BATCH))
        assert same(list(plain), list(ahead))
    finally:
        llm.model.to("cpu")
