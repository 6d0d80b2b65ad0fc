"""Every token is decoded as in text: with its leading space, or as bytes if it is no text."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_llm import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from sae_lightning.errors import UserError
from sae_lightning.llm.generate import encode_prompt
from sae_lightning.llm.load import LLM, Dtype, LLMConfig, load_llm, load_tokenizer
from sae_lightning.llm.vocabulary import (
    find_bos_id,
    find_separator_id,
    find_special_ids,
    read_vocabulary,
)
from sae_lightning.stream import make_source
from sae_lightning.stream.documents import SplitDocuments, make_documents
from sae_lightning.stream.local import LocalConfig
from sae_lightning.stream.tokens import open_tokens


def words_of(core: Tokenizer, size: int) -> list[str]:
    """The vocabulary of a tokenizer under a model with `size` output embeddings."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>"
    )
    head = torch.nn.Linear(1, size, bias=False)
    model = SimpleNamespace(get_output_embeddings=lambda: head)
    return read_vocabulary(LLM(model=model, tokenizer=tokenizer, name="words"))


def test_the_words_of_a_text_put_together_are_the_text(llm):
    text = "the quick brown fox jumps"
    words = read_vocabulary(llm)
    assert len(words) == llm.model.get_output_embeddings().weight.shape[0] == 100
    assert "".join(words[i] for i in llm.tokenizer.encode(text)) == text
    assert words[:2] == ["<bos>", "<eos>"]


def test_byte_level_tokens_that_are_no_character_show_their_bytes():
    alphabet = sorted(ByteLevel.alphabet())
    euro, a_umlaut = (ByteLevel(add_prefix_space=False).pre_tokenize_str(c)[0][0] for c in "€ä")
    pieces = ["<s>", "</s>", *alphabet, "Ġthe", euro, euro[:2], "Ġ" + euro[:1], a_umlaut + euro[1:]]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = words_of(core, len(pieces) + 2)
    assert words[-7:-2] == [" the", "€", "<0xE2><0x82>", " <0xE2>", "ä<0x82><0xAC>"]
    assert words[-2:] == [f"<unused {len(pieces)}>", f"<unused {len(pieces) + 1}>"]
    assert "".join(words[2:258]).count("<0x") == 128  # ASCII reads as it is
    assert {words[pieces.index(c)] for c in "aĠĊ"} == {"a", " ", "\n"}


def test_sentencepiece_tokens_keep_the_space_that_decoding_them_alone_drops():
    pieces = ["<s>", "</s>", "<0xE2>", "<0x0A>", "▁a", "▁the", "the", "▁", "a"]
    core = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    assert core.decode([5]) == "the"
    assert words_of(core, 9) == ["<s>", "</s>", "<0xE2>", "\n", " a", " the", "the", " ", "a"]


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """folder(bos, eos, ids, generation) -> a copy of a tiny LLM whose tokenizer names these tokens,
    and its config and generation config these ids."""

    def make(bos=None, eos=None, ids=(None, None), generation=(None, None)) -> str:
        made = tmp_path / "llm"
        shutil.copytree(tiny_folder("llama"), made)
        tokenizer_of(bos, eos).save_pretrained(made)
        names = ("bos_token_id", "eos_token_id")
        config = json.loads((made / "config.json").read_text())
        (made / "config.json").write_text(json.dumps(config | dict(zip(names, ids, strict=True))))
        transformers.GenerationConfig(**dict(zip(names, generation, strict=True))).save_pretrained(
            made
        )
        return str(made)

    return make


def tokenizer_of(bos, eos):
    named = {"bos_token": bos, "eos_token": eos}
    core = tiny_tokenizer().backend_tokenizer
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, **{name: token for name, token in named.items() if token}
    )


def test_a_tokenizer_is_read_once_until_its_settings_or_files_change(folder):
    config = LLMConfig(name=folder(eos="<eos>"))
    first = load_tokenizer(config)
    assert load_tokenizer(replace(config)) is first
    other = load_tokenizer(replace(config, separator="the"))
    assert (first.eos_token, other.eos_token) == ("<eos>", "the")
    again = load_tokenizer(config)
    assert again is not first
    os.utime(Path(config.name) / "tokenizer.json", ns=(0, 0))
    assert load_tokenizer(config) is not again
    (Path(config.name) / "model.onnx").symlink_to("deleted")
    assert load_tokenizer(config).eos_token == "<eos>"


@pytest.mark.parametrize(
    ("named", "settings", "expected"),
    [
        ({"ids": (1, 0)}, {}, (1, 0)),
        ({"generation": (0, [1, 7])}, {}, (0, 1)),
        ({"ids": (0, None), "generation": (5, 1)}, {}, (0, 1)),
        ({"ids": (-1, []), "generation": (0, 1)}, {}, (0, 1)),
        ({"eos": "<eos>", "ids": (0, 5)}, {}, (1, 1)),  # the tokenizer's own count
        ({"bos": "<bos>", "eos": "<eos>", "ids": (5, 6)}, {}, (0, 1)),
        ({}, {"bos": "<bos>"}, (0, 0)),
        ({"eos": "<eos>"}, {"bos": "<bos>"}, (0, 1)),
        ({"ids": (0, 0)}, {"separator": "<eos>"}, (0, 1)),
    ],
)
def test_the_special_tokens_are_those_of_the_settings_the_tokenizer_or_the_models_config(
    folder, named, settings, expected
):
    tokenizer = load_tokenizer(LLMConfig(name=folder(**named), **settings))
    assert (find_bos_id(tokenizer), find_separator_id(tokenizer)) == expected
    assert find_special_ids(tokenizer) == sorted({*expected})


def test_a_token_is_given_as_it_reads_or_as_the_vocabulary_writes_it(folder):
    name, plain = folder(eos="<eos>"), tiny_tokenizer()
    fox = plain.encode(" fox")
    assert len(fox) == 1
    for text in (" fox", "Ġfox"):
        tokenizer = load_tokenizer(LLMConfig(name=name, separator=text))
        assert find_separator_id(tokenizer) == fox[0]
        assert tokenizer.encode("the fox<eos>") == plain.encode("the fox<eos>")
    with pytest.raises(UserError, match=r"^llm\.bos=<start>: this tokenizer has no such token"):
        load_tokenizer(LLMConfig(name=name, bos="<start>"))
    with pytest.raises(UserError, match=r"^llm\.bos=: empty"):
        LLMConfig(name=name, bos="")


def test_special_tokens_that_nobody_names_are_asked_for(folder):
    tokenizer = load_tokenizer(LLMConfig(name=folder()))
    with pytest.raises(UserError, match=r"neither a BOS nor an EOS .* give one as llm\.bos="):
        find_bos_id(tokenizer)


@pytest.fixture
def larger(folder):
    """A tiny LLM whose tokenizer has 20 tokens more than the embedding has rows, one special."""
    name = folder("<bos>", "<eos>")
    tokenizer = tokenizer_of("<bos>", "<eos>")
    tokenizer.add_tokens([f"x{i}y" for i in range(19)])
    tokenizer.add_special_tokens({"pad_token": "<image>"})
    tokenizer.save_pretrained(name)
    return LLMConfig(name=name, dtype=Dtype.float32, device="cpu")


MISSING = r"the token 'x15y' \(id 105\) has no row in the LLM's embedding, which has 100; leave it"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("part", ["train", "held_out"])
def test_a_text_that_needs_a_token_without_a_row_is_refused(larger, part, streamed):
    tokenizer, ordinary = load_tokenizer(larger), make_documents(["the quick fox " * 40] * 9)
    beyond = make_documents(["the fox " * 40, "the x15y fox"])
    if streamed:
        ordinary, beyond = ordinary.to_iterable_dataset(), beyond.to_iterable_dataset()
    text = SplitDocuments(ordinary, ordinary, "data.path=a")._replace(**{part: beyond})
    with pytest.raises(UserError, match=f"^data.path=a: {MISSING}"):
        found = open_tokens(text, tokenizer, context=8, seed=0)
        found.train.next(100)
        found.held_out.pick_sequences(100)
    with pytest.raises(UserError, match=f"^prompt: {MISSING}"):
        encode_prompt(tokenizer, "the x15y", 1, None)


def test_a_token_without_a_row_that_no_text_needs_is_no_matter(larger):
    tokenizer, text = load_tokenizer(larger), make_documents(["the quick fox " * 40] * 9)
    open_tokens(SplitDocuments(text, text), tokenizer, context=8, seed=0).train.next(100)
    assert find_special_ids(tokenizer) == [0, 1]
    assert len(read_vocabulary(load_llm(larger))) == 100


def test_a_special_token_without_a_row_names_its_setting(larger):
    tokenizer = load_tokenizer(replace(larger, separator="<image>"))
    with pytest.raises(
        UserError, match=r"^llm\.separator: the token '<image>' \(id 109\) .* set l"
    ):
        find_separator_id(tokenizer)


def test_what_the_tokenizer_lacks_is_told_before_weights_are_read(larger, monkeypatch, tmp_path):
    monkeypatch.setattr("sae_lightning.stream.text_source.load_llm", None)
    (tmp_path / "text").mkdir()
    for name, words in (("train", "the x15y fox"), ("other", "the quick fox")):
        (tmp_path / "text" / f"{name}.txt").write_text(words * 30)
    source = make_source(larger, LocalConfig(kind="local", path=str(tmp_path / "text")), 0)
    with pytest.raises(UserError, match="no row in the LLM's embedding"):
        source.open_llm()
