"""Exact training on the few features that are active.

On most tokens a feature is off and gets no gradient. So only the encoder is computed densely, a
few rows of the batch at a time, and only the entries of [batch, features] with a strength or a
gradient are kept; the decoder and the backward pass are sparse products.

    x W_enc -> which entries? -> entries -> activate -> x_hat
    dense      (choose)          [n entries]           weighted_sums for each token
                                   ^                      | gradient [batch, d]
    W_enc.grad <-- weighted_sums --+------- dots <--------+--> weighted_sums --> W_dec.grad
                   for each feature                            for each feature

Shapes: n entries = (token, feature) pairs, ordered by token, then feature. The flat index of an
entry is token * features + feature.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from sae_lightning.sae.products import dots, weighted_sums

PRE_ACTIVATIONS_AT_ONCE = {"cpu": 1 << 22, "other": 1 << 29}
"""Pre-activations computed at a time: on a CPU, as many as fit in its cache."""


class SparsityPattern:
    """Positions of the stored entries of a sparse matrix [rows, columns], in CSR order."""

    def __init__(self, flat_indices: Tensor, height: int, width: int, has_zeros: bool = False):
        """A pattern in [height, width]. `flat_indices` [n entries] int64: row * width + column,
        ascending; `has_zeros`: many values are 0 (JumpReLU stores them for its thresholds)."""
        self.flat_indices, self.shape, self.has_zeros = flat_indices, (height, width), has_zeros
        self.rows = flat_indices // width  # of each entry
        self.columns = flat_indices - self.rows * width
        ends = torch.arange(height + 1, device=flat_indices.device) * width
        self.offsets = torch.searchsorted(flat_indices, ends)

    def __len__(self) -> int:
        return len(self.flat_indices)

    @cached_property
    def _by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        """The transpose in CSR order: permutation of the entries [n entries], offset of each column
        [columns + 1], and row of each entry [n entries]."""
        width = self.shape[1]
        # fewer bits, fewer passes of the radix sort
        keys = self.columns.to(torch.int16 if width < 1 << 15 else torch.int32)
        keys, order = torch.sort(keys, stable=True)
        starts = torch.arange(width + 1, device=keys.device, dtype=keys.dtype)
        return order, torch.searchsorted(keys, starts), self.rows.index_select(0, order)

    def transposed_product(self, values: Tensor, table: Tensor) -> Tensor:
        """[columns, d]: the transposed matrix of values [n entries] times a table [rows, d]."""
        order, offsets, rows = self._by_column
        return weighted_sums(offsets, rows, values.index_select(0, order), table)

    def column_sums(self, values: Tensor) -> Tensor:
        """[columns]: sum of the values [n entries] of each column, added in a fixed order."""
        if values.is_cuda:  # where index_add_ adds in any order
            ones = values.new_ones(self.shape[0], 1)
            return self.transposed_product(values, ones).squeeze(1)
        return values.new_zeros(self.shape[1]).index_add_(0, self.columns, values)

    def without_zeros(self, values: Tensor) -> tuple["SparsityPattern", Tensor]:
        """Pattern and values of the nonzero entries or, without `has_zeros`, of all entries."""
        if not self.has_zeros:
            return self, values
        nonzero = values.nonzero().squeeze(1)
        return SparsityPattern(self.flat_indices[nonzero], *self.shape), values[nonzero]

    def split_by_group(self, sizes: list[int]) -> "SparsityPattern":
        """Split each row into a row for each group of `sizes` consecutive columns: row
        r * groups + g of the result [rows * groups, columns] has the entries of row r in group g.
        The order of all entries stays."""
        ends = torch.tensor(sizes, device=self.flat_indices.device).cumsum(0)
        groups = torch.searchsorted(ends, self.columns, right=True)  # the group of each entry
        height, width = self.shape
        new_rows = self.rows * len(sizes) + groups
        return SparsityPattern(
            new_rows * width + self.columns, height * len(sizes), width, self.has_zeros
        )


def pick_working_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of `x` are computed: autocast's, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@torch.no_grad()
def encode_entries(
    x: Tensor, W_enc: Tensor, shift: Tensor, choose: Callable[[Tensor], Tensor]
) -> tuple[SparsityPattern, Tensor]:
    """The entries of x W_enc + shift that `choose` selects, and their values [n entries].

    x [batch, d_in], W_enc [d_in, features], shift [features]; `choose` takes the sums of some rows
    [rows, features] and returns ascending flat indices into them. The sums are computed in
    autocast's dtype, a few rows at a time: accumulated in float32, then rounded.
    """
    dtype, features = pick_working_dtype(x), W_enc.shape[1]
    device = "cpu" if x.device.type == "cpu" else "other"
    rows = max(1, PRE_ACTIVATIONS_AT_ONCE[device] // features)
    rounded_shift = shift.to(dtype)
    higher = torch.nextafter(rounded_shift, torch.full_like(rounded_shift, torch.inf))
    # rounded up, so that no positive entry is lost
    rounded_shift = torch.where(rounded_shift < shift, higher, rounded_shift)
    weights, indices, values = W_enc.to(dtype), [], []
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, len(x), rows):
            sums = torch.addmm(rounded_shift, x[start : start + rows].to(dtype), weights)
            sum_indices = choose(sums)
            indices.append(sum_indices + start * features)
            values.append(sums.view(-1)[sum_indices])
    pattern = SparsityPattern(torch.cat(indices), len(x), features)
    correction = shift - rounded_shift.float()  # undoes the rounding of the shift
    return pattern, torch.cat(values).float() + correction[pattern.columns]


def find_positive(x: Tensor) -> Tensor:
    """Flat indices of the positive values of [rows, features], ascending."""
    size = 8 // x.itemsize  # values in a group of 8 bytes: 2 or 4
    if x.device.type != "cpu" or x.numel() % size:
        return find_above(x, 0)
    # Few values are positive, so skipping groups that are all 0 after a ReLU halves the time.
    groups = x.relu().view(-1).view(torch.int64).nonzero().squeeze(1)
    in_groups = find_above(x.view(-1, size).index_select(0, groups), 0)  # in [groups, size]
    shift = size.bit_length() - 1  # i >> shift is i // size, i & (size - 1) is i % size
    group, place = groups.index_select(0, in_groups >> shift), in_groups & (size - 1)
    return (group << shift) + place


def find_above(x: Tensor, bound: Tensor | float) -> Tensor:
    """Flat indices of the values of x above their bound, ascending. NaNs are kept, so that
    divergence is detected."""
    return (x <= bound).logical_not_().view(-1).nonzero().squeeze(1)


class Broadcast(torch.autograd.Function):
    """[n entries]: the value of each entry's feature in a vector [features]. Unlike in
    vector[columns], the backward pass adds gradients in a fixed order."""

    @staticmethod
    def forward(ctx, vector: Tensor, pattern: SparsityPattern):
        ctx.pattern = pattern
        return vector.index_select(0, pattern.columns)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.pattern.column_sums(gradient), None


class Encode(torch.autograd.Function):
    """[n entries]: x W_enc + b_enc at the entries of a pattern. `pre` holds these values already,
    so the forward pass copies it; the backward pass gives x no gradient."""

    @staticmethod
    def forward(
        ctx, x: Tensor, W_enc: Tensor, b_enc: Tensor, pattern: SparsityPattern, pre: Tensor
    ):
        ctx.save_for_backward(x.to(pick_working_dtype(x)))
        ctx.pattern = pattern
        return pre.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (x,), W_enc_gradient = ctx.saved_tensors, None
        pattern, gradient = ctx.pattern.without_zeros(gradient)
        if ctx.needs_input_grad[1]:
            W_enc_gradient = pattern.transposed_product(gradient, x).T
        return None, W_enc_gradient, pattern.column_sums(gradient), None, None


class Decode(torch.autograd.Function):
    """[batch, d_out]: the sparse matrix of values [n entries] times W_dec [features, d_out]."""

    @staticmethod
    def forward(ctx, values: Tensor, W_dec: Tensor, pattern: SparsityPattern):
        nonzero, weights = pattern.without_zeros(values)
        rows = W_dec.to(pick_working_dtype(values))
        ctx.pattern, ctx.nonzero = pattern, nonzero
        ctx.save_for_backward(weights, rows)
        return weighted_sums(nonzero.offsets, nonzero.columns, weights, rows)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (weights, rows), pattern = ctx.saved_tensors, ctx.pattern
        gradient = gradient.to(rows.dtype).contiguous()
        values_gradient = W_dec_gradient = None
        if ctx.needs_input_grad[0]:
            values_gradient = dots(pattern.offsets, pattern.columns, gradient, rows)
        if ctx.needs_input_grad[1]:
            W_dec_gradient = ctx.nonzero.transposed_product(weights, gradient)
        return values_gradient, W_dec_gradient, None
