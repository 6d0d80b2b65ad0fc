"""The features of one dictionary, split over ranks."""

import os
from pathlib import Path

import torch
from torch import Tensor

from sae_lightning.ranks.collectives import ALONE, Ranks

SENT_BYTES = 1 << 26  # in one message when a tensor is assembled


class Split:
    """Round-robin split of `features` over ranks: feature i is on rank i % size, so that every
    prefix of the features is spread evenly.

    features    0 1 2 3 4 5 6 7        3 ranks
    rank 0      0     3     6
    rank 1        1     4     7
    rank 2          2     5
    """

    def __init__(self, features: int, ranks: Ranks = ALONE):
        self.features, self.ranks = features, ranks
        self.own = range(ranks.rank, features, ranks.size)
        """The features of this rank."""

    def count_own(self, stop: int) -> int:
        """Number of this rank's features among the first `stop`."""
        return len(range(self.ranks.rank, stop, self.ranks.size))

    def slice(self, whole: Tensor, dim: int = 0) -> Tensor:
        """This rank's part of a tensor that has all features along `dim`."""
        if self.ranks.size == 1:
            return whole
        return whole.movedim(dim, 0)[self.own.start :: self.ranks.size].movedim(0, dim)

    def join(self, x: Tensor) -> Tensor:
        """All-gather: [features, ...] from each rank's x [own features, ...]."""
        if self.ranks.size == 1:
            return x
        longest = -(-self.features // self.ranks.size)  # rows on the rank with the most features
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        dtype = padded.dtype
        padded = padded.byte() if dtype is torch.bool else padded
        return self.ranks.stack(padded).transpose(0, 1).flatten(0, 1)[: self.features].to(dtype)

    def norm(self, x: Tensor) -> Tensor:
        """Norm [] over all features, from each rank's norm [] over its own."""
        return x if self.ranks.size == 1 else self.ranks.sum(x.double().square()).sqrt().to(x.dtype)

    def assemble_file(self, x: Tensor, dim: int, file: Path) -> Tensor | None:
        """Gather a tensor that is split along `dim` on rank 0; the other ranks get None. It is an
        mmap of `file`, in the memory order of `x`, so it need not fit into memory."""
        if self.ranks.size == 1:
            return x
        rows = x.movedim(dim, 0)  # a row for each feature
        count = max(1, SENT_BYTES // max(1, rows[:1].numel() * x.itemsize))
        whole = None
        if self.ranks.is_first:
            shape = list(x.shape)
            shape[dim] = self.features
            strided = x.ndim > 1 and not x.is_contiguous()
            elements = rows[:1].numel() * self.features
            with open(file, "wb") as empty:
                if hasattr(os, "posix_fallocate"):  # otherwise a full disk crashes the process
                    os.posix_fallocate(empty.fileno(), 0, elements * x.itemsize)
            flat = torch.from_file(str(file), shared=True, size=elements, dtype=x.dtype)
            file.unlink()  # the disk space is freed with the tensor
            whole = flat.view(shape[::-1]).T if strided else flat.view(shape)
            self.slice(whole, dim).copy_(x)
        for sender in range(1, self.ranks.size):
            length = len(range(sender, self.features, self.ranks.size))
            for start in range(0, length, count):
                stop = min(start + count, length)
                outgoing, incoming = [None] * self.ranks.size, [None] * self.ranks.size
                if self.ranks.rank == sender:
                    outgoing[0] = rows[start:stop].cpu().contiguous()
                elif self.ranks.is_first:
                    incoming[sender] = torch.empty(stop - start, *rows.shape[1:], dtype=x.dtype)
                self.ranks.exchange(outgoing, incoming)
                if self.ranks.is_first:
                    features = torch.arange(start, stop) * self.ranks.size + sender
                    whole.movedim(dim, 0)[features] = incoming[sender]
        return whole
