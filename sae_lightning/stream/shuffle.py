"""The shuffle pool that batches are drawn from."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.llm.placement import move_to_device
from sae_lightning.llm.sites import Site
from sae_lightning.stream.source import Rows


class Pool:
    """Activations of all sites, from which random rows are taken without replacement.

    add     | a b c d e f g h |               8 rows, room for more behind them
    take 3  | a . c d e . g . |   b f h       any 3 rows, each set of 3 as likely as any other
    fill    | a g c d e |                     the last rows move into the holes: O(batch)

    The same row indices are used at every site, so rows stay aligned across sites.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        capacity: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """`capacity` is in rows (tokens); memory on `device` is allocated at the first `add`."""
        self.sites, self.capacity, self.device = tuple(sites), capacity, torch.device(device)
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._rows: dict[Site, Tensor] = {}  # {site: [capacity, d]}
        self._sequence_ids = torch.empty(capacity, dtype=torch.int64)
        self._filled = 0  # number of rows held

    def __len__(self) -> int:
        return self._filled

    def add(self, activations: Mapping[Site, Tensor], sequence_ids: Tensor) -> None:
        """Append rows {site: [n, d]} of the sequences `sequence_ids` [n]; their dtype is kept.

        UserError: the pool holds rows of another dtype (possible only after a resume)."""
        start, stop = self._filled, self._filled + len(sequence_ids)
        assert stop <= self.capacity, f"{stop} rows in a pool of {self.capacity}"
        for site in self.sites:
            x = activations[site]
            if site not in self._rows:
                self._rows[site] = torch.empty(
                    self.capacity, x.shape[1], dtype=x.dtype, device=self.device
                )
            if x.dtype != self._rows[site].dtype:
                dtype = str(x.dtype).removeprefix("torch.")
                saved = str(self._rows[site].dtype).removeprefix("torch.")
                raise UserError(
                    f"llm.dtype: the LLM computes in {dtype} here, but in the run to be resumed in "
                    f"{saved}; set llm.dtype={saved}, as it was, or start a new run"
                )
            self._rows[site][start:stop] = x
        self._sequence_ids[start:stop] = sequence_ids
        self._filled = stop

    def take(self, batch: int) -> Rows:
        """Remove and return `batch` random rows {site: [batch, d]} and their sequence ids."""
        assert batch <= self._filled, f"{batch} rows from a pool that holds {self._filled}"
        indices = self._random.choice(self._filled, batch, replace=False, shuffle=False)
        taken = self._copy(torch.from_numpy(indices))
        self._filled -= batch
        # Rows that were not taken and lie beyond the new end fill the holes before it.
        holes = torch.from_numpy(indices[indices < self._filled])
        beyond = np.arange(self._filled, self._filled + batch)
        movers = torch.from_numpy(np.setdiff1d(beyond, indices, assume_unique=True))
        self._sequence_ids[holes] = self._sequence_ids[movers]
        holes, movers = move_to_device(holes, self.device), move_to_device(movers, self.device)
        for rows in self._rows.values():
            rows.index_copy_(0, holes, rows.index_select(0, movers))
        return taken

    def peek(self, n: int) -> Rows:
        """Copy n rows (all, if there are fewer) without removing them or advancing the RNG.

        They are spread evenly over the pool, so early and late sequences are both included.
        """
        n = min(n, self._filled)
        return self._copy(torch.from_numpy(np.linspace(0, self._filled - 1, n).astype(np.int64)))

    def _copy(self, indices: Tensor) -> Rows:
        """Copy the rows at `indices`, which are on the CPU."""
        on_device = move_to_device(indices, self.device)
        # on a CPU, ten times as fast as indexing with brackets
        rows = {site: self._rows[site].index_select(0, on_device) for site in self.sites}
        return Rows(rows, self._sequence_ids[indices])

    def state_dict(self) -> dict[str, Any]:
        """The filled rows, on the CPU, and the RNG's state: plain values and tensors."""
        return {
            "rows": {
                str(site): rows[: self._filled].to("cpu", copy=True)
                for site, rows in self._rows.items()
            },
            "ids": self._sequence_ids[: self._filled].clone(),
            "random": self._random.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the rows at this pool's sites from a state, which may hold other sites too.

        UserError: the state lacks one of the sites.
        """
        self._filled, self._rows = 0, {}
        saved = state["rows"]
        if saved:
            missing = [str(site) for site in self.sites if str(site) not in saved]
            if missing:
                raise UserError(
                    f"layer: the run to be resumed read {', '.join(saved)}, not "
                    f"{', '.join(missing)}; resume it with its own layer.index, layer.source and "
                    "layer.target"
                )
            self.add({site: saved[str(site)] for site in self.sites}, state["ids"])
        self._random.bit_generator.state = state["random"]
