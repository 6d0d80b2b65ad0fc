"""Every token reads as it stands in text: with its space, or as bytes where it is no text."""

from types import SimpleNamespace

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from sae_lightning.llm.load import LLM
from sae_lightning.llm.vocabulary import vocabulary


def words_of(core: Tokenizer, size: int) -> list[str]:
    """The vocabulary of a tokenizer under a model with `size` output embeddings."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>"
    )
    head = torch.nn.Linear(1, size, bias=False)
    model = SimpleNamespace(get_output_embeddings=lambda: head)
    return vocabulary(LLM(model=model, tokenizer=tokenizer, name="words"))


def test_the_words_of_a_text_put_together_are_the_text(llm):
    text = "the quick brown fox jumps"
    words = vocabulary(llm)
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
