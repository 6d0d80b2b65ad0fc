"""Exceptions that the user sees as one line instead of a traceback."""

import errno
import math
import re
import sys
from importlib.util import find_spec

# Required packages, checked at the start: some are imported only at the end of a run.
PACKAGES = (
    *("hydra", "omegaconf", "torch", "lightning", "transformers", "datasets", "safetensors"),
    *("filelock", "tensorboard", "numpy", "pandas", "pyarrow", "tqdm", "scipy", "sklearn"),
    *("platformdirs", "rich", "psutil", "jinja2", "plotly", "gguf", "accelerate"),
    "huggingface_hub",
)


class UserError(ValueError):
    """An error that the user can correct.

    The message is one line: the dotted setting, the value received, and the remedy.
    Entry points print it without a traceback and exit with code 1.
    """


class WriteError(UserError):
    """The operating system refused to write a file; the old file is intact."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. On a CPU, torch raises a RuntimeError, recognised by its message."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # of torch, which is slow to import
        or getattr(error, "errno", None) == errno.ENOMEM
        or isinstance(error, RuntimeError)
        and bool(re.search("out of memory|allocate memory|bad_alloc", str(error)))
    )


def list_causes(error: BaseException | None, *, contexts: bool = True) -> list[BaseException]:
    """The error and the errors that led to it, the last raised first; with `contexts=False`, only
    those chained by `raise ... from`."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or (error.__context__ if contexts else None)
    return causes


def check_finite(name: str, value: object) -> None:
    """UserError if `value`, or an element of the list `value`, is infinite or NaN."""
    numbers = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise UserError(f"{name}={value}: give a finite number")


def check_packages() -> None:
    """Exit with one line if a package is missing, before importing any of them."""
    for name in PACKAGES:
        if find_spec(name) is None:
            sys.exit(
                f"error: the package {name} is not installed: pip install -c constraints.txt -e ."
            )
