"""What an update takes, measured, against what the estimate charges for it."""

from itertools import accumulate

import pytest
import torch
from torch import Generator
from torch.profiler import ProfilerActivity, profile

from sae_lightning.runs.memory import EVALUATION
from sae_lightning.sae import ARCHITECTURES, Moment, build
from sae_lightning.sae.jumprelu import Penalty

TOKENS, FEATURES, D = 512, 1024, 4  # weights and activations hardly weigh
# objectives that cost more than the default
COSTLY = {
    "relu": [{"p": 0.5}, {"preact": 1e-3}],
    "jumprelu": [{"preact": 1e-3}, {"penalty_kind": Penalty.step}],
    "gated": [{"preact": 1e-3}],
}


X = torch.randn(TOKENS, D, generator=Generator().manual_seed(0))


def peak(compute) -> float:
    """Bytes for each token and feature at the peak of what `compute` does."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        compute()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    taken = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(taken)) / (TOKENS * FEATURES)


def peak_of_update(name: str, settings: dict) -> float:
    """That of forward and backward, half of the features dead."""
    config, _, objective = ARCHITECTURES[name]
    sae, loss = build(config(name=name, features=FEATURES), D, D), objective(**settings)
    moment = Moment(torch.arange(FEATURES) < FEATURES // 2, torch.tensor(0.5))

    def forward():
        this = sae.training_pass(X)
        terms = loss.terms(sae, this, X, moment)
        (this.features.values > 0).sum(dim=0)
        weighted = (c * terms[each] for each, c in loss.coefficients().items())
        return sum(weighted, terms["mse"])

    def update():
        with torch.autocast("cpu", torch.bfloat16):
            total = forward()
        total.backward()

    return peak(update)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_update_takes_no_more_than_the_estimate_charges(name):
    measured = max(peak_of_update(name, settings) for settings in [{}, *COSTLY.get(name, [])])
    charged = ARCHITECTURES[name].network.bytes_per_activation
    assert 0.7 * charged < measured < charged + 0.5


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_evaluation_takes_no_more_than_the_estimate_charges(name):
    config, network, _ = ARCHITECTURES[name]
    sae = build(config(name=name, features=FEATURES), D, D)
    measured = peak(lambda: sae(X))
    assert measured < EVALUATION * network.bytes_per_activation + 0.1
