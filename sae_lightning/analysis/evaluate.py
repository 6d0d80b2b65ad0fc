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
    or another SAE of the same site, given like `run`; null for all controls of its sweep."""

    def __post_init__(self):
        check_at_least("tokens", self.tokens, 1)

    def execute(self, given_settings: Collection[str]) -> None:
        subject = self.load_subject(given_settings)
        controls = open_controls(subject, self.control, limit=None)
        result = score_subject(subject, self.tokens, controls=controls)
        sections = [make_scorecard_section(result)]
        if controls:
            sections.append(make_control_section(*result.list_scores()))
        self.print_and_write(subject, result.to_dict(), sections)


class Evaluation(NamedTuple):
    """The scorecard of an SAE, and other numbers that are shown with it."""

    card: scorecard.Scorecard
    tokens: int
    """Number of tokens read; the LLM's loss may be measured on fewer."""
    decoder_norms: Tensor
    """[features] norms of decoder rows"""
    noun: str
    """Word for the held-out data: text, samples or rows."""
    controls: dict[str, scorecard.Scorecard] = {}
    """Scorecards of the controls on the same data, by name."""

    def to_dict(self) -> dict[str, Any]:
        """The content of `evaluate.json`, by key."""
        controls = {name: list_numbers(card) for name, card in self.controls.items()}
        return {
            **list_numbers(self.card),
            **({"controls": controls} if controls else {}),
            "tokens": self.tokens,
            "features": len(self.decoder_norms),
            "decoder_norm_mean": self.decoder_norms.mean().item(),
            "decoder_norm_max": self.decoder_norms.max().item(),
            "density": count_by_density(self.card.quality.density),
        }

    def list_scores(self) -> tuple[Scores, dict[str, Scores]]:
        """Scores to compare: those of the SAE, and those of each control by name."""
        controls = {name: pick_scores(list_numbers(card)) for name, card in self.controls.items()}
        return pick_scores(list_numbers(self.card)), controls


def list_numbers(card: scorecard.Scorecard) -> dict[str, float]:
    """All numbers of a scorecard, including the size and kind of the SAE's error.

    Mean ablation replaces each activation by the mean, which costs cross-entropy. `features_share`
    is the share of this cost that the features alone recover, `error_share` the share that the
    SAE's error alone recovers (the error nodes of Marks et al. 2024, 2403.19647). Both are NaN if
    the cost is 0, and missing if the LLM's loss is not measured."""
    numbers = {**card.scalars(), **card.fidelity._asdict()}
    if isinstance(card.scores, SpliceScores):
        losses = card.scores
        cost = (losses.ce_mean - losses.ce_clean) or math.nan  # NaN instead of a division by 0
        numbers["features_share"] = (losses.ce_mean - losses.ce_spliced) / cost
        numbers["error_share"] = (losses.ce_mean - losses.ce_error) / cost
    return numbers


def evaluate(
    sae: SAE, held_out: HeldOutData, sites: SitePair, controls: Mapping[str, SAE] = {}
) -> Evaluation:
    """Score a saved SAE, and `controls` of the same site."""
    x = held_out.activations(sites.source)
    saes = [each.to(x.device) for each in (sae, *controls.values())]
    decoders, weights = [each.W_dec for each in saes], [each.weights for each in saes]
    card, *control_cards = scorecard.score_saes(
        saes, decoders, held_out, *sites, weights, fidelity=True
    )
    norms = saes[0].W_dec.detach().norm(dim=1).cpu()
    cards = dict(zip(controls, control_cards, strict=True))
    return Evaluation(card, len(x), norms, held_out.noun, cards)


def score_subject(
    subject: Subject,
    tokens: int | None = None,
    opened: tuple[LLM, SplitTokens] | None = None,
    controls: Mapping[str, SAE] = {},
) -> Evaluation:
    """Score `subject` and `controls` on `tokens` held-out tokens, by default as many as in the
    run's own evaluation. opened: LLM and text, if already loaded; otherwise only the needed part of
    the LLM is loaded."""
    config, sites = subject.config, distinct_sites([subject.sites])
    loss_tokens = tokens or config.eval.loss_tokens
    tokens = tokens or config.eval.tokens
    held_out = config.data_source.open_held_out(sites, tokens, loss_tokens, opened)
    return evaluate(subject.sae, held_out, subject.sites, controls)


def make_scorecard_section(result: Evaluation) -> Section:
    """Show the scorecard as sentences, numbers and histograms."""
    numbers = result.to_dict()
    return Section(
        title=f"Scorecard on held-out {result.noun}",
        lead=_write_lead(numbers),
        numbers=scorecard.format_lines(numbers, result.noun) | _format_errors(numbers),
        figures=_draw_figures(result),
    )


def _write_lead(numbers: dict[str, Any]) -> str:
    lead = (
        f"{numbers['l0']:.1f} active features of {numbers['features']:,} explain "
        f"{numbers['explained_variance']:.1%} of the activations' variance"
    )
    if "recovered" in numbers:
        return f"{lead} and recover {numbers['recovered']:.1%} of the concepts."
    increase = numbers.get("ce_spliced", math.nan) - numbers.get("ce_clean", math.nan)
    if not math.isfinite(increase):  # not measured, or the LLM overflows
        return f"{lead}."
    recovery = f"{numbers['ce_recovered']:.1%} of what zero ablation costs is recovered"
    if numbers["ce_zero"] <= numbers["ce_clean"]:
        recovery = "zero ablation costs nothing"
    return (
        f"{lead}; with the SAE in place the LLM's cross-entropy is {abs(increase):.3f} nats "
        f"{'higher' if increase >= 0 else 'lower'} ({recovery}).{_describe_error(numbers)}"
    )


def _describe_error(numbers: dict[str, Any]) -> str:
    """Say how much of mean ablation's cost features and error each recover; empty if it is 0."""
    if not numbers["ce_mean"] > numbers["ce_clean"]:  # also if one is NaN
        return ""
    return (
        f" Of what mean ablation costs, the features alone recover {numbers['features_share']:.1%}"
        f", the error alone (what they leave out) {numbers['error_share']:.1%}."
    )


def _format_errors(numbers: dict[str, Any]) -> dict[str, str]:
    """Format the size and kind of the error, the decoder norms and the token count, by label."""
    return {
        "squared error": f"{numbers['mse']:.4g} per element, {numbers['relative_mse']:.2%} of the "
        "activations' mean square",
        "shrinkage": f"reconstructions are {numbers['norm_ratio']:.4f} as long as activations; "
        f"best rescaled by 1 / {numbers['gamma']:.4f} (about the mean 1 / "
        f"{numbers['gamma_centred']:.4f})",
        "cosine": f"{numbers['cosine']:.4f} of activation and reconstruction, "
        f"{numbers['cosine_centred']:.4f} about the mean",
        "decoder norms": f"{numbers['decoder_norm_mean']:.3g} on average, at most "
        f"{numbers['decoder_norm_max']:.3g}",
        "measured on": f"{numbers['tokens']:,} tokens",
    }


def _draw_figures(result: Evaluation) -> dict[str, "Figure"]:
    quality, numbers = result.card.quality, list_numbers(result.card)
    densities = quality.density[quality.density > 0]
    unfired = len(quality.density) - len(densities)
    caption = "How often features fire" + (f" ({unfired:,} never do)" if unfired else "")
    figures = {
        caption: plot_histogram(densities.log10(), "log10 of the share of tokens"),
        "Norms of decoder rows": plot_histogram(result.decoder_norms, "norm of the decoder row"),
    }
    if "ce_clean" in numbers:
        values = {
            "clean": numbers["ce_clean"],
            "with the SAE": numbers["ce_spliced"],
            "with the error": numbers["ce_error"],
            "mean-ablated": numbers["ce_mean"],
            "zero-ablated": numbers["ce_zero"],
        }
        figure = make_figure("", "cross-entropy (nats per token)")
        figure.add_bar(x=[*values], y=[*values.values()], texttemplate="%{y:.3f}")
        figures["The LLM's cross-entropy"] = figure
    return figures
