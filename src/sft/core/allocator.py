"""Freed memory is kept for the next tensor instead of going back to the system.

Long passes over data make and free the same large activations again and again. glibc gives each of
them fresh pages, which the system must find and clear: on a virtual machine that took up to nine
tenths of the time of a pass over ResNet-18. Inside `kept_memory` the pages are used again.
"""

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names of malloc.h
NEVER, USUAL_TRIM, USUAL_MAPS = 2**31 - 1, 128 * 1024, 65536

_depth = 0


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Inside, freed memory stays with the process; at the end what is free goes back.

    Also a decorator. Where the C library is not glibc nothing changes. The process's own settings
    of glibc, made by environment variables, are replaced by glibc's defaults at the end.
    """
    global _depth
    set_option = _mallopt()
    if set_option is None:
        yield
        return
    if _depth == 0:
        set_option(M_MMAP_MAX, 0)
        set_option(M_TRIM_THRESHOLD, NEVER)
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            set_option(M_MMAP_MAX, USUAL_MAPS)
            set_option(M_TRIM_THRESHOLD, USUAL_TRIM)
            ctypes.CDLL(None).malloc_trim(0)


def _mallopt() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
        library.malloc_trim  # noqa: B018  # musl has none, and its mallopt would do nothing
        found: Callable[[int, int], int] = library.mallopt
    except (OSError, AttributeError):
        return None
    return found
