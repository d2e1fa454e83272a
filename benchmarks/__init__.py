"""Benchmarks of the ops: `python -m benchmarks run OP`, `plot OP`, `audit OP`. See docs/benchmarks.md."""
