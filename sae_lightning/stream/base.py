"""What training reads: batches of activations, wherever they come from."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sae_lightning.llm.sites import Site


class ActivationStream(Protocol):
    """Shuffled batches {site: [batch, d]} of one run, which can be saved and continued exactly.

    A stream is begun once; iterating it again goes on where it stopped. After `load_state_dict`
    it yields the batches that followed the save, and `len` still counts those of the whole run.
    """

    def __iter__(self) -> Iterator[dict[Site, Tensor]]: ...

    def __len__(self) -> int:
        """Batches in the whole run."""
        ...

    def peek(self, n: int) -> dict[Site, Tensor]:
        """Activations {site: [<= n, d]} that training will see, without consuming them."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next batches depend on: plain numbers, lists and CPU tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None:
        """No more batches are wanted, whether or not all were served."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the batches are made."""
        ...

    @property
    def seconds(self) -> float:
        """Seconds spent in the stream since this process began, the LLM and the first fill too.

        By the CPU's clock: an accelerator is waited for in `peek` only, and may still be at work.
        """
        ...

    @property
    def llm_seconds(self) -> float:
        """Those of `seconds` that were spent in the LLM."""
        ...

    @property
    def distinct_sequences(self) -> int:
        """Sequences that the last batch's rows came from: how well the pool mixes."""
        ...

    @property
    def epoch(self) -> int:
        """Times the text has been begun, from 1."""
        ...


class Rows(NamedTuple):
    """What training may read of one LLM batch, in the order of the text."""

    activations: dict[Site, Tensor]
    """{site: [n, d]}; row i is the same token at every site."""

    ids: Tensor
    """[n] int64 on the CPU; the sequence that each row came from."""


class RowSource(Protocol):
    """An endless row of LLM batches that depends on no run's length, batch or pool.

    Its state can be given to any other source of the same rows: a run goes on exactly whether the
    LLM computes what follows or a cache holds it.
    """

    sites: tuple[Site, ...]
    """The sites of its rows, ascending."""

    device: torch.device
    """Where training wants the rows."""

    most: int
    """Rows that an LLM batch has at most."""

    llm_seconds: float
    """Seconds spent in the LLM since this process began, by the CPU's clock."""

    epoch: int
    """Times the text has been begun, from 1."""

    def next(self, wanted: int) -> Rows:
        """The rows of the next LLM batch; the run wants `wanted` rows more, these included."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None:
        """No more rows are wanted."""
        ...


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`. A GPU fetches it while the CPU goes on: from pinned memory, which is not
    used for anything else before the copy is done."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
