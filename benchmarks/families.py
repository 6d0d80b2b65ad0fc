"""Try every site in every family of causal LMs, and write the table of docs/models.md.

python benchmarks/families.py                all families, and docs/models.md anew
python benchmarks/families.py gpt2 llama     these alone, printed
"""

import re
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
import transformers
from command import command
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from sae_lightning.errors import UserError
from sae_lightning.llm.capture import capture, replaced
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.pretrained import read_config, read_model
from sae_lightning.llm.quiet import quiet
from sae_lightning.llm.sites import Kind, Site, decoder_stack
from sae_lightning.terminal import console, phase

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
WIDTH, LAYERS, MOST = 32, 4, 30_000_000
RIGHT, WRONG = "right", "WRONG"

# What a tiny model's settings are at most, by their names; the first that fits counts.
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
# What is said beside that.
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


def families() -> list[str]:
    """Types of models that are causal LMs, or text decoders in models that take images too."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return sorted({*causal, *images})


def tiny_config(family: str):
    """A config of a tiny model."""
    whole = transformers.AutoConfig.for_model(family)
    return type(whole)(**_merged(_small(whole), SETTINGS.get(family, {})))


def _merged(one: dict, other: dict) -> dict:
    parts = {k: _merged(one[k], v) for k, v in other.items() if isinstance(one.get(k), dict)}
    return one | other | parts


def _small(config, inner: bool = False) -> dict[str, Any]:
    """What differs from a family's defaults; all of an `inner` config, whose class has others."""
    found = {}
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            found[name] = _small(value, inner=True)
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((n for rule, n in SIZES.items() if re.fullmatch(rule, name)), None)
            if size is not None and (inner or value > size):
                found[name] = min(size, value)
    return found


def save_tiny(family: str, folder: Path) -> None:
    """Write a tiny model with random weights, as transformers does. It raises what it raises."""
    config, images = tiny_config(family), modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    maker = transformers.AutoModelForCausalLM
    if family in images:  # as it comes from the hub, where both classes know it
        maker = transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        size = sum(p.numel() for p in maker.from_config(config).parameters())
    if size > MOST:
        raise ValueError(f"{size} parameters in the smallest")
    torch.manual_seed(0)
    model = maker.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):  # 1 in a new model, and not in one from the hub
            buffer.fill_(0.7)
    model.save_pretrained(folder)


def row(family: str) -> dict[Kind, str] | str:
    """What is said at each site of a family; one word for all if it is refused as a whole.

    ValueError: transformers does not make a tiny model of it.
    """
    with tempfile.TemporaryDirectory() as name, quiet():
        config = LLMConfig(name=name, device="cpu")
        try:
            save_tiny(family, Path(name))
        except Exception as error:
            raise ValueError(str(error)) from error
        try:
            known = read_config(config, Path(name))
            model = read_model(config, Path(name), known, None, torch.float32, torch.device("cpu"))
            model.eval().requires_grad_(False)
            decoder_stack(model)
        except UserError as error:
            return _short(error)
        except Exception as error:
            return f"{WRONG}: {type(error).__name__} {' '.join(str(error).split())[:90]}"
        try:
            _logits(model, torch.full((2, 8), 2))
        except Exception as error:
            raise ValueError(f"the tiny model does not run: {error}") from error
        return {kind: _cell(model, kind) for kind in Kind}


REASONS = {
    "both directions": "reads in both directions",
    "takes an image": "takes an image with every text",
    "encoder-decoder": "an encoder-decoder",
    "cannot tell which part": "no such module",
    "does not just add": "no plain sum",
    "residual streams": "several streams",
    "where it reads text alone": "not run on text",
    "not one row for each": "not a row a token",
    "no list of": "no list of blocks",
    "weights are missing": "weights are missing",
    "num_hidden_layers": "no text decoder",
}


def _short(error: UserError) -> str:
    return next((short for long, short in REASONS.items() if long in str(error)), str(error))


def _cell(model: nn.Module, kind: Kind) -> str:
    """`right`, why it is refused, or what is wrong, in the blocks behind the first."""
    said: dict[str, int] = {}
    for layer in range(1, len(decoder_stack(model))):
        try:
            found = RIGHT if _is_right(model, Site(layer, kind)) else WRONG
        except UserError as error:
            found = _short(error)
        except Exception as error:
            found = f"{WRONG}: {type(error).__name__} {' '.join(str(error).split())[:90]}"
        said[found] = said.get(found, 0) + 1
    if len(said) == 1:
        return next(iter(said))
    return ", ".join(f"{n} {text}" for text, n in said.items())


@torch.no_grad()
def _is_right(model: nn.Module, site: Site) -> bool:
    """Whether what is read at `site` is what it is said to be, and what is put there counts."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 60, (2, 8), generator=generator)
    before, after = Site(site.layer - 1, Kind.resid), Site(site.layer, Kind.resid)
    value = _at(model, tokens, site)
    other = tokens.clone()
    other[:, -1] += 1
    if not _close(_at(model, other, site)[:, :-1], value[:, :-1]):
        return False  # it sees ahead
    through = _logits(model, tokens)
    counts = value.shape == (2, 8, WIDTH) and all(
        _close(_with(model, tokens, site, new, _logits), through) is same
        for new, same in ((lambda y: y, True), (torch.zeros_like, False))
    )
    if site.kind in (Kind.resid, Kind.mlp_in):
        return counts
    end = _at(model, tokens, after)
    without = _with(model, tokens, site, torch.zeros_like, lambda m, t: _at(m, t, after))
    try:
        rest = _at(model, tokens, Site(site.layer, _OTHER[site.kind]))
    except UserError:
        return counts and _close(end - value, without)
    return counts and _close(_at(model, tokens, before) + value + rest, end)


_OTHER = {Kind.attn: Kind.mlp, Kind.mlp: Kind.attn}


def _at(model: nn.Module, tokens: Tensor, site: Site) -> Tensor:
    return capture(model, tokens, [site])[site]


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def _with(model: nn.Module, tokens: Tensor, site: Site, new: Callable, then: Callable) -> Tensor:
    with replaced(model, site, site, lambda x, y: new(y)):
        return then(model, tokens)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-3 * b.norm())


def rows(asked: list[str] | None = None) -> dict[str, dict[Kind, str] | str | None]:
    """`row` of each family; None of those that are not made."""
    found = {}
    with phase("families", total=len(asked or families())) as advance:
        for family in asked or families():
            try:
                found[family] = row(family)
            except ValueError:
                found[family] = None
            advance(1)
    return found


def page(rows: dict[str, dict[Kind, str] | str | None]) -> str:
    """docs/models.md."""
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    lines, whole, left = [], {}, []
    for family, said in rows.items():
        name = f"{family} (text of images)" if family in images else family
        if said is None:
            left.append(family)
        elif isinstance(said, str):
            whole.setdefault(said, []).append(family)
        else:
            lines.append(f"| {name} | {' | '.join(said[kind] for kind in ORDER)} |")
    right = sum(
        said[kind] == RIGHT for said in rows.values() if isinstance(said, dict) for kind in Kind
    )
    refused = "\n".join(
        fill(f"- {why}: {', '.join(names)}", 100, subsequent_indent="  ", break_on_hyphens=False)
        for why, names in sorted(whole.items())
    )
    return PAGE_TEXT.format(
        date=date.today(),
        version=transformers.__version__,
        families=len(lines),
        right=right,
        cells=len(lines) * len(Kind),
        header=" | ".join(kind.value for kind in ORDER),
        rule="---|" * len(ORDER),
        rows="\n".join(lines),
        refused=refused,
        left=fill(", ".join(left), 100, break_on_hyphens=False),
    )


ORDER = (Kind.resid, Kind.attn, Kind.mlp, Kind.mlp_in)
PAGE_TEXT = """\
# Language models

Which LLMs can be read, and where. `llm.name` takes a causal language model that transformers loads,
from the hub or a folder, whatever its size; what counts is its *family*, `model_type` in its
`config.json`. This page is written by `python benchmarks/families.py`, which builds a tiny model of
every family with random weights, loads it as a run does, and checks each site in all blocks but the
first: {date}, transformers {version}, {families} families, {right} of {cells} cells right.

What is read at a site (`layer.source`, `layer.target`) of block i, and what is checked:

- `resid`: the block's output, what goes on to the next block.
- `attn`, `mlp`: what this branch adds to the residual stream,
  `resid(i) = resid(i-1) + attn(i) + mlp(i)`. Where a block adds a fixed multiple of what its branch
  returns (Granite, MiniCPM-3), that multiple is read, exported, and taken out again where it is
  replaced.
- `mlp_in`: what the MLP reads, the stream behind the MLP's norm.
- At each, that no token sees those behind it, that the LLM goes on unchanged where an activation is
  replaced by itself, and changes where it is replaced by zeros.

A cell says `right`, or why the site is refused; a run says so in one line, before it trains:

| said | why |
|---|---|
| no such module | none of the block's modules is this branch alone (Mamba, BLOOM) |
| no plain sum | a third branch (Falcon-H1), a stream that is scaled (Gemma-4) or normed (GPT-1) |
| several streams | blocks pass on several residual streams that they mix (Gemma-3n, DeepSeek-V4) |
| not run on text | this block waits for an image |
| not a row a token | the activation has more rows than the text has tokens |
| 2 right, 1 ... | blocks differ, as in hybrid models; so it is in that many of the three |

Families marked *text of images* take images too. Their text decoder is what is read: its embedding,
blocks and head; give them text as to any LLM. What encodes images is loaded with them and not used.

| family | {header} |
|---|{rule}
{rows}

Refused as a whole, all but the last without reading a weight:

{refused}

Not tried, because transformers needs another package for them, or a tiny one takes more than
smaller numbers in its config:

{left}
"""


def main(asked: list[str]) -> None:
    found = rows(asked)
    if asked:
        for family, said in found.items():
            console.print(family, "not built" if said is None else said)
    else:
        PAGE.write_text(page(found))
        console.print(f"wrote {PAGE}")


if __name__ == "__main__":
    command(main)
