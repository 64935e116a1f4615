"""Benchmarks, scorers, statistics and pictures of results."""
