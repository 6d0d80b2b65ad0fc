"""What is captured is what the model computed, with no more work than needed."""

import pytest
import torch
from blocks import mlp_norm, mlp_of, parallel

from sae_lightning.llm.capture import capture
from sae_lightning.llm.sites import Kind, Site, find_decoder_stack, find_site_module

LAYERS = range(3)
EVERYWHERE = [Site(layer, kind) for layer in LAYERS for kind in Kind]


def hook_count(model) -> int:
    """Hooks on all modules; transformers leaves some of its own after output_hidden_states."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def final_norm(model):
    base = model.get_decoder()
    names = ("ln_f", "final_layer_norm", "norm")
    return next(getattr(base, name) for name in names if hasattr(base, name))


@pytest.fixture
def hidden(llm, tokens):
    """The embedding and the output of each block, as the model itself reports them."""
    with torch.no_grad():
        output = llm.model(input_ids=tokens, use_cache=False, output_hidden_states=True)
    return output.hidden_states


def test_resid_is_the_hidden_state_after_the_block(llm, tokens, hidden):
    found = capture(llm.model, tokens, [Site(i, Kind.resid) for i in LAYERS])
    for i in (0, 1):
        torch.testing.assert_close(found[Site(i, Kind.resid)], hidden[i + 1], rtol=0, atol=0)
        assert (hidden[i + 1] - hidden[i]).abs().mean() > 0.05  # the blocks do something
    # The last hidden state that the model reports lies behind its final norm.
    last = final_norm(llm.model)(found[Site(2, Kind.resid)])
    torch.testing.assert_close(last, hidden[3])


def test_attn_and_mlp_are_the_two_terms_that_a_block_adds(llm, tokens, hidden):
    found = capture(llm.model, tokens, EVERYWHERE)
    for i in LAYERS:
        attn, mlp = found[Site(i, Kind.attn)], found[Site(i, Kind.mlp)]
        torch.testing.assert_close(
            hidden[i] + attn + mlp, found[Site(i, Kind.resid)], rtol=1e-4, atol=1e-4
        )
        assert attn.abs().mean() > 0.01
        assert mlp.abs().mean() > 0.01


def test_mlp_in_is_what_the_mlp_reads(llm, tokens, hidden):
    """With what lies between, from the residual stream to what the block adds to it."""
    found = capture(llm.model, tokens, EVERYWHERE)
    for i, block in enumerate(find_decoder_stack(llm.model)):
        x, mlp = found[Site(i, Kind.mlp_in)], found[Site(i, Kind.mlp)]
        stream = hidden[i] if parallel(llm.model) else hidden[i] + found[Site(i, Kind.attn)]
        with torch.no_grad():
            torch.testing.assert_close(mlp_norm(block)(stream), x, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(mlp_of(block)(x), mlp, rtol=1e-4, atol=1e-4)


def test_stopping_early_changes_no_captured_value(llm, tokens):
    together = capture(llm.model, tokens, EVERYWHERE)
    for site in EVERYWHERE:
        alone = capture(llm.model, tokens, [site])
        assert list(alone) == [site]
        assert torch.equal(alone[site], together[site])


def test_only_the_wanted_places_are_copied_out(llm, tokens):
    whole, places = capture(llm.model, tokens, EVERYWHERE), torch.tensor([3, 0, 11, 39])
    some = capture(llm.model, tokens, EVERYWHERE, places)
    for site in EVERYWHERE:
        assert torch.equal(some[site], whole[site].flatten(0, 1)[places])
        assert some[site].untyped_storage().nbytes() == some[site].nbytes, "no view of the whole"


def test_blocks_after_the_deepest_site_and_the_lm_head_do_not_run(llm, tokens):
    calls = []
    watched = [*find_decoder_stack(llm.model), llm.model.get_output_embeddings()]
    hooks = [
        module.register_forward_pre_hook(lambda module, args, i=i: calls.append(i))
        for i, module in enumerate(watched)
    ]
    try:
        capture(llm.model, tokens, [Site(1, Kind.attn), Site(0, Kind.resid)])
        assert calls == [0, 1]
        calls.clear()
        capture(llm.model, tokens, [Site(2, Kind.resid)])
        assert calls == [0, 1, 2]
        calls.clear()
        mlp = find_site_module(llm.model, Site(1, Kind.mlp))
        hooks.append(mlp.register_forward_hook(lambda *_: calls.append("mlp")))
        capture(llm.model, tokens, [Site(1, Kind.mlp_in)])
        assert calls == [0, 1]
    finally:
        for hook in hooks:
            hook.remove()


def test_no_hook_is_left_after_normal_use(llm, tokens):
    before = hook_count(llm.model)
    capture(llm.model, tokens, EVERYWHERE)
    assert hook_count(llm.model) == before


def test_no_hook_is_left_after_an_exception(llm, tokens):
    def break_down(module, args):
        raise RuntimeError("broken in the middle")

    before = hook_count(llm.model)
    hook = find_decoder_stack(llm.model)[1].register_forward_pre_hook(break_down)
    with pytest.raises(RuntimeError, match="broken in the middle"):
        capture(llm.model, tokens, EVERYWHERE)
    hook.remove()
    assert hook_count(llm.model) == before


def test_an_unknown_site_leaves_no_hook(tiny, tokens):
    model = tiny("llama").model
    before = hook_count(model)
    with pytest.raises(ValueError, match="layer.index=9"):
        capture(model, tokens, [Site(0, Kind.resid), Site(9, Kind.resid)])
    assert hook_count(model) == before


def test_captured_activations_can_be_trained_on(tiny, tokens):
    site = Site(1, Kind.resid)
    x = capture(tiny("llama").model, tokens.to(torch.int32), [site])[site]
    assert x.shape == (4, 10, 24)
    assert not x.requires_grad
    weight = torch.ones(24, requires_grad=True)
    (x * weight).sum().backward()  # an inference tensor would raise here
    assert weight.grad.abs().sum() > 0
