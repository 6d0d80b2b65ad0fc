"""Write docs/settings.md from the settings' dataclasses, their docstrings and the presets in conf/.

python docs/write_settings.py        after a setting, its docstring or a preset has changed
"""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import yaml

from sae_lightning.analysis.task import Task
from sae_lightning.analysis.tasks import TASKS
from sae_lightning.runs.config import Config, list_options
from sae_lightning.runs.docstrings import read_docstrings
from sae_lightning.runs.schemas import register_schemas
from sae_lightning.sae import ARCHITECTURES
from sae_lightning.stream import SOURCES

PAGE = Path(__file__).with_name("settings.md")
CONF = Path(__file__).resolve().parents[1] / "conf"
DEFAULTS = {"llm": "smollm2", "layer": "resid", "optim": "adam", "trainer": "auto"}
TITLE = """\
# Settings

Every setting of `train.py` and `analyze.py`. `python docs/write_settings.py` writes this page.
[own_model_and_text.md](own_model_and_text.md#on-the-command-line) says how settings are typed, and
`python train.py ... --help` shows the values that a command line gives them.

- `group=preset` chooses a preset, `group.setting=value` changes one setting.
- Sizes of a run are in tokens, shares are from 0 to 1, `null` means none.
- A setting that has no meaning for the chosen model or data is an error that says where it has one.

| group | presets | settings worth knowing |
|---|---|---|
"""
WORTH_KNOWING = {
    "llm": "llm.name llm.dtype llm.device llm.batch",
    "data": "data.context data.pool data.max_norm data.cache",
    "layer": "layer.index layer.source layer.target",
    "model": "model.features model.k model.seed",
    "loss": "loss.l1 loss.l0 loss.target_l0 loss.auxk loss.preact",
    "optim": "optim.lr optim.bias_lr optim.clip",
    "callbacks": "callbacks.normalize.mode callbacks.resample.every callbacks.dead_after",
    "trainer": "trainer.tokens trainer.batch trainer.precision trainer.products",
    "eval": "eval.every eval.tokens eval.loss_tokens",
    "logger": "logger.wandb.project logger.wandb.offline logger.mlflow.tracking_uri",
    "sweep": "sweep.max_heads sweep.objective sweep.l0",
    "experiment": "",
}
# The preset that stands for each kind of data.
DATA = {"plays": "shakespeare", "hub": "hub", "local": "text", "synthetic": "synthetic"}
DATA |= {"activations": "activations"}
NOTES = {
    "data": "`tinystories`, `openwebtext` and `pile` are presets of `data=hub`.",
    "loss": "The preset follows `model`; leave `loss=` out.",
}
HYDRA = """
## Hydra's own

| setting | meaning |
|---|---|
| `-m` | Train every combination of the values that commas separate ([sweeps.md](sweeps.md)). |
| `--config-dir my` | Look for presets of your own in the folder `my` too. |
| `hydra.run.dir`, `hydra.sweep.dir` | Folder of a run, and of a sweep. |
| `hydra/launcher` | `one_pass` (the default), `basic`, `submitit_slurm`, `submitit_local`. |
| `hydra/sweeper=optuna` | Search instead of trying every combination. |
| `hydra.sweeper.n_trials`, `hydra.sweeper.n_jobs` | Trials in all, and at a time (Optuna). |
| `hydra.sweeper.storage`, `hydra.sweeper.study_name` | Where Optuna keeps the study (Optuna). |
"""


class Setting(NamedTuple):
    """One row of a table, without its default."""

    name: str
    values: str
    meaning: str


def main() -> None:
    """Write the page."""
    PAGE.write_text(format_page(), "utf8")


def format_page() -> str:
    """Text of docs/settings.md."""
    register_schemas()
    parts = [TITLE + _format_overview()]
    for group, schema in get_type_hints(Config).items():
        if is_dataclass(schema):
            docstring = read_docstrings(Config)[group]
            parts.append(f"\n## {group}\n\n{docstring}\n{_format_presets(group)}")
            parts.append(_format_table(_group_by_preset(group, schema)))
            if group in NOTES:
                parts.append(f"\n{NOTES[group]}\n")
    plain = {k: v for k, v in _collect_settings(Config).items() if "." not in k.name}
    parts.append("\n## Settings without a group\n\n" + _format_table({"": plain}))
    parts.append("\n## Tasks of analyze.py\n\nFor every task:\n\n")
    inherited = _collect_settings(Task)
    common = {k: v for k, v in inherited.items() if "." not in k.name}
    parts.append(_format_table({"": common}))
    parts.append("\n`llm`, `data` and `layer` are groups as above, for folders without a run.\n")
    for name, task in TASKS.items():
        parts.append(f"\n### task={name}\n\n{' '.join(task.__doc__.split())}\n")
        if own := {k: v for k, v in _collect_settings(task).items() if k not in inherited}:
            parts.append("\n" + _format_table({"": own}))
    return "".join(parts) + HYDRA


def _format_overview() -> str:
    """Rows of the groups, their presets and the settings worth knowing."""
    names = {s.name for group in WORTH_KNOWING for s in _collect_group(group)}
    rows = []
    for group, settings in WORTH_KNOWING.items():
        assert {*settings.split()} <= names, settings
        presets, chosen = (
            _format_code(list_options().get(group, [])),
            _format_code(settings.split()),
        )
        rows.append(f"| `{group}` | {presets} | {chosen} |\n")
    return "".join(rows)


def _collect_group(group: str) -> set[Setting]:
    schema = get_type_hints(Config).get(group)
    return set().union(*_group_by_preset(group, schema).values()) if schema else set()


def _group_by_preset(group: str, schema: type) -> dict[str, dict[Setting, Any]]:
    """Preset -> the settings of a group with their defaults; the preset is "" if all presets of the
    group have the same settings."""
    schemas = {"": schema}
    if group == "model":
        schemas = {name: row.config for name, row in ARCHITECTURES.items()}
    elif group == "loss":
        schemas = {name: row.loss for name, row in ARCHITECTURES.items()}
    elif group == "data":
        schemas = {DATA[kind]: row.settings for kind, row in SOURCES.items()}
    by_preset = {}
    for name, preset_schema in schemas.items():
        changed: dict[str, Any] = {}
        for group_and_preset in ({group: name} if name else DEFAULTS).items():
            changed |= _read_preset(*group_and_preset)
        settings = _collect_settings(preset_schema, f"{group}.").items()
        by_preset[name] = {setting: changed.get(setting.name, v) for setting, v in settings}
    return by_preset


def _read_preset(group: str, preset: str) -> dict[str, Any]:
    """The settings that a preset changes, by dotted name."""
    file = CONF / group / f"{preset}.yaml"
    if not file.is_file():
        return {"model.name": preset, "model.seed": "${seed}"} if group == "model" else {}
    text = file.read_text()
    tree = yaml.safe_load(text) or {}
    tree.pop("defaults", None)
    return _flatten(tree, "" if "@package _global_" in text else f"{group}.")


def _flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _format_presets(group: str) -> str:
    """A list of the presets of a group, without those that change no setting."""
    hidden = ("model.name", "model.seed")  # of every preset of `model`
    lines = []
    for name in list_options().get(group, []):
        changes = _read_preset(group, name).items()
        sets = [f"{k}={_format_value(v)}" for k, v in changes if k not in hidden and v != "???"]
        lines += [f"- `{group}={name}` sets {_format_code(sets)}\n"] * bool(sets)
    return "\n" + "".join(lines) + "\n" if lines else "\n"


def _collect_settings(schema: type, prefix: str = "") -> dict[Setting, Any]:
    """Each setting of a dataclass and of the dataclasses in it -> its default."""
    hints, docs, settings = get_type_hints(schema), read_docstrings(schema), {}
    for field in fields(schema):
        kind, name = hints[field.name], prefix + field.name
        if is_dataclass(kind):
            settings |= _collect_settings(kind, f"{name}.")
            continue
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        values = (
            "integer or `auto`" if default == "auto" and kind is Any else _describe_values(kind)
        )
        settings[Setting(name, values, docs.get(field.name, ""))] = default
    return settings


def _describe_values(kind: Any) -> str:
    """The values that a setting of the type `kind` takes."""
    if isinstance(kind, UnionType):
        return (
            " or ".join(_describe_values(k) for k in get_args(kind) if k is not NoneType)
            + " or `null`"
        )
    if get_origin(kind) is list:
        return f"list of {_describe_values(*get_args(kind))}s"
    if get_origin(kind) is dict:
        return "arguments by name"
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return _format_code([member.name for member in kind])
    names = {int: "integer", float: "number", bool: "`true`, `false`", str: "text"}
    return names.get(kind, "number, list or `null`")


def _format_table(by_preset: Mapping[str, Mapping[Setting, Any]]) -> str:
    """A table of settings; with several presets, a column says which of them have a setting."""
    rows: dict[Setting, dict[str, Any]] = {}
    for preset, settings in by_preset.items():
        for setting, default in settings.items():
            rows.setdefault(setting, {})[preset] = default
    several = len(by_preset) > 1
    header, rule = "| setting | values | default | meaning |", "|---|---|---|---|"
    lines = [f"{header} for |", f"{rule}---|"] if several else [header, rule]
    names = [setting.name for setting in rows]
    for setting, defaults in sorted(rows.items(), key=lambda row: names.index(row[0].name)):
        meaning = setting.meaning.replace("|", "\\|")
        cells = [f"`{setting.name}`", setting.values, _format_defaults(defaults), meaning]
        if several:
            cells.append("all" if len(defaults) == len(by_preset) else ", ".join(defaults))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _format_defaults(defaults: Mapping[str, Any]) -> str:
    """The default of a setting, given those of each preset."""
    by_text: dict[str, list[str]] = {}
    for preset, default in defaults.items():
        missing = default is MISSING or default == "???"
        text = "to be given" if missing else f"`{_format_value(default)}`"
        by_text.setdefault(text, []).append(preset)
    if len(by_text) == 1:
        return next(iter(by_text))
    if len(by_text) == len(defaults):
        return "the preset's"
    return "; ".join(f"{text} ({', '.join(presets)})" for text, presets in by_text.items())


def _format_value(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool | NoneType):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_format_value, value))}]"
    if isinstance(value, str):
        is_number = value.replace("-", "").replace("e", "").replace(".", "").isdigit()
        return f"{float(value):g}" if is_number else value
    return f"{value:g}" if isinstance(value, float) else str(value)


def _format_code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    main()
