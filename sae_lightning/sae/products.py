"""The two products with a sparse matrix that training an SAE is made of, and where they pay.

A sparse matrix [rows, n] is its entries in the order of its rows: those of row r are the entries
from offsets[r] to offsets[r + 1], and entry i stands in column indices[i].
"""

import warnings
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def worth_it(device: str, dtype: torch.dtype) -> float:
    """The density below which these products beat dense ones in `dtype` on a kind of device.

    Measured on CPUs (`benchmarks/sparse.py`). On CUDA it is a guess, and elsewhere they are not to
    be had.
    """
    if device == "cpu":
        return 0.12 if dtype is torch.float32 else 0.04
    return 0.02 if device == "cuda" else 0.0


def weighted_sums(offsets: Tensor, indices: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """[rows, d]: row r is the sum over its entries i of weights[i] table[indices[i]].

    offsets [rows + 1], indices [n entries], weights [n entries], table [n, d].
    """
    if kernels := _kernels(table):
        return kernels.weighted_sums(offsets, indices, weights, table)
    return embedding_bag(
        indices,
        table,
        offsets,
        mode="sum",
        per_sample_weights=weights.to(table.dtype),
        include_last_offset=True,
    ).float()


def dots(offsets: Tensor, indices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """[n entries]: entry i of row r is left[r] . right[indices[i]], for [rows, d] and [n, d]."""
    if kernels := _kernels(left):
        return kernels.dots(offsets, indices, left, right)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        where = torch.sparse_csr_tensor(
            offsets,
            indices,
            left.new_zeros(len(indices)),
            (len(left), len(right)),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(where, left, right.T, beta=0.0).values()


def _kernels(tensor: Tensor) -> ModuleType | None:
    """The kernels for tensors on CUDA; None where Triton is not to be had (Windows) or needed."""
    if not tensor.is_cuda:
        return None
    try:
        from sae_lightning.sae import triton_products
    except ImportError:
        return None
    return triton_products
