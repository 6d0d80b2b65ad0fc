"""`llm.load`: an LLM over RAM and disk computes what it does in one place, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_run import tiny_job, write_text

from sae_lightning.errors import UserError
from sae_lightning.llm.capture import capture
from sae_lightning.llm.directions import find_final_norm, measure_response, read_embedding
from sae_lightning.llm.generate import Sampling, compute_surprisal, generate
from sae_lightning.llm.load import Dtype, LLMConfig, check_load, load_llm
from sae_lightning.llm.placement import (
    find_activation_device,
    find_computing_device,
    make_load_arguments,
    read_weight,
)
from sae_lightning.llm.sites import Kind, Site, SitePair
from sae_lightning.llm.splice import score_baseline, score_splices
from sae_lightning.runs.jobs import CONFIG_FILE, Job, format_config, read_job
from sae_lightning.runs.passes import train_jobs
from sae_lightning.stream.open_rows import hash_llm

DISK = {"": "disk"}
PARTLY = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2.self_attn": "disk",
    "model.layers.2.mlp": "cpu",
    "model.layers.2.input_layernorm": "cpu",
    "model.layers.2.post_attention_layernorm": "cpu",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def load(folder: str, blocks: int | None = None, **settings):
    config = LLMConfig(name=folder, dtype=Dtype.float32, device="cpu", load=settings)
    return load_llm(config, blocks)


def with_load(job: Job, settings: dict) -> Job:
    """`job` with `settings` as its llm.load."""
    llm = replace(job.config.llm, load=settings)
    return replace(job, config=replace(job.config, llm=llm))


@pytest.fixture(params=["partly", "disk"])
def spread(request, tiny_folder, tmp_path):
    """The tiny Llama with some or all of its weights on disk."""
    places = {"partly": PARTLY, "disk": DISK}[request.param]
    return load(tiny_folder("llama"), device_map=places, offload_folder=str(tmp_path / "off"))


def test_offloaded_llms_compute_the_same_bits(tiny, spread, tokens):
    whole, model = tiny("llama"), spread.model
    assert any(p.is_meta for p in model.parameters())
    assert find_computing_device(model) == find_activation_device(model) == torch.device("cpu")
    sites = [Site(block, kind) for block in range(3) for kind in Kind]
    places = torch.tensor([1, 5, 17])
    for positions in (None, places):
        plain = capture(whole.model, tokens, sites, positions)
        for site, x in capture(model, tokens, sites, positions).items():
            assert torch.equal(x, plain[site]), site
    assert hash_llm(model) == hash_llm(whole.model)


@pytest.mark.slow
def test_losses_text_and_directions_of_offloaded_llms_are_the_same(tiny, spread, tokens):
    site, keep = Site(1, Kind.resid), torch.ones(4, 10, dtype=torch.bool)
    scores = []
    for llm in (tiny("llama"), spread):
        baseline = score_baseline(llm.model, tokens, site, keep, torch.ones(24), batch=2)
        shrink = [lambda x: 0.9 * x]
        score = score_splices(llm.model, tokens, site, site, shrink, keep, baseline, batch=2)
        pair, sampling = SitePair(site, site), Sampling(temperature=1.0)
        told = generate(llm, tokens[0], 4, pair, lambda x, y: 0.9 * y, 2, sampling)
        response = measure_response(
            llm.model, tokens, site, torch.eye(24)[:2], share=0.1, advance=lambda n: None
        )
        rows = [
            compute_surprisal(llm.model, tokens[0]),
            read_embedding(llm.model, 50),
            read_weight(llm.model.get_output_embeddings()),
            find_final_norm(llm.model).gain,
            response,
        ]
        rows = [x.tolist() for x in rows]
        scores.append((baseline, score, [text.tolist() for text in told], rows))
    assert scores[0] == scores[1]


def test_only_the_first_blocks_are_placed(tiny, tiny_folder, tokens):
    sites = [Site(0, Kind.mlp), Site(1, Kind.resid)]
    cut = load(tiny_folder("llama"), blocks=2, device_map=PARTLY).model
    assert not any("layers.2" in name or "lm_head" in name for name, _ in cut.named_parameters())
    plain = capture(tiny("llama").model, tokens, sites)
    for site, x in capture(cut, tokens, sites).items():
        assert torch.equal(x, plain[site])


def test_accelerate_places_what_does_not_fit_into_max_memory_on_disk(tiny_folder):
    model = load(tiny_folder("gpt2"), device_map="auto", max_memory={"cpu": "60KB"}).model
    assert {*model.hf_device_map.values()} == {"cpu", "disk"}


def test_without_a_device_map_the_llm_is_on_its_own_device(tiny_folder):
    device = torch.device("cuda:1")
    placed = make_load_arguments({"variant": "x"}, device)
    assert placed == {"device_map": {"": device}, "variant": "x"}
    assert make_load_arguments({}, device) == {}
    memory = {"max_memory": {"0": "20GiB", "cpu": "60GiB"}, "device_map": "auto"}
    assert make_load_arguments(memory, device)["max_memory"] == {0: "20GiB", "cpu": "60GiB"}
    model = load(tiny_folder("gpt2"), variant=None).model
    assert find_activation_device(model) == torch.device("cpu")


def test_weights_written_to_disk_are_in_a_new_folder(tmp_path):
    folders = [
        make_load_arguments({"offload_folder": str(tmp_path / "off")}, torch.device("cpu"))
        for _ in range(2)
    ]
    first, second = (arguments["offload_folder"] for arguments in folders)
    assert first.parent == second.parent == tmp_path / "off"
    assert first != second and first.is_dir() and second.is_dir()


@pytest.mark.slow
def test_a_run_with_weights_on_disk_trains_the_same_sae(tiny_folder, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    write_text(text)
    job = tiny_job(tiny_folder("llama"), text, tmp_path / "plain")
    settings = {"device_map": PARTLY, "offload_folder": str(tmp_path / "off")}
    jobs = job, with_load(replace(job, folder=tmp_path / "spread"), settings)
    for each in jobs:
        train_jobs([each])
    weights = [(each.folder / "sae" / "sae_weights.safetensors").read_bytes() for each in jobs]
    assert weights[0] == weights[1]
    metrics = [json.loads((each.folder / "metrics.json").read_text()) for each in jobs]
    assert metrics[0]["held_out"] == metrics[1]["held_out"]


def test_the_memory_of_weights_that_may_be_elsewhere_is_not_estimated(tiny_folder, tmp_path):
    job = tiny_job(tiny_folder("llama"), tmp_path, tmp_path)
    shape = job.config.data_source.read_shape()
    for each, counted in ((job, True), (with_load(job, {"device_map": DISK}), False)):
        source = each.config.data_source
        taken = source.estimate_data_memory([Site(1, Kind.resid)], shape, 100, loss_tokens=0)
        assert (taken.shared > 0) == counted


def test_a_run_keeps_its_llm_load(tiny_folder, tmp_path):
    places = {"model": 0, "lm_head": "cpu"}
    settings = {"device_map": places, "max_memory": {0: "20GiB", "cpu": "60GiB"}}
    job = with_load(tiny_job(tiny_folder("llama"), tmp_path, tmp_path), settings)
    (tmp_path / CONFIG_FILE).write_text(format_config(job))
    read = read_job(tmp_path).config
    assert read.to_flat_dict() == job.config.to_flat_dict()
    flat = read.to_flat_dict()
    assert flat["llm.load.device_map.model"] == 0
    assert flat["llm.load.max_memory.0"] == "20GiB"
    placed = make_load_arguments(read.llm.load, torch.device("cpu"))
    assert placed["max_memory"] == settings["max_memory"] and placed["device_map"] == places


def test_a_run_may_be_resumed_where_the_llm_is_spread_otherwise_but_not_quantised_otherwise(
    tmp_path,
):
    def fixed(**settings) -> dict:
        return with_load(tiny_job("x", tmp_path, tmp_path), settings).config.list_fixed_settings()

    plain = fixed()
    assert fixed(device_map="auto", max_memory={"cpu": "1GB"}, offload_folder="x") == plain
    assert fixed(quantization_config={"load_in_8bit": True}) != plain


@pytest.mark.parametrize(
    ("name", "line"),
    {
        "dtype": r"llm\.load\.dtype: not passed on; use llm\.dtype",
        "torch_dtype": r".* use llm\.dtype",
        "attn_implementation": r".* use llm\.attn",
        "trust_remote_code": r".* use llm\.trust_remote_code",
        "revision": r".* use llm\.revision",
        "local_files_only": r".* use HF_HUB_OFFLINE=1 in the environment",
        "load_in_8bit": r".* use llm\.load\.quantization_config=\{load_in_8bit:true\}",
        "tp_plan": r"llm\.load\.tp_plan: tensor parallelism .*; use llm\.load\.device_map=auto",
        "use_kernels": r"llm\.load\.use_kernels: not passed on .*; choose from device_map, .*",
    }.items(),
)
def test_other_arguments_are_refused(name, line):
    with pytest.raises(UserError, match=f"^{line}$"):
        LLMConfig(name="smollm2", load={name: "auto"})


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"quant_method": "nope"}, r".* cannot be loaded \(Unknown quantization type, got nope .*"),
        ({"bits": 3}, r".* has no `quant_method` attribute\); change llm\.load or .*"),
        (3, r".* cannot be loaded \('int' object is not iterable\); change llm\.load or .*"),
    ],
)
def test_wrong_quantisations_are_refused_before_anything_is_loaded(tiny_folder, settings, line):
    config = LLMConfig(name=tiny_folder("gpt2"), load={"quantization_config": settings})
    with pytest.raises(UserError, match=line):
        check_load(config)


def test_a_quantisation_says_which_package_is_missing(tiny_folder, monkeypatch):
    monkeypatch.setattr(
        "transformers.quantizers.quantizer_bnb_8bit.is_bitsandbytes_available", lambda *_: False
    )
    settings = {"quantization_config": {"load_in_8bit": True}}
    line = r"needs a missing package \(Using `bitsandbytes` .*\); run: pip install bitsandbytes, or"
    with pytest.raises(UserError, match=line):
        check_load(LLMConfig(name=tiny_folder("gpt2"), load=settings))


def test_wrong_places_are_told_in_one_line(tiny_folder):
    for settings, line in (
        ({"device_map": "moon"}, r"\(When passing device_map as a string, .*; change llm\.load or"),
        ({"device_map": {"transformer.h": "disk"}}, r".*; change llm\.load or"),
        (
            {"device_map": "auto", "max_memory": {"cpu": "3 apples"}},
            r"3 apples .* llm\.load",
        ),
    ):
        with pytest.raises(UserError, match=line):
            load(tiny_folder("gpt2"), **settings)


def test_bitsandbytes_quantises_on_a_cpu(tiny, tiny_folder, tokens):
    pytest.importorskip("bitsandbytes")
    site = Site(1, Kind.resid)
    settings = {"quantization_config": {"load_in_8bit": True}}
    x = capture(load(tiny_folder("llama"), **settings).model, tokens, [site])[site]
    plain = capture(tiny("llama").model, tokens, [site])[site]
    assert 0 < (x - plain).norm() / plain.norm() < 0.1
