"""The format of sparsify: TopK SAEs and transcoders."""

import re

from sae_lightning.formats.format import (
    Format,
    Layout,
    Origin,
    SavedFiles,
    SettingsAndTensors,
    StoredSAE,
    check_readable,
    drop_nulls,
    read_settings_file,
    rename_tensors,
)
from sae_lightning.sae import SAE


def read_sparsify(files: SavedFiles) -> StoredSAE:
    """Read an SAE or transcoder of sparsify; all are TopK. The folder is named after the module
    at the SAE's site, and config.json in the folder above names the LLM."""
    cfg = files.settings
    activation = "signed topk" if cfg.get("signed") else cfg.get("activation", "topk")
    check_readable(files.settings_file, "activation", activation, ["topk"])
    settings = {"name": "topk", "k": cfg["k"], "skip": "W_skip" in files.tensors}
    folder = files.settings_file.absolute().parent
    run_file = folder.with_name("config.json")
    run_settings = read_settings_file(run_file) if run_file.is_file() else {}
    subtracts_b_dec = not cfg.get("transcode", False)
    # The first transcoders read x - b_dec, and their cfg.json has no `transcode`. The config.json
    # of their run has it, or a skip connection shows that they are transcoders.
    is_transcoder = cfg.get("transcode", run_settings.get("transcode", settings["skip"]))
    llm = {"model_name": run_settings.get("model"), "context_size": run_settings.get("ctx_len")}
    metadata = drop_nulls(llm) | name_hooks(folder.name, is_transcoder) | cfg
    weights = rename_tensors(SPARSIFY, files.tensors)
    return StoredSAE(settings, weights, metadata, subtracts_b_dec)


def name_hooks(module: str, is_transcoder: bool) -> dict[str, str]:
    """Names of the sites of an SAE at `module`, under SAELens' keys; a transcoder reads the input
    of the module. Empty if `module` has no block number: the folder was renamed."""
    if not re.search(r"\.\d+(\.|$)", module):
        return {}
    if not is_transcoder:
        return {"hook_name": module}
    mlp = re.fullmatch(r"(?:.*\.)?(\d+)\.mlp", module)
    # only the input of an MLP has a name; other inputs are described, for error messages
    source = f"blocks.{mlp[1]}.mlp.hook_in" if mlp else f"the input of {module}"
    return {"hook_name": source, "hook_name_out": module}


def make_sparsify_settings(sae: SAE, key: str, origin: Origin) -> SettingsAndTensors:
    """Make the settings of cfg.json, with the metadata of training, which sparsify ignores."""
    d_in, config = len(sae.W_enc), sae.config
    settings = {
        "activation": "topk",
        "expansion_factor": max(1, config.features // d_in),  # num_latents takes precedence
        "normalize_decoder": False,  # rows are stored as they are
        "num_latents": config.features,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": config.skip,
        "transcode": key == "transcoder",
        "d_in": d_in,
    }
    return origin.metadata | settings, {}


SPARSIFY_NAMES = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "W_skip": "W_skip.T"}
SPARSIFY_NAMES |= {"W_dec": "W_dec", "b_dec": "b_dec"}
SPARSIFY = Format(
    files=("sae.safetensors", "cfg.json"),
    optional=("../config.json",),
    read=read_sparsify,
    layouts={
        "autoencoder": Layout("topk", SPARSIFY_NAMES, subtracts_b_dec=True),
        "transcoder": Layout("topk", SPARSIFY_NAMES),
    },
    autoencoders={"topk": "autoencoder"},
    transcoders={"topk": "transcoder"},
    make_settings=make_sparsify_settings,
)
