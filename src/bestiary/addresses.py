"""Addresses as they may be shown: without the password in front of the host and without the query that signs them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def shown(location: str) -> str:
    """A path as it is; of an address neither the password nor the signature."""
    if "://" not in location:
        return location
    plain, mark, _ = location.partition("?")
    return re.sub(r"//.*@", "//***@", plain) + ("?***" if mark else "")


def without_secrets(tree: Any) -> Any:
    """A copy of nested mappings and lists in which every address is `shown`."""
    if isinstance(tree, str):
        return shown(tree)
    if isinstance(tree, Mapping):
        return {name: without_secrets(value) for name, value in tree.items()}
    return [without_secrets(value) for value in tree] if isinstance(tree, list | tuple) else tree
