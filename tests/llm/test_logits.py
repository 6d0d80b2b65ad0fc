"""Logits of some positions are the model's own, whatever it does behind its LM head."""

import pytest
import torch
import transformers
from tiny_llm import MODERN
from torch import nn

from sae_lightning.errors import UserError
from sae_lightning.llm.splice import body, logits


@torch.no_grad()
def check(model, tokens):
    whole = model(input_ids=tokens, use_cache=False).logits
    places = torch.tensor([3, 0, 11, 39])
    output = body(model, tokens)
    some = logits(model, output, output.last_hidden_state.flatten(0, 1)[places])
    torch.testing.assert_close(some, whole.flatten(0, 1)[places])
    assert torch.equal(model(input_ids=tokens, use_cache=False).logits, whole), "as it was"


def test_they_are_those_of_the_whole_model(llm, tokens):
    check(llm.model, tokens)


def test_what_follows_the_lm_head_is_done_too(tokens):
    """A soft cap that cuts, a scale, a mixture of experts with its routers' outputs, and a model
    whose `base_model` is the whole of it."""
    torch.manual_seed(0)
    small = MODERN | {"num_key_value_heads": 1}
    for config, differs in (
        (transformers.Gemma2Config(**small, head_dim=12, final_logit_softcapping=0.5), True),
        (transformers.CohereConfig(**small, logit_scale=0.25), True),
        (transformers.MixtralConfig(**small, num_local_experts=2), False),
        (transformers.Llama4TextConfig(**small, head_dim=12, num_local_experts=2), False),
    ):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        check(model, tokens)
        with torch.no_grad():
            hidden = body(model, tokens).last_hidden_state
            plain = model.get_output_embeddings()(hidden)
            whole = model(input_ids=tokens, use_cache=False).logits
        assert torch.equal(plain, whole) is not differs


def test_a_model_whose_head_cannot_be_told_is_refused(tiny, tokens):
    class Other(nn.Module):
        def __init__(self, llm):
            super().__init__()
            self.base_model, self.inner = llm.base_model, llm
            self.get_decoder = lambda: llm.base_model

        def forward(self, input_ids, use_cache):
            return transformers.modeling_outputs.CausalLMOutput(logits=input_ids[..., None])

    model = Other(tiny("llama").model)
    output = body(model, tokens)
    with pytest.raises(UserError, match="cannot tell the LM head of Other"):
        logits(model, output, output.last_hidden_state[0])
    assert "forward" not in vars(model.base_model)
