"""Activations made of known concepts (data=synthetic), without text or LLM.

Shapes: n = samples, concepts, dim = length of an activation.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from sae_lightning.errors import UserError
from sae_lightning.llm.load import LLM, pick_device
from sae_lightning.llm.packaged import LLMShape
from sae_lightning.llm.sites import LayerConfig, Site
from sae_lightning.ranks import FeatureSplit
from sae_lightning.stream.concepts import (
    MAX_RATE,
    ConceptWorld,
    make_concept_world,
    make_zipf_rates,
)
from sae_lightning.stream.no_llm import NoLLMSource
from sae_lightning.stream.recovery import CONCEPT_METRICS, Recovery, measure_recovery
from sae_lightning.stream.source import (
    DataConfig,
    DataMemory,
    HeldOutData,
    Needs,
    OpenedData,
    Rows,
    RowStream,
)
from sae_lightning.stream.states import ANY_COUNT, expect, expect_stream
from sae_lightning.stream.tokens import SplitTokens

SAMPLED_ROWS = 2048  # rows sampled at a time
MAX_CONCEPTS = 8192


@dataclass(slots=True, kw_only=True)
class SyntheticConfig(DataConfig):
    """Sparse sums of known concepts instead of an LLM's activations (see `ConceptWorld`)."""

    kind: str = "synthetic"

    concepts: int = 1024
    """Number of concepts, each a direction."""

    dim: int = 256
    """Length of an activation."""

    l0: float = 10.0
    """Mean number of concepts that are active in an activation."""

    zipf: float = 1.0
    """Exponent s of Zipf's law: the n-th most frequent concept fires about n^-s as often as the
    first (at most in every second activation); 0 for equally often."""

    correlation: float = 0.0
    """How much the concepts of a group of 8 tend to fire together, from 0 to below 1: the
    correlation of the normal variables that decide what fires."""

    hierarchy: float = 0.0
    """Share of the concepts that fire only where their parent, a more frequent one, fires."""

    seed: int = 0
    """Seed of the directions. It must differ from `model.seed`: with the same one, features would
    start at the concepts, because the RNG draws both in the same way."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        for name in ("concepts", "dim"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}={getattr(self, name)}: give 1 or more")
        if not 0 < self.l0 <= MAX_RATE * self.concepts:
            raise UserError(
                f"data.l0={self.l0}: each of the {self.concepts} concepts is active in at most "
                f"{MAX_RATE:.0%} of activations; give more than 0 and at most "
                f"{MAX_RATE * self.concepts:g}"
            )
        if not 0 <= self.zipf <= 4:
            raise UserError(f"data.zipf={self.zipf}: give an exponent from 0 to 4 (1 is usual)")
        for name in ("correlation", "hierarchy"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"data.{name}={getattr(self, name)}: give 0 to less than 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"data.seed={self.seed}: give 0 or a positive integer below 2**63")
        if self.concepts > MAX_CONCEPTS:
            raise UserError(
                f"data.concepts={self.concepts}: give at most {MAX_CONCEPTS}; matching them one "
                "to one with features takes time that grows with their cube"
            )
        if self.hierarchy > 0:
            self._check_children()

    def _check_children(self) -> None:
        """Raise UserError if children could not be told apart from their parents."""
        children = int(self.hierarchy * self.concepts)
        if not children:
            raise UserError(
                f"data.hierarchy={self.hierarchy}: that is less than one child among "
                f"data.concepts={self.concepts}; give at least {1 / self.concepts:g}, or 0"
            )
        rates = make_zipf_rates(self.concepts, self.l0, self.zipf)
        parents = self.concepts - children
        # `make_concept_world` gives the children to the parents in turn
        parent_rates = rates[torch.arange(children) % parents]
        if (rates[parents:] / parent_rates).max() > 0.9:
            raise UserError(
                f"data.hierarchy={self.hierarchy}: with data.zipf={self.zipf} and "
                f"data.l0={self.l0} some children fire nearly whenever their parent does, and "
                "cannot be told apart from it; give a larger data.zipf, or a smaller data.l0"
            )


def open_concept_world(data: SyntheticConfig) -> ConceptWorld:
    """Make the world of concepts that `data` describes."""
    return make_concept_world(
        concepts=data.concepts,
        dim=data.dim,
        l0=data.l0,
        zipf=data.zipf,
        correlation=data.correlation,
        hierarchy=data.hierarchy,
        seed=data.seed,
    )


def make_generator(purpose: str, seed: int) -> Generator:
    """Make an RNG for `purpose` that differs from those for other purposes, whatever the seeds."""
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:4]))  # the CPU generator uses 32 bits


class ConceptRows(RowStream):
    """A `RowStream` of fresh samples: no activation is ever seen twice.

    Samples are drawn on the CPU, so that they are the same on every device.
    """

    def __init__(
        self, world: ConceptWorld, sites: Sequence[Site], *, seed: int, device: torch.device | str
    ) -> None:
        self.world, self.sites, self.device = world, tuple(sites), torch.device(device)
        self.max_rows = SAMPLED_ROWS
        self.llm_seconds = 0.0
        self.epoch = 1
        self._generator = make_generator("training", seed)
        self._served = 0  # rows served so far

    def next(self, remaining: int) -> Rows:
        """Sample `max_rows` rows, whatever `remaining` is; each row counts as a sequence."""
        x, _ = self.world.sample(self.max_rows, self._generator)
        sequence_ids = torch.arange(self._served, self._served + len(x))
        self._served += len(x)
        return Rows(dict.fromkeys(self.sites, x.to(self.device)), sequence_ids)

    def state_dict(self) -> dict[str, Any]:
        """The number of rows served, and the state of the RNG."""
        return {"served": self._served, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last row served when the state was saved."""
        self._served = state["served"]
        self._generator.set_state(state["generator"])


class HeldOutConcepts(HeldOutData):
    """Samples that training never sees, with the strengths of their concepts: SAEs are measured by
    the concepts that they recover, not by an LLM's loss."""

    noun = "samples"

    def __init__(
        self, world: ConceptWorld, *, seed: int, tokens: int, device: torch.device | str
    ) -> None:
        """Draw `tokens` samples with the `seed` of the world: all runs in this world share them."""
        self.world = world
        generator = make_generator("held out", seed)
        counts = [min(SAMPLED_ROWS, tokens - done) for done in range(0, tokens, SAMPLED_ROWS)]
        samples = [world.sample(n, generator) for n in counts]
        self._x = torch.cat([x for x, _ in samples]).to(device)
        self.strengths = torch.cat([strengths for _, strengths in samples])
        """[n, concepts], on the CPU"""

    def activations(self, site: Site) -> Tensor:
        return self._x

    def measure_saes(
        self,
        source: Site,
        target: Site,
        saes: Sequence[Callable[[Tensor], Any]],
        weights: Sequence[Callable[[], dict[str, Tensor]]],
        rows_per_call: int,
        splits: Sequence[FeatureSplit],
        means: Sequence[Tensor] = (),
    ) -> list[Recovery]:
        """Measure how well each SAE recovers the concepts; `means` are not used."""
        return [
            measure_recovery(
                self.world.directions,
                _join_weights(get_weights(), split),
                self._encode(sae, rows_per_call, split),
            )
            for sae, get_weights, split in zip(saes, weights, splits, strict=True)
        ]

    def _encode(
        self, sae: Callable[[Tensor], Any], n: int, split: FeatureSplit
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield activations, concept strengths and feature strengths of n samples at a time."""
        for x, strengths in zip(self._x.split(n), self.strengths.split(n), strict=True):
            own_features = sae(x).features.cpu()  # [n, features of this rank]
            yield x.cpu(), strengths, split.join(own_features.T).T


def _join_weights(weights: dict[str, Tensor], split: FeatureSplit) -> dict[str, Tensor]:
    """The weights that `measure_recovery` reads, gathered from all ranks."""
    # dimension 0 is the features'; a threshold without dimensions is that of all features
    joined = {"W_enc": split.join(weights["W_enc"].T).T}
    for name in ("b_enc", "W_dec", "threshold"):
        if name in weights:
            joined[name] = split.join(weights[name]) if weights[name].ndim else weights[name]
    return joined


class SyntheticSource(NoLLMSource):
    """Sparse sums of known concepts."""

    data: SyntheticConfig
    settings = SyntheticConfig
    noun, where = "samples", "data=synthetic"
    origin, may_be_from_llm = "synthetic concepts", False
    metrics = frozenset(Recovery._fields) - CONCEPT_METRICS
    headline = "recovered"

    def check_settings(self, layer: LayerConfig) -> None:
        super().check_settings(layer)
        self.refuse_settings("layer", layer, LayerConfig(index=0))

    def read_shape(self) -> LLMShape:
        """The shape of an LLM with one block; the samples take the place of its output."""
        # nothing reads tokens: no limit of the context, and no vocabulary
        return LLMShape(layers=1, width=self.data.dim, context=None, vocabulary=0)

    def estimate_data_memory(
        self, sites: Sequence[Site], shape: LLMShape, tokens: int, loss_tokens: int
    ) -> DataMemory:
        # strengths of the held-out samples, and about 4 arrays [SAMPLED_ROWS, concepts] in `sample`
        shared = (tokens + 4 * SAMPLED_ROWS) * self.data.concepts
        return DataMemory(SAMPLED_ROWS, shared, per_sae=0)

    def check_stream_state(
        self, state: Any, sites: Sequence[Site], shape: LLMShape, served: int
    ) -> None:
        expect(state, {"rows": {"served": ANY_COUNT, "generator": Tensor}}, "stream")
        Generator().set_state(state["rows"]["generator"])
        capacity = self.data.pool + SAMPLED_ROWS  # of the pool
        row_count = state["rows"]["served"]  # each row counts as a sequence
        widths = dict.fromkeys(sites, shape.width)
        expect_stream(state, widths, capacity=capacity, served=served, sequences=row_count)

    def open_data(self, needs: Needs) -> OpenedData:
        world = open_concept_world(self.data)
        rows = ConceptRows(world, needs.sites, seed=self.seed, device=pick_device(self.llm))
        held_out = self.open_held_out(needs.sites, needs.tokens, needs.loss_tokens)
        return OpenedData(rows, held_out, self._describe())

    def open_held_out(
        self,
        sites: Sequence[Site],
        tokens: int,
        loss_tokens: int,
        opened: tuple[LLM, SplitTokens] | None = None,
    ) -> HeldOutConcepts:
        world = open_concept_world(self.data)
        return HeldOutConcepts(
            world, seed=self.data.seed, tokens=tokens, device=pick_device(self.llm)
        )

    def _describe(self) -> dict[str, str]:
        """Describe the concepts, {label: text}."""
        data = self.data
        summary = (
            f"{data.concepts:,} in {data.dim:,} dimensions, {data.l0:g} of them active, "
            f"Zipf exponent {data.zipf:g}"
        )
        structure = {"correlation": data.correlation, "hierarchy": data.hierarchy}
        options = (f", {name} {value:g}" for name, value in structure.items() if value)
        return {"concepts": summary + "".join(options)}
