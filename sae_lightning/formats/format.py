"""`Format`, an entry of the table FORMATS, and the steps of reading that all formats share."""

import json
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile, is_zipfile

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.files import read_regular_file
from sae_lightning.formats.pickles import load_tensors
from sae_lightning.llm.sites import SitePair
from sae_lightning.sae import SAE
from sae_lightning.stream.states import expect

MAX_DEPTH = 20  # levels of YAML; circuit-tracer's has 2
MAX_EXPANSION = 20  # times the size of a compressed npz; weights hardly compress
# Names that several formats use -> ours; ".T": stored transposed.
LINEAR = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


class StoredSAE(NamedTuple):
    """The content of an SAE's files, translated. With z [features] for the pre-activations:

    z = (x * scale_in) @ W_enc + b_enc;  x_hat = (activate(z) @ W_dec + b_dec) / scale_out
    """

    settings: dict[str, Any]
    """Fields of the architecture's config, including its name."""
    weights: dict[str, Tensor]
    """Name -> float32 tensor; `log_threshold` may stand for `threshold`."""
    metadata: dict[str, Any]
    """What the SAE was trained on, under SAELens' keys."""
    subtracts_b_dec: bool = False
    """The encoder reads x - b_dec; a skip connection still reads x."""
    scale_in: float = 1.0
    scale_out: float = 1.0
    rescale: bool = False
    """activate(z * n) / n replaces activate(z), with n [features]: the norms of W_dec's rows."""


class SavedFiles(NamedTuple):
    """The files of one SAE, read."""

    weights_file: Path
    settings_file: Path
    """The weights file if the format has no settings file."""
    settings: dict[str, Any]
    """The settings, without those that are null."""
    tensors: dict[str, Any]
    """The content of the weights file, as it is stored."""


class Layout(NamedTuple):
    """How a format stores an architecture."""

    architecture: str
    """Its name in ARCHITECTURES."""
    names: dict[str, str] = {}
    """The format's names of its tensors -> ours; ".T": stored transposed."""
    subtracts_b_dec: bool = False
    """The encoder reads x - b_dec."""


class Origin(NamedTuple):
    """What an SAE was trained on, for writing it in another tool's format."""

    metadata: dict[str, Any]
    """Under SAELens' keys, without those that are not known."""
    sites: SitePair | None
    """None if they are not known."""
    problem: str
    """If the sites are not known: the error message that says why, and what to give."""

    @property
    def is_transcoder(self) -> bool:
        """Whether the SAE reconstructs a site other than the one that it reads."""
        return "hook_name_out" in self.metadata

    def require_sites(self) -> SitePair:
        """Both sites; UserError if they are not known."""
        if self.sites is None:
            raise UserError(self.problem)
        return self.sites


# What `Format.make_settings` returns: settings, and tensors beyond those of the layout.
SettingsAndTensors = tuple[dict[str, Any], dict[str, Tensor]]


class Format(NamedTuple):
    """An entry of FORMATS: how the SAEs of a tool are stored."""

    files: tuple[str, ...]
    """Patterns of the files that are needed, relative to the SAE's folder: first the weights, then
    the settings, if they have a file."""
    read: Callable[[SavedFiles], StoredSAE]
    """Translates settings and tensors to ours."""
    layouts: dict[str, Layout] = {}
    """The format's name of an architecture -> how it is stored."""
    aliases: dict[str, str] = {}
    """Further names of tensors -> ours; never written."""
    optional: tuple[str, ...] = ()
    """Patterns of files that are read if they exist; the first one holds the settings unless
    `files` names a file for them."""
    autoencoders: dict[str, str] = {}
    """Our architecture -> the key in `layouts` under which its autoencoders are written."""
    transcoders: dict[str, str] = {}
    """The same for transcoders."""
    make_settings: Callable[[SAE, str, Origin], SettingsAndTensors] | None = None
    """Makes the settings to write, and the tensors that the layout does not name, from an SAE, its
    key in `layouts` and its origin; None for a format that is only read, and for SAELens' (see
    saved_format.py)."""

    @property
    def settings_file(self) -> str | None:
        """Name of the file that holds the settings; None if the format has no such file."""
        others = self.files[1:] + self.optional  # files[0] holds the weights
        return others[0] if others else None


def is_match(name: str, pattern: str) -> bool:
    """Whether a file's path below a folder matches a pattern; "*" does not match "/"."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def read_settings_file(file: Path) -> dict[str, Any]:
    """Read settings from JSON or YAML, and drop those that are null, which means not given."""
    parse = _parse_yaml if file.suffix == ".yaml" else json.loads
    return drop_nulls(parse(read_regular_file(file)))


def _parse_yaml(text: str) -> Any:
    """Parse plain YAML; ValueError if it is nested deeply or has aliases, as reading it could take
    very long."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("its settings hold an alias (*), which could expand without limit")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"its settings are nested more than {MAX_DEPTH} levels deep")
    return yaml.safe_load(text)


def drop_nulls(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not null."""
    return {key: value for key, value in settings.items() if value is not None}


def check_readable(file: Path, key: str, value: Any, readable: Iterable[str]) -> None:
    """UserError unless `value`, given for `key` in a settings file, is in `readable`."""
    if value not in readable:
        raise UserError(f"{file}: {key} {value!r} is not supported ({', '.join(readable)})")


def read_weights(file: Path) -> dict[str, Any]:
    """Read a safetensors file, an npz, or what torch.save wrote; no code in it is run.
    ValueError if it holds something other than named tensors, or an npz would expand far."""
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix != ".npz":
        tensors = load_tensors(file)
        if not isinstance(tensors, dict):
            raise ValueError(f"it holds {type(tensors).__name__} and should hold named tensors")
        return dict(tensors)
    if not is_zipfile(file):
        raise ValueError("it is not an npz archive")
    with ZipFile(file) as archive:
        size = sum(part.file_size for part in archive.infolist())
    if size > MAX_EXPANSION * file.stat().st_size:
        raise ValueError(f"it would expand to {size:,} bytes, which weights never do")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays}
    except ValueError:  # numpy's message explains how to load it anyway
        raise ValueError("it holds more than tensors and numbers, which could run code") from None


def check_tensors(tensors: dict[str, Tensor]) -> None:
    """ValueError unless all tensors are floating-point and finite."""
    for name, x in tensors.items():
        expect(x, Tensor, name)
        if not x.is_floating_point():
            dtype = str(x.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name}: {x.numel():,} numbers are of type {dtype}, not floating-point"
            )
        if x.nbytes > x.untyped_storage().nbytes():  # a stride of 0 could expand to any size
            raise ValueError(f"{name} is larger than its storage")
        if wrong := int((~x.float().isfinite()).sum()):
            raise ValueError(f"{name}: {wrong:,} of {x.numel():,} numbers are not finite")


def rename_tensors(entry: Format, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert stored tensors to our names, our orientation and float32; ValueError if two get the
    same name, or if `check_tensors` refuses one."""
    check_tensors(tensors)
    our_names, weights = dict(entry.aliases), {}
    for layout in entry.layouts.values():
        our_names |= layout.names
    for name, tensor in tensors.items():
        ours, tensor = our_names.get(name, name), tensor.float()
        if name == "scaling_factor" and (tensor == 1).all():
            continue  # stored by Gemma Scope and by SAELens 5 and older; 1 has no effect
        if ours.endswith(".T"):
            ours, tensor = ours.removesuffix(".T"), tensor.transpose(0, -1)
        if ours in weights:
            raise ValueError(f"{name} occurs twice, under two names")
        weights[ours] = tensor
    return weights


def fold_scales(stored: StoredSAE) -> dict[str, Tensor]:
    """Fold scales and norms into the weights, so that they take raw activations, and expand a
    common threshold to one for each feature. A common threshold below 0, which means that training
    has not set it, becomes 0, so that all of relu(z) passes."""
    weights = dict(stored.weights)
    if "log_threshold" in weights:
        weights["threshold"] = weights.pop("log_threshold").exp()
    factors = {"W_enc": stored.scale_in, "W_dec": 1 / stored.scale_out}
    factors |= {"b_dec": 1 / stored.scale_out, "W_skip": stored.scale_in / stored.scale_out}
    for name, factor in factors.items():
        if name in weights and factor != 1:
            weights[name] = weights[name] * factor
    if stored.rescale:
        norms = weights["W_dec"].norm(dim=1).clamp(min=1e-8)  # rows may be all 0
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * norms, weights["b_enc"] * norms
        weights["W_dec"] = weights["W_dec"] / norms[:, None]
        if "threshold" in weights:
            # the stored threshold applies to z * stored norms, which are scale_out * norms
            weights["threshold"] = weights["threshold"] / stored.scale_out
    if "threshold" in weights and weights["threshold"].numel() == 1:
        threshold = weights["threshold"].reshape(()).clamp(min=0)
        weights["threshold"] = threshold.expand_as(weights["b_enc"])
    return weights


def add_groups(settings: dict[str, Any], sizes: list[int]) -> dict[str, Any]:
    """Add `groups` to the `settings` of a Matryoshka SAE: the share of the features in each group
    but the last. `sizes`: features in each group. With one group, the SAE is a BatchTopK."""
    if len(sizes) == 1:
        return settings | {"name": "batch_topk"}
    return settings | {"groups": [size / sum(sizes) for size in sizes[:-1]]}
