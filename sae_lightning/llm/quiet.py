"""Mutes library messages that the user cannot act on."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def mute_libraries(bars: bool = False) -> Iterator[None]:
    """Mute the log lines, warnings and, without `bars`, tqdm bars of all libraries, in every
    thread; `terminal.phase` shows progress instead."""
    level, draw = logging.root.manager.disable, tqdm.__init__

    def draw_nothing(bar, *args, **settings) -> None:
        draw(bar, *args, **settings | {"disable": True})

    logging.disable(logging.ERROR)
    if not bars:
        tqdm.__init__ = draw_nothing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.__init__ = draw
        logging.disable(level)
