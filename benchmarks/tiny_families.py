"""Tiny models of all families of LLMs that transformers has, with random weights."""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

WIDTH, LAYERS, MAX_PARAMETERS = 32, 4, 30_000_000

# Upper bounds of a tiny model's settings, by regular expressions of their names; the first match
# counts.
SIZES = {
    r"(unpadded_)?vocab_size.*": 128,
    r"hidden_size_per_layer_input": 8,
    r"(hidden_size|d_model|n_embd|attention_hidden_size|lru_width|word_embed_proj_dim|emb_dim|"
    r"embedding_size|.*out_hidden_size|projection_dim|dim_model_base|d_inner|embed_dim)": WIDTH,
    r"(num_hidden_layers|n_layers?|num_layers|(num_)?decoder_layers)": LAYERS,
    r"(num_)?encoder_layers": LAYERS,
    r"depth": 2,
    r"swa_num_.*heads|.*(heads|n_head|num_kv_heads|groups?|n_group)": 2,
    r".*(intermediate_size|ffn_dim|ffn_hidden_size|dim_ff|dff|n_inner)(_mlp)?": 48,
    r".*qk_head_dim": 32,
    r".*(head_dim|dim_head|kv_channels|rotary_dim|mamba_d_head)": 16,
    r".*(lora_rank|laurel_rank|state_size|d_state|dt_rank|time_step_rank)": 8,
    r".*(num_experts|n_routed_experts|num_local_experts|zero_expert_num)": 4,
    r".*(experts_per_tok(en)?|moe_topk|moe_k)": 2,
    r"(max_position_embeddings|n_positions|n_ctx|max_seq_len)": 64,
    r"(bos|eos|pad|image|video)_token_(id|index)": 1,
}
# Further settings of families that need them.
ALTERNATING = ["sliding_attention", "full_attention"] * 2
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "attn_layer_indices": [2]},
    "codegen": {"n_head": 4, "rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": ALTERNATING,
        "rope_parameters": dict.fromkeys(ALTERNATING, {"rope_type": "default", "rope_theta": 1e4}),
    },
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"attention_out_multiplier": 0.5},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ALTERNATING,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "glm4v_moe": {"text_config": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}},
    "granite": {"residual_multiplier": 0.22},
    "granite_swa": {"residual_multiplier": 0.22},
    "granitemoe": {"residual_multiplier": 0.22},
    "granitemoe_swa": {"residual_multiplier": 0.22},
    "granitemoehybrid": {"mamba_n_heads": 4, "residual_multiplier": 0.22},
    "granitemoeshared": {"residual_multiplier": 0.22},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl": {"text_config": {"head_dim": 16, "rope_parameters": ROPE}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "mimo_v2_flash": {"num_attention_heads": 8},
    "ministral": {"head_dim": 16},
    "mistral4": {"head_dim": 32},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 32,
    },
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
}
for _family in ("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl"):
    SETTINGS[_family] = {"text_config": {"rope_parameters": ROPE}}
SETTINGS["qwen2_5_omni_thinker"] = {"text_config": {"rope_parameters": ROPE}}


def list_families() -> list[str]:
    """List the families (`model_type`) of causal LMs, and of models that take images and text."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return sorted({*causal, *images})


def make_tiny_config(family: str):
    """Make the config of a tiny model."""
    whole = transformers.AutoConfig.for_model(family)
    return type(whole)(**_merge(_shrink(whole), SETTINGS.get(family, {})))


def _merge(one: dict, other: dict) -> dict:
    parts = {k: _merge(one[k], v) for k, v in other.items() if isinstance(one.get(k), dict)}
    return one | other | parts


def _shrink(config, inner: bool = False) -> dict[str, Any]:
    """The settings of `config` above the bounds of SIZES, lowered to the bounds; of an `inner`
    config, also those below the bounds, as they are."""
    changes = {}
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            changes[name] = _shrink(value, inner=True)
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((n for rule, n in SIZES.items() if re.fullmatch(rule, name)), None)
            if size is not None and (inner or value > size):
                changes[name] = min(size, value)
    return changes


def save_tiny(family: str, folder: Path) -> None:
    """Save a tiny model with random weights. Errors of transformers pass through."""
    config = make_tiny_config(family)
    maker = transformers.AutoModelForCausalLM
    # models on the hub are saved by this class, even where the other one knows the family too
    if family in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        maker = transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        size = sum(p.numel() for p in maker.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size} parameters in the smallest")
    torch.manual_seed(0)
    model = maker.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):  # 1 in a new model, but not in a trained one
            buffer.fill_(0.7)
    model.save_pretrained(folder)
