"""Your own text: one document is one file, or a row of one."""

import glob
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sae_lightning.errors import UserError
from sae_lightning.stream.base import TextConfig, absolute
from sae_lightning.stream.documents import Text, documents, first_line, only_text
from sae_lightning.stream.text import TextSource
from sae_lightning.terminal import phase

if TYPE_CHECKING:
    from datasets import Dataset

LOADERS = {
    ".txt": "text",
    ".md": "text",
    ".csv": "csv",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}
# Not the run's seed: runs that differ in their seed are scored on the same held-out documents.
HOLD_OUT_SEED = 0


@dataclass(slots=True, kw_only=True)
class LocalConfig(TextConfig):
    """Your own text: files, a folder of files, or a data set written by `save_to_disk`."""

    kind: str = "local"

    path: str
    """File, folder or glob of .txt / .md (a document each), .csv / .jsonl / .json / .parquet (a
    row each), or a folder written by `save_to_disk`."""

    column: str = "text"
    """Column that holds the text (not used for .txt and .md)."""

    held_out: float = 0.05
    """Share of the documents kept for evaluation; of a single document, its last characters."""

    def __post_init__(self) -> None:
        TextConfig.__post_init__(self)
        if not self.path:
            raise UserError("data.path is empty: give a file, a folder or a glob of text files")
        if not 0 < self.held_out < 1:
            raise UserError(
                f"data.held_out={self.held_out}: the share of the documents that evaluation reads "
                "and training never sees; give more than 0 and less than 1"
            )

    def with_absolute_paths(self) -> "LocalConfig":
        path = os.path.expanduser(self.path)
        there = os.path.exists(path) or any(glob.iglob(path, recursive=True))
        made = TextConfig.with_absolute_paths(self)
        return replace(made, path=absolute(path)) if there else made


class Local(TextSource):
    """Documents at fixed random places are held out."""

    data: LocalConfig
    settings = LocalConfig

    def open_documents(self) -> Text:
        config = self.data
        where = f"data.path={config.path}"
        try:
            data = load_local(config)
            row = next(iter(data), None)
        except UserError:
            raise
        except Exception as error:  # StopIteration is how datasets answers an empty file
            empty = isinstance(error, StopIteration)
            reason = "there is no document in it" if empty else first_line(error)
            raise UserError(f"{where}: cannot be read ({reason})") from error
        return _hold_out(only_text(data, row, config.column, where), config.held_out)


def load_local(config: LocalConfig) -> "Dataset":
    """Every document with all columns: of a saved data set, a file, a folder or a glob of files."""
    path, where = Path(config.path).expanduser(), f"data.path={config.path}"
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _load_saved(path, where)
    return _load_files(_find_files(path, where))


def _find_files(path: Path, where: str) -> list[str]:
    if path.is_dir():
        found = [str(file) for file in path.rglob("*")]
    else:
        found = [str(path)] if path.exists() else glob.glob(str(path), recursive=True)
    files = sorted(f for f in found if Path(f).is_file() and not Path(f).name.startswith("."))
    if not files:
        raise UserError(f"{where}: no file there; give a file, a folder or a glob of text files")
    suffixes = sorted({Path(file).suffix or "(none)" for file in files})
    unsupported = [suffix for suffix in suffixes if suffix not in LOADERS]
    if unsupported:
        raise UserError(
            f"{where}: cannot read files that end in {', '.join(unsupported)}; "
            f"those that can be read end in {', '.join(LOADERS)}"
        )
    if len({LOADERS[suffix] for suffix in suffixes}) > 1:
        raise UserError(
            f"{where}: holds several formats ({', '.join(suffixes)}); "
            f"choose one with a glob such as data.path='{path}/**/*{suffixes[0]}'"
        )
    return files


def _load_files(files: list[str]) -> "Dataset":
    from datasets import load_dataset

    loader = LOADERS[Path(files[0]).suffix]
    whole_files = {"sample_by": "document"} if loader == "text" else {}
    with phase("reading the text"):
        return load_dataset(loader, data_files=files, split="train", **whole_files)


def _load_saved(path: Path, where: str) -> "Dataset":
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(str(path))
    if not isinstance(data, DatasetDict):
        return data
    if "train" not in data:
        raise UserError(f"{where}: no split `train`; name one: {', '.join(data)} are folders there")
    return data["train"]


def _hold_out(data: "Dataset", share: float) -> Text:
    """At least one document held out, at fixed random places."""
    if len(data) == 1:
        text = data[0]["text"] or ""
        cut = int(len(text) * (1 - share))
        cut = text.rfind("\n", 0, cut) + 1 or text.rfind(" ", 0, cut) + 1 or cut  # whole words
        return Text(documents([text[:cut]]), documents([text[cut:]]))
    n = min(max(1, round(share * len(data))), len(data) - 1)
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(data))
    # in the files' own order: reading stays sequential, the shuffling of sequences comes later
    return Text(data.select(np.sort(order[n:])), data.select(np.sort(order[:n])))
