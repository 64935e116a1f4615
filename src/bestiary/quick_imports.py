"""Heavy imports in two thirds of their time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import torch, transformers and lightning in here: the collector does not look through what they make.

    Importing makes millions of objects that stay for ever, and the collector goes over all of them again and again.
    It waits here, and afterwards leaves out what is there already; where it was switched off before, it stays off.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
