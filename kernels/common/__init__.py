"""Tile helpers that several Triton kernels share."""
