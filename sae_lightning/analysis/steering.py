"""Text that the LLM writes with a feature turned up or down.

    add:    y + strength W_dec[feature]             clamp:  y + (strength - f(x)) W_dec[feature]

at the target, on every token but BOS; x, y = activations at source and target, f = the feature's
activation on x. (Templeton et al. 2024, "Scaling monosemanticity", clamp; Turner et al. 2023,
"Steering language models with activation engineering", add.)
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lightning.analysis.section import Coloured, Section, Table
from sae_lightning.analysis.settings import Mode
from sae_lightning.analysis.subject import Subject, known
from sae_lightning.llm.capture import capture
from sae_lightning.llm.generate import GREEDY, Sampling, generate, prompt_ids, surprise
from sae_lightning.llm.vocabulary import vocabulary
from sae_lightning.terminal import phase


class Continuation(NamedTuple):
    """What the LLM made of the prompt."""

    strength: float | None
    """What was added, or what the feature was held at; None where the LLM wrote as it is."""
    text: str
    """Prompt and continuation."""
    tokens: list[str]
    """The same token by token, each as it reads."""
    activations: list[float]
    """The feature's own activation on each token, when the LLM reads the text unsteered."""
    written: int
    """Tokens of the continuation, which come last."""
    surprise: float
    """Mean -log p of the continuation for the unsteered LLM (nats per token): far above that of
    the unsteered text where steering broke the language; nan where nothing was written."""

    @property
    def activation(self) -> float:
        """The feature's mean activation on the continuation; nan where nothing was written."""
        last = self.activations[len(self.activations) - self.written :]
        return sum(last) / len(last) if last else float("nan")


class Steered(NamedTuple):
    """Continuations of a prompt under several strengths of a feature."""

    feature: int
    """Which."""
    mode: Mode
    """What was done with the strengths."""
    plain: Continuation
    """The LLM as it is, with the same random numbers."""
    steered: list[Continuation]
    """One for each strength."""


@torch.no_grad()
def steer(
    subject: Subject,
    feature: int,
    strengths: Sequence[float],
    prompt: str,
    *,
    tokens: int = 60,
    mode: Mode = Mode.add,
    sampling: Sampling = GREEDY,
) -> Steered:
    """Have the LLM continue `prompt` by `tokens` tokens, once as it is and once for each strength.

    All continuations are written together and share their random numbers (see `generate`).
    """
    known(subject.sae, [feature])
    llm, ids = subject.llm, prompt_ids(subject.llm, prompt, tokens)
    every = [None, *strengths]
    with phase(f"writing {len(every)} texts"):
        function = _with_feature(subject, feature, every, mode)
        found = generate(llm, ids, tokens, subject.sites, function, len(every), sampling)
    words = vocabulary(llm)
    plain, *steered = (
        _read(subject, feature, strength, text, len(ids), words)
        for strength, text in zip(every, found, strict=True)
    )
    return Steered(feature, mode, plain, steered)


def _with_feature(
    subject: Subject, feature: int, strengths: list[float | None], mode: Mode
) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, y) -> y with the feature at each sequence's strength; None leaves it as it is."""
    sae = subject.sae
    wanted = torch.tensor([s or 0.0 for s in strengths], device=subject.device)[:, None]
    touched = torch.tensor([s is not None for s in strengths], device=subject.device)[:, None]

    def apply(x: Tensor, y: Tensor) -> Tensor:
        amount = wanted
        if mode is Mode.clamp:
            present = sae.encode(x.flatten(0, 1))[:, feature].view(x.shape[:2])
            amount = (wanted - present) * touched
        return y + amount[..., None] * sae.W_dec[feature]

    return apply


def _read(
    subject: Subject,
    feature: int,
    strength: float | None,
    ids: Tensor,
    prompt: int,
    words: list[str],
) -> Continuation:
    """What the unsteered LLM and the SAE see in a text [n] whose first `prompt` ids are given."""
    llm, source = subject.llm, subject.sites.source
    x = capture(llm.model, ids[None], [source])[source][0, 1:].float()
    written = len(ids) - prompt
    nats = surprise(llm.model, ids)[len(ids) - 1 - written :]
    return Continuation(
        strength=strength,
        text=llm.tokenizer.decode(ids[1:]),
        tokens=[words[i] for i in ids[1:].tolist()],
        activations=subject.sae.encode(x)[:, feature].tolist(),
        written=written,
        surprise=nats.mean().item() if written else float("nan"),
    )


def section(result: Steered) -> Section:
    """The texts, coloured by the feature's own activation, and what became of them."""
    every = [result.plain, *result.steered]
    doing = "added" if result.mode is Mode.add else "held"
    names = ["unsteered", *(f"{doing} at {c.strength:g}" for c in result.steered)]
    if result.mode is Mode.add:
        names = ["unsteered", *(f"strength {c.strength:+g}" for c in result.steered)]
    rows = [
        [name, f"{c.activation:.2f}", f"{c.surprise:.2f}", str(c.written)]
        for name, c in zip(names, every, strict=True)
    ]
    texts = [
        Coloured(
            f"{name}: activation {c.activation:.2f} on what was written", c.tokens, c.activations
        )
        for name, c in zip(names, every, strict=True)
    ]
    return Section(
        title=f"Steering with feature {result.feature}",
        lead=_lead(result),
        table=Table(["text", "its activation", "surprise (nats)", "tokens"], rows),
        texts=texts,
    )


def _lead(result: Steered) -> str:
    how = "added to" if result.mode is Mode.add else "held at a strength in"
    best = max(result.steered, key=lambda c: c.activation)
    return (
        f"Feature {result.feature} was {how} the LLM's activations while it wrote. When the LLM as "
        f"it is reads the texts, the feature's activation is {result.plain.activation:.2f} on average "
        f"in the plain one and at most {best.activation:.2f}, at strength {best.strength:g}. Where "
        "the surprise is far above the plain text's, the strength was too much for the language."
    )
