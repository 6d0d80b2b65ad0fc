"""Who runs when: a machine that grows slower or faster must be no one's advantage."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def order(runs: Sequence[T], rounds: int, key: Callable[[T], Any]) -> list[T]:
    """Those of one `key` side by side, every other round backwards."""
    group = sorted(runs, key=key)
    return [run for n in range(rounds) for run in (group if n % 2 == 0 else group[::-1])]
