"""What storage raises: one line each, with the place, what happened and the remedy."""

from __future__ import annotations


class StorageError(ValueError):
    """A place that cannot be read: a refused address, an outage, changed content, a cache too small.

    It never means damage of the data: whoever counts damaged samples must let it pass, so that it stops the run.
    """


class NotThereError(StorageError):
    """The store answered, and there is no such file."""
