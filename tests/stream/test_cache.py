"""The activation cache: cached = live, whatever was cached, lost or damaged before."""

import copy
import errno
import json
import os
import pickle
import re
import shutil
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from small_text import STYLES, story

from sae_lightning.errors import UserError
from sae_lightning.llm.capture import capture
from sae_lightning.llm.sites import Kind, Site
from sae_lightning.stream import cache as cache_module
from sae_lightning.stream import rows as rows_module
from sae_lightning.stream import shards as shards_module
from sae_lightning.stream.batches import BatchStream
from sae_lightning.stream.cache import CachedRows
from sae_lightning.stream.documents import SplitDocuments
from sae_lightning.stream.rows import LLMRows
from sae_lightning.stream.shards import Shard
from sae_lightning.stream.tokens import open_tokens

A, B = SITES = [Site(0, Kind.mlp), Site(1, Kind.resid)]
CONTEXT, LLM_BATCH, WIDTH = 8, 4, 16
# a float32 LLM batch of 4 sequences has at most 28 rows, 1792 bytes a site: 3 or 4 fill a shard
SMALL_SHARDS = 10000


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_BYTES", SMALL_SHARDS)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "activations" / "key"


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """Records the sites of every LLM pass."""
    passes = []

    def counting(model, tokens, sites, places):
        passes.append(tuple(sites))
        return capture(model, tokens, sites, places)

    monkeypatch.setattr(rows_module, "capture", counting)
    return passes


def make(
    llm, folder=None, *, style="indexed", sites=SITES, max_norm=None, resumed=False, **pool
) -> BatchStream:
    """A stream of 40 batches, live without a `folder`."""
    data = Dataset.from_dict({"text": story(5, documents=60)})
    data = data if style == "indexed" else data.to_iterable_dataset()
    tokens = open_tokens(SplitDocuments(data, data), llm.tokenizer, context=CONTEXT, seed=3).train
    rows = LLMRows(llm, tokens, sites, batch=LLM_BATCH, max_norm=max_norm)
    if folder is not None:
        rows = CachedRows(rows, folder, {"made": "for a test"}, WIDTH, resumed)
    return BatchStream(rows, **({"batch": 16, "total_batches": 40, "pool": 64, "seed": 7} | pool))


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


def shards(folder) -> list[Path]:
    return sorted(folder.glob("[0-9]*.safetensors"))


def end(folder) -> int:
    """Number of LLM batches in the cache."""
    return Shard(shards(folder)[-1]).stop if shards(folder) else 0


def leftovers(folder) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_longer_run_continues_a_shorter_ones_cache(llm, folder, calls):
    reference = list(make(llm, total_batches=90))
    passes = len(calls)
    for total in (10, 41, 90):  # the shorter ones end in the middle of shards
        shorter = list(make(llm, total_batches=total))
        assert_same(list(make(llm, folder, total_batches=total)), shorter)
    calls.clear()
    assert_same(list(make(llm, folder, total_batches=90)), reference)
    assert calls == []
    there = [Shard(path) for path in shards(folder)]
    assert [0, *(shard.stop for shard in there)] == [*(shard.first for shard in there), passes]


def test_what_a_shard_says_of_itself(llm, folder):
    half = llm._replace(model=copy.deepcopy(llm.model).to(torch.bfloat16))
    list(make(half, folder, style="streamed"))
    assert json.loads((folder / "manifest.json").read_text()) == {"made": "for a test"}
    with safe_open(shards(folder)[1], "pt") as file:
        about = json.loads(file.metadata()["about"])
        assert set(file.keys()) == {"ids", "mlp.0", "resid.1", "carry"}
        activations = file.get_tensor("resid.1")
    assert about.keys() == {"rows", "epochs", "texts", "state"}
    assert activations.shape == (sum(about["rows"]), WIDTH)
    assert activations.dtype == torch.bfloat16
    row_bytes = 2 * 2 * WIDTH + 8
    assert (sum(about["rows"]) - 28) * row_bytes < SMALL_SHARDS <= sum(about["rows"]) * row_bytes


KILLED = {
    "in the middle of a shard": (rows_module.LLMRows, "next", 9),
    "before a shard is written": (shards_module, "save_file", 2),
    "before it is on disk": (os, "fsync", 3),  # the first is the description's
    "before the renaming": (os, "replace", 3),
}


def power_cut(monkeypatch, place, name, at):
    """Simulate a power cut in call number `at` of a function: nothing is cleaned up afterwards."""
    function, count = getattr(place, name), []

    def cut(*args, **kwargs):
        count.append(1)
        if len(count) == at:
            monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
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
    assert len(leftovers(folder)) == ("before" in when), "never read"
    kept = end(folder)
    calls.clear()
    assert_same(list(make(llm, folder)), reference)
    assert len(calls) == passes - kept < passes
    assert leftovers(folder) == []
    calls.clear()
    assert_same(list(make(llm, folder)), reference)
    assert calls == []


def flip(path, place=0.5):
    """Flip one bit of a file, by default in the middle."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


HARM = {
    "a bit of an activation": flip,
    "the last bit": lambda path: flip(path, 1 - 1e-9),
    "a bit of the length": lambda path: flip(path, 0),
    "a number in the metadata": lambda path: path.write_bytes(
        re.sub(rb"(rows\W+)\d", rb"\g<1>5", path.read_bytes())
    ),
    "a name": lambda path: path.write_bytes(path.read_bytes().replace(b"texts", b"texta")),
    "a dtype": lambda path: path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"')),
    "its end": lambda path: os.truncate(path, path.stat().st_size - 1),
    "all but its beginning": lambda path: os.truncate(path, 40),
    "all of it": lambda path: os.truncate(path, 0),
    "the file": os.remove,
}


@pytest.mark.slow
@pytest.mark.parametrize("what", HARM)
def test_a_damaged_shard_is_made_again_and_no_other(llm, folder, calls, capsys, what):
    reference = list(make(llm))
    list(make(llm, folder))
    second, third = shards(folder)[1:3]
    before = Shard(second)._crc32
    HARM[what](second)
    calls.clear()
    assert_same(list(make(llm, folder)), reference)
    assert len(calls) == Shard(third).first - Shard(second).first
    assert Shard(second)._crc32 == before
    told = capsys.readouterr().out.replace("\n", " ")
    assert (f"{second} is damaged: the LLM computes it again" in told) == (what != "the file")
    calls.clear()
    assert_same(list(make(llm, folder)), reference)
    assert calls == []


def test_a_pipe_in_place_of_a_shard_is_not_waited_for(llm, folder, calls):
    list(make(llm, folder))
    (first, *_) = shards(folder)
    first.unlink()
    os.mkfifo(first)
    calls.clear()
    assert list(make(llm, folder)) and calls


def rewrite(path: Path, change) -> None:
    """Apply `change` to a shard's header and tensors and save it with a valid checksum."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    tensors = load_file(path)
    change(about, tensors)
    told = about.pop("all of it", None) or json.dumps(about)
    save_file(
        tensors, path, {"about": told, "crc32": shards_module._compute_checksum(told, tensors)}
    )


def put(place: str, value):
    """A change(about, tensors) for `rewrite` that sets an entry of the header."""

    def change(about, _):
        *path, last = place.split("/")
        for key in path:
            about = about[key]
        about[last] = value(about[last]) if callable(value) else value

    return change


def tensor(name: str, value):
    """A change(about, tensors) for `rewrite` that sets a tensor."""
    return lambda _, tensors: tensors.update({name: value(tensors[name]).contiguous()})


STRANGE = {
    "no mapping": lambda about, _: about.update({"all of it": "[3]"}),
    "no JSON": lambda about, _: about.update({"all of it": "{"}),
    "a deep list": lambda about, _: about.update({"all of it": "[" * 100_000}),
    "rows that are no list": put("rows", 3),
    "rows of another type": put("rows", lambda rows: [float(n) for n in rows]),
    "negative rows": put("rows", lambda rows: [-n for n in rows]),
    "too many rows": put("rows", lambda rows: [n + 1 for n in rows]),
    "more rows than there are numbers": put("rows", lambda rows: [2**62 for n in rows]),
    "missing epochs": put("epochs", lambda epochs: epochs[1:]),
    "a text of another type": put("texts", lambda texts: ["1" for _ in texts]),
    "a state of another type": put("state", [1]),
    "a state without text": put("state/tokens", {}),
    "another place": put("state/llm_batches", 1),
    "another place in the text": put("state/tokens/cursor", 5),
    "an epoch before the first": put("state/tokens/epoch", 0),
    "a text without tokens": put("state/tokens/tokens", 0),
    "medians of another type": put("state/medians", {"resid.1": "large"}),
    "another site": lambda _, tensors: tensors.update(more=tensors.pop(str(A))),
    "whole numbers": tensor(str(A), lambda x: x.long()),
    "double precision": tensor(str(B), lambda x: x.double()),
    "complex numbers": tensor(str(B), lambda x: x * 1j),
    "another width": tensor(str(A), lambda x: x[:, :5]),
    "fewer rows": tensor(str(B), lambda x: x[:7]),
    "another shape": tensor(str(A), lambda x: x[0]),
    "ids of another type": tensor("ids", lambda x: x.int()),
    "negative ids": tensor("ids", lambda x: x - 1000),
    "ids of later sequences": tensor("ids", lambda x: x + 1000),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", STRANGE)
def test_a_shard_of_strange_content_is_made_again_though_its_checksum_is_good(
    llm, folder, what, capsys
):
    reference = list(make(llm, total_batches=8))
    list(make(llm, folder, total_batches=8))
    first = shards(folder)[0]
    good = Shard(first)._crc32
    rewrite(first, STRANGE[what])
    assert_same(list(make(llm, folder, total_batches=8)), reference)
    assert f"{first} is damaged: the LLM computes it again" in capsys.readouterr().out.replace(
        "\n", " "
    )
    assert Shard(first)._crc32 == good


@pytest.mark.parametrize(
    "header",
    [
        {"ids": {"dtype": "I64", "shape": [4], "data_offsets": [0, 1 << 40]}},
        {"ids": {"dtype": "I64", "shape": [1 << 62], "data_offsets": [0, 32]}},
        {"ids": {"dtype": "I64", "shape": [-4], "data_offsets": [32, 0]}},
        {"ids": {"dtype": "Z9", "shape": [4], "data_offsets": [0, 32]}},
        {"ids": [], "__metadata__": {"about": "{}"}},
        {"__metadata__": {"about": 3}},
        {},
    ],
)
def test_a_shard_with_a_strange_header_is_made_again(llm, folder, header):
    reference = list(make(llm, total_batches=8))
    list(make(llm, folder, total_batches=8))
    first = shards(folder)[0]
    good, text = Shard(first)._crc32, json.dumps(header).encode()
    first.write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))
    assert_same(list(make(llm, folder, total_batches=8)), reference)
    assert Shard(first)._crc32 == good


BEFORE = ["there", "shorter", "nothing"]
FATES = product(BEFORE, ["there", "deleted", "shorter", "damaged", "never"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "meanwhile", "style"),
    [(*fate, STYLES[number % 2]) for number, fate in enumerate(FATES)],
)
def test_resuming_is_exact_whatever_became_of_the_cache(llm, folder, before, meanwhile, style):
    settings = {"style": style, "total_batches": 14, "max_norm": 1.02}  # drops about half
    reference = list(make(llm, **settings))

    def prepared(state):
        shutil.rmtree(folder, ignore_errors=True)
        if state in ("there", "damaged"):
            list(make(llm, folder, **settings))
        if state == "damaged":
            flip(shards(folder)[-2])
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


@pytest.mark.slow
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
    assert end(folder) == place > 0


def test_a_saved_state_is_plain_enough_for_a_safe_load(llm, folder, tmp_path):
    list(make(llm, folder, style="streamed", max_norm=2.0))
    stream = make(llm, folder, style="streamed", max_norm=2.0)
    next(iter(stream))
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    resumed = make(llm, style="streamed", max_norm=2.0)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same([next(iter(resumed))], [next(iter(stream))])


def fails(monkeypatch, place, name, at, error):
    """Make a function raise `error` from call number `at` on."""
    function, count = getattr(place, name), []

    def failing(*args, **kwargs):
        count.append(1)
        if len(count) >= at:
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(place, name, failing)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FULL_TOO = SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "name", "error"),
    [(shards_module, "save_file", FULL_TOO), (os, "replace", FULL), (os, "fsync", FULL)],
)
def test_a_disk_that_fills_up_ends_the_caching_and_not_the_run(
    llm, folder, calls, monkeypatch, capsys, place, name, error
):
    reference = list(make(llm))
    passes = len(calls)
    with monkeypatch.context() as patch:
        fails(patch, place, name, 3, error)
        assert_same(list(make(llm, folder)), reference)
    told = capsys.readouterr().out
    assert "is not written any further (No space left on device); training goes on" in told
    assert leftovers(folder) == []
    kept = end(folder)
    calls.clear()
    assert_same(list(make(llm, folder)), reference)
    assert 0 < len(calls) == passes - kept < passes


def test_the_space_is_estimated_told_and_refused_before_anything_is_written(
    llm, folder, monkeypatch, capsys
):
    stream = make(llm, folder)
    needed = 640 * (2 * WIDTH * 4 + 8)
    list(stream)
    size = sum(sum(Shard(path).row_counts) for path in shards(folder)) * (2 * WIDTH * 4 + 8)
    assert needed <= size <= needed + 28 * (2 * WIDTH * 4 + 8), "but for the last LLM batch's rest"
    told = capsys.readouterr().out
    assert f"the activation cache takes about {needed / 1e6:.1f} MB in {folder}, " in told
    empty = folder.with_name("empty")
    enough = needed + cache_module.RESERVED_BYTES
    monkeypatch.setattr(cache_module, "read_free_space", lambda folder: enough - 1)
    with pytest.raises(
        UserError, match="data.cache: no space for 0.1 MB in .* and 4.3 GB to spare .*cache=false"
    ):
        list(make(llm, empty))
    assert [*empty.iterdir()] == []
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
    monkeypatch.setattr(cache_module, "read_free_space", lambda folder: 0)
    resumed = make(llm, folder, resumed=True)
    if served:  # else it was killed before its first checkpoint
        next(iter(stream))
        resumed.load_state_dict(stream.state_dict())
    assert_same(list(resumed), reference[served:])
    assert capsys.readouterr().out.count("this run adds nothing to it") == 1
    assert shards(folder) == []


def test_the_space_that_checkpoints_need_is_left_to_them(llm, folder, monkeypatch, capsys):
    reference = list(make(llm))
    free = [10**12] * 4 + [cache_module.RESERVED_BYTES - 1] * 100
    monkeypatch.setattr(cache_module, "read_free_space", lambda folder: free.pop(0))
    assert_same(list(make(llm, folder)), reference)
    assert "any further (less than 4.3 GB free); training" in capsys.readouterr().out
    assert len(shards(folder)) == 3, "of the four looks, the first was at the whole run"


def test_a_source_that_is_closed_lets_another_write_and_leaves_nothing_half_done(
    llm, folder, capsys
):
    failed = make(llm, folder)
    next(iter(failed))
    before = shards(folder)
    failed.close()
    assert (shards(folder), leftovers(folder)) == (before, [])
    capsys.readouterr()
    list(make(llm, folder))
    assert "another process" not in capsys.readouterr().out


def test_no_shard_is_mapped_but_the_one_at_the_place(llm, folder):
    list(make(llm, folder))
    stream, most = make(llm, folder), 0
    for _ in stream:
        most = max(most, sum(bool(shard._tensors) for shard in stream.rows.shards))
    assert most == 1
    assert not any(shard._tensors for shard in stream.rows.shards)


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

    @contextmanager
    def forbidden(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        yield

    monkeypatch.setattr(shards_module, "hold_lock", forbidden)
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
    complete = Shard(shards(folder)[-1]).first
    assert passes - len(calls) >= complete > 0
    told = capsys.readouterr().out
    assert told.count("another process writes the activation cache") == 1
    list(first)
    calls.clear()
    capsys.readouterr()
    assert_same(list(make(llm, folder)), reference)
    assert calls == []
    assert "another process" not in capsys.readouterr().out


@pytest.mark.slow
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


def test_a_text_that_changed_unseen_is_refused_and_not_mixed_in(llm, folder, monkeypatch):
    list(make(llm, folder))
    before, swapped = shards(folder), {"a": "b", "b": "a"}
    texts = ["".join(swapped.get(c, c) for c in text) for text in story(5, documents=60)]
    monkeypatch.setitem(globals(), "story", lambda _, documents: texts)
    stream = make(llm, folder, total_batches=60)
    with pytest.raises(UserError, match="the text is no longer the one that .* was made from"):
        list(stream)
    stream.close()
    assert leftovers(folder) == []
    assert shards(folder) == before


@pytest.mark.parametrize("style", STYLES)
def test_a_run_does_not_go_on_with_the_cache_of_a_changed_text(llm, folder, style, monkeypatch):
    stream = make(llm, folder, style=style)
    next(iter(stream))
    state, swapped = stream.state_dict(), str.maketrans("ab", "ba")
    texts = [text.translate(swapped) for text in story(5, documents=60)]
    monkeypatch.setitem(globals(), "story", lambda _, documents: texts)
    other = folder.with_name("of the changed text")
    list(make(llm, other, style=style))
    with pytest.raises(UserError, match="no longer the one that the run to be resumed read"):
        make(llm, other, style=style, resumed=True).load_state_dict(state)
