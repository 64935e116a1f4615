"""Imports without the collector: it waits inside, and is afterwards as it was."""

from __future__ import annotations

import gc

import pytest

from bestiary.quick_imports import quick_imports


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_waits_inside_and_is_afterwards_as_it_was(was_on: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if was_on else gc.disable)()
        with pytest.raises(ImportError), quick_imports():
            assert not gc.isenabled()
            import bestiary.nothing_of_that_name  # type: ignore[import-not-found]  # noqa: F401
        assert gc.isenabled() == was_on
    finally:
        (gc.enable if before else gc.disable)()
