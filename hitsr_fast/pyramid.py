"""`ScalePyramid`: the token maps of an image, from coarse to fine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from hitsr_fast.checks import INTEGER

Scale = int | tuple[int, int]
Size = tuple[int, int]


@dataclass(frozen=True, init=False)
class ScalePyramid:
    """The scales of a next-scale model, coarsest first, and which of them are images of their own.

    Args:
        scales: Side or (h, w) of each token map, none larger than the last.
        targets: Side or (h, w) of each map that can be decoded, ascending to the last scale (HIT-VAR, section
            3.1); by default the last scale alone.

    Attributes:
        sizes: (h, w) of each scale.
        lengths: Tokens of each scale.
        ends: Tokens up to the end of each scale.
        steps: Of each target, the number of scales up to its end: those no larger than it.

    Raises:
        TypeError: If scales or targets are no list.
        ValueError: If a size is none, or too large, or no scale ends a target.

    Example:
        >>> pyramid = ScalePyramid((1, 2, (3, 4)), targets=(2, (3, 4)))
        >>> pyramid.lengths, pyramid.ends, pyramid.steps
        ((1, 4, 12), (1, 5, 17), (2, 3))
    """

    scales: tuple[Scale, ...] = field(compare=False)
    targets: tuple[Size, ...] = ()
    sizes: tuple[Size, ...] = field(init=False, repr=False)
    lengths: tuple[int, ...] = field(init=False, repr=False, compare=False)
    ends: tuple[int, ...] = field(init=False, repr=False, compare=False)
    steps: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __init__(self, scales: Sequence[Scale], targets: Sequence[Scale] = ()) -> None:
        scales, targets = _listed("scales", scales), _listed("targets", targets)
        sizes = tuple(size_of("scales", scale) for scale in scales)
        if not sizes:
            raise ValueError("scales: expected at least one, found none")
        if any(not _within(size, sizes[-1]) for size in sizes):
            raise ValueError(f"scales: expected none larger than the last, found {scales}")
        ends = tuple(size_of("targets", target) for target in targets) or sizes[-1:]
        steps = tuple(sum(_within(size, end) for size in sizes) for end in ends)
        if [sizes[step - 1] for step in steps] != list(ends) or ends[-1] != sizes[-1]:
            raise ValueError(f"targets: expected some of scales, up to the last, found {targets}")
        lengths = tuple(h * w for h, w in sizes)
        values = scales, ends, sizes, lengths, tuple(accumulate(lengths)), steps
        for name, value in zip(self.__dataclass_fields__, values, strict=True):
            object.__setattr__(self, name, value)

    @property
    def num_tokens(self) -> int:
        """Tokens of one image over all scales."""
        return self.ends[-1]

    def block_lengths(self, prefix: int) -> list[int]:
        """Rows of each block of a transformer whose first scale follows `prefix` rows in one block."""
        return [prefix + self.lengths[0], *self.lengths[1:]]


def size_of(name: str, scale: Any) -> Size:
    """(h, w) of a side or (h, w), both at least 1; ValueError with `name` where it is neither."""
    sides: Any = scale
    if not isinstance(scale, tuple):
        sides = (scale, scale) if isinstance(scale, INTEGER) else tuple(scale) if _is_sequence(scale) else ()
    if len(sides) == 2:
        h, w = sides
        if isinstance(h, INTEGER) and isinstance(w, INTEGER) and h >= 1 and w >= 1:
            return h, w
    raise ValueError(f"{name}: expected a side or (height, width) of at least 1, found {scale}")


def _listed(name: str, sizes: Any) -> tuple[Any, ...]:
    if isinstance(sizes, str) or not isinstance(sizes, Iterable):
        raise TypeError(f"{name}: expected a list of sides or (height, width), found {sizes!r}")
    return tuple(sizes)


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _within(size: Size, other: Size) -> bool:
    return size[0] <= other[0] and size[1] <= other[1]
