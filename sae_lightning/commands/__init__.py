"""The entry points: `train.py` or `sae-train`, `analyze.py` or `sae-analyze`."""

import signal

from sae_lightning.errors import check_packages


def run_train() -> None:
    """Train the SAEs that the command line describes."""
    _prepare()
    from sae_lightning.commands.train_command import train_from_command_line

    train_from_command_line()


def run_analyze() -> None:
    """Run the task that the command line of analyze.py describes."""
    _prepare()
    from sae_lightning.commands.analyze_command import analyze_from_command_line

    analyze_from_command_line()


def _prepare() -> None:
    """Set up Ctrl-C and OpenMP and check packages, before the imports that take seconds."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C exits without a traceback
    check_packages()
    from sae_lightning.runs.threads import share_cores

    share_cores()
