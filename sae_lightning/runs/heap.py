"""What the C library does with memory that is no longer needed."""

import ctypes
import sys
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def keep_freed_memory() -> None:
    """Keep the memory of freed tensors for the next ones, in this process from now on.

    glibc hands large blocks back to the system at once, which must clear every page before the next
    tensor gets it: an eighth of the LLM's time and a third of an SAE's. Other C libraries, which
    have no `mallopt`, are left as they are.
    """
    mallopt = _find_in_glibc("mallopt")
    # 32 MiB are the most that versions before 2.35 take
    if mallopt and (mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 1 << 25)):
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def give_back_freed_memory() -> None:
    """Let the system have what is kept now: others, and estimates of what is free, wait for it."""
    if trim := _find_in_glibc("malloc_trim"):
        trim(0)


def _find_in_glibc(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
