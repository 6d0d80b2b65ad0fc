"""The response to a direction is what adding it by hand does to the unembedding's input."""

import pytest
import torch
from tiny_llm import MODERN
from transformers import AutoModelForCausalLM, Llama4TextConfig

from sae_lightning.llm import directions as module
from sae_lightning.llm.capture import replaced
from sae_lightning.llm.directions import response
from sae_lightning.llm.sites import Kind, Site
from sae_lightning.llm.splice import body


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(module, "BATCH", 4)  # 6 directions and the LLM as it is: two passes


def check(model, tokens, kind):
    site, directions = Site(1, kind), torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    done = []
    found = response(model, tokens[:2], site, directions, 0.5, done.append)

    def change(direction):
        def add(x, y):
            y = y.clone().view(2, 10, 24)
            last = y[:, -1]
            y[:, -1] = last + 0.5 * direction / direction.norm() * last.norm(dim=1, keepdim=True)
            return y.view_as(x)

        with replaced(model, site, site, add):
            return body(model, tokens[:2]).last_hidden_state[:, -1]

    with torch.no_grad():
        plain = body(model, tokens[:2]).last_hidden_state[:, -1]
        expected = torch.stack([(change(d) - plain).mean(0) for d in directions])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert expected.abs().mean() > 1e-3
    assert sum(done) == 2 * 7


@pytest.mark.parametrize("kind", Kind)
def test_it_is_the_change_that_hooks_without_a_cache_find(llm, tokens, kind):
    check(llm.model, tokens, kind)


def test_so_it_is_in_a_model_whose_base_model_is_the_whole_of_it(tokens):
    config = Llama4TextConfig(**MODERN, num_key_value_heads=1, head_dim=12, num_local_experts=2)
    torch.manual_seed(0)
    check(AutoModelForCausalLM.from_config(config).eval(), tokens, Kind.resid)


def test_a_direction_of_length_0_changes_nothing(tiny, tokens):
    found = response(tiny("llama").model, tokens, Site(1, Kind.resid), torch.zeros(3, 24), 0.5, id)
    assert torch.equal(found, torch.zeros(3, 24))
