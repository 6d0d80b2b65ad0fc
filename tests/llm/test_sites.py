"""Sites are found by structure, are ordered by depth, and say what is wrong."""

import pytest
import torch
from torch import nn

from sae_lightning.errors import UserError
from sae_lightning.llm.sites import Kind, LayerConfig, Site, decoder_stack, site_module


def test_sites_sort_in_the_order_in_which_the_model_computes_them():
    order = [Site(0, Kind.resid), Site(1, Kind.attn), Site(1, Kind.mlp), Site(1, Kind.resid)]
    assert sorted(reversed(order)) == order
    assert Kind.attn < Kind.mlp < Kind.resid
    assert Kind.resid >= Kind.mlp
    assert len({Site(1, Kind.mlp), Site(1, Kind.mlp)}) == 1


@pytest.mark.parametrize(
    ("kind", "text", "hook"),
    [
        (Kind.resid, "resid.9", "blocks.9.hook_resid_post"),
        (Kind.attn, "attn.9", "blocks.9.hook_attn_out"),
        (Kind.mlp, "mlp.9", "blocks.9.hook_mlp_out"),
    ],
)
def test_a_site_has_a_short_name_and_transformerlens_name(kind, text, hook):
    assert (str(Site(9, kind)), Site(9, kind).hook_name) == (text, hook)


def test_a_negative_index_is_an_error():
    with pytest.raises(UserError, match=r"^layer\.index=-1: .*give 0 or more"):
        LayerConfig(index=-1)


def test_an_index_past_the_last_block_names_the_range(tiny):
    assert LayerConfig(index=2, site=Kind.mlp).within(3) == Site(2, Kind.mlp)
    with pytest.raises(UserError, match=r"^layer\.index=3: this LLM has 3 blocks; give 0 to 2"):
        LayerConfig(index=3).within(3)
    with pytest.raises(UserError, match=r"^layer\.index=7: .* 0 to 2"):
        site_module(tiny("llama").model, Site(7, Kind.resid))


def test_the_stack_holds_the_blocks_of_every_family(llm):
    stack = decoder_stack(llm.model)
    assert len(stack) == 3
    assert len({type(block) for block in stack}) == 1


def test_a_model_without_a_stack_is_an_error(tiny_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder("gpt2"))
    model.transformer.h = nn.Sequential(*model.transformer.h)
    with pytest.raises(UserError, match="no list of 3 decoder blocks in GPT2LMHeadModel"):
        decoder_stack(model)


def test_a_block_without_the_branch_lists_what_it_holds(tiny_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder("gpt2"))
    model.transformer.h[1].mlp = nn.Identity()
    model.transformer.h[1].attn = torch.nn.ModuleList()
    del model.transformer.h[1].mlp
    with pytest.raises(UserError, match=r"^layer\.site=mlp: .*attn \(ModuleList\).*site=resid"):
        site_module(model, Site(1, Kind.mlp))


def test_a_branch_that_adds_the_residual_stream_itself_is_refused():
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        hidden_size=16, n_layer=2, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=1
    )
    model = BloomForCausalLM(config)
    assert site_module(model, Site(1, Kind.resid)) is model.transformer.h[1]
    for kind in (Kind.attn, Kind.mlp):
        with pytest.raises(UserError, match="use layer.site=resid"):
            site_module(model, Site(1, kind))
