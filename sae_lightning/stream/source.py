"""What training reads: rows of activations, wherever they come from; and the base of all kinds."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.llm.load import LLM, Attention, Dtype, LLMConfig, pick_device, pick_dtype
from sae_lightning.llm.packaged import LLMShape
from sae_lightning.llm.sites import LayerConfig, Site, SitePair

if TYPE_CHECKING:
    from sae_lightning.stream.tokens import SplitTokens


class Rows(NamedTuple):
    """What training may read of one LLM batch, in the order of the text."""

    activations: dict[Site, Tensor]
    """{site: [n, d]}; row i is the same token at every site."""

    ids: Tensor
    """[n] int64 on the CPU; the sequence that each row came from."""


class RowStream(Protocol):
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


def move_to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`. A GPU fetches it while the CPU goes on: from pinned memory, which is not
    used for anything else before the copy is done."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """What all data has in common."""

    kind: str = ""
    """Row of `SOURCES`; set by the preset."""

    pool: int = 65536
    """Tokens in the shuffle pool that batches are drawn from; at least the batch."""

    def __post_init__(self) -> None:
        if self.pool < 1:
            raise UserError(f"data.pool={self.pool}: give a positive number of tokens")

    @property
    def per_site(self) -> bool:
        """Whether the site decides which tokens are dropped, so that SAEs at two sites cannot share
        a pass."""
        return False

    def with_absolute_paths(self) -> "DataConfig":
        """The same for every working folder."""
        return self


@dataclass(slots=True, kw_only=True)
class TextConfig(DataConfig):
    """How text becomes shuffled activations, whatever the text is."""

    context: int = 128
    """Tokens per sequence, the opening BOS included."""

    max_norm: float | None = None
    """Drop activations whose norm exceeds this multiple of the median norm; null keeps all."""

    keep_special: bool = False
    """Train on the activations of special tokens too (BOS, at position 0, is always dropped)."""

    cache: bool = False
    """Keep the LLM's activations on disk, and read them from there where they are kept already."""

    cache_folder: str | None = None
    """Folder of the cached activations; null is `activations` in the user's cache folder."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        if self.cache_folder is not None and not self.cache:
            raise UserError(
                f"data.cache_folder={self.cache_folder} has no meaning without data.cache=true: "
                "add that, or leave the folder out (null)"
            )
        if self.context < 2:
            raise UserError(
                f"data.context={self.context}: a sequence needs BOS and a token; give 2 or more"
            )
        if self.max_norm is not None and not self.max_norm > 1:
            raise UserError(
                f"data.max_norm={self.max_norm}: a multiple of the median norm; "
                "give more than 1 (10 is usual), or null to keep everything"
            )

    @property
    def per_site(self) -> bool:
        return self.max_norm is not None

    def files_hash(self) -> str | None:
        """What tells the files of a streamed text from others; None where the text itself does, or
        it cannot be known."""
        return None

    def with_absolute_paths(self) -> "TextConfig":
        return replace(self, cache_folder=self.cache_folder and make_absolute(self.cache_folder))


def make_absolute(path: str) -> str:
    """`path` for every working folder."""
    return os.path.abspath(os.path.expanduser(path))


class OpenedData(NamedTuple):
    """Rows to train on and others to evaluate on."""

    rows: RowStream
    held_out: Any
    """HeldOut or HeldOutConcepts: `activations(site)`, and `scores` of SAEs on them."""
    about: dict[str, str]
    """What they come from, for a person."""
    modules: dict[Site, str] = {}
    """Names of the LLM's modules at the sites."""


class DataMemory(NamedTuple):
    """What a kind of data holds in memory, in numbers unless it says rows."""

    rows: int
    """Rows of one LLM batch."""
    shared: int
    """Held once, besides rows: weights of the LLM, its logits, strengths of concepts."""
    per_sae: int
    """Held for each SAE while it is evaluated."""


class Source(ABC):
    """A kind of data, as the stream half of a config describes it: a row of `SOURCES`."""

    settings: ClassVar[type[DataConfig]]
    noun: ClassVar[str]
    """What activations are made from: text, samples."""
    where: ClassVar[str]
    """The data in a sentence: text, data=synthetic."""
    has_llm: ClassVar[bool]
    """Whether an LLM computes the activations."""
    measures: ClassVar[frozenset[str]]
    """Held-out metrics that depend on the SAE, besides those of every kind of data."""
    headline: ClassVar[str]
    """The one of them that is shown first."""
    labels: ClassVar[tuple[str, ...]] = ()
    """Labels that the text is known to have, for probes."""

    def __init__(self, llm: LLMConfig, data: DataConfig, seed: int) -> None:
        self.llm, self.data, self.seed = llm, data, seed

    @abstractmethod
    def check_settings(self, layer: LayerConfig) -> None:
        """UserError for settings that mean nothing with this data, by the config alone."""

    def measured(self, loss_tokens: int) -> tuple[frozenset[str], str]:
        """What is measured with so many tokens for the LLM's loss, and where that is."""
        return self.measures, f"on {self.where}"

    def settled(self) -> LLMConfig:
        """The LLM's settings with dtype and attention as they are on this machine."""
        number = pick_dtype(self.llm)
        name = Dtype(str(number).removeprefix("torch."))
        return replace(self.llm, dtype=name, attn=self._attention(number))

    def _attention(self, number: torch.dtype) -> Attention:
        return self.llm.attn

    @abstractmethod
    def shape(self) -> LLMShape:
        """Blocks, width and context of what makes the activations; no weight is read."""

    def check(self, shape: LLMShape, resumed: bool) -> None:
        """UserError for what can be known to be wrong before anything is loaded."""
        pick_device(self.llm)

    @abstractmethod
    def memory(
        self, sites: Sequence[Site], shape: LLMShape, tokens: int, loss_tokens: int
    ) -> DataMemory:
        """Estimate of what a run at `sites` holds, with `tokens` and `loss_tokens` held out."""

    @abstractmethod
    def check_stream(self, state: Any, sites: Sequence[Site], shape: LLMShape, served: int) -> None:
        """ValueError unless `state` can be that of a run's stream at `sites` after `served`
        batches."""

    @abstractmethod
    def open(
        self,
        sites: Sequence[Site],
        *,
        tokens: int,
        loss_tokens: int,
        ahead: int = 0,
        resumed: bool = False,
    ) -> OpenedData:
        """Rows at `sites`, `ahead` of them computed while SAEs train, and `tokens` held-out ones,
        with the LLM's loss on `loss_tokens` of them. UserError in a new run, not in a `resumed`
        one, where there is no space for a cache of the rows."""

    @abstractmethod
    def open_held_out(
        self,
        sites: Sequence[Site],
        tokens: int,
        loss_tokens: int,
        opened: "tuple[LLM, SplitTokens] | None" = None,
    ) -> Any:
        """What a run is evaluated on; `opened`: LLM and text, where they are open already."""

    def describe_sites(self, sites: Sequence[SitePair], width: int) -> dict[str, str]:
        """Where SAEs read, for a person."""
        return {}

    def metadata(self) -> dict[str, Any]:
        """What SAELens wants to know of an SAE's inputs."""
        return {"model_name": self.llm.name}
