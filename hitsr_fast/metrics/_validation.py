"""Argument checks that all metrics share."""

from __future__ import annotations

from torch import Tensor


def check_image(name: str, image: Tensor) -> None:
    """Require a floating-point `(B, 3, H, W)` tensor.

    Args:
        name: the argument's name, for the message.
        image: the tensor to check.

    Raises:
        TypeError: not a tensor, or not floating point.
        ValueError: another shape.
    """
    if not isinstance(image, Tensor):
        raise TypeError(f"{name}: expected a tensor, found {type(image).__name__}")
    if not image.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, found {image.dtype}")
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"{name}: expected shape (B, 3, H, W), found {tuple(image.shape)}")


def check_pair(a: Tensor, b: Tensor, *, min_side: int) -> None:
    """Require two comparable image batches with sides of at least `min_side`.

    Args:
        a: floating point, `(B, 3, H, W)`.
        b: floating point, the shape and device of `a`.
        min_side: the smallest height or width that the metric can use.

    Raises:
        TypeError: not a tensor, or not floating point.
        ValueError: shapes or devices differ, or a side is too short.
    """
    check_image("a", a)
    check_image("b", b)
    if a.shape != b.shape:
        raise ValueError(f"b: expected the shape of a, {tuple(a.shape)}, found {tuple(b.shape)}")
    if a.device != b.device:
        raise ValueError(f"b: expected the device of a, {a.device}, found {b.device}")
    if min(a.shape[2:]) < min_side:
        raise ValueError(f"a: expected sides of at least {min_side} px, found {tuple(a.shape[2:])}")
