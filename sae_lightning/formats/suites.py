"""Short names of well-known suites of SAEs on the hub, and the addresses that they stand for."""

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import NamedTuple

from sae_lightning.errors import UserError

# Of SAEs that differ only in L0, a short name means the one nearest to this L0 (SAELens calls it
# canonical).
USUAL_L0 = 100.0


class Suite(NamedTuple):
    """An entry of SUITES: `hub:<suite>/<parts>` stands for a path in a repository."""

    parts: str
    """Names of the parts, separated by spaces."""
    repo: str
    """The repository, with the parts in braces."""
    paths: tuple[str, ...]
    """The path in it; of several, the first that exists. `*` stands for an L0."""
    names: dict[str, dict[str, str]]
    """Part -> short name -> its replacement in `repo` and `paths`. Parts that are not listed are
    inserted as they are typed."""


GEMMA_SCOPE_SITES = {"res": "res", "att": "att", "mlp": "mlp", "transcoders": "transcoders"}
GEMMA_SCOPE_2_SITES = {"res": "resid_post", "att": "attn_out", "mlp": "mlp_out"}
GEMMA_SCOPE_2_SITES |= {"transcoders": "transcoder"}
LLAMA_SCOPE_SITES = {"res": "R", "att": "A", "mlp": "M", "transcoders": "TC"}
QWEN_MODELS = {
    "qwen3-1.7b": "Qwen3-1.7B-Base-W32K",
    "qwen3-8b": "Qwen3-8B-Base-W64K",
    "qwen3-30b-a3b": "Qwen3-30B-A3B-Base-W128K",
    "qwen3.5-2b": "Qwen3.5-2B-Base-W32K",
    "qwen3.5-9b": "Qwen3.5-9B-Base-W64K",
    "qwen3.5-27b": "Qwen3.5-27B-W80K",
    "qwen3.5-35b-a3b": "Qwen3.5-35B-A3B-Base-W128K",
}
SUITES = {
    "gemma-scope": Suite(
        "model site layer width",
        "google/gemma-scope-{model}-{site}",
        ("layer_{layer}/width_{width}/average_l0_*",),
        {
            "model": {"2b": "2b-pt", "9b": "9b-pt", "9b-it": "9b-it", "27b": "27b-pt"},
            "site": GEMMA_SCOPE_SITES,
        },
    ),
    "gemma-scope-2": Suite(
        "model site layer width",
        "google/gemma-scope-2-{model}",
        (
            "{site}/layer_{layer}_width_{width}_l0_medium",  # L0 of about 60, in four layers
            "{site}_all/layer_{layer}_width_{width}_l0_big",  # about 150, in every layer
        ),
        {
            "model": {
                name: name if name.endswith("-it") else f"{name}-pt"
                for size in ("270m", "1b", "4b", "12b", "27b")
                for name in (size, f"{size}-it")
            },
            "site": GEMMA_SCOPE_2_SITES,
        },
    ),
    "llama-scope": Suite(
        "site layer expansion",
        "fnlp/Llama3_1-8B-Base-LX{site}-{expansion}",
        ("Llama3_1-8B-Base-L{layer}{site}-{expansion}",),
        {"site": LLAMA_SCOPE_SITES, "expansion": {"8x": "8x", "32x": "32x"}},
    ),
    "qwen-scope": Suite(
        "model layer",
        "Qwen/SAE-Res-{model}-L0_100",
        ("layer{layer}.sae.pt",),
        {"model": QWEN_MODELS},
    ),
    "gpt2-res-jb": Suite(
        "layer", "jbloom/GPT2-Small-SAEs-Reformatted", ("blocks.{layer}.hook_resid_pre",), {}
    ),
}


def expand_suite(name: str) -> tuple[str, tuple[str, ...]] | None:
    """The repository, and paths in it to try in turn, that `<suite>/<parts>` stands for; None if it
    does not begin with a suite's name, UserError if the parts do not fit."""
    first, *short_names = name.split("/")
    if first not in SUITES:
        return None
    suite, values = SUITES[first], {}
    parts = suite.parts.split()
    for part, short_name in zip(parts, short_names, strict=False):  # lengths are compared below
        names = suite.names.get(part)
        if names and short_name not in names:
            raise UserError(
                f"hub:{name}: {first} has no {part} {short_name}; choose from {', '.join(names)}"
            )
        values[part] = names[short_name] if names else short_name
    if len(short_names) != len(parts):
        form = "/".join(f"<{part}>" for part in parts)
        raise UserError(f"hub:{name}: write hub:{first}/{form}; the names are in docs/hub.md")
    return suite.repo.format(**values), tuple(path.format(**values) for path in suite.paths)


def choose_path(paths: tuple[str, ...], list_folder: Callable[[str], list[str]]) -> str | None:
    """The first of `paths` that exists; if it has a `*` for an L0, the match nearest to USUAL_L0,
    and of two equally near ones the smaller. None if none exists.

    `list_folder`: lists the paths in a folder, none if there is no such folder.
    """
    for path in paths:
        parent = str(PurePosixPath(path).parent)
        matches = [name for name in list_folder(parent) if fnmatchcase(name, path)]
        if matches:
            return min(matches, key=_measure_distance)
    return None


def _measure_distance(path: str) -> tuple[float, float]:
    """How far the L0 at the end of a path (0 if it has none) is from USUAL_L0, and this L0."""
    match = re.search(r"\d+(\.\d+)?$", path)
    l0 = float(match[0]) if match else 0.0
    return abs(l0 - USUAL_L0), l0
