"""Opens the SAE to analyse, with its LLM, sites and text. Its config comes from the run folder or,
for a folder of another tool, from the SAE's metadata; the command line may override it."""

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sae_lightning.analysis.metadata import config_from_metadata
from sae_lightning.errors import UserError
from sae_lightning.formats.circuit_tracer import CIRCUIT_TRACER
from sae_lightning.formats.fetch import fetch_saved, is_hub_address, name_hub_folder
from sae_lightning.formats.load_sae import load_sae
from sae_lightning.llm.load import LLM, LLMConfig, load_llm, load_tokenizer, pick_device
from sae_lightning.llm.sites import LayerConfig, SitePair
from sae_lightning.report.sweep_page import describe_activations
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
    """An SAE with its LLM, sites and text; LLM, tokenizer and text are loaded on first use."""

    folder: Path
    """Folder, or weights file, that the SAE was opened from."""
    sae: SAE
    """Takes raw activations; float32, on the LLM's device."""
    sites: SitePair
    """Where the SAE reads, and what it reconstructs."""
    config: Config
    """LLM, text, site and seed; the other settings have a meaning only for a run folder."""
    address: str = ""
    """Where the folder was downloaded from (`hub:...`); empty for a local one."""

    @property
    def run(self) -> str:
        """The value of the setting `run` that opens the SAE again."""
        return self.address or str(shorten_path(self.folder))

    @property
    def results_folder(self) -> Path:
        """Folder for pages and numbers: `analysis` in the SAE's folder, or `<file>-analysis` beside
        a weights file. If the SAE was downloaded, it is below the working folder, because nothing
        is written to the hub's cache."""
        if self.address:
            return name_hub_folder(self.address) / "analysis"
        if self.folder.is_file():
            return self.folder.with_name(f"{self.folder.name}-analysis")
        return self.folder / "analysis"

    @cached_property
    def llm(self) -> LLM:
        """The whole LLM, frozen, on its device. UserError for data without an LLM."""
        self._require_llm()
        return load_llm(self.config.llm, tokenizer=self.tokenizer)

    @cached_property
    def tokenizer(self) -> Any:
        """The LLM's tokenizer, loaded without the LLM so that bad inputs are refused early."""
        self._require_llm()
        return load_tokenizer(self.config.llm)

    @property
    def context(self) -> int | None:
        """The longest sequence that the LLM can read, in tokens; None for no limit."""
        return self.config.data_source.read_shape().context

    @cached_property
    def corpus(self) -> SplitTokens:
        """The text of the run: `train` and `held_out`. UserError for data without text."""
        self._require_llm()
        data = self.config.data
        documents = open_text(data)  # before the tokenizer: a wrong name fails at once
        return open_tokens(documents, self.tokenizer, context=data.context, seed=self.config.seed)

    @property
    def features(self) -> int:
        """Number of features of the SAE."""
        return self.sae.config.features

    @property
    def device(self) -> torch.device:
        """The device of LLM and SAE."""
        return self.sae.W_enc.device

    @property
    def heading(self) -> str:
        """LLM, sites, size and architecture, in one line."""
        llm = Path(self.config.llm.name).name
        source = self.config.data_source
        where = f"{llm}, {self.sites}" if source.has_llm else source.origin
        plural = "s" if self.features > 1 else ""
        return f"{where}: {self.features:,} {self.sae.config.name} feature{plural}"

    def describe(self) -> dict[str, str]:
        """LLM, text, site, architecture, size and folder, by label, for the top of a page."""
        return describe_activations(self.config.to_flat_dict()) | {
            "SAE": self.sae.config.name,
            "features": f"{self.features:,}",
            "folder": self.run,
        }

    def check_features(self, features: list[int]) -> list[int]:
        """Return `features`; UserError if one is out of range."""
        for feature in features:
            if not 0 <= feature < self.features:
                raise UserError(
                    f"feature={feature}: this SAE has {self.features:,} features; "
                    f"give 0 to {self.features - 1}"
                )
        return features

    def _require_llm(self) -> None:
        source = self.config.data_source
        if not source.has_llm:
            remedy = ""
            if source.may_be_from_llm:
                remedy = "; if an LLM made them, name it and a text with llm=... data=..."
            raise UserError(
                f"{self.folder} was trained on {source.origin} and names no LLM: only "
                f"task=evaluate and task=overview can score it{remedy}"
            )


def open_subject(
    run: str, settings: dict[str, Any], given_settings: Collection[str] = ()
) -> Subject:
    """Open the SAE in the folder or at the hub address `run`, without loading the LLM. `settings`
    holds llm, data, layer and seed; `given_settings` names those (llm, llm.device, layer.index,
    ...) that override the folder's. UserError: there is no SAE, or it does not fit the LLM."""
    if not run:
        raise UserError("run is empty: give a run folder, as run=outputs/<day>/<time>")
    folder, address = fetch_saved(run), run if is_hub_address(run) else ""
    if is_sweep(folder):
        raise UserError(
            f"{run} holds a sweep: give one of the run folders in it, or task=sweep for a report "
            "of all of them"
        )
    # sae/ or sae-<tokens>/ in a run folder stands for that run
    run_folder = folder.parent if re.fullmatch(r"sae(-\d+)?", folder.name) else folder
    # a transcoder set of circuit-tracer has a config.yaml too, which is no run's
    is_set = any(run_folder.glob(CIRCUIT_TRACER.files[0]))
    if (run_folder / CONFIG_FILE).is_file() and not is_set:
        config = _read_run_config(run_folder, settings, given_settings)
        if folder.name == "sae":
            folder = run_folder  # the results of the final SAE lie beside sae/, not in it
        sae = load_sae(folder)
    else:
        sae = load_sae(folder)
        config = config_from_metadata(sae, run, settings, given_settings)
    shape = config.data_source.read_shape()
    sites = config.data_source.find_sites(config.layer, shape)
    # resumed=True leaves out checks of files and cache, which only a new run needs
    config.data_source.check_before_loading(shape, resumed=True)
    widths = {"reads": len(sae.W_enc), "writes": len(sae.b_dec)}
    for (verb, width), site in zip(widths.items(), sites, strict=True):
        if width != shape.width_at(site):
            raise UserError(
                f"llm.name={config.llm.name}: its activations have {shape.width_at(site)} "
                f"dimensions, but the SAE in {folder} {verb} {width}; give the LLM that it was "
                "trained on"
            )
    return Subject(folder, sae.to(pick_device(config.llm)), sites, config, address)


def open_run(
    folder: str | os.PathLike,
    *,
    llm: LLMConfig | None = None,
    data: DataConfig | None = None,
    layer: LayerConfig | None = None,
) -> tuple[Subject, SplitTokens]:
    """Open the SAE in a run folder, or in a folder that another tool saved, and the run's text.
    `llm`, `data` and `layer` override what the folder says. UserError: there is no SAE, or it does
    not fit the LLM."""
    # settings that are not given come from the folder; these values are used where it has none
    settings = {
        "llm": llm or LLMConfig(name="smollm2"),
        "data": data or PlaysConfig(),
        "layer": layer or LayerConfig(index=0),
        "seed": 0,
    }
    overrides = {"llm": llm, "data": data, "layer": layer}
    given_settings = [name for name, value in overrides.items() if value is not None]
    subject = open_subject(str(folder), settings, given_settings)
    return subject, subject.corpus


def _read_run_config(
    run_folder: Path, settings: dict[str, Any], given_settings: Collection[str]
) -> Config:
    """Read a run's config, and replace what `given_settings` names, a setting or a whole group, by
    the value in `settings`."""
    # the Python code of the run's LLM is allowed, or does not run because llm=... replaces the LLM
    trusted = TRUST_SETTING in given_settings or "llm" in given_settings
    config = read_job(run_folder, trusted).config
    source = config.data_source
    groups = sorted({"llm", "data", "layer"} & {*given_settings})
    if groups and not source.may_be_from_llm:
        raise UserError(
            f"{groups[0]}=... has no meaning for {run_folder}, which was trained on "
            f"{source.origin}: leave it out"
        )
    replaced = {}
    for group, given_group in settings.items():
        names = [name.split(".")[1] for name in given_settings if name.startswith(f"{group}.")]
        for name in names:
            if name not in {field.name for field in fields(getattr(config, group))}:
                raise UserError(
                    f"{group}.{name} is no setting of the {group} that this run was trained on: "
                    f"choose another with {group}=..."
                )
        if group in given_settings:
            replaced[group] = given_group
        elif names:
            values = {name: getattr(given_group, name) for name in names}
            if "load" in values:  # options of loading add to those of the run
                values["load"] = config.llm.load | values["load"]
            replaced[group] = replace(getattr(config, group), **values)
    return replace(config, **replaced)
