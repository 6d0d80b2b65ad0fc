"""What a search maximises, on numbers worked by hand."""

import math

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from sae_lightning.errors import UserError
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.splice import SpliceBaseline, SpliceScores
from sae_lightning.runs.search import BENCHMARK_OBJECTIVES, SweepConfig, compute_objective
from sae_lightning.scoring.duplicates import Copies
from sae_lightning.scoring.metrics import Quality
from sae_lightning.scoring.scorecard import Scorecard
from sae_lightning.stream import make_source
from sae_lightning.stream.plays import PlaysConfig
from sae_lightning.stream.recovery import CONCEPT_METRICS, Recovery
from sae_lightning.stream.synthetic import SyntheticConfig

RUN = {"ce_recovered": 0.9, "ce_clean": 3.0, "ce_zero": 9.0, "kl": 0.25, "l0": 80.0}


def test_the_objective_is_the_metric_and_a_minus_minimises():
    assert compute_objective(RUN, SweepConfig()) == 0.9
    assert compute_objective(RUN, SweepConfig(objective="-kl")) == -0.25


def test_at_or_below_the_l0_asked_for_nothing_is_subtracted():
    for l0 in (80.0, 81.0, 1000.0):
        assert compute_objective(RUN, SweepConfig(l0=l0)) == 0.9
    assert compute_objective(RUN | {"l0": 0.0}, SweepConfig(l0=5.0)) == 0.9


@pytest.mark.parametrize(("name", "value"), [("ce_recovered", 0.9), ("-kl", -0.25)])
def test_above_it_the_excess_costs_ten_per_factor_e(name, value):
    # 80 / 40 = 2 times too many: 10 ln 2 = 6.931; minimised or maximised, it is a loss
    assert compute_objective(RUN, SweepConfig(objective=name, l0=40.0)) == pytest.approx(
        value - 6.931472
    )


def test_a_search_is_led_back_to_the_l0_asked_for():
    """kl as measured, 0.4 at L0 20 and 0.2 nats less for each factor e: the best is at 64."""

    def found(l0: float) -> float:
        kl = 0.4 - 0.2 * math.log(l0 / 20)
        return compute_objective({"kl": kl, "l0": l0}, SweepConfig(objective="-kl", l0=64.0))

    rising, falling = [8.0, 20.0, 50.0, 64.0], [64.0, 65.0, 100.0, 500.0]
    assert sorted(rising, key=found) == rising
    assert sorted(falling, key=found, reverse=True) == falling


def test_a_search_gains_nothing_by_more_than_lossless_or_where_zero_ablation_costs_nothing():
    assert compute_objective(RUN | {"ce_recovered": 1.3}, SweepConfig()) == 1
    assert (
        compute_objective(RUN | {"ce_recovered": 6.0, "ce_zero": 2.9}, SweepConfig()) == -math.inf
    )


@pytest.mark.parametrize("name", ["kl", "-kl"])
def test_a_metric_that_is_nan_is_the_worst_of_all(name):
    assert (
        compute_objective(RUN | {"kl": math.nan}, SweepConfig(objective=name, l0=5.0)) == -math.inf
    )


def test_every_number_of_a_run_that_the_sae_decides_can_be_the_objective():
    quality, near = Quality(1.0, 0.5, 0.1, torch.zeros(2), None), Copies(0.1, 0.4)
    of_text = Scorecard(quality, near, scores=SpliceScores(1, 2, 3, 3, 0.5, 0.1)).scalars()
    of_concepts = Scorecard(quality, near, Recovery(*range(9))).scalars()
    fixed = {*SpliceBaseline._fields, *CONCEPT_METRICS}
    without_loss = Scorecard(quality, near).scalars()
    llm = LLMConfig(name="none")
    text, concepts = (make_source(llm, data, 0) for data in (PlaysConfig(), SyntheticConfig()))
    for numbers, where in (
        (of_text, text.list_metrics(64)),
        (without_loss, text.list_metrics(0)),
        (of_concepts, concepts.list_metrics(64)),
        (of_concepts, concepts.list_metrics(0)),
    ):
        for name in {*of_text, *of_concepts} | BENCHMARK_OBJECTIVES:
            sweep = SweepConfig(objective=name)
            if name in numbers.keys() - fixed:
                sweep.check_objective(*where)
                assert compute_objective(numbers, sweep) == numbers[name]
            else:
                with pytest.raises(UserError, match=rf"^sweep\.objective={name} is not measured"):
                    sweep.check_objective(*where)


def test_unasked_the_objective_is_what_is_measured():
    SweepConfig().check_objective(frozenset(), "with eval.loss_tokens=0")
    assert compute_objective(RUN, SweepConfig()) == RUN["ce_recovered"]
    measured = {"l0": 5.0, "explained_variance": 0.7}
    assert compute_objective(measured, SweepConfig()) == 0.7


def test_an_objective_that_needs_a_loss_that_is_not_measured_is_refused_in_one_line():
    with pytest.raises(UserError) as error:
        SweepConfig(objective="-kl").check_objective(frozenset(), "with eval.loss_tokens=0")
    assert str(error.value) == (
        "sweep.objective=-kl is not measured with eval.loss_tokens=0: choose from "
        "duplicates, explained_variance, l0, nearest_cosine, unfired, with a minus in front to "
        "minimise it"
    )


@pytest.mark.parametrize("name", ["ce_recoverd", "--kl", "", "density", "ce_clean"])
def test_an_unknown_metric_is_refused(name):
    text = make_source(LLMConfig(name="none"), PlaysConfig(), 0)
    with pytest.raises(UserError, match=rf"^sweep\.objective={name} is not measured on text: ch"):
        SweepConfig(objective=name).check_objective(*text.list_metrics(64))


@pytest.mark.parametrize("l0", [0.0, -3.0, math.nan, math.inf])
def test_an_l0_that_no_sae_has_is_refused(l0):
    with pytest.raises(UserError, match=rf"^sweep\.l0={l0}: give a positive number"):
        SweepConfig(l0=l0)


@pytest.mark.parametrize("heads", [0, -1])
def test_a_pass_trains_at_least_one_sae(heads):
    with pytest.raises(UserError, match=rf"^sweep\.max_heads={heads}: give 1 or more"):
        SweepConfig(max_heads=heads)


def test_a_minus_is_typed_as_it_is():
    assert OverridesParser.create().parse_override("sweep.objective=-kl").value() == "-kl"
