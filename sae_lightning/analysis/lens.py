"""What features say to the output and read at the input, from weights alone.

    token -> embedding -> ... -> [ W_enc  feature  W_dec ] -> ... -> final norm -> W_U -> logits
                        reads                                promotes, suppresses

Both are direct paths: what blocks in between make of a token or of a feature is not seen. So the
effect is most telling in late blocks, and what is read in early ones.

Shapes: features = features of the SAE; k = tokens listed; d = width of the residual stream.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lightning.analysis.catalogue import Effect
from sae_lightning.analysis.section import Section, Table
from sae_lightning.analysis.subject import Subject
from sae_lightning.llm.direct_path import embedding, final_norm, mlp_norm
from sae_lightning.llm.sites import Kind
from sae_lightning.terminal import phase

NUMBERS = 2**24  # of effects on tokens that are in memory at a time
SHARPEST = 10  # features shown where none is asked for


class Lens(NamedTuple):
    """The vocabulary as features see it."""

    effect: Effect | None
    """Tokens promoted and suppressed; None where the target does not write into the residual
    stream (mlp_in)."""
    read: Tensor | None
    """[features, k] ids whose embedding the encoder likes best, int64; None where the source is
    what a branch adds (attn, mlp), which has no direct path from the embedding."""


@torch.no_grad()
def lens(subject: Subject, top: int = 10) -> Lens:
    """The `top` tokens that each feature promotes, suppresses and reads.

    Effect: W_U (gain * centred(row of W_dec)), the change of the logits for a small strength, up to
    the positive scale of the final norm (and before a cap such as Gemma-2's): a ranking, no size.

    Reading: the column of W_enc times each token's embedding, less the mean embedding, for resid;
    for mlp_in the column is first taken back through the norm of the MLP, up to its scale. An
    embedding is far shorter than a later residual stream, and a bias comes on top: the ranking says
    which token the feature looks for, not that it fires on it. Position embeddings add the same to
    every token, so that they are left out.
    """
    model, (source, target) = subject.llm.model, subject.sites
    unembedding = model.get_output_embeddings().weight
    # Rows beyond the tokenizer pad the matrix: no token has them.
    words = min(len(subject.llm.tokenizer), len(unembedding))
    top = min(top, words)

    effect = read = None
    if target.kind is not Kind.mlp_in:
        rows = final_norm(model).passes(subject.sae.W_dec)
        effect = Effect(*_along("unembedding", rows, unembedding[:words], _effect, top))
    if source.kind in (Kind.resid, Kind.mlp_in):
        columns = subject.sae.W_enc.T
        if source.kind is Kind.mlp_in:
            columns = mlp_norm(model, source.layer).reads(columns)
        (read,) = _along("embedding", columns, embedding(model, words), _liked, top)
    return Lens(effect, read)


def section(lens: Lens, words: list[str], features: list[int] | None = None) -> Section:
    """The tokens of some features, by default those with the sharpest effect; words: each id as it
    reads."""
    if lens.effect is None and lens.read is None:
        return Section("Lens", "Neither the source nor the target is on a direct path to tokens.")
    chosen = _sharpest(lens) if features is None else features
    columns = {"reads": lens.read}
    if lens.effect:
        columns |= {"promotes": lens.effect.promoted, "suppresses": lens.effect.suppressed}
    columns = {name: ids for name, ids in columns.items() if ids is not None}
    rows = [
        [str(i), *(" ".join(repr(words[t]) for t in ids[i].tolist()) for ids in columns.values())]
        for i in chosen
    ]
    header = ["feature", *columns]
    if lens.effect:
        header.append("sharpness")
        for row, i in zip(rows, chosen, strict=True):
            row.append(f"{lens.effect.sharpness[i]:.1f}")
    return Section("Lens", _lead(lens, features), table=Table(header, rows))


def _sharpest(lens: Lens) -> list[int]:
    if lens.effect is None:
        return list(range(min(SHARPEST, len(lens.read))))
    return lens.effect.sharpness.topk(min(SHARPEST, len(lens.effect.sharpness))).indices.tolist()


def _lead(lens: Lens, features: list[int] | None) -> str:
    lead = ""
    if lens.effect:
        which = "the features with the sharpest effect" if features is None else "these features"
        lead = f"Tokens that {which} make likelier and unlikelier along the direct path. "
    return lead


def _along(
    what: str,
    directions: Tensor,
    vocabulary: Tensor,
    function: Callable[[Tensor, int], list[Tensor]],
    top: int,
) -> list[Tensor]:
    """function(products, top) of directions [features, d] with tokens [vocabulary, d], on the CPU;
    products: [some features, vocabulary]."""
    tokens, found = vocabulary.float().T, []
    with phase(f"features at the {what}", total=len(directions)) as advance:
        for part in directions.split(max(1, NUMBERS // len(vocabulary))):
            found.append([x.cpu() for x in function(part @ tokens, top)])
            advance(len(part))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _effect(logits: Tensor, top: int) -> list[Tensor]:
    """Promoted and suppressed ids and the sharpness of effects [features, vocabulary]."""
    best, worst = logits.topk(top).indices, (-logits).topk(top).indices
    square = (logits - logits.mean(-1, keepdim=True)).square_()
    variance = square.mean(-1).clamp(min=torch.finfo(square.dtype).tiny)
    return [best, worst, square.square_().mean(-1) / variance.square() - 3]


def _liked(products: Tensor, top: int) -> list[Tensor]:
    return [products.topk(top).indices]
