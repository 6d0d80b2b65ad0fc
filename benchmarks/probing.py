"""Do k-sparse probes here and in the package sae-probes give the same scores?

    python benchmarks/probing.py run=outputs/<day>/<time>
    python benchmarks/probing.py run=... sets=96_spam_is,105_click_bait folder=/tmp/tools

Both get the LLM's activations at the last token of all texts of a set, the same split into training
and test texts, and the SAE of the run, which sae-probes opens with SAELens. The package is
installed in an environment of its own, which stays in `folder` (~/.cache/sae_lightning/interop).
The table goes to `out` (outputs/probing).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import run_command
from peers.environment import make_environment
from pyarrow import csv
from timing.child import call
from torch import Tensor

from sae_lightning.analysis.benchmarks.last_tokens import read_last_tokens
from sae_lightning.analysis.benchmarks.probing_scores import SIZES
from sae_lightning.analysis.benchmarks.sparse_probes import (
    TextSplit,
    choose_units,
    encode_sparse,
    score_all,
    score_sparse,
)
from sae_lightning.analysis.subject import open_run
from sae_lightning.errors import UserError
from sae_lightning.sae import SAE
from sae_lightning.terminal import console, phase

PACKAGES = ("--no-deps", "xgboost-cpu==3.2.0", "zstandard==0.25.0", "sae-probes==0.4.2")
OPTIONS = ("run", "sets", "folder", "out")
SETS = (
    "96_spam_is,105_click_bait,119_us_state_TX,125_world_country_Italy,154_athlete_sport_football"
)
CONTEXT = 1024  # tokens of a text that the LLM reads: BOS and the last 1,023


def main(command_line: list[str]) -> None:
    """Score each set in both, and print the differences."""
    options = dict(argument.split("=", 1) for argument in command_line if "=" in argument)
    if stray := [a for a in command_line if a.partition("=")[0] not in OPTIONS or "=" not in a]:
        raise UserError(f"{stray[0]}: unknown; give {'=, '.join(OPTIONS)}=")
    if "run" not in options:
        raise UserError("run is missing: give a run folder, as run=outputs/<day>/<time>")
    sets = options.get("sets", SETS).split(",")
    cache = Path(options.get("folder", Path.home() / ".cache" / "sae_lightning" / "interop"))
    out = Path(options.get("out", "outputs/probing")).absolute()
    (out / "cache" / "model_activations_llm").mkdir(parents=True, exist_ok=True)
    with phase("sae-probes: environment"):
        python = make_environment(cache.absolute(), PACKAGES, out)
    peer = "peers.probing_sae_probes"
    listed = call(f"{peer}:list_texts", {"sets": sets}, out / "texts.log", python)
    subject, _ = open_run(options["run"])
    activations = {}
    for name in sets:
        parsing = csv.ParseOptions(newlines_in_values=True)
        table = csv.read_csv(f"{listed['folder']}/{name}.csv.zst", parse_options=parsing)
        texts = [str(text) for text in table["prompt"].to_pylist()]
        activations[name] = read_last_tokens(subject, texts, CONTEXT)
        # where the package looks for activations of the model `llm` at the hook `site`
        torch.save(activations[name], out / "cache" / "model_activations_llm" / f"{name}_site.pt")
    with phase("sae-probes: probes"):
        settings = {"sae": str(subject.folder / "sae"), "activations": str(out / "cache")}
        settings |= {"sets": sets, "out": str(out), "sizes": SIZES}
        scores = call(f"{peer}:score", settings, out / "score.log", python)
    lines, differences = ["| set | k | here | sae-probes |", "|---|---|---|---|"], []
    for name in sets:
        texts, x = listed["splits"][name], activations[name]
        for k, (here, there) in score_set(name, subject.sae, x, texts, scores[name]).items():
            lines.append(f"| {name} | {k} | {here:.4f} | {there:.4f} |")
            differences.append(abs(here - there))
    lines.append(f"\nmax difference {max(differences):.4f}, mean {np.mean(differences):.4f}")
    (out / "probing.md").write_text("\n".join(lines), "utf8")
    console.print("\n".join(lines))


def score_set(
    name: str, sae: SAE, x: Tensor, texts: dict[str, Any], package_scores: dict[str, Any]
) -> dict[str, tuple[float, float]]:
    """k, or "dense", -> AUROC of the probe here and of the package's, on a set whose texts have the
    activations x [texts, d]."""
    labels = np.array(texts["labels"])
    split = TextSplit(*map(np.array, texts["split"]))
    features = encode_sparse(sae, x)
    units = choose_units(features[split.train], labels[split.train], max(SIZES))
    shared = len({*units.tolist()} & {*package_scores["units"]})
    console.print(f"{name}: {shared} of the {max(SIZES)} chosen units are the same")
    here = dict(zip(SIZES, score_sparse(features, labels, split, SIZES), strict=True))
    pairs = {str(k): (here[k], package_scores["auroc"][str(k)]) for k in SIZES}
    return pairs | {"dense": (score_all(x.numpy(), labels, split), package_scores["dense"])}


if __name__ == "__main__":
    run_command(main)
