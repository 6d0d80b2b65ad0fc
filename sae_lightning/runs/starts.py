"""Warm starts: takes settings of a run from the SAE in `model.start`, and checks the others."""

from collections.abc import Collection
from contextlib import suppress
from copy import deepcopy
from dataclasses import fields
from functools import cache
from pathlib import PurePath
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from sae_lightning.errors import UserError
from sae_lightning.formats.fetch import is_hub_address
from sae_lightning.formats.load_sae import load_sae
from sae_lightning.formats.saelens import OWN_KEY
from sae_lightning.formats.trained_on import check_metadata, choose_llm, find_llm_name, read_layer
from sae_lightning.llm.load import NO_LLM
from sae_lightning.llm.packaged import LLMShape
from sae_lightning.llm.sites import LayerConfig, SitePair
from sae_lightning.report.sweep_table import split_overrides
from sae_lightning.runs.config import Config, to_dataclass
from sae_lightning.sae import ARCHITECTURES, SAEConfig
from sae_lightning.sae.base import SMALLEST_NORM
from sae_lightning.stream import SOURCES
from sae_lightning.stream.local_files import make_absolute

# Settings of the network that every format records.
RECORDED = ("features", "k", "groups", "skip")
# Decoder norms up to this ratio count as equal: published weights are rounded.
MAX_NORM_RATIO = 1.01


class Start(NamedTuple):
    """Facts about a saved SAE to start from, on which the run's settings depend."""

    address: str
    config: SAEConfig
    widths: tuple[int, int]
    """d_in and d_out."""
    is_ours: bool
    """Whether a run of this project saved it, so that all settings of the network are known."""
    metadata: dict[str, Any]
    """LLM, site and other facts about the SAE's training, as `check_metadata` returns them."""
    norm_ratio: float
    """The largest norm of a decoder row over the smallest, without rows of 0; 1 if all are 0."""


def find_start(address: str) -> Start:
    """Open the SAE at `address`, once for all jobs; UserError if there is none."""
    return _open_start(locate_start(address))


def locate_start(address: str) -> str:
    """`address` in a form that is valid in every working folder."""
    return address if is_hub_address(address) else make_absolute(address)


@cache
def _open_start(address: str) -> Start:
    """`find_start`, for an address that is valid in every working folder."""
    try:
        sae = load_sae(address)
    except UserError as error:
        prefix = "" if str(error).startswith(address) else f"{address}: "
        raise UserError(f"model.start={prefix}{error}") from error
    norms = sae.W_dec.norm(dim=1)
    norms = norms[norms > SMALLEST_NORM]
    return Start(
        address,
        sae.config,
        widths=(len(sae.W_enc), len(sae.b_dec)),
        is_ours=OWN_KEY in sae.metadata,
        metadata=check_metadata(sae.metadata, address),
        norm_ratio=float(norms.max() / norms.min()) if len(norms) else 1.0,
    )


def forget_starts() -> None:
    """Empty the cache of opened SAEs, whose files training may change."""
    _open_start.cache_clear()


def choose_architecture(arguments: list[str]) -> list[str]:
    """The arguments with `model=<architecture of model.start>` if they have `model.start` but no
    `model`, so that the settings and the objective of that architecture can be given. UserError if
    the SAEs to start from have different architectures."""
    names = [argument.lstrip("+").partition("=")[0] for argument in arguments]
    if "model.start" not in names or {"model", "resume"} & {*names}:
        return arguments
    forget_starts()  # SAEs that an earlier command of this process has opened
    first_addresses: dict[str, str] = {}  # architecture -> the first address of an SAE with it
    for address in _list_values(arguments[names.index("model.start")]):
        first_addresses.setdefault(find_start(address).config.name, address)
    if len(first_addresses) > 1:
        addresses = " and ".join(f"{address} ({name})" for name, address in first_addresses.items())
        raise UserError(
            f"model.start: {addresses} have different architectures, and a command has one: give a "
            "command for each"
        )
    return [*arguments, *(f"model={name}" for name in first_addresses)]


def _list_values(argument: str) -> list[str]:
    """The values of an override, without null; empty if Hydra will refuse the override."""
    with suppress(HydraException):
        override = OverridesParser.create().parse_override(argument)
        values = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
        # Hydra wraps a quoted value, and keeps it in the attribute `text`
        return [getattr(value, "text", value) for value in values if value is not None]
    return []


def apply_start(cfg: DictConfig, overrides: Collection[str]) -> DictConfig:
    """A composed config in which the SAE in `model.start` sets what `overrides` do not: the LLM,
    the site and the network. UserError if `overrides` contradict the SAE."""
    start, typed_names = find_start(cfg.model.start), {*split_overrides(overrides)}
    if cfg.model.name != start.config.name:
        raise UserError(
            f"model={cfg.model.name}: model.start={start.address} holds a {start.config.name} "
            "SAE; leave model=... out, or choose another start"
        )
    cfg = deepcopy(cfg)
    source_class = SOURCES.get(cfg.data.kind)
    if source_class and source_class.has_llm:
        if start.metadata.get("llm.name") == NO_LLM:
            raise UserError(
                f"model.start={start.address} was trained on no LLM's activations: give the data "
                "that it was trained on (data=synthetic, data=activations), or another start"
            )
        cfg.llm = choose_llm(to_dataclass(cfg.llm), start.metadata, start.address, typed_names)
        cfg.layer = _choose_layer(start, cfg.layer, typed_names)
    cfg.model.update(_choose_model(start, cfg.model, typed_names))
    return cfg


def _choose_layer(
    start: Start, layer: DictConfig, typed_names: Collection[str]
) -> LayerConfig | DictConfig:
    """The `layer` settings of the start. If they cannot be read, those of the config, in which
    `layer.index` must be typed. UserError also if typed settings contradict the start."""
    try:
        start_layer = read_layer(start.metadata, start.address)
    except UserError:
        if "layer.index" in typed_names:
            return layer
        raise
    if start_layer.target == start_layer.source:  # an autoencoder: `layer.target` is null
        start_layer.target = None
    # a preset of `layer` sets source and target
    names = [name for name in ("source", "target") if {"layer", f"layer.{name}"} & {*typed_names}]
    names += ["index"] if "layer.index" in typed_names else []
    for name in names:
        typed_value, value = getattr(layer, name), getattr(start_layer, name)
        if name == "target":  # null is the source
            typed_value, value = typed_value or layer.source, value or start_layer.source
        if typed_value != value:
            typed_value, value = (getattr(v, "value", v) for v in (typed_value, value))  # enums
            raise UserError(
                f"layer.{name}={typed_value}: model.start={start.address} was trained at "
                f"layer.{name}={value}; leave it out, or choose another start"
            )
    return start_layer


def _choose_model(start: Start, model: DictConfig, typed_names: Collection[str]) -> dict[str, Any]:
    """The `model` settings that the start sets; UserError if a typed one contradicts it."""
    names = [f.name for f in fields(start.config) if f.name not in ("name", "seed", "start")]
    recorded = [name for name in names if start.is_ours or name in RECORDED]
    values = {n: getattr(start.config, n) for n in recorded if f"model.{n}" not in typed_names}
    features = values.get("features", model.features)
    if features < start.config.features:
        raise UserError(
            f"model.features={features}: model.start={start.address} has "
            f"{start.config.features:,} features; give as many or more, or leave it out"
        )
    if "groups" in values:  # shares of all groups but the last, which new features join
        values["groups"] = [size / features for size in start.config.sizes()[:-1]]
    if values.get("skip", model.skip) != start.config.skip:
        article = "a" if start.config.skip else "no"
        raise UserError(
            f"model.skip={str(model.skip).lower()}: model.start={start.address} has {article} skip "
            "connection; leave it out, or choose another start"
        )
    features_compete = ARCHITECTURES[start.config.name].network.features_compete
    needs_free_norms = features_compete and start.norm_ratio > MAX_NORM_RATIO
    if needs_free_norms and values.get("fixed_norm", model.fixed_norm):
        if "model.fixed_norm" in typed_names:
            raise UserError(
                f"model.fixed_norm=true: the decoder rows of model.start={start.address} differ in "
                f"norm by a factor of {start.norm_ratio:.3g}, and equal norms would change which "
                "features are the strongest; leave it out"
            )
        values["fixed_norm"] = False
    return values


def check_start(config: Config, sites: SitePair, shape: LLMShape) -> str | None:
    """UserError unless the SAE in `model.start` fits the widths of the sites. Returns a warning if
    it was trained on another LLM, else None."""
    start = find_start(config.model.start)
    widths = tuple(map(shape.width_at, sites))
    if widths != start.widths:  # printed as 576 or, for a transcoder, 576 -> 768
        start_widths, site_widths = (
            " -> ".join(map(str, dict.fromkeys(pair))) for pair in (start.widths, widths)
        )
        where = f"llm.name={config.llm.name}" if config.data_source.has_llm else "data"
        raise UserError(
            f"model.start={start.address} is for activations of {start_widths} dimensions, and "
            f"those of {where} have {site_widths}; choose another start, or what it was trained on"
        )
    if not config.data_source.has_llm or not {"llm.name", "model_name"} & start.metadata.keys():
        return None
    # the hub's name, and the name that the format recorded
    names = {find_llm_name(start.metadata, ""), start.metadata.get("model_name", "")}
    if PurePath(config.llm.name).name in {PurePath(name).name for name in names}:
        return None
    return (
        f"model.start={start.address} was trained on {min(filter(None, names))}, and goes on with "
        f"{config.llm.name}"
    )
