"""The exceptions that reach a person as a single line instead of a traceback."""

import errno
import math
import re
import sys
from importlib.util import find_spec

# What is imported somewhere, some of it only when a run has come to its end.
PACKAGES = (
    *("hydra", "omegaconf", "torch", "lightning", "transformers", "datasets", "safetensors"),
    *("filelock", "tensorboard", "numpy", "pandas", "pyarrow", "tqdm", "scipy", "sklearn"),
    *("platformdirs", "rich", "psutil", "jinja2", "plotly", "gguf", "accelerate"),
)


class UserError(ValueError):
    """Something the user can put right.

    The message is one line: the dotted setting, the value received, and the remedy.
    Entry points print it and exit with code 1; a traceback would only hide it.
    """


class WriteError(UserError):
    """The system refused to write a file; what was there before is unharmed."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, which torch on a CPU and C++ say in the text of a RuntimeError
    only. (torch is not imported here: a mistyped option is answered at once.)"""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or getattr(error, "errno", None) == errno.ENOMEM
        or isinstance(error, RuntimeError)
        and bool(re.search("out of memory|allocate memory|bad_alloc", str(error)))
    )


def list_causes(error: BaseException | None, *, contexts: bool = True) -> list[BaseException]:
    """An error and what it came from, outermost first; without `contexts` only what was named with
    `raise ... from`."""
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or (error.__context__ if contexts else None)
    return links


def check_finite(name: str, value: object) -> None:
    """UserError if `value`, or a number in it, is NaN, which no comparison refuses, or infinite."""
    numbers = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise UserError(f"{name}={value}: give a finite number")


def check_packages() -> None:
    """End the process with one line if a package is missing, before any is imported."""
    for name in PACKAGES:
        if find_spec(name) is None:
            sys.exit(
                f"error: the package {name} is not installed: pip install -c constraints.txt -e ."
            )
