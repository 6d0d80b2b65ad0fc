"""Cases of which a few are in the quick tests, because they are alike."""

from collections.abc import Iterable

import pytest


def mark_most_slow(cases: Iterable, every: int = 8) -> list:
    """The cases of a parametrised test, all of which are slow but each `every`-th."""
    marked = []
    for number, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        marks = [pytest.mark.slow] if number % every else []
        marked.append(pytest.param(*values, marks=marks))
    return marked
