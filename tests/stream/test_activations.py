"""Activations from files: which matrix is at which site, every row once an epoch, exact resume."""

import os
import re
import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from sae_lightning import UserError
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.sites import Kind, LayerConfig, Site
from sae_lightning.stream import make_source
from sae_lightning.stream.activation_files import OPEN_SHARDS, UNNAMED, find_matrices
from sae_lightning.stream.activations import ActivationsConfig
from sae_lightning.stream.saved_rows import split_rows
from sae_lightning.stream.source import Needs

RESID, MLP = Site(9, Kind.resid), Site(9, Kind.mlp)


def matrix(n: int, d: int = 4, first: int = 0) -> np.ndarray:
    """[n, d] whose first column is the number of the row."""
    x = np.random.default_rng(first).normal(size=(n, d)).astype(np.float32)
    x[:, 0] = np.arange(first, first + n)
    return x


def save_list_column(file, x: np.ndarray, name: str = "embedding", rows=None) -> None:
    lists = rows if rows is not None else list(x)
    table = pa.table({name: pa.array(lists, pa.list_(pa.float32())), "id": range(len(lists))})
    pq.write_table(table, file, row_group_size=7)


def read_all(found) -> torch.Tensor:
    return found.read_rows([(0, found.row_count)])


def source(path, **settings):
    data = ActivationsConfig(path=str(path), **settings)
    return make_source(LLMConfig(name="none", device="cpu"), data, seed=0)


def open_stream(path, sites=(UNNAMED,), **settings):
    return source(path, **settings).open_data(Needs(sites, 100, 0)).rows


def numbers(stream, batches: int) -> list[int]:
    """The first column at the first site of some batches: the numbers of the rows."""
    rows = (stream.next(10**9).activations[stream.sites[0]] for _ in range(batches))
    return [int(number) for x in rows for number in x[:, 0]]


def save(kind: str, file, x: np.ndarray) -> None:
    tensor = torch.from_numpy(x)
    if kind in ("float32", "float16", "bfloat16", "float64"):
        save_file({"x": tensor.to(getattr(torch, kind))}, f"{file}.safetensors")
    elif kind == "npy":
        np.save(f"{file}.npy", x)
    elif kind == "npy in columns":
        np.save(f"{file}.npy", np.asfortranarray(x))
    elif kind == "npy of the other byte order":
        np.save(f"{file}.npy", x.astype(">f4"))
    elif kind == "parquet lists":
        save_list_column(f"{file}.parquet", x)
    else:
        pq.write_table(pa.table({str(n): x[:, n] for n in range(x.shape[1])}), f"{file}.parquet")


KINDS = ("float32", "float16", "bfloat16", "float64", "npy", "npy in columns")
KINDS += ("npy of the other byte order", "parquet lists", "parquet columns")


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_of_a_matrix_in_several_files_are_read_as_they_were_saved(tmp_path, kind):
    x = matrix(50)
    for number, part in enumerate(np.split(x, [20, 21, 40])):
        save(kind, tmp_path / f"part-{number}", part)
    (tmp_path / "about.json").write_text("{}")  # files of other kinds may lie there too
    found = find_matrices(tmp_path, {}, "data.path=acts")
    assert list(found) == [UNNAMED]
    dtype = getattr(torch, kind, torch.float32)
    dtype = torch.float32 if dtype is torch.float64 else dtype
    assert torch.equal(read_all(found[UNNAMED]), torch.from_numpy(x).to(dtype))
    some = found[UNNAMED].read_rows([(38, 42), (19, 22)])
    assert torch.equal(some, torch.from_numpy(x[[38, 39, 40, 41, 19, 20, 21]]).to(dtype))


def test_more_shards_than_a_process_may_open_are_read(tmp_path):
    x = matrix(OPEN_SHARDS + 60)
    for number, row in enumerate(x):
        np.save(tmp_path / f"{number:03}.npy", row[None])
    found = find_matrices(tmp_path, {}, "data.path=acts")[UNNAMED]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + OPEN_SHARDS + 20, hard)
    )
    try:
        found.try_files()
        assert torch.equal(read_all(found), torch.from_numpy(x))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_site_is_named_by_tensor_column_file_or_folder(tmp_path):
    x, y = torch.from_numpy(matrix(6)), torch.from_numpy(matrix(6, 3, first=100))
    both = {"resid.9": x, "mlp.9": y, "labels": torch.arange(6), "other": x + 1}
    for name in ("tensors", "files", "folders/resid.9", "folders/mlp.9", "columns"):
        (tmp_path / name).mkdir(parents=True)
    save_file(both, tmp_path / "tensors" / "all.safetensors")
    np.save(tmp_path / "files" / "resid.9.npy", x.numpy())
    np.save(tmp_path / "files" / "mlp.9.npy", y.numpy())
    for name, tensor in (("resid.9", x), ("mlp.9", y)):
        for number, part in enumerate(tensor.split(4)):
            save_file({"x": part.contiguous()}, tmp_path / f"folders/{name}/{number}.safetensors")
    lists = {name: pa.array(list(both[name].numpy())) for name in ("resid.9", "mlp.9")}
    pq.write_table(pa.table(lists), tmp_path / "columns" / "a.parquet")
    for folder in ("tensors", "files", "folders", "columns"):
        found = find_matrices(tmp_path / folder, {}, "data.path=acts")
        assert list(found) == [MLP, RESID], folder
        assert torch.equal(read_all(found[RESID]), x)
        assert torch.equal(read_all(found[MLP]), y)
    (chosen,) = find_matrices(tmp_path / "tensors", {"resid.11": "other"}, "").items()
    assert chosen[0] == Site(11, Kind.resid) and torch.equal(read_all(chosen[1]), x + 1)


def test_an_epoch_has_every_training_row_once_in_a_new_order_and_no_held_out_one(tmp_path):
    np.save(tmp_path / "x.npy", matrix(5000))
    opened = source(tmp_path).open_data(Needs([UNNAMED], 10**6, 0))
    held_out = opened.held_out.activations(UNNAMED)[:, 0].int().tolist()
    assert len(held_out) == pytest.approx(0.05 * 5000, rel=0.1)
    first, second = numbers(opened.rows, 3), numbers(opened.rows, 3)
    assert sorted(first) == sorted(second) == sorted({*range(5000)} - {*held_out})
    assert first != second and first != sorted(first)
    assert opened.rows.epoch == 2


def test_runs_of_every_seed_are_scored_on_the_same_rows_from_all_over_the_files(tmp_path):
    np.save(tmp_path / "x.npy", matrix(20_000))
    held_out = []
    for seed in (0, 1):
        this = source(tmp_path)
        this.seed = seed
        opened = this.open_data(Needs([UNNAMED], 320, 0))
        held_out.append(opened.held_out.activations(UNNAMED))
    assert torch.equal(*held_out) and len(held_out[0]) == 320
    assert held_out[0][:, 0].min() < 3000 and held_out[0][:, 0].max() > 17_000


@pytest.mark.parametrize("n", [2, 3, 99, 200, 1000, 13_001])
def test_no_row_is_lost_between_blocks(n):
    blocks = split_rows(n, 0.05)
    sizes = [blocks.count_rows(part).sum() for part in (blocks.train, blocks.held_out)]
    assert sum(sizes) == n and min(sizes) >= 1


@pytest.mark.parametrize("served", [0, 1, 2, 3, 4, 7])
def test_a_stream_goes_on_where_its_state_was_saved(tmp_path, served):
    """5,000 rows make three batches an epoch: the states lie within, at its end and beyond."""
    np.save(tmp_path / "x.npy", matrix(5000))
    whole = open_stream(tmp_path)
    numbers(whole, served)
    state = whole.state_dict()
    again = open_stream(tmp_path)
    again.load_state_dict(state)
    assert again.epoch == whole.epoch
    assert numbers(again, 5) == numbers(whole, 5)


def test_a_state_has_to_be_possible(tmp_path):
    np.save(tmp_path / "x.npy", matrix(300))
    this = source(tmp_path)
    shape, rows = this.read_shape(), open_stream(tmp_path)
    pool = {"rows": {"resid.0": torch.empty(0, 4)}, "ids": torch.empty(0, dtype=torch.int64)}
    pool["random"] = np.random.PCG64(0).state
    state = {"served": 2, "rows": rows.state_dict(), "pool": pool}
    this.check_stream_state(state, [UNNAMED], shape, 2)
    with pytest.raises(ValueError, match="lacks resid.0"):
        wrong = state | {"rows": state["rows"] | {"files": {}}}
        this.check_stream_state(wrong, [UNNAMED], shape, 2)


def test_rows_of_two_sites_are_of_the_same_tokens(tmp_path):
    x = matrix(3000)
    save_file(
        {"resid.9": torch.from_numpy(x), "mlp.9": torch.from_numpy(-x)}, tmp_path / "a.safetensors"
    )
    stream = open_stream(tmp_path, (MLP, RESID))
    for _ in range(3):
        rows = stream.next(1).activations
        assert torch.equal(rows[RESID], -rows[MLP])


def test_a_resumed_run_refuses_other_files(tmp_path):
    np.save(tmp_path / "x.npy", matrix(300))
    state = open_stream(tmp_path).state_dict()
    changed = matrix(300)
    changed[77, 2] += 1
    np.save(tmp_path / "x.npy", changed)
    message = r"^data\.path: the activations at resid\.0 are no longer those that the run .* resume"
    with pytest.raises(UserError, match=message):
        open_stream(tmp_path).load_state_dict(state)


def test_a_parquet_file_is_copied_once_and_again_after_a_change(tmp_path, own_cache):
    file = tmp_path / "x.parquet"
    for x in (matrix(30), matrix(31, first=5)):
        save_list_column(file, x)
        for _ in range(2):
            assert torch.equal(read_all(find_matrices(file, {}, "")[UNNAMED]), torch.from_numpy(x))
    assert len(list((tmp_path / "cache").rglob("activations-*.npy"))) == 2


def write_bad(folder) -> None:
    """Files of whose content nothing can be trained on."""
    x = matrix(10)
    np.save(folder / "integers.npy", np.arange(6).reshape(2, 3))
    np.save(folder / "cube.npy", np.zeros((2, 3, 4), np.float32))
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (folder / "cut.npy").write_bytes((folder / "cube.npy").read_bytes()[:-8])
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}, folder / "two.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "two.safetensors").read_bytes()[:50])
    (folder / "cut.parquet").write_bytes(b"PAR1")
    (folder / "widths").mkdir()
    np.save(folder / "widths" / "a.npy", x)
    np.save(folder / "widths" / "b.npy", x[:, :3])
    (folder / "empty").mkdir()
    pq.write_table(pa.table({"id": [1, 2]}), folder / "ids.parquet")


BAD = {
    "integers.npy": r"integers\.npy holds int64, not floats; save it as float32",
    "cube.npy": r"cube\.npy has the shape \[2, 3, 4\]; save a matrix \[rows, d\]",
    "objects.npy": r"objects\.npy cannot be read \(Array can't be memory-mapped",
    "cut.npy": r"cut\.npy cannot be read \(mmap length is greater than file size\)",
    "two.safetensors": r"several matrices \(a, b\); choose one as 'data\.sites=\{resid\.0:a\}'",
    "cut.safetensors": r"cut\.safetensors cannot be read \(.*; repair it, or leave it out",
    "cut.parquet": r"cut\.parquet cannot be read",
    "widths": r"a\.npy has 4 columns, but .*b\.npy has 3",
    "empty": r"no file there that ends in \.safetensors, \.npy, \.parquet",
    "*.csv": r"no file there",
    "ids.parquet": r"id in .*ids\.parquet holds int64, not floats",
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_hold_no_matrix_are_refused_in_one_line(tmp_path, name):
    write_bad(tmp_path)
    with pytest.raises(UserError, match=rf"^data\.path.*{BAD[name]}") as error:
        source(tmp_path / name).read_shape()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["npy", "bfloat16", "parquet lists"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_named(tmp_path, kind, bad):
    for number in range(2):
        x = matrix(100)
        x[40, 3] = bad if number else 0
        save(kind, tmp_path / f"part-{number}", x)
    stream = open_stream(tmp_path, held_out=0.01)
    with pytest.raises(UserError, match=r"^data\.path: row 40 \(from 0\) of .*part-1.* NaN or inf"):
        stream.next(1)


def test_a_list_of_another_length_is_named(tmp_path):
    x = list(matrix(40))
    save_list_column(tmp_path / "x.parquet", None, rows=[*x[:33], x[33][:2], *x[34:]])
    with pytest.raises(
        UserError, match=r"x\.parquet: row 33 \(from 0\) of embedding is not a list"
    ):
        open_stream(tmp_path)
    save_list_column(tmp_path / "x.parquet", None, rows=[*x[:12], None, *x[13:]])
    with pytest.raises(
        UserError, match=r"x\.parquet: row 12 \(from 0\) of embedding is not a list"
    ):
        open_stream(tmp_path)


def test_sites_that_are_not_there_or_do_not_fit_are_refused(tmp_path):
    np.save(tmp_path / "one.npy", matrix(100))
    save_file(
        {"resid.9": torch.zeros(8, 3), "mlp.9": torch.zeros(7, 3)}, tmp_path / "a.safetensors"
    )
    one, several = source(tmp_path / "one.npy"), source(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"^layer\.index=3: the matrix in .* is at resid\.0; leave"):
        one.find_sites(LayerConfig(index=3), one.read_shape())
    with pytest.raises(UserError, match=r"has no attn\.9; there are mlp\.9, resid\.9 \(layer\.ind"):
        several.find_sites(LayerConfig(index=9, source=Kind.attn), several.read_shape())
    with pytest.raises(
        UserError, match=r"resid\.9 has 8 rows and mlp\.9 7; row i has to be the sa"
    ):
        several.check_data([RESID, MLP], 1)
    with pytest.raises(
        UserError, match=r"100 rows, of which data\.held_out=0\.05 leaves 95 to tra"
    ):
        one.check_data([UNNAMED], 96)
    one.check_data([UNNAMED], 95)
    with pytest.raises(
        UserError, match=r"^data\.sites: .*nothing that is called cls; there are ml"
    ):
        source(tmp_path / "a.safetensors", sites={"resid.0": "cls"}).read_shape()


def test_settings_of_no_meaning_are_refused():
    for settings, message in (
        ({"path": ""}, r"^data\.path is empty"),
        ({"path": "a", "held_out": 1.0}, r"^data\.held_out=1\.0: the share of the rows"),
        (
            {"path": "a", "sites": {"layer9": "x"}},
            r"^data\.sites: layer9 is not a site; name one as",
        ),
    ):
        with pytest.raises(UserError, match=message):
            ActivationsConfig(**settings)
    message = r"^llm\.name=gpt2 has no meaning with data=activations, whose activations come from"
    with pytest.raises(UserError, match=message):
        make_source(LLMConfig(name="gpt2"), ActivationsConfig(path="a"), 0).check_settings(
            LayerConfig(index=3)
        )


def test_the_metadata_of_an_sae_say_what_it_reads():
    pair = LayerConfig(index=9, source=Kind.mlp_in, target=Kind.mlp).resolve_sites(10)
    data = {"model_name": "unknown", "dataset_path": "a"}
    named = {"hook_name": "mlp_in.9", "hook_name_out": "mlp.9"}
    assert source("a").make_saelens_metadata(pair) == data | named
    mapped = source("a", model="dino", sites={"mlp_in.9": "before"}).make_saelens_metadata(pair)
    hooks = {"hook_name": "before", "hook_name_out": "blocks.9.hook_mlp_out"}
    assert mapped == data | {"model_name": "dino"} | hooks


def test_nothing_of_a_large_file_is_read_before_it_is_needed(tmp_path):
    """A sparse file of 4 TB: its header is read, and the rows that are asked for."""
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (1, 1024))
    x.flush()
    header = (tmp_path / "x.npy").read_bytes()[:128]
    rows = 2**30
    header = re.sub(rb"\(1, 1024\), } *", f"({rows}, 1024), }}".encode().ljust(40), header)
    with open(tmp_path / "x.npy", "r+b") as file:
        file.write(header[:127].ljust(127) + b"\n")
        file.truncate(128 + rows * 4096)
    found = find_matrices(tmp_path, {}, "")[UNNAMED]
    assert found.row_count == rows
    assert found.read_rows([(rows - 2, rows), (5, 6)]).shape == (3, 1024)
