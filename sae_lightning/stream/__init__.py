"""Text -> tokens -> activations -> pool -> batches; or known concepts.

A kind of data is a file with its settings and a subclass of `Source`, and a row of `SOURCES`.
"""

from sae_lightning.llm.load import LLMConfig
from sae_lightning.stream.documents import Text
from sae_lightning.stream.hub import Hub
from sae_lightning.stream.local import Local
from sae_lightning.stream.plays import Plays
from sae_lightning.stream.source import DataConfig, Source, TextConfig
from sae_lightning.stream.synthetic import Concepts

SOURCES: dict[str, type[Source]] = {
    "plays": Plays,
    "hub": Hub,
    "local": Local,
    "synthetic": Concepts,
}


def make_source(llm: LLMConfig, data: DataConfig, seed: int) -> Source:
    """The source that the stream half of a config describes."""
    return SOURCES[data.kind](llm, data, seed)


def open_text(data: TextConfig) -> Text:
    """The documents of a text, without an LLM to read them."""
    return make_source(LLMConfig(name="none"), data, seed=0).open_text()
