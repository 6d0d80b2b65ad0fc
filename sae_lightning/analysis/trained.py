"""The SAE in a folder, and what it reads: told by a run's settings, by what the SAE's own file says
it was trained on, or at the command line."""

import os
import re
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from sae_lightning.analysis.subject import Subject
from sae_lightning.errors import UserError
from sae_lightning.formats.export import load_sae
from sae_lightning.llm.load import LLM, LLMConfig, device, load
from sae_lightning.llm.sites import Kind, LayerConfig, Sites
from sae_lightning.report.sweep_page import source
from sae_lightning.runs.config import Config
from sae_lightning.runs.inputs import check_context, is_text, open_llm, shape
from sae_lightning.runs.jobs import CONFIG_FILE, is_sweep, read_job
from sae_lightning.sae import ARCHITECTURES, SAE
from sae_lightning.stream.text import DataConfig, PlaysConfig
from sae_lightning.stream.tokens import Tokens
from sae_lightning.terminal import shown

# TransformerLens' names, by which SAELens knows models, that are not the hub's.
HUB = {
    "gpt2-small": "gpt2",
    "tiny-stories-33M": "roneneldan/TinyStories-33M",
    "tiny-stories-1L-21M": "roneneldan/TinyStories-1Layer-21M",
}
OWNERS = {"gpt2-": "openai-community", "pythia-": "EleutherAI", "gemma-": "google"}
OWNERS |= {"Llama-": "meta-llama", "Qwen": "Qwen", "Mistral-": "mistralai"}
# TransformerLens' and transformers' names of a place -> what is read there, and how many blocks on.
PLACES = {
    r"blocks\.(\d+)\.hook_resid_post": (Kind.resid, 0),
    r"blocks\.(\d+)\.hook_resid_pre": (Kind.resid, -1),
    r"blocks\.(\d+)\.hook_attn_out": (Kind.attn, 0),
    r"blocks\.(\d+)\.hook_mlp_out": (Kind.mlp, 0),
    r"blocks\.(\d+)\.(?:ln2\.hook_normalized|mlp\.hook_in)": (Kind.mlp_in, 0),
    r"(?:.*\.)?(?:h|layers|blocks)\.(\d+)": (Kind.resid, 0),
    r"(?:.*\.)?(?:h|layers|blocks)\.(\d+)\.mlp": (Kind.mlp, 0),
}


class Trained(NamedTuple):
    """An SAE with all that has to be known to look at it."""

    folder: Path
    """What was found there is written below it."""
    sae: SAE
    """For raw activations, on the CPU."""
    sites: Sites
    """Where it reads and what it reconstructs."""
    config: Config
    """LLM and text; of a folder that is no run, the rest has no meaning."""

    @property
    def name(self) -> str:
        """What it is, for a heading."""
        sae, llm = self.sae.config, Path(self.config.llm.name).name
        where = f"{llm}, {self.sites}" if is_text(self.config) else "synthetic concepts"
        return f"{where}: {sae.features:,} {sae.name} feature{'s' * (sae.features > 1)}"

    def facts(self) -> dict[str, str]:
        """What it is, for a page."""
        config = self.sae.config
        return source(self.config.flat()) | {
            "SAE": config.name,
            "features": f"{config.features:,}",
            "folder": str(shown(self.folder)),
        }


def open_trained(run: str, asked: dict[str, Any], given: Collection[str] = ()) -> Trained:
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
    above = folder.parent if folder.name == "sae" else folder
    if (above / CONFIG_FILE).is_file():
        folder, config = above, _of_run(above, asked, given)
        sae = load_sae(folder)
    else:
        sae = load_sae(folder)
        config = _of_sae(sae, run, asked, given)
    device(config.llm)  # one that is not there is told before any text is read
    known = shape(config)
    sites = config.layer.within(known.layers)
    if is_text(config):
        check_context(config, known)
    for weight, width in (("reads", len(sae.W_enc)), ("writes", len(sae.b_dec))):
        if width != known.width:
            raise UserError(
                f"llm.name={config.llm.name}: its activations have {known.width} dimensions, but "
                f"the SAE in {folder} {weight} {width}; give the LLM that it was trained on"
            )
    return Trained(folder, sae, sites, config)


def open_run(
    folder: str | os.PathLike,
    *,
    llm: LLMConfig | None = None,
    data: DataConfig | None = None,
    layer: LayerConfig | None = None,
) -> tuple[Subject, Tokens]:
    """The SAE of a run folder, or of a folder that another tool saved, at its place in the LLM; and
    the text. What is given counts more than what the folder says.

    UserError: no SAE there, or not for such an LLM.
    """
    given = {"llm": llm, "data": data, "layer": layer}
    neutral = {
        "llm": LLMConfig(name="smollm2"),
        "data": PlaysConfig(),
        "layer": LayerConfig(index=0),
        "seed": 0,
    }
    known = {name: value for name, value in given.items() if value is not None}
    return open_reader(open_trained(str(folder), neutral | known, known))


def open_subject(trained: Trained) -> Subject:
    """The SAE at its place in the LLM. UserError where there is no LLM."""
    config = _needs_text(trained)
    return _subject(trained, load(config.llm))


def open_reader(trained: Trained) -> tuple[Subject, Tokens]:
    """The SAE at its place in the LLM, and the text that it reads. UserError as `open_subject`."""
    llm, tokens = open_llm(_needs_text(trained))
    return _subject(trained, llm), tokens


def _needs_text(trained: Trained) -> Config:
    if not is_text(trained.config):
        raise UserError(
            f"{trained.folder} was trained on synthetic concepts, which no LLM reads: only "
            "task=evaluate can be asked of it"
        )
    return trained.config


def _subject(trained: Trained, llm: LLM) -> Subject:
    data, sae = trained.config.data, trained.sae.to(llm.model.device)
    return Subject(llm, sae, trained.sites, data.keep_special, data.max_norm)


def _of_run(run: Path, asked: dict[str, Any], given: Collection[str]) -> Config:
    """A run's settings with what was given instead."""
    config = read_job(run).config
    if not is_text(config) and (others := sorted({"llm", "data", "layer"} & {*given})):
        raise UserError(
            f"{others[0]}=... has no meaning for {run}, which was trained on synthetic concepts: "
            "leave it out"
        )
    groups = {name: _group(config, name, asked, given) for name in ("llm", "data", "layer")}
    config = replace(config, **groups)
    return replace(config, seed=asked["seed"]) if "seed" in given else config


def _group(config: Config, group: str, asked: dict[str, Any], given: Collection[str]) -> Any:
    """One group of settings: the given one, or the run's with those that were given singly."""
    mine, theirs = getattr(config, group), asked[group]
    if group in given:
        return theirs
    names = [name.partition(".")[2] for name in given if name.startswith(f"{group}.")]
    for name in names:
        if name not in {field.name for field in fields(mine)}:
            raise UserError(
                f"{group}.{name} is no setting of what this run was trained on; choose other "
                f"{group} for it with {group}=..."
            )
    return replace(mine, **{name: getattr(theirs, name) for name in names})


def _of_sae(sae: SAE, run: str, asked: dict[str, Any], given: Collection[str]) -> Config:
    """Settings for an SAE that lies in no run: its metadata, with what was given instead."""
    said = sae.metadata
    llm, data, layer, seed = (asked[name] for name in ("llm", "data", "layer", "seed"))
    if not {"llm", "llm.name"} & {*given}:
        llm = replace(llm, name=_llm(said, run))
    if not any(name.split(".")[0] == "layer" for name in given):
        layer = _layer(said, run)
    if "data.context" not in given and "context_size" in said and hasattr(data, "context"):
        data = replace(data, context=said["context_size"])
    loss = ARCHITECTURES[sae.config.name].loss()
    return Config(llm=llm, data=data, layer=layer, model=sae.config, loss=loss, seed=seed)


def _llm(said: dict[str, Any], run: str) -> str:
    name = said.get("model_name")
    if not name:
        raise UserError(
            f"{run} does not say which LLM its SAE reads: give llm=... (of those in conf/llm) or "
            "llm=hf llm.name=..."
        )
    owner = next((owner for start, owner in OWNERS.items() if name.startswith(start)), None)
    return HUB.get(name) or (f"{owner}/{name}" if owner else name)


def _layer(said: dict[str, Any], run: str) -> LayerConfig:
    """Where an SAE reads and what it reconstructs, by the names of its hooks."""
    source = _place(said.get("hook_name"), run)
    target = _place(said["hook_name_out"], run) if said.get("hook_name_out") else source
    if source[0] != target[0]:
        raise UserError(
            f"{run} reads block {source[0]} and writes block {target[0]}: only an SAE within one "
            "block can be looked at"
        )
    return LayerConfig(index=source[0], source=source[1], target=target[1])


def _place(hook: str | None, run: str) -> tuple[int, Kind]:
    for pattern, (kind, on) in PLACES.items():
        found = hook and re.fullmatch(pattern, hook)
        if found and int(found[1]) + on >= 0:
            return int(found[1]) + on, kind
    told = f"reads {hook}, which is not a place that is known here" if hook else "does not say"
    raise UserError(
        f"{run} {told}: say where its SAE reads with layer=... (resid, attn, mlp, transcoder) and "
        "layer.index=..."
    )
