"""The batch stream: the content of batches, how far the LLM runs, and exact resume."""

import copy
import pickle

import pytest
import torch
from datasets import Dataset
from small_text import BOS, SEPARATOR, STYLES, story

from sae_lightning.errors import UserError
from sae_lightning.llm.capture import capture
from sae_lightning.llm.sites import Kind, Site
from sae_lightning.stream import batches as batches_module
from sae_lightning.stream import open_text, streamed_tokens
from sae_lightning.stream import rows as rows_module
from sae_lightning.stream.batches import BatchStream
from sae_lightning.stream.documents import SplitDocuments
from sae_lightning.stream.hub import HubConfig
from sae_lightning.stream.rows import LLMRows
from sae_lightning.stream.synthetic import ConceptRows, SyntheticConfig, open_concept_world
from sae_lightning.stream.tokens import open_tokens

SITES = [Site(1, Kind.resid), Site(0, Kind.mlp)]
CONTEXT = 8


def make(llm, style: str = "indexed", **settings) -> BatchStream:
    data = Dataset.from_dict({"text": story(5, documents=60)})
    data = data if style == "indexed" else data.to_iterable_dataset()
    tokens = open_tokens(SplitDocuments(data, data), llm.tokenizer, context=CONTEXT, seed=3).train
    return stream_of(llm, tokens, **settings)


def stream_of(llm, tokens, sites=SITES, *, llm_batch=4, max_norm=None, keep_special=False, **pool):
    kept = {"max_norm": max_norm, "keep_special": keep_special}
    rows = LLMRows(llm, tokens, sites, batch=llm_batch, **kept)
    return BatchStream(rows, **({"batch": 16, "total_batches": 40, "pool": 64, "seed": 7} | pool))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[site], b[site]) for site in a)


@pytest.fixture
def calls(monkeypatch) -> list[torch.Tensor]:
    """Records the tokens of every LLM pass."""
    passes = []

    def counting(model, tokens, sites, places):
        passes.append(tokens)
        return capture(model, tokens, sites, places)

    monkeypatch.setattr(rows_module, "capture", counting)
    return passes


def test_batches_are_aligned_and_as_many_as_asked_for(llm):
    stream = make(llm)
    batches = list(stream)
    assert len(batches) == len(stream) == 40
    assert all(batch[site].shape == (16, 16) for batch in batches for site in SITES)
    assert stream.seconds > stream.llm_seconds > 0
    assert 1 < stream.distinct_sequences <= 16


def test_a_batch_holds_what_capture_reads_less_bos_and_special_tokens(llm, calls):
    # All that the LLM read is served when the pool has drained but for the last pass's surplus.
    stream = make(llm)
    batches = list(stream)
    served = {site: torch.cat([batch[site] for batch in batches]) for site in SITES}
    kept = sum(int(((t != BOS) & (t != SEPARATOR)).sum()) for t in calls)
    rows = {}
    for tokens in calls:
        direct = capture(llm.model, tokens, SITES)
        for s, t in ((s, t) for s in range(len(tokens)) for t in range(CONTEXT)):
            key = tuple(direct[SITES[0]][s, t].tolist())
            rows[key] = (int(tokens[s, t]), t, direct[SITES[1]][s, t])
    for one, other in zip(served[SITES[0]], served[SITES[1]], strict=True):
        token, position, expected = rows[tuple(one.tolist())]
        assert position > 0
        assert token not in (BOS, SEPARATOR)
        assert torch.equal(other, expected), "the same token at both sites"
    assert len(served[SITES[0]]) == 640 == kept - len(stream._pool)


def test_special_tokens_are_kept_on_request_but_never_position_0(llm, calls):
    list(make(llm, keep_special=True, total_batches=14, pool=16, llm_batch=1))
    assert 224 == 14 * 16 <= sum(t[:, 1:].numel() for t in calls) < 224 + CONTEXT
    assert any((t[:, 1:] == SEPARATOR).any() for t in calls)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("keep_special", [False, True])
def test_the_padding_of_an_epochs_last_sequence_is_never_trained_on(
    llm, style, keep_special, monkeypatch
):
    # One text of "abc" and its separator, in sequences of 7 tokens: 3 of padding in each epoch.
    data = Dataset.from_dict({"text": ["abc"]})
    data = data if style == "indexed" else data.to_iterable_dataset()
    tokens = open_tokens(SplitDocuments(data, data), llm.tokenizer, context=CONTEXT, seed=3).train
    monkeypatch.setattr(
        rows_module,
        "capture",
        lambda model, tokens, sites, places: {
            s: tokens.flatten()[places, None].float() for s in sites
        },
    )
    settings = {"total_batches": 8, "pool": 12, "llm_batch": 2, "keep_special": keep_special}
    stream = stream_of(llm, tokens, batch=12, **settings)
    rows = torch.cat([batch[SITES[0]] for batch in stream]).flatten()
    assert tokens.epoch > 20
    shares = {int(t): int((rows == t).sum()) / len(rows) for t in rows.unique()}
    assert (SEPARATOR in shares) is keep_special
    assert len(shares) == 3 + keep_special
    assert all(abs(share - 1 / len(shares)) < 0.05 for share in shares.values())


def test_the_llm_runs_for_no_more_tokens_than_the_run_needs(llm, calls):
    stream = make(llm, total_batches=9, pool=64, llm_batch=4)
    list(stream)
    kept = sum(int(((t != BOS) & (t != SEPARATOR)).sum()) for t in calls)
    assert 9 * 16 <= kept < 9 * 16 + 4 * (CONTEXT - 1), "less than an LLM batch beyond the need"
    assert {len(t) for t in calls} == {4}, "every LLM batch is whole: rows depend on no run's end"
    assert len(stream._pool) == kept - 9 * 16, "drained"


def test_the_pool_is_no_fuller_than_its_size_and_one_llm_batch(llm):
    stream, sizes = make(llm), []
    for _ in stream:
        sizes.append(len(stream._pool))
    assert max(sizes) + 16 <= 64 + 4 * (CONTEXT - 1)
    assert min(sizes[:20]) + 16 >= 64


@pytest.mark.parametrize("style", STYLES)
def test_resuming_is_exact_at_every_batch(llm, style):
    settings = {"style": style, "total_batches": 12, "max_norm": 1.5}
    reference = list(make(llm, **settings))
    states = []
    stream = make(llm, **settings)
    states.append(pickle.dumps(stream.state_dict()))
    for _ in stream:
        states.append(pickle.dumps(stream.state_dict()))
    for served, state in enumerate(states):
        resumed = make(llm, **settings)
        resumed.load_state_dict(pickle.loads(state))
        assert len(resumed) == 12
        rest = list(resumed)
        assert len(rest) == 12 - served
        assert all(same(a, b) for a, b in zip(rest, reference[served:], strict=True))


@pytest.mark.slow
def test_a_run_on_a_streamed_hub_data_set_resumes_exactly_twice_in_a_row(
    llm, tmp_path, monkeypatch
):
    monkeypatch.setattr(streamed_tokens, "STREAMED_CHARACTERS", 40)
    monkeypatch.setattr(streamed_tokens, "SHUFFLE_BUFFER", 5)
    # Two files, several epochs, a shuffle buffer smaller than the text; all opened anew each time.
    (tmp_path / "data").mkdir()
    for part in range(2):
        data = Dataset.from_dict({"text": story(part, documents=30)})
        data.to_parquet(tmp_path / "data" / f"{part}.parquet")
    config = HubConfig(name=str(tmp_path / "data"), held_out_documents=5)

    def opened(state=None):
        tokens = open_tokens(open_text(config), llm.tokenizer, context=CONTEXT, seed=3)
        stream = stream_of(llm, tokens.train, max_norm=1.5, total_batches=150)
        if state is not None:
            stream.load_state_dict(pickle.loads(state))
        return stream

    def served(stream, n):
        return [batch for _, batch in zip(range(n), stream, strict=False)]

    whole = opened()
    reference = list(whole)
    assert whole.epoch >= 3
    for first, second in [(1, 1), (20, 70), (75, 76), (140, 9)]:
        stream, batches = opened(), []
        for n in (first, second):
            batches += served(stream, n)
            stream = opened(pickle.dumps(stream.state_dict()))
        batches += list(stream)
        assert len(batches) == 150
        assert all(same(a, b) for a, b in zip(batches, reference, strict=True))


def test_a_saved_state_is_plain_enough_for_a_safe_load(llm, tmp_path):
    stream = make(llm, style="streamed", max_norm=2.0)
    next(iter(stream))
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = make(llm, style="streamed", max_norm=2.0)
    resumed.load_state_dict(state)
    assert same(next(iter(resumed)), next(iter(stream)))


def test_iterating_again_goes_on_where_it_stopped(llm):
    reference, stream = list(make(llm)), make(llm)
    batches = [batch for batch, _ in zip(stream, range(5), strict=False)]
    # zip drew a sixth batch before it found the range at its end
    batches += [reference[5], *stream]
    assert all(same(a, b) for a, b in zip(batches, reference, strict=True))


def test_peeking_shows_what_training_will_see_and_changes_nothing(llm):
    reference, stream, batches = list(make(llm)), make(llm), []
    peeked = stream.peek(30)
    assert all(peeked[site].shape == (30, 16) for site in SITES)
    for batch in stream:
        stream.peek(10)
        batches.append(batch)
    assert all(same(a, b) for a, b in zip(batches, reference, strict=True))
    seen = {tuple(row.tolist()) for batch in reference for row in batch[SITES[0]]}
    assert {tuple(row.tolist()) for row in peeked[SITES[0]]} <= seen
    assert len(make(llm).peek(10_000)[SITES[0]]) >= 64, "as many as the pool holds"


def test_max_norm_drops_exactly_the_outliers_at_every_site(llm, monkeypatch):
    # Rows of norm 1, but 12 where the token is `a` at one site, and where it is `b` at the other.
    a, b = (llm.tokenizer.encode(letter)[0] for letter in "ab")

    def planted(model, tokens, sites, places):
        tokens = tokens.flatten()[places]
        norms = [1 + 11.0 * (tokens == letter) for letter in (a, b)]
        return {s: torch.stack([n, tokens * 1e-6], 1) for s, n in zip(sites, norms, strict=True)}

    monkeypatch.setattr(rows_module, "capture", planted)

    def letters(max_norm):
        batches = list(make(llm, max_norm=max_norm, total_batches=30))
        return {round(v) for batch in batches for v in (batch[SITES[0]][:, 1] * 1e6).tolist()}

    everything = {llm.tokenizer.encode(letter)[0] for letter in "abcdefgh"}
    assert letters(None) == letters(13.0) == everything
    assert letters(10.0) == everything - {a, b}


def test_the_median_is_that_of_the_first_llm_batch(llm, monkeypatch):
    scale = iter([1.0, 1.0] + [100.0] * 1000)

    def growing(model, tokens, sites, places):
        return {site: torch.full((len(places), 2), next(scale)) for site in sites}

    monkeypatch.setattr(rows_module, "capture", growing)
    stream = make(llm, max_norm=10.0)
    with pytest.raises(UserError, match="data.max_norm=10.0.* last 20 LLM batches"):
        list(stream)
    assert list(stream.rows._medians.values()) == pytest.approx([2**0.5, 2**0.5])


def test_activations_that_are_not_numbers_end_the_run_instead_of_looping(llm, monkeypatch):
    monkeypatch.setattr(
        rows_module,
        "capture",
        lambda model, tokens, sites, places: {
            s: torch.full((len(places), 2), torch.nan) for s in sites
        },
    )
    with pytest.raises(UserError, match="^llm.dtype: activations of the LLM at .* are not finite"):
        list(make(llm, max_norm=10.0))


def test_a_bigger_pool_mixes_more_sequences_into_a_batch(llm):
    def mixing(pool):
        stream, distinct = make(llm, pool=pool), []
        for _ in stream:
            distinct.append(stream.distinct_sequences)
        return sum(distinct[:20]) / 20

    assert mixing(16) < mixing(64) < mixing(320)


def test_the_epoch_is_the_texts(llm):
    stream = make(llm, total_batches=120)
    assert stream.epoch == 1
    list(stream)
    assert stream.epoch > 1


def test_activations_keep_the_llms_dtype(llm):
    half = llm._replace(model=copy.deepcopy(llm.model).to(torch.bfloat16))
    assert next(iter(make(half)))[SITES[0]].dtype == torch.bfloat16


@pytest.mark.parametrize(("device", "seconds"), [("meta", 50.0), ("cpu", 0.0)])
def test_what_an_accelerator_still_has_to_do_for_a_peek_is_counted(monkeypatch, device, seconds):
    """Device "meta" stands for the accelerator: its rows hold no values yet and cannot be read."""
    clock, waits = [0.0], []

    def wait(device):
        waits.append(device)
        clock[0] += 50

    monkeypatch.setattr(batches_module, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.accelerator, "synchronize", wait)
    world = open_concept_world(SyntheticConfig(concepts=4, dim=3, l0=1))
    rows = ConceptRows(world, SITES, seed=0, device=device)
    stream = BatchStream(rows, batch=16, total_batches=4, pool=32)
    assert stream.peek(8)[SITES[0]].shape == (8, 3)
    assert stream.seconds == seconds
    next(iter(stream))
    assert waits == [rows.device] * (device == "meta"), "by `peek` only"


def test_a_run_that_read_branches_before_they_were_multiplied_is_not_continued(llm, monkeypatch):
    earlier = make(llm).state_dict()
    monkeypatch.setattr(
        rows_module, "measure_branch_scale", lambda _, site: 0.5 if site.kind is Kind.mlp else 1
    )
    with pytest.raises(UserError, match=r"^resume: at mlp\.0 an earlier version .* start a new"):
        make(llm).load_state_dict(earlier)
    make(llm).load_state_dict(make(llm).state_dict())
