"""One-off scripts around the library."""
