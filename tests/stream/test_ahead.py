"""Rows that are begun ahead are the same rows: order, state and end of the run."""

import pickle

import pytest
import torch
from datasets import Dataset
from small_text import STYLES, story

from sae_lightning.llm.sites import Kind, Site
from sae_lightning.stream.ahead import Ahead
from sae_lightning.stream.documents import Text
from sae_lightning.stream.live import LiveStream
from sae_lightning.stream.rows import LLMRows
from sae_lightning.stream.tokens import open_tokens

SITES = [Site(0, Kind.mlp), Site(1, Kind.resid)]
BATCH, BATCHES = 40, 20  # an update takes two LLM batches of up to 28 rows


def source(llm, style: str = "indexed") -> LLMRows:
    data = Dataset.from_dict({"text": story(5, documents=60)})
    data = data if style == "indexed" else data.to_iterable_dataset()
    tokens = open_tokens(Text(data, data), llm.tokenizer, context=8, seed=3).train
    return LLMRows(llm, tokens, SITES, batch=4, max_norm=1.5)


def stream(rows) -> LiveStream:
    return LiveStream(rows, batch=BATCH, total_batches=BATCHES, pool=64, seed=7)


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x[site], y[site]) for x, y in zip(a, b, strict=True) for site in SITES
    )


@pytest.mark.parametrize("rows", [1, BATCH, 1000])
def test_batches_are_those_of_the_source_and_no_more_text_is_read(llm, rows):
    plain, ahead = stream(source(llm)), stream(Ahead(source(llm), rows))
    pairs = list(zip(plain, ahead, strict=True))
    assert len(pairs) == BATCHES
    assert same(*map(list, zip(*pairs, strict=True)))
    assert ahead.rows.source.state_dict() == plain.rows.state_dict() == ahead.rows.state_dict()
    assert ahead.rows.llm_seconds > 0


def test_the_source_is_asked_what_it_would_be_asked_alone(llm):
    """The last call tells a cache that it may close."""
    asked = []
    for wrap in (lambda rows: rows, lambda rows: Ahead(rows, BATCH)):
        rows, calls = source(llm), []
        inner = rows.next
        rows.next = lambda wanted, inner=inner, calls=calls: calls.append(wanted) or inner(wanted)
        list(stream(wrap(rows)))
        asked.append(calls)
    assert asked[0] == asked[1]


def test_an_update_finds_its_rows_begun(llm):
    rows = Ahead(source(llm), BATCH)
    for wanted in (800, 700, 600):
        rows.next(wanted)
        assert BATCH <= sum(len(each.rows.ids) for each in rows._waiting) < BATCH + rows.most
    waiting = sum(len(each.rows.ids) for each in rows._waiting)
    read = rows.source.llm_batches
    rows.next(waiting)
    assert rows.source.llm_batches == read, "the run wants what waits and no more"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("resumed_ahead", [True, False])
def test_resuming_is_exact_at_every_batch_with_and_without_reading_ahead(llm, style, resumed_ahead):
    reference = list(stream(source(llm, style)))
    whole = stream(Ahead(source(llm, style), BATCH))
    states = [pickle.dumps(whole.state_dict())]
    for _ in whole:
        states.append(pickle.dumps(whole.state_dict()))
    for served in range(0, BATCHES + 1, 4):
        rows = source(llm, style)
        rest = stream(Ahead(rows, BATCH) if resumed_ahead else rows)
        rest.load_state_dict(pickle.loads(states[served]))
        assert same(list(rest), reference[served:])


def test_a_state_loaded_in_the_middle_forgets_what_waited(llm):
    rows = Ahead(source(llm), BATCH)
    state = pickle.dumps(rows.state_dict())
    first = [rows.next(500).ids for _ in range(3)]
    rows.load_state_dict(pickle.loads(state))
    assert all(torch.equal(rows.next(500).ids, ids) for ids in first)


def test_closing_loses_no_row(llm):
    rows, plain = Ahead(source(llm), BATCH), source(llm)
    rows.next(500)
    plain.next(500)
    rows.close()
    assert rows.state_dict() == plain.state_dict()
    assert torch.equal(rows.next(400).ids, plain.next(400).ids)


def test_the_epoch_is_that_of_the_rows_handed_out(llm):
    rows, plain = Ahead(source(llm), 1000), source(llm)
    for _ in range(150):
        rows.next(10_000)
        plain.next(10_000)
        assert rows.epoch == plain.epoch
    assert rows.epoch > 1


@pytest.mark.gpu
def test_on_a_gpu_rows_are_those_of_the_default_stream(llm):
    on_gpu = llm._replace(model=llm.model.to("cuda"))
    try:
        plain, ahead = stream(source(on_gpu)), stream(Ahead(source(on_gpu), BATCH))
        assert same(list(plain), list(ahead))
    finally:
        llm.model.to("cpu")
