"""`data.max_norm`: which activations are far longer than usual, in training and evaluation."""

import torch
from torch import Tensor

from sae_lightning.llm.sites import Site


def medians(rows: dict[Site, Tensor]) -> dict[Site, float]:
    """The median norm of the rows {site: [n, d]} at each site."""
    return {site: _norms(x).median().item() for site, x in rows.items()}


def not_large(rows: dict[Site, Tensor], medians: dict[Site, float], max_norm: float) -> Tensor:
    """Whether a row of {site: [n, d]} is at most max_norm x median at every site -> [n] bool.

    A row that is too large at one site is dropped at all of them, so that rows stay aligned.
    """
    usual = [_norms(x) <= max_norm * medians[site] for site, x in rows.items()]
    return torch.stack(usual).all(dim=0)


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
