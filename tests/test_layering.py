"""Imports go downwards only, and each library is imported in its rooms only (see ARCHITECTURE)."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "sae_lightning"

# Top to bottom. A unit imports units of lower rows; units of one row do not know each other.
ROWS = [
    ["train", "analyze"],
    ["commands", "hydra_plugins"],
    ["analysis"],
    ["runs"],
    ["training"],
    ["scoring"],
    ["report", "formats"],
    ["stream"],
    ["llm", "sae"],
    ["files", "ranks"],
    ["terminal", "errors"],
]
DEPTH = {unit: row for row, units in enumerate(ROWS) for unit in units}
# The front door, `from sae_lightning import lens`: below the entry points, above all rooms.
DEPTH[PACKAGE] = DEPTH["commands"] - 0.5

# Exceptions: rooms that may not import these lower rooms.
UNKNOWN = {
    "stream": {"sae"},
    "sae": {"terminal"},
}
# Library -> the only units that import it.
ROOMS = {
    "hydra": {"commands", "hydra_plugins", "runs"},
    "omegaconf": {"commands", "hydra_plugins", "runs"},
    "lightning": {"training", f"{PACKAGE}.runs.run"},
    "transformers": {"llm"},
    "huggingface_hub": {"llm", "formats"},
    "scipy": {f"{PACKAGE}.stream.recovery", "analysis"},
    "sklearn": {"analysis"},
    "triton": {f"{PACKAGE}.sae.triton_products"},
}
TORCH_ONLY = {"sae"}
WITHOUT_LIGHTNING = {f"{PACKAGE}.training.{name}" for name in ("settings", "logger_settings")}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of all modules under the rules."""
    files = [root / "train.py", root / "analyze.py"]
    files += [*(root / PACKAGE).rglob("*.py"), *(root / "hydra_plugins").rglob("*.py")]
    modules = {}
    for file in filter(Path.is_file, files):
        parts = file.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """Dotted names of the modules that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from sae_lightning import checks` imports a module, not a name of the package
            names |= {member if member in known else node.module for member in members}
    return names


def unit(module: str) -> str:
    """The entry of ROWS that a module belongs to."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else parts[0]


def violations(root: Path) -> list[str]:
    """Every import that breaks a rule, as `importer -> imported: rule`."""
    known = modules(root)
    broken = []
    for module, file in sorted(known.items()):
        importer = unit(module)
        if importer not in DEPTH:
            broken.append(f"{module}: has no row in this table")
            continue
        for name in sorted(imports(file, known)):
            if rule := _broken_rule(module, importer, name):
                broken.append(f"{module} -> {name}: {rule}")
    return broken


def _broken_rule(module: str, importer: str, name: str) -> str | None:
    library = name.split(".")[0]
    if library == PACKAGE:
        callbacks = f"{PACKAGE}.training.callbacks."
        if module.startswith(callbacks) and name.startswith(callbacks):
            return "callbacks do not import one another"
        imported = unit(name)
        if imported == importer:
            return None
        if DEPTH.get(imported, 0) <= DEPTH[importer]:
            return "not downwards"
        return (
            f"{importer} does not know {imported}"
            if imported in UNKNOWN.get(importer, ())
            else None
        )
    if not {importer, module} & ROOMS.get(library, {importer}):
        return f"only in {', '.join(sorted(ROOMS[library]))}"
    if library == "lightning" and module in WITHOUT_LIGHTNING:
        return "a config is read without lightning"
    if importer in TORCH_ONLY and library not in {"torch", "triton"} | sys.stdlib_module_names:
        return "torch and the standard library only"
    return None


@pytest.mark.slow
def test_every_import_of_the_project_keeps_the_rules():
    assert {"train", "analyze", "sae_lightning.sae.base"} <= set(modules(ROOT)), "looked at nothing"
    assert violations(ROOT) == []


def cycles(root: Path) -> list[str]:
    """Import cycles among the files and folders of each folder, as `folder: a, b`."""
    known = modules(root)
    found = []
    for folder in sorted({".".join(name.split(".")[:-1]) for name in known} - {""}):
        graph: dict[str, set[str]] = {}
        for module, file in known.items():
            if not module.startswith(f"{folder}."):
                continue
            child = module.removeprefix(f"{folder}.").split(".")[0]
            names = (n for n in imports(file, known) if n.startswith(f"{folder}."))
            children = {name.removeprefix(f"{folder}.").split(".")[0] for name in names}
            graph[child] = graph.get(child, set()) | children - {child}
        try:
            list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            found.append(f"{folder}: {', '.join(error.args[1])}")
    return found


@pytest.mark.slow
def test_no_files_or_folders_import_one_another_in_a_circle():
    assert cycles(ROOT) == []


def test_a_circle_between_folders_is_found(tmp_path):
    tree = {
        "sae_lightning/analysis/survey/table.py": "from sae_lightning.analysis.lens import lens",
        "sae_lightning/analysis/survey/counts.py": "",
        "sae_lightning/analysis/lens.py": "from sae_lightning.analysis.survey.counts import x",
    }
    assert cycles(make_tree(tmp_path, tree)) == ["sae_lightning.analysis: lens, survey, lens"]


def make_tree(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_a_tree_that_keeps_the_rules_passes(tmp_path):
    tree = {
        "train.py": "from sae_lightning.commands import run_train",
        "sae_lightning/commands/__init__.py": "import hydra\nfrom sae_lightning.runs import run",
        "sae_lightning/__init__.py": "from sae_lightning.formats.load_sae import load_sae",
        "sae_lightning/runs/run.py": "import lightning as L\nfrom sae_lightning.runs import checks",
        "sae_lightning/runs/checks.py": "import json, torch",
        "sae_lightning/errors.py": "",
        "sae_lightning/formats/saved_format.py": "from sae_lightning.sae import SAE",
        "sae_lightning/sae/__init__.py": "from sae_lightning.sae.base import SAE",
        "sae_lightning/sae/base.py": "import math\nfrom torch import nn",
        "sae_lightning/sae/triton_products.py": "import triton",
        "sae_lightning/training/callbacks/__init__.py": (
            "from sae_lightning.training.callbacks.clip import Clip"
        ),
        "sae_lightning/training/callbacks/clip.py": "import lightning",
    }
    assert violations(make_tree(tmp_path, tree)) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("stream/batches.py", "from sae_lightning.training.head import Head"),  # upwards
        ("stream/batches.py", "from sae_lightning.sae import SAE"),
        ("llm/load.py", "from sae_lightning.sae.losses import mse"),
        ("llm/load.py", "from sae_lightning.scoring import metrics"),
        ("training/head.py", "from sae_lightning.analysis import evaluate"),
        ("runs/run.py", "from sae_lightning.analysis import evaluate"),
        ("report/page.py", "from sae_lightning.formats.load_sae import load_sae"),  # one row
        ("analysis/lens.py", "import lightning"),
        ("analysis/lens.py", "from transformers import AutoModel"),
        ("analysis/lens.py", "from omegaconf import OmegaConf"),
        ("llm/load.py", "from sae_lightning.formats.load_sae import load_sae"),
        ("runs/config.py", "import lightning as L"),
        ("training/settings.py", "import lightning as L"),
        ("training/head.py", "from omegaconf import DictConfig"),
        ("sae/relu.py", "import numpy as np"),
        ("sae/relu.py", "import triton"),
        ("sae/relu.py", "from sae_lightning.terminal import console"),
        ("sae/losses.py", "import safetensors"),
        ("training/callbacks/a.py", "from sae_lightning.training.callbacks.b import B"),
        ("training/callbacks/a.py", "from sae_lightning.training.callbacks import b"),
        ("utils.py", ""),  # a file without a place in the table
    ],
)
def test_a_planted_violation_is_found(tmp_path, path, line):
    inside = "\n".join(["def later():", f"    {line}", "    pass"])
    others = ["training/head.py", "training/callbacks/b.py", "scoring/metrics.py"]
    others += ["analysis/evaluate.py"]
    tree = {f"sae_lightning/{other}": "" for other in others}
    for text in (line, inside):
        found = violations(make_tree(tmp_path, tree | {f"sae_lightning/{path}": text}))
        assert len(found) == 1, found
        assert found[0].startswith(f"sae_lightning.{path.removesuffix('.py').replace('/', '.')}")


@pytest.mark.slow
def test_reading_a_config_or_an_sae_imports_neither_lightning_nor_transformers():
    code = (
        "import sys, sae_lightning.runs.cli, sae_lightning.runs.config, sae_lightning\n"
        "print(sorted({'lightning', 'pytorch_lightning', 'transformers', 'datasets'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
