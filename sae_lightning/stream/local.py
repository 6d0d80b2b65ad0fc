"""Your own text: each file, or each row of a file, is a document."""

import os
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lightning.errors import UserError
from sae_lightning.llm.chat import ChatEncoder
from sae_lightning.llm.load import load_tokenizer
from sae_lightning.llm.packaged import LLMShape
from sae_lightning.stream.chat_files import copy_chats
from sae_lightning.stream.documents import (
    Documents,
    SplitDocuments,
    concerns_copy,
    hold_out,
    keep_text_column,
    summarise_cause,
)
from sae_lightning.stream.local_files import (
    check_files,
    check_json,
    find_files,
    make_existing_absolute,
    pick_loader,
)
from sae_lightning.stream.local_text import copy_text_files
from sae_lightning.stream.source import TextConfig
from sae_lightning.stream.text_source import TextSource
from sae_lightning.terminal import phase

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(slots=True, kw_only=True)
class LocalConfig(TextConfig):
    """Your own text: files, a folder of files, or a data set written by `save_to_disk`."""

    kind: str = "local"

    path: str
    """File, folder or glob of .txt / .md (a document each), .csv / .jsonl / .json / .parquet (a
    row each), also compressed (.gz, .bz2, .xz, .zst), or a folder written by `save_to_disk`."""

    column: str = "text"
    """Column that holds the text (not used for .txt and .md); with data.chat, `text` stands for
    `messages` or `conversations`."""

    chat: bool | None = None
    """true: rows of .jsonl, .json or .parquet are conversations (a list of messages with `role` and
    `content`, or `from` and `value`), which go through the tokenizer's chat template. null or
    false: documents are text."""

    assistant_only: bool | None = None
    """true: train only on the tokens that the assistant writes; the LLM reads the others too. null
    or false: train on all tokens."""

    held_out: float = 0.05
    """Share of the text kept for evaluation: whole documents or, if one document is too large a
    part of the text for that, the end of it."""

    weights: dict[str, float] = field(default_factory=dict)
    """A mixture: file, folder or glob below data.path -> its share of the tokens, such as
    {books:0.7,code:0.3} (in proportion; they need not add up to 1); empty for all of data.path."""

    def __post_init__(self) -> None:
        TextConfig.__post_init__(self)
        for name, weight in self.weights.items():
            if not 0 < weight < inf:
                raise UserError(
                    f"data.weights: {name}:{weight}; give a positive share of the tokens, or leave "
                    "it out"
                )
        if not self.path:
            raise UserError("data.path is empty: give a file, a folder or a glob of text files")
        if not 0 < self.held_out < 1:
            raise UserError(
                f"data.held_out={self.held_out}: the share of the text that evaluation reads "
                "and training never sees; give more than 0 and less than 1"
            )
        if self.assistant_only and not self.chat:
            raise UserError(
                "data.assistant_only=true has no meaning without data.chat=true: add that, or "
                "leave it out"
            )

    def with_absolute_paths(self) -> "LocalConfig":
        config = TextConfig.with_absolute_paths(self)
        return replace(config, path=make_existing_absolute(self.path))


class LocalSource(TextSource):
    """Holds out a fixed random sample of the documents, or the end of one (see `hold_out`)."""

    data: LocalConfig
    settings = LocalConfig

    def check_before_loading(self, shape: LLMShape, resumed: bool) -> None:
        super().check_before_loading(shape, resumed)
        if not resumed:
            self._check_files()
        if self.data.chat:
            ChatEncoder(load_tokenizer(self.llm), bool(self.data.assistant_only))  # may raise

    def open_documents(self) -> SplitDocuments:
        if not self.data.weights:
            return _open_text(self.data)
        self._check_files()
        total, texts = sum(self.data.weights.values()), []
        for config, weight in zip(self._list_texts(), self.data.weights.values(), strict=True):
            text = _open_text(config)
            texts.append(text._replace(weight=weight / total, where=f"data.path={config.path}"))
        return texts[0]._replace(others=tuple(texts[1:]))

    def open_labelled_documents(self, label: str) -> Documents:
        config = self.data
        if config.chat:
            raise UserError(
                f"label={label}: probes read documents of text, and data.path={config.path} holds "
                "conversations (data.chat=true); give a text with labels as data=text data.path=..."
            )
        if config.weights:
            raise UserError(
                f"label={label}: probes read one text, and data.weights names several; give one of "
                "them as data.path, and leave data.weights out"
            )
        return _load_or_explain(config)

    def _check_files(self) -> None:
        """UserError: a text is missing, or a file belongs to two texts of a mixture."""
        text_of_file: dict[str, str] = {}
        names = list(self.data.weights) or [""]  # the only text needs no name
        for config, name in zip(self._list_texts(), names, strict=True):
            for file in _find_text_files(config) or [config.path]:  # a saved data set is a folder
                other = text_of_file.setdefault(os.path.realpath(file), name)
                if other != name:  # one would train on what the other holds out
                    raise UserError(
                        f"data.weights: {file} is in both {other} and {name}; give it to one"
                    )

    def _list_texts(self) -> list[LocalConfig]:
        """The settings of each text of the mixture, or of the only text."""
        folder = os.path.expanduser(self.data.path)
        paths = [os.path.join(folder, name) for name in self.data.weights] or [self.data.path]
        return [replace(self.data, path=path, weights={}) for path in paths]


def _open_text(config: LocalConfig) -> SplitDocuments:
    """Open one text, and hold out a part of it."""
    documents = _load_or_explain(config)
    if config.chat:  # a conversation cannot be cut in two
        text = hold_out(documents.data, config.held_out, whole=True)
        return text._replace(where=documents.where, assistant_only=bool(config.assistant_only))
    return hold_out(keep_text_column(documents, config.column), config.held_out)


def _load_or_explain(config: LocalConfig) -> Documents:
    """Call `load_documents`, and turn any error into a UserError."""
    where = f"data.path={config.path}"
    try:
        data = load_documents(config)
        # without values, as a text may be long
        row = dict.fromkeys(data.column_names) if len(data) else None
    except UserError:
        raise
    except Exception as error:  # datasets raises StopIteration for an empty file
        empty = isinstance(error, StopIteration)
        reason = "there is no document in it" if empty else summarise_cause(error)
        raise UserError(f"{where}: cannot be read ({reason})") from error
    return Documents(data, row, where)


def load_documents(config: LocalConfig) -> "Dataset":
    """Load every document, with all columns: from a saved data set, file, folder or glob."""
    path, where = Path(config.path).expanduser(), f"data.path={config.path}"
    files = _find_text_files(config)
    if config.chat:
        column = None if config.column == "text" else config.column
        with phase("reading the conversations"):
            return copy_chats(files, column, where)
    if not files:
        return _load_saved(path, where)
    try:
        return _load_files(files, config.column, where)
    except UserError:
        raise
    except Exception as error:
        # `check_files` names the line at fault; a parquet file has no lines
        if not concerns_copy(error) and pick_loader(files[0]) != "parquet":
            check_files(files, where)
        raise


def _find_text_files(config: LocalConfig) -> list[str]:
    """Find the files at `config.path`; none if a saved data set is there and `chat` is not set.
    UserError: there is no file that can be read."""
    path = Path(config.path).expanduser()
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    return [] if saved and not config.chat else find_files(path, f"data.path={config.path}")


def _load_files(files: list[str], column: str, where: str) -> "Dataset":
    """Load files of one format with the loader of `datasets` for it; text files with our own."""
    from datasets import load_dataset_builder
    from datasets.data_files import DataFilesList

    # datasets takes plain names for patterns; the times tell it whether a file has changed
    data_files = DataFilesList(files, [(str(os.stat(file).st_mtime),) for file in files])
    loader = pick_loader(files[0])
    with phase("reading the text"):
        if loader == "text":
            return copy_text_files(files)
        builder = load_dataset_builder(
            loader, data_files=data_files, **_make_options(loader, files[0])
        )
        # a text that datasets has copied before was checked then
        if loader == "json" and not os.path.exists(builder.cache_dir):
            check_json(files, column, where)
        builder.download_and_prepare()
        return builder.as_dataset("train")


def _make_options(loader: str, file: str) -> dict[str, Any]:
    """Make the options of a loader: CSV files are read with all columns as text."""
    if loader != "csv":
        return {}
    import pandas as pd
    from datasets import Features, Value

    columns = pd.read_csv(file, nrows=0).columns
    # by default NA, null and None are missing values, and types depend on the first rows
    return {"na_filter": False, "features": Features(dict.fromkeys(columns, Value("string")))}


def _load_saved(path: Path, where: str) -> "Dataset":
    """Load a data set written by `save_to_disk`; of several splits, `train`."""
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(str(path))
    if not isinstance(data, DatasetDict):
        return data
    if "train" not in data:
        raise UserError(f"{where}: no split `train`; give one of its folders: {', '.join(data)}")
    return data["train"]
