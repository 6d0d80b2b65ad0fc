"""Tokenises an indexed data set into one long array, and streamed documents into an array each.

A document longer than PIECE_BYTES is cut before it is tokenised, because a tokenizer takes 150
bytes of memory for each byte of text:

    ... the quick brown| fox jumps over ...    the space goes with the next word
    ... she said.\n|And then ...               no space between words: after a line break
    ... white\t\t|space ...                    no line break: before any white space
    ... 我思|故我在 ...                          no white space: between any two characters

Tokenizers that first split text into words (byte-level BPE, WordPiece, Unigram with a metaspace)
give the same tokens with and without a cut at a space; those of GPT-2 and its successors also at a
line break. Others (BPE across words) may give different tokens beside any cut, and every tokenizer
may at the last two kinds of cut.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sae_lightning.errors import UserError
from sae_lightning.files import write_atomically
from sae_lightning.llm.chat import ChatEncoder
from sae_lightning.llm.quiet import mute_libraries
from sae_lightning.stream.documents import prepare_text_cache, view_texts
from sae_lightning.terminal import phase

PIECE_BYTES = 1 << 18  # a longer document is cut
TOKENISED_CHARACTERS = 1 << 20  # characters tokenised at a time
FINGERPRINT_TOKENS = 1 << 12  # length of each sample in a long text's fingerprint
WRITTEN_TOKENS = 1 << 22  # tokens written at a time
CUT_PATTERNS = [
    re.compile(pattern, re.DOTALL)  # matches up to the last possible cut of its kind
    for pattern in (rb".*\S(?= \S)", rb".*\S\n(?=\S)", rb".*\S(?=\s)", rb".*(?=[^\x80-\xbf])")
]


class DocumentPiece(NamedTuple):
    """A document, or a piece of one."""

    text: str
    share: float
    """Fraction of the document's bytes; 0 for an empty document."""
    is_first: bool
    is_last: bool


def tokenise_documents(
    tokenizer: Any, texts: Iterable[str | None], separator: int
) -> list[np.ndarray]:
    """Tokenise documents and end each with the separator -> arrays [tokens + 1] int32.

    A document without tokens, or None, gives an empty array."""
    contents = ((text or "").encode("utf-8", "surrogatepass") for text in texts)
    documents, parts = [], []
    for piece, tokens in _tokenise(tokenizer, contents, separator):
        parts.append(tokens)
        if piece.is_last:
            documents.append(np.concatenate(parts))
            parts = []
    return documents


def _tokenise(
    tokenizer: Any, documents: Iterable[Any], separator: int
) -> Iterator[tuple[DocumentPiece, np.ndarray]]:
    """Yield the pieces of UTF-8 documents and their tokens [n] int32. The separator ends the last
    piece of a document, unless the document has no tokens."""
    has_tokens, prepends_space = False, None  # None until a document is cut
    for pieces in _group_pieces(documents):
        if prepends_space is None and any(not piece.is_first for piece in pieces):
            prepends_space = _prepends_space(tokenizer)
        texts = [
            # the tokenizer prepends the space that is removed here
            piece.text.removeprefix(" ") if prepends_space and not piece.is_first else piece.text
            for piece in pieces
        ]
        # not verbose: no warning that a text is longer than the context, as it is cut later
        token_ids = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        for piece, tokens in zip(pieces, token_ids, strict=True):
            has_tokens = bool(tokens) or (has_tokens and not piece.is_first)  # of this document
            ends = has_tokens and piece.is_last
            yield piece, np.asarray([*tokens, separator] if ends else tokens, np.int32)


def _group_pieces(documents: Iterable[Any]) -> Iterator[list[DocumentPiece]]:
    """Yield all pieces in order, in groups of about TOKENISED_CHARACTERS characters."""
    group, size = [], 0
    for number, document in enumerate(documents, 1):
        for piece in _cut_document(memoryview(document), number):
            group.append(piece)
            size += len(piece.text)
            if size >= TOKENISED_CHARACTERS:
                yield group
                group, size = [], 0
    if group:
        yield group


def _cut_document(document: memoryview, number: int) -> Iterator[DocumentPiece]:
    """Yield the pieces of document `number` (from 1); UserError if it is not UTF-8."""
    start, size = 0, len(document)
    while True:
        content = bytes(document[start : start + PIECE_BYTES])
        stop = size
        if start + PIECE_BYTES < size:
            matches = (pattern.match(content) for pattern in CUT_PATTERNS)
            stop = start + next(match.end() for match in matches if match)
        try:
            text = content[: stop - start].decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise UserError(
                f"data: document {number} of the text is not UTF-8 (byte 0x"
                f"{content[error.start]:02x} after {start + error.start} bytes); convert it, or "
                "leave it out"
            ) from error
        yield DocumentPiece(text, (stop - start) / (size or 1), start == 0, stop == size)
        if stop == size:
            return
        start = stop


def _prepends_space(tokenizer: Any) -> bool:
    """Whether a tokenizer prepends a space to every text, even to one that begins with a space."""
    texts = ["a b", "a", " b", "b"]
    whole, a, space_b, b = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return whole != a + space_b and whole == a + b


def tokenise_indexed(
    data: Any,
    tokenizer: Any,
    separator: int,
    name: str = "text",
    chat: ChatEncoder | None = None,
) -> pa.ChunkedArray:
    """Tokenise an indexed (map-style) data set -> [tokens] int32, in a file if the data set is on
    disk. `name` is what the progress bar calls the text; `chat` encodes conversations.

    The file's name is a hash of all that determines the tokens, so that the next run with the same
    data, tokenizer and separator opens that file. Slices are read through its mmap.
    """
    parts = [data._fingerprint, hash_tokenizer(tokenizer), str(separator), str(PIECE_BYTES)]
    if chat:
        parts.append(chat.key)
    key = hashlib.sha256("".join(parts).encode()).hexdigest()[:32]
    with mute_libraries(), phase(f"tokenising the {name}", total=len(data)) as advance:

        def tokenise() -> Iterator[np.ndarray]:
            if chat:
                for document in _read_documents(data):
                    yield chat.encode_chat(json.loads(bytes(document)), separator)
                    advance(1)
                return
            for piece, tokens in _tokenise(tokenizer, _read_documents(data), separator):
                yield tokens
                advance(piece.share)

        if not data.cache_files:
            return pa.chunked_array(_join_arrays(tokenise()), pa.int32())
        file = prepare_text_cache() / f"tokens-{key}.arrow"
        if not file.exists():
            schema = pa.schema({"tokens": pa.int32()})
            with (
                write_atomically(file) as temporary,
                pa.ipc.new_stream(temporary, schema) as stream,
            ):
                for batch in _join_arrays(tokenise()):
                    stream.write_batch(pa.record_batch([batch], schema=schema))
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all().column("tokens")


def _read_documents(data: Any) -> Iterator[Any]:
    """Yield the documents of an indexed data set, without copies."""
    for rows in data.with_format("arrow").iter(100):
        yield from view_texts(rows.column("text"))


def _join_arrays(arrays: Iterable[np.ndarray]) -> Iterator[pa.Array]:
    """Join arrays of tokens into long ones, as slicing many short ones is slow."""
    group, size = [], 0
    for tokens in arrays:
        group.append(tokens)
        size += len(tokens)
        if size >= WRITTEN_TOKENS:
            yield pa.array(np.concatenate(group))
            group, size = [], 0
    if size:
        yield pa.array(np.concatenate(group))


def summarise_tokens(flat: pa.ChunkedArray) -> str:
    """Length and checksum of a text's tokens; beyond a million tokens, the checksum is of evenly
    spaced samples."""
    samples = min(256, -(-len(flat) // FINGERPRINT_TOKENS))
    checksum = 0
    for start in np.linspace(0, len(flat), samples, endpoint=False).astype(np.int64):
        checksum = zlib.crc32(flat.slice(start, FINGERPRINT_TOKENS).to_numpy(), checksum)
    return f"{len(flat)} tokens, crc32 {checksum:08x}"


def hash_tokenizer(tokenizer: Any) -> str:
    """Hash a tokenizer's behaviour; the hash is the same in every process."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer, in Python: hash class and vocabulary
        behaviour: Any = sorted(tokenizer.get_vocab().items())
    else:
        behaviour = json.loads(backend.to_str())
        for name in ("truncation", "padding"):  # left over from its last call
            behaviour.pop(name, None)
    text = json.dumps([type(tokenizer).__name__, behaviour], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
