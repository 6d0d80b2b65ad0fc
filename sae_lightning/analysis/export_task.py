"""`task=export`: writes an SAE, or dashboards of its features, in another tool's format."""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sae_lightning.analysis.dashboards.circuit_tracer_features import (
    open_blocks,
    write_circuit_tracer_features,
)
from sae_lightning.analysis.dashboards.contents import DashboardSettings, open_content
from sae_lightning.analysis.dashboards.neuronpedia import write_neuronpedia
from sae_lightning.analysis.dashboards.saedashboard import write_saedashboard
from sae_lightning.analysis.export_weights import open_one, open_set, write_one, write_set
from sae_lightning.analysis.task import Task
from sae_lightning.errors import UserError
from sae_lightning.files import (
    convert_write_errors,
    make_private_folder,
    refuse_link,
    remove_leftovers,
)
from sae_lightning.formats.write_sae import WRITABLE
from sae_lightning.terminal import console, shorten_path


class Writer(NamedTuple):
    """An entry of the table WRITERS."""

    write: Callable[..., None]
    """Called with the result of `open` and the empty folder to write to."""
    open: Callable[["ExportTask", Collection[str]], Any]
    """Called with the task and the names of the settings on the command line; returns the content
    to write."""
    settings: frozenset[str] = frozenset()
    """Settings for this format, besides those of every task; empty for formats of weights."""


@dataclass(slots=True, kw_only=True)
class ExportTask(DashboardSettings):
    """Write the SAE in another tool's format, or dashboards of its features. Except for `format`,
    `to` and the settings of every task, settings are for the formats of dashboards: neuronpedia,
    saedashboard and circuit_tracer_features."""

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
        DashboardSettings.__post_init__(self)

    def execute(self, given_settings: Collection[str]) -> None:
        folder = Path(self.to).absolute()
        check_target(folder)
        writer = WRITERS[self.format]
        for name in sorted(DASHBOARD_SETTINGS.intersection(given_settings) - writer.settings):
            formats = [other for other in WRITERS if name in WRITERS[other].settings]
            raise UserError(
                f"{name} has no meaning for format={self.format}, only for {', '.join(formats)}: "
                "leave it out"
            )
        for name in sorted(given_settings):
            if not writer.settings and name.split(".")[0] in ("data", "seed"):
                raise UserError(
                    f"{name} has no meaning for format={self.format}, which holds weights: leave "
                    "it out"
                )
        opened = writer.open(self, given_settings)
        with convert_write_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder.parent, folder.name)
            with make_private_folder(folder) as private:
                temporary = private / folder.name
                temporary.mkdir()
                writer.write(opened, temporary)
                check_target(folder)  # again, because writing may have taken long
                if folder.is_dir():
                    folder.rmdir()
                os.replace(temporary, folder)
        console.print(f"\n  written for {self.format}: {shorten_path(folder)}\n")


def check_target(folder: Path) -> None:
    """UserError unless `folder` does not exist or is an empty folder."""
    refuse_link(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"to={folder}: it is a file; give a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"to={folder}: it is not empty, and nothing in it is overwritten; give a folder that "
            "does not exist yet"
        )


def _list_settings(task: type[Task]) -> frozenset[str]:
    """List the names of the settings that `task` has besides those of every task."""
    return frozenset(field.name for field in fields(task)) - {field.name for field in fields(Task)}


DASHBOARD_SETTINGS = _list_settings(DashboardSettings)
# Settings that say how Neuronpedia lists the SAE.
RELEASE_SETTINGS = frozenset({"release", "description", "creator", "creator_id", "url"})

# Name of a format -> how to write it.
WRITERS = {name: Writer(partial(write_one, name), partial(open_one, name)) for name in WRITABLE}
WRITERS |= {
    "circuit_tracer": Writer(
        partial(write_set, "circuit_tracer"), partial(open_set, "circuit_tracer")
    ),
    "neuronpedia": Writer(write_neuronpedia, open_content, DASHBOARD_SETTINGS),
    "saedashboard": Writer(write_saedashboard, open_content, DASHBOARD_SETTINGS - RELEASE_SETTINGS),
    "circuit_tracer_features": Writer(
        write_circuit_tracer_features,
        open_blocks,
        DASHBOARD_SETTINGS - RELEASE_SETTINGS - {"feature", "vectors"},  # it writes all features
    ),
}
