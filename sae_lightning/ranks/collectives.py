"""All communication between ranks: collectives, messages, and the search for lost ranks."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from time import monotonic, sleep
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from sae_lightning.errors import UserError

FOREVER = timedelta(days=365)
WAITING = "waiting for another rank"  # stored as its reason by a rank that did not fail itself
REASON_SECONDS = 10  # to wait for reasons, once a call has failed or hung for trainer.patience


class RankLost(UserError):
    """Another rank ended, or did not answer in time."""


class Ranks:
    """The process group of a run: this process is number `rank` of `size`.

    All ranks call the same methods in the same order. RankLost if one ends or does not answer.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, store: dist.Store | None = None
    ):
        """`local_rank`: number among the ranks of this machine; `store`: the key-value store of all
        ranks."""
        self.rank, self.size, self.local_rank, self.store = rank, size, local_rank, store
        self.go_first_calls = 0  # calls of `go_first` so far, the same number on all ranks
        # a second process group for `exchange`, which thus need not wait for all-reduces on GPUs
        self.exchange_group: dist.ProcessGroup | None = None

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def gather_values(self, value: Any) -> list[Any]:
        """All-gather: the values of all ranks, by rank; values are pickled."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        self.call_detecting_loss(dist.all_gather_object, values, value)
        return values

    def broadcast_value(self, value: Any) -> Any:
        """Rank 0's value; values are pickled."""
        if self.size == 1:
            return value
        values = [value]
        self.call_detecting_loss(dist.broadcast_object_list, values, src=0)
        return values[0]

    def wait(self) -> None:
        """Barrier: wait until all ranks call it."""
        self.gather_values(None)

    def store_message(self, name: str, message: bytes) -> None:
        """Store a message under a name, for ranks that wait for it with `await_message`."""
        self.store.set(name, message)

    def await_message(self, name: str) -> bytes:
        """Wait, without a time limit, for the message `name`."""
        self.call_detecting_loss(self.store.wait, [name], FOREVER)
        return self.call_detecting_loss(self.store.get, name)

    @contextmanager
    def go_first(self) -> Iterator[None]:
        """Run the block on the first rank of each machine, then on its other ranks, which wait
        without a time limit and use what the first has downloaded and cached."""
        self.go_first_calls += 1
        key = f"go_first/{self.go_first_calls}/{socket.gethostname()}"
        if self.local_rank:
            self.await_message(key)
        yield
        if self.size > 1 and not self.local_rank:
            self.store_message(key, b"done")

    def sum_counts(self, counts: list[int]) -> list[int]:
        """All-reduce: sums of integers over the ranks, on the CPU."""
        if self.size == 1:
            return counts
        total = torch.tensor(counts)
        self.call_detecting_loss(dist.all_reduce, total)
        return total.tolist()

    def sum(self, x: Tensor) -> Tensor:
        """All-reduce: sum of `x` over the ranks; with several, in float32 or wider. The gradient of
        `x` is that of the sum, because all ranks compute the same loss from it."""
        return x if self.size == 1 else _Sum.apply(x, self)

    def stack(self, x: Tensor) -> Tensor:
        """All-gather: [size, *x.shape], from tensors of the same shape."""
        if self.size == 1:
            return x[None]
        parts = x.new_empty(self.size, *x.shape)
        self.call_detecting_loss(dist.all_gather, list(parts.unbind()), x.contiguous())
        return parts

    def average(self, mean: float, count: int) -> float:
        """Mean over all ranks, from each rank's `mean` of `count` values."""
        if self.size == 1:
            return mean
        local = [mean * count if count else 0.0, count]  # the mean of no values is NaN
        total, total_count = self.sum(torch.tensor(local, dtype=torch.float64))
        return (total / total_count).item()

    def keep_largest(self, x: Tensor, k: int) -> Tensor:
        """This rank's candidates x [..., m], all set to 0 but those among the k largest of all
        ranks; m <= k and x >= 0."""
        if self.size == 1:
            return x
        by_rank = self.stack(pad(x.detach(), (0, k - x.shape[-1])))  # [size, ..., k]
        candidates = by_rank.movedim(0, -2).flatten(-2)  # [..., size * k]
        chosen = candidates.topk(k, sorted=False).indices
        kept = torch.zeros_like(candidates, dtype=torch.bool).scatter_(-1, chosen, True)
        start = self.rank * k  # of this rank's candidates
        return x.masked_fill(~kept[..., start : start + x.shape[-1]], 0)

    def keep_largest_entries(self, x: Tensor, rows: Tensor, count: int, k: int) -> Tensor:
        """`keep_largest` in each row, for entries x [n] of a sparse matrix of `count` rows;
        `rows` [n]: the row of each entry, in ascending order."""
        if self.size == 1:
            return x
        row_starts = torch.searchsorted(rows, rows)  # [n]: first entry of the same row
        places = torch.arange(len(rows), device=rows.device) - row_starts
        table = x.new_zeros(count, k).index_put_((rows, places), x)
        return self.keep_largest(table, k)[rows, places]

    def find_smallest(self, x: Tensor) -> Tensor | None:
        """Smallest positive value [] of all ranks' x [n], from `keep_largest`; None without one."""
        if self.size == 1:  # `keep_largest` has set no value to 0
            return x.min() if len(x) else None
        own_smallest = pad(x[x > 0], (0, 1), value=torch.inf).min()
        smallest = self.stack(own_smallest).min()
        return smallest if smallest < torch.inf else None

    def exchange(
        self, outgoing: Sequence[Tensor | None], incoming: Sequence[Tensor | None]
    ) -> None:
        """Send outgoing[r] to each rank r and receive incoming[r] from it; None, or an empty
        tensor, where nothing is sent."""
        operations, group = [], self.exchange_group
        for operation, tensors in ((dist.isend, outgoing), (dist.irecv, incoming)):
            for other, x in enumerate(tensors):
                if other != self.rank and x is not None and x.numel():
                    operations.append(dist.P2POp(operation, x.view(torch.uint8), other, group))
        if operations:
            for request in self.call_detecting_loss(dist.batch_isend_irecv, operations):
                self.call_detecting_loss(request.wait)

    def call_detecting_loss(self, function: Any, *args: Any, **options: Any) -> Any:
        """Call a function of torch.distributed; RankLost if it fails because a rank is lost."""
        try:
            return function(*args, **options)
        except RuntimeError as error:  # torch has no exception for a lost connection alone
            reason = self._explain_failure()
            if reason is None:
                raise
            raise RankLost(reason) from error

    def _explain_failure(self) -> str | None:
        """Say why a call failed: the error of another rank or, if no other rank has stored one,
        which ranks do not answer. None if all ranks are WAITING: then no rank is lost."""
        close_connections()  # makes calls fail on the ranks that wait for this one
        self.store_reason(WAITING)
        others = set(range(self.size)) - {self.rank}
        deadline, reasons = monotonic() + REASON_SECONDS, {}
        try:
            while (
                monotonic() < deadline
                and reasons.keys() < others
                and all(reason == WAITING for reason in reasons.values())
            ):
                sleep(0.1)
                for rank in others - reasons.keys():
                    if self.store.check([f"reasons/{rank}"]):
                        reasons[rank] = self.store.get(f"reasons/{rank}").decode()
            silent = [
                f"rank {rank} ({self.store.get(f'process/{rank}').decode()})"
                for rank in sorted(others - reasons.keys())
            ]
        except RuntimeError:  # the store is gone with rank 0
            return "rank 0 has ended"
        failed = [
            f"rank {rank}: {reason}"
            for rank, reason in sorted(reasons.items())
            if reason != WAITING
        ]
        if failed:
            return failed[0]
        if not silent:
            return None
        return f"{', '.join(silent)} has ended, or gave no answer within trainer.patience"

    def store_reason(self, reason: str) -> None:
        """Store why this rank ends (or WAITING), for the error messages of the other ranks."""
        if self.store is not None:
            with suppress(RuntimeError):  # the store is gone with rank 0
                self.store.set(f"reasons/{self.rank}", reason)


def close_connections() -> None:
    """Close the connections to other ranks, without waiting for those that may be lost."""
    if dist.is_initialized() and torch.cuda.is_available():
        dist.distributed_c10d._abort_process_group()  # GPUs use NCCL, which alone can abort
    elif dist.is_initialized():
        dist.destroy_process_group()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.dtype = x.dtype
        total = x.to(torch.promote_types(x.dtype, torch.float32), copy=True).contiguous()
        ranks.call_detecting_loss(dist.all_reduce, total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.to(ctx.dtype), None


ALONE = Ranks()
