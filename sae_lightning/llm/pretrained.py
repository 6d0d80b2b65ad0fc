"""Loads a causal LM and its tokenizer with transformers; most errors become one-line UserErrors.

`config`: an LLMConfig; `hf_config`: transformers' config of the model; `folder`: the local folder
of the LLM, None for the hub.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from sae_lightning.errors import UserError, is_out_of_memory
from sae_lightning.llm.placement import make_load_arguments, raise_quantiser_errors
from sae_lightning.llm.sites import find_decoder_stack

# Families whose tokens attend to later ones, though AutoModelForCausalLM accepts them.
BIDIRECTIONAL = re.compile(
    "bert|bert-generation|big_bird|camembert|cpmant|data2vec-text|electra|ernie|git|megatron-bert|"
    "reformer|rembert|roberta|roberta-prelayernorm|roc_bert|roformer|xlm|xlm-roberta|"
    "xlm-roberta-xl|xlnet|xmod"
)
# Families that cannot read a text without an image.
NEEDS_IMAGES = re.compile("blip|blip-2|idefics|instructblip|instructblipvideo|kosmos-2|kosmos-2.5")


def read_config(config, folder: Path | None):
    """The model's config (transformers); UserError if it is not a causal LM."""
    from transformers import AutoConfig

    if folder is None and config.name.startswith((".", "/", "~")):
        raise UserError(f"llm.name={config.name}: no such folder; check the path")
    if folder and not (folder / "config.json").is_file():
        raise UserError(
            f"llm.name={config.name}: the folder has no config.json; give a folder that "
            "save_pretrained wrote"
        )
    with _convert_errors(config):
        hf_config = AutoConfig.from_pretrained(**_locate(config, folder))
        hf_config.get_text_config().num_hidden_layers  # noqa: B018 (raises if there are no blocks)
    if not _is_custom(hf_config) and (why := _explain_not_causal(hf_config)):
        name = ", ".join(sorted(hf_config.architectures or [hf_config.model_type]))
        raise UserError(
            f"llm.name={config.name}: {name} {why}; choose a causal language model such as gpt2"
        )
    return hf_config


def _explain_not_causal(hf_config) -> str | None:
    """Why the model is not a causal LM; None if it is one."""
    if hf_config.is_encoder_decoder:
        return "is an encoder-decoder"
    is_masked = any(name.endswith("MaskedLM") for name in hf_config.architectures or [])
    is_decoder = getattr(hf_config, "is_decoder", False)
    is_encoder = BIDIRECTIONAL.fullmatch(hf_config.model_type) and not is_decoder
    text_config = hf_config.get_text_config()
    looks_ahead = getattr(text_config, "use_bidirectional_attention", None) in (True, "all")
    if is_masked or is_encoder or looks_ahead or not getattr(text_config, "is_causal", True):
        return "reads in both directions"
    if NEEDS_IMAGES.fullmatch(hf_config.model_type):
        return "takes an image with every text"
    return None if _pick_loader(hf_config) else "is not a causal language model"


def _is_custom(hf_config) -> bool:
    """Whether the model comes with its own class of causal LM."""
    return "AutoModelForCausalLM" in (getattr(hf_config, "auto_map", None) or {})


def _pick_loader(hf_config) -> type | None:
    """The class of transformers that loads causal LMs, or the one for text decoders that also take
    images; None if this model is neither."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    causal_types = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if _is_custom(hf_config) or hf_config.model_type in causal_types:
        return AutoModelForCausalLM
    if hf_config.model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return None


def read_tokenizer(config, folder: Path | None, hf_config):
    """The tokenizer (transformers). BOS and EOS come from `config` where given, else from the
    tokenizer's files, or from the model's config if its files name neither.

    Two attributes are added: `embedding_rows`, the row count of the LLM's embedding if the
    tokenizer has more tokens, else None; `lacks_bos_and_eos`, whether its files name neither.
    """
    from transformers import AutoTokenizer

    with _convert_errors(config, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(**_locate(config, folder))
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # Some tokenizer classes load as empty, without an error, if there are no files.
        raise UserError(
            f"llm.name={config.name}: there is no tokenizer beside the model; save it there with "
            "tokenizer.save_pretrained"
        )
    # Callers encode whole texts and cut them; a limit would only cause warnings.
    tokenizer.model_max_length = int(1e30)
    rows = hf_config.get_text_config().vocab_size
    tokenizer.embedding_rows = rows if max(tokenizer.get_vocab().values()) >= rows else None
    tokenizer.lacks_bos_and_eos = tokenizer.bos_token_id is None and tokenizer.eos_token_id is None
    if tokenizer.lacks_bos_and_eos:
        tokenizer.bos_token, tokenizer.eos_token = _read_special_tokens(
            config, folder, hf_config, tokenizer
        )
    for name, role, token in (("bos", "bos", config.bos), ("separator", "eos", config.separator)):
        if token is not None:
            entry = _find_entry(tokenizer, f"llm.{name}={token}", token)
            setattr(tokenizer, f"{role}_token", entry)
    return tokenizer


def _read_special_tokens(config, folder: Path | None, hf_config, tokenizer) -> list[str | None]:
    """BOS and EOS from the model's config, else from its generation config; None if in neither."""
    from transformers import GenerationConfig

    configs, arguments = [hf_config.get_text_config()], _locate(config, folder)
    with suppress(OSError):  # most models have no generation config
        path = arguments.pop("pretrained_model_name_or_path")
        configs.append(GenerationConfig.from_pretrained(path, **arguments))
    tokens = []
    for name in ("bos_token_id", "eos_token_id"):
        values = [getattr(each, name, None) for each in configs]
        lists = [ids if isinstance(ids, list) else [ids] for ids in values]
        # some configs write -1 for none
        valid = [i for ids in lists for i in ids if i is not None and i >= 0]
        tokens.append(tokenizer.convert_ids_to_tokens(valid[0]) if valid else None)
    return tokens


def _find_entry(tokenizer, setting: str, text: str) -> str:
    """The vocabulary's entry for `text`, which has to be one token; errors name `setting`."""
    if text in tokenizer.get_vocab():
        return text
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(f"{setting}: this tokenizer has no such token; give one, such as '</s>'")
    return tokenizer.convert_ids_to_tokens(ids[0])


def read_model(
    config,
    folder: Path | None,
    hf_config,
    blocks: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """The causal LM with its weights; if `blocks` is given, only its first `blocks` blocks and no
    LM head."""
    with _convert_errors(config):
        model_class = _pick_loader(hf_config)
        if blocks is not None:
            # the class that the loader picks may take only the text part of the config
            whole = build_without_weights(config, hf_config)
            model_class, hf_config = _make_cut_class(type(whole), blocks), whole.config
        model, report = model_class.from_pretrained(
            **_locate(config, folder),
            config=hf_config,
            dtype=dtype,
            attn_implementation=None if config.attn.value == "auto" else config.attn.value,
            output_loading_info=True,
            **make_load_arguments(config.load, device),
        )
        if blocks is not None:
            _remove_head(model)
        if config.load:
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns in each forward pass
            model.activation_device = torch.empty(0, device=device).device  # "cuda" -> cuda:N
        else:
            model = model.to(device)
    if report["missing_keys"]:
        # transformers fills these with random numbers.
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"llm.name={config.name}: {len(missing)} weights are missing, {missing[0]} first; "
            "give the folder or name of a complete causal language model"
        )
    return model


def check_quantisation(config, hf_config) -> None:
    """UserError if `llm.load` asks for a quantisation that cannot work here; a model that is
    quantised already is not checked."""
    if getattr(hf_config, "quantization_config", None) is None:
        with _convert_errors(config):
            raise_quantiser_errors(config.load)


def build_without_weights(config, hf_config, blocks: int | None = None) -> nn.Module:
    """The model that `read_model` returns, on the meta device, where weights take no memory."""
    with _convert_errors(config), torch.device("meta"):
        model = _pick_loader(hf_config).from_config(
            hf_config, trust_remote_code=config.trust_remote_code
        )
    if blocks is not None:
        _remove_later_blocks(model, blocks)
        _remove_head(model)
    return model


def _remove_later_blocks(model: nn.Module, blocks: int) -> None:
    """Remove all but the first `blocks` blocks. The config keeps the total number, because the
    output of a block may depend on it (Gemma-3n's last blocks share keys and values)."""
    stack = find_decoder_stack(model)
    del stack[blocks:]
    model.kept_blocks = len(stack)


def _remove_head(model: nn.Module) -> None:
    """Remove the LM head; an embedding that is tied to it stays."""
    model.set_output_embeddings(nn.Identity())


def _make_cut_class(whole_class: type[nn.Module], blocks: int) -> type[nn.Module]:
    """A subclass with the first `blocks` blocks, so that only their weights are read."""

    class Cut(whole_class):
        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            _remove_later_blocks(self, blocks)

    # with these names transformers looks up how to rename the weights of older files
    Cut.__name__, Cut.__module__ = whole_class.__name__, whole_class.__module__
    return Cut


def _locate(config, folder: Path | None) -> dict:
    """Arguments of from_pretrained that locate the files."""
    return {
        "pretrained_model_name_or_path": str(folder or config.name),
        "revision": config.revision or "main",
        "trust_remote_code": config.trust_remote_code,
        "local_files_only": folder is not None,
    }


@contextmanager
def _convert_errors(config, part: str = "model") -> Iterator[None]:
    """Raise an error in loading `part` as a UserError, unless it is a lack of memory."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(_explain_error(config, error, part)) from error


def _explain_error(config, error: Exception, part: str) -> str:
    """An error of transformers or huggingface_hub as one line with a remedy."""
    from huggingface_hub import errors as hub

    setting, text = f"llm.name={config.name}", " ".join(str(error).split())
    # the first sentence; a dot after a capital or a digit does not end one
    sentence = re.split(r"(?<=[a-z`'])\. ", text or type(error).__name__)[0][:200].rstrip(".")
    classes = {*type(error).__mro__}  # of the error and its causes
    while error := error.__cause__ or error.__context__:
        classes.update(type(error).__mro__)
    if hub.GatedRepoError in classes:
        return f"{setting}: gated; accept its terms on the hub, then run: hf auth login"
    if hub.RevisionNotFoundError in classes:
        return f"llm.revision={config.revision}: {config.name} has no such revision"
    if classes & {hub.RepositoryNotFoundError, hub.HFValidationError}:
        return f"{setting}: neither a local folder nor a model on the hub; check the name"
    if classes & {hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled}:
        return (
            f"{setting}: not a local folder, not downloaded before, and the hub cannot be reached; "
            "llm=smollm2 data=shakespeare need no network"
        )
    if "trust_remote_code" in text:
        return (
            f"{setting}: the model brings its own Python code; read it, then allow it with "
            "llm.trust_remote_code=true"
        )
    # not just "attention", which is also part of names of weights
    if re.search("attention implementation|flash ?attention", text, re.IGNORECASE):
        return (
            f"llm.attn={config.attn.value}: not possible for {config.name} here ({sentence}); "
            "use llm.attn=auto"
        )
    if ImportError in classes:  # quantised models and custom code need extra packages
        # "pip install [-U] <package>" or "No module named '<package>'"
        package = re.search(r"(?:pip install (?:-\S+ )*'?|module named ')([\w.-]+)", text)
        remedy = f"run: pip install {package[1]}" if package else "install it"
        return f"{setting}: needs a missing package ({sentence}); {remedy}, or give another LLM"
    if "offload_folder" in text:
        return f"{setting}: weights have to be written to disk; add llm.load.offload_folder=..."
    remedy = "change llm.load or " if config.load and part == "model" else ""
    return (
        f"{setting}: the {part} cannot be loaded ({sentence}); "
        f"{remedy}give a causal language model that transformers can read"
    )
