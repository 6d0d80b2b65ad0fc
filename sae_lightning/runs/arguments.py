"""Checks and quotes the command line's arguments before Hydra parses them."""

import math
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import is_dataclass
from typing import get_type_hints

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    Glob,
    IntervalSweep,
    Override,
    Quote,
    QuotedString,
    RangeSweep,
)
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from sae_lightning.errors import UserError
from sae_lightning.runs.config import Config
from sae_lightning.runs.translations import advise_on_setting
from sae_lightning.sae import ARCHITECTURES
from sae_lightning.stream import SOURCES
from sae_lightning.terminal import name_program

# Settings that may hold a path, in which a leading `~` is expanded.
PATH_SETTINGS = (
    "resume",
    "run",
    "control",
    "file",
    "data.path",
    "data.cache_folder",
    "llm.name",
    "llm.load.offload_folder",
    "model.start",
    "hydra.run.dir",
    "hydra.sweep.dir",
)
# Without -m, a comma is part of the path in these; in other paths, -m was probably forgotten.
SINGLE_PATHS = ("resume", "run", "control", "file")
# Hydra's syntax: quotes, interpolations, escapes.
HYDRA_SYNTAX = re.compile(r"""^['"]|\$\{|\\[()\[\]{}:=, ]""")
# One value of a comma-separated list; group 1 if it is quoted, else group 2.
SWEEP_VALUE = re.compile(
    r"""(?:^|,)\s*(?:('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|([^,]*?))\s*(?=,|\Z)"""
)
MAX_JOBS = 100_000  # most jobs of a sweep: all are composed before the first is trained
EMPTY_VALUES = ("", "''", '""')


def check_arguments(arguments: list[str]) -> list[str]:
    """The arguments with flags first, because Hydra accepts none after a setting. UserError for
    unknown flags, repeated settings, empty paths, missing values, and sweeper settings that only
    presets can set."""
    parsed, unknown = get_args_parser().parse_known_intermixed_args(arguments)
    if unknown:
        raise UserError(
            advise_on_setting(unknown[0])
            or f"{unknown[0]}: no such flag; settings are written without dashes (setting=value), "
            "and --help lists them"
        )
    if parsed.multirun and (parsed.cfg or parsed.info):
        raise UserError(
            "-m: --cfg and --info describe one SAE; leave -m out, and give one value per setting"
        )
    by_name: dict[str, str] = {}
    for override in parsed.overrides:
        name, equals, value = override.partition("=")
        name = name.lstrip("+")
        if equals and name in by_name:
            raise UserError(f"{by_name[name]} {override}: {name} is given twice; leave one out")
        by_name[name] = override
        if equals and name in (*PATH_SETTINGS, "hydra.sweep.subdir") and value in EMPTY_VALUES:
            raise UserError(
                f"{override}: empty (a shell variable that is not set?); give a path or leave it "
                "out"
            )
        if value.strip("'\"") == "???":  # omegaconf's mark of a missing value
            raise UserError(f"{override}: ??? stands for a value that is not given; give one")
        if match := re.match(r"hydra\.sweeper\.(params|search_space)\b", name):
            program = name_program("train.py")
            # both are null by default, and omegaconf cannot set a key below null
            raise UserError(
                f"{override}: {match[0]} is for presets; write a sweep as {program} -m "
                f"setting=1,2, a search as {program} -m hydra/sweeper=optuna "
                "'setting=interval(1,2)'"
            )
    flags = [argument for argument in arguments if argument not in parsed.overrides]
    return flags + parsed.overrides


def refuse_sweep(arguments: list[str]) -> None:
    """UserError for -m, which analyze.py does not support."""
    if is_multirun(arguments):
        raise UserError(
            f"-m: {name_program('analyze.py')} looks at one folder at a time; leave it out, and "
            "give several features as feature=[3,7]"
        )


def quote_texts(arguments: list[str]) -> list[str]:
    """The arguments with the values of text settings (prompts, names, paths) quoted for Hydra, so
    that `1e3` and `'a'` reach the config as typed. `${...}` is still Hydra syntax, and so is `null`
    if the setting may be null.

    In a path or a sweep, quotes are Hydra syntax, too. In a path, a leading `~` is expanded,
    which shells do not do after `=`. In a sweep, commas separate values, and functions such as
    choice(a,b) keep their meaning.
    """
    multirun, text_settings = is_multirun(arguments), find_text_settings()
    return [_quote_text(argument, multirun, text_settings) for argument in arguments]


def allow_new_dict_keys(arguments: list[str]) -> list[str]:
    """The arguments with `++` before settings that are dicts: otherwise, Hydra refuses keys that
    the default lacks."""
    dict_settings = r"(llm\.load|data\.sites|data\.weights)[.=]"
    return [f"++{a}" if re.match(dict_settings, a) else a for a in arguments]


def find_text_settings() -> dict[str, bool]:
    """Name of each setting of type `str` -> whether it may be null."""
    schemas = [("", Config), *(("", task) for task in list_tasks().values())]
    schemas += [("model.", entry.config) for entry in ARCHITECTURES.values()]
    schemas += [("loss.", entry.loss) for entry in ARCHITECTURES.values()]
    schemas += [("data.", entry.settings) for entry in SOURCES.values()]
    may_be_null = {}
    while schemas:
        prefix, schema = schemas.pop()
        for name, hint in get_type_hints(schema).items():
            if is_dataclass(hint):
                schemas.append((f"{prefix}{name}.", hint))
            elif hint in (str, str | None):
                may_be_null[prefix + name] = hint is not str
    return may_be_null


def list_tasks() -> dict[str, type]:
    """The tasks of analyze.py: name -> schema; empty in train.py."""
    nodes = ConfigStore.instance().repo.get("task", {})
    return {name.removesuffix(".yaml"): OmegaConf.get_type(n.node) for name, n in nodes.items()}


def join_sweep_values(texts: Iterable[str]) -> str:
    """Texts as comma-separated values of a sweep, all quoted if any contains a comma."""
    texts = [*texts]
    if any("," in text for text in texts):
        texts = [_quote(text) for text in texts]
    return ",".join(texts)


def wrap_settings_of_swept_groups(arguments: list[str]) -> list[str]:
    """The arguments with each `group.setting=x` of a swept group written as
    `group.setting=choice(x)`, a sweep over one value.

    Hydra first composes a config without the swept arguments. In `-m model=topk,batch_topk
    model.k=32` it would refuse `model.k`, because the default model has no `k`. A sweep of `model`
    is also one of `loss`, because each model brings its own loss.
    """
    if not is_multirun(arguments):
        return arguments
    parser, parsed = OverridesParser.create(), {}
    for argument in arguments:
        with suppress(HydraException):  # a flag, or an error that Hydra will report
            parsed[argument] = parser.parse_override(argument)
    swept = {o.key_or_group for o in parsed.values() if o.is_sweep_override()}
    groups = swept | ({"loss"} if "model" in swept else set())
    rewritten = []
    for argument in arguments:
        override = parsed.get(argument)
        if override and not (override.is_sweep_override() or override.is_delete()):
            group, dot, _ = override.key_or_group.partition(".")
            if dot and group in groups:
                argument = argument.replace("=", "=choice(", 1) + ")"
        rewritten.append(argument)
    return rewritten


def check_sweep(overrides: list[Override], sweeper: DictConfig) -> None:
    """UserError for a sweep with no jobs, too many jobs, or values that crash Hydra's sweepers."""
    for name in ("max_batch_size", "n_trials", "n_jobs"):
        if (count := sweeper.get(name)) is not None and count < 1:
            raise UserError(f"hydra.sweeper.{name}={count}: give 1 or more, or leave it out")
    names = [override.key_or_group for override in overrides]
    is_search = not sweeper._target_.endswith(".BasicSweeper")
    for override in overrides:
        line, value = override.input_line, override.value()
        if override.is_sweep_override() and names.count(override.key_or_group) > 1:
            raise UserError(f"{line}: {override.key_or_group} is given twice; leave one out")
        if isinstance(value, IntervalSweep | RangeSweep):
            stop = value.stop if isinstance(value, RangeSweep) else value.end
            lower_limit = 0 if "log" in value.tags else -math.inf
            if is_search and not lower_limit < value.start < stop < math.inf:
                above = " above 0" if "log" in value.tags else ""
                raise UserError(f"{line}: give two finite numbers{above}, the smaller one first")
            if not is_search and isinstance(value, IntervalSweep):
                raise UserError(f"{line}: only a search takes an interval: hydra/sweeper=optuna")
        if isinstance(value, Glob) and is_search:
            raise UserError(f"{line}: a search takes no glob; write choice(...)")
        if override.is_discrete_sweep() and count_values(override) == 0:
            raise UserError(f"{line}: this is empty, so nothing would be trained")
    if not is_search and math.prod(map(count_values, overrides)) > MAX_JOBS:
        lines = " ".join(o.input_line for o in overrides if o.is_sweep_override())
        raise UserError(
            f"{lines}: more than {MAX_JOBS:,} jobs; give fewer values, or let a search choose: "
            "hydra/sweeper=optuna"
        )


def count_values(override: Override) -> int:
    """Number of values of an override, without generating a range; UserError if it is endless."""
    if not override.is_sweep_override():
        return 1
    value = override.value()
    if not isinstance(value, RangeSweep):
        return sum(1 for _ in override.sweep_iterator())
    if all(map(math.isfinite, (value.start, value.stop, value.step))) and value.step:
        steps = (value.stop - value.start) / value.step
        if math.isfinite(steps):
            return max(0, math.ceil(steps))
    raise UserError(f"{override.input_line}: give finite numbers, and a step that is not 0")


def is_multirun(arguments: list[str]) -> bool:
    """Whether the arguments ask Hydra for a sweep."""
    return bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments))


def _quote_text(argument: str, multirun: bool, text_settings: dict[str, bool]) -> str:
    """Quote one argument, as `quote_texts` says; UserError if a text is not UTF-8. `text_settings`:
    setting -> whether it may be null."""
    name, equals, value = argument.partition("=")
    setting = name.lstrip("+")
    is_path = setting in PATH_SETTINGS
    if not equals or not (is_path or setting in text_settings):
        return argument
    # paths that no schema has may be null, such as llm.load.offload_folder
    may_be_null = text_settings.get(setting, True)
    # Python decodes bytes that are not UTF-8 to these code points
    if not is_path and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"{setting}: the text is not UTF-8; use a terminal with a UTF-8 locale")
    has_syntax = (is_path or multirun) and HYDRA_SYNTAX.search(value)
    if has_syntax or (multirun and re.match(r"\w+\(", value)):
        return argument  # the user has written it for Hydra, such as choice(a,b)
    if is_path and "," in value and not multirun and setting not in SINGLE_PATHS:
        return argument  # Hydra will report that several values need -m

    def quote(text: str) -> str:
        if text == "null" and may_be_null:
            return text
        return quote_if_needed(os.path.expanduser(text) if is_path else text)

    if not multirun:
        return f"{name}={quote(value)}"
    pairs = SWEEP_VALUE.findall(value)  # one of the two groups is empty
    return f"{name}=" + ",".join(quoted or quote(text) for quoted, text in pairs)


def quote_if_needed(text: str) -> str:
    """The text, in quotes if Hydra would read it as something else."""
    with suppress(HydraException):
        if OverridesParser.create().parse_override(f"x={text}").value() == text:
            return text
    return _quote(text)


def _quote(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()
