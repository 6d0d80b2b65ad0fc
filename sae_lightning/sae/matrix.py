"""Values [batch, features], dense or sparse, behind one interface, so that architectures and
objectives need no second version for sparse products."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from sae_lightning.sae.sparse import Broadcast, Decode, SparsityPattern

DENSITY_TOKENS = 128  # first tokens of a shuffled batch, from which its density is estimated


class Matrix(ABC):
    """A matrix [batch, features] that holds all values (`DenseMatrix`), or only those that can
    differ from 0 (`SparseMatrix`)."""

    __slots__ = ()

    values: Tensor
    """[batch, features], or [n entries] of a sparse matrix"""

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Number of tokens in the batch."""

    @abstractmethod
    def with_values(self, values: Tensor) -> "Matrix":
        """A matrix with these `values`, of the shape of `self.values`, at the same positions."""

    @abstractmethod
    def broadcast(self, vector: Tensor) -> Tensor:
        """A vector [features] in a shape that broadcasts with `values`."""

    @abstractmethod
    def stored_columns(self, indices: Tensor) -> Tensor | None:
        """[batch, n]: all values of the features at `indices` [n]; None in a sparse matrix."""

    @abstractmethod
    def __matmul__(self, W_dec: Tensor) -> Tensor:
        """[batch, d_out]: the matrix times W_dec [features, d_out]."""

    @abstractmethod
    def matmul_by_group(self, sizes: list[int], W_dec: Tensor) -> Iterable[Tensor]:
        """For each group of consecutive features, its part [batch, d_out] of the product with
        W_dec; `sizes`: the number of features in each group."""

    @abstractmethod
    def apply_penalty(self, function: Callable[[Tensor, Tensor], Tensor], norms: Tensor) -> Tensor:
        """function(values [batch, features], decoder norms [features]). The function must be the
        mean over the batch of a sum over features, to which values of 0 add nothing."""

    @abstractmethod
    def count_positive(self) -> Tensor:
        """[features]: the number of tokens on which each feature is positive."""

    @abstractmethod
    def density_above(self, bound: Tensor | float) -> float:
        """Estimated share of values above a bound (a number or [features]). A dense matrix counts
        its first tokens only; a sparse one returns the share of values that it stores."""


@dataclass(slots=True, eq=False)
class DenseMatrix(Matrix):
    """Every value of [batch, features]."""

    values: Tensor

    @property
    def batch_size(self) -> int:
        return len(self.values)

    def with_values(self, values: Tensor) -> "DenseMatrix":
        return DenseMatrix(values)

    def broadcast(self, vector: Tensor) -> Tensor:
        return vector

    def stored_columns(self, indices: Tensor) -> Tensor:
        return self.values[:, indices]

    def __matmul__(self, W_dec: Tensor) -> Tensor:
        return self.values @ W_dec

    def matmul_by_group(self, sizes: list[int], W_dec: Tensor) -> Iterable[Tensor]:
        groups = zip(self.values.split(sizes, dim=1), W_dec.split(sizes), strict=True)
        return (values @ rows for values, rows in groups)

    def apply_penalty(self, function: Callable[[Tensor, Tensor], Tensor], norms: Tensor) -> Tensor:
        return function(self.values, norms)

    def count_positive(self) -> Tensor:
        return (self.values > 0).sum(dim=0)

    def density_above(self, bound: Tensor | float) -> float:
        return (self.values[:DENSITY_TOKENS] > bound).float().mean().item()


@dataclass(slots=True, eq=False)
class SomeColumns(DenseMatrix):
    """Some columns of [batch, features]: the values [batch, n] of n features."""

    columns: Tensor
    """Indices [n] of the features"""

    def broadcast(self, vector: Tensor) -> Tensor:
        return vector[self.columns]


@dataclass(slots=True, eq=False)
class SparseMatrix(Matrix):
    """The values of [batch, features] that can differ from 0."""

    values: Tensor
    pattern: SparsityPattern

    @property
    def batch_size(self) -> int:
        return self.pattern.shape[0]

    def with_values(self, values: Tensor) -> "SparseMatrix":
        return SparseMatrix(values, self.pattern)

    def broadcast(self, vector: Tensor) -> Tensor:
        return Broadcast.apply(vector, self.pattern)

    def stored_columns(self, indices: Tensor) -> None:
        return None

    def __matmul__(self, W_dec: Tensor) -> Tensor:
        return Decode.apply(self.values, W_dec, self.pattern)

    def matmul_by_group(self, sizes: list[int], W_dec: Tensor) -> Iterable[Tensor]:
        products = Decode.apply(self.values, W_dec, self.pattern.split_by_group(sizes))
        return products.unflatten(0, (-1, len(sizes))).unbind(dim=1)  # from [batch * groups, d_out]

    def apply_penalty(self, function: Callable[[Tensor, Tensor], Tensor], norms: Tensor) -> Tensor:
        # as one row of a matrix: the function sums over a row, and its mean is over rows
        return function(self.values[None], self.broadcast(norms)) / self.batch_size

    def count_positive(self) -> Tensor:
        return self.pattern.column_sums((self.values > 0).float())

    def density_above(self, bound: Tensor | float) -> float:
        tokens, features = self.pattern.shape
        return len(self.pattern) / (tokens * features)
