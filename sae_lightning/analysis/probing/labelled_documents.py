"""Any data set with a column of text and a column of labels."""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_lightning.analysis.probing.labelled_plays import SPLITS
from sae_lightning.analysis.probing.pieces import Piece, deal
from sae_lightning.errors import UserError
from sae_lightning.stream.documents import OFFLINE_PRESETS, first_line
from sae_lightning.stream.hub import HubConfig
from sae_lightning.stream.local import LocalConfig, find_files, load_files, load_saved

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

ROWS = 20_000  # documents that are looked at
CHARACTERS = 16  # for each token of a piece: more of a document is not tokenised


def document_pieces(
    config: HubConfig | LocalConfig, label: str, seed: int
) -> tuple[list[Piece], list[str]]:
    """The beginnings of documents that could be taken, and what to know about them."""
    hub = isinstance(config, HubConfig)
    where = f"data.name={config.name}" if hub else f"data.path={config.path}"
    try:
        data = _open_hub(config) if hub else _open_local(config, where)
        texts = dict(_rows(data, config, label, where, seed))  # each text once
    except UserError:
        raise
    except Exception as error:  # the network, or a broken file: any of a dozen libraries'
        without = f"; without a network use {OFFLINE_PRESETS}" if hub else ""
        raise UserError(f"{where}: cannot be read ({first_line(error)}){without}") from error
    names = list(texts.values())
    folds = deal(names, seed)
    pieces = [
        Piece(name, fold, number, text)
        for number, (name, fold, text) in enumerate(zip(names, folds, texts, strict=True))
    ]
    return pieces, [
        "A probe is tested on documents that it was not fitted on; a piece is the first "
        f"{config.context - 1} tokens of a document, or all of a shorter one."
    ]


def _open_local(config: LocalConfig, where: str) -> "Dataset":
    path = Path(config.path).expanduser()
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return load_saved(path, where)
    return load_files(find_files(path, where))


def _open_hub(config: HubConfig) -> "Dataset | IterableDataset":
    from datasets import load_dataset

    return load_dataset(config.name, config.subset, split=config.split, streaming=config.streaming)


def _rows(
    data: Any, config: HubConfig | LocalConfig, label: str, where: str, seed: int
) -> Iterator[tuple[str, str]]:
    """Text and class of at most ROWS documents: random ones, of a streamed data set the first."""
    columns = list(next(iter(data), {}))
    for setting, column in {"data.column": config.column, "label": label}.items():
        if column not in columns:
            plays = (
                "; the packaged plays have it: data=shakespeare"
                if setting == "label" and label in SPLITS
                else ""
            )
            raise UserError(
                f"{setting}={column}: {where} has no such column; it has "
                f"{', '.join(columns) or 'no document'}{plays}"
            )
    if label == config.column:
        raise UserError(f"label={label}: that is the column of the text; give one with classes")
    names = getattr((data.features or {}).get(label), "names", None)  # of a ClassLabel
    if hasattr(data, "__len__"):
        order = np.random.default_rng(seed).permutation(len(data))
        data = data.select(np.sort(order[:ROWS]))
    for row in islice(data, ROWS):
        text, value = row[config.column], row[label]
        if not isinstance(text, str | None):
            raise UserError(
                f"data.column={config.column}: {where} holds {type(text).__name__} there, not text"
            )
        name = _class(value, names, f"label={label}: {where}")
        if name and text and text.strip():
            yield text[: CHARACTERS * config.context], name


def _class(value: Any, names: list[str] | None, where: str) -> str | None:
    """The name of a label; None where there is none."""
    if value is None or value != value:  # nan is a table's way to say nothing
        return None
    if names is not None:
        return names[value] if value >= 0 else None
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)  # a table's way to write whole numbers where some are missing
    if not isinstance(value, str | bool | int):
        raise UserError(f"{where} holds {value} there; classes are words or whole numbers")
    return str(value).strip()
