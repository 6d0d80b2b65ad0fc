"""Sites are found by structure, are ordered by depth, and say what is wrong."""

import copy

import pytest
import torch
from torch import nn

from sae_lightning.errors import UserError
from sae_lightning.llm.capture import capture
from sae_lightning.llm.sites import (
    Kind,
    LayerConfig,
    Site,
    SitePair,
    distinct_sites,
    find_decoder_stack,
    find_module_paths,
    find_site_module,
)


def test_sites_sort_in_the_order_in_which_the_model_computes_them():
    kinds = [Kind.attn, Kind.mlp_in, Kind.mlp, Kind.resid]
    order = [Site(0, Kind.resid), *(Site(1, kind) for kind in kinds)]
    assert sorted(reversed(order)) == order
    assert Kind.attn < Kind.mlp_in < Kind.mlp < Kind.resid
    assert Kind.resid >= Kind.mlp
    assert len({Site(1, Kind.mlp), Site(1, Kind.mlp)}) == 1


@pytest.mark.parametrize(
    ("kind", "text", "hook"),
    [
        (Kind.resid, "resid.9", "blocks.9.hook_resid_post"),
        (Kind.attn, "attn.9", "blocks.9.hook_attn_out"),
        (Kind.mlp_in, "mlp_in.9", "blocks.9.mlp.hook_in"),
        (Kind.mlp, "mlp.9", "blocks.9.hook_mlp_out"),
    ],
)
def test_a_site_has_a_short_name_and_transformerlens_name(kind, text, hook):
    assert (str(Site(9, kind)), Site(9, kind).hook_name) == (text, hook)


def test_a_negative_index_is_an_error():
    with pytest.raises(UserError, match=r"^layer\.index=-1: .*give 0 or more"):
        LayerConfig(index=-1)


def test_an_autoencoder_has_one_site_and_a_transcoder_two():
    one = LayerConfig(index=2, source=Kind.mlp).resolve_sites(3)
    assert one == (Site(2, Kind.mlp), Site(2, Kind.mlp))
    assert (str(one), one.hook_names) == ("mlp.2", {"hook_name": "blocks.2.hook_mlp_out"})
    assert LayerConfig(index=2, source=Kind.mlp, target=Kind.mlp).resolve_sites(3) == one
    two = LayerConfig(index=2, source=Kind.mlp_in, target=Kind.mlp).resolve_sites(3)
    assert str(two) == "mlp_in.2 -> mlp.2"
    assert two.hook_names == {
        "hook_name": "blocks.2.mlp.hook_in",
        "hook_name_out": "blocks.2.hook_mlp_out",
    }
    assert distinct_sites([two, one]) == [two.source, two.target]


@pytest.mark.parametrize("source", Kind)
def test_a_target_that_the_block_computes_before_the_source_is_refused(source):
    later = ", ".join(kind.value for kind in list(Kind)[list(Kind).index(source) :])
    for target in Kind:
        if target >= source:
            sites = LayerConfig(index=0, source=source, target=target).resolve_sites(1)
            assert sites == SitePair(Site(0, source), Site(0, target))
        else:
            error = rf"^layer\.target={target.value}: .* before its {source.value} .* {later}$"
            with pytest.raises(UserError, match=error):
                LayerConfig(index=0, source=source, target=target)


def test_an_index_past_the_last_block_names_the_range(tiny):
    with pytest.raises(UserError, match=r"^layer\.index=3: this LLM has 3 blocks; give 0 to 2"):
        LayerConfig(index=3).resolve_sites(3)
    with pytest.raises(UserError, match=r"^layer\.index=7: .* 0 to 2"):
        find_site_module(tiny("llama").model, Site(7, Kind.resid))


def test_the_stack_holds_the_blocks_of_every_family(llm):
    stack = find_decoder_stack(llm.model)
    assert len(stack) == 3
    assert len({type(block) for block in stack}) == 1


def test_a_model_without_a_stack_is_an_error(tiny_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder("gpt2"))
    model.transformer.h = nn.Sequential(*model.transformer.h)
    with pytest.raises(UserError, match="no list of 3 decoder blocks in GPT2LMHeadModel"):
        find_decoder_stack(model)


def test_a_block_without_the_branch_lists_what_it_holds(tiny_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder("gpt2"))
    model.transformer.h[1].mlp = nn.Identity()
    model.transformer.h[1].attn = torch.nn.ModuleList()
    del model.transformer.h[1].mlp
    error = r"^layer\.source, .* its MLP \(.*attn \(ModuleList\).*\); use layer=resid$"
    for kind in (Kind.mlp_in, Kind.mlp):
        with pytest.raises(UserError, match=error):
            find_site_module(model, Site(1, kind))


def test_a_branch_that_adds_the_residual_stream_itself_is_refused():
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        hidden_size=16, n_layer=2, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=1
    )
    model = BloomForCausalLM(config)
    assert find_site_module(model, Site(1, Kind.resid)) is model.transformer.h[1]
    for kind in (Kind.attn, Kind.mlp_in, Kind.mlp):
        with pytest.raises(UserError, match="use layer=resid"):
            find_site_module(model, Site(1, kind))


@pytest.mark.parametrize("kind", [Kind.resid, Kind.attn, Kind.mlp])
def test_a_site_has_transformers_name_of_the_module_that_returns_it(llm, tokens, kind):
    """As SAELens reads a model of transformers: the module's output, or the first of several."""
    site, found = Site(1, kind), []
    (name,) = find_module_paths(llm.model, [site]).values()

    def read(module, args, output):
        found.append((output if isinstance(output, torch.Tensor) else output[0]).clone())

    with llm.model.get_submodule(name).register_forward_hook(read):
        llm.model(tokens, use_cache=False)
    expected = capture(llm.model, tokens, [site])[site]
    torch.testing.assert_close(found[0].view(4, 10, -1), expected)


def test_the_mlps_input_is_the_output_of_no_module(tiny):
    sites = SitePair(Site(1, Kind.mlp_in), Site(1, Kind.mlp))
    paths = find_module_paths(tiny("llama").model, sites)
    assert sites.module_names(paths) == {"hf_hook_name_out": "model.layers.1.mlp"}
    one = SitePair(sites.target, sites.target)
    assert one.module_names(paths) == {"hf_hook_name": "model.layers.1.mlp"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox_sequential"])
def test_transformerlens_has_the_same_activation_under_the_sites_name(tiny, tokens, family):
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    llm = tiny(family)
    gains = [p for name, p in llm.model.named_parameters() if "norm" in name or "ln_" in name]
    assert min(float((gain - 1).abs().max()) for gain in gains) > 0.3
    sites = [Site(1, kind) for kind in Kind]
    expected = capture(llm.model, tokens, sites)
    bridge = bridges.TransformerBridge.boot_transformers(
        llm.name,
        hf_model=copy.deepcopy(llm.model),
        tokenizer=llm.tokenizer,
        device="cpu",
        dtype=torch.float32,
    )
    with torch.no_grad():
        _, found = bridge.run_with_cache(tokens)
    for site in sites:
        torch.testing.assert_close(
            found[site.hook_name],
            expected[site],
            rtol=1e-4,
            atol=1e-4,
            msg=lambda m, s=site: f"{s}: {m}",
        )
    before_the_gain = found["blocks.1.ln2.hook_normalized"]
    assert not torch.allclose(before_the_gain, expected[Site(1, Kind.mlp_in)], atol=0.1)
