"""A benchmark as a command: what the user can put right is told in one line."""

import sys
from collections.abc import Callable

from sae_lightning.runs.cli import explain


def command(main: Callable[[list[str]], None]) -> None:
    """Call `main` with what was typed."""
    try:
        main(sys.argv[1:])
    except Exception as error:
        line = explain(error, [])
        if line is None:
            raise
        sys.exit(f"error: {line}")
