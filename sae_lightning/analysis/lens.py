"""Tokens that features promote and suppress in the output, and that they read in the input.

    token -> embedding -> blocks -> [ W_enc  feature  W_dec ] -> blocks -> norm -> W_U -> logits
                 read                                             promoted, suppressed

There are two routes. One goes through the blocks in between, on a little text. The direct one
skips them, as if embedding, site and unembedding were one space (the logit lens, nostalgebraist
2020; the direct path, Elhage et al. 2021), and needs weights alone. It holds where it skips little.
Behind block 9 of SmolLM2-135M's 30 it says nothing: of 765 features that fire on one token above
all, it finds that token among the ten that are read for none, the route through blocks for 94 %;
and of the ten tokens that adding a feature promotes it finds 0.2 on average, as chance would.

Shapes: features = features of the SAE; k = tokens listed; vocabulary = tokens; d = width of the
residual stream.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lightning.analysis.catalogue import Effect
from sae_lightning.analysis.collect import Batch, collect, excerpt
from sae_lightning.analysis.section import Section, Table
from sae_lightning.analysis.subject import Subject
from sae_lightning.llm.direct_path import embedding, final_norm, mlp_norm
from sae_lightning.llm.response import response
from sae_lightning.llm.sites import Kind
from sae_lightning.stream.packing import TokenSource
from sae_lightning.terminal import phase

NUMBERS = 2**24  # of products of features and tokens that are in memory at a time
SHARPEST = 10  # features shown where none is asked for

# Text, and what is done with it, for the route through blocks.
TOKENS = 8192  # to learn from where embeddings go; with 3 times as many the result is the same
RIDGE = 0.3  # of the embeddings' mean variance; 0.1 and 1 find fewer of the tokens features fire on
LENGTH = 16  # tokens of the contexts at whose end each feature is added
SHARE = (
    0.4  # how long what is added is, against the activation; less drowns in what any change does
)


class Lens(NamedTuple):
    """The vocabulary as features see it."""

    effect: Effect | None
    """Tokens promoted and suppressed; None where there is no direct path (from mlp_in)."""
    read: Tensor | None
    """[features, k] ids that the encoder likes best, int64; None where there is no direct path (to
    what a branch adds: attn, mlp)."""


@torch.no_grad()
def lens(
    subject: Subject, top: int = 10, text: TokenSource | None = None, contexts: int = 8
) -> Lens:
    """The `top` tokens that each feature promotes, suppresses and reads: through the blocks on some
    tokens of `text`, or by the direct path without one.

    contexts: pieces of text in which each feature is tried; the time taken grows with them.

    Both are rankings. Effects are up to a positive factor (and before a cap such as Gemma-2's);
    what is read says which token a feature looks for, not that it fires on it, for which a bias and
    the text around it count too.
    """
    model, words = subject.llm.model, len(subject.llm.tokenizer)
    tokens = embedding(model, model.get_input_embeddings().num_embeddings)
    if text is None:
        rows, columns = _direct_rows(subject), _direct_columns(subject)
    else:
        rows = _rows_through_blocks(subject, text, contexts)
        columns = _columns_through_blocks(subject, text, tokens)
    effect = read = None
    # Rows beyond the tokenizer pad both matrices: no token has them.
    if rows is not None:
        unembedding = model.get_output_embeddings().weight[:words]
        effect = Effect(*_along("unembedding", rows, unembedding, _effect, top))
    if columns is not None:
        (read,) = _along("embedding", columns, tokens[:words], _liked, top)
    return Lens(effect, read)


def _direct_rows(subject: Subject) -> Tensor | None:
    """What the unembedding gets of W_dec [features, d]: gain * centred(row), the change of the
    logits for a small strength up to the scale of the final norm."""
    if subject.sites.target.kind is Kind.mlp_in:
        return None
    return final_norm(subject.llm.model).passes(subject.sae.W_dec)


def _direct_columns(subject: Subject) -> Tensor | None:
    """What W_enc takes from an embedding [features, d]: its columns, for mlp_in taken back through
    the MLP's norm. Embeddings come centred, because what all tokens share tells none apart; a
    position embedding is such a thing."""
    source = subject.sites.source
    if source.kind in (Kind.attn, Kind.mlp):
        return None
    columns = subject.sae.W_enc.T
    if source.kind is Kind.mlp_in:
        columns = mlp_norm(subject.llm.model, source.layer).reads(columns)
    return columns


def _rows_through_blocks(subject: Subject, text: TokenSource, contexts: int) -> Tensor:
    """What the unembedding gets of W_dec [features, d]: the mean change of its input when a row is
    added at the target, at the last token of some contexts, less what any row changes there."""
    tokens = text.next(contexts).tokens[:, :LENGTH]
    with phase("adding each feature", total=contexts * (1 + subject.features)) as advance:
        rows = response(
            subject.llm.model, tokens, subject.sites.target, subject.sae.W_dec, SHARE, advance
        )
    return rows - rows.mean(0)


def _columns_through_blocks(subject: Subject, text: TokenSource, tokens: Tensor) -> Tensor:
    """What W_enc takes from an embedding [features, d], if blocks were the linear map that fits
    best from embeddings to activations at the source."""
    fit = _Fit(tokens)
    parts, total = excerpt(text, TOKENS, 16)
    collect(subject, parts, [fit], total=total, what="following embeddings")
    return subject.sae.W_enc.T @ fit.result().T


class _Fit:
    """Ridge regression from embeddings to activations, both about their means."""

    def __init__(self, embeddings: Tensor):
        self.embeddings, self.n = embeddings, 0
        self.sums: list[Tensor] = []

    def add(self, batch: Batch) -> None:
        e, x = self.embeddings[batch.tokens[batch.keep]], batch.x[batch.keep]
        sums = [e.sum(0), x.sum(0), e.T @ e, e.T @ x]
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.n else sums
        self.n += len(e)

    def result(self) -> Tensor:
        """[d, d_in]"""
        e, x, ee, ex = self.sums
        ee, ex = ee - torch.outer(e, e) / self.n, ex - torch.outer(e, x) / self.n
        ridge = RIDGE * ee.diagonal().mean() * torch.eye(len(ee), device=ee.device)
        return torch.linalg.solve(ee + ridge, ex)


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
    top = min(top, len(vocabulary))
    with phase(f"features at the {what}", total=len(directions)) as advance:
        for part in directions.split(max(1, NUMBERS // len(vocabulary))):
            found.append([x.cpu() for x in function(part @ tokens, top)])
            advance(len(part))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _effect(logits: Tensor, top: int) -> list[Tensor]:
    """Promoted and suppressed ids and the sharpness of effects [features, vocabulary]."""
    best, worst = logits.topk(top).indices, (-logits).topk(top).indices
    square = (logits - logits.mean(-1, keepdim=True)).square_()
    variance = square.mean(-1).clamp(min=torch.finfo(square.dtype).tiny ** 0.5)
    return [best, worst, square.square_().mean(-1) / variance.square() - 3]


def _liked(products: Tensor, top: int) -> list[Tensor]:
    return [products.topk(top).indices]


def section(lens: Lens, words: list[str], features: list[int] | None = None) -> Section:
    """The tokens of some features, by default those with the sharpest effect; words: each id as it
    reads."""
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
    return Section("Lens", _lead(lens), table=Table(header, rows) if columns else None)


def _sharpest(lens: Lens) -> list[int]:
    if lens.effect is None:
        return [] if lens.read is None else list(range(min(SHARPEST, len(lens.read))))
    sharpness = lens.effect.sharpness
    return sharpness.topk(min(SHARPEST, len(sharpness))).indices.tolist()


def _lead(lens: Lens) -> str:
    if lens.effect is None and lens.read is None:
        return "There is no direct path from tokens to this source, nor from this target to logits."
    said = []
    if lens.read is not None:
        said.append("The tokens that the encoder of each feature looks for.")
    if lens.effect:
        said.append(
            "The next tokens that each makes likelier and unlikelier; sharpness is the excess "
            "kurtosis of that over the vocabulary, large where the effect is on few tokens."
        )
    return " ".join(said)
