"""Documents of a text: those to train on, and others held out; one column, `text`."""

from typing import TYPE_CHECKING, Any, NamedTuple

from sae_lightning.errors import UserError
from sae_lightning.files import NO_LOCKS, WRITING

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

OFFLINE_PRESETS = "data=shakespeare (the packaged plays) or data=text (your own files)"


class Text(NamedTuple):
    """Documents in two parts that share none."""

    train: "Dataset | IterableDataset"
    """What training reads; one column, `text`."""

    held_out: "Dataset | IterableDataset"
    """What only evaluation reads; one column, `text`; may be empty."""

    where: str = "data"
    """The setting that names the text and its value, for messages."""


def documents(texts: list[str]) -> "Dataset":
    """A data set of these texts."""
    from datasets import Dataset, Features, Value

    return Dataset.from_dict({"text": texts}, features=Features({"text": Value("string")}))


def only_text(data: Any, row: dict | None, column: str, where: str) -> Any:
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


def first_line(error: Exception) -> str:
    """The first line of what went wrong underneath; datasets hides it in the cause, and what it
    cannot write is its own copy of the text."""
    error = error.__cause__ or error
    if getattr(error, "errno", None) in {*WRITING, *NO_LOCKS}:
        from datasets.config import HF_DATASETS_CACHE

        why = f"its copy in {HF_DATASETS_CACHE}: {error.strerror}"
        return f"{why}; set HF_DATASETS_CACHE to another folder"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
