"""HIT-VAR's comparisons at a size that a laptop trains: see docs/reproduction.md."""
