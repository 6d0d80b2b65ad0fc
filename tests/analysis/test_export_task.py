"""`task=export` writes a whole folder or nothing, and overwrites nothing."""

import os

import pytest
from planted import save_planted
from torch.testing import assert_close

from sae_lightning import load_sae
from sae_lightning.analysis.export_task import WRITERS, ExportTask
from sae_lightning.errors import UserError
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.sites import LayerConfig
from sae_lightning.stream.plays import PlaysConfig


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    """The folder of an SAE that is only read."""
    return save_planted(tmp_path_factory.mktemp("planted"))[1]


def export(run, to, format: str | None = "saelens", **settings) -> None:
    groups = {"llm": LLMConfig(name="x"), "data": PlaysConfig(), "layer": LayerConfig(index=0)}
    task = ExportTask(
        run=str(run), task="export", format=format, to=to and str(to), **groups | settings
    )
    task.execute(["run", "task", "format", "to", *settings])


def test_an_sae_is_written_without_its_llm_and_read_back(sae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export(sae, "exports/mine")
    assert os.listdir("exports") == ["mine"]
    assert_close(load_sae("exports/mine").weights(), load_sae(sae).weights())
    assert load_sae("exports/mine").metadata["hook_name"] == "blocks.1.hook_resid_post"


def test_an_empty_folder_is_taken(sae, tmp_path):
    (tmp_path / "mine").mkdir()
    export(sae, tmp_path / "mine")
    assert load_sae(tmp_path / "mine").config.features == 32


def test_what_is_not_said_is_asked_for(sae, tmp_path):
    with pytest.raises(UserError, match=r"^format is not set: give format=\.\.\. \(saelens"):
        export(sae, tmp_path / "x", None)
    with pytest.raises(
        UserError, match=r"^format=onnx: no such format to write; choose from saelens"
    ):
        export(sae, tmp_path / "x", "onnx")
    with pytest.raises(UserError, match="^to is not set: give the folder to write, as to=exports/"):
        export(sae, None)


def test_weights_are_of_no_text(sae, tmp_path):
    with pytest.raises(UserError, match="^data has no meaning for format=saelens, which holds"):
        export(sae, tmp_path / "x", data=PlaysConfig())


def test_no_file_is_overwritten(sae, tmp_path):
    (tmp_path / "full").mkdir()
    for path in (tmp_path / "full" / "thesis.txt", tmp_path / "file"):
        path.write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    for name, why in (("full", "it is not empty"), ("file", "it is a file"), ("link", "symbolic")):
        with pytest.raises(UserError, match=f"{name}.* {why}"):
            export(sae, tmp_path / name)
    assert os.listdir(tmp_path / "full") == ["thesis.txt"]


def test_a_writer_that_fails_leaves_nothing(sae, tmp_path, monkeypatch):
    def write(_, folder):
        (folder / "half").write_text("half")
        raise UserError("the disk is full")

    monkeypatch.setitem(WRITERS, "saelens", WRITERS["saelens"]._replace(write=write))
    with pytest.raises(UserError, match="the disk is full"):
        export(sae, tmp_path / "mine")
    assert os.listdir(tmp_path) == []


def test_what_appears_in_the_meantime_is_kept(sae, tmp_path, monkeypatch):
    def write(_, folder):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("mine")

    monkeypatch.setitem(WRITERS, "saelens", WRITERS["saelens"]._replace(write=write))
    with pytest.raises(UserError, match="it is not empty"):
        export(sae, tmp_path / "mine")
    assert os.listdir(tmp_path) == ["mine"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def test_leftovers_of_a_killed_writer_are_removed(sae, tmp_path):
    for name in (".mine.x.tmp", ".other.x.tmp"):
        (tmp_path / name).mkdir()
    export(sae, tmp_path / "mine")
    assert sorted(os.listdir(tmp_path)) == [".other.x.tmp", "mine"]
