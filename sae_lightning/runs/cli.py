"""Rewrites arguments for Hydra; turns errors that the user can correct into one line."""

import dataclasses
import io
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    ConfigTypeError,
    GrammarParseError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import MarkedYAMLError

from sae_lightning.errors import UserError, is_out_of_memory, list_causes
from sae_lightning.files import describe_system_error
from sae_lightning.runs.arguments import (
    allow_new_dict_keys,
    check_arguments,
    list_tasks,
    quote_texts,
    wrap_settings_of_swept_groups,
)
from sae_lightning.runs.config import DATA_PRESETS, list_options
from sae_lightning.runs.launchers import find_launched_rank
from sae_lightning.runs.search import describe_search_error
from sae_lightning.runs.starts import choose_architecture
from sae_lightning.runs.translations import advise_on_setting
from sae_lightning.sae import ARCHITECTURES
from sae_lightning.stream import SOURCES
from sae_lightning.terminal import make_visible

DEBUG = "SAE_LIGHTNING_DEBUG"
# Group -> the setting that a value is probably for: `layer=9` means `layer.index=9`.
MAIN_SETTINGS = {"layer": "index", "llm": "name", "data": "path", "model": "features"}
# Sweeper or launcher of Hydra -> the command that installs it.
PLUGIN_INSTALLS = {
    "optuna": 'pip install -c constraints.txt -e ".[optuna]"',
    "submitit_slurm": 'pip install -c constraints.txt -e ".[submitit]"',
    "submitit_local": 'pip install -c constraints.txt -e ".[submitit]"',
    "ray": 'pip install -e ".[ray]", in an environment of its own',
}
SEVERAL_ERRORS = "nothing was started:\n  "  # begins a message with a line for each error
PROCESS_START = time.time()


@contextmanager
def report_errors(folder: Path | None = None, multirun: bool = False) -> Iterator[None]:
    """Print an error that the user can correct as one line, and exit with code 1. Bugs keep their
    traceback; with SAE_LIGHTNING_DEBUG=1, every error does. `folder`, which Hydra made for the run,
    is removed if still empty. In a `multirun` the error is only printed, with the folder's name,
    and other jobs go on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # KeyboardInterrupt on Ctrl-C
    # otherwise Hydra prints its own shortened traceback and exits before the error gets here
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a character that the terminal cannot show must not end a run
            stream.reconfigure(errors="replace")
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)  # 128 + SIGINT, as shells report it
    except Exception as error:
        message = explain_error(error, sys.argv[1:])
        if multirun:
            print_error(message, folder.name)
        elif message is None or os.environ.get(DEBUG):
            raise
        else:
            sys.exit(format_error(message))
    finally:
        if folder is not None:
            remove_unused_folder(folder)


def rewrite_command_line() -> None:
    """Rewrite `sys.argv` for Hydra; UserError for arguments that Hydra would misread."""
    sys.argv[1:] = rewrite_arguments(sys.argv[1:])


def rewrite_arguments(arguments: list[str]) -> list[str]:
    """The arguments as Hydra takes them, flags first; UserError if Hydra would misread them."""
    arguments = allow_new_dict_keys(quote_texts(check_arguments(arguments)))
    return wrap_settings_of_swept_groups(choose_architecture(arguments))


def refuse_other_ranks() -> None:
    """UserError on each rank but 0 if torchrun, srun or submitit has started several processes."""
    if (launched := find_launched_rank()) and launched.rank > 0:
        raise UserError(
            f"task {launched.rank} of {launched.size}: the first one does all the work, so this "
            "one does nothing; start a single task"
        )


def format_error(message: str) -> str:
    """The printed form of an error: one line, or a line for each error of a sweep."""
    lines = message.split("\n  ") if message.startswith(SEVERAL_ERRORS) else [message]
    return "error: " + "\n  ".join(map(make_visible, lines))


def print_error(message: str | None, name: str | None = None) -> None:
    """Print the current exception as one line about the job `name`; for a bug (no `message`), print
    its traceback, too."""
    if message is None or os.environ.get(DEBUG):
        traceback.print_exc()
    error = sys.exception()
    name = f"{name}: " if name else ""
    message = (message or f"{type(error).__name__}: {error}").removeprefix(name)
    sys.stderr.write(format_error(f"{name}{message}") + "\n")


def remove_unused_folder(folder: Path) -> None:
    """Remove a run folder that this process made and left empty, and then its day's folder and
    outputs/ if they are empty, too. An older empty folder belongs to the user and stays."""
    with suppress(OSError):  # not empty, or not there
        if folder.stat().st_mtime < PROCESS_START:
            return
        folder.rmdir()
        if re.fullmatch(r"\d{4}-\d\d-\d\d", folder.parent.name):  # the day's folder
            folder.parent.rmdir()
            folder.parent.parent.rmdir()


def explain_error(error: BaseException, overrides: list[str]) -> str | None:
    """One line about an error that the user can correct; None for a bug. `overrides`: the
    arguments that were typed, for the message."""
    for cause in list_causes(error, contexts=False):  # `__context__` may be unrelated
        if line := describe_system_error(cause):
            return line
        if isinstance(cause, UserError):
            return str(cause)
        if is_out_of_memory(cause):
            return (
                "out of memory: lower llm.batch, or the task's own numbers of tokens, contexts or "
                "features"
            )
    if "group override must be a string" in str(error):
        return _describe_number_for_group(overrides)
    causes = list_causes(error)  # Hydra's errors may have the reason in `__context__` only
    for cause in causes:
        if isinstance(cause, UserError):  # raised in a resolver and wrapped by Hydra
            return str(cause)
        if isinstance(cause, ConfigAttributeError | ConfigKeyError):
            return _describe_unknown_setting(cause, overrides)
        if isinstance(cause, ValidationError | ConfigTypeError):
            return _describe_bad_value(cause, overrides)
        if isinstance(cause, OverrideParseException):
            name = cause.override if "=" not in cause.override else ""
            return (
                advise_on_setting(name)
                or f"cannot read {cause.override!r}: write setting=value, quoted where needed"
            )
        if isinstance(cause, MarkedYAMLError):  # in a user's preset
            mark = cause.problem_mark
            return f"{mark.name}, line {mark.line + 1}: {cause.problem}; correct the YAML there"
        missing = re.search(r"Missing mandatory value: (\S+)", str(cause))
        if missing:
            return f"{missing[1]} is not set: give {missing[1]}=..."
    for cause in causes:
        if isinstance(cause, InterpolationResolutionError | GrammarParseError):
            key = cause.full_key
            if key and key != "_dummy_":  # Hydra's placeholder while it chooses presets
                return f"{key}: {str(cause).splitlines()[0]}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _describe_hydra_error(str(error))
    return describe_search_error(error)


def _suggest(word: str, options: list[str]) -> str:
    """`did you mean x? ` with the option x most similar to `word`; empty if none is similar."""
    close = get_close_matches(word, options, n=1)
    return f"did you mean {close[0]}? " if close else ""


def _list_presets_of(group: str) -> list[str]:
    if group == "task":
        return sorted(list_tasks())
    return list_options().get(group, [])


def _describe_number_for_group(overrides: list[str]) -> str:
    """Explain a number in place of a preset, as in `layer=9`."""
    for override in overrides:
        group, _, value = override.partition("=")
        if group and _list_presets_of(group) and not value.isidentifier():
            setting = MAIN_SETTINGS.get(group)
            if group == "loss":
                setting = _find_sparsity_coefficient(overrides)
            return (
                f"{override}: `{group}` chooses a preset ({', '.join(_list_presets_of(group))})"
                + (f"; for a value write {group}.{setting}={value}" if setting else "")
            )
    return "every argument has the form setting=value, such as loss.l1=1e-3"


def _find_sparsity_coefficient(overrides: list[str]) -> str | None:
    """Name of the sparsity coefficient of the chosen model's loss; None if it has none."""
    # train.py's default, then the typed models
    models = ["relu", *(o.removeprefix("model=") for o in overrides if o.startswith("model="))]
    entry = ARCHITECTURES.get(models[-1])
    return entry and entry.loss().sparsity


def _describe_unknown_setting(error: OmegaConfBaseException, overrides: list[str]) -> str:
    """Say which model, data or task has the setting, or which settings have similar names."""
    name = str(error.full_key)
    parent, _, key = name.rpartition(".")
    schema = error.object_type
    tasks = list_tasks()
    if schema in tasks.values() and "data=synthetic" in overrides:
        # the preset sets model.features, which is unknown here
        return (
            "data=synthetic has no meaning here: the run folder says what it was trained on; leave "
            "it out"
        )
    tables = {
        "model": {model: entry.config for model, entry in ARCHITECTURES.items()},
        "loss": {model: entry.loss for model, entry in ARCHITECTURES.items()},
        "data": {preset: SOURCES[kind].settings for preset, kind in DATA_PRESETS.items()},
        "": tasks if schema in tasks.values() else {},
    }
    table = tables.get(parent, {})
    owners = [option for option, cls in table.items() if key in cls.__dataclass_fields__]
    if owners:
        group = {"data": "data", "": "task"}.get(parent, "model")  # a loss comes with its model
        hint = f", or add data={owners[0]}" if group == "data" and len(owners) == 1 else ""
        *others, last = [f"{group}={owner}" for owner in owners]
        choices = f"{', '.join(others)} and {last}" if others else last
        return f"{name} has no meaning for this {group}, only for {choices}: leave it out{hint}"
    typed = [o for o in overrides if re.match(rf"[+~]*{re.escape(name)}[.=]", o)]
    if line := advise_on_setting(typed[0] if typed else name):
        return line
    if dataclasses.is_dataclass(schema):
        settings = [field.name for field in dataclasses.fields(schema)]
    else:  # analyze.yaml has no schema, only its own keys
        settings = sorted(k for k in error.parent_node or {} if k != "hydra")
    prefix = f"{parent}." if parent else ""
    hint = _suggest(key, settings)
    return f"no setting {name}: {hint}there are {', '.join(prefix + k for k in settings)}"


def _describe_bad_value(error: OmegaConfBaseException, overrides: list[str]) -> str:
    """Explain why a value does not have the setting's type."""
    name, reason = str(error.full_key), str(error).splitlines()[0]
    override = next((o for o in overrides if o.lstrip("+").startswith(f"{name}=")), name)
    if "Integer" in reason and re.search(r"'[\d.]+' of type 'float'", reason):
        reason = "give a whole number in digits, such as 1000000 or 1_000_000"
    if "Set[str]" in reason:  # Hydra's class for sweeps has a field that omegaconf refuses
        return "choice(...), range(...) and the like cannot be nested or put in a list"
    if re.match(r"Cannot (merge DictConfig with|assign \w+ to Dict)", reason):
        reason = f"give names with their values, as {name}={{name:value}}"
    if "'list' to string" in reason:
        reason = "a list is not possible here"
    if "not Optional" in reason:
        reason = "null is not possible here"
    return f"{override.lstrip('+')}: {reason[0].lower()}{reason[1:].removesuffix('.')}"


def _describe_hydra_error(text: str) -> str:
    """One line for a Hydra error that can be recognised only by its text."""
    if match := re.search(r"Could not find '(hydra/[\w/]+)/([^'/]+)'", text):
        group, choice = match.groups()
        remedy = f"; {PLUGIN_INSTALLS[choice]}" if choice in PLUGIN_INSTALLS else ", or misspelt"
        return f"{group}={choice}: not installed{remedy}"
    if match := re.search(r"Could not find '(\w+)/([^']+)'", text):
        group, choice = match.groups()
        presets = _list_presets_of(group)
        hint = _suggest(choice, presets)
        choices = f"{hint}choose from {', '.join(presets)}" if presets else "there is none yet"
        return f"{group}={choice}: no such preset; {choices}"
    if match := re.search(r"Ambiguous value for argument '(.+)'", text):
        name, _, values = match[1].partition("=")
        return (
            f"{match[1]}: several values make a sweep, which needs -m; a list is written "
            f"{name}=[{values}]; or quote the value"
        )
    if match := re.search(r"Could not override '([\w/]+)'", text):
        return f"no setting {match[1]}: --help lists all settings"
    if match := re.search(r"Either remove \+ prefix: '(.+)'", text):
        return f"+{match[1]}: this setting exists; leave out the +"
    count = 2 if "Error in call to target" in text else 1  # the second line holds the reason
    return " ".join(text.strip().splitlines()[:count])
