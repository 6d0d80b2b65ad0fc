"""Silence for what libraries say while they load and the user cannot act on."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Mute transformers' and huggingface_hub's bars, log lines and warnings inside the block."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as transformers

    levels = transformers.get_verbosity(), hub.get_verbosity()
    bar = transformers.is_progress_bar_enabled()
    transformers.set_verbosity_error()
    hub.set_verbosity_error()
    transformers.disable_progress_bar()  # huggingface_hub's download bars as well
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.set_verbosity(levels[0])
        hub.set_verbosity(levels[1])
        if bar:
            transformers.enable_progress_bar()
