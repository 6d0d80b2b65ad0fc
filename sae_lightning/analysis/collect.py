"""Reads a text once and hands each batch to every reducer; only one batch is in memory.

sequences -> capture -> encode -> EncodedBatch -> reducer.add(batch), for each reducer
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sae_lightning.analysis.subject import Subject
from sae_lightning.llm.capture import capture
from sae_lightning.llm.sites import distinct_sites
from sae_lightning.llm.vocabulary import find_special_ids
from sae_lightning.runs.heap import give_back_freed_memory, keep_freed_memory
from sae_lightning.sae import SAE
from sae_lightning.sae.firing import encode_firing
from sae_lightning.stream.packing import Sequences, TokenStream
from sae_lightning.stream.rows import compute_medians, mark_usual_rows
from sae_lightning.terminal import console, phase

MAX_STRENGTHS = 1 << 25  # feature activations in memory at a time (128 MB)


@dataclass(eq=False)
class EncodedBatch:
    """Sequences, activations and features, on the LLM's device unless stated otherwise."""

    tokens: Tensor
    """[sequences, context] int64"""
    keep: Tensor
    """[sequences, context] bool: false for tokens that training drops: BOS, padding, other special
    tokens (unless data.keep_special), and those with a norm too large for data.max_norm"""
    x: Tensor
    """[sequences, context, d_in] activations at the source, float32"""
    y: Tensor
    """[sequences, context, d_out] activations at the target, float32; x itself in an autoencoder"""
    active_features: tuple[Tensor, Tensor]
    """Strengths [sequences, context, active] of the features that are active in the batch, 0 where
    not `keep`, and their indices [active], ascending, on the CPU; active = 0 if the SAE was not
    run"""
    sequence_indices: Tensor
    """[sequences] index of each sequence in reading order, on the CPU"""


class Reducer(Protocol):
    """Accumulates a result over one pass through the text."""

    def add(self, batch: EncodedBatch) -> None:
        """Accumulate a batch; must not keep whole batches, which would fill the memory."""


def excerpt(text: TokenStream, tokens: int, batch: int) -> tuple[Iterator[Sequences], int]:
    """Take the next `tokens` tokens of a text, rounded up to whole sequences, or all of a shorter
    text. Returns them in batches of `batch` sequences, and the total number of sequences."""
    needed = -(-tokens // text.packing.window_size)
    # A text is not read twice: a repeated sequence would count as a second example. A streamed
    # text has no `window_count`, because its length is unknown.
    total = min(needed, getattr(text, "window_count", needed))
    if total < needed:
        console.print(f"the text has fewer than {tokens:,} tokens: all of it is read, once")
    return (text.next(min(batch, total - start)) for start in range(0, total, batch)), total


@torch.no_grad()
def collect(
    subject: Subject,
    text: Iterable[Sequences],
    reducers: Iterable[Reducer],
    *,
    total: int,
    label: str = "reading text",
    encode: bool = True,
    controls: Iterable[tuple[SAE, Iterable[Reducer]]] = (),
) -> None:
    """Run `text` (`total` sequences) through the LLM and, if `encode`, the SAE, and feed every
    reducer; shows a progress bar with a `label`. `controls`: other SAEs of the same sites, each
    with its reducers; they encode the same activations, one SAE after another."""
    data, medians, sequences_read = subject.config.data, None, 0
    pairs = [(subject.sae, reducers), *controls]
    pairs = [(sae, [*its_reducers]) for sae, its_reducers in pairs]  # lists can be read many times
    keep_freed_memory()  # otherwise page faults take much of a large SAE's time
    dropped_ids = torch.tensor([] if data.keep_special else find_special_ids(subject.llm.tokenizer))
    with phase(label, total=total) as advance:
        for sequences in text:
            captured = capture(subject.llm.model, sequences.tokens, distinct_sites([subject.sites]))
            keep = sequences.mark_kept(dropped_ids).to(subject.device)
            if data.max_norm is not None:
                rows = {site: values[keep] for site, values in captured.items()}
                medians = medians or compute_medians(rows)  # from the first batch, as in training
                is_usual = mark_usual_rows(rows, medians, data.max_norm)  # [kept tokens]
                keep = keep.masked_scatter(keep, is_usual)
            indices = torch.arange(sequences_read, sequences_read + len(keep))
            tokens = sequences.tokens.to(subject.device)
            x, y = captured[subject.sites.source], captured[subject.sites.target]
            for sae, its_reducers in pairs:
                for batch in _encode_slices(sae, tokens, keep, x, y, indices, encode):
                    for reducer in its_reducers:
                        reducer.add(batch)
            sequences_read += len(keep)
            advance(len(keep))
    give_back_freed_memory()


def _encode_slices(
    sae: SAE,
    tokens: Tensor,
    keep: Tensor,
    x: Tensor,
    y: Tensor,
    indices: Tensor,
    encode: bool,
) -> Iterator[EncodedBatch]:
    """Split sequences with activations `x` at the source and `y` at the target into batches whose
    feature activations fit into memory, and run the SAE on each batch if `encode`."""
    batch = max(1, MAX_STRENGTHS // (keep.shape[1] * sae.config.features))
    parts = [values.split(batch) for values in (tokens, keep, x, y, indices)]
    for part_tokens, part_keep, part_x, part_y, part_indices in zip(*parts, strict=True):
        part_x = part_x.float()
        part_y = part_x if x is y else part_y.float()
        strengths = part_x.new_empty(part_keep.numel(), 0)
        features = torch.empty(0, dtype=torch.int64)
        if encode:
            strengths, features = encode_firing(sae, part_x.flatten(0, 1), part_keep.flatten())
        active = strengths.view(*part_keep.shape, len(features)), features.cpu()
        yield EncodedBatch(part_tokens, part_keep, part_x, part_y, active, part_indices)
