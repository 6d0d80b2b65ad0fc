"""Exact training on the few features that are active.

The gradient of an SAE is exactly 0 wherever a feature is off. So only the encoder is computed
densely, part of the batch by part; of [batch, features] only the entries that can fire are kept,
and decoder and backward pass are products with them.

    x W_enc -> which entries? -> entries -> activate -> x_hat
    dense      (choose)          [n entries]           weighted_sums over tokens
                                   ^                      | gradient [batch, d]
    W_enc.grad <-- weighted_sums --+------- dots <--------+--> weighted_sums --> W_dec.grad
                   over features                               over features

Shapes: n entries = (token, feature) pairs, in the order of tokens, then of features. Their place is
token x features + feature.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from sae_lightning.sae.products import dots, weighted_sums

PART = {"cpu": 1 << 22, "other": 1 << 29}
"""Pre-activations that are computed at a time: on a CPU as many as stay in its cache."""


class Pattern:
    """Which entries of a matrix [rows, columns] there are, in CSR order."""

    def __init__(self, places: Tensor, rows: int, columns: int, loose: bool = False):
        """`places` [n entries] int64: row x columns + column, ascending; `loose`: many values are 0
        and only there for the gradient of thresholds."""
        self.places, self.shape, self.loose = places, (rows, columns), loose
        self.rows = places // columns
        self.columns = places - self.rows * columns
        ends = torch.arange(rows + 1, device=places.device) * columns
        self.offsets = torch.searchsorted(places, ends)

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def _by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        """The transpose in CSR order: the number of each entry [n entries], where each column
        begins [columns + 1], and the row of each entry [n entries]."""
        columns = self.shape[1]
        # fewer bits, fewer passes of the radix sort
        keys = self.columns.to(torch.int16 if columns < 1 << 15 else torch.int32)
        keys, order = torch.sort(keys, stable=True)
        starts = torch.arange(columns + 1, device=keys.device, dtype=keys.dtype)
        return order, torch.searchsorted(keys, starts), self.rows.index_select(0, order)

    def transposed_product(self, values: Tensor, table: Tensor) -> Tensor:
        """[columns, d]: the transpose, with values [n entries], times table [rows, d]."""
        order, offsets, rows = self._by_column
        return weighted_sums(offsets, rows, values.index_select(0, order), table)

    def column_sums(self, values: Tensor) -> Tensor:
        """[columns]: for each column the sum of its values [n entries], in a fixed order."""
        if values.is_cuda:
            ones = values.new_ones(self.shape[0], 1)
            return self.transposed_product(values, ones).squeeze(1)
        return values.new_zeros(self.shape[1]).index_add_(0, self.columns, values)

    def without_zeros(self, values: Tensor) -> tuple["Pattern", Tensor]:
        """The entries whose values [n entries] are not 0; all of them unless the pattern is loose,
        since few would be left out."""
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


def working_type(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of `x` are computed: autocast's, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@torch.no_grad()
def find(
    x: Tensor, W_enc: Tensor, shift: Tensor, choose: Callable[[Tensor], Tensor]
) -> tuple[Pattern, Tensor]:
    """The entries that `choose` picks of x W_enc + shift, and their values [n entries].

    x [batch, d_in], W_enc [d_in, features], shift [features]; `choose` gives the places in a part
    [rows, features] of it, ascending. The product is computed in autocast's dtype, part by part,
    but summed and shifted in float32 before it is rounded.
    """
    dtype, features = working_type(x), W_enc.shape[1]
    rows = max(1, PART["cpu" if x.device.type == "cpu" else "other"] // features)
    near = shift.to(dtype)
    higher = torch.nextafter(near, torch.full_like(near, torch.inf))
    near = torch.where(near < shift, higher, near)  # rounded up, so that no positive entry is lost
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
    # Few are: look for 8 bytes that are not all 0 first, which takes half the time.
    words = x.relu().view(-1).view(torch.int64).nonzero().squeeze(1)
    within = above(x.view(-1, lanes).index_select(0, words), 0)
    shift = lanes.bit_length() - 1  # two or four lanes
    return (words.index_select(0, within >> shift) << shift) + (within & (lanes - 1))


def above(x: Tensor, bound: Tensor | float) -> Tensor:
    """The places in x, flattened, of what exceeds its bound, ascending. NaNs are kept, so that
    divergence is detected."""
    return (x <= bound).logical_not_().view(-1).nonzero().squeeze(1)


class Broadcast(torch.autograd.Function):
    """[n entries]: for each entry the value of its feature in a vector [features]. Unlike indexing
    with brackets it sums up gradients in the same order each time."""

    @staticmethod
    def forward(ctx, vector: Tensor, pattern: Pattern):
        ctx.pattern = pattern
        return vector.index_select(0, pattern.columns)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.pattern.column_sums(gradient), None


class Encode(torch.autograd.Function):
    """[n entries]: x W_enc + b_enc at a pattern, known to be `pre`; no gradient for x."""

    @staticmethod
    def forward(ctx, x: Tensor, W_enc: Tensor, b_enc: Tensor, pattern: Pattern, pre: Tensor):
        ctx.save_for_backward(x.to(working_type(x)))
        ctx.pattern = pattern
        return pre.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        pattern, gradient = ctx.pattern.without_zeros(gradient)
        to_columns = pattern.transposed_product(gradient, *ctx.saved_tensors)
        return None, to_columns.T, pattern.column_sums(gradient), None, None


class Decode(torch.autograd.Function):
    """[batch, d_out]: values [n entries] at a pattern times W_dec [features, d_out]."""

    @staticmethod
    def forward(ctx, values: Tensor, W_dec: Tensor, pattern: Pattern):
        live, weights = pattern.without_zeros(values)
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
            to_rows = ctx.live.transposed_product(weights, gradient)
        return to_values, to_rows, None
