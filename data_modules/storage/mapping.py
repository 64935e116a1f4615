"""Mapping a file without keeping a descriptor.

Python's own mmap duplicates the descriptor and holds it as long as the map lives, so a source of a thousand shards
would need thousands of them, where a process is often allowed 1,024. The kernel needs none once the map exists.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref


def mapped(descriptor: int, size: int) -> memoryview:
    """The first `size` bytes of an open file, read-only, shared with the page cache; the descriptor may be closed.

    The map ends when nothing refers to the view or to a slice of it. OSError where the kernel refuses.
    """
    if not size:
        return memoryview(b"")
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address is None or address == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, f"{size} bytes cannot be mapped: {os.strerror(error)}")
    holder = (ctypes.c_ubyte * size).from_address(address)
    # not at exit: a thread may still be reading, and the kernel unmaps everything anyway
    weakref.finalize(holder, _libc.munmap, address, size).atexit = False
    return memoryview(holder).cast("B").toreadonly()


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_longlong,  # off_t is 64 bits wide on every system with 64-bit pointers
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value
