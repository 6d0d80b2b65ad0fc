"""The KL with a reconstruction in place is that of scoring; its gradient, a finite difference."""

import pytest
import torch
from torch import nn

from sae_lightning.llm import spliced_kl
from sae_lightning.llm.sites import Kind, Site
from sae_lightning.llm.splice import score_baseline, score_splices
from sae_lightning.llm.spliced_kl import measure_spliced_kl, run_clean

SITES = [(Site(1, Kind.resid), Site(1, Kind.resid)), (Site(1, Kind.mlp_in), Site(1, Kind.mlp))]


def make_linear(noise: float = 0.3) -> nn.Linear:
    """A linear map of width 24 near the identity."""
    torch.manual_seed(0)
    linear = nn.Linear(24, 24)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(24) + noise * torch.randn(24, 24))
    return linear


@pytest.fixture
def keep(tokens):
    return (tokens != 0) & (torch.arange(10) != 4)  # position 4 plays a special token


@pytest.fixture
def measure(llm, tokens, keep):
    """measure(source, target, function) -> KL, on two batches of two sequences."""
    runs = [run_clean(llm.model, tokens[i : i + 2], keep[i : i + 2]) for i in (0, 2)]
    return lambda *sites_and_function: measure_spliced_kl(llm.model, runs, *sites_and_function)


@pytest.mark.parametrize(("source", "target"), SITES, ids=str)
def test_the_value_is_that_of_scoring_and_the_gradient_a_finite_difference(
    llm, tokens, keep, measure, monkeypatch, source, target
):
    """(KL(w + h v) - KL(w - h v)) / 2h for a direction v in the space of all weights w."""
    monkeypatch.setattr(spliced_kl, "LOGIT_ROWS", 5)  # several chunks of logits
    linear = make_linear()
    kl = measure(source, target, linear)
    known = score_baseline(llm.model, tokens, target, keep, torch.zeros(24), 2)
    (scores,) = score_splices(llm.model, tokens, source, target, [linear], keep, known, 2)
    assert kl.item() == pytest.approx(scores.kl, rel=1e-5)

    kl.backward()
    direction = linear.weight.grad / linear.weight.grad.norm()  # the steepest
    step, values = 1e-2, []
    for sign in (1, -1):
        moved = make_linear()
        moved.weight.data.add_(direction, alpha=sign * step)
        values.append(measure(source, target, moved).item())
    expected = (values[0] - values[1]) / (2 * step)
    assert linear.weight.grad.norm().item() == pytest.approx(expected, rel=2e-2)
    assert all(parameter.grad is None for parameter in llm.model.parameters())


def test_a_perfect_reconstruction_has_no_kl_and_no_gradient(measure):
    linear = make_linear(noise=0)
    nn.init.zeros_(linear.bias)
    kl = measure(*SITES[0], linear)
    kl.backward()
    assert kl.item() == pytest.approx(0, abs=1e-6)
    assert linear.weight.grad.abs().max() < 1e-5
