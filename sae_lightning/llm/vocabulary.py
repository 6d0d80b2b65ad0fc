"""Tokens as people read them."""

import re
from functools import cache

from sae_lightning.llm.load import LLM


def vocabulary(llm: LLM) -> list[str]:
    """Every token id that the model knows, as it reads: with its leading space.

    Bytes that are no character on their own are written as <0xE2>, ids of a padded embedding that
    no token has as <unused 50000>.
    """
    tokenizer, size = llm.tokenizer, llm.model.get_output_embeddings().weight.shape[0]
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    pieces += [None] * (size - len(pieces))
    literal = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    learned = [piece for piece in pieces if piece is not None and piece not in literal]
    if "Ġ" in learned and all(_alphabet().keys() >= set(piece) for piece in learned):
        read = {piece: _from_bytes(piece) for piece in learned}
    else:
        read = _decoded(tokenizer, learned)
    read |= {piece: piece for piece in literal}
    return [f"<unused {i}>" if p is None else read[p] for i, p in enumerate(pieces)]


def _decoded(tokenizer, pieces: list[str]) -> dict[str, str]:
    """Text of pieces whose alphabet only the tokenizer knows, such as sentencepiece's."""
    # Alone or in front a piece would lose its space, so that it is read behind another.
    front = tokenizer.encode("a", add_special_tokens=False)[-1:]
    ids = [[*front, i] for i in tokenizer.convert_tokens_to_ids(pieces)]
    start, *texts = tokenizer.batch_decode([front, *ids], clean_up_tokenization_spaces=False)
    return {
        # U+FFFD is what decoding makes of half a character; the piece is its bytes already
        piece: piece if "\ufffd" in text else text.removeprefix(start)
        for piece, text in zip(pieces, texts, strict=True)
    }


def _from_bytes(piece: str) -> str:
    """Text of a piece of byte-level BPE."""
    text = bytes(map(_alphabet().get, piece)).decode("utf8", "surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda found: f"<0x{ord(found[0]) - 0xDC00:02X}>", text)


@cache
def _alphabet() -> dict[str, int]:
    """Character -> the byte that byte-level BPE writes as it (GPT-2, Radford et al. 2019): what
    Latin-1 can print stands for itself, the other 68 bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
