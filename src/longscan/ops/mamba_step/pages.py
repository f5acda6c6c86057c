"""Large pages under the weights.

Reading a model's weights once a token touches every page of them. With pages of 4 KiB a core spends a quarter of that
time on finding pages, and its own prefetching stops at the end of each.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

from longscan.ops.int8 import Int8Matrix
from longscan.ops.mamba_step.matrices import Matrix

# Of Linux on x86-64 and, with pages of 4 KiB, on ARM.
_LARGE = 1 << 21
# From <linux/mman.h>: "may be large", and "make it large now" (Linux 6.1).
_HUGEPAGE, _COLLAPSE = 14, 25


@cache
def _madvise() -> Any:
    """The C function, or None where there is none of Linux's."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


def use_large_pages(matrices: Iterable[Matrix]) -> int:
    """Puts large pages under matrices in main memory where the system has them; contents and addresses stay.

    It is advice: a system that cannot follow it (an older one, no free memory, a file's pages) leaves all as it is.

    Args:
        matrices: contiguous, on the CPU; those smaller than a large page are left alone.

    Returns:
        bytes that lie in large pages because of this call, or did before.
    """
    madvise = _madvise()
    if madvise is None:
        return 0
    tensors = [matrix.values if isinstance(matrix, Int8Matrix) else matrix for matrix in matrices]
    # The first and last page of a tensor may hold its neighbours too: they have no harm from it.
    pages = {
        page
        for tensor in tensors
        if tensor.nbytes >= _LARGE
        for page in range(tensor.data_ptr() // _LARGE * _LARGE, tensor.data_ptr() + tensor.nbytes, _LARGE)
    }
    done = 0
    for page in sorted(pages):
        madvise(page, _LARGE, _HUGEPAGE)
        done += _LARGE * (madvise(page, _LARGE, _COLLAPSE) == 0)
    return done
