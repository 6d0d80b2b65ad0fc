"""The command line's arguments before Hydra reads them."""

import os
import re
from contextlib import suppress

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from sae_lightning.errors import UserError

PATHS = (
    "resume",
    "run",
    "data.path",
    "data.cache_folder",
    "llm.name",
    "hydra.run.dir",
    "hydra.sweep.dir",
)


def check_flags(arguments: list[str]) -> None:
    """Hydra's parser answers an unknown flag with a page of its own flags."""
    _, unknown = get_args_parser().parse_known_args(arguments)
    if unknown:
        raise UserError(
            f"{unknown[0]}: no such flag; settings are written without dashes (setting=value), "
            "and --help lists them"
        )


def refuse_sweep(arguments: list[str]) -> None:
    """UserError for -m where there is nothing to sweep over."""
    if is_multirun(arguments):
        raise UserError(
            "-m: analyze.py looks at one folder at a time; leave it out, and give several features "
            "as feature=[3,7]"
        )


def quoted_paths(arguments: list[str]) -> list[str]:
    """The arguments with their paths as Hydra takes them: quoted where needed, `~` expanded.

    Folders of a sweep have names such as `loss.l1=0.001`, and a shell expands no `~` behind `=`.
    """
    sweep = is_multirun(arguments)
    return [_quoted_path(argument, sweep) for argument in arguments]


def with_swept_groups(arguments: list[str]) -> list[str]:
    """The arguments with settings of a swept group as sweeps over one value.

    Hydra first composes what is not swept: `-m model=topk,batch_topk model.k=32` would be refused,
    because without `model=` there is no `model.k`. A model brings its loss.
    """
    if not is_multirun(arguments):
        return arguments
    parser, parsed = OverridesParser.create(), {}
    for argument in arguments:
        with suppress(HydraException):  # a flag, or a mistake that Hydra will tell
            parsed[argument] = parser.parse_override(argument)
    swept = {o.key_or_group for o in parsed.values() if o.is_sweep_override()}
    groups = swept | ({"loss"} if "model" in swept else set())
    return [
        argument.replace("=", "=choice(", 1) + ")"
        if (o := parsed.get(argument))
        and not (o.is_sweep_override() or o.is_delete())
        and o.key_or_group.partition(".")[0] in groups - {o.key_or_group}
        else argument
        for argument in arguments
    ]


def is_multirun(arguments: list[str]) -> bool:
    return bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments))


def _quoted_path(argument: str, sweep: bool) -> str:
    name, _, value = argument.partition("=")
    setting = name.lstrip("+")
    # what is written in Hydra's own language stays: quotes, interpolations, escapes, functions
    hydras = re.match(r"""['"]""", value) or "${" in value or re.search(r"\\[()\[\]{}:=, ]", value)
    if setting not in PATHS or hydras or (sweep and re.match(r"\w+\(", value)):
        return argument
    if "," in value and (sweep or setting not in ("resume", "run")):
        # several values: a sweep, or the error that asks for -m
        return f"{name}=" + ",".join(_quoted(part) if sweep else part for part in value.split(","))
    return f"{name}={_quoted(value)}"


def _quoted(path: str) -> str:
    path = os.path.expanduser(path)
    if re.fullmatch(r"[\w/\\+.$%*@?|:-]*", path, re.ASCII):
        return path
    return QuotedString(path, Quote.single).with_quotes()
