"""Ranks: processes, one for each device, that train together. All their communication is here.

    rank 0        reads the command, checks it, prints, and writes what all share
    rank 1, ...   follow it, pass by pass

Alone, a rank has nobody to talk to: every method returns its argument, untouched, so that code
which calls them need not know how many ranks there are.
"""

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from sae_lightning.errors import UserError

SENT_BYTES = 1 << 26  # sent at a time when a dictionary is put together
LAST_WORDS_SECONDS = 10  # to hear from the others once one of them is lost


class RankLost(UserError):
    """Another rank ended, or did not answer in time."""


class Ranks:
    """The ranks that train together: this process is number `rank` of `size`.

    All of them call the same methods in the same order. RankLost if one does not.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None):
        self.rank, self.size, self.store = rank, size, store

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather_values(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank; values are pickled."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        self._call(dist.all_gather_object, values, value)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's value; values are pickled."""
        if self.size == 1:
            return value
        values = [value]
        self._call(dist.broadcast_object_list, values, src=0)
        return values[0]

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.gather_values(None)

    def sum_counts(self, counts: list[int]) -> list[int]:
        """Sums of integers over the ranks, through the CPU."""
        if self.size == 1:
            return counts
        total = torch.tensor(counts)
        self._call(dist.all_reduce, total)
        return total.tolist()

    def sum(self, x: Tensor) -> Tensor:
        """Sum of `x` over the ranks, in float32 at least. Every rank computes the same loss from
        it, so the gradient of the sum is the gradient of each term."""
        return x if self.size == 1 else _Sum.apply(x, self)

    def stack(self, x: Tensor) -> Tensor:
        """[size, *x.shape]: the tensors of all ranks, which have one shape."""
        if self.size == 1:
            return x[None]
        parts = x.new_empty(self.size, *x.shape)
        self._call(dist.all_gather, list(parts.unbind()), x.contiguous())
        return parts

    def average(self, mean: float, count: int) -> float:
        """Mean over all ranks, from each rank's `mean` of `count` values."""
        if self.size == 1:
            return mean
        total = [mean * count if count else 0.0, count]
        total = self.sum(torch.tensor(total, dtype=torch.float64))
        return (total[0] / total[1]).item()

    def keep_largest(self, x: Tensor, k: int) -> Tensor:
        """This rank's candidates [..., m], at most k and not negative, with 0 in place of those
        that are not among the k largest of all ranks."""
        if self.size == 1:
            return x
        all_ranks = self.stack(pad(x.detach(), (0, k - x.shape[-1]))).movedim(0, -2).flatten(-2)
        chosen = all_ranks.topk(k, sorted=False).indices
        kept = torch.zeros_like(all_ranks, dtype=torch.bool).scatter_(-1, chosen, True)
        return x.masked_fill(~kept[..., self.rank * k :][..., : x.shape[-1]], 0)

    def keep_largest_entries(self, x: Tensor, rows: Tensor, count: int, k: int) -> Tensor:
        """`keep_largest` in each of `count` rows, for entries [n] in rows [n], ascending."""
        if self.size == 1:
            return x
        places = rows, torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
        table = x.new_zeros(count, k).index_put_(places, x)
        return self.keep_largest(table, k)[places]

    def find_smallest(self, x: Tensor) -> Tensor | None:
        """The smallest [] of the positive values [n] of all ranks; None if there is none."""
        if self.size == 1:
            return x.min() if len(x) else None
        smallest = self.stack(pad(x[x > 0], (0, 1), value=torch.inf).min()).min()
        return smallest if smallest < torch.inf else None

    def exchange(
        self, outgoing: Sequence[Tensor | None], incoming: Sequence[Tensor | None]
    ) -> None:
        """Send outgoing[r] to every rank r, and fill incoming[r] with what it sends here; None, or
        an empty tensor, where nothing is sent."""
        operations = [
            dist.P2POp(operation, x.view(torch.uint8), other)
            for operation, tensors in ((dist.isend, outgoing), (dist.irecv, incoming))
            for other, x in enumerate(tensors)
            if x is not None and x.numel() and other != self.rank
        ]
        if operations:
            for request in self._call(dist.batch_isend_irecv, operations):
                self._call(request.wait)

    def _call(self, function: Any, *args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except RuntimeError as error:  # torch has no exception for a lost connection alone
            raise self._find_lost() from error

    def _find_lost(self) -> RankLost:
        """Name the ranks that are lost: those that leave no last words."""
        if (
            dist.is_initialized()
        ):  # closes connections, so that ranks which wait for this one wake up
            dist.destroy_process_group()
        self.leave_words("waiting")
        others = set(range(self.size)) - {self.rank}
        until, words = monotonic() + LAST_WORDS_SECONDS, {}
        while monotonic() < until and words.keys() < others:
            try:
                words |= {
                    r: self.store.get(f"words/{r}").decode()
                    for r in others - words.keys()
                    if self.store.check([f"words/{r}"])
                }
            except RuntimeError:  # the store was in the process that is lost
                return RankLost("rank 0 has ended")
            sleep(0.1)
        for r, said in sorted(words.items()):
            if said != "waiting":
                return RankLost(f"rank {r}: {said}")
        missing = sorted(others - words.keys())
        names = [f"rank {r} ({self.store.get(f'place/{r}').decode()})" for r in missing]
        return RankLost(f"{' and '.join(names) or 'a rank'} has ended, or does not answer")

    def leave_words(self, words: str) -> None:
        """Tell the others, which find this rank lost, why."""
        if self.store is not None:
            with suppress(RuntimeError):  # the store was in the process that is lost
                self.store.set(f"words/{self.rank}", words)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.dtype = x.dtype
        total = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        total = total.contiguous()
        ranks._call(dist.all_reduce, total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.to(ctx.dtype), None


ALONE = Ranks()


class Split:
    """How `features` are spread over ranks: feature i is on rank i % size, so that every prefix of
    the features is spread evenly.

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
        """This rank's features of a tensor that has all of them along `dim`."""
        if self.ranks.size == 1:
            return whole
        return whole.movedim(dim, 0)[self.own.start :: self.ranks.size].movedim(0, dim)

    def join(self, x: Tensor) -> Tensor:
        """[features, ...] from each rank's x [its features, ...]."""
        if self.ranks.size == 1:
            return x
        most = -(-self.features // self.ranks.size)
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: len(x)] = x
        dtype = padded.dtype
        padded = padded.byte() if dtype is torch.bool else padded
        return self.ranks.stack(padded).transpose(0, 1).flatten(0, 1)[: self.features].to(dtype)

    def sum_parts(self, x: Tensor) -> Tensor:
        """Sum over all features, from each rank's sum over its own (see `Ranks.sum`)."""
        return self.ranks.sum(x)

    def norm(self, x: Tensor) -> Tensor:
        """Norm [] over all features, from each rank's norm [] over its own."""
        return x if self.ranks.size == 1 else self.ranks.sum(x.double().square()).sqrt().to(x.dtype)

    def assemble_file(self, x: Tensor, dim: int, file: Path) -> Tensor | None:
        """Rank 0 gets the whole of a tensor that is split along `dim`, in the memory order of `x`,
        as a mapping of `file`, which never has to fit into memory; the others get None."""
        if self.ranks.size == 1:
            return x
        rows = x.movedim(dim, 0)  # a row for each feature
        count = max(1, SENT_BYTES // max(1, rows[:1].numel() * x.itemsize))
        whole = None
        if self.ranks.is_first:
            shape = list(x.shape)
            shape[dim] = self.features
            strided = x.ndim > 1 and not x.is_contiguous()
            flat = torch.from_file(
                str(file), shared=True, size=rows[:1].numel() * self.features, dtype=x.dtype
            )
            whole = flat.view(shape[::-1]).T if strided else flat.view(shape)
            self.slice(whole, dim).copy_(x)
        for sender in range(1, self.ranks.size):
            length = len(range(sender, self.features, self.ranks.size))
            for start in range(0, length, count):
                stop = min(start + count, length)
                sends, fills = [None] * self.ranks.size, [None] * self.ranks.size
                if self.ranks.rank == sender:
                    sends[0] = rows[start:stop].cpu().contiguous()
                elif self.ranks.is_first:
                    fills[sender] = torch.empty(stop - start, *rows.shape[1:], dtype=x.dtype)
                self.ranks.exchange(sends, fills)
                if self.ranks.is_first:
                    places = torch.arange(start, stop) * self.ranks.size + sender
                    whole.movedim(dim, 0)[places] = fills[sender]
        return whole


_world = ALONE


def world() -> Ranks:
    """The ranks that this process trains with; ALONE until it connects to others."""
    return _world


def connect(rank: int, size: int, local_rank: int, seconds: int) -> Ranks:
    """Join `size` ranks as number `rank`, through MASTER_ADDR and MASTER_PORT; a rank waits
    `seconds` for the others. On a machine with GPUs the rank takes the one with number
    `local_rank`."""
    global _world
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ,
        timeout=timedelta(seconds=seconds),
    )
    _world = Ranks(rank, size, store)
    store.set(f"place/{rank}", f"process {os.getpid()} on {socket.gethostname()}")
    options = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=seconds)}
    _world._call(dist.init_process_group, backend, store=store, **options)
    return _world


def disconnect() -> None:
    """Leave the ranks; this process is alone again."""
    global _world
    _world = ALONE
    if dist.is_initialized():
        dist.destroy_process_group()
