"""Norms, embeddings and responses of blocks are measured, so they hold in every family."""

import copy

import pytest
import torch
import transformers
from blocks import mlp_norm as mlp_norm_of
from tiny_llm import IDS, MODERN

from sae_lightning.errors import UserError
from sae_lightning.llm import directions
from sae_lightning.llm.capture import capture, replace_activations
from sae_lightning.llm.directions import (
    find_final_norm,
    find_mlp_norm,
    measure_response,
    read_embedding,
)
from sae_lightning.llm.sites import Kind, Site, find_decoder_stack
from sae_lightning.llm.splice import run_body

LAST = Site(2, Kind.resid)


def hook_count(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def module_behind(model):
    base = model.get_decoder()
    names = ("ln_f", "final_layer_norm", "norm")
    return next(getattr(base, name) for name in names if hasattr(base, name))


def scale(norm, x):
    """What the norm divides x [..., d] by, written out."""
    x = x - x.mean(-1, keepdim=True) if norm.centres else x
    return x.square().mean(-1, keepdim=True).sqrt()


def test_a_direction_changes_the_logits_as_finite_differences_do_at_a_fixed_scale(llm, tokens):
    """r and r + v (rescaled to the same scale) through the model's own norm and head: since a norm
    forgets the length of its input, N(r + v) scale(r + v) - N(r) scale(r) is what v adds."""
    model = llm.model
    norm, head = find_final_norm(model), model.get_output_embeddings().weight.double()
    own = module_behind(model)
    r = capture(model, tokens, [LAST])[LAST][0, 1:].float()
    v = torch.randn(9, 24, generator=torch.Generator().manual_seed(0))
    constant = own(torch.zeros(24))

    def unscaled(x):
        return (own(x) - constant).double() * scale(norm, x).double()

    expected = (unscaled(r + v) - unscaled(r)) @ head.T
    torch.testing.assert_close(
        norm.apply_linear(v).double() @ head.T, expected, rtol=2e-3, atol=2e-3
    )
    assert expected.std() > 0.1


def test_norms_are_told_apart(tiny):
    centring = {
        f: find_final_norm(tiny(f).model).centres for f in ("gpt2", "opt", "llama", "gemma2")
    }
    assert centring == {"gpt2": True, "opt": True, "llama": False, "gemma2": False}
    # Gemma's gain is 1 + weight
    gemma = tiny("gemma2").model
    torch.testing.assert_close(
        find_final_norm(gemma).gain, 1 + gemma.model.norm.weight, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("layer", [0, 2])
def test_what_an_encoder_reads_behind_the_norm_of_an_mlp_is_a_direction_of_the_stream(llm, layer):
    """w N(r) scale(r) = reads(w) r, up to the norm's constant."""
    norm, own = find_mlp_norm(llm.model, layer), mlp_norm_of(find_decoder_stack(llm.model)[layer])
    r, w = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
    expected = ((own(r) - own(torch.zeros(24))) * scale(norm, r) * w).sum(-1)
    torch.testing.assert_close(
        (norm.apply_transpose(w) * r).sum(-1), expected, rtol=1e-3, atol=1e-3
    )
    # and `passes` and `reads` are transposes
    torch.testing.assert_close(
        (norm.apply_linear(r) * w).sum(-1), (norm.apply_transpose(w) * r).sum(-1)
    )


def test_embeddings_are_what_reaches_block_0_without_the_position(llm):
    found = read_embedding(llm.model, 90)
    weight = llm.model.get_input_embeddings().weight[:90]
    factor = 24**0.5 if "gemma" in llm.name else 1
    expected = (weight - weight.mean(0)) * factor
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found.mean(0), torch.zeros(24), atol=1e-5, rtol=0)


def test_no_hook_is_left_behind(llm):
    before = hook_count(llm.model)
    find_final_norm(llm.model), find_mlp_norm(llm.model, 1), read_embedding(llm.model, 3)
    assert hook_count(llm.model) == before


def test_a_head_that_reads_no_norm_is_refused(tiny):
    model = copy.deepcopy(tiny("gpt2").model)
    model.transformer.ln_f = torch.nn.Linear(24, 24)
    with pytest.raises(UserError, match="GPT2LMHeadModel has no norm before the unembedding"):
        find_final_norm(model)


def test_so_is_one_that_reads_a_projection_to_another_width():
    """As in OPT-350m."""
    config = transformers.OPTConfig(
        **MODERN, ffn_dim=40, word_embed_proj_dim=12, do_layer_norm_before=False
    )
    with pytest.raises(UserError, match="has no norm before .*; leave direct=true out"):
        find_final_norm(random_model(config))


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(
        directions, "DIRECTIONS_PER_PASS", 4
    )  # 6 directions and the LLM as it is: two passes


def check_response(model, tokens, kind):
    site, vectors = Site(1, kind), torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    done = []
    found = measure_response(model, tokens[:2], site, vectors, 0.5, done.append)

    def change(direction):
        def add(x, y):
            y = y.clone().view(2, 10, 24)
            last = y[:, -1]
            y[:, -1] = last + 0.5 * direction / direction.norm() * last.norm(dim=1, keepdim=True)
            return y.view_as(x)

        with replace_activations(model, site, site, add):
            return run_body(model, tokens[:2]).last_hidden_state[:, -1]

    with torch.no_grad():
        plain = run_body(model, tokens[:2]).last_hidden_state[:, -1]
        expected = torch.stack([(change(d) - plain).mean(0) for d in vectors])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert expected.abs().mean() > 1e-3
    assert sum(done) == 2 * 7


@pytest.mark.parametrize("kind", Kind)
def test_the_response_is_the_change_that_hooks_without_a_cache_find(
    llm, tokens, kind, small_batches
):
    check_response(llm.model, tokens, kind)


def test_so_it_is_in_a_model_whose_base_model_is_the_whole_of_it(tokens, small_batches):
    config = transformers.Llama4TextConfig(**LLAMA, head_dim=12, num_local_experts=2)
    check_response(random_model(config), tokens, Kind.resid)


LLAMA = MODERN | {"num_key_value_heads": 1}
MAMBA = IDS | {"hidden_size": 24, "num_hidden_layers": 3, "state_size": 4}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 12}
MIXED = ["full_attention", "linear_attention", "full_attention"]
REMEMBERS_OTHERWISE = {
    "mamba": lambda: transformers.MambaConfig(**MAMBA),
    "rwkv": lambda: transformers.RwkvConfig(**MAMBA, attention_hidden_size=24),
    "lfm2": lambda: transformers.Lfm2Config(
        **LLAMA, layer_types=["conv", "full_attention", "conv"]
    ),
    "qwen3.5": lambda: transformers.Qwen3_5TextConfig(**LLAMA, **LINEAR, layer_types=MIXED),
    "jamba without attention": lambda: transformers.JambaConfig(
        **LLAMA, num_experts=2, attn_layer_offset=4
    ),
    "minimax": lambda: transformers.MiniMaxConfig(
        **LLAMA, head_dim=12, num_local_experts=2, layer_types=MIXED
    ),
}


def random_model(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("family", REMEMBERS_OTHERWISE)
def test_so_it_is_in_families_that_keep_more_or_other_things_than_keys_and_values(
    family, tokens, small_batches
):
    check_response(random_model(REMEMBERS_OTHERWISE[family]()), tokens, Kind.resid)


def test_a_direction_of_length_0_changes_nothing(tiny, tokens):
    found = measure_response(
        tiny("llama").model, tokens, Site(1, Kind.resid), torch.zeros(3, 24), 0.5, id
    )
    assert torch.equal(found, torch.zeros(3, 24))
