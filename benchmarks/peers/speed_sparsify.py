"""sparsify, timed with its own trainer, which runs the LLM as it trains.

    python -m venv --system-site-packages /tmp/sparsify
    /tmp/sparsify/bin/pip install --no-deps eai-sparsify schedulefree natsort einops

It trains TopK only, on one LLM batch after another, without shuffling or a buffer. An LLM batch has
as many tokens here as one of our batches.

`documented` is its README's example: the whole LLM in bf16, its own optimiser (signum). `tuned`
cuts the LLM after the hooked block and leaves the LM head out. Its autocast and its decoder's
Triton kernels are for CUDA; on a CPU it computes in fp32 with torch's embedding_bag as decoder.
"""

import importlib.metadata
import os
from typing import Any

import torch
from datasets import Dataset
from timing.clock import read_clock
from transformers import AutoModel, AutoModelForCausalLM

if not torch.cuda.is_available():
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # else it uses Triton without a GPU
from sparsify import SaeConfig, TrainConfig, Trainer  # noqa: E402


def describe_tool() -> dict[str, Any]:
    """Name, version, variants and architectures of the tool."""
    return {
        "name": "sparsify",
        "version": importlib.metadata.version("eai-sparsify"),
        "variants": ["documented", "tuned"],
        "architectures": ["topk"],
    }


def measure(architecture: str, variant: str, setting: float, work: dict[str, Any]) -> dict:
    """Train one SAE; the clock runs from the first sequence to the last update."""
    tuned = variant == "tuned"
    dtype = torch.bfloat16 if work["bf16"] else torch.float32
    kind, folder = (AutoModel, "truncated") if tuned else (AutoModelForCausalLM, "llm")
    llm = kind.from_pretrained(work[folder], dtype=dtype).to(work["device"])
    sequences = work["batch"] // work["context"]
    tokens = torch.load(work["tokens"])[: sequences * work["steps"]]
    data = {"input_ids": list(tokens.numpy())}
    config = TrainConfig(
        SaeConfig(num_latents=work["features"], k=int(setting)),
        batch_size=sequences,
        layers=[work["block"]],
        init_seeds=[work["seed"]],
        log_to_wandb=False,
    )
    trainer = Trainer(config, Dataset.from_dict(data).with_format("torch"), llm)
    trainer.save = lambda: None
    started = read_clock()
    trainer.fit()
    return {"tokens": tokens.numel(), "seconds": read_clock() - started, "l0": setting}
