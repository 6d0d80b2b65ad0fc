"""`task=lens`: tokens that features promote and suppress at the output, and read at the input.

    token -> embedding -> blocks -> [ W_enc  feature  W_dec ] -> blocks -> norm -> W_U -> logits
                 read                                             promoted, suppressed

The blocks in between are approximated by linear maps, fitted on a little text (Din et al. 2023,
"Jump to conclusions"). For features that the user names, the later blocks are run with the feature
added. Without text, blocks are skipped, as if embedding, site and unembedding shared one space (the
logit lens, nostalgebraist 2020; the direct path, Elhage et al. 2021). Skipping many blocks fails:
after block 9 of SmolLM2-135M (30 blocks), 765 features fire mostly on one token. The linear map
lists that token among the ten that a feature reads for 718 features, the direct path for 2.

Shapes: features = features of the SAE; k = tokens listed per feature; vocabulary = tokens of the
LLM; d = width of the residual stream.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_lightning.analysis.collect import EncodedBatch, collect, excerpt
from sae_lightning.analysis.ranked_tokens import rank_tokens
from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.task import Task, check_at_least, parse_integers
from sae_lightning.errors import UserError
from sae_lightning.llm.directions import (
    find_final_norm,
    find_mlp_norm,
    measure_response,
    read_embedding,
)
from sae_lightning.llm.placement import read_weight
from sae_lightning.llm.sites import Kind
from sae_lightning.llm.splice import run_body
from sae_lightning.llm.vocabulary import read_vocabulary
from sae_lightning.report.catalogue import LogitEffect
from sae_lightning.report.section import ResultTable, Section
from sae_lightning.stream.packing import TokenStream
from sae_lightning.terminal import phase

MAX_PRODUCTS = 2**24  # products of features and tokens in memory at a time
RANKED_AT_ONCE = 32  # features whose tokens are ranked at a time: their logits fit a CPU's cache
SHARPEST_SHOWN = 10  # features shown if the user names none

FIT_TOKENS = 8192  # for fitting the linear maps; three times as many do not improve them
RIDGE_PENALTY = 0.5  # times the mean diagonal of a.T @ a; results are similar from 0.3 to 1
MAX_CONTEXTS = 1000
REFERENCE_FEATURES = 200  # random features, whose mean effect is subtracted from each feature's
CONTEXT_TOKENS = 16  # length of a context; a feature is added at its last token
# Norm of the added vector over the activation's norm; below this, effects are lost in noise.
ADDED_LENGTH = 0.4


@dataclass(slots=True, kw_only=True)
class LensTask(Task):
    """Tokens that features promote and suppress at the output, and read at the input."""

    feature: Any = None
    """A feature or a list of them to print; null prints those with the sharpest effect."""
    top: int = 10
    """Tokens to list for each feature."""
    contexts: int = 16
    """Excerpts of text in which the features of `feature` are added to measure their effect."""
    direct: bool = False
    """Skip the blocks between the SAE and both ends of the LLM (the logit lens); reads no text."""

    def __post_init__(self):
        self.feature = parse_integers("feature", self.feature)
        check_at_least("top", self.top, 1)
        check_at_least("contexts", self.contexts, 1)
        if self.contexts > MAX_CONTEXTS:
            why = f"over {REFERENCE_FEATURES} features are added in each"
            raise UserError(f"contexts={self.contexts}: give at most {MAX_CONTEXTS}; {why}")

    def execute(self, given_settings: Collection[str]) -> None:
        subject = self.load_subject(given_settings)
        named = subject.check_features(self.feature) if self.feature else None
        text = None if self.direct else subject.corpus.train
        result = lens(subject, self.top, text, named or (), self.contexts)
        section = make_lens_section(result, read_vocabulary(subject.llm), named)
        results = section.table._asdict() if section.table else {}
        self.print_and_write(subject, results, [section], feature=named[0] if named else None)


class Lens(NamedTuple):
    """Tokens that features promote, suppress and read."""

    effect: LogitEffect | None
    """Tokens promoted and suppressed; None if no text is read and the target is mlp_in, which has
    no direct path to the logits."""
    read_tokens: Tensor | None
    """[features, k] ids of the tokens with the largest product with the encoder, int64; None if no
    text is read and the source is attn or mlp, to which tokens have no direct path."""


@torch.no_grad()
def lens(
    subject: Subject,
    top: int = 10,
    text: TokenStream | None = None,
    features: Sequence[int] = (),
    contexts: int = 16,
) -> Lens:
    """Find the `top` tokens that each feature promotes, suppresses and reads, by linear maps fitted
    on `text`, or without `text` by the direct path.

    features: with `text`, their effects are measured by adding them, at ADDED_LENGTH, in `contexts`
    excerpts of it. Effects by a linear map are per unit of strength; the direct path has no scale.
    """
    embeddings = _read_embeddings(subject)
    # both [features, d]: what a feature adds to the unembedding's input, its weights on embeddings
    if text is None:
        outputs, inputs = _skip_to_unembedding(subject), _skip_to_embedding(subject)
    else:
        maps = _fit_maps(subject, text, embeddings)
        outputs = _map_to_unembedding(subject, maps)
        inputs = subject.sae.W_enc.T @ maps.below.result().T
        if features:
            outputs[list(features)] = _measure_outputs(subject, text, list(features), contexts)
    read_tokens = None
    if inputs is not None:
        vocabulary = len(subject.llm.tokenizer)  # embeddings beyond it are padding
        parts = _multiply_slices("features at the embedding", inputs, embeddings[:vocabulary])
        read_tokens = torch.cat([part.topk(min(top, vocabulary)).indices for part in parts]).cpu()
    return Lens(None if outputs is None else _unembed(subject, outputs, top), read_tokens)


@torch.no_grad()
def measure_effects(
    subject: Subject, text: TokenStream | None, top: int = 10
) -> LogitEffect | None:
    """Find the `top` tokens that each feature promotes and suppresses, by a linear map fitted on
    `text`, or without `text` by the direct path; None if the target has no direct path."""
    if text is None:
        outputs = _skip_to_unembedding(subject)
    else:
        outputs = _map_to_unembedding(subject, _fit_maps(subject, text, _read_embeddings(subject)))
    return None if outputs is None else _unembed(subject, outputs, top)


def _read_embeddings(subject: Subject) -> Tensor:
    model = subject.llm.model
    return read_embedding(model, model.get_input_embeddings().num_embeddings)  # [vocabulary, d]


def _unembed(subject: Subject, outputs: Tensor, top: int) -> LogitEffect:
    """Find how the logits change when feature i adds outputs[i] [d] to the unembedding's input."""
    vocabulary = len(subject.llm.tokenizer)
    unembedding = read_weight(subject.llm.model.get_output_embeddings())[:vocabulary]
    parts = [
        rank_tokens(part, min(top, vocabulary))
        for changes in _multiply_slices("features at the unembedding", outputs, unembedding)
        for part in changes.split(RANKED_AT_ONCE)
    ]
    parts_by_field = zip(*parts, strict=True)
    return LogitEffect(*(torch.cat(field_parts).cpu() for field_parts in parts_by_field))


def _skip_to_unembedding(subject: Subject) -> Tensor | None:
    """Map W_dec to the unembedding's input [features, d] by the centring and gain of the final norm
    alone. None if there is no direct path."""
    if subject.sites.target.kind is Kind.mlp_in:
        return None
    return find_final_norm(subject.llm.model).apply_linear(subject.sae.W_dec)


def _skip_to_embedding(subject: Subject) -> Tensor | None:
    """Map W_enc's columns back to the embedding [features, d], skipping the blocks; for mlp_in also
    through the MLP's norm. None if there is no direct path."""
    source = subject.sites.source
    if source.kind in (Kind.attn, Kind.mlp):
        return None
    columns = subject.sae.W_enc.T
    if source.kind is Kind.mlp_in:
        columns = find_mlp_norm(subject.llm.model, source.layer).apply_transpose(columns)
    return columns


def _fit_maps(subject: Subject, text: TokenStream, embeddings: Tensor) -> "_Maps":
    """Fit the linear maps for the blocks below and above the SAE on `text`."""
    maps = _Maps(subject.llm.model, embeddings)
    parts, total = excerpt(text, FIT_TOKENS, batch=16)
    collect(subject, parts, [maps], total=total, label="fitting linear maps", encode=False)
    return maps


def _map_to_unembedding(subject: Subject, maps: "_Maps") -> Tensor:
    """Map W_dec to the unembedding's input [features, d] by the linear map for the blocks above,
    and subtract the mean over features, which says nothing about a single feature."""
    outputs = subject.sae.W_dec @ maps.above.result()
    return outputs.sub_(outputs.mean(0))


def _measure_outputs(
    subject: Subject, text: TokenStream, features: list[int], contexts: int
) -> Tensor:
    """Measure the mean change [len(features), d] of the unembedding's input when W_dec[feature],
    scaled to ADDED_LENGTH * the activation's norm, is added at the last token of a context; minus
    the mean change for random features."""
    random = torch.Generator().manual_seed(0)
    reference = torch.randperm(subject.features, generator=random)[:REFERENCE_FEATURES]
    rows = subject.sae.W_dec[torch.cat([torch.tensor(features), reference]).to(subject.device)]
    tokens = text.next(contexts).tokens[:, :CONTEXT_TOKENS]
    with phase("adding features", total=contexts * (1 + len(rows))) as advance:
        changes = measure_response(
            subject.llm.model, tokens, subject.sites.target, rows, ADDED_LENGTH, advance
        )
    return changes[: len(features)] - changes[len(features) :].mean(0)


class _Maps:
    """A reducer: fits a linear map from the embedding to the source, for the blocks `below` it, and
    one from the target to the unembedding's input, for the blocks `above`."""

    def __init__(self, model: nn.Module, embeddings: Tensor):
        self.model, self.embeddings = model, embeddings
        self.below, self.above = _Ridge(), _Ridge()

    def add(self, batch: EncodedBatch) -> None:
        output = run_body(self.model, batch.tokens).last_hidden_state.to(batch.x.device)
        self.below.add(self.embeddings[batch.tokens[batch.keep]], batch.x[batch.keep])
        self.above.add(batch.y[batch.keep], output[batch.keep].float())


class _Ridge:
    """Ridge regression: the B [d_a, d_b] that minimises |b - a B|^2 + ridge |B|^2; a, b centred."""

    def __init__(self):
        self.tokens = 0
        self.sums: list[Tensor] = []

    def add(self, a: Tensor, b: Tensor) -> None:
        sums = [a.sum(0), b.sum(0), a.T @ a, a.T @ b]
        self.sums = [x + y for x, y in zip(self.sums, sums, strict=True)] if self.tokens else sums
        self.tokens += len(a)

    def result(self) -> Tensor:
        a, b, aa, ab = self.sums
        aa, ab = aa - torch.outer(a, a) / self.tokens, ab - torch.outer(a, b) / self.tokens
        ridge = RIDGE_PENALTY * aa.diagonal().mean() * torch.eye(len(aa), device=aa.device)
        return torch.linalg.solve(aa + ridge, ab)


def _multiply_slices(label: str, directions: Tensor, token_vectors: Tensor) -> Iterator[Tensor]:
    """Yield the products [some features, vocabulary] of `directions` [features, d] and
    `token_vectors` [vocabulary, d], as many features at a time as fit into memory."""
    columns = token_vectors.to(directions.device).float().T
    with phase(label, total=len(directions)) as advance:
        for part in directions.split(max(1, MAX_PRODUCTS // columns.shape[1])):
            yield part @ columns
            advance(len(part))


def make_lens_section(
    result: Lens, vocabulary: list[str], features: list[int] | None = None
) -> Section:
    """List the tokens of `features`, by default those with the sharpest effect; vocabulary: the
    text of each token id."""
    features = _pick_sharpest(result) if features is None else features
    columns = {"reads": result.read_tokens}
    if result.effect:
        columns |= {"promotes": result.effect.promoted, "suppresses": result.effect.suppressed}
    columns = {name: ids for name, ids in columns.items() if ids is not None}

    def join_tokens(ids: Tensor) -> str:
        return " ".join(repr(vocabulary[i]) for i in ids.tolist())

    rows = [[str(i), *(join_tokens(ids[i]) for ids in columns.values())] for i in features]
    header = ["feature", *columns]
    if result.effect:
        header.append("sharpness")
        for row, i in zip(rows, features, strict=True):
            row.append(f"{result.effect.sharpness[i]:.1f}")
    table = ResultTable(header, rows) if columns else None
    return Section("Lens", _write_lead(result), table=table)


def _pick_sharpest(result: Lens) -> list[int]:
    """The features with the sharpest effect; the first ones if only the tokens read are known."""
    if result.effect:
        return result.effect.sharpness.argsort(descending=True)[:SHARPEST_SHOWN].tolist()
    count = 0 if result.read_tokens is None else len(result.read_tokens)
    return [*range(min(SHARPEST_SHOWN, count))]


def _write_lead(result: Lens) -> str:
    if result.effect is None and result.read_tokens is None:
        return "There is no direct path from tokens to this source, nor from this target to logits."
    sentences = []
    if result.read_tokens is not None:
        sentences.append("The tokens that each feature's encoder has the largest product with.")
    if result.effect:
        sentences.append(
            "The next tokens that each feature makes more and less likely; sharpness is the excess "
            "kurtosis of this effect over the vocabulary, large if the effect is on few tokens."
        )
    return " ".join(sentences)
