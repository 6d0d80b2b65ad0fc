"""What the key of an activation cache is made of, and where the cache lies."""

import copy
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from small_text import story

from sae_lightning.errors import UserError
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.sites import Kind, Site
from sae_lightning.stream import open_rows as open_rows_module
from sae_lightning.stream import open_text
from sae_lightning.stream.documents import SplitDocuments
from sae_lightning.stream.hub import HubConfig
from sae_lightning.stream.local import LocalConfig
from sae_lightning.stream.open_rows import hash_llm, open_rows, pick_cache_folder
from sae_lightning.stream.rows import LLMRows
from sae_lightning.stream.tokens import open_tokens

A, B = SITES = [Site(0, Kind.mlp), Site(1, Kind.resid)]
CONTEXT = 8


@pytest.fixture
def opened(llm, tmp_path):
    """opened(**changes) -> rows with default settings but for `changes` (llm, text, seed, ...)."""
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
        {"sites": (A, B)},
        {"max_norm": 10.0, "sites": (A, B)},
        {"llm": llm._replace(model=copy.deepcopy(llm.model).bfloat16())},
        {"llm": edited},
        {"text": [text[0] + "a", *text[1:]]},
        {"text": text[::-1]},
        {"held_out": 0.2},
    ]
    folders = [opened(**change).folder for change in changed]
    assert len(set(folders)) == len(changed)
    same = [{}, {"pool": 99}, {"sites": (A, A)}, {"llm": copy.deepcopy(llm)}]
    assert {opened(**change).folder for change in same} == {folders[0]}


def test_every_bit_of_an_llm_is_looked_at(llm, monkeypatch):
    monkeypatch.setattr(open_rows_module, "HASHED_NUMBERS", 16)
    monkeypatch.setattr(open_rows_module, "SUMMED_NUMBERS", 100)
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        model = copy.deepcopy(llm.model).to(dtype)
        tensors = [t for t in model.state_dict().values() if t.numel() > 100]
        known = {hash_llm(model)}
        for tensor in tensors:
            tensor.view(torch.uint8).flatten()[-1] ^= 1  # the first of the last number's bits
            known.add(hash_llm(model))
        assert len(known) == 1 + len(tensors) > 5
        bits = tensors[0].view(torch.uint8)
        bits.copy_(bits.flip(0))  # which no sum can see
        assert hash_llm(model) not in known


@pytest.mark.parametrize("what", ["processor", "torch", "transformers"])
def test_what_computes_the_rows_is_in_the_key(opened, monkeypatch, what):
    here = opened().folder
    match what:
        case "processor":
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other")
        case "torch":
            monkeypatch.setattr(torch, "__version__", "other")
        case "transformers":
            monkeypatch.setattr(
                open_rows_module.importlib.metadata, "version", lambda name: "other"
            )
    assert opened().folder != here


def test_a_streamed_text_is_known_by_its_files_too(llm, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    config = HubConfig(name=str(folder), held_out_documents=1, cache=True, context=CONTEXT)

    def known():
        tokens = open_tokens(open_text(config), llm.tokenizer, context=CONTEXT, seed=0).train
        rows = LLMRows(llm, tokens, SITES, batch=4)
        return open_rows_module.identify_rows(LLMConfig(name="tiny"), config, 0, rows)["data"]

    lines = [f'{{"text": "{"abc" * 100}"}}\n'] * 300
    (folder / "a.jsonl").write_text("".join(lines))
    first = known()
    assert known() == first
    (folder / "a.jsonl").write_text("".join([*lines[:-1], '{"text": "abd"}\n']))
    changed = known()
    assert changed["text"] == first["text"], "its beginning is the same"
    assert changed["files"] != first["files"] is not None


def test_files_that_cannot_be_asked_about_end_no_run(tmp_path):
    assert HubConfig(name=str(tmp_path / "gone")).hash_files() is None


def test_a_streamed_text_is_known_by_its_beginning(llm):
    def fingerprint(texts):
        data = Dataset.from_dict({"text": texts}).to_iterable_dataset()
        return open_tokens(
            SplitDocuments(data, data), llm.tokenizer, context=8, seed=0
        ).train.fingerprint()

    assert fingerprint(["abc", "def"]) == fingerprint(["abc", "def"])
    assert len({fingerprint(t) for t in (["abc", "def"], ["abd", "def"], ["abc", "deg"])}) == 3


def test_without_the_setting_nothing_is_cached(opened, llm):
    tokens = opened().live.token_stream
    config = LocalConfig(path="text", context=CONTEXT)
    assert isinstance(open_rows(LLMConfig(name="tiny"), config, 0, llm, tokens, [A]), LLMRows)
    with pytest.raises(UserError, match="data.cache_folder=x has no meaning without data.cache"):
        replace(config, cache_folder="x")


def test_the_folder_may_be_below_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert pick_cache_folder("~/big") == tmp_path / "big"
    assert pick_cache_folder(None) == tmp_path / "xdg" / "sae_lightning" / "activations"
