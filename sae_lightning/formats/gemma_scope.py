"""The formats of Gemma Scope 1 and 2: JumpReLU SAEs and transcoders of raw activations.

Folder names give the block and, in Gemma Scope 2, the kind of site. The repository's name, which
must be part of the path, gives the LLM and, in Gemma Scope 1, the kind of site.
"""

import math
import re
from pathlib import Path

from sae_lightning.formats.format import (
    Format,
    Layout,
    SavedFiles,
    StoredSAE,
    check_readable,
    rename_tensors,
)

# Kind of site in the name of a repository -> TransformerLens' names of the source and the target
# site (None: the same).
HOOKS_OF_REPOSITORIES = {
    "res": ("hook_resid_post", None),
    "mlp": ("hook_mlp_out", None),
    "att": ("attn.hook_z", None),
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
}
# Folder in Gemma Scope 2 -> names of both sites, as above, used unless config.json gives them.
HOOKS_OF_FOLDERS = {
    "resid_post": ("hook_resid_post", None),
    "attn_out": ("attn.hook_z", None),
    "mlp_out": ("hook_mlp_out", None),
    "transcoder": ("mlp.hook_in", "hook_mlp_out"),
}
NAMES = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}


def read_gemma_scope(files: SavedFiles) -> StoredSAE:
    """Read params.npz of Gemma Scope 1. SAEs of embeddings were trained on x / sqrt(d): W_enc and
    W_dec are converted to raw x. SAELens leaves b_dec as it is, and so does this function."""
    path = files.weights_file.absolute().as_posix()
    weights = rename_tensors(GEMMA_SCOPE, files.tensors)
    repository = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", path)
    block = re.search(r"/layer_(\d+)/", path)
    metadata = {}
    if repository:
        size, tuning, kind = repository.groups()
        metadata["model_name"] = f"google/gemma-2-{size}" + ("-it" if tuning == "it" else "")
        if block:
            metadata |= name_block_hooks(int(block[1]), HOOKS_OF_REPOSITORIES[kind])
    if "/embedding/" in path and block is None:
        root = math.sqrt(len(weights["W_enc"]))
        weights |= {"W_enc": weights["W_enc"] / root, "W_dec": weights["W_dec"] * root}
        metadata["hook_name"] = "hook_embed"
    return StoredSAE({"name": "jumprelu"}, weights, metadata)


def name_block_hooks(block: int, hooks: tuple[str, str | None]) -> dict[str, str]:
    """TransformerLens' names of both sites in a block, under SAELens' keys."""
    names = dict(zip(("hook_name", "hook_name_out"), hooks, strict=True))
    return {key: f"blocks.{block}.{hook}" for key, hook in names.items() if hook}


def read_gemma_scope_2(files: SavedFiles) -> StoredSAE:
    """Read params.safetensors of Gemma Scope 2; if config.json is missing beside it, the
    folder's name gives the sites."""
    cfg, path = files.settings, files.weights_file.absolute().as_posix()
    architecture = cfg.get("architecture", "jump_relu")
    check_readable(files.settings_file, "architecture", architecture, ["jump_relu"])
    weights = rename_tensors(GEMMA_SCOPE_2, files.tensors)
    metadata = {}
    if match := re.search(r"/(resid_post|attn_out|mlp_out|transcoder)(?:_all)?/layer_(\d+)_", path):
        metadata = name_block_hooks(int(match[2]), HOOKS_OF_FOLDERS[match[1]])
    source, target = cfg.get("hf_hook_point_in"), cfg.get("hf_hook_point_out")
    if source:
        metadata = {"hook_name": source}
        if target and target != source:
            metadata["hook_name_out"] = target
    name = cfg.get("model_name")
    if repository := re.search(r"gemma-scope-2-([\w.]+-(?:pt|it))", path):
        name = name or f"gemma-3-{repository[1]}"
    if name:
        # config.json may write gemma-v3
        name = "google/" + Path(name).name.replace("-v3-", "-3-")
        # on the hub, the name of this model has no suffix
        metadata["model_name"] = name.replace("270m-pt", "270m")
    return StoredSAE({"name": "jumprelu", "skip": "W_skip" in weights}, weights, metadata)


GEMMA_SCOPE = Format(
    files=("params.npz",), read=read_gemma_scope, layouts={"jumprelu": Layout("jumprelu", NAMES)}
)
GEMMA_SCOPE_2 = Format(
    files=("params.safetensors",),
    optional=("config.json",),
    read=read_gemma_scope_2,
    layouts={"jumprelu": Layout("jumprelu", NAMES)},
)
