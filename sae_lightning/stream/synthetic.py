"""Rows and held-out samples of a world whose concepts are known: no text and no LLM.

Shapes: n = samples, concepts, dim = length of an activation.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from sae_lightning.llm.sites import Site
from sae_lightning.stream.base import Rows
from sae_lightning.stream.concepts import World, make_world
from sae_lightning.stream.text import SyntheticConfig

MOST = 2048  # rows sampled at a time


def open_world(data: SyntheticConfig) -> World:
    """The concepts that `data` describes."""
    return make_world(
        concepts=data.concepts,
        dim=data.dim,
        l0=data.l0,
        zipf=data.zipf,
        correlation=data.correlation,
        hierarchy=data.hierarchy,
        seed=data.seed,
    )


def generator(purpose: str, seed: int) -> Generator:
    """Random numbers for one purpose: those of another purpose differ, whatever the seeds."""
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:4]))  # all the bits that the CPU's takes


class ConceptRows:
    """A `RowSource` of fresh samples: no activation is ever seen twice.

    Sampled on the CPU, so that rows are the same on every device.
    """

    def __init__(
        self, world: World, sites: Sequence[Site], *, seed: int, device: torch.device | str
    ) -> None:
        self.world, self.sites, self.device = world, tuple(sites), torch.device(device)
        self.most = MOST
        self.llm_seconds = 0.0
        self.epoch = 1
        self._generator = generator("training", seed)
        self._served = 0  # rows

    def next(self, wanted: int) -> Rows:
        """As many rows each time, whatever is `wanted`; each is a sequence of its own."""
        x, _ = self.world.sample(self.most, self._generator)
        ids = torch.arange(self._served, self._served + len(x))
        self._served += len(x)
        return Rows(dict.fromkeys(self.sites, x.to(self.device)), ids)

    def state_dict(self) -> dict[str, Any]:
        """Rows served, and the generator."""
        return {"served": self._served, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last row served when the state was saved."""
        self._served = state["served"]
        self._generator.set_state(state["generator"])

    def close(self) -> None:
        """Nothing is held."""


class HeldOutConcepts:
    """Samples that training never sees, and what they are made of: evaluation's counterpart of
    `HeldOut`, without an LLM whose loss could be measured."""

    def __init__(self, world: World, *, seed: int, tokens: int, device: torch.device | str) -> None:
        """`tokens` samples; with the world's `seed` all runs in it are judged by the same."""
        self.world = world
        samples = generator("held out", seed)
        counts = [min(MOST, tokens - done) for done in range(0, tokens, MOST)]
        x, strengths = zip(*(world.sample(n, samples) for n in counts), strict=True)
        self._x = torch.cat(x).to(device)
        self.strengths = torch.cat(strengths)
        """[n, concepts], on the CPU"""

    def activations(self, site: Site) -> Tensor:
        """Activations [n, dim]."""
        return self._x
