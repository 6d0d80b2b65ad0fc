"""The two sparse products of training on CUDA, as Triton kernels that add up in float32.

Shapes: row r owns the entries offsets[r] to offsets[r + 1] of `indices` [nnz]; d = width of a row
of a table. Lengths of rows differ by orders of magnitude (a feature that fires on every token, one
that never does), so a row is cut at every multiple of PIECE, and a program works on one piece:

    entry     0   1   2   3 | 4   5   6   7 | 8   9      cuts at 4 and 8, if PIECE were 4
    row       a   b   b   b   b   b   b   b   b   c
    head      a   b . . . .                       c      the first piece of every row
    tail                      b . . . . . .   b          what begins at a cut inside a row

That makes rows + nnz // PIECE programs, a number that follows from shapes: nothing waits for the
device. Sums are made in the same order each time: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A piece of 256 entries keeps one program busy for some ten microseconds, and what its sum costs to
# store and to add again is about 3 % of what it reads.
PIECE = 256
# A tile of 16 x 256 values is 32 a thread with 4 warps: 16 rows are on their way from memory at
# once, and there are registers for enough programs on each multiprocessor. 256 divides 768 and 2304
# and wastes a quarter of 576; of bf16 it is 512 bytes, four whole lines of the cache.
ENTRIES = 16
COLUMNS = 256


def weighted_sums(offsets: Tensor, indices: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """[rows, d]: the sum of weights [nnz] times rows `indices` of the table [n, d], row by row."""
    assert all(part.is_contiguous() for part in (offsets, indices, weights, table))
    rows, d = len(offsets) - 1, table.shape[1]
    owners = _owners(offsets, len(indices))
    cuts = len(owners)
    sums = table.new_empty(rows, d, dtype=torch.float32)
    tails = table.new_empty(cuts, d, dtype=torch.float32)
    columns = _columns(d)
    # Programs are started along the first axis: all of them read one stripe of the table at a time,
    # and a stripe of 256 columns of bf16 fits the L2 cache up to some 90,000 rows.
    stripes = triton.cdiv(d, columns)
    tile = {"PIECE": PIECE, "ENTRIES": ENTRIES, "COLUMNS": columns}
    _sum_pieces[rows + cuts, stripes](
        offsets, owners, indices, weights, table, sums, tails, d, cuts, **tile
    )
    if cuts:
        _add_tails[cuts, stripes](offsets, owners, tails, sums, d, **tile)
    return sums


def dots(offsets: Tensor, indices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """[nnz]: for each entry of row r, left [rows, d] at r times right [n, d] at its index."""
    assert all(part.is_contiguous() for part in (offsets, indices, left, right))
    rows, d = left.shape
    owners = _owners(offsets, len(indices))
    cuts = len(owners)
    products = left.new_empty(len(indices), dtype=torch.float32)
    tile = {"PIECE": PIECE, "ENTRIES": ENTRIES, "COLUMNS": _columns(d)}
    _dot_pieces[rows + cuts,](offsets, owners, indices, left, right, products, d, cuts, **tile)
    return products


def _columns(d: int) -> int:
    """Columns of a tile: a power of two."""
    return min(COLUMNS, triton.next_power_of_2(d))


def _owners(offsets: Tensor, nnz: int) -> Tensor:
    """[cuts]: the row that each cut is in: at PIECE, 2 PIECE and so on up to nnz."""
    cuts = torch.arange(1, nnz // PIECE + 1, device=offsets.device, dtype=offsets.dtype) * PIECE
    # The first row that ends at or after it: between two rows that is not the one that begins
    # there, and so the tail is empty.
    return torch.searchsorted(offsets[1:], cuts)


@triton.jit
def _piece(offsets, owners, cuts, PIECE: tl.constexpr):
    """This program's piece: its row, its first entry and the one after its last, and if it is a
    tail. Tails are first, since the longest work should not be the last to start."""
    program = tl.program_id(0).to(tl.int64)
    tail = program < cuts
    row = tl.where(tail, tl.load(owners + program, mask=tail, other=0), program - cuts)
    begin = tl.where(tail, (program + 1) * PIECE, tl.load(offsets + row).to(tl.int64))
    end = tl.minimum(tl.load(offsets + row + 1).to(tl.int64), (begin // PIECE + 1) * PIECE)
    return row, begin, end, tail


# `cuts` is another number in each step: no kernel of its own for multiples of 16.
@triton.jit(do_not_specialize=["cuts"])
def _sum_pieces(
    offsets, owners, indices, weights, table, sums, tails, d, cuts,
    PIECE: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Heads to `sums` [rows, d], tails to `tails` [cuts, d]."""
    row, begin, end, tail = _piece(offsets, owners, cuts, PIECE)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = column < d
    total = tl.full([ENTRIES, COLUMNS], 0.0, tl.float32)
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        there = entry < end
        # 64 bits: a table may have more than 2^31 values
        index = tl.load(indices + entry, mask=there, other=0).to(tl.int64)
        weight = tl.load(weights + entry, mask=there, other=0).to(tl.float32)
        places = table + index[:, None] * d + column[None, :]
        values = tl.load(places, mask=there[:, None] & within[None, :], other=0)
        total += weight[:, None] * values.to(tl.float32)
    result = tl.sum(total, axis=0)
    tl.store(sums + row * d + column, result, mask=within & (not tail))
    tl.store(tails + tl.program_id(0).to(tl.int64) * d + column, result, mask=within & tail)


@triton.jit
def _add_tails(
    offsets, owners, tails, sums, d,
    PIECE: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add to each row its tails: the program of its first cut does so for all of them."""
    cut = tl.program_id(0)
    row = tl.load(owners + cut)
    begin = tl.load(offsets + row).to(tl.int64) // PIECE
    if cut == begin:
        end = (tl.load(offsets + row + 1).to(tl.int64) - 1) // PIECE
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        within = column < d
        total = tl.full([ENTRIES, COLUMNS], 0.0, tl.float32)
        for first in range(begin, end, ENTRIES):
            entry = first + tl.arange(0, ENTRIES)
            places = tails + entry[:, None] * d + column[None, :]
            total += tl.load(places, mask=(entry < end)[:, None] & within[None, :], other=0)
        head = sums + row * d + column
        result = tl.load(head, mask=within) + tl.sum(total, axis=0)
        tl.store(head, result, mask=within)


@triton.jit(do_not_specialize=["cuts"])
def _dot_pieces(
    offsets, owners, indices, left, right, products, d, cuts,
    PIECE: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The products of one piece; its row of `left` is read from memory once."""
    row, begin, end, _ = _piece(offsets, owners, cuts, PIECE)
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        there = entry < end
        index = tl.load(indices + entry, mask=there, other=0).to(tl.int64)
        total = tl.full([ENTRIES, COLUMNS], 0.0, tl.float32)
        for start in range(0, d, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            within = column < d
            x = tl.load(left + row * d + column, mask=within, other=0).to(tl.float32)
            places = right + index[:, None] * d + column[None, :]
            y = tl.load(places, mask=there[:, None] & within[None, :], other=0)
            total += x[None, :] * y.to(tl.float32)
        tl.store(products + entry, tl.sum(total, axis=1), mask=there)
