"""Values for all tokens and features of a batch, in two forms with the same methods, so that an
architecture and an objective have one body: `DenseMatrix` has every value of [batch, features],
`SparseMatrix` only those that can differ from 0.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from sae_lightning.sae.sparse import Broadcast, Decode, Pattern

SAMPLE = 128  # tokens by which the density of a batch is estimated


@dataclass(slots=True, eq=False)
class DenseMatrix:
    """Every value."""

    values: Tensor
    """[batch, features]"""

    @property
    def tokens(self) -> int:
        """Size of the batch."""
        return len(self.values)

    def replace(self, values: Tensor) -> "DenseMatrix":
        """The same places with other values."""
        return DenseMatrix(values)

    def of(self, vector: Tensor) -> Tensor:
        """A vector [features] in a shape that broadcasts with `values`."""
        return vector

    def columns(self, features: Tensor) -> Tensor | None:
        """[batch, n]: all values of some features [n]; None if not all are known."""
        return self.values[:, features]

    def __matmul__(self, W_dec: Tensor) -> Tensor:
        """[batch, d_out]: these times W_dec [features, d_out]."""
        return self.values @ W_dec

    def matmul_by_group(self, sizes: list[int], W_dec: Tensor) -> Iterable[Tensor]:
        """[batch, d_out] for each group of consecutive features: its share of `self @ W_dec`."""
        groups = zip(self.values.split(sizes, dim=1), W_dec.split(sizes), strict=True)
        return (values @ rows for values, rows in groups)

    def penalty(self, function: Callable[[Tensor, Tensor], Tensor], norms: Tensor) -> Tensor:
        """`function` of the values [batch, features] and decoder norms [features]: a mean over the
        batch of a sum over features to which zeros add nothing."""
        return function(self.values, norms)

    def count(self) -> Tensor:
        """[features]: on how many tokens each is positive."""
        return (self.values > 0).sum(dim=0)

    def density(self, bound: Tensor | float) -> float:
        """Share of values above a bound [features], estimated from the first tokens, which are in
        random order; of entries: the share that there is, whatever the bound."""
        return (self.values[:SAMPLE] > bound).float().mean().item()


@dataclass(slots=True, eq=False)
class SparseMatrix:
    """The values that can differ from 0. Methods as in `DenseMatrix`."""

    values: Tensor
    """[n entries]"""
    pattern: Pattern

    @property
    def tokens(self) -> int:
        return self.pattern.shape[0]

    def replace(self, values: Tensor) -> "SparseMatrix":
        return SparseMatrix(values, self.pattern)

    def of(self, vector: Tensor) -> Tensor:
        return Broadcast.apply(vector, self.pattern)

    def columns(self, features: Tensor) -> None:
        return None

    def __matmul__(self, W_dec: Tensor) -> Tensor:
        return Decode.apply(self.values, W_dec, self.pattern)

    def matmul_by_group(self, sizes: list[int], W_dec: Tensor) -> Iterable[Tensor]:
        lines = Decode.apply(self.values, W_dec, self.pattern.split(sizes))
        return lines.unflatten(0, (-1, len(sizes))).unbind(dim=1)

    def penalty(self, function: Callable[[Tensor, Tensor], Tensor], norms: Tensor) -> Tensor:
        # all entries as if they were of one token
        return function(self.values[None], self.of(norms)) / self.tokens

    def count(self) -> Tensor:
        return self.pattern.column_sums((self.values > 0).float())

    def density(self, bound: Tensor | float) -> float:
        tokens, features = self.pattern.shape
        return len(self.pattern) / (tokens * features)


Matrix = DenseMatrix | SparseMatrix
