"""`task=steer`: text that the LLM writes while a feature is strengthened or suppressed.

    add:    y + strength * W_dec[feature]         clamp:  y + (strength - f(x)) * W_dec[feature]

at the target, on every token but BOS; x, y = activations at source and target, f = the feature's
activation on x, strength = the setting, of any sign. (Templeton et al. 2024, "Scaling
monosemanticity", clamp; Turner et al. 2023, "Steering language models with activation
engineering", add.)
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.task import (
    Task,
    as_typed,
    check_at_least,
    parse_integers,
    parse_numbers,
)
from sae_lightning.errors import UserError
from sae_lightning.llm.capture import capture
from sae_lightning.llm.generate import (
    GREEDY,
    Sampling,
    compute_surprisal,
    encode_prompt,
    generate,
    read_context_length,
)
from sae_lightning.llm.vocabulary import read_vocabulary
from sae_lightning.report.section import ColouredText, ResultTable, Section
from sae_lightning.terminal import phase

# Default norms of the added vector, over the median norm of the prompt's activations. After block 9
# of SmolLM2-135M, less hardly changes the text, and 0.5 breaks it (4 nats of surprise per token
# instead of 2).
DEFAULT_LENGTHS = (0.2, 0.3, 0.4)


class Mode(Enum):
    """What a strength does to the feature."""

    add = "add"
    """The strength is added to the feature's activation."""
    clamp = "clamp"
    """The strength replaces the feature's activation: 0 removes the feature."""


@dataclass(slots=True, kw_only=True)
class SteerTask(Task):
    """Text that the LLM writes while a feature is strengthened or suppressed."""

    feature: Any
    """Index of the feature."""
    strength: Any = None
    """A strength or a list of them, in units of the feature's activation; negative ones suppress.
    Null for three at which text usually changes and stays fluent."""
    prompt: str = "Once upon a time"
    """What the text begins with."""
    tokens: int = 60
    """Tokens to write."""
    mode: Mode = Mode.add
    """add or clamp: whether a strength is added to the feature's activation or replaces it."""
    temperature: float = 0.7
    """Sampling temperature; 0 always takes the most likely token."""
    top_p: float = 0.95
    """Sample from the most likely tokens that together have this probability."""

    def __post_init__(self):
        feature = parse_integers("feature", self.feature)
        if feature is None or len(feature) > 1:
            raise UserError(f"feature={as_typed(self.feature)}: give one feature, as feature=87")
        (self.feature,) = feature
        self.strength = parse_numbers("strength", self.strength)
        check_at_least("tokens", self.tokens, 1)
        check_at_least("temperature", self.temperature, 0)
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: give a probability above 0, up to 1")

    def execute(self, given_settings: Collection[str]) -> None:
        subject = self.load_subject(given_settings)
        # refuse a wrong feature or prompt before the LLM is loaded
        subject.check_features([self.feature])
        encode_prompt(subject.tokenizer, self.prompt, self.tokens, subject.context)
        result = steer(
            subject,
            self.feature,
            self.strength,
            self.prompt,
            tokens=self.tokens,
            mode=self.mode,
            sampling=Sampling(self.temperature, self.top_p, self.seed),
        )
        self.print_and_write(
            subject, result.to_dict(), [make_steering_section(result)], feature=self.feature
        )


class Continuation(NamedTuple):
    """The LLM's continuation of the prompt, and how the unsteered LLM and the SAE read it."""

    strength: float | None
    """Strength that was added or clamped to; None for the unsteered LLM."""
    text: str
    """Prompt and continuation."""
    tokens: list[str]
    """Prompt and continuation, token by token, without BOS."""
    activations: list[float]
    """The feature's activation on each of `tokens`, when the unsteered LLM reads the text."""
    written: int
    """Number of tokens in the continuation."""
    surprise: float
    """Mean -log p of the continuation for the unsteered LLM, nats per token; NaN if nothing was
    written. If it is far above that of the unsteered text, steering broke the language."""

    @property
    def activation(self) -> float:
        """The feature's mean activation on the continuation; NaN if nothing was written."""
        activations = self.activations[len(self.activations) - self.written :]
        return sum(activations) / len(activations) if activations else float("nan")


class Steered(NamedTuple):
    """Continuations of a prompt, for several strengths of a feature."""

    feature: int
    mode: Mode
    full_strength: float
    """Strength at which the added vector has the median norm of the prompt's activations."""
    unsteered: Continuation
    """Written by the unsteered LLM, with the same random numbers."""
    steered: list[Continuation]
    """One for each strength."""

    def to_dict(self) -> dict[str, Any]:
        """The content of `steer.json`: fields by key, `whole` for the full strength and `plain` for
        the unsteered text."""
        keys = ("feature", "mode", "whole", "plain", "steered")
        return dict(zip(keys, self, strict=True))


@torch.no_grad()
def steer(
    subject: Subject,
    feature: int,
    strengths: Sequence[float] | None,
    prompt: str,
    *,
    tokens: int = 60,
    mode: Mode = Mode.add,
    sampling: Sampling = GREEDY,
) -> Steered:
    """Have the LLM continue `prompt` by `tokens` tokens, once unsteered and once for each strength.

    strengths: in units of the feature's activation; None for those at which the added vector
    has 0.2, 0.3 and 0.4 times the median norm of the prompt's activations. All continuations are
    sampled in one batch, with the same random numbers (see `generate`)."""
    subject.check_features([feature])
    llm = subject.llm
    ids = encode_prompt(llm.tokenizer, prompt, tokens, read_context_length(llm.model))
    # [prompt tokens, d]; without BOS, which is not steered
    y = capture(llm.model, ids[None], [subject.sites.target])[subject.sites.target][0, 1:]
    full_strength = (y.float().norm(dim=1).median() / subject.sae.W_dec[feature].norm()).item()
    if strengths is None:
        strengths = [float(f"{length * full_strength:.2g}") for length in DEFAULT_LENGTHS]
    strengths = [None, *strengths]  # None: unsteered
    with phase(f"writing {len(strengths)} texts"):
        intervene = _make_intervention(subject, feature, strengths, mode)
        texts = generate(llm, ids, tokens, subject.sites, intervene, len(strengths), sampling)
    vocabulary = read_vocabulary(llm)
    unsteered, *steered = (
        _read_continuation(subject, feature, strength, text, len(ids), vocabulary)
        for strength, text in zip(strengths, texts, strict=True)
    )
    return Steered(feature, mode, full_strength, unsteered, steered)


def _make_intervention(
    subject: Subject, feature: int, strengths: list[float | None], mode: Mode
) -> Callable[[Tensor, Tensor], Tensor]:
    """Make a function (x, y) -> steered y, all [sequences, tokens, d]. Sequence i has strengths[i];
    it is left unsteered if that is None."""
    sae = subject.sae
    # both [sequences, 1]; `strength` is 0 where unsteered
    strength = torch.tensor([s or 0.0 for s in strengths], device=subject.device)[:, None]
    is_steered = torch.tensor([s is not None for s in strengths], device=subject.device)[:, None]

    def intervene(x: Tensor, y: Tensor) -> Tensor:
        added = strength  # to the feature's activation
        if mode is Mode.clamp:
            activation = sae.encode(x.flatten(0, 1))[:, feature].view(x.shape[:2])
            added = (strength - activation) * is_steered  # [sequences, tokens]
        return y + added[..., None] * sae.W_dec[feature]

    return intervene


def _read_continuation(
    subject: Subject,
    feature: int,
    strength: float | None,
    ids: Tensor,
    prompt_length: int,
    vocabulary: list[str],
) -> Continuation:
    """Read a text, `ids` [n], with the unsteered LLM and the SAE. Its first `prompt_length` tokens
    are BOS and the prompt; the others were written with `strength`."""
    llm, source = subject.llm, subject.sites.source
    x = capture(llm.model, ids[None], [source])[source][0, 1:].float()
    written = len(ids) - prompt_length
    # of the tokens written; the first surprisal is that of ids[1], because BOS has none
    surprisal = compute_surprisal(llm.model, ids)[prompt_length - 1 :]
    return Continuation(
        strength=strength,
        text=llm.tokenizer.decode(ids[1:]),
        tokens=[vocabulary[i] for i in ids[1:].tolist()],
        activations=subject.sae.encode(x)[:, feature].tolist(),
        written=written,
        surprise=surprisal.mean().item() if written else float("nan"),
    )


def make_steering_section(result: Steered) -> Section:
    """Show the texts, coloured by the feature's activation, and a table of the strengths."""
    rows, texts = [], []
    for continuation in (result.unsteered, *result.steered):
        name, length = "unsteered", ""
        if continuation.strength is not None:
            name = f"{result.mode.value} {continuation.strength:g}"
            length = f"{continuation.strength / result.full_strength:.0%}"
        activation = f"{continuation.activation:.2f}"
        surprise = f"{continuation.surprise:.2f}"
        rows.append([name, length, activation, surprise, str(continuation.written)])
        caption = f"{name}: activation {activation} on what was written"
        texts.append(ColouredText(caption, continuation.tokens, continuation.activations))
    return Section(
        title=f"Steering with feature {result.feature}",
        lead=_write_lead(result),
        table=ResultTable(["text", "length", "activation", "surprise", "tokens written"], rows),
        texts=texts,
    )


def _write_lead(result: Steered) -> str:
    how = "added" if result.mode is Mode.add else "held at a strength"
    return (
        f"Feature {result.feature} was {how} while the LLM wrote. Length: the norm of strength * "
        "decoder row, as a share of the activations' median norm. Activation: the feature's "
        "mean over the tokens written, when the unsteered LLM reads the text. Surprise: nats per "
        "token for the unsteered LLM; if it is far above that of the unsteered text, the strength "
        "was too great to keep the language fluent."
    )
