"""Text files become documents on disk unchanged, in bounded memory."""

import gzip
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset

from sae_lightning.stream import documents, flat, local_text, open_text
from sae_lightning.stream.local import LocalConfig
from sae_lightning.stream.local_text import copy_text_files
from sae_lightning.stream.tokens import open_tokens

SIZE = 4 << 20


def read(path, tokenizer):
    return open_tokens(open_text(LocalConfig(path=str(path))), tokenizer, context=9, seed=0)


@pytest.mark.parametrize("kind", ["txt", "md.gz", "saved"])
def test_a_long_document_is_never_in_memory_as_a_whole(kind, tokenizer, tmp_path, monkeypatch):
    text, file = "the quick “brown” fox\n" * (SIZE // 26), tmp_path / f"long.{kind}"
    if kind == "saved":
        Dataset.from_dict({"text": [text]}).save_to_disk(file)
    else:
        file.write_bytes(gzip.compress(text.encode(), 1) if "gz" in kind else text.encode())
    monkeypatch.setattr(documents, "SCANNED_BYTES", 1 << 16)
    monkeypatch.setattr(flat, "PIECE_BYTES", 1 << 16)
    monkeypatch.setattr(local_text, "READ_CHARACTERS", 1 << 16)
    monkeypatch.setattr(flat, "TOKENISED_CHARACTERS", 1 << 16)
    monkeypatch.setattr(flat, "WRITTEN_TOKENS", 1 << 16)
    calls = []

    class Coarse:  # a token for 100 characters: quick
        backend_tokenizer, bos_token_id, eos_token_id = tokenizer.backend_tokenizer, 1, 2

        def __call__(self, texts, **_):
            calls.extend(len(text.encode()) for text in texts if len(text) > 3)
            return {"input_ids": [[5] * -(-len(text) // 100) for text in texts]}

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    short = tmp_path / "short.txt"
    short.write_text("imports everything")
    read(short, Coarse()).held_out.pick_sequences(1)
    calls.clear()
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        tokens = read(file, Coarse())
        tokens.held_out.pick_sequences(3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    assert peak + (pool.max_memory() or 0) < SIZE / 3
    assert sum(calls) == len(text.encode())
    calls.clear()
    again = read(file, Coarse())
    assert again.train.fingerprint() == tokens.train.fingerprint()
    again.held_out.pick_sequences(3)
    assert not calls, "both of its parts are tokenised once and for all"


def test_files_are_documents_as_python_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr(local_text, "READ_CHARACTERS", 3)
    monkeypatch.setattr(local_text, "WRITTEN_BYTES", 20)
    texts = ["", "a\r\nb\rc\n\r\n" * 5, "я🦊私\r\n" * 9, "", "\ufeffmark", *["x", "", "yz"] * 9]
    files = []
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02}.txt").write_bytes(text.encode())
        files.append(str(tmp_path / f"{i:02}.txt"))
    for _ in range(2):
        texts = [Path(f).read_text("utf-8-sig") for f in files]  # without byte order marks
        assert list(copy_text_files(files)["text"]) == texts
    (tmp_path / "03.txt").write_text("no longer empty")
    assert copy_text_files(files)["text"][3] == "no longer empty"


def test_a_file_that_cannot_be_read_is_no_fault_of_the_copy(tmp_path, monkeypatch):
    def refuse(file, *_, **__):
        raise PermissionError(13, "Permission denied", file)

    (tmp_path / "a.txt").write_text("mine")
    monkeypatch.setattr(local_text, "open_file", refuse)
    with pytest.raises(documents.UserError, match=r"a.txt: cannot be read .*denied: '.*a.txt'"):
        open_text(LocalConfig(path=str(tmp_path / "a.txt")))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_documents_are_looked_at_where_they_lie(kind):
    texts = ["", "one", None, "zwei", "три", None, ""]
    column = pa.chunked_array([texts, [], [None], texts * 3], kind)
    for start in range(12):
        part = column.slice(start, 11)
        views = list(documents.view_texts(part))
        assert [view.to_pybytes().decode() for view in views] == [x or "" for x in part.to_pylist()]
        assert all(lies_in(view, part) for view in views)


def test_a_split_document_is_not_copied():
    texts = ["a note", "the quick brown fox " * 900, None]
    data = Dataset.from_dict({"text": texts})
    for part in documents.hold_out(data, 0.3)[:2]:
        (text,) = documents.view_texts(part.data.column("text").slice(len(part.data) - 1))
        assert len(text) > 1000 and lies_in(text, data.data.column("text"))


def lies_in(text: pa.Buffer, column: pa.ChunkedArray) -> bool:
    """Whether a text is empty or a substring of one in a column."""
    whole = [chunk.buffers()[2] for chunk in column.chunks]
    return not len(text) or any(
        buffer and 0 <= text.address - buffer.address <= len(buffer) - len(text) for buffer in whole
    )
