"""The CUDA kernels against dense products in float64, in Triton's interpreter where no GPU is."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Generator, Tensor, tensor

pytest.importorskip("triton")

from sae_lightning.sae.triton_products import PIECE_ENTRIES, dots, weighted_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # tests/conftest.py: interpreted on the CPU
BF16 = torch.bfloat16


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed)).to(DEVICE, dtype)


def random_pattern(rows: int, n: int, density: float) -> Tensor:
    """[rows, n], true where there is an entry."""
    return (torch.rand(rows, n, generator=Generator().manual_seed(1)) < density).to(DEVICE)


def compressed(pattern: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets [rows + 1] and indices [nnz] of a pattern [rows, n]."""
    offsets = torch.nn.functional.pad(pattern.sum(dim=1).cumsum(0), (1, 0))
    return offsets, pattern.nonzero()[:, 1].contiguous()


def assert_exact(found: Tensor, expected: Tensor, scale: Tensor) -> None:
    """Within what float32 rounds, of the sum of what was added up without signs; a sum in bf16
    would be a thousand times further off."""
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= 2e-6 * scale).all()


def assert_sums(pattern: Tensor, weights: Tensor, table: Tensor, index_dtype=torch.int64):
    offsets, indices = (part.to(index_dtype) for part in compressed(pattern))
    found = weighted_sums(offsets, indices, weights, table)
    dense = torch.zeros(pattern.shape, dtype=torch.float64, device=DEVICE)
    dense[pattern] = weights.double()
    assert_exact(found, dense @ table.double(), dense.abs() @ table.double().abs())
    assert not found[~pattern.any(dim=1)].any()
    return found


def assert_dots(pattern: Tensor, left: Tensor, right: Tensor, index_dtype=torch.int64):
    offsets, indices = (part.to(index_dtype) for part in compressed(pattern))
    found = dots(offsets, indices, left, right)
    a, b = left.double(), right.double()
    assert_exact(found, (a @ b.T)[pattern], (a.abs() @ b.T.abs())[pattern])
    return found


def assert_both(pattern: Tensor, d: int, dtype: torch.dtype = torch.float32, **how) -> None:
    (rows, n), nnz = pattern.shape, int(pattern.sum())
    assert_sums(pattern, values(nnz, dtype=dtype), values(n, d, dtype=dtype, seed=2), **how)
    assert_dots(pattern, values(rows, d, dtype=dtype), values(n, d, dtype=dtype, seed=2), **how)


def test_three_rows_by_hand():
    offsets, indices = tensor([0, 2, 2, 3], device=DEVICE), tensor([2, 0, 1], device=DEVICE)
    table = tensor([[1.0, 10], [2, 20], [3, 30]], device=DEVICE)
    weights = tensor([5.0, 7, 0.5], device=DEVICE)
    # 5 x (3, 30) + 7 x (1, 10); nothing; 0.5 x (2, 20)
    assert weighted_sums(offsets, indices, weights, table).tolist() == [[22, 220], [0, 0], [1, 10]]
    left = tensor([[1.0, 0], [0, 0], [2, 1]], device=DEVICE)
    # (1, 0).(3, 30), (1, 0).(1, 10), (2, 1).(2, 20)
    assert dots(offsets, indices, left, table).tolist() == [3, 1, 24]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(
    ("rows", "n", "density"), [(20, 600, 0.001), (20, 600, 0.01), (10, 400, 0.1), (3, 600, 1.0)]
)
def test_all_densities_agree_with_the_dense_product(rows, n, density, dtype):
    pattern = random_pattern(rows, n, density)
    if density == 0.001:
        assert not pattern.any(dim=1).all()  # rows without entries too
    assert_both(pattern, 24, dtype)


@pytest.mark.parametrize("d", [1, 37, 300, 576])
def test_any_width_agrees(d):
    assert_both(random_pattern(5, 40, 0.4), d)


def test_a_feature_that_fires_on_every_token_is_cut_and_put_together():
    tokens, features = 3 * PIECE_ENTRIES + 70, 12
    pattern = random_pattern(features, tokens, 0.01)
    pattern[4] = True
    pattern[0] = pattern[7] = pattern[11] = False
    assert_both(pattern, 24)


# lengths of rows: ends and starts of rows at a cut, just before and just after it
@pytest.mark.slow
@pytest.mark.parametrize(
    "lengths",
    [
        [PIECE_ENTRIES],
        [PIECE_ENTRIES + 1],
        [2 * PIECE_ENTRIES],
        [2 * PIECE_ENTRIES, 0, PIECE_ENTRIES, 3],
        [0, PIECE_ENTRIES - 1, 2, 0, 0, PIECE_ENTRIES - 1, 1],
        [1, 2 * PIECE_ENTRIES - 1, 2 * PIECE_ENTRIES + 1],
        [5, 3 * PIECE_ENTRIES, PIECE_ENTRIES, 0],
    ],
)
def test_rows_that_end_around_a_cut_lose_and_repeat_nothing(lengths):
    n = max(lengths)
    pattern = torch.arange(n, device=DEVICE) < tensor(lengths, device=DEVICE)[:, None]
    # sums of ones are counts, exactly
    counts = assert_sums(pattern, values(sum(lengths)) * 0 + 1, values(n, 2) * 0 + 1)
    assert counts[:, 0].tolist() == lengths
    assert_dots(pattern, values(len(lengths), 2), values(n, 2, seed=2))


def test_no_entry_at_all_gives_zeros_and_nothing():
    pattern = random_pattern(3, 5, 0.0)
    assert assert_sums(pattern, values(0), values(5, 24)).tolist() == [[0.0] * 24] * 3
    assert len(assert_dots(pattern, values(3, 24), values(5, 24))) == 0


@pytest.mark.parametrize(("weights", "table"), [(torch.float32, BF16), (BF16, torch.float32)])
def test_the_two_may_differ_in_precision(weights, table):
    pattern = random_pattern(4, 60, 0.3)
    assert_sums(pattern, values(int(pattern.sum()), dtype=weights), values(60, 24, dtype=table))
    assert_dots(pattern, values(4, 24, dtype=weights), values(60, 24, dtype=table))


def test_indices_may_have_32_bits():
    assert_both(random_pattern(3, PIECE_ENTRIES, 0.9), 24, index_dtype=torch.int32)


def test_rows_of_the_table_that_no_entry_names_are_not_touched():
    offsets, indices = tensor([0, 1, 3], device=DEVICE), tensor([1, 1, 2], device=DEVICE)
    table = tensor([[torch.nan], [1.0], [2.0]], device=DEVICE)
    weights = tensor([3.0, 4.0, 5.0], device=DEVICE)
    assert weighted_sums(offsets, indices, weights, table).tolist() == [[3], [14]]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from sae_lightning.sae import triton_products as ours

pointers = {"offsets": "*i64", "cut_rows": "*i64", "indices": "*i64", "sums": "*fp32",
            "tails": "*fp32", "products": "*fp32", "d": "i32", "cuts": "i32"}
SIZES = {"PIECE": ours.PIECE_ENTRIES, "ENTRIES": ours.TILE_ENTRIES, "COLUMNS": ours.TILE_COLUMNS}
for kernel in (ours._sum_pieces, ours._add_tails, ours._dot_pieces):
    for values in ("*fp32", "*bf16"):
        names = kernel.arg_names
        sizes = {name: SIZES[name] for name in names if name.isupper()}
        types = {name: pointers.get(name, values) for name in names}
        types |= dict.fromkeys(sizes, "constexpr")
        source = triton.compiler.ASTSource(kernel, types, sizes)
        assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
print("compiled")
"""


@pytest.mark.slow
def test_the_kernels_compile_for_an_h100_where_none_is(tmp_path):
    kept = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | kept)
    assert done.stdout == "compiled\n", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("d", [576, 768, 2304])
def test_on_a_gpu_real_sizes_agree_bit_for_bit_each_time(d, dtype):
    tokens, features = 2048, 24_576
    # popularity from every token down to 1 in 4,000
    chance = 1 / torch.arange(1, features + 1).clamp(max=4000)
    drawn = torch.rand(tokens, features, generator=Generator().manual_seed(1)) < chance
    pattern = drawn.to(DEVICE)
    x, W_dec = values(tokens, d, dtype=dtype), values(features, d, dtype=dtype, seed=2)
    weights = values(int(pattern.sum()), dtype=dtype)
    for rows, table in ((pattern, W_dec), (pattern.T.contiguous(), x)):
        first = assert_sums(rows, weights, table)
        assert torch.equal(first, assert_sums(rows, weights, table))
    assert torch.equal(assert_dots(pattern, x, W_dec), assert_dots(pattern, x, W_dec))


@pytest.mark.gpu
def test_on_a_gpu_a_table_may_have_more_than_two_billion_values():
    n, d = 3_000_000, 768
    table = torch.zeros(n, d, dtype=BF16, device=DEVICE)
    table[-1] = 1
    offsets, indices = tensor([0, 2], device=DEVICE), tensor([0, n - 1], device=DEVICE)
    assert (weighted_sums(offsets, indices, tensor([1.0, 2.0], device=DEVICE), table) == 2).all()
    ones = torch.ones(1, d, device=DEVICE)
    assert dots(offsets, indices, ones, table).tolist() == [0, d]
