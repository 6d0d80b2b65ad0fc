"""The two products with a sparse matrix of which sparse training is made, and where they pay.

A sparse matrix [rows, n] is in CSR format: row r has the entries offsets[r] to offsets[r + 1], and
entry i is in column indices[i]. Shapes: offsets [rows + 1], indices and weights [n entries].
"""

import importlib.util
import warnings
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

MANY = 0.02  # density above which a CPU is faster with dots picked from a dense product
PART = 256  # rows of that product that are in memory at a time


def worth_it(device: str, dtype: torch.dtype) -> float:
    """The density below which these products beat dense ones in `dtype` on a kind of device; 0
    where there are none. Measured by `benchmarks/sparse.py` on two cores and on an H200."""
    if not has_sparse_products(device):
        return 0.0
    if device == "cpu":
        return 0.12 if dtype is torch.float32 else 0.08
    return 0.06 if dtype is torch.float32 else 0.003


@cache  # asked at every update
def has_sparse_products(device: str) -> bool:
    """Whether a kind of device has these products; CUDA needs Triton, which torch has on Linux."""
    return device == "cpu" or (device == "cuda" and bool(importlib.util.find_spec("triton")))


def weighted_sums(offsets: Tensor, indices: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """[rows, d]: row r is the sum over its entries i of weights[i] table[indices[i]], for a table
    [n, d]."""
    if table.is_cuda:
        from sae_lightning.sae import triton_products

        return triton_products.weighted_sums(offsets, indices, weights, table)
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
    if left.is_cuda:
        from sae_lightning.sae import triton_products

        return triton_products.dots(offsets, indices, left, right)
    if left.dtype is not torch.float32 and len(indices) > MANY * len(left) * len(right):
        return _dots_of_all(offsets, indices, left, right)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        where = torch.sparse_csr_tensor(
            offsets,
            indices,
            torch.zeros(len(indices)),
            (len(left), len(right)),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(where, left.float(), right.float().T, beta=0.0).values()


def _dots_of_all(offsets: Tensor, indices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`dots`, picked from the dense product."""
    picked, starts = [], offsets[:-1:PART].tolist()
    ends = [*starts[1:], len(indices)]
    rows = torch.repeat_interleave(torch.arange(len(left)), offsets.diff())
    places = rows % PART * len(right) + indices
    for part, start, end in zip(left.split(PART), starts, ends, strict=True):
        picked.append((part @ right.T).view(-1).index_select(0, places[start:end]))
    return torch.cat(picked).float()
