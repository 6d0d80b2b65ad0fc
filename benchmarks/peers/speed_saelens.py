"""SAELens, timed with its own runner and activation store, the LLM included.

`documented` is the example of its documentation (`LanguageModelSAETrainingRunner`, ReLU with L1;
BatchTopK with the changes given there): everything in fp32, no autocast, 16 prompts at a time, a
buffer of 64 contexts, schedules as shares of the run. Two things differ from the example. The LLM
is a local folder, so it is loaded with `model_class_name="AutoModelForCausalLM"`, which stops at
the hooked block. The learning rate is higher and the L1 coefficient differs, because those of the
example are for 30,000 updates: a run of 100 would not become sparse.

`tuned` is faster. The LLM is cut after the hooked block and reads as many prompts at a time as ours
(`llm.batch`). Where the hardware has bf16, the LLM is in bf16 and the SAE in autocast (fp32 master
weights, as ours). On a CPU, 32 prompts at a time or a buffer of 16 contexts made no measurable
difference. `torch.compile` is off.

The text is tokenised before the clock starts, which favours all other tools. SAELens also has a
smaller buffer (8,192 tokens where ours holds 65,536), no statistics or logging (W&B is off), and
uses all tokens of a sequence (ours leaves BOS out).
"""

import importlib.metadata
import logging
from typing import Any

import sae_lens
import torch
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from timing.clock import read_clock

L1 = 4.0  # on the packaged LLM at block 9, 10,000 features: an L0 of 102 after 100 updates of 2,048
LR = 3e-3
NORM_SHARE = 1 / 30  # of the updates: 1,000 of the example's 30,000


def describe_tool() -> dict[str, Any]:
    """Name, version, variants and architectures of the tool."""
    return {
        "name": "SAELens",
        "version": importlib.metadata.version("sae-lens"),
        "variants": ["documented", "tuned"],
        "architectures": ["relu", "topk", "batch_topk"],
    }


def measure(architecture: str, variant: str, setting: float, work: dict[str, Any]) -> dict:
    """Train one SAE; the clock runs from the first fill of the buffer to the last update."""
    logging.disable(logging.INFO)
    torch.manual_seed(work["seed"])
    tokens = torch.load(work["tokens"])  # [sequences, context]
    runner = LanguageModelSAETrainingRunner(
        _make_config(architecture, variant, setting, work),
        override_dataset=Dataset.from_dict({"input_ids": list(tokens.numpy())}),
    )
    started = read_clock()
    sae = runner.run()
    seconds = read_clock() - started
    tokens, l0 = work["steps"] * work["batch"], _measure_l0(sae, runner)
    return {"tokens": tokens, "seconds": seconds, "l0": l0}


def _make_config(
    architecture: str, variant: str, setting: float, work: dict[str, Any]
) -> LanguageModelSAERunnerConfig:
    steps, tuned = work["steps"], variant == "tuned"
    dtype = torch.bfloat16 if tuned and work["bf16"] else torch.float32
    settings = {
        "model_class_name": "AutoModelForCausalLM",
        "model_name": work["truncated"] if tuned else work["llm"],
        "model_from_pretrained_kwargs": {"dtype": dtype},
        "hook_name": work["module"],
        "sae": _make_sae_config(architecture, setting, work),
        "autocast": tuned and work["bf16"],
        "training_tokens": steps * work["batch"],
        "train_batch_size_tokens": work["batch"],
        "context_size": work["context"],
        "is_dataset_tokenized": True,
        "streaming": False,
        "n_batches_in_buffer": max(64, 2 * work["batch"] // work["context"]),
        "store_batch_size_prompts": work["llm_batch"] if tuned else 16,
        "lr": LR,
        "lr_warm_up_steps": steps // 20,
        "lr_decay_steps": steps // 5,
        "n_batches_for_norm_estimate": max(1, round(NORM_SHARE * steps)),
        "logger": LoggingConfig(log_to_wandb=False),
        "n_checkpoints": 0,
        "checkpoint_path": None,
        "output_path": None,
        "device": work["device"],
        "seed": work["seed"],
        "verbose": False,
    }
    # to try other options: speed.py saelens.prefetch_llm_batches=true
    return LanguageModelSAERunnerConfig(**settings | (work["options"] if tuned else {}))


def _make_sae_config(architecture: str, setting: float, work: dict[str, Any]) -> Any:
    shape = {"d_in": work["d"], "d_sae": work["features"], "device": work["device"]}
    match architecture:
        case "relu":  # without `setting`: the L1 coefficient determines the L0
            return sae_lens.StandardTrainingSAEConfig(
                **shape,
                apply_b_dec_to_input=True,
                normalize_activations="expected_average_only_in",
                l1_coefficient=L1,
                l1_warm_up_steps=work["steps"] // 20,
            )
        case "topk":
            return sae_lens.TopKTrainingSAEConfig(**shape, k=int(setting))
        case _:
            return sae_lens.BatchTopKTrainingSAEConfig(**shape, k=setting)


@torch.no_grad()
def _measure_l0(sae: Any, runner: LanguageModelSAETrainingRunner) -> float:
    """Mean number of active features per token, in one more batch of the text."""
    batch = next(runner.activations_store).to(sae.device)
    features = sae.encode(batch)
    features = features.to_dense() if features.is_sparse else features
    return (features != 0).sum().item() / len(batch)
