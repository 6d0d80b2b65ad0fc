"""SAEs trained in a second on concepts in superposition, with the recipe of a run."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Generator, Tensor

from sae_lightning.llm.sites import Kind, Site
from sae_lightning.sae import ARCHITECTURES, build_sae
from sae_lightning.stream.concepts import make_concept_world
from sae_lightning.training.callbacks.keep_control import KeepControl
from sae_lightning.training.callbacks.resample import resample
from sae_lightning.training.callbacks.update import ClipGradient, DecoderNorm, Schedule, TargetL0
from sae_lightning.training.head import Head
from sae_lightning.training.module import SAEModule
from sae_lightning.training.settings import CallbacksConfig, OptimConfig

SITE = Site(0, Kind.resid)
# so that a small coefficient has features to leave within few updates
DENSE_START = {"start_bias": 0.0, "decoder_norm": 0.1}
CALLBACKS = (Schedule(), DecoderNorm(), KeepControl(), ClipGradient(), TargetL0())


@cache
def activations(n: int = 4096, seed: int = 0) -> Tensor:
    """[n, 16] with a mean of 0 and a mean square of 1: 40 concepts, 3 at a time."""
    world = make_concept_world(concepts=40, dim=16, l0=3, zipf=0.5, seed=0)
    x, _ = world.sample(n, Generator().manual_seed(seed))
    x -= x.mean(dim=0)
    return x / x.square().mean().sqrt()


def make_head(name: str, *, loss: dict | None = None, dead_window: int = 1024, **model) -> Head:
    """A head of architecture `name` with 48 features."""
    config, _, objective = ARCHITECTURES[name]
    model = {"features": 48, **({"k": 3} if "k" in config.__dataclass_fields__ else {}), **model}
    return Head(
        build_sae(config(name=name, **model), 16, 16),
        name=name,
        folder=Path("nowhere"),
        source=SITE,
        target=SITE,
        loss=objective(**loss or {}),
        optim=OptimConfig(lr=3e-3, beta2=0.99),
        callbacks=CallbacksConfig(),
        dead_window=dead_window,
        seed=0,
    )


def train(head: Head, steps: int = 300, batch: int = 256) -> torch.optim.Optimizer:
    """Train `head`; the callbacks that change weights act as in a run."""
    module = SAEModule([head], batch=batch, steps=steps)
    optimizer = module.configure_optimizers()
    trainer = SimpleNamespace(global_step=0, optimizers=[optimizer])
    x, order = activations(), Generator().manual_seed(0)
    for step in range(steps):
        for callback in CALLBACKS:
            callback.on_train_batch_start(trainer, module, None, step)
        optimizer.zero_grad()
        head({SITE: x[torch.randint(len(x), (batch,), generator=order)]}).backward()
        for callback in CALLBACKS:
            callback.on_before_optimizer_step(trainer, module, optimizer)
        optimizer.step()
        trainer.global_step = step + 1
        for callback in CALLBACKS:
            callback.on_train_batch_end(trainer, module, None, None, step)
    return optimizer


@torch.no_grad()
def l0(head: Head) -> float:
    """Active features per token on activations that training has not seen."""
    return (head.sae(activations(2048, seed=1)).features > 0).sum(dim=1).float().mean().item()


@torch.no_grad()
def fires(head: Head) -> Tensor:
    """[features] bool: which fire on any of 2,048 activations that training has not seen."""
    return (head.sae(activations(2048, seed=1)).features > 0).any(dim=0)


def revived(head: Head) -> int:
    """How many of 24 features, put to silence for good, fire after one resampling."""
    with torch.no_grad():
        head.sae.b_enc[24:] = -100
    optimizer = train(head, steps=20)
    assert head.dead[24:].all() and not fires(head)[24:].any()
    dead, x = head.dead, activations()[:1024]
    before = [head.sae.W_enc.detach().clone().T, head.sae.W_dec.detach().clone()]
    assert resample(head, optimizer, x, x) == dead.sum()
    for was, now in zip(before, (head.sae.W_enc.T, head.sae.W_dec), strict=True):
        assert torch.equal((was != now).any(dim=1), dead), "weights of the dead change, no others"
    return int(fires(head)[24:].sum())


def preact_revives(name: str, loss: dict) -> int:
    """How many of 24 features far below their threshold fire again thanks to the pre-activation
    loss, less those that would have done so without."""
    back = []
    for preact in (0.0, 1e-3):
        head = make_head(name, loss=loss | {"preact": preact}, dead_window=512, decoder_norm=0.1)
        with torch.no_grad():
            head.sae.b_enc[24:] = -2
        before = head.sae.b_enc.detach().clone()
        train(head, 200)
        assert (head.sae.b_enc[24:] != before[24:]).all() == bool(preact)
        back.append(int((~head.dead[24:]).sum()))
    return back[1] - back[0]
