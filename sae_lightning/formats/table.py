"""The table of formats; a new format is a new entry."""

import glob
import posixpath
from collections.abc import Collection
from pathlib import PurePosixPath
from typing import NamedTuple

from sae_lightning.errors import UserError
from sae_lightning.formats.circuit_tracer import CIRCUIT_TRACER
from sae_lightning.formats.dictionary_learning import DICTIONARY_LEARNING
from sae_lightning.formats.format import Format, is_match
from sae_lightning.formats.gemma_scope import GEMMA_SCOPE, GEMMA_SCOPE_2
from sae_lightning.formats.llamascopium import LLAMA_SCOPE, LLAMASCOPIUM
from sae_lightning.formats.named_files import GOODFIRE, QWEN_SCOPE
from sae_lightning.formats.saelens import SAELENS
from sae_lightning.formats.sparsify import SPARSIFY

# Earlier entries take precedence where several match.
FORMATS = {
    "saelens": SAELENS,
    "sparsify": SPARSIFY,
    "dictionary_learning": DICTIONARY_LEARNING,
    "llamascopium": LLAMASCOPIUM,
    "circuit_tracer": CIRCUIT_TRACER,
    "gemma_scope": GEMMA_SCOPE,
    "gemma_scope_2": GEMMA_SCOPE_2,
    "llama_scope": LLAMA_SCOPE,
    "qwen_scope": QWEN_SCOPE,
    "goodfire": GOODFIRE,
}
# Weights files of a kind of SAE that this project lacks -> the kind.
UNREADABLE = {
    "params_layer_*.safetensors": "a cross-layer transcoder",
    "W_enc_*.safetensors": "a cross-layer transcoder",
}


def find_format(names: Collection[str], weights: str | None = None) -> Format | None:
    """Find the format of an SAE from the files `names` in its folder (paths below it, with "/");
    `weights`, if given, is its weights file.

    None if there is no SAE; if its settings are missing, the first format whose weights match.
    UserError for a kind of SAE that this project lacks.
    """

    def has_match(pattern: str, among: Collection[str] = names) -> bool:
        return any(is_match(name, pattern) for name in among)

    weights_files = names if weights is None else [weights]
    entries = [entry for entry in FORMATS.values() if has_match(entry.files[0], weights_files)]
    # if the settings of entries[0] are missing, a broader pattern (Goodfire's *.pt*) must not win
    candidates = [entry for entry in entries if entry.files[0] == entries[0].files[0]]
    complete = [entry for entry in candidates if all(map(has_match, entry.files))]
    for pattern, kind in UNREADABLE.items():
        if not entries and has_match(pattern, weights_files):
            raise UserError(f"{pattern} is {kind}, for which this project has no SAE")
    return next(iter(complete + entries), None)


class SAEPaths(NamedTuple):
    """Paths of the files of one SAE."""

    entry: Format
    """Its format, an entry of FORMATS."""
    folder: str
    weights: str
    others: list[str]
    """Settings, and optional files that are there."""


def find_saes(path: str, names: Collection[str]) -> list[SAEPaths]:
    """The SAEs at `path`, which is a weights file, a folder, or a run folder, among the files
    `names` (paths with "/"); a folder with a weights file for each block has several."""
    names = {posixpath.normpath(name) for name in names}
    location, is_file = PurePosixPath(path), posixpath.normpath(path) in names
    folders = (location / "sae", location)
    if is_file:  # weights of Llama Scope are in a subfolder of the SAE's folder
        folders = (location.parent, location.parent.parent)
    for folder in folders:
        in_folder = [name for name in names if PurePosixPath(name).is_relative_to(folder)]
        # path below the folder -> path
        paths = {str(PurePosixPath(name).relative_to(folder)): name for name in in_folder}
        file = str(location.relative_to(folder)) if is_file else None
        if entry := find_format(paths, file):
            root = glob.escape(str(folder))
            weights = [file] if is_file else [n for n in paths if is_match(n, entry.files[0])]
            # normalised, because a pattern may begin with ../
            patterns = [posixpath.normpath(f"{root}/{p}") for p in entry.files[1:] + entry.optional]
            others = [n for n in names if any(is_match(n, pattern) for pattern in patterns)]
            return [
                SAEPaths(entry, str(folder), paths[name], sorted(others))
                for name in sorted(weights)
            ]
    return []
