"""An LLM without its last blocks and its head: less memory, the same activations."""

import pytest
import torch
import transformers
from tiny_llm import FAMILIES, MODERN, tiny_tokenizer

from sae_lightning.llm.capture import capture
from sae_lightning.llm.load import Dtype, LLMConfig, count_llm_parameters, load_llm
from sae_lightning.llm.packaged import PACKAGED
from sae_lightning.llm.quiet import mute_libraries
from sae_lightning.llm.sites import Kind, Site, find_decoder_stack


def sites(blocks: int) -> list[Site]:
    return [Site(layer, kind) for layer in range(blocks) for kind in Kind]


def numbers(model) -> int:
    return sum(p.numel() for p in model.parameters())


def check(folder: str, blocks: int, tokens, where) -> tuple[int, int]:
    """Same activations as in the whole LLM; weights of the cut one and the whole."""
    config = LLMConfig(name=folder, dtype=Dtype.float32, device="cpu")
    whole, part = load_llm(config), load_llm(config, blocks)
    assert len(find_decoder_stack(part.model)) == blocks
    before, after = (capture(llm.model, tokens, where) for llm in (whole, part))
    assert all(torch.equal(before[site], after[site]) for site in where)
    assert numbers(part.model) == count_llm_parameters(config, blocks)
    assert not any(p.requires_grad for p in part.model.parameters())
    assert not part.model.training
    return numbers(part.model), numbers(whole.model)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_activations_are_those_of_the_whole_llm(tiny_folder, tokens, family, blocks, capfd):
    part, whole = check(tiny_folder(family), blocks, tokens, sites(blocks))
    assert part < whole or blocks == 3
    output = capfd.readouterr()
    assert "layers" not in output.out + output.err, "not a word about weights left on the disk"


def save(config, folder) -> str:
    torch.manual_seed(0)
    with mute_libraries():
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_an_lm_head_of_its_own_goes_and_a_shared_one_stays_the_embedding(tmp_path, tokens):
    for tied in (True, False):
        config = transformers.LlamaConfig(**MODERN, num_key_value_heads=1, tie_word_embeddings=tied)
        folder = save(config, tmp_path / str(tied))
        part, whole = check(folder, 3, tokens, sites(3))
        assert whole - part == (0 if tied else 24 * 100)


@pytest.mark.slow
def test_a_block_that_depends_on_how_many_there_are_does_what_it_did(tmp_path, tokens):
    """Gemma-3n's last blocks take keys and values from earlier ones: which, the number decides."""
    config = transformers.Gemma3nTextConfig(
        **MODERN | {"num_hidden_layers": 4, "intermediate_size": [40] * 4},
        num_key_value_heads=1,
        head_dim=12,
        num_kv_shared_layers=2,
        layer_types=["full_attention", "sliding_attention"] * 2,
        sliding_window=4,
        vocab_size_per_layer_input=100,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    )
    check(save(config, tmp_path / "llm"), 3, tokens, [Site(2, Kind.mlp_in), Site(1, Kind.mlp_in)])


@pytest.mark.slow
def test_the_packaged_llm_is_cut_too():
    config = LLMConfig(name="smollm2", dtype=Dtype.bfloat16, device="cpu")
    tokens = torch.randint(10, 40_000, (2, 16), generator=torch.Generator().manual_seed(0))
    where = [Site(9, Kind.resid)]
    whole, part = load_llm(config), load_llm(config, 10)
    before, after = (capture(llm.model, tokens, where)[where[0]] for llm in (whole, part))
    assert torch.equal(before, after)
    # the final norm is not worth a setting of its own
    assert numbers(part.model) == pytest.approx(count_llm_parameters(config, 10), abs=600)
    assert numbers(part.model) < PACKAGED["smollm2"].parameters // 2
