"""The config of one SAE, cut in two halves.

The stream half determines the activations; runs that agree on it can share one pass of the LLM.
The head half determines what is trained on them. Hydra composes YAML presets over these
dataclasses; the packages below runs/ never see a DictConfig.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from sae_lightning.errors import UserError, check_finite
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.sites import LayerConfig
from sae_lightning.report.experiments import ONLY_ROUNDING
from sae_lightning.runs.docstrings import read_docstrings
from sae_lightning.runs.search import BENCHMARK_OBJECTIVES, SweepConfig
from sae_lightning.runs.translations import advise_on_setting
from sae_lightning.sae import ARCHITECTURES, Loss, SAEConfig
from sae_lightning.sae.controls import NOT_FOR_TRANSCODERS, Control
from sae_lightning.stream import SOURCES, make_source
from sae_lightning.stream.source import DataConfig, DataSource
from sae_lightning.training.logger_settings import LoggerConfig
from sae_lightning.training.schedules import find_tuning_start
from sae_lightning.training.settings import CallbacksConfig, EvalConfig, OptimConfig, TrainerConfig

# The main preset of each kind of data -> the kind.
DATA_PRESETS = {
    "shakespeare": "plays",
    "hub": "hub",
    "text": "local",
    "synthetic": "synthetic",
    "activations": "activations",
}
STREAM_HALF = ("llm", "data", "trainer", "eval", "seed")
# Settings of the trainer that do not change the trained SAEs (but for a split SAE's rounding).
DEVICE_SETTINGS = ("devices", "nodes", "split", "patience")
# Prefixes of the overrides with which `resume` may change `sweep` and `trainer`.
RESUME_OVERRIDES = (
    *(f"sweep.{name}=" for name in ("objective", "l0", "max_heads")),
    *(f"trainer.{name}=" for name in (*DEVICE_SETTINGS, "threads", "keep_every")),
)
# Prefixes of the settings that are not compared with those in the checkpoint.
FREE_ON_RESUME = (*ONLY_ROUNDING, "eval")


@dataclass(slots=True, kw_only=True)
class Config:
    """All settings of one run, which trains one SAE."""

    llm: LLMConfig
    """The language model."""
    data: DataConfig
    """The text, synthetic concepts or activations in files, and how activations are shuffled."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Length of training, batch size, device and precision."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation on held-out text."""
    seed: int = 0
    """Fixes the order of the data and, through `model.seed`, everything else."""

    layer: LayerConfig
    """Where in the LLM the SAE reads."""
    model: SAEConfig
    """The network."""
    loss: Loss
    """The objective."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Adam and the learning-rate schedule."""
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    """Normalisation and dead features."""

    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Loggers beside TensorBoard."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """Settings of a multirun as a whole."""
    plugins: list[str] = field(default_factory=list)
    """Modules or .py files with parts of your own, such as `[my_sae]` (docs/extending.md)."""
    resume: str | None = None
    """Run folder to continue. Only some of `trainer`, `logger` and `sweep` may then change."""

    def __post_init__(self):
        self._check_model()
        if self.trainer.batch > self.data.pool:
            raise UserError(
                f"trainer.batch={self.trainer.batch} is larger than the shuffle pool "
                f"(data.pool={self.data.pool}): lower the batch or enlarge the pool"
            )
        dead_after = self.callbacks.dead_after
        if dead_after is not None and dead_after >= self.trainer.tokens:
            raise UserError(
                f"callbacks.dead_after={dead_after}: no feature can be silent for that long in "
                f"trainer.tokens={self.trainer.tokens}; give less, or null"
            )
        for setting, seed in (("seed", self.seed), ("model.seed", self.model.seed)):
            if not 0 <= seed < 2**63:
                raise UserError(f"{setting}={seed}: give 0 or a positive integer below 2**63")
        source_class = SOURCES.get(self.data.kind)
        if source_class is None or type(self.data) is not source_class.settings:
            raise UserError(
                f"data.kind={self.data.kind}: these are not its settings; choose data=..., which "
                "brings them"
            )
        metrics, where = self.data_source.list_metrics(self.eval.loss_tokens)
        benchmarks = BENCHMARK_OBJECTIVES if self.data_source.has_llm else frozenset()
        self.sweep.check_objective(metrics | benchmarks, where)
        self.data_source.check_settings(self.layer)

    def _check_model(self) -> None:
        """UserError unless architecture, loss and sites are compatible."""
        name = self.model.name
        if name not in ARCHITECTURES:
            names = ", ".join(ARCHITECTURES)
            raise UserError(f"model.name={name}: no such architecture; choose from {names}")
        if type(self.loss) is not ARCHITECTURES[name].loss:
            others = [
                other for other, entry in ARCHITECTURES.items() if entry.loss is type(self.loss)
            ]
            raise UserError(
                f"loss: this is not the objective of model.name={name} but of "
                f"{' and '.join(f'model={other}' for other in others)}; choose model=..., which "
                "brings its own loss, and leave loss=... out"
            )
        if type(self.model) is not ARCHITECTURES[name].config:
            owners = [o for o, entry in ARCHITECTURES.items() if entry.config is type(self.model)]
            raise UserError(
                f"model.name={name}: these are settings of model={' and model='.join(owners)}; "
                f"a preset of your own says which: name: {owners[0]}"
            )
        is_autoencoder = self.layer.target in (None, self.layer.source)  # None: the source
        if self.model.skip and is_autoencoder:
            raise UserError(
                "model.skip=true: an autoencoder's skip connection would copy its input; only a "
                "transcoder has one (layer=transcoder, or layer.target)"
            )
        target_l0 = getattr(self.loss, "target_l0", None)
        if target_l0 is not None and target_l0 >= self.model.features:
            raise UserError(
                f"loss.target_l0={target_l0}: there are only model.features={self.model.features}; "
                "give fewer active features, or null"
            )
        self._check_control(is_autoencoder)

    def _check_control(self, is_autoencoder: bool) -> None:
        """UserError for settings that have no meaning with `model.control`."""
        control, resampling = self.model.control, self.callbacks.resample.every
        if control is None:
            return
        if self.model.start is not None:
            raise UserError(
                f"model.control={control.name}: a control starts from random weights; leave "
                f"model.start={self.model.start} out"
            )
        if resampling is not None:
            raise UserError(
                f"callbacks.resample.every={resampling}: resampling points features at "
                f"activations, which model.control={control.name} must not learn from; give null"
            )
        if self.loss.kl and control is Control.shuffled_activations:
            raise UserError(
                f"loss.kl={self.loss.kl}: the LLM's own activations are what "
                f"model.control={control.name} must not learn from; leave one of them out"
            )
        if control in NOT_FOR_TRANSCODERS and not is_autoencoder:
            raise UserError(
                f"model.control={control.name} has no meaning for a transcoder; use "
                "frozen_decoder, soft_frozen_decoder or frozen_encoder"
            )

    @property
    def data_source(self) -> DataSource:
        """The source of activations, such as an LLM that reads text."""
        return make_source(self.llm, self.data, self.seed)

    @property
    def tuned_from(self) -> int | None:
        """The first update, counted from 0, that uses `loss.kl`; None without it."""
        if not self.loss.kl:
            return None
        return find_tuning_start(self.trainer.steps, self.loss.kl_from)

    def to_dict(self) -> dict[str, Any]:
        """All settings, for YAML and JSON: groups as dicts, enums as their names."""
        # through JSON: OmegaConf's own conversion takes 1,000 times as long
        return json.loads(json.dumps(asdict(self), default=attrgetter("name")))

    def to_flat_dict(self) -> dict[str, Any]:
        """All settings by dotted name, such as `loss.l1`."""
        return _flatten(self.to_dict())

    def describe_settings(self) -> dict[str, Any]:
        """All settings but the loggers', which say nothing about the SAE, by dotted name."""
        return {k: v for k, v in self.to_flat_dict().items() if not k.startswith("logger.")}

    def list_fixed_settings(self) -> dict[str, Any]:
        """The settings that must be the same on resuming, by dotted name."""
        # older checkpoints lack loss.kl, which was 0
        free = FREE_ON_RESUME if self.loss.kl else (*FREE_ON_RESUME, "loss.kl")
        return {k: v for k, v in self.to_flat_dict().items() if not k.startswith(free)}

    def stream_key(self) -> str:
        """Hash of the stream half: runs with equal keys can share one pass of the LLM.

        With `data.max_norm` the site affects which tokens are dropped, so the key includes `layer`.
        """
        settings = self.to_dict()
        half = {name: settings[name] for name in STREAM_HALF}
        # the cache does not change the activations, and the kind follows from the other settings
        for name in ("cache", "cache_folder", "kind"):
            half["data"].pop(name, None)
        for name in DEVICE_SETTINGS:
            del half["trainer"][name]
        if self.data.rows_depend_on_site:
            half["layer"] = settings["layer"]
        return hashlib.sha256(json.dumps(half, sort_keys=True).encode()).hexdigest()[:16]


def list_options() -> dict[str, list[str]]:
    """Group -> names of its options: presets in conf/, and those that Hydra's store holds."""
    groups: dict[str, list[str]] = {"model": []}  # conf/ has no presets of model
    for path in Path(find_conf_folder()).glob("*/*.yaml"):
        groups.setdefault(path.parent.name, []).append(path.stem)
    stored = ConfigStore.instance().repo
    return {
        group: sorted({*names, *(n.removesuffix(".yaml") for n in stored.get(group, {}))})
        for group, names in sorted(groups.items())
    }


def list_presets() -> str:
    """One line per group of options, for `--help`."""
    return "\n".join(f"  {group:<11}{', '.join(names)}" for group, names in list_options().items())


def to_dataclass(cfg: DictConfig) -> Any:
    """The dataclass that a composed config describes; UserError if a setting is missing, unknown or
    not finite, or the dataclass refuses its values."""
    try:
        for name, value in _flatten(OmegaConf.to_container(cfg, resolve=True)).items():
            check_finite(name, value)
        return OmegaConf.to_object(cfg)
    except MissingMandatoryValue as error:
        name = error.full_key
        docs = read_docstrings(error.object_type) if is_dataclass(error.object_type) else {}
        meaning = f" ({docs[error.key].removesuffix('.')})" if error.key in docs else ""
        raise UserError(f"{name} is not set: give {name}=...{meaning}") from error
    except AttributeError as error:  # `+model.featurs=3`: with +, Hydra adds any key
        name = str(error).split("'")[-2]  # the message ends with: has no attribute 'featurs'
        hint = f"{error}: leave out the +, or correct the setting's name"
        raise UserError(advise_on_setting(name) or hint) from error


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            # not prefix + key: in llm.load.max_memory, a key may be an int, the number of a GPU
            flat[f"{prefix}{key}"] = value
    return flat


def find_conf_folder() -> str:
    """The folder of the presets: in an installed package, or beside `train.py` in a clone."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return str(installed if installed.is_dir() else package.with_name("conf"))
