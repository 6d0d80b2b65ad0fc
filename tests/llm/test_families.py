"""Every family of causal LMs is read correctly at each site, or refused with the reason."""

import importlib
import json
from pathlib import Path

import pytest
import torch
import transformers
from tiny_llm import MODERN, tiny_tokenizer
from tiny_run import tiny_job
from transformers import GraniteConfig, GraniteForCausalLM

from sae_lightning.errors import UserError
from sae_lightning.llm.capture import capture, measure_branch_scale, replace_activations
from sae_lightning.llm.directions import find_final_norm
from sae_lightning.llm.generate import generate
from sae_lightning.llm.load import Dtype, LLMConfig, count_llm_parameters, load_llm
from sae_lightning.llm.sites import Kind, Site, SitePair, find_decoder_stack
from sae_lightning.llm.splice import compute_logits, run_body
from sae_lightning.runs.checks import check_jobs
from sae_lightning.stream import open_rows

EVERYWHERE = dict.fromkeys(Kind, "right")
NO_SUM = EVERYWHERE | dict.fromkeys((Kind.attn, Kind.mlp), "no plain sum")
STREAMS = dict.fromkeys(Kind, "several streams")
SOME = {
    "granite": EVERYWHERE,  # adds 0.22 times its branches
    "minicpm3": EVERYWHERE,  # a share that depends on how many blocks there are
    "modernbert-decoder": EVERYWHERE,  # its LM head is called decoder
    "qwen3_5": EVERYWHERE,  # saved with what sees images, loaded without
    "qwen2_5_vl": EVERYWHERE,  # a text decoder in a model that takes images
    "smolvlm": EVERYWHERE,
    "mistral3": EVERYWHERE,
    "openai-gpt": NO_SUM,  # norms on the stream; its attention returns a list
    "minimax": NO_SUM,
    "gemma4_text": NO_SUM,  # scales the stream
    "falcon_h1": NO_SUM,  # Mamba beside attention
    "gemma3n_text": STREAMS | {Kind.mlp_in: "right"},
    "deepseek_v4": STREAMS | {Kind.mlp_in: "no such module"},
    "mllama": dict.fromkeys(Kind, "2 right, 1 not run on text")
    | {Kind.attn: "2 right, 1 no such module"},
    "jamba": EVERYWHERE | {Kind.attn: "2 right, 1 no such module"},
    "bert": "reads in both directions",
    "xlnet": "reads in both directions",
    "paligemma": "reads in both directions",
    "blip": "takes an image with every text",
    "t5gemma2": "an encoder-decoder",
}


@pytest.fixture(scope="module")
def families():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield importlib.import_module("families")


@pytest.mark.slow
@pytest.mark.parametrize("family", SOME)
def test_a_branch_is_what_it_adds_to_the_stream_or_is_refused(families, family):
    assert families.check_family(family) == SOME[family]


@pytest.mark.slow
def test_so_it_is_in_others_that_transformers_can_build_tiny(families):
    """Every fifth. All are checked by `benchmarks/families.py`, which writes docs/models.md."""
    rows = families.check_families(families.list_families()[::5])
    assert len(rows) > 50
    assert not [family for family, row in rows.items() if families.WRONG in str(row)]
    assert families.WRONG not in families.PAGE.read_text("utf8")


@pytest.fixture
def saved(families, tmp_path):
    """saved(family) -> the folder of its tiny model and a tokenizer, as if from the hub."""

    def save(family: str) -> str:
        families.save_tiny(family, tmp_path / family)
        tiny_tokenizer().save_pretrained(tmp_path / family)
        return str(tmp_path / family)

    return save


@pytest.mark.slow
@pytest.mark.parametrize("family", ["modernbert-decoder", "qwen3_5", "qwen2_5_vl", "mistral3"])
def test_a_text_decoder_in_another_model_is_cut_scored_and_continued(saved, tokens, family):
    config = LLMConfig(name=saved(family), dtype=Dtype.float32, device="cpu")
    whole, part = load_llm(config), load_llm(config, 2)
    where = [Site(1, kind) for kind in Kind]
    before, after = (capture(llm.model, tokens, where) for llm in (whole, part))
    assert all(torch.equal(before[site], after[site]) for site in where)
    assert len(find_decoder_stack(part.model)) == 2
    assert count_llm_parameters(config, 2) == sum(p.numel() for p in part.model.parameters())
    with torch.no_grad():
        output, clean = run_body(whole.model, tokens), whole.model(input_ids=tokens).logits
        torch.testing.assert_close(
            compute_logits(whole.model, output, output.last_hidden_state[0]), clean[0]
        )
    assert find_final_norm(whole.model).gain.shape == (32,)
    site = SitePair(where[0], where[0])
    (written,) = generate(whole, tokens[0], 3, site, lambda x, y: y, sequences=1)
    assert written[:10].equal(tokens[0])


@pytest.mark.parametrize("family", ["xlstm", "granitemoehybrid"])
def test_a_model_whose_cache_transformers_cannot_use_writes_without(saved, tokens, family):
    llm = load_llm(LLMConfig(name=saved(family), dtype=Dtype.float32, device="cpu"))
    sites = SitePair(Site(1, Kind.resid), Site(1, Kind.resid))
    one, other = generate(llm, tokens[0], 3, sites, lambda x, y: y, sequences=2)
    assert one.equal(other)
    assert len(one) > tokens.shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_replaced_is_what_a_block_adds_not_what_its_branch_returns(tokens, dtype):
    config = GraniteConfig(**MODERN, num_key_value_heads=1, residual_multiplier=0.22)
    model = GraniteForCausalLM(config).eval().to(dtype)
    site, after = Site(1, Kind.mlp), Site(1, Kind.resid)
    assert measure_branch_scale(model, site) == pytest.approx(0.22, rel=1e-3)
    found = capture(model, tokens, [site, after])
    with replace_activations(model, site, site, lambda x, y: x.double() + 1):
        changed = capture(model, tokens, [after])[after]
    near = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(changed, found[after] + 1, rtol=near, atol=near)


def test_a_cache_of_what_a_branch_returned_is_not_one_of_what_the_block_adds():
    config = GraniteConfig(**MODERN, num_key_value_heads=1, residual_multiplier=0.5)
    model = GraniteForCausalLM(config).eval()
    keys = [open_rows._name_site(model, Site(1, kind)) for kind in (Kind.mlp, Kind.resid)]
    assert keys == ["0.5 mlp.1", "resid.1"]


def test_a_site_that_the_llm_does_not_have_is_told_before_a_weight_is_read(saved, tmp_path):
    folder = saved("bloom")
    Path(folder, "model.safetensors").unlink()
    job = tiny_job(folder, tmp_path, tmp_path / "run")
    assert [checked.llm.layers for checked in check_jobs([job])] == [2]
    job.config.layer.source = Kind.mlp
    with pytest.raises(UserError, match=r"^layer\.source, .* BloomBlock is its MLP .*layer=resid$"):
        check_jobs([job])


def test_an_llm_without_special_tokens_is_told_before_text_is_read(saved, tmp_path):
    folder = saved("bloom")
    kept = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    kept.save_pretrained(folder)
    config = Path(folder, "config.json")
    without = json.loads(config.read_text()) | {"bos_token_id": None, "eos_token_id": None}
    config.write_text(json.dumps(without))
    Path(folder, "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"neither a BOS nor an EOS .* llm\.bos="):
        check_jobs([tiny_job(folder, tmp_path / "no such text", tmp_path / "run")])
