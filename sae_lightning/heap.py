"""What the C library does with memory that is no longer needed."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def keep_freed_memory() -> None:
    """Keep the memory of freed tensors for the next ones, in this process from now on.

    glibc hands large blocks back to the system at once, which must clear every page before the next
    tensor gets it: an eighth of the LLM's time and a third of an SAE's. Other C libraries, which
    have no `mallopt`, are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
