"""The activation cache: cached = live, whatever was kept, lost or damaged before."""

import copy
import errno
import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from small_text import STYLES, story

from sae_lightning.errors import UserError
from sae_lightning.llm.capture import capture
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.sites import Kind, Site
from sae_lightning.stream import cache as cache_module
from sae_lightning.stream import draft as draft_module
from sae_lightning.stream import rows as rows_module
from sae_lightning.stream import sources as sources_module
from sae_lightning.stream.cache import CachedRows
from sae_lightning.stream.documents import Text, open_text
from sae_lightning.stream.draft import Draft
from sae_lightning.stream.live import LiveStream
from sae_lightning.stream.rows import LLMRows
from sae_lightning.stream.shards import Lock, Shards
from sae_lightning.stream.sources import cache_folder, llm_fingerprint, open_rows
from sae_lightning.stream.text import HubConfig, LocalConfig
from sae_lightning.stream.tokens import open_tokens

A, B = SITES = [Site(0, Kind.mlp), Site(1, Kind.resid)]
CONTEXT, LLM_BATCH, WIDTH = 8, 4, 16
# a float32 LLM batch of 4 sequences has at most 28 rows, 1792 bytes a site: 3 or 4 fill a shard
SMALL_SHARDS = 5000


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_BYTES", SMALL_SHARDS)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "activations" / "key"


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """The sites of every pass of the LLM."""
    passes = []

    def counting(model, tokens, sites, places):
        passes.append(tuple(sites))
        return capture(model, tokens, sites, places)

    monkeypatch.setattr(rows_module, "capture", counting)
    return passes


def make(
    llm, folder=None, *, style="indexed", sites=SITES, max_norm=None, resumed=False, **pool
) -> LiveStream:
    """A stream of 40 batches, live where no `folder` is given."""
    data = Dataset.from_dict({"text": story(5, documents=60)})
    data = data if style == "indexed" else data.to_iterable_dataset()
    tokens = open_tokens(Text(data, data), llm.tokenizer, context=CONTEXT, seed=3).train
    rows = LLMRows(llm, tokens, sites, batch=LLM_BATCH, max_norm=max_norm)
    if folder is not None:
        rows = CachedRows(rows, folder, {"made": "for a test"}, WIDTH, resumed)
    return LiveStream(rows, **({"batch": 16, "total_batches": 40, "pool": 64, "seed": 7} | pool))


def assert_same(some: list[dict], others: list[dict]) -> None:
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for site, rows in one.items():
            assert rows.dtype == other[site].dtype
            assert torch.equal(rows, other[site])


def leaves(tree, path=""):
    """{path: value} of nested dicts, tensors as bytes."""
    if isinstance(tree, torch.Tensor):
        return {path: (tree.dtype, tree.shape, tree.contiguous().view(torch.uint8).tolist())}
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key in tree for k, v in leaves(tree[key], f"{path}/{key}").items()}


def shards(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.isdecimal())


def leftovers(folder) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [None, 1.5])
def test_cached_is_live_bit_for_bit(llm, folder, calls, style, dtype, max_norm):
    llm = llm._replace(model=copy.deepcopy(llm.model).to(dtype))
    settings = {"style": style, "max_norm": max_norm, "total_batches": 70}
    live = make(llm, **settings)
    batches = list(live)
    passes = len(calls)
    writing = make(llm, folder, **settings)
    assert_same(batches, list(writing))
    assert len(calls) == 2 * passes
    assert writing.llm_seconds > 0
    reading = make(llm, folder, **settings)
    mixing = []
    for batch, expected in zip(reading, batches, strict=True):
        assert_same([batch], [expected])
        mixing.append(reading.distinct_sequences)
    assert len(calls) == 2 * passes, "the LLM is not called"
    assert reading.llm_seconds == 0
    assert min(mixing) > 1
    assert leaves(reading.state_dict()["pool"]) == leaves(live.state_dict()["pool"]), "and ids"
    assert reading.epoch == live.epoch > 1
    assert len(shards(folder)) > 5
    assert leftovers(folder) == []


def test_the_length_batch_and_pool_of_a_run_change_nothing_in_its_cache(llm, folder, calls):
    list(make(llm, folder))
    written = len(calls)
    for settings in (
        {"total_batches": 3},
        {"total_batches": 39},
        {"batch": 10, "total_batches": 50, "pool": 300},
        {"seed": 99},
    ):
        reference = list(make(llm, **settings))
        before = len(calls)
        assert_same(list(make(llm, folder, **settings)), reference)
        assert len(calls) == before > written


def test_a_longer_run_continues_a_shorter_ones_cache(llm, folder, calls):
    reference = list(make(llm, total_batches=90))
    passes = len(calls)
    for total in (10, 41, 90):  # the shorter ones end in the middle of shards
        shorter = list(make(llm, total_batches=total))
        assert_same(list(make(llm, folder, total_batches=total)), shorter)
    calls.clear()
    assert_same(list(make(llm, folder, total_batches=90)), reference)
    assert calls == []
    about = [json.loads((folder / name / "shard.json").read_text()) for name in shards(folder)]
    assert sum(len(shard["rows"]) for shard in about) == passes
    assert [int(name) for name in shards(folder)] == [
        sum(len(shard["rows"]) for shard in about[:i]) for i in range(len(about))
    ], "end to end"


def test_what_a_shard_says_of_itself(llm, folder):
    half = llm._replace(model=copy.deepcopy(llm.model).to(torch.bfloat16))
    list(make(half, folder))
    assert json.loads((folder / "manifest.json").read_text()) == {"made": "for a test"}
    shard = json.loads((folder / "00000000" / "shard.json").read_text())
    assert shard["files"].keys() == {"ids", "mlp.0", "resid.1", "state.pt"}
    about = shard["files"]["resid.1"]
    assert about["dtype"] == "bfloat16"
    assert about["row"] == [WIDTH]
    size = (folder / "00000000" / "resid.1").stat().st_size
    assert about["bytes"] == size == 2 * WIDTH * sum(shard["rows"]) >= SMALL_SHARDS


KILLED = {
    "in the middle of a shard": (rows_module.LLMRows, "next", 9),
    "between two files": (Draft, "_append", 17),
    "before the description": (draft_module, "_write_about", 2),
    "before the renaming": (os, "replace", 4),  # of a description, of a folder, and again
}


def power_cut(monkeypatch, place, name, at):
    """Let call number `at` of a function raise what nobody catches."""
    function, count = getattr(place, name), []

    def cut(*args, **kwargs):
        count.append(1)
        if len(count) == at:
            raise SystemError("power cut")
        return function(*args, **kwargs)

    monkeypatch.setattr(place, name, cut)


@pytest.mark.parametrize("when", KILLED)
def test_a_killed_write_is_completed_by_the_next_run(llm, folder, calls, monkeypatch, when):
    reference = list(make(llm))
    passes = len(calls)
    with monkeypatch.context() as patch:
        power_cut(patch, *KILLED[when])
        with pytest.raises(SystemError):
            list(make(llm, folder))
    assert leftovers(folder) != [], "a half shard, which is never read"
    complete = Shards(folder)
    complete.read()
    kept = complete.shards[-1].stop
    calls.clear()
    assert_same(list(make(llm, folder)), reference)
    assert len(calls) == passes - kept < passes
    assert leftovers(folder) == []
    calls.clear()
    assert_same(list(make(llm, folder)), reference)
    assert calls == []


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_killed_addition_of_a_site_is_completed_by_the_next_run(
    llm, folder, calls, monkeypatch, at
):
    reference = list(make(llm, sites=[B]))
    list(make(llm, folder, sites=[A]))
    with monkeypatch.context() as patch:
        power_cut(patch, os, "replace", at)
        with pytest.raises(SystemError):
            list(make(llm, folder, sites=[B]))
    assert_same(list(make(llm, folder, sites=[B])), reference)
    calls.clear()
    list(make(llm, folder))
    assert calls == []
    assert leftovers(folder) == []


def flip(path):
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resid.1", "ids", "state.pt", "shard.json"])
@pytest.mark.parametrize("harm", [flip, lambda path: os.truncate(path, 40), os.remove])
def test_a_damaged_shard_is_made_again_and_no_other(llm, folder, calls, capsys, name, harm):
    reference = list(make(llm))
    list(make(llm, folder))
    if (name, harm) == ("shard.json", flip):
        harm = lambda path: path.write_text(path.read_text().replace('"rows"', '"rowz"'))  # noqa: E731
    second = shards(folder)[1:3]
    harm(folder / second[0] / name)
    calls.clear()
    assert_same(list(make(llm, folder)), reference)
    assert len(calls) == int(second[1]) - int(second[0])
    told = capsys.readouterr().out.replace("\n", " ")
    if name != "shard.json":
        assert f"{folder / second[0] / name} is damaged: the LLM makes it again" in told
    calls.clear()
    assert_same(list(make(llm, folder)), reference)
    assert calls == []


def test_sites_are_kept_apart_and_missing_ones_are_added(llm, folder, calls):
    reference = {site: list(make(llm, sites=[site])) for site in SITES}
    both = list(make(llm))
    list(make(llm, folder, sites=[A]))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob(str(A))}
    calls.clear()
    assert_same(list(make(llm, folder)), both)
    assert set(calls) == {(A, B)}, "the LLM is run for all sites"
    assert len(before) > 5
    assert {path: path.stat().st_mtime_ns for path in folder.rglob(str(A))} == before
    calls.clear()
    for site in SITES:
        assert_same(list(make(llm, folder, sites=[site])), reference[site])
    assert_same(list(make(llm, folder)), both)
    assert calls == []


def test_the_llm_runs_only_for_shards_that_lack_a_site(llm, folder, calls):
    list(make(llm, folder, total_batches=90, sites=[A]))
    list(make(llm, folder, total_batches=20, sites=[B]))
    have = sum((folder / name / str(B)).exists() for name in shards(folder))
    first = int(shards(folder)[have])
    reference = list(make(llm, total_batches=90))
    calls.clear()
    assert_same(list(make(llm, folder, total_batches=90)), reference)
    last = Shards(folder)
    last.read()
    assert 0 < len(calls) == last.shards[-1].stop - first


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("before", ["there", "shorter", "nothing"])
@pytest.mark.parametrize("meanwhile", ["there", "deleted", "shorter", "damaged", "never"])
def test_resuming_is_exact_whatever_became_of_the_cache(llm, folder, style, before, meanwhile):
    settings = {"style": style, "total_batches": 14, "max_norm": 1.02}  # drops about half
    reference = list(make(llm, **settings))

    def prepared(state):
        shutil.rmtree(folder, ignore_errors=True)
        if state in ("there", "damaged"):
            list(make(llm, folder, **settings))
        if state == "damaged":
            flip(folder / shards(folder)[-2] / str(A))
        if state == "shorter":
            list(make(llm, folder, **(settings | {"total_batches": 6})))
        return None if state == "never" else folder

    for served in (0, 5, 13):
        stream = make(llm, prepared(before), **settings)
        for _ in zip(range(served), stream, strict=False):
            pass
        state = pickle.dumps(stream.state_dict())
        del stream  # killed: its lock is lifted
        resumed = make(llm, prepared(meanwhile), **settings)
        resumed.load_state_dict(pickle.loads(state))
        assert_same(list(resumed), reference[served:])
    if meanwhile != "never":
        assert_same(list(make(llm, folder, **settings)), reference)


def test_a_run_that_reads_the_first_shard_knows_the_medians_that_it_never_computed(llm, folder):
    live = make(llm, max_norm=1.02)
    list(live)
    list(make(llm, folder, max_norm=1.02))
    reading = make(llm, folder, max_norm=1.02, total_batches=1, pool=16)
    list(reading)
    state = reading.state_dict()["rows"]
    assert (state["read"], 0 < state["llm_batches"] < 5) == (0, True)
    assert state["medians"] == live.state_dict()["rows"]["medians"]
    assert state["medians"].keys() == {str(A), str(B)}


def test_what_a_checkpoint_lies_behind_is_in_the_cache_when_the_run_is_killed(llm, folder):
    stream = make(llm, folder)
    for _ in zip(range(7), stream, strict=False):
        pass
    place = stream.state_dict()["rows"]["llm_batches"]
    next(iter(stream))
    del stream
    kept = Shards(folder)
    kept.read()
    assert kept.shards[-1].stop == place > 0


def test_a_saved_state_is_plain_enough_for_a_safe_load(llm, folder, tmp_path):
    list(make(llm, folder, style="streamed", max_norm=2.0))
    stream = make(llm, folder, style="streamed", max_norm=2.0)
    next(iter(stream))
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    resumed = make(llm, style="streamed", max_norm=2.0)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same([next(iter(resumed))], [next(iter(stream))])


def fails(monkeypatch, place, name, at, error):
    """Let a function raise `error` from call number `at` on."""
    function, count = getattr(place, name), []

    def failing(*args, **kwargs):
        count.append(1)
        if len(count) >= at:
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(place, name, failing)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("place", "name"), [(Draft, "_append"), (Path, "write_bytes"), (os, "replace"), (os, "fsync")]
)
def test_a_disk_that_fills_up_ends_the_caching_and_not_the_run(
    llm, folder, calls, monkeypatch, capsys, place, name
):
    reference = list(make(llm))
    passes = len(calls)
    with monkeypatch.context() as patch:
        fails(
            patch,
            place,
            name,
            {"_append": 20, "write_bytes": 3, "replace": 5, "fsync": 14}[name],
            FULL,
        )
        assert_same(list(make(llm, folder)), reference)
    told = capsys.readouterr().out
    assert "is not written any further (No space left on device); training goes on" in told
    assert leftovers(folder) == []
    kept = Shards(folder)
    kept.read()
    assert len(kept.shards) == len(shards(folder)) > 0
    calls.clear()
    assert_same(list(make(llm, folder)), reference)
    assert len(calls) == passes - kept.shards[-1].stop > 0


def test_the_space_is_estimated_told_and_refused_before_anything_is_written(
    llm, folder, monkeypatch, capsys
):
    stream = make(llm, folder)
    stream.rows.store.read()
    needed, found = stream.rows.store.estimate(0, 640, stream.rows, WIDTH * 4)
    assert found == 0
    list(stream)
    files = [path for path in folder.rglob("*") if path.name in ("ids", *map(str, SITES))]
    size = sum(path.stat().st_size for path in files)
    assert needed <= size <= needed + 28 * (2 * WIDTH * 4 + 8), "but for the last LLM batch's rest"
    told = capsys.readouterr().out
    assert f"the activation cache takes about {needed / 1e6:.1f} MB in {folder}, " in told
    empty = folder.with_name("empty")
    enough = needed + cache_module.RESERVE
    monkeypatch.setattr(cache_module, "free_space", lambda folder: enough - 1)
    with pytest.raises(
        UserError, match="data.cache: no space for 0.1 MB in .* and 4.3 GB to spare .*cache=false"
    ):
        list(make(llm, empty))
    assert [path.name for path in empty.iterdir()] == [".lock"]
    capsys.readouterr()
    list(make(llm, folder))
    told = capsys.readouterr().out
    assert "640 of 640 tokens are read from the activation cache in" in told
    assert "takes about" not in told, "nothing is written"
    list(make(llm, folder, total_batches=60))
    assert re.search(r"6[45]\d of 960 tokens are read", capsys.readouterr().out)


@pytest.mark.parametrize("served", [0, 1])
def test_a_resumed_run_goes_on_where_a_new_one_would_be_refused(
    llm, folder, monkeypatch, capsys, served
):
    reference, stream = list(make(llm)), make(llm)
    monkeypatch.setattr(cache_module, "free_space", lambda folder: 0)
    resumed = make(llm, folder, resumed=True)
    if served:  # else it was killed before its first checkpoint
        next(iter(stream))
        resumed.load_state_dict(stream.state_dict())
    assert_same(list(resumed), reference[served:])
    assert capsys.readouterr().out.count("this run adds nothing to it") == 1
    assert shards(folder) == []


def test_the_space_that_checkpoints_need_is_left_to_them(llm, folder, monkeypatch, capsys):
    reference = list(make(llm))
    free = [10**12] * 4 + [cache_module.RESERVE - 1] * 100
    monkeypatch.setattr(cache_module, "free_space", lambda folder: free.pop(0))
    assert_same(list(make(llm, folder)), reference)
    assert "any further (less than 4.3 GB are free); training" in capsys.readouterr().out
    assert len(shards(folder)) == 3, "of the four looks, the first was at the whole run"


def test_a_source_that_is_closed_lets_another_write_and_leaves_nothing_half_done(
    llm, folder, capsys
):
    failed = make(llm, folder)
    next(iter(failed))
    assert len(leftovers(folder)) == 1
    failed.close()
    assert leftovers(folder) == []
    capsys.readouterr()
    list(make(llm, folder))
    assert "another process" not in capsys.readouterr().out


def test_no_shard_is_mapped_but_the_one_at_the_place(llm, folder, monkeypatch):
    list(make(llm, folder, sites=[A]))
    for sites in ([B], [A, B]):  # adds, reads
        stream, most = make(llm, folder, sites=sites), 0
        for _ in stream:
            most = max(most, sum(bool(shard._open) for shard in stream.rows.store.shards))
        assert most == 1
        assert not any(shard._open for shard in stream.rows.store.shards)


@pytest.mark.parametrize("style", STYLES)
def test_a_text_that_runs_out_is_told_when_rows_are_read_too(llm, folder, capsys, style):
    for _ in ("writing", "reading"):
        list(make(llm, folder, style=style, total_batches=70))
        told = capsys.readouterr().out
        assert told.count("the text ran out") == told.count("(epoch 2)") == 1


def test_a_folder_that_cannot_be_written_to_is_read_or_refused(llm, folder, monkeypatch, capsys):
    reference = list(make(llm, total_batches=60))
    list(make(llm, folder))
    before = shards(folder)

    def forbidden(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Shards, "claim", forbidden)
    assert_same(list(make(llm, folder, total_batches=60)), reference)
    assert "cannot be written to (Permission denied); this run adds" in capsys.readouterr().out
    assert shards(folder) == before
    with pytest.raises(UserError, match="data.cache: .*/other cannot be written to"):
        list(make(llm, folder.with_name("other")))


def test_a_second_process_reads_what_is_complete_and_writes_nothing(llm, folder, calls, capsys):
    reference = list(make(llm))
    passes = len(calls)
    first = make(llm, folder)
    for _ in zip(range(20), first, strict=False):
        pass
    calls.clear()
    capsys.readouterr()
    assert_same(list(make(llm, folder)), reference)
    complete = int(shards(folder)[-1])
    assert passes - len(calls) >= complete > 0
    told = capsys.readouterr().out
    assert told.count("another process writes the activation cache") == 1
    list(first)
    calls.clear()
    capsys.readouterr()
    assert_same(list(make(llm, folder)), reference)
    assert calls == []
    assert "another process" not in capsys.readouterr().out


def test_the_lock_is_held_by_one_and_lifted_with_its_owner(tmp_path):
    lock = Lock(tmp_path / "lock")
    with pytest.raises(BlockingIOError):
        Lock(tmp_path / "lock")
    del lock
    Lock(tmp_path / "lock").release()
    Lock(tmp_path / "lock")


@pytest.mark.parametrize("after", [1, 12, 25])
def test_a_cache_that_is_deleted_while_it_is_used_harms_no_run(llm, folder, after):
    reference = list(make(llm))
    for _ in ("writing", "reading"):
        stream, batches = make(llm, folder), []
        for batch in stream:
            batches.append(batch)
            if len(batches) == after:
                shutil.rmtree(folder)
        assert_same(batches, reference)
        shutil.rmtree(folder, ignore_errors=True)
        list(make(llm, folder))


@pytest.mark.parametrize("then", [{"sites": [B]}, {"sites": [A], "total_batches": 60}])
def test_a_text_that_changed_unseen_is_refused_and_not_mixed_in(llm, folder, monkeypatch, then):
    list(make(llm, folder, sites=[A]))
    before, swapped = shards(folder), {"a": "b", "b": "a"}
    texts = ["".join(swapped.get(c, c) for c in text) for text in story(5, documents=60)]
    monkeypatch.setitem(globals(), "story", lambda _, documents: texts)
    stream = make(llm, folder, **then)
    with pytest.raises(UserError, match="the text is no longer the one that .* was made from"):
        list(stream)
    stream.close()
    assert leftovers(folder) == []
    assert shards(folder) == before


def test_an_llm_that_drops_other_rows_is_not_mixed_in(llm, folder):
    list(make(llm, folder, max_norm=1.02))
    for name in shards(folder):
        flip(folder / name / str(B))
    other = llm._replace(model=copy.deepcopy(llm.model))
    next(iter(other.model.parameters())).data[:100] *= 2
    with pytest.raises(UserError, match="the LLM is no longer the one that .* was made from"):
        list(make(other, folder, max_norm=1.02))


@pytest.fixture
def opened(llm, tmp_path):
    """opened(**changes) -> the rows that settings describe; `llm`, `text`, `seed`, `sites`..."""
    (tmp_path / "text").mkdir()

    def rows(llm=llm, text=None, seed=0, sites=(A,), batch=4, **data):
        (tmp_path / "text" / "a.txt").write_text("\n".join(text or story(5, documents=60)))
        config = LocalConfig(
            path=str(tmp_path / "text"),
            cache=True,
            **({"context": CONTEXT, "cache_folder": str(tmp_path / "cache")} | data),
        )
        tokens = open_tokens(
            open_text(config), llm.tokenizer, context=config.context, seed=seed
        ).train
        return open_rows(LLMConfig(name="tiny", batch=batch), config, seed, llm, tokens, sites)

    return rows


def test_whatever_changes_the_rows_has_a_cache_of_its_own(opened, llm):
    edited = llm._replace(model=copy.deepcopy(llm.model))
    next(iter(edited.model.parameters())).data[3, 5] += 1e-3
    text = story(5, documents=60)
    changed = [
        {},
        {"seed": 1},
        {"batch": 5},
        {"context": 9},
        {"keep_special": True},
        {"max_norm": 10.0},
        {"max_norm": 10.0, "sites": (A, B)},
        {"llm": llm._replace(model=copy.deepcopy(llm.model).bfloat16())},
        {"llm": edited},
        {"text": [text[0] + "a", *text[1:]]},
        {"text": text[::-1]},
        {"held_out": 0.2},
    ]
    folders = [opened(**change).store.folder for change in changed]
    assert len(set(folders)) == len(changed)
    same = [{}, {"pool": 99}, {"sites": (A, B)}, {"llm": copy.deepcopy(llm)}]
    assert {opened(**change).store.folder for change in same} == {folders[0]}


def test_every_bit_of_an_llm_is_looked_at(llm, monkeypatch):
    monkeypatch.setattr(sources_module, "PLACES", 16)
    monkeypatch.setattr(sources_module, "PIECE", 100)
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        model = copy.deepcopy(llm.model).to(dtype)
        tensors = [t for t in model.state_dict().values() if t.numel() > 100]
        known = {llm_fingerprint(model)}
        for tensor in tensors:
            tensor.view(torch.uint8).flatten()[-1] ^= 1  # the first of the last number's bits
            known.add(llm_fingerprint(model))
        assert len(known) == 1 + len(tensors) > 5
        bits = tensors[0].view(torch.uint8)
        bits.copy_(bits.flip(0))  # which no sum can see
        assert llm_fingerprint(model) not in known


@pytest.mark.parametrize("what", ["processor", "torch", "transformers"])
def test_what_computes_the_rows_is_in_the_key(opened, monkeypatch, what):
    here = opened().store.folder
    match what:
        case "processor":
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other")
        case "torch":
            monkeypatch.setattr(torch, "__version__", "other")
        case "transformers":
            monkeypatch.setattr(sources_module.importlib.metadata, "version", lambda name: "other")
    assert opened().store.folder != here


def test_a_streamed_text_is_known_by_its_files_too(llm, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    config = HubConfig(name=str(folder), held_out_documents=1, cache=True, context=CONTEXT)

    def known():
        tokens = open_tokens(open_text(config), llm.tokenizer, context=CONTEXT, seed=0).train
        rows = LLMRows(llm, tokens, SITES, batch=4)
        return sources_module.settings(LLMConfig(name="tiny"), config, 0, rows)["data"]

    lines = [f'{{"text": "{"abc" * 100}"}}\n'] * 300
    (folder / "a.jsonl").write_text("".join(lines))
    first = known()
    assert known() == first
    (folder / "a.jsonl").write_text("".join([*lines[:-1], '{"text": "abd"}\n']))
    changed = known()
    assert changed["text"] == first["text"], "its beginning is the same"
    assert changed["files"] != first["files"] is not None


def test_files_that_cannot_be_asked_about_end_no_run(tmp_path):
    assert sources_module._files(HubConfig(name=str(tmp_path / "gone"))) is None


def test_a_streamed_text_is_known_by_its_beginning(llm):
    def fingerprint(texts):
        data = Dataset.from_dict({"text": texts}).to_iterable_dataset()
        return open_tokens(Text(data, data), llm.tokenizer, context=8, seed=0).train.fingerprint()

    assert fingerprint(["abc", "def"]) == fingerprint(["abc", "def"])
    assert len({fingerprint(t) for t in (["abc", "def"], ["abd", "def"], ["abc", "deg"])}) == 3


def test_without_the_setting_nothing_is_cached(opened, llm):
    tokens = opened().live.tokens
    config = LocalConfig(path="text", context=CONTEXT)
    assert isinstance(open_rows(LLMConfig(name="tiny"), config, 0, llm, tokens, [A]), LLMRows)
    with pytest.raises(UserError, match="data.cache_folder=x has no meaning without data.cache"):
        replace(config, cache_folder="x")


def test_the_folder_may_be_below_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("~/big") == tmp_path / "big"
    assert cache_folder(None) == tmp_path / "xdg" / "sae_lightning" / "activations"
