"""The base of all tasks of `analyze.py`: opens the SAE, and writes results and a page.

A task is a dataclass of settings with the method `execute`. Each is a preset of Hydra's group
`task`, so that settings of other tasks are refused.
"""

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from sae_lightning.analysis.subject import Subject, open_subject
from sae_lightning.errors import UserError, check_finite
from sae_lightning.files import refuse_link, remove_leftovers, write_json
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.sites import LayerConfig
from sae_lightning.report.annotated import AnnotatedText
from sae_lightning.report.catalogue import Catalogue
from sae_lightning.report.page import AnalysisPage, write_page
from sae_lightning.report.printer import print_section
from sae_lightning.report.section import Section
from sae_lightning.stream.source import DataConfig
from sae_lightning.terminal import console, format_command, shorten_path

NEXT_TASKS = ("lens", "steer", "explain")  # suggested for a feature that looks interesting


@dataclass(slots=True, kw_only=True)
class Task:
    """A task with its settings, which say at least which SAE to analyse, on which LLM and text."""

    run: str
    """Run folder, a folder with a saved SAE, an SAE on the hub (hub:owner/name/path@revision), or
    for `task=sweep` the folder of a sweep."""
    task: str
    """Which task to run on it."""
    llm: LLMConfig
    """The LLM, if the folder does not name it or to use another."""
    data: DataConfig
    """The text, if the folder does not name it or to use another."""
    layer: LayerConfig
    """The site, if the folder does not name it or to use another."""
    seed: int = 0
    """Fixes the order of the text; unless given, it is the run's seed."""
    plugins: list[str] = field(default_factory=list)
    """Modules or .py files with parts of your own, such as `[my_sae]` (docs/extending.md)."""

    def execute(self, given_settings: Collection[str]) -> None:
        """Run the task, print a summary, and write results and a page. `given_settings`: names of
        the settings on the command line."""
        raise NotImplementedError

    @property
    def results_name(self) -> str:
        """Name of the files with the results (JSON, page), without suffix."""
        return self.task

    def load_subject(self, given_settings: Collection[str]) -> Subject:
        """Open the SAE; UserError if results cannot be written beside it."""
        settings = {"llm": self.llm, "data": self.data, "layer": self.layer, "seed": self.seed}
        subject = open_subject(self.run, settings, given_settings)
        if subject.address:  # downloaded: results go to a new folder below the working folder
            subject.results_folder.parent.mkdir(parents=True, exist_ok=True)
        refuse_link(subject.results_folder)
        exists = subject.results_folder.exists()
        folder = subject.results_folder if exists else subject.results_folder.parent
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise UserError(
                f"{folder} cannot be written to: copy {subject.folder} (its config.yaml and sae/ "
                "are enough) to where you can write, and give that folder as run=..."
            )
        remove_leftovers(subject.results_folder)
        return subject

    def print_and_write(
        self,
        subject: Subject,
        results: dict[str, Any],
        sections: Sequence[Section],
        feature: int | None = None,
    ) -> None:
        """Print the sections, then call `write_results`."""
        for section in sections:
            print_section(section)
        self.write_results(subject, results, sections, feature=feature)

    def write_results(
        self,
        subject: Subject,
        results: dict[str, Any],
        sections: Sequence[Section],
        catalogues: Sequence[Catalogue] = (),
        feature: int | None = None,
        annotated: AnnotatedText | None = None,
    ) -> None:
        """Write `results` as JSON, and a page of the other arguments; print both paths. The page
        suggests commands to run next, for `feature` if given. The parquet files exist already."""
        # the overview is the folder's main page
        name = f"{self.results_name}.html" if self.task != "overview" else "index.html"
        page_path = subject.results_folder / name
        json_path = page_path.with_name(f"{self.results_name}.json")
        write_json(json_path, results)
        page = AnalysisPage(
            title=subject.heading,
            facts=subject.describe(),
            sections=sections,
            catalogues=catalogues,
            commands=suggest_commands(subject.run, feature),
            files=[*(f"{catalogue.kind}s.parquet" for catalogue in catalogues), json_path.name],
            annotated=annotated,
        )
        write_page(page_path, page)
        console.print(
            f"\n  open in a browser: {shorten_path(page_path)}\n"
            f"  the same numbers: {shorten_path(json_path)}\n"
        )


def suggest_commands(run: str, feature: int | None) -> list[str]:
    """Suggest commands to run next: tasks on `feature`, or the overview of `run` without one."""
    if feature is None:
        return [format_command("analyze.py", run=run)]
    return [
        *(format_command("analyze.py", run=run, task=task, feature=feature) for task in NEXT_TASKS),
        format_command("analyze.py", run=run, task="text", text="There once was a cat"),
    ]


def check_at_least(name: str, value: float | None, least: float) -> None:
    """UserError unless the setting `name` is None, or finite and at least `least`."""
    check_finite(name, value)
    if value is not None and value < least:
        raise UserError(f"{name}={value}: give {least} or more")


def parse_integers(name: str, value: Any) -> list[int] | None:
    """Read the setting `name`, a whole number >= 0 or a list of them, as a list; None stays None.
    UserError if it is anything else, or an empty list."""
    values = parse_numbers(name, value)
    if values is not None and any(x != int(x) or x < 0 for x in values):
        raise UserError(
            f"{name}={as_typed(value)}: give whole numbers from 0, such as {name}=[3,7]"
        )
    return None if values is None else [int(x) for x in values]


def parse_numbers(name: str, value: Any) -> list[float] | None:
    """Read the setting `name`, a finite number or a list of them, as a list; None stays None.
    UserError if it is anything else, or an empty list."""
    if value is None:
        return None
    values = value if isinstance(value, list | tuple) else [value]
    is_valid = all(
        isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in values
    )
    if not is_valid or not values:
        raise UserError(f"{name}={as_typed(value)}: give a number, or several as {name}=[1,2]")
    return list(values)


def as_typed(value: Any) -> str:
    """Format a value as on the command line, without spaces."""
    return str(value).replace(" ", "")
