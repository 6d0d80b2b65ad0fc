"""The features of one dictionary, split over ranks."""

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from sae_lightning.ranks.collectives import ALONE, Ranks

MESSAGE_BYTES = 1 << 26  # largest message of `gather_on_rank_zero`


class FeatureSplit:
    """Round-robin split of `features` over ranks: feature i is on rank i % size, so that every
    prefix of the features is spread evenly.

    features    0 1 2 3 4 5 6 7        3 ranks
    rank 0      0     3     6
    rank 1        1     4     7
    rank 2          2     5
    """

    def __init__(self, features: int, ranks: Ranks = ALONE):
        self.features, self.ranks = features, ranks
        self.own_features = range(ranks.rank, features, ranks.size)
        """The features of this rank."""

    def count_own(self, stop: int) -> int:
        """Number of this rank's features among the first `stop`."""
        return len(range(self.ranks.rank, stop, self.ranks.size))

    def slice(self, whole: Tensor, dim: int = 0) -> Tensor:
        """This rank's part of a tensor that has all features along `dim`."""
        if self.ranks.size == 1:
            return whole
        return whole.movedim(dim, 0)[self.own_features.start :: self.ranks.size].movedim(0, dim)

    def join(self, x: Tensor) -> Tensor:
        """All-gather the x [own features, ...] of all ranks, as one [features, ...]."""
        if self.ranks.size == 1:
            return x
        longest = math.ceil(self.features / self.ranks.size)  # rows on the rank with most features
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        by_row = self.ranks.stack(padded).transpose(0, 1)  # [i, rank]: feature i * size + rank
        return by_row.flatten(0, 1)[: self.features]

    def norm(self, x: Tensor) -> Tensor:
        """Norm [] over all features, from each rank's norm [] over its own."""
        return x if self.ranks.size == 1 else self.ranks.sum(x.double().square()).sqrt().to(x.dtype)

    def gather_on_rank_zero(self, x: Tensor, dim: int, file: Path) -> Tensor | None:
        """Gather a tensor that is split along `dim`: the whole on rank 0, None on other ranks. The
        whole has the memory order of `x`. It is an mmap of `file`, as it may not fit into memory;
        with one rank it is `x`."""
        if self.ranks.size == 1:
            return x
        whole = None
        if self.ranks.is_rank_zero:
            whole = _map_file(file, x, dim, self.features)
            self.slice(whole, dim).copy_(x)
        rows = x.movedim(dim, 0)  # a row for each feature
        row_bytes = max(1, rows[:1].numel() * x.itemsize)
        per_message = max(1, MESSAGE_BYTES // row_bytes)
        for sender in range(1, self.ranks.size):
            sender_features = range(sender, self.features, self.ranks.size)
            for start in range(0, len(sender_features), per_message):
                features = sender_features[start : start + per_message]
                outgoing, incoming = [None] * self.ranks.size, [None] * self.ranks.size
                if self.ranks.rank == sender:
                    outgoing[0] = rows[start : start + per_message].cpu().contiguous()
                elif self.ranks.is_rank_zero:
                    incoming[sender] = torch.empty(len(features), *rows.shape[1:], dtype=x.dtype)
                self.ranks.exchange(outgoing, incoming)
                if self.ranks.is_rank_zero:
                    whole.movedim(dim, 0)[torch.tensor(features)] = incoming[sender]
        return whole


def _map_file(file: Path, x: Tensor, dim: int, features: int) -> Tensor:
    """An mmap of `file` as a tensor of the shape, dtype and memory order of `x`, but with all
    `features` along `dim`. The file is deleted at once; its disk space is freed with the tensor."""
    shape = list(x.shape)
    shape[dim] = features
    with open(file, "wb") as empty:
        if hasattr(os, "posix_fallocate"):  # without space, writing to the mmap would crash
            os.posix_fallocate(empty.fileno(), 0, math.prod(shape) * x.itemsize)
    flat = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=x.dtype)
    file.unlink()
    is_transposed = x.ndim > 1 and not x.is_contiguous()  # such as W_enc, column-major
    return flat.view(shape[::-1]).T if is_transposed else flat.view(shape)
