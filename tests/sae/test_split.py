"""Claim: an SAE whose features are split over ranks trains up to rounding as on one rank."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rank_processes import run_on_ranks
from torch import Generator

from sae_lightning import UserError
from sae_lightning.llm.sites import Kind, Site
from sae_lightning.ranks import FeatureSplit, Ranks, world
from sae_lightning.sae import ARCHITECTURES, SAEConfig, build_sae, initial
from sae_lightning.sae.jumprelu import JumpReLULoss, PenaltyKind
from sae_lightning.training.callbacks.curves import measure_training_scalars
from sae_lightning.training.callbacks.resample import resample
from sae_lightning.training.callbacks.update import ClipGradient, DecoderNorm, Schedule, TargetL0
from sae_lightning.training.head import Head
from sae_lightning.training.module import SAEModule
from sae_lightning.training.settings import CallbacksConfig, OptimConfig, Products

TOKENS, WIDTH, FEATURES, STEPS = 64, 24, 53, 5  # 53 is a prime
CLIP = 0.05
DENSE, SPARSE = Products.dense, Products.sparse
SOURCE, TARGET = Site(0, Kind.mlp_in), Site(0, Kind.mlp)
COMPETING, AUXK = {"k": 4}, {"auxk": 0.5, "auxk_k": 3}
STEERED = {"target_l0": 5.0, "preact": 1e-2, "warmup": 0.2}
# architecture -> settings of the network and of the objective
SETTINGS = {
    "relu": ({}, {"l1": 0.1, "p": 0.5, **STEERED}),
    "dense": ({}, {}),
    "topk": (COMPETING, AUXK),
    "batch_topk": (COMPETING, AUXK),
    "jumprelu": ({"decoder_norm": 1.0, "threshold": 0.5}, {"l0": 0.1, **STEERED}),
    "gated": ({"start_bias": -1.0}, {"l1": 0.1, **STEERED}),
    "matryoshka": ({**COMPETING, "groups": [0.02, 0.1, 0.3]}, AUXK),  # the first has 1 feature
}
# architecture, width of the target, dtype of products, their kind
CASES = [
    (name, *rest)
    for name in SETTINGS
    for rest in [
        (WIDTH, torch.float32, DENSE),
        (WIDTH, torch.float32, SPARSE),
        (WIDTH, torch.bfloat16, DENSE),
        (WIDTH, torch.bfloat16, SPARSE),
        (20, torch.float32, SPARSE),
        (20, torch.bfloat16, DENSE),
    ]
]
CASES_ON_THREE = [case for case in CASES if (case[2] is torch.float32) == (case[3] is SPARSE)]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=Generator().manual_seed(seed))


def make_head(name, width_out):
    network, objective = SETTINGS[name]
    transcoder = width_out != WIDTH
    config = ARCHITECTURES[name].config(
        name=name, features=FEATURES, skip=transcoder, seed=3, **network
    )
    sae = build_sae(config, WIDTH, width_out, ranks=world())
    loss = ARCHITECTURES[name].loss(**objective)
    if name == "jumprelu" and transcoder:
        loss = JumpReLULoss(l0=0.1, penalty_kind=PenaltyKind.step)
    return Head(
        sae,
        name=name,
        folder=Path(),
        source=SOURCE,
        target=TARGET if transcoder else SOURCE,
        loss=loss,
        optim=OptimConfig(lr=3e-3, clip=CLIP),
        callbacks=CallbacksConfig(),
        dead_window=TOKENS,
        seed=1,
    )


def join(sae, tensors):
    """Tensors by name, with the features of all ranks."""
    dims, split = sae.split_dims, sae.split
    return {
        name: split.join(x.detach().movedim(dims[name], 0)).movedim(0, dims[name]).clone()
        if name in dims
        else x.detach().clone()
        for name, x in tensors.items()
    }


def train(name, width_out, dtype, products):
    """What happens in a few updates, with a resampling."""
    head = make_head(name, width_out)
    head.products, sae = products, head.sae
    result = {"start": join(sae, sae.state_dict()), "gradients": [], "losses": []}
    # a fifth of the features hardly fires
    sae.b_enc.data -= sae.split.slice(2.0 * (torch.arange(FEATURES) % 5 == 0))
    module = SAEModule([head], batch=TOKENS, steps=STEPS)
    optimizer = module.configure_optimizers()
    trainer = SimpleNamespace(global_step=0, optimizers=[optimizer])
    for step in range(STEPS):
        batch = {SOURCE: noise(TOKENS, WIDTH, seed=step), TARGET: noise(TOKENS, 20, seed=-step - 1)}
        Schedule().on_train_batch_start(trainer, module)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = head(batch)
        loss.backward()
        DecoderNorm().on_before_optimizer_step(trainer, module)
        if step in (0, STEPS - 1):
            gradients = {name: p.grad for name, p in sae.named_parameters()}
            result["gradients"].append(join(sae, gradients))
        ClipGradient().on_before_optimizer_step(trainer, module)
        optimizer.step()
        trainer.global_step += 1
        DecoderNorm().on_train_batch_end(trainer, module)
        TargetL0().on_train_batch_end(trainer, module)
        result["losses"].append(loss.item())
        if step == 2:
            result["before"] = measure_training_scalars(head)
            result["resampled"] = resample(head, optimizer, *head.normalise(batch))
    result["after"] = measure_training_scalars(head)
    result["dead"] = sae.split.join(head.dead)
    result["density"] = sae.estimate_density(sae.training_pass(batch[SOURCE]))
    result["end"] = join(sae, sae.state_dict())
    result["shared"] = [x for name, x in sae.state_dict().items() if name not in sae.split_dims]
    return result


def train_all():
    return {case: train(*case) for case in CASES if world().size < 3 or case in CASES_ON_THREE}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{number of ranks: [{case: what happened}, by rank]}"""
    return run_on_ranks(train_all, tmp_path_factory.mktemp("ranks"))


def apart(one, other):
    """The size of a difference, as a share of what it is a difference from."""
    return ((one - other).norm() / other.norm()).item()


def furthest(tensors, others):
    return max(apart(x, others[name]) for name, x in tensors.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "case"), [*((2, case) for case in CASES), *((3, case) for case in CASES_ON_THREE)]
)
def test_split_features_train_as_on_one_rank(results, size, case):
    (alone,), (split, *others) = ([happened[case] for happened in results[n]] for n in (1, size))
    assert all(torch.equal(x, split["start"][name]) for name, x in alone["start"].items())
    for other in others:
        assert other["losses"] == split["losses"]
        for x, first in zip(other["shared"], split["shared"], strict=True):
            assert torch.equal(x, first)
    assert split["resampled"] == alone["resampled"] > 0
    gradients = list(map(furthest, split["gradients"], alone["gradients"]))
    if case[2] is torch.float32:
        assert split["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert max(gradients) < 1e-5
        assert furthest(split["end"], alone["end"]) < 1e-6
        for curves in ("before", "after"):
            assert split[curves] == pytest.approx(alone[curves], rel=1e-5, abs=1e-6)
        assert torch.equal(split["dead"], alone["dead"])
        assert split["density"] == pytest.approx(alone["density"], rel=1e-6)
        return
    assert split["losses"] == pytest.approx(alone["losses"], rel=0.03)
    if case[0] in ("topk", "batch_topk", "matryoshka"):  # equal strengths compete for a place
        assert gradients[0] < 0.3
    else:
        assert gradients[0] < 0.01
        assert furthest(split["end"], alone["end"]) < 0.05


@pytest.mark.slow
def test_what_is_global_does_happen(results):
    for happened in results[1][0].values():
        curves = happened["before"]
        assert curves["optim/grad_norm"] > CLIP and curves["train/dead"] > 0
        assert curves.get("train/auxk", 1) > 0 and curves.get("train/preact", 1) > 0


@pytest.mark.parametrize("features", [1, 5, 17, 50])
@pytest.mark.parametrize("d", [1, 3, 7, 16, 24])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_rank_draws_its_rows_of_one_draw(monkeypatch, features, d, size):
    monkeypatch.setattr(initial, "NUMBERS_AT_ONCE", 50)
    after = Generator().manual_seed(0)
    whole = torch.randn(features, d, generator=after)
    generators = [Generator().manual_seed(0) for _ in range(size)]
    for rank, generator in enumerate(generators):
        split = FeatureSplit(features, Ranks(rank, size))
        rows = initial.draw_directions(split, d, generator)
        assert torch.equal(rows, whole[rank::size])
        assert torch.equal(generator.get_state(), after.get_state())


def test_more_devices_than_features_are_refused():
    with pytest.raises(UserError, match="model.features=2: give at least 1 feature for each of"):
        build_sae(SAEConfig(features=2), 4, 4, ranks=Ranks(0, 3))
