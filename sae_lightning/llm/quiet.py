"""Mutes library messages that the user cannot act on."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def mute_libraries(keep_bars: bool = False) -> Iterator[None]:
    """Mute the log lines, warnings and, unless `keep_bars`, tqdm bars of all libraries, in every
    thread; `terminal.phase` shows progress instead."""
    level, init = logging.root.manager.disable, tqdm.__init__

    def init_disabled(bar, *args, **settings) -> None:
        init(bar, *args, **settings | {"disable": True})

    logging.disable(logging.ERROR)
    if not keep_bars:
        tqdm.__init__ = init_disabled
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.__init__ = init
        logging.disable(level)
