"""Libraries are muted inside the block, and no longer after it."""

import logging
import warnings

import datasets
import huggingface_hub
import pytest
import tqdm
import transformers

from sae_lightning.llm.quiet import mute_libraries


def speak() -> None:
    for name in ("transformers", "datasets", "huggingface_hub", "any"):
        logging.getLogger(f"{name}.part").warning("said")
    for bar in (tqdm.tqdm, datasets.utils.tqdm, huggingface_hub.utils.tqdm, tqdm.auto.tqdm):
        list(bar([1, 2], desc="said"))
    list(transformers.utils.logging.tqdm([1, 2], desc="said"))


def test_log_lines_warnings_and_bars_are_muted_inside_the_block_alone(capfd, caplog):
    with mute_libraries(), mute_libraries():
        speak()
        warnings.warn("said", stacklevel=1)
    output = capfd.readouterr()
    assert (output.out, output.err, caplog.records) == ("", "", [])
    speak()
    assert capfd.readouterr().err.count("said") >= 5
    assert caplog.records
    with pytest.warns(UserWarning, match="said"):
        warnings.warn("said", stacklevel=1)


def test_an_error_ends_the_silence(capfd):
    with pytest.raises(RuntimeError), mute_libraries():
        raise RuntimeError("planted")
    list(tqdm.tqdm([1], desc="said"))
    assert "said" in capfd.readouterr().err
