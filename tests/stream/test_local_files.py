"""Local files: each is read once, whatever its name; errors name the unreadable file."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from sae_lightning.errors import UserError
from sae_lightning.stream import open_text
from sae_lightning.stream.local import LocalConfig, load_documents


def both(path, **settings) -> list[str]:
    """All documents of a text, training and held out."""
    opened = open_text(LocalConfig(path=str(path), held_out=0.34, **settings))
    return sorted([*opened.train["text"], *opened.held_out["text"]])


def write(folder, *names: str) -> Path:
    """Write files whose content is their own name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"this is {name}")
    return folder


NAMES = [
    *("notes1.txt", "notes[1].txt", "s*.txt", "star.txt", "q?.txt", "{x}.txt", "a#b.txt"),
    *("README.md", "50%.txt", "c:d.txt", "~.txt", "[!a].md", "__x/config.json.txt", "UP.TXT"),
]


@pytest.mark.parametrize("folder", ["text", "my [old] books", "who? *", "[a-z]/b", ".hidden/t"])
def test_a_file_that_exists_is_no_pattern(tmp_path, folder):
    there, expected = write(tmp_path / folder, *NAMES), sorted(f"this is {name}" for name in NAMES)
    assert both(there) == expected
    assert both(there / "**" / "*.*") == expected, "nor is the folder that a glob begins with"
    for name in NAMES[:5]:
        file = LocalConfig(path=str(there / name))
        assert load_documents(file)["text"] == [f"this is {name}"]
        assert load_documents(file.with_absolute_paths())["text"] == [f"this is {name}"]


def test_linked_folders_are_read_once_and_not_in_circles(tmp_path):
    folder, other = write(tmp_path / "t", "a.txt", "sub/b.txt"), write(tmp_path / "o", "c.txt")
    (folder / "out").symlink_to(other)
    (folder / "sub" / "circle").symlink_to(folder)
    (other / "back").symlink_to(folder)
    (folder / "again").symlink_to(folder / "sub")
    (folder / "z.txt").symlink_to(folder / "a.txt")
    expected = ["this is a.txt", "this is c.txt", "this is sub/b.txt"]
    assert both(folder) == both(folder / "**" / "*.txt") == expected


ROWS = [{"text": text, "label": label} for text, label in zip("abc", "xyz", strict=True)]
CONTENT = {
    "txt": "one\n\ntwo",
    "csv": "text,label\na,x\nb,y\nc,z\n",
    "jsonl": "\n".join(map(json.dumps, ROWS)),
    "json": json.dumps(ROWS),
}


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".GZ"])
@pytest.mark.parametrize("kind", CONTENT)
def test_compressed_files_are_read(tmp_path, kind, ending):
    packed = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[ending.lower()]
    file = tmp_path / f"part.{kind}{ending}"
    file.write_bytes(packed.compress(CONTENT[kind].encode()))
    data = load_documents(LocalConfig(path=str(file)))
    assert list(data) == ([{"text": CONTENT["txt"]}] if kind == "txt" else ROWS)


def test_what_cannot_be_decompressed_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setattr("sae_lightning.stream.local_files.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a.jsonl.zst needs .* zstandard: pip install zstandard$"):
        both(tmp_path)


def test_words_that_stand_for_nothing_elsewhere_are_text_in_a_csv(tmp_path):
    texts = ["NA", "null", "None", "nan", "", "N/A", "7", "1.50", "true", 'a "b", c']
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    lines = [f"{text},{i if i else ''}" for i, text in enumerate(quoted)]
    (tmp_path / "a.csv").write_text("\n".join(["text,number", *lines]))
    data = load_documents(LocalConfig(path=str(tmp_path)))
    assert list(data["text"]) == texts
    assert list(data["number"]) == ["", *map(str, range(1, 10))], "whatever the first rows hold"


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "json"])
def test_a_file_that_is_not_utf8_is_named(tmp_path, kind):
    for i in range(5):
        (tmp_path / f"{i}.{kind}").write_text(CONTENT[kind])
    bad = tmp_path / f"3.{kind}"
    bad.write_bytes(CONTENT[kind].encode() + "\n\ncafé".encode("latin-1"))
    line = CONTENT[kind].count("\n") + 3
    with pytest.raises(UserError) as error:
        both(tmp_path)
    told = f"line {line} of {bad} is not UTF-8 (byte 0xe9); convert the file (iconv -f latin1"
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", CONTENT)
def test_a_byte_order_mark_is_no_text(tmp_path, kind):
    folder = write(tmp_path / "t")
    (folder / f"a.{kind}").write_text("\ufeff" + CONTENT[kind], "utf-8")
    data = load_documents(LocalConfig(path=str(folder)))
    assert list(data) == ([{"text": CONTENT["txt"]}] if kind == "txt" else ROWS)
    (folder / f"a.{kind}").write_text("\ufeff" + '[{"text": 3}]', "utf-8")
    if kind.startswith("json"):
        with pytest.raises(UserError, match="holds int there, not text, in row 1"):
            both(folder)


ODD = {  # the second of two files, and what is told about it
    "csv": ("text,label\na,x\nb,y,z\n", "cannot be read (Expected 2 fields in line 3, saw 3); rep"),
    "quote.csv": ('text,label\na,x\n"b,y\n', "cannot be read (EOF inside string starting at row "),
    "jsonl": ('{"text": "a"}\n{"text": "b"\n', "is not valid JSON after row 1 (Expecting ',' del"),
    "json": ('[{"text": "a"},', "is not valid JSON after row 0 (Expecting value); repair it"),
    "list.jsonl": ('{"text": "a"}\n["b"]\n', "holds list, not names with values; repair it, or"),
    "object.jsonl": (
        '{"text": "a", "n": 1}\n{"text": "b", "n": 2.5}\n{"text": "b", "n": {"of": 2}}\n',
        "holds dict in n, and an earlier row float; a column has one type",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_rows_that_do_not_fit_are_named_with_their_file(tmp_path, name):
    kind = name.rpartition(".")[2]
    folder = write(tmp_path / "t")
    (folder / f"a.{kind}").write_text(CONTENT[kind])
    content, told = ODD[name]
    (folder / f"b.{kind}").write_text(content)
    with pytest.raises(UserError) as error:
        both(folder)
    assert f"b.{kind} {told}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_a_compressed_file_that_is_damaged_is_named(tmp_path, kind, ending):
    for i in range(3):
        (tmp_path / f"{i}.{kind}").write_text(CONTENT[kind])
    (tmp_path / f"1.{kind}").unlink()
    (tmp_path / f"1.{kind}.{ending}").write_bytes(b"x")
    with pytest.raises(UserError, match=rf"/1\.{kind}\.{ending} cannot be read \(.*\); repair it"):
        both(tmp_path)


STRINGS = [{"text": "x" * 100}] * 3
WRONG = {"number": 7, "list": ["a"], "object": {"a": 1}, "truth": True}


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("files", ["one", "two"])
def test_a_row_that_holds_no_text_is_named_with_its_file(tmp_path, kind, value, files):
    rows = [*STRINGS, {"text": None}, {"id": 3}, {"text": value}, *STRINGS]
    parts = {"a": STRINGS, "b": rows} if files == "two" else {"b": rows}
    for name, content in parts.items():
        text = "\n".join(map(json.dumps, content)) if kind == "jsonl" else json.dumps(content)
        (write(tmp_path / "t") / f"{name}.{kind}").write_text(text)
    told = rf"data.column=text: .* holds {type(value).__name__} there, .* row 6 of .*b.{kind}; "
    for _ in range(2):
        with pytest.raises(UserError, match=told):
            both(tmp_path / "t")


def test_a_row_of_a_saved_data_set_that_holds_no_text_is_named(tmp_path):
    on_mixed = datasets.Features({"text": datasets.Json()})
    data = Dataset.from_dict({"text": ["a", "b", 5]}, features=on_mixed)
    data.save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"saved holds int there, not text, in row 3; its columns"):
        both(tmp_path / "saved")


def test_other_columns_may_hold_anything(tmp_path):
    rows = [{"text": str(i), "n": [1, "a", None][i % 3]} for i in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert both(tmp_path) == [str(i) for i in range(6)]


@pytest.mark.parametrize("made", ["a file", "nowhere"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_cache_folder_that_cannot_be_is_named(tmp_path, monkeypatch, kind, made):
    cache = tmp_path / "home" / "datasets"
    if made == "a file":
        cache.parent.touch()
    else:
        cache = Path("/proc/nowhere/datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    # the builder's default argument was bound when datasets was imported
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: os.mkdir(cache))
    with pytest.raises(UserError, match=rf"its copy in {cache}: .*; set HF_DATASETS_CACHE to ano"):
        both(write(tmp_path / "t", f"a.{kind}"))
