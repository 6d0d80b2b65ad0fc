"""Plugins: users' modules that add entries to ARCHITECTURES, SOURCES or TASKS when imported.

Their code runs only if they are typed (plugins=[...]) or installed (an entry point of the group
`sae_lightning.plugins`). No plugin is imported because a run folder names it.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any

from hydra._internal.utils import get_args_parser

from sae_lightning.errors import UserError
from sae_lightning.runs.arguments import quote_if_needed
from sae_lightning.runs.schemas import register_schemas
from sae_lightning.runs.untrusted_yaml import name_module
from sae_lightning.sae import ARCHITECTURES
from sae_lightning.stream import SOURCES

GROUP = "sae_lightning.plugins"
SETTING = "plugins"


def load_plugins(arguments: list[str], tasks: dict[str, type] | None = None) -> list[str]:
    """Import the plugins that are typed or installed, and register all schemas with Hydra; returns
    the arguments with `plugins=[...]` in Hydra's syntax. `tasks`: TASKS, for analyze.py."""
    typed = {a: _read_names(a) for a in arguments if a.lstrip("+").startswith(f"{SETTING}=")}
    import_plugins([name for names in typed.values() for name in names], tasks)
    parsed, _ = get_args_parser().parse_known_intermixed_args(arguments)
    register_schemas(tasks, parsed.config_dir)
    return [
        f"{SETTING}=[{','.join(map(quote_if_needed, typed[a]))}]" if a in typed else a
        for a in arguments
    ]


def import_plugins(names: Iterable[str], tasks: dict[str, type] | None = None) -> None:
    """Import installed plugins and those in `names`: modules, or .py files. UserError if one is
    missing, fails, or replaces an entry of a table."""
    tables = {"architecture": ARCHITECTURES, "kind of data": SOURCES, "task": tasks or {}}
    for point in entry_points(group=GROUP):
        _import_one(f"the installed plugin {point.name}", point.value.partition(":")[0], tables)
    for name in names:
        module = name_module(name)
        if name.endswith(".py") and not os.path.isfile(name):
            raise UserError(f"{SETTING}=[{name}]: no such file")
        _make_importable(os.path.dirname(name) if name.endswith(".py") else os.getcwd())
        _import_one(f"{SETTING}=[{name}]", module, tables)
        file = getattr(sys.modules[module], "__file__", None)
        if name.endswith(".py") and not (file and os.path.samefile(file, name)):
            raise UserError(
                f"{SETTING}=[{name}]: Python finds another module {module}, {file}; rename yours"
            )


def _read_names(argument: str) -> list[str]:
    """The names in plugins=[a,b] or plugins=a: modules, and .py files as absolute paths."""
    value = argument.partition("=")[2].strip().removeprefix("[").removesuffix("]")
    names = [name.strip(" '\"") for name in value.split(",") if name.strip()]
    expand = os.path.expanduser
    return [os.path.abspath(expand(name)) if name.endswith(".py") else name for name in names]


def _make_importable(folder: str) -> None:
    """Add `folder` to the end of Python's search path, here and in processes started later."""
    if folder not in sys.path:
        sys.path.append(folder)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if folder not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, paths), folder])


def _import_one(label: str, module: str, tables: Mapping[str, dict[str, Any]]) -> None:
    """Import a plugin; UserError, which begins with `label`, if it fails or replaces an entry of
    one of the `tables`."""
    before = {kind: dict(table) for kind, table in tables.items()}
    try:
        importlib.import_module(module)
    except UserError:
        raise
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and module.startswith(missing):  # the plugin, not a module that it imports
            raise UserError(
                f"{label}: no module of this name; give one that Python finds from this folder, or "
                "the path of a .py file"
            ) from error
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{label}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} "
            f"({where.filename}, line {where.lineno})"
        ) from error
    for kind, table in tables.items():
        for name, entry in before[kind].items():
            if table[name] is not entry:
                table[name] = entry
                raise UserError(f"{label}: the {kind} {name} is there already; choose another name")
