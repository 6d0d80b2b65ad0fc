"""Exact training on the few features that are active.

The gradient of an SAE is exactly 0 wherever a feature is off. So only the encoder is computed
densely, part of the batch by part; of [batch, features] only the entries that can fire are kept,
and decoder and backward pass are products with them.

    x W_enc -> which entries? -> Entries -> activate -> x_hat
    dense      (choose)          [n entries]           weighted_sums over tokens
                                   ^                      | gradient [batch, d]
    W_enc.grad <-- weighted_sums --+------- dots <--------+--> weighted_sums --> W_dec.grad
                   over features                               over features

Shapes: n entries = (token, feature) pairs, in the order of tokens, then of features.
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lightning.sae.products import dots, weighted_sums

PART = {"cpu": 1 << 22, "other": 1 << 29}
"""Pre-activations that are computed at a time: as many as stay in a CPU's cache."""


class Pattern:
    """Which entries of [rows, columns] there are, in CSR order."""

    def __init__(self, places: Tensor, rows: int, columns: int, loose: bool = False):
        """`places` [n entries] int64: row x columns + column, ascending; `loose`: values of many
        are 0, which matter to thresholds alone."""
        self.places, self.shape, self.loose = places, (rows, columns), loose
        self.rows = places // columns
        self.columns = places - self.rows * columns
        ends = torch.arange(rows + 1, device=places.device) * columns
        self.offsets = torch.searchsorted(places, ends)

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def _by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers [n entries] of the entries in the order of columns, where each column begins
        [columns + 1], and their rows [n entries]."""
        columns = self.shape[1]
        # a sort by fewer bits takes fewer passes
        keys = self.columns.to(torch.int16 if columns < 1 << 15 else torch.int32)
        keys, order = torch.sort(keys, stable=True)
        starts = torch.arange(columns + 1, device=keys.device, dtype=keys.dtype)
        return order, torch.searchsorted(keys, starts), self.rows.index_select(0, order)

    def weighted_columns(self, weights: Tensor, table: Tensor) -> Tensor:
        """[columns, d]: for each column the sum of weights [n entries] x the rows of table [rows,
        d] in which it has an entry."""
        order, offsets, rows = self._by_column
        return weighted_sums(offsets, rows, weights.index_select(0, order), table)

    def column_sums(self, values: Tensor) -> Tensor:
        """[columns]: for each column the sum of the values [n entries] in it, in a fixed order."""
        if values.is_cuda:
            ones = values.new_ones(self.shape[0], 1)
            return self.weighted_columns(values, ones).squeeze(1)
        return values.new_zeros(self.shape[1]).index_add_(0, self.columns, values)

    def narrowed(self, values: Tensor) -> tuple["Pattern", Tensor]:
        """The entries whose values [n entries] are not 0, as far as it pays to leave others out."""
        if not self.loose:
            return self, values
        chosen = values.nonzero().squeeze(1)
        return Pattern(self.places[chosen], *self.shape), values[chosen]

    def split(self, sizes: list[int]) -> "Pattern":
        """[rows, columns] as [rows x groups, columns]: entries of row r in the g-th group of
        columns stand in row r x groups + g. Their order stays."""
        ends = torch.tensor(sizes, device=self.places.device).cumsum(0)
        group = torch.searchsorted(ends, self.columns, right=True)
        rows, columns = self.shape
        lines = self.rows * len(sizes) + group
        return Pattern(lines * columns + self.columns, rows * len(sizes), columns, self.loose)


class Entries(NamedTuple):
    """The entries of a [batch, features] tensor that are not known to be 0."""

    values: Tensor
    """[n entries], with gradient"""
    pattern: Pattern

    def of(self, vector: Tensor) -> Tensor:
        """[n entries]: what a [features] vector has for the feature of each."""
        return _Of.apply(vector, self.pattern)

    def count(self) -> Tensor:
        """[features]: on how many tokens each is above 0."""
        return self.pattern.column_sums((self.values > 0).float())


def working_type(x: Tensor) -> torch.dtype:
    """What matrix products of `x` are computed in: bf16 within autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@torch.no_grad()
def find(
    x: Tensor, W_enc: Tensor, shift: Tensor, choose: Callable[[Tensor], Tensor]
) -> tuple[Pattern, Tensor]:
    """The entries that `choose` picks of x W_enc + shift, and their values [n entries].

    x [batch, d_in], W_enc [d_in, features], shift [features]; `choose` gives the places in a part
    [rows, features] of it, ascending. It is computed in autocast's type, but summed and shifted in
    float32 before it is rounded, and never there as a whole.
    """
    dtype, features = working_type(x), W_enc.shape[1]
    rows = max(1, PART["cpu" if x.device.type == "cpu" else "other"] // features)
    near = shift.to(dtype)
    higher = torch.nextafter(near, torch.full_like(near, torch.inf))
    near = torch.where(near < shift, higher, near)  # so that nothing that is positive is missed
    weights, places, values = W_enc.to(dtype), [], []
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, len(x), rows):
            product = torch.addmm(near, x[start : start + rows].to(dtype), weights)
            chosen = choose(product)
            places.append(chosen + start * features)
            values.append(product.view(-1)[chosen])
    pattern = Pattern(torch.cat(places), len(x), features)
    return pattern, torch.cat(values).float() + (shift - near.float())[pattern.columns]


def positive(x: Tensor) -> Tensor:
    """The places in [rows, features] of what is above 0, ascending."""
    lanes = 8 // x.itemsize
    if x.device.type != "cpu" or x.numel() % lanes:
        return above(x, 0)
    # Few are: first find the words of 8 bytes that are not all 0. Half the time.
    words = x.relu().view(-1).view(torch.int64).nonzero().squeeze(1)
    within = above(x.view(-1, lanes).index_select(0, words), 0)
    shift = lanes.bit_length() - 1  # two or four lanes
    return (words.index_select(0, within >> shift) << shift) + (within & (lanes - 1))


def above(x: Tensor, bound: Tensor | float) -> Tensor:
    """The places in x, flattened, of what exceeds its bound, ascending.

    What is no number is among them: passed over, it would never be noticed.
    """
    return (x <= bound).logical_not_().view(-1).nonzero().squeeze(1)


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, pattern: Pattern, pre: Tensor) -> Entries:
    """The pre-activations x W_enc + b_enc at `pattern`, known to be `pre` [n entries]."""
    return Entries(_Encode.apply(x, W_enc, b_enc, pattern, pre), pattern)


def decode(entries: Entries, W_dec: Tensor) -> Tensor:
    """[batch, d_out]: the entries times W_dec [features, d_out]."""
    return _Decode.apply(entries.values, W_dec, entries.pattern)


class _Of(torch.autograd.Function):
    """What a vector has for the columns of a pattern's entries. The gradient of indexing with
    brackets would be summed up in another order each time."""

    @staticmethod
    def forward(ctx, vector: Tensor, pattern: Pattern):
        ctx.pattern = pattern
        return vector.index_select(0, pattern.columns)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.pattern.column_sums(gradient), None


class _Encode(torch.autograd.Function):
    """x W_enc + b_enc at the entries of a pattern; no gradient for x."""

    @staticmethod
    def forward(ctx, x: Tensor, W_enc: Tensor, b_enc: Tensor, pattern: Pattern, pre: Tensor):
        ctx.save_for_backward(x.to(working_type(x)))
        ctx.pattern = pattern
        return pre.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        pattern, gradient = ctx.pattern.narrowed(gradient)
        to_columns = pattern.weighted_columns(gradient, *ctx.saved_tensors)
        return None, to_columns.T, pattern.column_sums(gradient), None, None


class _Decode(torch.autograd.Function):
    """Entries times W_dec."""

    @staticmethod
    def forward(ctx, values: Tensor, W_dec: Tensor, pattern: Pattern):
        live, weights = pattern.narrowed(values)
        rows = W_dec.to(working_type(values))
        ctx.pattern, ctx.live = pattern, live
        ctx.save_for_backward(weights, rows)
        return weighted_sums(live.offsets, live.columns, weights, rows)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (weights, rows), pattern = ctx.saved_tensors, ctx.pattern
        gradient = gradient.to(rows.dtype).contiguous()
        to_values = to_rows = None
        if ctx.needs_input_grad[0]:
            to_values = dots(pattern.offsets, pattern.columns, gradient, rows)
        if ctx.needs_input_grad[1]:
            to_rows = ctx.live.weighted_columns(weights, gradient)
        return to_values, to_rows, None
