"""The part of `interop.py` that runs in a tool's environment; it imports nothing of ours.

A tool is a module `interop_<tool>` with

    PACKAGE        its name on PyPI
    load(folder)   opens a folder with the tool's loader: a function of activations x [n, d] that
                   returns the reconstruction [n, d_out] and the features [n, F]
    make(root)     writes a folder in `root` for each SAE that the tool can save, and yields the
                   folder's name and the saved SAE as a function like that of `load`
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[Tensor], tuple[Tensor, Tensor]]  # a function like that of `load`


@torch.no_grad()
def exchange(tool: str, ours: dict[str, str], theirs: str, inputs: str) -> dict[str, Any]:
    """Open the folders `ours`, and have the tool write its own SAEs to the folder `theirs`. The
    outputs of each SAE on the activations in the file `inputs` are saved beside its folder.

    Returns the tool's version (`version`), name -> error in one line, or "", of each of our SAEs
    (`errors`), and the names of the tool's SAEs (`names`).
    """
    peer, x = importlib.import_module(f"peers.interop_{tool}"), torch.load(inputs)
    errors, names = {}, []
    for name, folder in ours.items():
        try:
            torch.save(tuple(peer.load(Path(folder))(x)), f"{folder}.pt")
            errors[name] = ""
        except Exception as error:  # a refusal is a result
            lines = str(error).strip().splitlines() or [""]
            errors[name] = f"{type(error).__name__}: {lines[0]}"
    torch.manual_seed(0)
    for name, run in peer.make(Path(theirs)):
        torch.save(tuple(run(x)), Path(theirs, f"{name}.pt"))
        names.append(name)
    version = importlib.metadata.version(peer.PACKAGE)
    return {"version": version, "errors": errors, "names": names}


def make_run(sae: Any) -> Run:
    """The SAE as a function x [n, d] -> reconstruction [n, d_out], features [n, F]."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        features = sae.encode(x)
        return sae.decode(features), features

    return run


def shake(sae: torch.nn.Module) -> torch.nn.Module:
    """Add noise to all parameters, biases included, as if the SAE had been trained."""
    for parameter in sae.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    return sae
