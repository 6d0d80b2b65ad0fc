"""Checkpoints, one per head: each is complete, whichever heads share the pass of the LLM.

    run folder/checkpoints/last.ckpt          weights, Adam's state, progress of this head
                           stream-<step>.pt   text position and shuffle pool: one file for all
                                              heads, with a hard link in each folder

Any head can be resumed alone; heads at the same step can be resumed together, on any number of
ranks. The stream file of a rank has the rows at the sites of its heads. Both files are zip
archives with a CRC-32 of each entry; the key `stream` of last.ckpt is a checksum of the stream
file's CRCs.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from sae_lightning.files import convert_write_errors, make_private_folder, write_atomically
from sae_lightning.formats.pickles import read_checksum
from sae_lightning.ranks import world
from sae_lightning.training.head import Head
from sae_lightning.training.settings import locate_checkpoint, locate_stream


class HeadCheckpoints(CheckpointIO):
    """Splits Lightning's checkpoint into a part for each head, and joins the parts again.

    The stream file is written first; then all heads' files are complete on disk before the first is
    renamed into place. Whenever a run is killed, each head has its old checkpoint or its new one,
    and the matching stream file.
    """

    def __init__(self, heads: Iterable[Head]):
        self.heads = list(heads)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options=None) -> None:
        """Write a checkpoint for each head that has not failed, in its run folder; so Lightning's
        `path` is not used."""
        stream = _get_loader_states(checkpoint).pop()
        step = checkpoint["global_step"]
        heads = {i: head for i, head in enumerate(self.heads) if head.failure is None}
        paths = [locate_stream(head.folder, step) for head in heads.values() if head.writes]
        checksum = _write_stream(stream, paths) if paths else None
        with ExitStack() as renames:  # when it ends, all files are renamed into place
            for index, head in heads.items():
                part = _extract_head(checkpoint, index)
                file = Path()  # unused on a rank that does not write
                if head.writes:
                    file = renames.enter_context(write_atomically(locate_checkpoint(head.folder)))
                part = _convert_split_tensors(part, head, partial(_gather, head, file.parent))
                if head.writes:
                    _save(part | {"settings": head.settings, "stream": checksum}, file)
            world().wait()  # until all heads' files are complete, on every rank
        for path in paths:
            _remove_old_streams(path)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load the checkpoints from all heads' run folders (so `path` is not used), joined into
        one."""
        options = {"map_location": map_location or "cpu", "weights_only": weights_only}
        parts = [_load_part(head, options) for head in self.heads]
        checkpoint = _join_heads(parts)
        paths = [locate_stream(head.folder, checkpoint["global_step"]) for head in self.heads]
        stream, *others = [torch.load(path, **options) for path in _list_distinct_files(paths)]
        for other in others:  # heads that trained in other passes read other sites
            stream["pool"]["rows"] |= other["pool"]["rows"]
            if "files" in stream["rows"]:  # by site, if data=activations
                stream["rows"]["files"] |= other["rows"]["files"]
        for head, path in zip(self.heads, paths, strict=True):
            if head.writes:  # a run that was killed while saving may have left old stream files
                _remove_old_streams(path)
        _get_loader_states(checkpoint).append(stream)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Never called: each checkpoint overwrites the last one."""
        raise NotImplementedError


@contextmanager
def assemble_whole(head: Head, weights: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield a head's weights with all features, gathered from its ranks; they are valid within the
    `with`. On a rank that does not write, a weight that is split is None."""
    is_split = head.sae.split.ranks.size > 1
    private = make_private_folder(head.folder / "whole") if head.writes and is_split else None
    with private or nullcontext(Path()) as folder:
        dims = head.sae.split_dims
        yield {
            name: _gather(head, folder, x, dims[name], name) if name in dims else x
            for name, x in weights.items()
        }


def _gather(head: Head, folder: Path, x: Tensor, dim: int, name: str) -> Tensor | None:
    """Gather a head's tensor that is split along `dim`: the whole on rank 0, as an mmap of the file
    `name` in `folder`, and None on other ranks. If the head is not split, `x` is the whole."""
    return head.sae.split.gather_on_rank_zero(x, dim, folder / name)


def _load_part(head: Head, options: dict[str, Any]) -> dict[str, Any]:
    """Load a head's checkpoint: if the head is split, only this rank's features."""
    if head.sae.split.ranks.size == 1:
        return torch.load(locate_checkpoint(head.folder), **options)
    part = torch.load(locate_checkpoint(head.folder), mmap=True, **options)

    def slice_own(x: Tensor, dim: int, _: str) -> Tensor:
        by_feature = head.sae.split.slice(x, dim).movedim(dim, 0).contiguous()
        return by_feature.movedim(0, dim)  # W_enc stays column-major, as in checkpoints

    return _convert_split_tensors(part, head, slice_own)


def _convert_split_tensors(
    part: dict[str, Any], head: Head, convert: Callable[[Tensor, int, str], Any]
) -> dict[str, Any]:
    """A head's checkpoint with convert(tensor, dim, name) in place of each tensor that is split by
    features along `dim`: weights, counters and Adam's moments."""
    dims = {f"heads.0.sae.{name}": dim for name, dim in head.sae.split_dims.items()}
    dims |= {f"heads.0.{name}": 0 for name in ("tokens_since_fired", "start_rows", "start_fired")}

    def convert_if_split(x: Any, parameter: str, name: str) -> Any:
        is_split = parameter in dims and x.ndim  # Adam's `step` is a scalar
        return convert(x, dims[parameter], name) if is_split else x

    weights = {name: convert_if_split(x, name, name) for name, x in part["state_dict"].items()}
    (adam,) = part["optimizer_states"]
    names = [f"heads.0.sae.{name}" for group in head.group_parameters() for name in group]
    state: dict[int, dict[str, Tensor]] = {}
    for index, tensors in adam["state"].items():
        name = names[index]
        state[index] = {k: convert_if_split(x, name, f"{name}.{k}") for k, x in tensors.items()}
    return part | {"state_dict": weights, "optimizer_states": [adam | {"state": state}]}


def _get_loader_states(checkpoint: dict[str, Any]) -> list:
    """Lightning's list of data loader states; its one entry is the stream's."""
    return checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]


def _list_distinct_files(paths: list[Path]) -> list[Path]:
    """One path for each file among `paths`, which may be hard links to the same file."""
    by_inode = {(path.stat().st_dev, path.stat().st_ino): path for path in paths}
    return list(by_inode.values())


def _write_stream(stream: dict[str, Any], paths: list[Path]) -> int:
    """Write the stream once, hard-linked at all `paths` (copied where the file system has no hard
    links); returns the file's checksum."""
    with write_atomically(paths[0]) as file:
        _save(stream, file)
    for path in paths[1:]:
        with write_atomically(path) as file:
            try:
                os.link(paths[0], file)
            except OSError:
                shutil.copyfile(paths[0], file)
    return read_checksum(paths[0])


def _remove_old_streams(current: Path) -> None:
    """Remove the stream files of other steps that lie beside `current`."""
    for old in current.parent.glob("stream-*.pt"):
        if old != current:
            with convert_write_errors(old):
                old.unlink()


def _save(content: dict[str, Any], path: Path) -> None:
    """Save to disk, through an open file: given a path, `torch.save` hides the system's error."""
    with open(path, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _extract_head(checkpoint: dict[str, Any], index: int) -> dict[str, Any]:
    """The checkpoint of the head with this index, as if it had trained alone."""
    prefix = f"heads.{index}."
    weights = {
        f"heads.0.{name.removeprefix(prefix)}": value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    (adam,) = checkpoint["optimizer_states"]
    groups = [group for group in adam["param_groups"] if group["head"] == index]
    first = groups[0]["params"][0]  # becomes parameter 0
    adam = _renumber(adam | {"param_groups": groups}, -first, head_index=0)
    return checkpoint | {"state_dict": weights, "optimizer_states": [adam]}


def _join_heads(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The checkpoint of a run with the heads of `parts`, in their order."""
    weights: dict[str, Any] = {}
    adam: dict[str, Any] = {"state": {}, "param_groups": []}
    count = 0  # parameters joined so far
    for index, part in enumerate(parts):
        for name, value in part["state_dict"].items():
            weights[re.sub(r"^heads\.0\.", f"heads.{index}.", name)] = value
        (head_adam,) = part["optimizer_states"]
        renumbered = _renumber(head_adam, count, index)
        count += sum(len(group["params"]) for group in renumbered["param_groups"])
        adam["state"] |= renumbered["state"]
        adam["param_groups"] += renumbered["param_groups"]
    return parts[0] | {"state_dict": weights, "optimizer_states": [adam]}


def _renumber(adam: dict[str, Any], shift: int, head_index: int) -> dict[str, Any]:
    """Adam's state with the indices of parameters shifted, and its groups assigned to a head."""
    indices = [i for group in adam["param_groups"] for i in group["params"]]
    return {
        "state": {i + shift: adam["state"][i] for i in indices if i in adam["state"]},
        "param_groups": [
            group | {"head": head_index, "params": [i + shift for i in group["params"]]}
            for group in adam["param_groups"]
        ],
    }
