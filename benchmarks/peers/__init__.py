"""Implementations that the benchmarks and tests compare with, written out from their papers."""
