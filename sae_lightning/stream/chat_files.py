"""Reads conversations from files, and copies them to one Arrow file as documents of JSON."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sae_lightning.errors import UserError
from sae_lightning.stream.local_files import pick_loader, read_valid_json
from sae_lightning.stream.local_text import copy_documents

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("messages", "conversations")  # looked for, in this order
ROLES = {"human": "user", "gpt": "assistant"}  # values of `from`, in ShareGPT's format


def copy_chats(files: list[str], column: str | None, where: str) -> "Dataset":
    """Copy the conversation of each row as a document, the JSON of {"messages": ..., "origin": file
    and row}; the copy is reused until a file changes. `column` None: the first of `COLUMNS` that a
    row has.

    UserError: the files are not JSON or parquet, or a row has no conversation.
    """
    if pick_loader(files[0]) not in ("json", "parquet"):
        raise UserError(
            f"data.chat=true: {where} holds no conversations; give .jsonl, .json or .parquet with "
            "a column of messages"
        )

    def format_chats() -> Iterator[str]:
        for file in files:
            read_rows = _read_parquet if pick_loader(file) == "parquet" else read_valid_json
            for number, row in read_rows(file, where):
                origin = f"row {number} of {file}"
                messages = _read_messages(row, column, f"{where}: {origin}")
                yield json.dumps({"messages": messages, "origin": origin})

    return copy_documents(files, format_chats(), f"chats {column}")


def _read_parquet(file: str, where: str) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, row) as `read_valid_json` does; `where` is not used."""
    import pyarrow.parquet as pq

    batches = pq.ParquetFile(file).iter_batches(256)
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _read_messages(row: Any, column: str | None, where: str) -> list[dict[str, Any]]:
    """The messages of a row, each with `role` and `content`. UserError: there are none."""
    columns = list(row) if isinstance(row, dict) else []
    name = column or next((name for name in COLUMNS if name in columns), COLUMNS[0])
    if name not in columns:
        raise UserError(
            f"{where} has no {name}, a list of messages; it has {', '.join(columns) or 'no column'}"
            " (data.column)"
        )
    messages = row[name]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: {name} is not a list of messages; leave the row out")
    return [_read_message(message, where) for message in messages]


def _read_message(message: Any, where: str) -> dict[str, Any]:
    """The fields of a message that are not null, with `role` and `content` in place of ShareGPT's
    `from` and `value`. UserError: role or content is missing or not text."""
    if isinstance(message, dict):
        fields = {key: value for key, value in message.items() if value is not None}
        if "from" in fields and "role" not in fields:
            sender = fields.pop("from")
            fields["role"] = ROLES.get(sender, sender)
            fields["content"] = fields.pop("value", None)
        if isinstance(fields.get("role"), str) and isinstance(fields.get("content"), str):
            return fields
    raise UserError(
        f"{where} holds the message {str(message)[:60]!r}; it needs a `role` and a `content`"
    )
