"""Tiny causal LMs of several families, saved to disk with a real tokenizer."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from sae_lightning.llm.quiet import mute_libraries

LAYERS, WIDTH, VOCABULARY = 3, 24, 100
TEXT = "the quick brown fox jumps over the lazy dog while seven wizards quietly mix a potion"
FAMILIES = [
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gpt_neox_sequential",
    "llama",
    "gemma2",
    "falcon",  # attention and MLP in parallel, summed in place
    "opt",  # its MLP is not a module
]
IDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
MODERN = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    **IDS,
}


def tiny_config(family: str):
    """The config of a model with three blocks of width 24."""
    match family:
        case "gpt2":
            return transformers.GPT2Config(
                n_layer=LAYERS, n_embd=WIDTH, n_head=2, n_positions=32, **IDS
            )
        case "gpt_neo":
            return transformers.GPTNeoConfig(
                num_layers=LAYERS,
                hidden_size=WIDTH,
                num_heads=2,
                window_size=4,
                max_position_embeddings=32,
                attention_types=[[["global", "local", "global"], 1]],
                **IDS,
            )
        case "gpt_neox":
            return transformers.GPTNeoXConfig(**MODERN)
        case "gpt_neox_sequential":
            return transformers.GPTNeoXConfig(**MODERN, use_parallel_residual=False)
        case "llama":
            return transformers.LlamaConfig(**MODERN, num_key_value_heads=1)
        case "gemma2":
            return transformers.Gemma2Config(
                **MODERN, num_key_value_heads=1, head_dim=12, sliding_window=4
            )
        case "falcon":
            return transformers.FalconConfig(**MODERN)
        case "opt":
            return transformers.OPTConfig(**MODERN, ffn_dim=40, word_embed_proj_dim=WIDTH)
    raise ValueError(family)


def tiny_tokenizer():
    """A byte-level BPE tokenizer of 100 tokens, BOS 0 and EOS 1."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<bos>", "<eos>"], show_progress=False
    )
    core.train_from_iterator([TEXT], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>"
    )


def save_tiny(family: str, folder: str) -> str:
    """Write model and tokenizer to `folder`."""
    torch.manual_seed(0)
    with mute_libraries():
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(family))
        for parameter in model.parameters():
            # large enough for every block to change its input measurably
            parameter.data.normal_(0, 0.3)
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder


def make_byte_llama(width: int):
    """A Llama of three blocks for tokens of one byte, with random weights."""
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
