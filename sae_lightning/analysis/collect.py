"""One pass over text that feeds every reducer; memory does not grow with the text.

sequences -> capture -> encode -> EncodedBatch -> reducer.add(batch), for each reducer

Shapes: sequences = sequences of a batch, context = tokens of each.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from sae_lightning.analysis.subject import Subject
from sae_lightning.llm.capture import capture
from sae_lightning.llm.sites import Site, distinct_sites
from sae_lightning.llm.vocabulary import find_special_ids
from sae_lightning.runs.heap import give_back_freed_memory, keep_freed_memory
from sae_lightning.stream.packing import Sequences, TokenStream
from sae_lightning.stream.rows import compute_medians, find_usual_rows
from sae_lightning.terminal import console, phase

MAX_STRENGTHS = 1 << 25  # of features that are in memory at a time (128 MB)


@dataclass(eq=False)
class EncodedBatch:
    """What the LLM and the SAE make of some sequences; on the LLM's device."""

    tokens: Tensor
    """[sequences, context] int64"""
    keep: Tensor
    """[sequences, context] bool: false for what the SAE never saw in training: BOS, padding, other
    special tokens, norms that are too large"""
    x: Tensor
    """[sequences, context, d_in] activations at the source, float32"""
    y: Tensor
    """[sequences, context, d_out] activations at the target, float32; x itself in an autoencoder"""
    features: Tensor
    """[sequences, context, features] strengths; 0 where not `keep`; no features where nobody asked
    for them"""
    ids: Tensor
    """[sequences] numbers of the sequences in the order of reading"""

    @cached_property
    def active_features(self) -> tuple[Tensor, Tensor]:
        """Features that are active somewhere here: strengths [sequences, context, some], and their
        numbers [some], ascending, on the CPU. Of very many features they are few."""
        fires = self.features.flatten(0, 1).amax(dim=0) > 0
        units = fires.nonzero().squeeze(1)
        return self.features.index_select(-1, units), units.cpu()


class Reducer(Protocol):
    """Something that a pass over the text adds up to."""

    def add(self, batch: EncodedBatch) -> None:
        """Take in some more sequences; keep nothing that grows with their number."""
        ...


def excerpt(source: TokenStream, tokens: int, batch: int) -> tuple[Iterator[Sequences], int]:
    """At least `tokens` tokens of a text, or all of a shorter one, `batch` sequences at a time; and
    how many sequences those are."""
    wanted = -(-tokens // source.packing.width)
    # what is read twice would be its own second example; a streamed text knows no length
    total = min(wanted, getattr(source, "windows", wanted))
    if total < wanted:
        console.print(f"the text has fewer than {tokens:,} tokens: all of it is read, once")
    return (source.next(min(batch, total - n)) for n in range(0, total, batch)), total


@torch.no_grad()
def collect(
    subject: Subject,
    text: Iterable[Sequences],
    reducers: Iterable[Reducer],
    *,
    total: int,
    what: str = "reading text",
    encode: bool = True,
) -> None:
    """Feed `text` (`total` sequences) through LLM and SAE to every reducer, with a progress bar;
    `encode`: reducers look at features."""
    data, reducers, usual, read = subject.config.data, list(reducers), None, 0
    keep_freed_memory()  # or every batch waits for its pages: half of the time of a large SAE
    dropped = torch.tensor([] if data.keep_special else find_special_ids(subject.llm.tokenizer))
    with phase(what, total=total) as advance:
        for sequences in text:
            captured = capture(subject.llm.model, sequences.tokens, distinct_sites([subject.sites]))
            keep = (sequences.text & ~torch.isin(sequences.tokens, dropped)).to(subject.device)
            if data.max_norm is not None:
                rows = {site: values[keep] for site, values in captured.items()}
                usual = usual or compute_medians(rows)  # those of the first batch, as in training
                keep = keep.masked_scatter(keep, find_usual_rows(rows, usual, data.max_norm))
            ids = torch.arange(read, read + len(keep))
            tokens = sequences.tokens.to(subject.device)
            for batch in _encode_slices(subject, tokens, keep, captured, ids, encode):
                for reducer in reducers:
                    reducer.add(batch)
            read += len(keep)
            advance(len(keep))
    give_back_freed_memory()


def _encode_slices(
    subject: Subject,
    tokens: Tensor,
    keep: Tensor,
    captured: dict[Site, Tensor],
    ids: Tensor,
    encode: bool,
) -> Iterator[EncodedBatch]:
    """Some sequences at a time, so that their features fit into memory."""
    n = max(1, MAX_STRENGTHS // (keep.shape[1] * subject.features))
    parts = [each.split(n) for each in (tokens, keep, *(captured[s] for s in subject.sites), ids)]
    for part_tokens, part_keep, source, target, part_ids in zip(*parts, strict=True):
        x = source.float()
        y = x if subject.sites.source == subject.sites.target else target.float()
        features = x.new_empty(*part_keep.shape, 0)
        if encode:
            features = subject.sae.encode(x.flatten(0, 1)).view(*part_keep.shape, -1)
            features[~part_keep] = 0
        yield EncodedBatch(part_tokens, part_keep, x, y, features, part_ids)
