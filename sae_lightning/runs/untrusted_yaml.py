"""Safe reading of the YAML in the folder of a run or sweep, which may be untrusted.

Our own files hold resolved values only. In others, an interpolation could copy secrets from the
environment, an alias expand without limit and a tag make a Python object: all three are refused.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from sae_lightning.errors import UserError
from sae_lightning.files import read_regular_file

MAX_YAML_DEPTH = 20  # nesting of groups and lists; ours have 3 levels
OVERRIDES_KEY = "overrides"  # the overrides that were typed: text that is never resolved


def read_settings(file: Path) -> Any:
    """Read a run's `config.yaml` as a plain dict. UserError for syntax that `parse_scalars` refuses
    and for an interpolation outside the overrides."""
    text = read_regular_file(file)
    for name, value in parse_scalars(file, text):
        # quote only the match: the file may be a link to secrets
        if name != OVERRIDES_KEY and (match := re.search(r"\$\{[^}]*\}*", value)):
            raise _make_refusal(file, name, f"the interpolation {match[0]!r:.60}")
    return OmegaConf.to_container(OmegaConf.create(text))


def refuse_plugins(file: Path, names: Any) -> None:
    """UserError if the settings in `file` name a plugin that this process has not imported: the
    folder may be a stranger's, and the user has not typed `plugins`. ValueError if `names` is not a
    list of texts."""
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("plugins is not a list of names")
    for name in names:
        if name_module(name) not in sys.modules:
            raise UserError(
                f"{file}: this run used code of its user's, plugins=[{name}]: read that code "
                f"first, then allow it by adding plugins=[{','.join(names)}] to this command (in "
                "Python: import it)"
            )


def name_module(name: str) -> str:
    """Name of the module of a plugin, which is a module or a .py file."""
    return Path(name).stem if name.endswith(".py") else name


def parse_scalars(file: Path, text: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, text) of each key and value in the YAML `text` of `file`. The item of a
    list has the name of the list; a key has the name of the group around it. UserError for anchors,
    aliases, tags and merge keys."""
    # one entry per open group (its current key, None until that is read) or open list (False)
    keys: list[str | bool | None] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):  # the parser that OmegaConf uses
        name = ".".join(key for key in keys if key)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _make_refusal(file, name, "an anchor or alias (& or *)")
        if getattr(event, "tag", None):
            raise _make_refusal(file, name, f"the tag {event.tag!r:.60}")
        is_key = bool(keys) and keys[-1] is None
        if isinstance(event, yaml.CollectionStartEvent):
            if is_key:
                raise _make_refusal(file, name, "a key that is not a word")
            if len(keys) == MAX_YAML_DEPTH:
                raise _make_refusal(
                    file, name, f"more than {MAX_YAML_DEPTH} nested groups or lists"
                )
            keys.append(None if isinstance(event, yaml.MappingStartEvent) else False)
        elif isinstance(event, yaml.ScalarEvent):
            if is_key and event.value == "<<":
                raise _make_refusal(file, name, "a merge key (<<)")
            yield name, event.value
            if is_key:
                keys[-1] = event.value
            else:
                _end_value(keys)
        elif isinstance(event, yaml.CollectionEndEvent):
            keys.pop()
            _end_value(keys)


def _end_value(keys: list[str | bool | None]) -> None:
    """After a value: if it was in a mapping, a key follows."""
    if keys and keys[-1] is not False:
        keys[-1] = None


def _make_refusal(file: Path, name: str, syntax: str) -> UserError:
    """The error for YAML syntax that no run writes, in the setting `name`."""
    name = name if name.isprintable() else repr(name)
    return UserError(
        f"{file}: {name or 'the top level'} holds {syntax}, which no run writes, so the file is "
        "not read; write the value itself there"
    )
