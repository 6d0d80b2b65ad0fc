"""The formats of Qwen-Scope and Goodfire: no settings are saved; the LLM and the site are in the
path of the weights file."""

import re

from sae_lightning.errors import UserError
from sae_lightning.formats.format import Format, Layout, SavedFiles, StoredSAE, rename_tensors


def read_qwen_scope(files: SavedFiles) -> StoredSAE:
    """Read one file of Qwen-Scope: a TopK SAE of raw residual streams. The repository's name, which
    must be part of the path (else: UserError), gives the LLM and k."""
    path = files.weights_file.absolute().as_posix()
    repository = re.search(r"SAE-Res-([^/]+?)-W\d+K-L0_(\d+)", path)
    if repository is None:
        raise UserError(
            f"{files.weights_file} does not say how many features are active: put it in a folder "
            "with the name of its repository, such as SAE-Res-Qwen3-8B-Base-W64K-L0_50"
        )
    block = re.match(r"layer(\d+)\.", files.weights_file.name)[1]
    return StoredSAE(
        {"name": "topk", "k": int(repository[2])},
        rename_tensors(QWEN_SCOPE, files.tensors),
        {"model_name": f"Qwen/{repository[1]}", "hook_name": f"blocks.{block}.hook_resid_post"},
    )


QWEN_SCOPE = Format(
    files=("layer*.sae.pt",),
    read=read_qwen_scope,
    layouts={"topk": Layout("topk", {"W_enc": "W_enc.T", "W_dec": "W_dec.T"})},
)


def read_goodfire(files: SavedFiles) -> StoredSAE:
    """Read a file of Goodfire: a ReLU SAE of raw residual streams. The file's name gives the LLM
    and the block."""
    metadata = {}
    if name := re.match(r"(.+)-SAE-l(\d+)\.", files.weights_file.name):
        metadata = {"model_name": name[1], "hook_name": f"blocks.{name[2]}.hook_resid_post"}
    return StoredSAE({"name": "relu"}, rename_tensors(GOODFIRE, files.tensors), metadata)


GOODFIRE_NAMES = {
    "encoder_linear.weight": "W_enc.T",
    "encoder_linear.bias": "b_enc",
    "decoder_linear.weight": "W_dec.T",
    "decoder_linear.bias": "b_dec",
}
GOODFIRE = Format(
    files=("*.pt*",), read=read_goodfire, layouts={"relu": Layout("relu", GOODFIRE_NAMES)}
)
