"""Each callback by itself, and the head that it acts on."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sae_lightning import UserError
from sae_lightning.llm.sites import Kind, Site
from sae_lightning.sae import ARCHITECTURES, SAEConfig, build_sae
from sae_lightning.sae.gated import GatedConfig, GatedLoss
from sae_lightning.sae.jumprelu import JumpReLUConfig, JumpReLULoss
from sae_lightning.sae.objective import AuxKLoss
from sae_lightning.sae.relu import DenseLoss, ReLULoss
from sae_lightning.sae.topk import TopKConfig
from sae_lightning.training.callbacks.curves import measure_training_scalars
from sae_lightning.training.callbacks.normalize import (
    Normalize,
    describe_outliers,
    estimate_normalization,
)
from sae_lightning.training.callbacks.resample import resample
from sae_lightning.training.callbacks.update import ClipGradient, DecoderNorm, Schedule, TargetL0
from sae_lightning.training.head import Head
from sae_lightning.training.module import SAEModule, _find_culprit
from sae_lightning.training.settings import (
    CallbacksConfig,
    Normalization,
    NormalizeConfig,
    OptimConfig,
)

SITE = Site(0, Kind.resid)


def make_head(features=6, d=4, loss=None, target=SITE, dead_window=100, seed=0, sae=None, **optim):
    return Head(
        build_sae(sae or SAEConfig(features=features, start_bias=0, decoder_norm=0.1), d, d),
        name="test",
        folder=Path("nowhere"),
        source=SITE,
        target=target,
        loss=loss or ReLULoss(l1=0.1),
        optim=OptimConfig(**optim),
        callbacks=CallbacksConfig(normalize=NormalizeConfig(tokens=64)),
        dead_window=dead_window,
        seed=seed,
    )


def make_module(heads, batch=1, steps=1):
    return SAEModule(heads, batch=batch, steps=steps)


def activations(n=64, d=4, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_standardize_gives_mean_0_and_mean_square_1():
    # two tokens (1, 2) and (3, 6): mean (2, 4), deviations -+(1, 2), mean square (1 + 4) / 2
    mean, scale = estimate_normalization(
        torch.tensor([[1.0, 2.0], [3.0, 6.0]]), Normalization.standardize
    )
    assert mean.tolist() == [2.0, 4.0]
    assert scale.item() == pytest.approx(2.5**0.5)


def test_scale_leaves_the_mean_alone():
    # mean square of 1, 2, 3, 6 = 50 / 4
    mean, scale = estimate_normalization(
        torch.tensor([[1.0, 2.0], [3.0, 6.0]]), Normalization.scale
    )
    assert mean.tolist() == [0.0, 0.0]
    assert scale.item() == pytest.approx(12.5**0.5)


def test_no_normalisation_changes_nothing():
    mean, scale = estimate_normalization(activations(), Normalization.none)
    assert mean.tolist() == [0.0] * 4
    assert scale.item() == 1


def test_a_large_mean_does_not_spoil_the_scale():
    x = activations(10_000) + 1e4
    _, scale = estimate_normalization(x, Normalization.standardize)
    assert scale.item() == pytest.approx(1, abs=0.02)


def test_constant_activations_are_refused():
    with pytest.raises(UserError, match="cannot be normalised: their spread .* is 0"):
        estimate_normalization(torch.ones(8, 4), Normalization.standardize)


def test_a_few_long_activations_that_decide_the_variance_are_told():
    """100 of length 1 in opposite directions: a variance of 1 each. One of 20 adds 400 or so."""
    x = torch.tensor([1.0, -1.0]).repeat(50)[:, None] * torch.tensor([[1.0, 0.0]])
    assert describe_outliers(SITE, x) is None
    long = torch.cat([x, torch.tensor([[0.0, 20.0]])])
    # about the mean (0, 20/101): 400 (100/101)^2 = 392.1 of 392.1 + 100 + 100 (20/101)^2 = 496.0
    message = (
        r"the 1 largest of 101 activations hold 79% of the variance.*; data\.max_norm=4 leaves"
    )
    assert re.search(message, describe_outliers(SITE, long))


def test_each_site_of_a_head_gets_its_own_mean_and_scale_and_only_in_a_new_run():
    out = Site(1, Kind.mlp)
    head = make_head(target=out)
    sample = {SITE: activations() * 3 + 1, out: activations(seed=1) * 5 - 2}
    stream = SimpleNamespace(peek=lambda n: {site: x[:n] for site, x in sample.items()})
    trainer = SimpleNamespace(global_step=0, datamodule=SimpleNamespace(stream=stream))
    Normalize().on_train_start(trainer, make_module([head], batch=64, steps=1))
    x, target = head.normalise(sample)
    for z in (x, target):
        torch.testing.assert_close(z.mean(dim=0), torch.zeros(4), atol=1e-6, rtol=0)
        torch.testing.assert_close(z.square().mean(), torch.ones(()))
    before = head.in_mean.clone()
    trainer.global_step, sample[SITE] = 1, sample[SITE] + 7
    Normalize().on_train_start(trainer, make_module([head], batch=64, steps=1))
    assert torch.equal(head.in_mean, before)


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("mode", Normalization)
def test_as_many_features_fire_at_the_start_however_large_activations_are(mode, size):
    head = make_head(sae=SAEConfig(features=500, start_bias=-2), d=64)
    head.callbacks.normalize.mode = mode
    x = activations(2000, 64) * size
    stream = SimpleNamespace(peek=lambda n: {SITE: x[:n]})
    trainer = SimpleNamespace(global_step=0, datamodule=SimpleNamespace(stream=stream))
    Normalize().on_train_start(trainer, make_module([head]))
    fired = head.reconstruct_raw(x).features > 0
    assert fired.float().mean() == pytest.approx(0.02275, rel=0.15)  # P(z > 2)


def test_the_schedule_sets_each_heads_learning_rate_and_penalty():
    # 100 updates; the first head warms up over 10 and decays over 20, its penalty over 50
    one = make_head(lr=1.0, bias_lr=3, warmup=0.1, decay=0.2, loss=ReLULoss(l1=2.0, warmup=0.5))
    other = make_head(d=4, lr=0.5, warmup=0, decay=0, loss=DenseLoss())
    module = make_module([one, other], batch=1, steps=100)
    optimizer = module.configure_optimizers()
    seen = {}
    for step in (0, 4, 9, 50, 80, 90, 99):
        trainer = SimpleNamespace(global_step=step, optimizers=[optimizer])
        Schedule().on_train_batch_start(trainer, module, None, 0)
        seen[step] = [group["lr"] for group in optimizer.param_groups] + [one.penalty_factor.item()]
    # each head: weights, then the encoder bias, which by default learns sqrt(d) = 2 times as fast
    assert {step: pytest.approx(values) for step, values in seen.items()} == {
        0: [0.1, 0.3, 0.5, 1.0, 0.02],
        4: [0.5, 1.5, 0.5, 1.0, 0.1],
        9: [1.0, 3.0, 0.5, 1.0, 0.2],
        50: [1.0, 3.0, 0.5, 1.0, 1.0],
        80: [1.0, 3.0, 0.5, 1.0, 1.0],
        90: [0.5, 1.5, 0.5, 1.0, 1.0],
        99: [0.05, 0.15, 0.5, 1.0, 1.0],
    }


def test_a_head_knows_how_much_of_the_run_is_done():
    head = make_head()
    module = make_module([head], steps=8)
    trainer = SimpleNamespace(global_step=6, optimizers=[module.configure_optimizers()])
    Schedule().on_train_batch_start(trainer, module, None, 0)
    assert head.progress == 0.75


def adjust(head, *l0s, steps=1000):
    """Factors on the coefficient after updates with these L0s, from the middle of the run on."""
    path, trainer = [], SimpleNamespace(global_step=steps // 2)
    for l0 in l0s:
        head.last_step = SimpleNamespace(l0=torch.tensor(float(l0)))
        TargetL0().on_train_batch_end(trainer, make_module([head], steps=steps))
        path.append(head.steering.item())
    return path


def test_feedback_by_hand():
    head = make_head(loss=ReLULoss(l1=0.5, target_l0=10))
    # at update 5 of 10 the gain on an error is 30 x 5^2 / 10^3 = 0.75; errors log 2, log 1.5, 0:
    # 2^0.75;  x 1.5^0.75 x 1.5/2;  x 1 x 1/1.5
    path = [2**0.75, 3**0.75 * 0.75, 3**0.75 * 0.5]
    assert adjust(head, 20, 15, 10, steps=10) == pytest.approx(path)
    assert head.l0_error == 0
    assert head.effective_coefficients["l1"] == 0.5 * head.steering


def test_too_many_raise_the_coefficient_and_too_few_lower_it():
    up, down = (adjust(make_head(loss=ReLULoss(target_l0=10)), l0)[0] for l0 in (20, 5))
    assert up > 1 > down
    assert up * down == pytest.approx(1)
    # amid 1000 updates: 30 x 500^2 / 1000^3; the error is bounded by -1
    assert adjust(make_head(loss=ReLULoss(target_l0=10)), 0) == pytest.approx([math.exp(-0.0075)])


def test_feedback_waits_for_the_end_of_the_warm_up():
    head = make_head(loss=ReLULoss(target_l0=10))
    head.penalty_factor.fill_(0.99)
    assert adjust(head, 100, 100) == [1, 1]
    head.penalty_factor.fill_(1.0)
    assert adjust(head, 100)[0] > 1


@pytest.mark.parametrize("loss", [ReLULoss(), DenseLoss(), AuxKLoss()])
def test_without_a_target_no_coefficient_is_adjusted(loss):
    assert adjust(make_head(loss=loss), 100, 1) == [1, 1]


def test_feedback_goes_on_where_it_was():
    one, other = (make_head(loss=ReLULoss(target_l0=10)) for _ in range(2))
    adjust(one, 30, 20)
    other.load_state_dict(one.state_dict())
    assert adjust(one, 15, 12) == adjust(other, 15, 12)


def test_the_path_of_every_coefficient_is_a_curve():
    heads = {
        "l1": make_head(loss=ReLULoss(l1=0.5)),
        "l0": make_head(loss=JumpReLULoss(l0=0.5), sae=JumpReLUConfig(name="jumprelu", features=6)),
    }
    for name, head in heads.items():
        head({SITE: activations()})
        head.steering.fill_(4.0)
        head.penalty_factor.fill_(0.5)
        assert measure_training_scalars(head)[f"optim/{name}"] == 0.5 * 4 * 0.5
        assert measure_training_scalars(head)[f"train/{name}"] > 0
    assert measure_training_scalars(heads["l0"])["sae/threshold_mean"] == pytest.approx(0.1)
    topk = make_head(loss=AuxKLoss(), sae=TopKConfig(name="topk", features=6, k=2))
    topk({SITE: activations()})
    assert measure_training_scalars(topk)["optim/auxk"] == 1 / 32


def test_a_term_that_always_counts_alike_has_no_curve_of_a_coefficient():
    head = make_head(loss=GatedLoss(l1=0.5), sae=GatedConfig(name="gated", features=6))
    head({SITE: activations()})
    scalars = measure_training_scalars(head)
    assert {"train/gate", "optim/l1"} <= set(scalars)
    assert "optim/gate" not in scalars


def test_a_row_of_zeros_stays_one():
    sae = build_sae(TopKConfig(name="topk", features=3, k=1), 4, 4)
    with torch.no_grad():
        sae.W_dec[0] = 0
    sae.W_dec.grad = torch.ones(3, 4)
    sae.project_gradient()
    assert sae.W_dec.grad.isfinite().all()
    sae.fix_norms()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.tensor([0.0, 1, 1]))


def test_only_rows_of_fixed_norm_are_projected_and_rescaled():
    free = make_head()
    fixed = make_head(sae=TopKConfig(name="topk", features=6, k=2), loss=AuxKLoss())
    failed = make_head(sae=TopKConfig(name="topk", features=6, k=2), loss=AuxKLoss())
    failed.failure = "for a test"
    module = make_module([free, fixed, failed])
    for head in module.heads:
        head.sae.W_dec.grad = 3 * head.sae.W_dec.detach()  # radial
        with torch.no_grad():
            head.sae.W_dec.mul_(1.5)
    DecoderNorm().on_before_optimizer_step(None, module)
    DecoderNorm().on_train_batch_end(None, module)
    norms = [head.sae.W_dec.norm(dim=1).mean().item() for head in module.heads]
    assert norms == pytest.approx([0.15, 1.0, 1.5])
    left = [head.sae.W_dec.grad.abs().max().item() > 1e-5 for head in module.heads]
    assert left == [True, False, True]


def test_biases_and_thresholds_of_every_architecture_learn_faster():
    for name, row in ARCHITECTURES.items():
        sae = row.config(name=name, features=64)
        head = make_head(sae=sae, loss=row.loss(), lr=0.1)  # sqrt(4) = 2 times
        groups = make_module([head]).configure_optimizers().param_groups
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        for key, parameter in head.sae.named_parameters():
            fast = key in ("b_enc", "b_mag", "log_threshold")
            assert rates[id(parameter)] == (0.2 if fast else 0.1), (name, key)


def test_only_the_encoder_bias_learns_faster():
    head = make_head(lr=0.1, bias_lr=5)
    optimizer = make_module([head], batch=1, steps=1).configure_optimizers()
    before = {name: p.detach().clone() for name, p in head.sae.named_parameters()}
    for parameter in head.sae.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # Adam's first step is the learning rate itself
    moved = {name: (before[name] - p).abs() for name, p in head.sae.named_parameters()}
    for name, rate in {"W_enc": 0.1, "W_dec": 0.1, "b_dec": 0.1, "b_enc": 0.5}.items():
        torch.testing.assert_close(moved[name], torch.full_like(moved[name], rate))


def test_heads_are_clipped_one_by_one():
    heads = [make_head(clip=1.0), make_head(clip=1.0), make_head(clip=None)]
    # gradients of norm 5 (only W_enc[0, 0] = 3 and b_dec[0] = 4), 0.5 and 50
    for head, factor in zip(heads, (1, 0.1, 10), strict=True):
        for parameter in head.sae.parameters():
            parameter.grad = torch.zeros_like(parameter)
        head.sae.W_enc.grad[0, 0], head.sae.b_dec.grad[0] = 3 * factor, 4 * factor
        head.last_step = SimpleNamespace(loss=torch.tensor(0.5))
    ClipGradient().on_before_optimizer_step(None, make_module(heads, batch=1, steps=1), None)
    after = [(head.sae.W_enc.grad[0, 0].item(), head.grad_norm.item()) for head in heads]
    assert after == [
        (pytest.approx(0.6, abs=1e-5), pytest.approx(5)),
        (pytest.approx(0.3), pytest.approx(0.5)),
        (pytest.approx(30), pytest.approx(50)),
    ]


def test_the_loss_of_a_head_is_mse_plus_the_warmed_up_penalty():
    head = make_head(loss=ReLULoss(l1=0.5))
    head.penalty_factor.fill_(0.25)
    x = activations()
    loss = head({SITE: x})
    output = head.sae(x)
    strengths = (output.features * head.sae.W_dec.norm(dim=1)).sum(dim=1).mean()
    expected = (output.reconstruction - x).square().mean() + 0.25 * 0.5 * strengths
    torch.testing.assert_close(loss, expected)


def test_dead_features_are_counted_in_tokens():
    head = make_head(features=3, dead_window=100)
    with torch.no_grad():
        head.sae.b_enc.copy_(torch.tensor([100.0, -100.0, 100.0]))
    head({SITE: activations(60)})
    assert head.dead.tolist() == [False] * 3
    head({SITE: activations(40)})
    assert head.tokens_since_fired.tolist() == [0, 100, 0]
    assert measure_training_scalars(head)["train/dead"] == pytest.approx(1 / 3)
    with torch.no_grad():
        head.sae.b_enc.fill_(100)
    head({SITE: activations(10)})
    assert head.dead.tolist() == [False] * 3


def trained(features=6, steps=5):
    """A head with Adam moments in every entry, and its optimizer."""
    head = make_head(features=features)
    module = make_module([head], batch=64, steps=steps)
    optimizer = module.configure_optimizers()
    for seed in range(steps):
        optimizer.zero_grad()
        head({SITE: activations(seed=seed)}).backward()
        optimizer.step()
    for parameter in head.sae.parameters():
        assert (optimizer.state[parameter]["exp_avg_sq"] > 0).all()
    return head, optimizer


def test_resampling_changes_dead_features_and_nothing_else():
    head, optimizer = trained()
    head.tokens_since_fired[torch.tensor([1, 4])] = 1000
    x = activations(32, seed=9)
    sae, state = head.sae, optimizer.state
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    moments = {
        name: {k: v.clone() for k, v in state[p].items()} for name, p in sae.named_parameters()
    }
    assert resample(head, optimizer, x, x) == 2

    alive, dead = [0, 2, 3, 5], [1, 4]
    for feature in dead:
        # the new decoder row points along one of the inputs, the encoder column likewise
        direction = torch.nn.functional.normalize(sae.W_dec[feature], dim=0)
        cosines = torch.nn.functional.normalize(x, dim=1) @ direction
        assert cosines.max().item() == pytest.approx(1, abs=1e-5)
        norm = before["W_dec"][alive].norm(dim=1).mean()
        torch.testing.assert_close(sae.W_dec[feature], direction * norm)
        norm = 0.2 * before["W_enc"][:, alive].norm(dim=0).mean()
        torch.testing.assert_close(sae.W_enc[:, feature], direction * norm)
        assert sae.b_enc[feature] == 0
        assert (before["b_enc"][feature]) != 0
    assert torch.equal(sae.W_dec[alive], before["W_dec"][alive])
    assert torch.equal(sae.W_enc[:, alive], before["W_enc"][:, alive])
    assert torch.equal(sae.b_enc[alive], before["b_enc"][alive])
    assert torch.equal(sae.b_dec, before["b_dec"])

    for moment in ("exp_avg", "exp_avg_sq"):
        now = {name: state[p][moment] for name, p in sae.named_parameters()}
        was = {name: kept[moment] for name, kept in moments.items()}
        for name, pick in (("W_dec", lambda t, i: t[i]), ("W_enc", lambda t, i: t[:, i])):
            assert not pick(now[name], dead).any()
            assert torch.equal(pick(now[name], alive), pick(was[name], alive))
        assert not now["b_enc"][dead].any()
        assert torch.equal(now["b_enc"][alive], was["b_enc"][alive])
        assert torch.equal(now["b_dec"], was["b_dec"])
    assert not head.dead.any()


@pytest.mark.parametrize(
    ("sae", "loss", "restarted"),
    [
        (JumpReLUConfig(name="jumprelu", features=6), JumpReLULoss(), {"log_threshold"}),
        (GatedConfig(name="gated", features=6), GatedLoss(), {"r_mag", "b_mag"}),
    ],
)
def test_resampling_forgets_all_that_a_dead_feature_has(sae, loss, restarted):
    head = make_head(sae=sae, loss=loss)
    optimizer = make_module([head], batch=64).configure_optimizers()
    start = {name: p.detach().clone() for name, p in head.sae.named_parameters()}
    for seed in range(5):
        optimizer.zero_grad()
        head({SITE: activations(seed=seed)}).backward()
        optimizer.step()
    head.tokens_since_fired[torch.tensor([1, 4])] = 1000
    was = {name: getattr(head.sae, name).detach().clone() for name in restarted}
    x = activations(32, seed=9)
    assert resample(head, optimizer, x, x) == 2
    alive, dead = [0, 2, 3, 5], [1, 4]
    for name in restarted:
        now = getattr(head.sae, name)
        assert torch.equal(now[dead], start[name][dead])
        assert torch.equal(now[alive], was[name][alive])
        assert not torch.equal(was[name][dead], start[name][dead])
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not optimizer.state[now][moment][dead].any()
            assert optimizer.state[now][moment][alive].any()


def test_resampling_prefers_inputs_that_are_reconstructed_badly():
    # one input has nearly all of the squared loss: every dead feature must take its direction
    head, optimizer = trained()
    x = activations(32, seed=9) * 1e-3
    x[17] = torch.tensor([50.0, -50.0, 50.0, 50.0])
    head.tokens_since_fired[:3] = 1000
    resample(head, optimizer, x, x)
    rows = torch.nn.functional.normalize(head.sae.W_dec[:1], dim=1)
    torch.testing.assert_close(rows, torch.nn.functional.normalize(x[17:18], dim=1))


def test_resampling_brings_dead_features_back():
    head, optimizer = trained(features=32)
    with torch.no_grad():
        head.sae.b_enc[:16] = -100  # never fire, get no gradient
    for seed in range(4):
        head({SITE: activations(seed=seed)})
    assert head.dead[:16].all()
    x = activations(256, seed=9)
    resample(head, optimizer, x, x)
    fired = (head.sae(activations(256, seed=10)).features > 0).any(dim=0)
    assert fired.all()


def test_resampling_draws_from_the_heads_own_generator():
    results = []
    for seed in (1, 1, 2):
        head, optimizer = trained()
        head.generator_state.copy_(torch.Generator().manual_seed(seed).get_state())
        head.tokens_since_fired[:2] = 1000
        torch.manual_seed(len(results))  # the global generator must not matter
        x = activations(64, seed=9)
        resample(head, optimizer, x, x)
        results.append(head.sae.W_dec.detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_nothing_is_resampled_while_every_feature_lives():
    head, optimizer = trained()
    before = head.generator_state.clone()
    assert resample(head, optimizer, activations(), activations()) == 0
    assert torch.equal(head.generator_state, before)


@pytest.mark.parametrize(
    ("term", "remedy"), [("gate", "a lower optim.lr"), ("l1", "a lower loss.l1")]
)
def test_the_remedy_for_a_huge_term_is_a_setting(term, remedy):
    # the coefficient of "gate" is a constant
    head = make_head(sae=GatedConfig(name="gated", features=6), loss=GatedLoss())
    batch = {SITE: activations()}
    head(batch)
    head.last_step.terms[term] = torch.tensor(1e30)
    culprit, advice = _find_culprit(head, batch)
    assert culprit == "the gradient"
    assert advice.startswith(f"{remedy} (now ")
