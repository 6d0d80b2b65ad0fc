"""Checks a whole checkpoint before a resumed run changes a file or loads an LLM.

`expect` compares a value with a type, a range, an equal value, a tensor of this shape and dtype, or
a dict of these; ValueError if it differs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode

from sae_lightning.errors import UserError, is_out_of_memory
from sae_lightning.formats.pickles import load_tensors, read_checksum
from sae_lightning.stream.states import ANY_COUNT, expect
from sae_lightning.training.head import Head
from sae_lightning.training.module import SAEModule
from sae_lightning.training.settings import locate_checkpoint, locate_stream


def open_checkpoint(folder: Path) -> dict[str, Any]:
    """Open a run's checkpoint, mmapped; UserError if it is damaged."""
    path = locate_checkpoint(folder)
    with _report_damage(path, f"{path} is truncated or not a checkpoint"):
        checkpoint = load_tensors(path)
        expect(checkpoint, {"global_step": int, "settings": dict}, "checkpoint")
    return checkpoint


def check_checkpoint(
    checkpoint: dict[str, Any],
    make_head: Callable[[], Head],
    steps: int,
    check_stream: Callable[[Any, int], None],
    checked_streams: set,
) -> None:
    """UserError unless the open `checkpoint` and its stream file hold exactly what a head in a run
    of `steps` updates needs. `check_stream` takes the stream's state and the updates done;
    `checked_streams` collects the stream files with verified CRCs, since heads may share one."""
    with FakeTensorMode():  # gives shapes and dtypes without allocating memory
        head = make_head()
        adam = SAEModule([head], batch=1, steps=steps).configure_optimizers().state_dict()
    path, step = locate_checkpoint(head.folder), checkpoint["global_step"]
    with _report_damage(path, f"{path} is truncated or not a checkpoint"):
        _expect_progress(checkpoint, step, steps)
        _expect_weights(checkpoint["state_dict"], head)
        extra = checkpoint["state_dict"]["heads.0._extra_state"]
        if "occupied" in extra:  # active_density; `set_extra_state` refuses `extra` without it
            expected = {"training_metrics": dict, "occupied": float}
            if head.sae.config.start:
                expected |= {"start_metrics": dict, "adam_steps": ANY_COUNT}
            if head.tuned_from is not None:
                expected |= {"before_kl": dict}
            expect(extra, expected, "_extra_state")
            for name in expected.keys() & {"training_metrics", "start_metrics", "before_kl"}:
                for key, value in extra[name].items():
                    if type(value) is not int:
                        expect(value, float, f"{name}.{key}")
        adam_steps = step + extra.get("adam_steps", 0)  # 0 without a warm start
        _expect_adam(checkpoint["optimizer_states"][0], adam["param_groups"], head, adam_steps)
    head.set_extra_state(extra)
    stream = locate_stream(head.folder, step)
    if not stream.is_file():
        raise UserError(
            f"{stream}, which belongs to {path.name}, is gone; delete {path} to start the run "
            "again from its beginning"
        )
    with _report_damage(path, f"{stream} is damaged, or not the one that belongs to {path.name}"):
        state = load_tensors(stream, checked_streams)
        # old checkpoints have no checksum
        if checkpoint.get("stream", read_checksum(stream)) != read_checksum(stream):
            raise ValueError(f"its checksum is not the one in {path.name}")
        check_stream(state, step)


@contextmanager
def _report_damage(path: Path, problem: str) -> Iterator[None]:
    """Turn any error in reading the checkpoint at `path` into a one-line UserError."""
    try:
        yield
    except OSError as error:  # a disk error is no reason to delete the checkpoint
        raise UserError(
            f"{error.filename or path} cannot be read: {error.strerror or error}"
        ) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
        raise UserError(
            f"{problem} ({reason or type(error).__name__}); delete {path} to start the run again "
            "from its beginning"
        ) from error


def _expect_progress(checkpoint: dict[str, Any], step: int, steps: int) -> None:
    """Check the progress that Lightning reads: the updates done, and its loops' counters."""
    # Lightning saves within the last batch, which is processed but not completed
    begun, ends = ("ready", "started", "processed"), ("ready", "completed")
    optimizer = {"step": _list_counters(*ends), "zero_grad": _list_counters(*ends, "started")}
    loops = {
        "state_dict": {"combined_loader": []},  # its entry is in the stream file
        "epoch_progress": _list_counters(*begun, "completed"),
        "epoch_loop.state_dict": dict,
        "epoch_loop.batch_progress": _list_counters(*begun, count=step) | {"is_last_batch": bool},
        "epoch_loop.scheduler_progress": _list_counters(*ends),
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": optimizer},
        "epoch_loop.manual_optimization.optim_step_progress": _list_counters(*ends, count=step),
        "epoch_loop.val_loop.batch_progress": _list_counters(*begun, "completed")
        | {"is_last_batch": bool},
    }
    expected = {
        "global_step": range(1, steps + 1),  # nothing is saved before the first update
        "epoch": 0,  # a run is one epoch for Lightning, however often it reads the text
        "pytorch-lightning_version": str,
        "callbacks": dict,
        "lr_schedulers": [],  # the callback `Schedule` sets learning rates
        "state_dict": dict,
        "optimizer_states": list,
        "loops": {"fit_loop": loops},
    }
    expect(checkpoint, expected, "checkpoint")
    # Lightning would migrate a checkpoint that seems to be from an older version
    version = Version(checkpoint["pytorch-lightning_version"])
    expect(version.major, range(2, 100), "Lightning's version")


def _list_counters(*names: str, count: Any = ANY_COUNT) -> dict[str, dict[str, Any]]:
    """The expected form of Lightning's progress counters with these names."""
    return {kind: dict.fromkeys(names, count) for kind in ("total", "current")}


def _expect_weights(saved: dict[str, Any], head: Head) -> None:
    """Check that the saved weights and buffers are those of the head, in its shapes, and finite."""
    expected = {f"heads.0.{name}": x for name, x in head.state_dict().items()}
    expected["heads.0._extra_state"] = dict
    expect(saved, expected, "weights")
    if extra := sorted(saved.keys() - expected.keys()):
        raise ValueError(f"{extra[0]} does not belong to this SAE")
    for name, x in saved.items():
        _expect_finite(x, name)


def _expect_adam(saved: dict[str, Any], groups: list[dict], head: Head, step: int) -> None:
    """Check both moments of every parameter, the number of updates in them (`step`), and the saved
    parameter groups against those of the settings (`groups`)."""
    fixed = ("params", "peak_lr", "head", "rate", "betas", "eps")
    expect(saved, {"state": dict, "param_groups": list}, "Adam")
    expect(len(saved["param_groups"]), len(groups), "Adam's groups")
    for index, (group, expected) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        expect(group, {"lr": float} | {name: expected[name] for name in fixed}, f"Adam.{index}")
    by_name = dict(head.sae.named_parameters())
    parameters = [by_name[name] for names in head.group_parameters() for name in names]
    scalar = torch.empty(())
    states = [{"step": scalar, "exp_avg": x, "exp_avg_sq": x} for x in parameters]
    expect(saved["state"], dict(enumerate(states)), "Adam")
    for index, x in enumerate(parameters):
        state = saved["state"][index]
        expect(state["step"].item(), float(step), f"Adam.{index}.step")
        for name in ("exp_avg", "exp_avg_sq"):
            # Adam pairs the elements of a parameter and its moments by memory order
            label = f"Adam.{index}.{name}"
            expect(state[name].is_contiguous(), x.is_contiguous(), f"{label}.is_contiguous()")
            _expect_finite(state[name], label)


def _expect_finite(x: Any, name: str) -> None:
    if isinstance(x, torch.Tensor) and x.is_floating_point() and not x.isfinite().all():
        raise ValueError(f"{name} is not finite")
