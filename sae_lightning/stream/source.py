"""The base class of all kinds of data, and the interface of its rows of activations."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.llm.load import LLM, Dtype, LLMConfig, pick_device, pick_dtype
from sae_lightning.llm.packaged import LLMShape
from sae_lightning.llm.sites import LayerConfig, Site, SitePair
from sae_lightning.ranks import FeatureSplit
from sae_lightning.stream.local_files import make_absolute

if TYPE_CHECKING:
    from sae_lightning.stream.documents import Documents
    from sae_lightning.stream.tokens import SplitTokens


class Rows(NamedTuple):
    """The activations of an LLM batch that are trained on, or a shuffled batch of them."""

    activations: dict[Site, Tensor]
    """{site: [n, d]}; row i is the same token at every site."""
    sequence_ids: Tensor
    """[n] int64 on the CPU: the sequence that each row comes from"""


class RowStream(Protocol):
    """An endless stream of rows, the same for any length, batch and pool of a run. It serves one
    LLM batch at a time; without an LLM, up to `max_rows` rows, here also called an LLM batch.

    The state of one stream loads into another stream of the same rows: a run resumes exactly
    whether the LLM computes the rows or a cache holds them.
    """

    sites: tuple[Site, ...]  # ascending
    device: torch.device
    """Device that the rows are on."""
    max_rows: int
    """Maximum number of rows of an LLM batch."""
    llm_seconds: float
    """Seconds that this process has spent in the LLM, by the CPU's clock."""
    epoch: int
    """The current epoch, from 1; an epoch is one reading of all data."""

    def next(self, remaining: int) -> Rows:
        """Return the rows of the next LLM batch. `remaining`: rows that the run still needs, beyond
        which nothing is computed in advance."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream: plain values and CPU tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position."""

    def close(self) -> None:
        """Release files and locks once no more rows are needed."""


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Settings that every kind of data has."""

    kind: str = ""
    """The kind of data; set by the preset."""

    pool: int = 65536
    """Tokens in the shuffle pool that batches are drawn from; at least the batch."""

    def __post_init__(self) -> None:
        if self.pool < 1:
            raise UserError(f"data.pool={self.pool}: give a positive number of tokens")

    @property
    def rows_depend_on_site(self) -> bool:
        """Whether the sites decide which tokens are dropped; SAEs at different sites then cannot
        share a pass of the LLM."""
        return False

    def with_absolute_paths(self) -> "DataConfig":
        """Return these settings with paths that are valid in every working directory."""
        return self


@dataclass(slots=True, kw_only=True)
class TextConfig(DataConfig):
    """Settings that every kind of text has."""

    context: int = 128
    """Tokens per sequence, the opening BOS included."""

    max_norm: float | None = None
    """Drop activations whose norm exceeds this multiple of the median norm; null keeps all."""

    keep_special: bool = False
    """Train on the activations of special tokens too (BOS, at position 0, is always dropped)."""

    cache: bool = False
    """Keep the LLM's activations on disk, and read those that are there already."""

    cache_folder: str | None = None
    """Folder of the cache; null is `sae_lightning/activations` in the user's cache folder."""

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
    def rows_depend_on_site(self) -> bool:
        return self.max_norm is not None

    def hash_files(self) -> str | None:
        """Hash a streamed text's list of files; None if the text itself is hashed, or the list
        cannot be read."""
        return None

    def with_absolute_paths(self) -> "TextConfig":
        return replace(self, cache_folder=self.cache_folder and make_absolute(self.cache_folder))


class HeldOutData(Protocol):
    """Activations that training never sees, on which SAEs are measured."""

    noun: ClassVar[str]  # what messages call the data: text, samples, rows

    def activations(self, site: Site) -> Tensor:
        """Return the activations [n, d] at `site`."""

    def measure_saes(
        self,
        source: Site,
        target: Site,
        saes: Sequence[Callable[[Tensor], Any]],
        weights: Sequence[Callable[[], dict[str, Tensor]]],
        rows_per_call: int,
        splits: Sequence[FeatureSplit],
        means: Sequence[Tensor] = (),
    ) -> list[Any]:
        """Return for each SAE the metrics that only this kind of data has; None if not measured.

        saes: functions from activations [n, d_in] at `source`, n <= rows_per_call, to an `Output`
        that reconstructs [n, d_out] at `target`. weights: functions that return an SAE's weights
        for raw activations. splits: how each SAE's features are spread over ranks. means: each
        SAE's mean reconstruction [d_out], for the metric `ce_error`; empty: not measured."""
        return [None] * len(saes)

    def prepare(self, targets: Collection[Site]) -> None:
        """Compute what all ranks must compute together before SAEs with `targets` are measured."""


class Needs(NamedTuple):
    """What a run needs of its data."""

    sites: Sequence[Site]
    tokens: int
    """Held-out tokens."""
    loss_tokens: int
    """How many of the held-out tokens the LLM's loss is measured on; 0: not measured."""
    ahead: int = 0
    """Rows to prefetch while SAEs train; 0: none."""
    resumed: bool = False
    """Whether the run resumes: if the disk is too full for a cache, it goes on without writing."""
    own_sites: Sequence[Site] | None = None
    """With several ranks, the sites whose rows this one needs (None: all)."""


class OpenedData(NamedTuple):
    """Rows to train on, and held-out data to evaluate on."""

    rows: RowStream
    held_out: HeldOutData
    about: dict[str, str]
    """Facts about the data to print, {label: text}."""
    modules: dict[Site, str] = {}
    """Name of the LLM's module that returns a site's activations, for sites that have one."""
    tuning_text: Any = None
    """A `TuningText`, for `loss.kl`; None without an LLM."""


class DataMemory(NamedTuple):
    """Memory that a kind of data takes, in rows or in elements of tensors."""

    rows: int
    """Rows of one LLM batch."""
    shared: int
    """Elements held once: weights and logits of the LLM, or strengths of concepts."""
    per_sae: int
    """Elements held for each SAE while it is evaluated."""


class DataSource(ABC):
    """A kind of data, as the stream half of a config describes it: an entry of `SOURCES`."""

    settings: ClassVar[type[DataConfig]]
    noun: ClassVar[str]
    """What messages call the data: text, samples, rows."""
    where: ClassVar[str]
    """What messages call this kind of data, after "on" or "with": text, data=synthetic."""
    has_llm: ClassVar[bool]
    """Whether an LLM computes the activations."""
    origin: ClassVar[str]
    """Follows "trained on" in messages: text, synthetic concepts."""
    may_be_from_llm: ClassVar[bool] = True
    """Whether an LLM may have computed the activations, so that analysis can be given a text."""
    metrics: ClassVar[frozenset[str]]
    """Held-out metrics that only this kind of data has and that depend on the SAE."""
    headline: ClassVar[str]
    """The metric that is shown first."""
    labels: ClassVar[tuple[str, ...]] = ()
    """Labels that probes can read from the text; none for most kinds of data."""

    def __init__(self, llm: LLMConfig, data: DataConfig, seed: int) -> None:
        self.llm, self.data, self.seed = llm, data, seed

    @abstractmethod
    def check_settings(self, layer: LayerConfig) -> None:
        """Raise UserError for settings that have no meaning here; reads only the config."""

    def list_metrics(self, loss_tokens: int) -> tuple[frozenset[str], str]:
        """Return the measured `metrics`, and the words after "is not measured" in messages."""
        return self.metrics, f"on {self.where}"

    def resolve_llm(self) -> LLMConfig:
        """Return the LLM's settings, with `auto` (here of the dtype) resolved for this machine."""
        return replace(self.llm, dtype=Dtype(str(pick_dtype(self.llm)).removeprefix("torch.")))

    @abstractmethod
    def read_shape(self) -> LLMShape:
        """Read the LLM's dimensions without loading weights; data without an LLM makes them up."""

    def find_sites(self, layer: LayerConfig, shape: LLMShape) -> SitePair:
        """Return an SAE's source and target site. UserError: the LLM lacks one."""
        return layer.resolve_sites(shape.layers)

    @abstractmethod
    def check_data(self, sites: Sequence[Site], batch: int) -> None:
        """Raise UserError for sites that cannot be read, or too little data for a batch."""

    def check_before_loading(self, shape: LLMShape, resumed: bool) -> None:
        """Raise UserError for mistakes that show before anything is loaded."""
        pick_device(self.llm)  # UserError: there is no such device

    @abstractmethod
    def estimate_data_memory(
        self, sites: Sequence[Site], shape: LLMShape, tokens: int, loss_tokens: int
    ) -> DataMemory:
        """Estimate the memory of a run at `sites` that is evaluated on `tokens` held-out tokens."""

    @abstractmethod
    def check_stream_state(
        self, state: Any, sites: Sequence[Site], shape: LLMShape, served: int
    ) -> None:
        """Raise ValueError unless `state` is a possible state of a run's stream at `sites` after
        `served` batches."""

    @abstractmethod
    def open_data(self, needs: Needs) -> OpenedData:
        """Open rows to train on, and held-out data. UserError: the data cannot be read."""

    @abstractmethod
    def open_held_out(
        self,
        sites: Sequence[Site],
        tokens: int,
        loss_tokens: int,
        opened: "tuple[LLM, SplitTokens] | None" = None,
    ) -> HeldOutData:
        """Open only the held-out data; `opened`: LLM and text, if they are loaded; else None."""

    def open_labelled_documents(self, label: str) -> "Documents":
        """Open documents whose column `label` holds their classes, for probes."""
        raise UserError(
            f"label={label}: data={self.data.kind} holds no text with labels; give "
            "data=shakespeare, data=text or data=hub"
        )

    def describe_sites(self, sites: Sequence[SitePair], shape: LLMShape) -> dict[str, str]:
        """Facts about the sites to print, {label: text}."""
        return {}

    def make_saelens_metadata(self, sites: SitePair) -> dict[str, Any]:
        """Describe an SAE's inputs for SAELens, under its keys."""
        return {"model_name": self.llm.name} | sites.hook_names
