"""Ovis' table of visual words beside an MLP or a linear connector at demo scale."""
