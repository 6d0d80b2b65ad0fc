"""`llm.load`: an LLM larger than one device, whose weights are spread, offloaded or quantised.

    embedding, blocks 0-9      GPU 0      rows of all sites -> the device that `llm.device` names
    blocks 10-29               GPU 1
    blocks 30-39, LM head      RAM or disk, copied to GPU 0 for as long as they compute

transformers loads it with accelerate, whose hooks move inputs and weights to where they are used.
"""

import atexit
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sae_lightning.errors import UserError
from sae_lightning.files import make_private_folder, remove_leftovers

# Other arguments are refused: a run folder from somebody else may set them, and some make
# transformers run downloaded code or unpickle files.
ARGUMENTS = (
    "device_map",
    "max_memory",
    "offload_folder",
    "offload_buffers",
    "quantization_config",
    "experts_implementation",
    "variant",
)
# Arguments of `from_pretrained` -> what to set instead.
SET_INSTEAD = {
    "pretrained_model_name_or_path": "llm.name",
    "config": "llm.name",
    "state_dict": "llm.name",
    "revision": "llm.revision",
    "dtype": "llm.dtype",
    "torch_dtype": "llm.dtype",
    "attn_implementation": "llm.attn",
    "trust_remote_code": "llm.trust_remote_code",
    "local_files_only": "HF_HUB_OFFLINE=1 in the environment",
    "cache_dir": "HF_HOME=... in the environment",
    "token": "HF_TOKEN=... in the environment, or run: hf auth login",
    "load_in_8bit": "llm.load.quantization_config={load_in_8bit:true}",
    "load_in_4bit": "llm.load.quantization_config={load_in_4bit:true}",
}
TENSOR_PARALLEL = ("tp_plan", "tp_size", "device_mesh", "distributed_config")
OFFLOADED = ("cpu", "disk")  # values of a device map that mean offloaded weights
# folders of offloaded weights, which are needed until the process ends
_offload_folders = ExitStack()
atexit.register(_offload_folders.close)


def check_arguments_of_load(load: dict[str, Any]) -> None:
    """UserError for an argument that `llm.load` does not pass on to `from_pretrained`."""
    for name in load:
        if name in SET_INSTEAD:
            raise UserError(f"llm.load.{name}: not passed on; use {SET_INSTEAD[name]}")
        if name in TENSOR_PARALLEL:
            raise UserError(
                f"llm.load.{name}: tensor parallelism needs several processes that all run the LLM "
                "on the same text; use llm.load.device_map=auto"
            )
        if name not in ARGUMENTS:
            raise UserError(
                f"llm.load.{name}: not passed on to from_pretrained; choose from "
                f"{', '.join(ARGUMENTS)}"
            )


def is_spread(load: dict[str, Any]) -> bool:
    """Whether a device map puts the LLM onto GPUs, which several processes would have to share."""
    # without a device map, each process has its own copy of the LLM: not spread
    devices = load.get("device_map", "cpu")
    devices = devices.values() if isinstance(devices, dict) else [devices]
    return any(str(device) not in OFFLOADED for device in devices)


def raise_quantiser_errors(load: dict[str, Any]) -> None:
    """Raise transformers' error if the quantisation is unknown or needs a missing package."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(dict(load["quantization_config"]), pre_quantized=False)
    quantizer.validate_environment(device_map=None)


def make_load_arguments(load: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained`, none for an empty `load`; the LLM goes to `device` unless
    `load` has a device map."""
    if not load:
        return {}
    arguments = {"device_map": {"": device}} | load
    if memory := load.get("max_memory"):
        # in a run's config.yaml GPUs are "0", "1", as in JSON
        arguments["max_memory"] = {
            int(key) if str(key).isdigit() else key: size for key, size in memory.items()
        }
    if folder := load.get("offload_folder"):
        arguments["offload_folder"] = _make_offload_folder(Path(os.path.expanduser(folder)))
    return arguments


def _make_offload_folder(folder: Path) -> Path:
    """A new private folder in `folder`, where nobody can plant a link in place of a weight file."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    return _offload_folders.enter_context(make_private_folder(folder / "weights"))


def find_computing_device(module: nn.Module) -> torch.device:
    """The device that a module computes on; weights that are offloaded are elsewhere. The CPU for a
    module without weights."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device(device)
    return next(module.parameters(), torch.empty(0)).device


def find_activation_device(model: nn.Module) -> torch.device:
    """Device of all activations: `llm.device`. Without `llm.load`, the LLM computes on it too."""
    return getattr(model, "activation_device", None) or find_computing_device(model)


def read_weight(module: nn.Module) -> Tensor:
    """The weight of a module, from RAM or disk if it is offloaded."""
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return module.weight  # leaving `with` takes it out of the module, but does not free it


def read_tensors(model: nn.Module, name: str, tensor: Tensor) -> list[Tensor]:
    """An entry of the LLM's state dict, from RAM or disk if it is offloaded, as plain tensors:
    several if it is quantised (integers and scales)."""
    from transformers.integrations.accelerate import load_offloaded_parameter

    if tensor.is_meta:
        tensor = load_offloaded_parameter(model, name)
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    parts, _ = tensor.__tensor_flatten__()  # in memory, so no name is looked up for them
    return [x for part in parts for x in read_tensors(model, part, getattr(tensor, part))]


def move_to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy `x` to `device`, from the CPU to a GPU asynchronously: torch does not reuse the pinned
    memory before the copy is done."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
