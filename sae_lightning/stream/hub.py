"""A data set on the Hugging Face hub, streamed or downloaded: each row is a document."""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae_lightning.errors import UserError
from sae_lightning.llm.quiet import mute_libraries
from sae_lightning.stream.documents import (
    OFFLINE_PRESETS,
    Documents,
    SplitDocuments,
    keep_text_column,
    summarise_cause,
)
from sae_lightning.stream.source import TextConfig
from sae_lightning.stream.text_source import TextSource
from sae_lightning.terminal import phase

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

HELD_OUT_DOCUMENTS = 500  # held out if `held_out_documents` is None


@dataclass(slots=True, kw_only=True)
class HubConfig(TextConfig):
    """A data set on the Hugging Face hub (or a local folder that `load_dataset` reads)."""

    kind: str = "hub"

    name: str
    """Name on the hub (`owner/name`), or a local folder of data files."""

    subset: str | None = None
    """Configuration of the data set, where it has several; null is its default one."""

    split: str = "train"
    """Split to train on."""

    column: str = "text"
    """Column that holds the text."""

    streaming: bool = True
    """Read over the network as training goes; false downloads the whole split first."""

    held_out_split: str | None = None
    """Split to evaluate on; null holds out the first documents of `split` instead."""

    held_out_documents: int | None = None
    """Documents at the start of `split` kept for evaluation; null is 500, or none where
    `held_out_split` is given."""

    def __post_init__(self) -> None:
        TextConfig.__post_init__(self)
        if not self.name:
            raise UserError("data.name is empty: give a hub data set (owner/name) or a folder")
        if self.held_out_documents is not None and self.held_out_split is not None:
            raise UserError(
                f"data.held_out_documents={self.held_out_documents} has no meaning beside "
                f"data.held_out_split={self.held_out_split}: leave one of the two out (null)"
            )
        if self.held_out_documents is not None and self.held_out_documents < 1:
            raise UserError(
                f"data.held_out_documents={self.held_out_documents}: evaluation needs text that "
                "training never sees; give 1 or more documents"
            )
        if self.held_out_split == self.split:
            raise UserError(
                f"data.held_out_split={self.held_out_split} is the split trained on; "
                "give another split, or null to hold out the first data.held_out_documents"
            )

    def hash_files(self) -> str | None:
        """Hash the names and commit of the files, or the names and times of local files; None
        without `streaming`, or if the files cannot be listed."""
        if not self.streaming:
            return None
        from datasets import load_dataset_builder

        try:
            with mute_libraries():
                splits = load_dataset_builder(self.name, self.subset).config.data_files
            identity = {
                str(split): [list(files), files.origin_metadata] for split, files in splits.items()
            }
        except Exception:  # not fatal: the cache's key also has the text's fingerprint
            return None
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class HubSource(TextSource):
    """Trains on one split, and holds out another split or the first documents of the same one."""

    data: HubConfig
    settings = HubConfig

    def open_documents(self) -> SplitDocuments:
        config = self.data
        where = f"data.name={config.name}"
        if config.held_out_split is not None:
            train = _open_split(config, config.split)
            return SplitDocuments(train, _open_split(config, config.held_out_split), where)
        n = config.held_out_documents or HELD_OUT_DOCUMENTS
        data = _open_split(config, config.split)
        if config.streaming:
            # take() and skip() come before any shuffling and fix the order of the files, so the
            # first n documents are the same in every epoch
            return SplitDocuments(data.skip(n), data.take(n), where)
        if n >= len(data):
            raise UserError(
                f"data.held_out_documents={n} leaves nothing to train on: "
                f"split {config.split} has {len(data)} documents"
            )
        return SplitDocuments(data.select(range(n, len(data))), data.select(range(n)), where)

    def open_labelled_documents(self, label: str) -> Documents:
        return _load_split(self.data, self.data.split)  # with all columns, so also `label`


def _open_split(config: HubConfig, split: str) -> "Dataset | IterableDataset":
    return keep_text_column(_load_split(config, split), config.column)


def _load_split(config: HubConfig, split: str) -> Documents:
    """Open a split with all its columns. UserError: no such data set, subset or split, or it cannot
    be read."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        with phase(f"opening {config.name}"):
            data = load_dataset(config.name, config.subset, split=split, streaming=config.streaming)
            first_row = next(iter(data), None)
    except DatasetNotFoundError as error:
        raise UserError(
            f"data.name={config.name}: no such data set ({summarise_cause(error)})"
        ) from error
    except ValueError as error:  # unknown split or subset: the library lists the known ones
        raise UserError(
            f"data.name={config.name}, data.subset={config.subset}, split {split}: "
            f"{summarise_cause(error)}"
        ) from error
    except Exception as error:
        raise UserError(
            f"data.name={config.name}: cannot be read ({summarise_cause(error)}); "
            f"without a network use {OFFLINE_PRESETS}"
        ) from error
    return Documents(data, first_row, f"data.name={config.name}")
