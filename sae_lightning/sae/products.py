"""The two sparse matrix products of sparse training, and the density below which they are faster
than dense ones.

A sparse matrix [rows, columns] is in CSR format: row r holds the entries offsets[r] to
offsets[r + 1] - 1, and entry i is in column indices[i], with the value weights[i]. Shapes: offsets
[rows + 1], indices and weights [n entries].
"""

import importlib.util
import warnings
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# Above this density, `dots` on a CPU computes the whole dense product and picks the entries from
# it, unless the dtype is float32.
DENSE_PRODUCT_DENSITY = 0.02
DENSE_PRODUCT_ROWS = 256  # rows of that product in memory at a time


def break_even_density(device: str, dtype: torch.dtype) -> float:
    """The density below which sparse products are faster than dense ones in `dtype` on this type of
    device; 0 if the device has no sparse products. Measured by `benchmarks/sparse.py` on two cores
    and on an H200."""
    if not has_sparse_products(device):
        return 0.0
    if device == "cpu":
        return 0.12 if dtype is torch.float32 else 0.08
    return 0.06 if dtype is torch.float32 else 0.003


@cache  # called at every update
def has_sparse_products(device: str) -> bool:
    """Whether this type of device has sparse products; CUDA needs Triton."""
    return device == "cpu" or (device == "cuda" and bool(importlib.util.find_spec("triton")))


def weighted_sums(offsets: Tensor, indices: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """The sparse matrix times a table [columns, d]: row r of the result [rows, d] is the sum over
    its entries i of weights[i] * table[indices[i]]."""
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
    """[n entries]: for entry i of row r, the dot product of left[r] and right[indices[i]], given
    left [rows, d] and right [columns, d]."""
    if left.is_cuda:
        from sae_lightning.sae import triton_products

        return triton_products.dots(offsets, indices, left, right)
    is_dense = len(indices) > DENSE_PRODUCT_DENSITY * len(left) * len(right)
    if is_dense and left.dtype is not torch.float32:
        return _pick_dots_from_dense(offsets, indices, left, right)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            offsets,
            indices,
            torch.zeros(len(indices)),
            (len(left), len(right)),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(pattern, left.float(), right.float().T, beta=0.0).values()


def _pick_dots_from_dense(offsets: Tensor, indices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`dots`, picked from the dense product [rows, columns], DENSE_PRODUCT_ROWS rows at a time."""
    chunks = left.split(DENSE_PRODUCT_ROWS)
    starts = offsets[:-1:DENSE_PRODUCT_ROWS].tolist()  # first entry of each chunk
    ends = [*starts[1:], len(indices)]
    rows = torch.repeat_interleave(torch.arange(len(left)), offsets.diff())
    flat_indices = (rows % DENSE_PRODUCT_ROWS) * len(right) + indices  # within the chunk
    products = [
        (chunk @ right.T).view(-1).index_select(0, flat_indices[start:end])
        for chunk, start, end in zip(chunks, starts, ends, strict=True)
    ]
    return torch.cat(products).float()
