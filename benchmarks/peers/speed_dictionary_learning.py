"""dictionary_learning, timed with its own buffer, which reads the LLM through nnsight.

`peers/dictionary_learning.py` says how to install it.

`documented` is its README's example: the whole LLM in fp32 (tracing stops at the hooked block), a
buffer that is refilled when it is half empty. `tuned` takes the LLM cut after the hooked block, in
bf16 where the hardware has it, and on CUDA trains in autocast. In both the buffer has the size of
our pool, because its default (30,000 contexts) is more than the whole run.
"""

import importlib.metadata
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from nnsight import LanguageModel
from timing.clock import read_clock
from transformers import AutoModelForCausalLM, AutoTokenizer

TRAINERS = {"relu": StandardTrainerAprilUpdate, "topk": TopKTrainer, "batch_topk": BatchTopKTrainer}
L1 = 0.1


def describe_tool() -> dict[str, Any]:
    """Name, version, variants and architectures of the tool."""
    return {
        "name": "dictionary_learning",
        "version": importlib.metadata.version("dictionary-learning"),
        "variants": ["documented", "tuned"],
        "architectures": list(TRAINERS),
    }


def measure(architecture: str, variant: str, setting: float, work: dict[str, Any]) -> dict:
    """Train one SAE; the clock runs from the first fill of the buffer to the last update."""
    tuned = variant == "tuned"
    dtype = torch.bfloat16 if tuned and work["bf16"] else torch.float32
    folder = work["truncated" if tuned else "llm"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # nnsight's own loading does not know the configs of current transformers
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(work["device"])
    llm = LanguageModel(model, tokenizer=tokenizer)
    buffer = ActivationBuffer(
        _read_texts(tokenizer, work),
        llm,
        reduce(getattr, work["module"].split("."), llm),
        d_submodule=work["d"],
        n_ctxs=work["pool"] // work["context"],
        ctx_len=work["context"],
        refresh_batch_size=work["llm_batch"],
        out_batch_size=work["batch"],
        device=work["device"],
    )
    steps, warm_up = work["steps"], work["steps"] // 20
    settings = {"warmup_steps": warm_up, "decay_start": steps * 4 // 5}
    if architecture == "relu":
        settings |= {"sparsity_warmup_steps": warm_up, "l1_penalty": L1}
    else:
        settings |= {"threshold_start_step": warm_up, "k": int(setting)}
    settings |= {
        "trainer": TRAINERS[architecture],
        "steps": steps,
        "activation_dim": work["d"],
        "dict_size": work["features"],
        "layer": work["block"],
        "lm_name": "llm",
        "lr": 1e-3,
        "seed": work["seed"],
        "device": work["device"],
    }
    started = read_clock()
    trainSAE(
        buffer,
        [settings],
        steps=steps,
        save_dir=None,
        normalize_activations=False,
        device=work["device"],
        autocast_dtype=dtype if work["device"] == "cuda" else torch.float32,
    )
    return {
        "tokens": steps * work["batch"],
        "seconds": read_clock() - started,
        "l0": None if architecture == "relu" else setting,
    }


def _read_texts(tokenizer: Any, work: dict[str, Any]) -> Iterator[str]:
    for row in torch.load(work["tokens"]):
        yield tokenizer.decode(row, skip_special_tokens=True)
