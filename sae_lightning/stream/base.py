"""What training reads: batches of activations, wherever they come from."""

from collections.abc import Iterator
from typing import Any, Protocol

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

    @property
    def seconds(self) -> float:
        """Seconds spent in the stream since this process began, the LLM and the first fill too."""
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
