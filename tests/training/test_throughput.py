"""Which time counts as training, and how often an accelerator is synchronised."""

from types import SimpleNamespace

import pytest
import torch

from sae_lightning.training.callbacks import throughput as throughput_module
from sae_lightning.training.callbacks.throughput import Throughput

STEPS, BATCH = 10, 100
FILL, LLM, POOL, SAES, OTHERS, EVALUATION = 50.0, 2.0, 1.0, 4.0, 0.5, 1000.0  # seconds


@pytest.fixture
def waits(monkeypatch) -> list[int]:
    """The updates after which the accelerator is synchronised."""
    return []


@pytest.fixture
def trained(monkeypatch, waits):
    """trained(SAEs' device, LLM's device) -> the module of a run of 10 updates by a clock that a
    test can read, and its curves; it is evaluated after 300, 600 and 900 tokens,
    and after 700, where fine-tuning with `loss.kl` begins."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput_module, "perf_counter", lambda: clock.now)
    curves: list[tuple[int, dict]] = []

    def train(device: str, llm: str):
        stream = SimpleNamespace(device=torch.device(llm), seconds=0.0, llm_seconds=0.0)
        trainer = SimpleNamespace(global_step=0, datamodule=SimpleNamespace(stream=stream))
        log = SimpleNamespace(add_scalars=lambda values, tokens: curves.append((tokens, values)))
        module = SimpleNamespace(
            device=torch.device(device),
            batch=BATCH,
            steps=STEPS,
            tokens_per_second=0.0,
            tokens_seen=0,
            tuning_starts={7},
            tuning_seconds=0.0,
        )
        trainer.lightning_module = module
        module.training_heads = [SimpleNamespace(log=log)]
        wait = lambda: waits.append(trainer.global_step)  # noqa: E731
        monkeypatch.setattr(torch.accelerator, "synchronize", wait)
        callback = Throughput(5, pause_every=(300, 10_000))
        callback.on_fit_start(trainer, module)
        clock.now += 7  # Lightning's own preparations
        for step in range(STEPS):
            llm, pool = LLM + FILL * (step == 0), POOL
            clock.now += llm + pool
            stream.seconds += llm + pool
            stream.llm_seconds += llm
            callback.on_train_batch_start(trainer, module, None, step)
            clock.now += SAES
            trainer.global_step += 1
            module.tokens_seen += BATCH
            callback.on_train_batch_end(trainer, module, None, None, step)
            clock.now += OTHERS + EVALUATION * (module.tokens_seen in (300, 600, 700, 900))
        return module, curves

    return train


def test_on_a_cpu_the_stream_and_the_saes_are_counted_and_nothing_else(trained, waits):
    module, curves = trained("cpu", "cpu")
    seconds = FILL + STEPS * (LLM + POOL + SAES)
    assert module.speed == pytest.approx(
        {
            "tokens_per_second": STEPS * BATCH / seconds,
            "llm_share": (FILL + STEPS * LLM) / seconds,
            "data_share": STEPS * POOL / seconds,
            "sae_share": STEPS * SAES / seconds,
        }
    )
    assert [tokens for tokens, _ in curves] == [500, 1000]
    assert curves[1][1]["speed/tokens_per_second"] == pytest.approx(500 / (5 * 7))
    assert waits == []


@pytest.mark.parametrize("devices", [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_an_accelerator_is_waited_for_where_something_is_measured_and_nowhere_else(
    trained, waits, devices
):
    """Whether it has the SAEs, the LLM or both."""
    module, curves = trained(*devices)
    assert waits == [3, 5, 6, 7, 9, 10]
    # what follows an update runs beside it, but for evaluation (after updates 3, 6, 7 and 9)
    seconds = FILL + STEPS * (LLM + POOL + SAES) + 5 * OTHERS
    assert module.speed == pytest.approx({"tokens_per_second": STEPS * BATCH / seconds})
    recent = 5 * (LLM + POOL + SAES) + 2 * OTHERS
    assert curves[1][1] == pytest.approx({"speed/tokens_per_second": 500 / recent})
