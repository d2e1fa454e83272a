"""HIT-VAR (arXiv 2506.04990)."""
