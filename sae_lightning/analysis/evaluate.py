"""`task=evaluate`: the held-out scorecard of a saved SAE, with all metrics and figures."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from sae_lightning.analysis.against_controls import Scores, make_control_section, pick_scores
from sae_lightning.analysis.open_controls import open_controls
from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.task import Task, check_at_least
from sae_lightning.llm.load import LLM
from sae_lightning.llm.sites import SitePair, distinct_sites
from sae_lightning.llm.splice import SpliceScores
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
    control: str | None = None
    """What to score beside the SAE: a kind of control that its sweep has, such as frozen_decoder,
    or another SAE of the same site, as in `run`; null for all controls of its sweep."""

    def __post_init__(self):
        check_at_least("tokens", self.tokens, 1)

    def execute(self, given_settings: Collection[str]) -> None:
        subject = self.load_subject(given_settings)
        controls = open_controls(subject, self.control, most=None)
        result = score_subject(subject, self.tokens, controls=controls)
        sections = [make_scorecard_section(result)]
        if controls:
            sections.append(make_control_section(*result.list_scores()))
        self.print_and_publish(subject, result.scalars(), sections)


class Evaluation(NamedTuple):
    """The scorecard of an SAE, and other numbers that are shown with it."""

    card: scorecard.Scorecard
    tokens: int
    """Number of tokens read; the LLM's loss may be measured on fewer."""
    norms: Tensor
    """[features] norms of decoder rows"""
    noun: str
    """What the held-out data are: text, samples, rows."""
    controls: dict[str, scorecard.Scorecard] = {}
    """Of the controls on the same data, by name."""

    def scalars(self) -> dict[str, Any]:
        """The numbers in `evaluate.json`, by name."""
        controls = {name: list_numbers(card) for name, card in self.controls.items()}
        return {
            **list_numbers(self.card),
            **({"controls": controls} if controls else {}),
            "tokens": self.tokens,
            "features": len(self.norms),
            "decoder_norm_mean": self.norms.mean().item(),
            "decoder_norm_max": self.norms.max().item(),
            "density": count_by_density(self.card.quality.density),
        }

    def list_scores(self) -> tuple[Scores, dict[str, Scores]]:
        """The scores that are compared, of the SAE and of each control."""
        controls = {name: pick_scores(list_numbers(x)) for name, x in self.controls.items()}
        return pick_scores(list_numbers(self.card)), controls


def list_numbers(card: scorecard.Scorecard) -> dict[str, float]:
    """All numbers of a scorecard with fidelity. The shares are those of the cross-entropy between
    the clean LLM and mean ablation that features and error recover, each without the other
    (Marks et al. 2024, 2403.19647, have such error nodes); NaN where mean ablation changes nothing.
    """
    numbers = {**card.scalars(), **card.fidelity._asdict()}
    if isinstance(card.scores, SpliceScores):
        clean, mean, error = card.scores.ce_clean, card.scores.ce_mean, card.scores.ce_error
        gap = mean - clean or math.nan
        numbers["features_share"] = (mean - card.scores.ce_spliced) / gap
        numbers["error_share"] = (mean - error) / gap
    return numbers


def evaluate(
    sae: SAE, held_out: HeldOutData, sites: SitePair, controls: Mapping[str, SAE] = {}
) -> Evaluation:
    """Score a saved SAE, and `controls` of the same site; metrics are NaN where they would divide
    by zero."""
    x = held_out.activations(sites.source)
    saes = [each.to(x.device) for each in (sae, *controls.values())]
    decoders, weights = [each.W_dec for each in saes], [each.weights for each in saes]
    card, *cards = scorecard.score_saes(saes, decoders, held_out, *sites, weights, fidelity=True)
    norms = saes[0].W_dec.detach().norm(dim=1).cpu()
    return Evaluation(card, len(x), norms, held_out.noun, dict(zip(controls, cards, strict=True)))


def score_subject(
    subject: Subject,
    tokens: int | None = None,
    opened: tuple[LLM, SplitTokens] | None = None,
    controls: Mapping[str, SAE] = {},
) -> Evaluation:
    """Score `subject` on `tokens` held-out tokens, by default as many as the run's own evaluation,
    and `controls` on the same.

    opened: LLM and text, if already loaded; otherwise only the needed part of the LLM is loaded.
    """
    config, sites = subject.config, distinct_sites([subject.sites])
    counts = tokens or config.eval.tokens, tokens or config.eval.loss_tokens
    held_out = config.data_source.open_held_out(sites, *counts, opened)
    return evaluate(subject.sae, held_out, subject.sites, controls)


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
        f"{'higher' if increase >= 0 else 'lower'} ({share}).{_describe_error(scalars)}"
    )


def _describe_error(scalars: dict[str, Any]) -> str:
    """How much of the LLM's predictions the SAE does not explain; empty if that has no measure."""
    if not scalars["ce_mean"] > scalars["ce_clean"]:
        return ""
    return (
        f" Of what mean ablation costs, the features alone recover {scalars['features_share']:.1%}"
        f", and what they leave out, the error, alone {scalars['error_share']:.1%}."
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
    quality, scalars = result.card.quality, list_numbers(result.card)
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
            "with the error": scalars["ce_error"],
            "mean-ablated": scalars["ce_mean"],
            "zero-ablated": scalars["ce_zero"],
        }
        figures["What the LLM loses"] = make_figure("", "cross-entropy (nats per token)").add_bar(
            x=[*values],
            y=[*values.values()],
            texttemplate="%{y:.3f}",
        )
    return figures
