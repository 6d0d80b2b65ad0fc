"""LLMs of real shapes with random weights: as fast as the real ones, and without a download.

Their tokenizer has one token per byte, so it needs no download either.

    gpt2          GPT-2 small: 12 blocks, d = 768
    pythia_160m   Pythia-160M: 12 blocks, d = 768
    gemma_2_2b    Gemma-2-2B's width (2304) and its blocks up to the hooked one, but a vocabulary
                  of 49,152 instead of 256,000: 2 GB in bf16 at block 12
"""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from sae_lightning.llm.quiet import mute_libraries
from sae_lightning.llm.sites import find_decoder_stack
from sae_lightning.terminal import phase

VOCABULARY = 49_152


def _make_gemma_config(blocks: int) -> PretrainedConfig:
    return Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
    )


# name -> function of the number of blocks that are needed
CONFIGS: dict[str, Callable[[int], PretrainedConfig]] = {
    "gpt2": lambda _: GPT2Config(),
    "pythia_160m": lambda _: GPTNeoXConfig(
        vocab_size=50_304,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
    ),
    "gemma_2_2b": _make_gemma_config,
}


def make_random_llm(name: str, block: int, folder: Path) -> Path:
    """Make a random LLM that has block `block`, unless it is in `folder`; returns its path."""
    config = CONFIGS[name](block + 1)
    path = folder / f"{name}-{config.num_hidden_layers}"
    if (path / "config.json").is_file():
        return path.absolute()
    with phase(f"making a {name} of random weights"), mute_libraries():
        tokenizer = make_byte_tokenizer()
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        _save(model, tokenizer, path)
    return path.absolute()


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte (ids 0 to 255), then BOS (256) and EOS (257)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def truncate_llm(source: Path, block: int, dtype: torch.dtype, folder: Path) -> tuple[Path, str]:
    """Copy the LLM in `source` up to `block`; returns the copy's path, and the block's name."""
    path = folder / f"{source.name}-{block + 1}"
    with phase(f"cutting {source.name} after block {block}"), mute_libraries():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        stack = find_decoder_stack(model)
        name = next(n for n, module in model.named_modules() if module is stack[block])
        if not (path / "config.json").is_file():
            del stack[block + 1 :]
            text = model.config.get_text_config()
            text.num_hidden_layers = block + 1
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[: block + 1]
            _save(model, AutoTokenizer.from_pretrained(source), path)
    return path.absolute(), name


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Save both; the folder appears only once it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(path)
