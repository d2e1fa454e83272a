"""Colour fix: the low frequencies of an output are replaced by those of its input.

A generative model can drift in colour. What is coarser than about three input pixels is known from the input,
so it is taken from there (the wavelet fix of StableSR, also in VARSR): `output - low(output) + low(lr)`,
`lr` being the input brought to the output's size. The low-pass is linear, which makes that
`output + low(lr - output)`: one chain of blurs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def low_pass(x: Tensor, levels: int) -> Tensor:
    """A-trous low-pass of (B, C, H, W): `levels` separable [1 2 1] / 4 blurs, the i-th dilated by 2^i.

    Borders are replicated; a pixel depends on those up to `2^levels - 1` away. The result is that level's
    approximation in the undecimated wavelet transform.
    """
    for level in range(levels):
        step = 2**level
        x = _blur(F.pad(x, (0, 0, step, step), mode="replicate"), step, dim=-2)
        x = _blur(F.pad(x, (step, step, 0, 0), mode="replicate"), step, dim=-1)
    return x


def _blur(padded: Tensor, step: int, dim: int) -> Tensor:
    n = padded.shape[dim] - 2 * step
    sides = padded.narrow(dim, 0, n) + padded.narrow(dim, 2 * step, n)
    return sides.mul_(0.25).add_(padded.narrow(dim, step, n), alpha=0.5)


def wavelet_colour_fix(output: Tensor, lr_upsampled: Tensor, levels: int = 5) -> Tensor:
    """Give `output` the low frequencies of `lr_upsampled`.

    Args:
        output: (B, C, H, W) floating, the image to correct.
        lr_upsampled: the same shape and dtype, the input brought to the output's size.
        levels: at least 0, dyadic levels that count as detail and stay those of `output`; with 0 the
            result is `lr_upsampled`.

    Returns:
        (B, C, H, W), not clamped.

    Raises:
        TypeError: if the images are not floating tensors of one dtype.
        ValueError: if the shapes differ or `levels` is negative.

    Notes:
        StableSR (arXiv:2305.07015), section 3.4; `levels=5` is its choice for x4.
    """
    expected = "output, lr_upsampled: expected one"
    if not (output.is_floating_point() and output.dtype == lr_upsampled.dtype):
        raise TypeError(f"{expected} floating dtype, found {output.dtype} and {lr_upsampled.dtype}")
    if output.dim() != 4 or output.shape != lr_upsampled.shape:
        found = f"{tuple(output.shape)} and {tuple(lr_upsampled.shape)}"
        raise ValueError(f"{expected} (B, C, H, W) shape, found {found}")
    if levels < 0:
        raise ValueError(f"levels: expected at least 0, found {levels}")
    return output + low_pass(lr_upsampled - output, levels)


class RowColourFix:
    """`wavelet_colour_fix` of an image that arrives some rows at a time, equal to that of the whole image.

    A row is handed on when the `2^levels - 1` rows below it are there; that many rows are the only ones kept.
    """

    def __init__(self, levels: int) -> None:
        self.levels = levels
        self._reach = 2**levels - 1
        self._output: Tensor | None = None  # rows not yet handed on, after up to `_reach` rows of context
        self._drift: Tensor | None = None  # lr_upsampled - output of the same rows
        self._context = 0  # how many of the kept rows have been handed on

    def add_rows(self, output: Tensor, lr_upsampled: Tensor, last: bool) -> Tensor:
        """Add the next (B, C, n, W) rows of both images and get the (B, C, m, W) rows that are now final."""
        drift = lr_upsampled - output
        if self._output is not None and self._drift is not None:
            output = torch.cat((self._output, output), dim=-2)
            drift = torch.cat((self._drift, drift), dim=-2)
        rows = output.shape[-2]
        final = rows if last else max(rows - self._reach, self._context)
        # Cut edges are padded like borders and so are wrong up to `_reach` rows inside: those rows are
        # context only.
        fixed = (output + low_pass(drift, self.levels))[..., self._context : final, :]
        keep = max(final - self._reach, 0)
        self._output, self._drift = output[..., keep:, :].clone(), drift[..., keep:, :].clone()
        self._context = final - keep
        return fixed
