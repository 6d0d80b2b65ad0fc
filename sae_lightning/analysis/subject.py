"""The SAE that is looked at, with what it reads: as a run's settings, the SAE's own file or the
command line say."""

import os
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sae_lightning.analysis.metadata import config_from_metadata
from sae_lightning.errors import UserError
from sae_lightning.formats.export import load_sae
from sae_lightning.llm.load import LLM, LLMConfig, load_llm, load_tokenizer, pick_device
from sae_lightning.llm.sites import LayerConfig, SitePair
from sae_lightning.report.sweep_report import describe_source
from sae_lightning.runs.config import Config
from sae_lightning.runs.jobs import CONFIG_FILE, TRUST_SETTING, is_sweep, read_job
from sae_lightning.sae import SAE
from sae_lightning.stream import open_text
from sae_lightning.stream.plays import PlaysConfig
from sae_lightning.stream.source import DataConfig
from sae_lightning.stream.tokens import SplitTokens, open_tokens
from sae_lightning.terminal import shorten_path


@dataclass(eq=False)
class Subject:
    """An SAE at its place in an LLM; LLM, tokenizer and text are loaded when first asked for."""

    folder: Path
    """What is found is written below it."""
    sae: SAE
    """For raw activations, in float32, on the LLM's device."""
    sites: SitePair
    """Where it reads and what it reconstructs."""
    config: Config
    """LLM and text; of a folder that is no run, the rest has no meaning."""

    @property
    def results_folder(self) -> Path:
        """Where pages and numbers are written."""
        return self.folder / "analysis"

    @cached_property
    def llm(self) -> LLM:
        """The whole LLM, frozen, on its device. UserError where there is none."""
        self._needs_text()
        return load_llm(self.config.llm, tokenizer=self.tokenizer)

    @cached_property
    def tokenizer(self) -> Any:
        """The LLM's; what can be refused by it is refused before the LLM is loaded."""
        self._needs_text()
        return load_tokenizer(self.config.llm)

    @property
    def context(self) -> int | None:
        """The most tokens that the LLM can read; None for any number."""
        return self.config.data_source.shape().context

    @cached_property
    def corpus(self) -> SplitTokens:
        """The text of the run: `train` and `held_out`. UserError where there is none."""
        self._needs_text()
        data = self.config.data
        documents = open_text(data)  # before the tokenizer: a wrong name is told at once
        return open_tokens(documents, self.tokenizer, context=data.context, seed=self.config.seed)

    @property
    def features(self) -> int:
        """Number of features of the SAE."""
        return self.sae.config.features

    @property
    def device(self) -> torch.device:
        """Where LLM and SAE are."""
        return self.sae.W_enc.device

    @property
    def heading(self) -> str:
        """What it is, for a heading."""
        llm = Path(self.config.llm.name).name
        where = f"{llm}, {self.sites}" if self.config.data_source.has_llm else "synthetic concepts"
        plural = "s" * (self.features > 1)
        return f"{where}: {self.features:,} {self.sae.config.name} feature{plural}"

    def describe(self) -> dict[str, str]:
        """What it is, for a page."""
        return describe_source(self.config.to_flat_dict()) | {
            "SAE": self.sae.config.name,
            "features": f"{self.features:,}",
            "folder": str(shorten_path(self.folder)),
        }

    def check_features(self, features: list[int]) -> list[int]:
        """`features`; UserError if the SAE has no such feature."""
        for feature in features:
            if not 0 <= feature < self.features:
                raise UserError(
                    f"feature={feature}: this SAE has {self.features:,} features; "
                    f"give 0 to {self.features - 1}"
                )
        return features

    def _needs_text(self) -> None:
        if not self.config.data_source.has_llm:
            raise UserError(
                f"{self.folder} was trained on synthetic concepts, which no LLM reads: only "
                "task=evaluate can be asked of it"
            )


def open_subject(run: str, asked: dict[str, Any], given: Collection[str] = ()) -> Subject:
    """The SAE of the folder `run`. `asked` holds llm, data, layer and seed; `given` names those of
    their settings (llm, llm.device, layer.index, ...) that count more than what the folder says.

    UserError: no SAE there, or not for such an LLM. No weight of the LLM is read.
    """
    folder = Path(run)
    if not run:
        raise UserError("run is empty: give a run folder, as run=outputs/<day>/<time>")
    if is_sweep(folder):
        raise UserError(
            f"{run} holds a sweep: give one of the run folders in it, or task=sweep for the "
            "report of all"
        )
    parent = folder.parent if folder.name == "sae" else folder
    if (parent / CONFIG_FILE).is_file():
        folder, config = parent, _read_run_config(parent, asked, given)
        sae = load_sae(folder)
    else:
        sae = load_sae(folder)
        config = config_from_metadata(sae, run, asked, given)
    llm = config.data_source.shape()
    sites = config.layer.resolve_sites(llm.layers)
    config.data_source.check(llm, resumed=True)
    for weight, width in (("reads", len(sae.W_enc)), ("writes", len(sae.b_dec))):
        if width != llm.width:
            raise UserError(
                f"llm.name={config.llm.name}: its activations have {llm.width} dimensions, but "
                f"the SAE in {folder} {weight} {width}; give the LLM that it was trained on"
            )
    return Subject(folder, sae.to(pick_device(config.llm)), sites, config)


def open_run(
    folder: str | os.PathLike,
    *,
    llm: LLMConfig | None = None,
    data: DataConfig | None = None,
    layer: LayerConfig | None = None,
) -> tuple[Subject, SplitTokens]:
    """The SAE of a run folder, or of a folder that another tool saved, at its place in the LLM; and
    the text. What is given counts more than what the folder says.

    UserError: no SAE there, or not for such an LLM.
    """
    asked = {
        "llm": llm or LLMConfig(name="smollm2"),
        "data": data or PlaysConfig(),
        "layer": layer or LayerConfig(index=0),
        "seed": 0,
    }
    given = {"llm": llm, "data": data, "layer": layer}
    subject = open_subject(str(folder), asked, [name for name in given if given[name] is not None])
    return subject, subject.corpus


def _read_run_config(run: Path, asked: dict[str, Any], given: Collection[str]) -> Config:
    """A run's settings with those of `asked` that are `given` instead: whole groups or single."""
    # an LLM that was typed, or the permission itself, is the user's word and not the folder's
    config = read_job(run, trusted=bool({"llm", TRUST_SETTING} & {*given})).config
    if not config.data_source.has_llm and (others := sorted({"llm", "data", "layer"} & {*given})):
        raise UserError(
            f"{others[0]}=... has no meaning for {run}, which was trained on synthetic concepts: "
            "leave it out"
        )
    groups = {}
    for group, other in asked.items():
        names = [name.partition(".")[2] for name in given if name.startswith(f"{group}.")]
        for name in names:
            if name not in {field.name for field in fields(getattr(config, group))}:
                raise UserError(
                    f"{group}.{name} is no setting of what this run was trained on; choose other "
                    f"{group} for it with {group}=..."
                )
        if group in given:
            groups[group] = other
        elif names:
            single = {name: getattr(other, name) for name in names}
            groups[group] = replace(getattr(config, group), **single)
    return replace(config, **groups)
