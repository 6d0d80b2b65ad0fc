"""One pass over text that feeds every reducer; memory does not grow with the text.

sequences -> capture -> encode ->  Batch  -> reducer.add(batch), for each reducer

Shapes: sequences = sequences of a batch, context = tokens of each.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from torch import Tensor

from sae_lightning.analysis.subject import Subject
from sae_lightning.stream.packing import Sequences


class Batch(NamedTuple):
    """What the LLM and the SAE make of some sequences; on the LLM's device."""

    tokens: Tensor
    """[sequences, context] int64"""
    keep: Tensor
    """[sequences, context] bool: false for BOS, padding and other special tokens, which an SAE
    never sees"""
    x: Tensor
    """[sequences, context, d_in] activations at the source, float32"""
    y: Tensor
    """[sequences, context, d_out] activations at the target, float32; x itself in an autoencoder"""
    features: Tensor
    """[sequences, context, features] strengths; 0 where not `keep`"""
    ids: Tensor
    """[sequences] numbers of the sequences in the order of reading"""


class Reducer(Protocol):
    """Something that a pass over the text adds up to."""

    def add(self, batch: Batch) -> None:
        """Take in some more sequences; keep nothing that grows with their number."""
        ...


def collect(
    subject: Subject,
    text: Iterable[Sequences],
    reducers: Iterable[Reducer],
    *,
    total: int,
    what: str = "reading text",
) -> None:
    """Feed `text` (`total` sequences) through LLM and SAE to every reducer, with a progress bar."""
    raise NotImplementedError  # in work
