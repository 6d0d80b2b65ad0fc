"""A whole run small enough for a test: a tiny LLM on disk, a text file, a few dozen updates."""

import random
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf
from tiny_llm import TEXT

from sae_lightning.llm.load import Dtype, LLMConfig
from sae_lightning.llm.sites import LayerConfig
from sae_lightning.runs.config import Config, to_dataclass
from sae_lightning.runs.jobs import CONFIG_FILE, Job, format_config
from sae_lightning.runs.search import SweepConfig
from sae_lightning.runs.starts import apply_start
from sae_lightning.sae import SAEConfig
from sae_lightning.sae.relu import ReLULoss
from sae_lightning.stream.local import LocalConfig
from sae_lightning.stream.plays import PlaysConfig
from sae_lightning.stream.synthetic import SyntheticConfig
from sae_lightning.training.settings import Accelerator, EvalConfig, Precision, TrainerConfig

STEPS, BATCH = 40, 64
WORLD_STEPS, WORLD_BATCH = 60, 128


def write_text(folder: Path, words: int = 600) -> Path:
    """Three documents of random words, in one folder."""
    rng = random.Random(0)
    for name in ("a", "b", "c"):
        text = " ".join(rng.choices(TEXT.split(), k=words))
        (folder / f"{name}.txt").write_text(text)
    return folder


def tiny_job(llm: str, text: Path, folder: Path, **changes) -> Job:
    """A job of 40 updates; `changes` replace fields of its config, such as `data`."""
    config = Config(
        llm=LLMConfig(name=llm, dtype=Dtype.float32, device="cpu", batch=4),
        data=LocalConfig(path=str(text), context=16, pool=256, held_out=0.34),
        trainer=TrainerConfig(
            tokens=STEPS * BATCH,
            batch=BATCH,
            accelerator=Accelerator.cpu,
            log_every=4,
            checkpoint_every=10 * BATCH,
        ),
        eval=EvalConfig(every=15 * BATCH, tokens=150),
        layer=LayerConfig(index=1),
        model=SAEConfig(features=48),
        loss=ReLULoss(l1=1e-2),
    )
    return Job(config=replace(config, **changes), folder=folder)


def synthetic_job(folder: Path, **changes) -> Job:
    """A job of 60 updates on 32 concepts in 16 dimensions; `changes` as in `tiny_job`."""
    config = Config(
        llm=LLMConfig(name="none", device="cpu"),
        data=SyntheticConfig(concepts=32, dim=16, l0=2.0, pool=1024),
        trainer=TrainerConfig(
            tokens=WORLD_STEPS * WORLD_BATCH,
            batch=WORLD_BATCH,
            accelerator=Accelerator.cpu,
            precision=Precision.fp32,
            checkpoint_every=20 * WORLD_BATCH,
        ),
        eval=EvalConfig(every=20 * WORLD_BATCH, tokens=2000),
        layer=LayerConfig(index=0),
        model=SAEConfig(features=48),
        loss=ReLULoss(l1=1e-2),
        sweep=SweepConfig(objective="recovered"),
    )
    return Job(config=replace(config, **changes), folder=folder)


def packaged_job(folder: Path, index: int = 9, resumed: bool = False, **changes) -> Job:
    """A job on the packaged LLM, which is not run; `changes` as in `tiny_job`."""
    config = Config(
        llm=LLMConfig(name="smollm2", device="cpu"),
        data=PlaysConfig(),
        layer=LayerConfig(index=index),
        model=SAEConfig(features=100),
        loss=ReLULoss(),
    )
    return Job(config=replace(config, **changes), folder=folder, resumed=resumed)


def fill_from_start(config: Config, typed: list[str]) -> Config:
    """The config with what the SAE in `model.start` says, but for `typed` settings."""
    return to_dataclass(apply_start(OmegaConf.structured(config), typed))


def write_begun_run(sweep: Path, l1: str, *overrides: str) -> Path:
    """Create the folder of a run in `sweep` that has started but has no results."""
    folder = sweep / f"loss.l1={l1}"
    folder.mkdir(parents=True)
    job = packaged_job(folder, loss=ReLULoss(l1=float(l1)))
    job = replace(job, overrides=[*overrides, f"loss.l1={l1}"])
    (folder / CONFIG_FILE).write_text(format_config(job))
    return folder
