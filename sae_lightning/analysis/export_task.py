"""`task=export`: writes an SAE in another tool's format."""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sae_lightning.analysis.task import Task
from sae_lightning.errors import UserError
from sae_lightning.files import (
    convert_write_errors,
    make_private_folder,
    refuse_link,
    remove_leftovers,
)
from sae_lightning.formats.export import save_sae
from sae_lightning.formats.load_sae import load_sae
from sae_lightning.runs.jobs import is_sweep
from sae_lightning.terminal import console, shorten_path


class Writer(NamedTuple):
    """A row of the table WRITERS."""

    write: Callable[..., None]
    """Called with what to write and the empty folder to write it in."""
    open: Callable[["ExportTask", Collection[str]], Any]
    """Called with the task and the names of the given settings; returns what to write."""


@dataclass(slots=True, kw_only=True)
class ExportTask(Task):
    """Write the SAE in another tool's format."""

    format: str | None = None
    """Format to write."""
    to: str | None = None
    """Folder to write: a new one, or an empty one."""

    def __post_init__(self):
        names = ", ".join(WRITERS)
        if self.format is None:
            raise UserError(f"format is not set: give format=... ({names})")
        if self.format not in WRITERS:
            raise UserError(f"format={self.format}: no such format to write; choose from {names}")
        if not self.to:
            raise UserError("to is not set: give the folder to write, as to=exports/mine")

    def execute(self, given_settings: Collection[str]) -> None:
        folder = Path(self.to).absolute()
        check_target(folder)
        writer = WRITERS[self.format]
        content = writer.open(self, given_settings)
        with convert_write_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder.parent, folder.name)
            with make_private_folder(folder) as private:
                part = private / folder.name
                part.mkdir()
                writer.write(content, part)
                check_target(folder)  # writing may have taken long
                if folder.is_dir():
                    folder.rmdir()
                os.replace(part, folder)
        console.print(f"\n  written for {self.format}: {shorten_path(folder)}\n")


def check_target(folder: Path) -> None:
    """UserError unless a folder can be made at `folder`, or an empty one is there."""
    refuse_link(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"to={folder}: it is a file; give a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"to={folder}: it is not empty, and nothing in it is overwritten; give a folder that "
            "does not exist yet"
        )


def open_alone(task: ExportTask, given_settings: Collection[str]) -> Any:
    """The SAE without its LLM. UserError for the folder of a sweep."""
    if is_sweep(Path(task.run)):
        raise UserError(
            f"run={task.run} holds a sweep, and format={task.format} holds one SAE: give one of "
            "the run folders in it"
        )
    return load_sae(task.run)


def write_saelens(sae: Any, folder: Path) -> None:
    """Write the SAE as a folder of SAELens."""
    save_sae(folder, sae, sae.weights(), sae.metadata)


# Name of a format -> how to write it.
WRITERS = {
    "saelens": Writer(write_saelens, open_alone),
}
