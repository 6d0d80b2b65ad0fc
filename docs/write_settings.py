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
`python train.py --help` shows the settings as they are with a command line.

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
    PAGE.write_text(page(), "utf8")


def page() -> str:
    """Text of docs/settings.md."""
    register_schemas()
    parts = [TITLE + _overview()]
    for group, schema in get_type_hints(Config).items():
        if is_dataclass(schema):
            about = read_docstrings(Config)[group]
            parts.append(f"\n## {group}\n\n{about}\n{_presets(group)}")
            parts.append(_table(_owners(group, schema)))
            if group in NOTES:
                parts.append(f"\n{NOTES[group]}\n")
    plain = {k: v for k, v in _settings(Config).items() if "." not in k.name}
    parts.append("\n## Settings without a group\n\n" + _table({"": plain}))
    parts.append("\n## Tasks of analyze.py\n\nFor every task:\n\n")
    common = {k: v for k, v in _settings(Task).items() if "." not in k.name}
    parts.append(_table({"": common}))
    parts.append("\n`llm`, `data` and `layer` are groups as above, for folders without a run.\n")
    for name, task in TASKS.items():
        own = {k: v for k, v in _settings(task).items() if k not in _settings(Task)}
        about = " ".join(task.__doc__.split())
        parts.append(f"\n### task={name}\n\n{about}\n" + (own and "\n" + _table({"": own}) or ""))
    return "".join(parts) + HYDRA


def _overview() -> str:
    """Rows of the groups, their presets and the settings worth knowing."""
    known = {s.name for group in WORTH_KNOWING for s in _all_of(group)}
    rows = []
    for group, settings in WORTH_KNOWING.items():
        assert {*settings.split()} <= known, settings
        rows.append(f"| `{group}` | {_code(_names(group))} | {_code(settings.split())} |\n")
    return "".join(rows)


def _all_of(group: str) -> set[Setting]:
    schema = get_type_hints(Config).get(group)
    return set().union(*_owners(group, schema).values()) if schema else set()


def _owners(group: str, schema: type) -> dict[str, dict[Setting, Any]]:
    """The settings of a group, with their defaults, for each preset that has settings of its own;
    "" where there is only one kind."""
    schemas = {"": schema}
    if group == "model":
        schemas = {name: row.config for name, row in ARCHITECTURES.items()}
    elif group == "loss":
        schemas = {name: row.loss for name, row in ARCHITECTURES.items()}
    elif group == "data":
        schemas = {DATA[kind]: row.settings for kind, row in SOURCES.items()}
    made = {}
    for owner, schema in schemas.items():
        presets = {group: owner} if owner else DEFAULTS
        changed = {k: v for preset in presets.items() for k, v in _changes(*preset).items()}
        settings = _settings(schema, f"{group}.").items()
        made[owner] = {setting: changed.get(setting.name, value) for setting, value in settings}
    return made


def _names(group: str) -> list[str]:
    """The presets of a group."""
    return list_options().get(group, [])


def _changes(group: str, preset: str) -> dict[str, Any]:
    """What a preset sets, by dotted name."""
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
        more = _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        flat |= {prefix + key: value} if more is None else more
    return flat


def _presets(group: str) -> str:
    """A list of the presets of a group that set something."""
    hidden = ("model.name", "model.seed")
    lines = []
    for name in _names(group):
        changes = _changes(group, name).items()
        sets = [f"{k}={_plain(v)}" for k, v in changes if k not in hidden and v != "???"]
        lines += [f"- `{group}={name}` sets {_code(sets)}\n"] * bool(sets)
    return "\n" + "".join(lines) + "\n" if lines else "\n"


def _settings(schema: type, prefix: str = "") -> dict[Setting, Any]:
    """Each setting of a dataclass, those of nested ones too, and its default."""
    hints, docs, made = get_type_hints(schema), read_docstrings(schema), {}
    for field in fields(schema):
        kind, name = hints[field.name], prefix + field.name
        if is_dataclass(kind):
            made |= _settings(kind, f"{name}.")
            continue
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        values = "integer or `auto`" if default == "auto" and kind is Any else _values(kind)
        made[Setting(name, values, docs.get(field.name, ""))] = default
    return made


def _values(kind: Any) -> str:
    """What a setting takes."""
    if isinstance(kind, UnionType):
        return " or ".join(_values(k) for k in get_args(kind) if k is not NoneType) + " or `null`"
    if get_origin(kind) is list:
        return f"list of {_values(*get_args(kind))}s"
    if get_origin(kind) is dict:
        return "arguments by name"
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return _code([member.name for member in kind])
    names = {int: "integer", float: "number", bool: "`true`, `false`", str: "text"}
    return names.get(kind, "number, list or `null`")


def _table(owners: Mapping[str, Mapping[Setting, Any]]) -> str:
    """A table of settings; with several owners a column says whose a setting is."""
    rows: dict[Setting, dict[str, Any]] = {}
    for owner, settings in owners.items():
        for setting, default in settings.items():
            rows.setdefault(setting, {})[owner] = default
    several = len(owners) > 1
    lines = ["| setting | values | default | meaning |", "|---|---|---|---|"]
    lines = [line + (" for |", "---|")[i] * several for i, line in enumerate(lines)]
    names = [setting.name for setting in rows]
    for setting, defaults in sorted(rows.items(), key=lambda row: names.index(row[0].name)):
        meaning = setting.meaning.replace("|", "\\|")
        cells = [f"`{setting.name}`", setting.values, _defaults(defaults), meaning]
        if several:
            cells.append("all" if len(defaults) == len(owners) else ", ".join(defaults))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _defaults(defaults: Mapping[str, Any]) -> str:
    """The default of a setting, or what it is for each of its owners."""
    by_text: dict[str, list[str]] = {}
    for owner, default in defaults.items():
        missing = default is MISSING or default == "???"
        by_text.setdefault("to be given" if missing else f"`{_plain(default)}`", []).append(owner)
    if len(by_text) == 1:
        return next(iter(by_text))
    if len(by_text) == len(defaults):
        return "the preset's"
    return "; ".join(f"{text} ({', '.join(owners)})" for text, owners in by_text.items())


def _plain(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool | NoneType):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_plain, value))}]"
    if isinstance(value, str):
        with_number = value.replace("-", "").replace("e", "").replace(".", "").isdigit()
        return f"{float(value):g}" if with_number else value
    return f"{value:g}" if isinstance(value, float) else str(value)


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    main()
