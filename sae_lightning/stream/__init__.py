"""From text to shuffled batches of activations: text -> tokens -> rows -> pool -> batches.

A kind of data is one file (its settings and a subclass of `DataSource`) and one entry of `SOURCES`.
Two kinds need neither text nor LLM: data=synthetic makes rows from known concepts, and
data=activations reads them from files.
"""

from sae_lightning.llm.load import NO_LLM, LLMConfig
from sae_lightning.stream.activations import ActivationsSource
from sae_lightning.stream.documents import SplitDocuments
from sae_lightning.stream.hub import HubSource
from sae_lightning.stream.local import LocalSource
from sae_lightning.stream.plays import PlaysSource
from sae_lightning.stream.source import DataConfig, DataSource, TextConfig
from sae_lightning.stream.synthetic import SyntheticSource

SOURCES: dict[str, type[DataSource]] = {
    "plays": PlaysSource,
    "hub": HubSource,
    "local": LocalSource,
    "synthetic": SyntheticSource,
    "activations": ActivationsSource,
}


def make_source(llm: LLMConfig, data: DataConfig, seed: int) -> DataSource:
    """Make the source that the stream half of a config describes."""
    return SOURCES[data.kind](llm, data, seed)


def open_text(data: TextConfig) -> SplitDocuments:
    """Open the documents that `data` describes, without loading an LLM."""
    # the seed only orders tokens: it does not change the documents
    return make_source(LLMConfig(name=NO_LLM), data, seed=0).open_quietly()
