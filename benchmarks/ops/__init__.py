"""One module per op, `bench_<op>.py`, with a `BENCHMARK`."""
