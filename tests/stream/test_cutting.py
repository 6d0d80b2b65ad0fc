"""Long documents are tokenised in pieces, with the same tokens, in bounded memory."""

import json

import numpy as np
import pytest
from datasets import Dataset
from small_text import SEPARATOR, byte_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sae_lightning.errors import UserError
from sae_lightning.stream import flat
from sae_lightning.stream.documents import SplitDocuments
from sae_lightning.stream.flat import tokenise_documents, tokenise_indexed
from sae_lightning.stream.tokens import open_tokens

WORDS = "the quick  brown fox (jumps), over-the\tlazy\n\ndog.\nWhile 7 wizards mix 1,234 of—them "
LONG = WORDS * 40
PIECE = 200
GPT4 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of this kind, trained on WORDS."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space="prefix" in kind, use_regex=False)
    before = {
        "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "gpt2 prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
        "gpt4": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(GPT4), "isolated"), byte_level]
        ),
        "unigram": pre_tokenizers.Metaspace(),
        "word pieces": pre_tokenizers.BertPreTokenizer(),
    }.get(kind, pre_tokenizers.Metaspace(prepend_scheme="first" if "first" in kind else "always"))
    options = {"vocab_size": 300, "show_progress": False, "special_tokens": ["<unk>"]}
    if kind == "unigram":
        model, trainer = models.Unigram(), trainers.UnigramTrainer(unk_token="<unk>", **options)
    elif kind == "word pieces":
        model, trainer = models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(**options)
    else:
        model, trainer = models.BPE(), trainers.BpeTrainer(**options)
    backend = Tokenizer(model)
    backend.pre_tokenizer = before
    backend.train_from_iterator([WORDS], trainer)
    if kind == "llama2":  # the space is put before each text, and words are told by it alone
        written = json.loads(backend.to_str()) | {"pre_tokenizer": None}
        backend = Tokenizer.from_str(json.dumps(written))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


KINDS = ["gpt2", "gpt2 prefix", "gpt4", "metaspace", "metaspace first"]
KINDS += ["unigram", "word pieces", "llama2"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_in_pieces_has_the_tokens_of_the_whole(kind, monkeypatch):
    tokenizer, texts = trained(kind), [LONG, "short", "", LONG[7:]]
    whole = tokenise_documents(tokenizer, texts, 299)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [x.tolist() for x in whole] == [[*x, 299] if x else [] for x in ids], "as it ever was"
    monkeypatch.setattr(flat, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(flat, "TOKENISED_CHARACTERS", 3 * PIECE)
    for one, other in zip(whole, tokenise_documents(tokenizer, texts, 299), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    "text", ["x" * 999, "я" * 999, "私" * 999, "🦊" * 999, "a🦊\n" * 300, " " * 999]
)
def test_text_that_offers_no_space_is_cut_between_characters(text, monkeypatch):
    monkeypatch.setattr(flat, "PIECE_BYTES", PIECE)
    calls, tokenizer = [], byte_tokenizer()

    def counting(texts, **options):
        calls.extend(texts)
        return tokenizer(texts, **options)

    (tokens,) = tokenise_documents(counting, [text], SEPARATOR)
    assert "".join(calls[4:]) == text, "after a look at how the tokenizer treats spaces"
    assert max(len(piece.encode()) for piece in calls) <= PIECE
    assert len(tokens) == len(text.encode()) + 1 and tokens[-1] == SEPARATOR


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("part", ["train", "held_out"])
def test_what_is_tokenised_at_a_time_is_bounded(streamed, part, monkeypatch):
    monkeypatch.setattr(flat, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(flat, "TOKENISED_CHARACTERS", 2 * PIECE)
    sizes, tokenizer = [], byte_tokenizer()

    class Counting(PreTrainedTokenizerFast):
        def __call__(self, texts, **options):
            sizes.append(sum(map(len, texts)))
            return super().__call__(texts, **options)

    counting = Counting(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    texts = [LONG, *["note"] * 500, LONG]
    data = Dataset.from_dict({"text": texts})
    data = data.to_iterable_dataset() if streamed else data
    tokens = open_tokens(SplitDocuments(data, data), counting, context=9, seed=0)
    if part == "train":
        tokens.train.next(100)
    else:
        tokens.held_out.pick_sequences(100)
    assert len(sizes) > 12 and max(sizes) < 3 * PIECE


def test_the_bar_moves_within_a_document(tokenizer, monkeypatch):
    from contextlib import contextmanager

    monkeypatch.setattr(flat, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(flat, "TOKENISED_CHARACTERS", PIECE)
    moves = []

    @contextmanager
    def phase(description, total):
        assert total == 2
        yield moves.append

    monkeypatch.setattr(flat, "phase", phase)
    tokenise_indexed(Dataset.from_dict({"text": [LONG, "note"]}), tokenizer, SEPARATOR)
    assert len(moves) > 10 and max(moves[:-1]) < 0.1
    assert sum(moves) == pytest.approx(2)


def test_a_document_on_disk_that_is_not_utf8_is_named(tokenizer):
    import pyarrow as pa

    offsets = pa.py_buffer(np.array([0, 1, 5], np.int32))
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"acaf\xe9")])
    data = Dataset(pa.table({"text": column}))
    with pytest.raises(UserError, match="document 2 of the text is not UTF-8 .byte 0xe9 after 3 b"):
        tokenise_indexed(data, tokenizer, SEPARATOR)
