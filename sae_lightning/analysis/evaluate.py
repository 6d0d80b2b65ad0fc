"""`task=evaluate`: the held-out scorecard of a saved SAE, with all metrics and figures."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.task import Task, check_at_least
from sae_lightning.llm.load import LLM
from sae_lightning.llm.sites import SitePair, distinct_sites
from sae_lightning.report.figures import make_figure, plot_histogram
from sae_lightning.report.section import Section
from sae_lightning.sae import SAE
from sae_lightning.scoring import scorecard
from sae_lightning.scoring.metrics import count_by_density
from sae_lightning.stream.source import HeldOutData
from sae_lightning.stream.tokens import SplitTokens

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(slots=True, kw_only=True)
class EvaluateTask(Task):
    """Score the SAE on held-out data."""

    tokens: int | None = None
    """Held-out tokens to read; null for as many as the run's own evaluation."""

    def __post_init__(self):
        check_at_least("tokens", self.tokens, 1)

    def execute(self, given_settings: Collection[str]) -> None:
        subject = self.load_subject(given_settings)
        result = score_subject(subject, self.tokens)
        self.print_and_publish(subject, result.scalars(), [make_scorecard_section(result)])


class Evaluation(NamedTuple):
    """The scorecard of an SAE, and other numbers that are shown with it."""

    card: scorecard.Scorecard
    tokens: int
    """Number of tokens read; the LLM's loss may be measured on fewer."""
    norms: Tensor
    """[features] norms of decoder rows"""
    noun: str
    """What the held-out data are: text, samples, rows."""

    def scalars(self) -> dict[str, Any]:
        """The numbers in `evaluate.json`, by name."""
        return {
            **self.card.scalars(),
            **self.card.fidelity._asdict(),
            "tokens": self.tokens,
            "features": len(self.norms),
            "decoder_norm_mean": self.norms.mean().item(),
            "decoder_norm_max": self.norms.max().item(),
            "density": count_by_density(self.card.quality.density),
        }


def evaluate(sae: SAE, held_out: HeldOutData, sites: SitePair) -> Evaluation:
    """Score a saved SAE; metrics are NaN where they would divide by zero."""
    x = held_out.activations(sites.source)
    sae = sae.to(x.device)
    (card,) = scorecard.score_saes(
        [sae], [sae.W_dec], held_out, *sites, [sae.weights], fidelity=True
    )
    norms = sae.W_dec.detach().norm(dim=1).cpu()
    return Evaluation(card, len(x), norms, held_out.noun)


def score_subject(
    subject: Subject, tokens: int | None = None, opened: tuple[LLM, SplitTokens] | None = None
) -> Evaluation:
    """Score `subject` on `tokens` held-out tokens, by default as many as the run's own evaluation.

    opened: LLM and text, if already loaded; otherwise only the needed part of the LLM is loaded.
    """
    config, sites = subject.config, distinct_sites([subject.sites])
    counts = tokens or config.eval.tokens, tokens or config.eval.loss_tokens
    held_out = config.data_source.open_held_out(sites, *counts, opened)
    return evaluate(subject.sae, held_out, subject.sites)


def make_scorecard_section(result: Evaluation) -> Section:
    scalars = result.scalars()
    return Section(
        title=f"Scorecard on held-out {result.noun}",
        lead=_lead(scalars),
        rows=scorecard.format_lines(scalars, result.noun) | _rows(scalars),
        figures=_figures(result),
    )


def _lead(scalars: dict[str, Any]) -> str:
    lead = (
        f"{scalars['l0']:.1f} active features of {scalars['features']:,} explain "
        f"{scalars['explained_variance']:.1%} of the activations' variance"
    )
    if "recovered" in scalars:
        return f"{lead} and recover {scalars['recovered']:.1%} of the concepts."
    increase = scalars.get("ce_spliced", math.nan) - scalars.get("ce_clean", math.nan)
    if not math.isfinite(increase):  # not measured, or the LLM overflows
        return f"{lead}."
    share = f"{scalars['ce_recovered']:.1%} of what zero ablation costs is recovered"
    if scalars["ce_zero"] <= scalars["ce_clean"]:
        share = "zero ablation costs nothing"
    return (
        f"{lead}; with the SAE in place the LLM's cross-entropy is {abs(increase):.3f} nats "
        f"{'higher' if increase >= 0 else 'lower'} ({share})."
    )


def _rows(scalars: dict[str, Any]) -> dict[str, str]:
    return {
        "squared error": f"{scalars['mse']:.4g} per element, {scalars['relative_mse']:.2%} of the "
        "activations' mean square",
        "shrinkage": f"reconstructions are {scalars['norm_ratio']:.4f} as long as activations; "
        f"best rescaled by 1 / {scalars['gamma']:.4f} (about the mean 1 / "
        f"{scalars['gamma_centred']:.4f})",
        "cosine": f"{scalars['cosine']:.4f} of activation and reconstruction, "
        f"{scalars['cosine_centred']:.4f} about the mean",
        "decoder norms": f"{scalars['decoder_norm_mean']:.3g} on average, at most "
        f"{scalars['decoder_norm_max']:.3g}",
        "measured on": f"{scalars['tokens']:,} tokens",
    }


def _figures(result: Evaluation) -> dict[str, "Figure"]:
    quality, scalars = result.card.quality, result.card.scalars()
    fired = quality.density[quality.density > 0]
    silent = len(quality.density) - len(fired)
    caption = "How often features fire" + (f" ({silent:,} never do)" if silent else "")
    figures = {
        caption: plot_histogram(fired.log10(), "log10 of the share of tokens"),
        "How long decoder rows are": plot_histogram(result.norms, "norm of the decoder row"),
    }
    if "ce_clean" in scalars:
        values = {
            "as it is": scalars["ce_clean"],
            "with the SAE": scalars["ce_spliced"],
            "mean-ablated": scalars["ce_mean"],
            "zero-ablated": scalars["ce_zero"],
        }
        figures["What the LLM loses"] = make_figure("", "cross-entropy (nats per token)").add_bar(
            x=[*values],
            y=[*values.values()],
            texttemplate="%{y:.3f}",
        )
    return figures
