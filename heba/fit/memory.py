"""Memory for large tensors on a CPU."""

import ctypes
import platform

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4


def keep_freed_memory(keep: bool = True) -> bool:
    """Keep freed memory in the process for its next tensor; with `keep` false, restore glibc's behaviour.

    glibc maps each block of over 32 MB anew and returns it to the kernel when it is freed, so every activation of
    a training step is filled with zeros page by page before it is written. Returns whether the C library is glibc;
    another one is left as it is.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26))
    # glibc moves its thresholds up to these by itself, until one of them is set for the first time.
    defaults = ((M_MMAP_MAX, 65536), (M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**26), (M_TOP_PAD, 0))
    done = [libc.mallopt(key, value) for key, value in (settings if keep else defaults)]
    return all(done)
