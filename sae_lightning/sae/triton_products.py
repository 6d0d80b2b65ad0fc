"""The two products of `products.py` on CUDA: Triton kernels that accumulate in float32.

Lengths of rows differ by orders of magnitude (a feature that fires on every token, one that never
does), so entries are cut at multiples of PIECE_ENTRIES, and a program works on one piece of a row:

    entry     0   1   2   3 | 4   5   6   7 | 8   9      cuts at 4 and 8, if PIECE_ENTRIES is 4
    row       a   b   b   b   b   b   b   b   b   c
    first     a   b . . . .                       c      the first piece of every row
    tail                      b . . . . . .   b          pieces that begin at a cut inside a row

That makes rows + nnz // PIECE_ENTRIES programs, a number known from the shapes, without waiting for
the device. There are no atomics, so sums are reproducible.

Shapes: nnz entries, d columns of a table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program takes about ten microseconds for 256 entries; storing a tail and adding it to its row
# costs about 3 % of the memory traffic of the program.
PIECE_ENTRIES = 256
# With 4 warps a tile of 16 x 256 values is 32 values a thread: 16 rows are loaded at once, and
# there are registers for enough programs on each multiprocessor. 256 divides the widths of GPT-2
# and Gemma 2 (768, 2304); 256 values of bf16 are 512 bytes, four cache lines.
TILE_ENTRIES = 16
TILE_COLUMNS = 256


def weighted_sums(offsets: Tensor, indices: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """[rows, d]: row r is the sum over its entries i of weights[i] * table[indices[i]]."""
    assert all(part.is_contiguous() for part in (offsets, indices, weights, table))
    rows, d = len(offsets) - 1, table.shape[1]
    cut_rows = _find_cut_rows(offsets, len(indices))
    cuts = len(cut_rows)
    sums = table.new_empty(rows, d, dtype=torch.float32)
    tails = table.new_empty(cuts, d, dtype=torch.float32)
    columns = _pick_tile_columns(d)
    # Programs are launched along the first axis first, so that all read one stripe of the table:
    # 256 columns of bf16 fit into the L2 cache for up to some 90,000 rows.
    stripes = triton.cdiv(d, columns)
    tile = {"PIECE": PIECE_ENTRIES, "ENTRIES": TILE_ENTRIES, "COLUMNS": columns}
    _sum_pieces[rows + cuts, stripes](
        offsets, cut_rows, indices, weights, table, sums, tails, d, cuts, **tile
    )
    if cuts:
        _add_tails[cuts, stripes](offsets, cut_rows, tails, sums, d, **tile)
    return sums


def dots(offsets: Tensor, indices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """[nnz]: for entry i of row r, the dot product of left[r] and right[indices[i]], with left
    [rows, d] and right [columns, d]."""
    assert all(part.is_contiguous() for part in (offsets, indices, left, right))
    rows, d = left.shape
    cut_rows = _find_cut_rows(offsets, len(indices))
    cuts = len(cut_rows)
    products = left.new_empty(len(indices), dtype=torch.float32)
    tile = {"PIECE": PIECE_ENTRIES, "ENTRIES": TILE_ENTRIES, "COLUMNS": _pick_tile_columns(d)}
    _dot_pieces[rows + cuts,](offsets, cut_rows, indices, left, right, products, d, cuts, **tile)
    return products


def _pick_tile_columns(d: int) -> int:
    """Columns of a tile for a table of d columns, a power of 2."""
    return min(TILE_COLUMNS, triton.next_power_of_2(d))


def _find_cut_rows(offsets: Tensor, nnz: int) -> Tensor:
    """[cuts]: the row of each cut, at multiples of PIECE_ENTRIES up to nnz."""
    count = nnz // PIECE_ENTRIES
    cuts = torch.arange(1, count + 1, device=offsets.device, dtype=offsets.dtype) * PIECE_ENTRIES
    # the first row that ends at or after the cut; the tail of a cut between two rows is empty
    return torch.searchsorted(offsets[1:], cuts)


@triton.jit
def _find_piece(offsets, cut_rows, cuts, PIECE: tl.constexpr):
    """This program's piece: its row, first entry, end (exclusive), and whether it is a tail.
    Tails come first, since most are longer than first pieces."""
    program = tl.program_id(0).to(tl.int64)
    is_tail = program < cuts
    row = tl.where(is_tail, tl.load(cut_rows + program, mask=is_tail, other=0), program - cuts)
    begin = tl.where(is_tail, (program + 1) * PIECE, tl.load(offsets + row).to(tl.int64))
    next_cut = (begin // PIECE + 1) * PIECE
    end = tl.minimum(tl.load(offsets + row + 1).to(tl.int64), next_cut)
    return row, begin, end, is_tail


# `cuts` changes at each step: Triton must not compile a second kernel for multiples of 16
@triton.jit(do_not_specialize=["cuts"])
def _sum_pieces(
    offsets, cut_rows, indices, weights, table, sums, tails, d, cuts,
    PIECE: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store the sums of first pieces in `sums` [rows, d], those of tails in `tails` [cuts, d]."""
    row, begin, end, is_tail = _find_piece(offsets, cut_rows, cuts, PIECE)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = column < d
    total = tl.full([ENTRIES, COLUMNS], 0.0, tl.float32)
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        valid = entry < end
        # 64 bits: a table may have more than 2^31 values
        index = tl.load(indices + entry, mask=valid, other=0).to(tl.int64)
        weight = tl.load(weights + entry, mask=valid, other=0).to(tl.float32)
        pointers = table + index[:, None] * d + column[None, :]
        values = tl.load(pointers, mask=valid[:, None] & within[None, :], other=0)
        total += weight[:, None] * values.to(tl.float32)
    result = tl.sum(total, axis=0)
    tl.store(sums + row * d + column, result, mask=within & (not is_tail))
    tl.store(tails + tl.program_id(0).to(tl.int64) * d + column, result, mask=within & is_tail)


@triton.jit
def _add_tails(
    offsets, cut_rows, tails, sums, d,
    PIECE: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the tails of a row to its sum, in the program of the row's first cut."""
    cut = tl.program_id(0)  # number of the cut at entry (cut + 1) * PIECE, and of its tail
    row = tl.load(cut_rows + cut)
    first_cut = tl.load(offsets + row).to(tl.int64) // PIECE  # the first one after the row's start
    if cut == first_cut:
        # the cuts first_cut, ..., end_cut - 1 lie inside this row
        end_cut = (tl.load(offsets + row + 1).to(tl.int64) - 1) // PIECE
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        within = column < d
        total = tl.full([ENTRIES, COLUMNS], 0.0, tl.float32)
        for first in range(first_cut, end_cut, ENTRIES):
            tail = first + tl.arange(0, ENTRIES)
            pointers = tails + tail[:, None] * d + column[None, :]
            total += tl.load(pointers, mask=(tail < end_cut)[:, None] & within[None, :], other=0)
        row_sum = sums + row * d + column  # pointers to the row's sum
        result = tl.load(row_sum, mask=within) + tl.sum(total, axis=0)
        tl.store(row_sum, result, mask=within)


@triton.jit(do_not_specialize=["cuts"])
def _dot_pieces(
    offsets, cut_rows, indices, left, right, products, d, cuts,
    PIECE: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store the dot products of one piece's entries in `products` [nnz]."""
    row, begin, end, _ = _find_piece(offsets, cut_rows, cuts, PIECE)
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        valid = entry < end
        index = tl.load(indices + entry, mask=valid, other=0).to(tl.int64)
        total = tl.full([ENTRIES, COLUMNS], 0.0, tl.float32)
        for start in range(0, d, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            within = column < d
            x = tl.load(left + row * d + column, mask=within, other=0).to(tl.float32)
            pointers = right + index[:, None] * d + column[None, :]
            y = tl.load(pointers, mask=valid[:, None] & within[None, :], other=0)
            total += x[None, :] * y.to(tl.float32)
        tl.store(products + entry, tl.sum(total, axis=1), mask=valid)
