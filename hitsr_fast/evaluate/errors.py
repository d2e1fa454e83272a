"""What an evaluation refuses."""

from __future__ import annotations


class EvaluationError(ValueError):
    """A test set or an option with which nothing can be evaluated."""
