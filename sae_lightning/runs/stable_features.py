"""Measures which share of an SAE's features comes back under another seed."""

import hashlib
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.files import write_json
from sae_lightning.formats.load_sae import load_sae
from sae_lightning.formats.saelens import WEIGHTS
from sae_lightning.report.means import MeansTable
from sae_lightning.report.sweep_table import SweepRun, SweepTable
from sae_lightning.runs.folders import DENSITY_FILE, read_json
from sae_lightning.scoring.stability import count_matches
from sae_lightning.terminal import phase

STABLE_FILE = "stable.json"


def add_stable_features(folder: Path, runs: Sequence[SweepRun]) -> list[SweepRun]:
    """The runs of the sweep in `folder`; those repeated with other seeds get the field `stable`.

    `stable` is the share of a run's features (those that fire on held-out data) that the SAE of
    another seed also has, on average over the other seeds. Only runs with the same `data.seed`,
    which draws the concepts of synthetic data, are compared. `stable.json` caches the shares of
    each pair of SAEs.
    """
    table = SweepTable([*runs])
    groups = [  # folders of finished runs; those of a group differ only in seeds
        [table.runs[i].folder for i in group if table.is_finished[i]]
        for group in MeansTable(table).members
    ]
    groups = [group for group in groups if len(group) > 1]
    hashes = {path: _hash_files(path) for group in groups for path in group}
    groups = [[path for path in group if hashes[path]] for group in groups]  # both files exist
    seeds = {run.folder: run.settings.get("data.seed") for run in runs}
    pairs = [(a, b) for group in groups for a, b in combinations(group, 2) if seeds[a] == seeds[b]]
    cached = _read_shares(folder / STABLE_FILE) if pairs else {}
    keys = {(a, b): f"{hashes[a]} {hashes[b]}" for a, b in pairs}
    new_pairs = [pair for pair in pairs if keys[pair] not in cached]
    if new_pairs:
        with phase("matching the features of seeds", total=len(new_pairs)) as advance:
            for pair in new_pairs:
                cached[keys[pair]] = _measure_shares(*map(_read_live_rows, pair))
                advance(1)
        write_json(folder / STABLE_FILE, {keys[pair]: cached[keys[pair]] for pair in pairs})
    shares: dict[Path, list[float]] = {}
    for pair in pairs:
        for path, share in zip(pair, cached[keys[pair]], strict=True):
            shares.setdefault(path, []).append(share)
    means = {path: sum(values) / len(values) for path, values in shares.items()}
    return [run._replace(stable=means.get(run.folder)) for run in runs]


def _hash_files(folder: Path) -> str | None:
    """Hash of the files that `_read_live_rows` reads in a run folder; None if a file is missing."""
    files = [folder / "sae" / WEIGHTS, folder / DENSITY_FILE]
    if not all(file.is_file() for file in files):
        return None
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _read_live_rows(folder: Path) -> Tensor:
    """Decoder rows [live features, d_out] of the features that fire on held-out data; UserError if
    a file is damaged."""
    try:
        return load_sae(folder).W_dec[load_file(folder / DENSITY_FILE)["density"] > 0]
    except (SafetensorError, KeyError, IndexError) as error:
        raise UserError(f"{folder / DENSITY_FILE} is damaged") from error


def _measure_shares(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Match rows one to one; returns the matched share of `a` and that of `b` (0 without rows)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matched = count_matches(a.to(device), b.to(device))
    return matched / max(len(a), 1), matched / max(len(b), 1)


def _read_shares(path: Path) -> dict[str, tuple[float, float]]:
    """Hashes of the two SAEs of a pair -> their shares; empty if there is no readable file."""
    try:
        return {key: (float(a), float(b)) for key, (a, b) in (read_json(path) or {}).items()}
    except (UserError, AttributeError, TypeError, ValueError):
        return {}
