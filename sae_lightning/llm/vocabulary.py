"""Special tokens of a tokenizer, and the text of every token."""

import re
from collections.abc import Sequence

import numpy as np

from sae_lightning.errors import UserError
from sae_lightning.llm.load import LLM


def find_special_ids(tokenizer) -> list[int]:
    """Ascending ids of the special tokens (BOS, EOS, padding, ...) that have a row in the LLM's
    embedding."""
    rows = _read_embedding_rows(tokenizer)
    return sorted(i for i in set(tokenizer.all_special_ids) if rows is None or i < rows)


def find_bos_id(tokenizer) -> int:
    """Id of the token that starts every sequence: BOS, or EOS in a model without BOS."""
    return _pick_id(tokenizer, "llm.bos", tokenizer.bos_token_id, tokenizer.eos_token_id)


def find_separator_id(tokenizer) -> int:
    """Id of the token between two documents: EOS, or BOS in a model without EOS."""
    return _pick_id(tokenizer, "llm.separator", tokenizer.eos_token_id, tokenizer.bos_token_id)


def _pick_id(tokenizer, setting: str, *ids: int | None) -> int:
    """The first of `ids` that is not None; UserError if all are None, or it has no embedding."""
    for token_id in ids:
        if token_id is not None:
            check_ids(tokenizer, [token_id], setting, f"set {setting} to a token that has a row")
            return token_id
    raise UserError(
        "llm.name: this tokenizer has neither a BOS nor an EOS token, and the model's config names "
        "none; give one as llm.bos=..., for example llm.bos='<s>'"
    )


def check_ids(
    tokenizer,
    ids: Sequence[int] | np.ndarray,
    where: str,
    remedy: str = "leave it out, or give the LLM that was trained with this tokenizer",
) -> None:
    """UserError if one of `ids`, which come from `where`, has no row in the LLM's embedding."""
    rows = _read_embedding_rows(tokenizer)
    if rows is not None and len(ids) and (highest := int(np.max(ids))) >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise UserError(
            f"{where}: the token {token!r} (id {highest:,}) has no row in the LLM's embedding, "
            f"which has {rows:,}; {remedy}"
        )


def _read_embedding_rows(tokenizer) -> int | None:
    """Number of rows of the LLM's embedding, which `read_tokenizer` notes on the tokenizer; None if
    every token has a row."""
    return getattr(tokenizer, "embedding_rows", None)


def read_vocabulary(llm: LLM) -> list[str]:
    """Text of every token id of the model, with its leading space. Bytes that form no whole
    character are written as <0xE2>, padding rows of the embedding as <unused 50000>."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer, size = llm.tokenizer, llm.model.get_output_embeddings().weight.shape[0]
    # tokens as the vocabulary writes them, such as Ġcat for " cat"
    entries = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    literal = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}  # shown as they are
    learned = [entry for entry in entries if entry is not None and entry not in literal]
    # the character that byte-level BPE (GPT-2, Radford et al. 2019) writes for a byte -> the byte
    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    if "Ġ" in learned and all(alphabet.keys() >= set(entry) for entry in learned):
        texts = {entry: _decode_bytes(bytes(alphabet[c] for c in entry)) for entry in learned}
    else:
        texts = _decode(tokenizer, learned)
    texts |= {entry: entry for entry in literal}
    entries += [None] * (size - len(entries))
    return [f"<unused {i}>" if entry is None else texts[entry] for i, entry in enumerate(entries)]


def _decode(tokenizer, entries: list[str]) -> dict[str, str]:
    """Text of entries as the tokenizer decodes them, for tokenizers other than byte-level BPE."""
    # An entry that is decoded first would lose its leading space, so another token precedes it.
    prefix = tokenizer.encode("a", add_special_tokens=False)[-1:]
    ids = [[*prefix, i] for i in tokenizer.convert_tokens_to_ids(entries)]
    prefix_text, *texts = tokenizer.batch_decode([prefix, *ids], clean_up_tokenization_spaces=False)
    return {
        # half a character decodes to U+FFFD; the entry itself already names the byte (<0xE2>)
        entry: entry if "\ufffd" in text else text.removeprefix(prefix_text)
        for entry, text in zip(entries, texts, strict=True)
    }


def _decode_bytes(encoded: bytes) -> str:
    text = encoded.decode("utf8", "surrogateescape")  # bytes of no character -> U+DC00 + byte
    return re.sub("[\udc80-\udcff]", lambda byte: f"<0x{ord(byte[0]) - 0xDC00:02X}>", text)
