"""Small text against the number of windows, with and without adapters of their own, at demo scale."""
