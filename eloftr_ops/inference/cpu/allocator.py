# SPDX-License-Identifier: Apache-2.0
"""What the C library does with freed memory: large tensors that come and go cost a CPU page faults.

Linux gives a process fresh memory page by page, zeroed, when it is first touched. glibc returns large blocks to it as
soon as they are freed, so that every layer of a large map pays again. With other C libraries nothing here has effect.
"""

from __future__ import annotations

import ctypes
import platform

import torch

# The largest block for which glibc adapts by itself: after it was freed once, blocks up to its size come from memory
# that is kept, and twice as much of it is kept when all is free.
_ADAPTIVE = (32 << 20) - (64 << 10)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_NO_LIMIT = 2**31 - 1


def keep_small_blocks() -> None:
    """Let freed memory of tensors up to 32 MB be used again, 64 MB of it at most: harmless in anybody's process."""
    torch.empty(_ADAPTIVE, dtype=torch.uint8)  # never written to: takes no memory


def keep_all_memory() -> bool:
    """Never give freed memory back before this process ends: for processes that do one kind of work.

    Returns:
        Whether the C library took it: False where it is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _NO_LIMIT)) and bool(mallopt(_M_TRIM_THRESHOLD, _NO_LIMIT))
