"""`VectorQuantizer2` of VARSR, on the ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hitsr_fast.compat import var
from hitsr_fast.nn.residual_quantizer import Scale, pair
from hitsr_fast.ops import residual_decode, residual_quantize


class VectorQuantizer2(var.VectorQuantizer2):
    """VAR's quantizer as VARSR has it: tokens of the last scale go without phi, for a refiner corrects them.

    Arguments, attributes and the other methods are those of `hitsr_fast.compat.VectorQuantizer2`.

    Notes:
        Source: VARSR (arXiv 2501.18993), the interface of its released code.
    """

    def f_to_idxBl_or_fhat(  # type: ignore[override]
        self, f_BChw: Tensor, to_fhat: bool, v_patch_nums: Sequence[Scale] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of each scale the indices, or `f_hat` after it; then what the last scale had to code.

        Args:
            f_BChw: `(B, C, H, W)`.
            to_fhat: `f_hat` rather than indices.
            v_patch_nums: other scales than the module's own.

        Returns:
            The list of `(B, h * w)`, or of `(B, C, H, W)`, with the residual before the last scale, as rows
            `(B, H * W, C)`, at its end; and the list of the indices.
        """
        scales = self.scales if v_patch_nums is None else tuple(v_patch_nums)
        self._expect_full_size(f_BChw, scales)
        if self.prog_si >= 0:
            raise ValueError(f"prog_si: expected -1, for the last scale is asked for, found {self.prog_si}")
        codebook, weight, bias = self.bank()
        f = f_BChw.detach()
        out = residual_quantize(
            f,
            codebook,
            torch.cat([weight, _identity(weight)]),
            torch.cat([bias, torch.zeros_like(bias[:1])]),
            scales=scales,
            phi_index=[*self.phi_index(len(scales))[:-1], len(weight)],
            phi_ratio=self.phi_ratio,
            metric=self.metric,
            prepared=self._prepared(codebook, metric=self.metric),
            per_scale=True,
        )
        assert out.reconstructions is not None
        lengths = [h * w for h, w in map(pair, scales)]
        indices = [found.contiguous() for found in out.indices.split(lengths, dim=1)]
        f_hats = [out.reconstructions[scale].to(f.dtype) for scale in range(len(scales))]
        left = f - f_hats[-2] if len(scales) > 1 else f
        rows = left.flatten(2).transpose(1, 2).contiguous()
        return [*(f_hats if to_fhat else indices), rows], indices

    def idxBl_to_var_input(
        self, gt_ms_idx_Bl: Sequence[Tensor], v_patch_nums: Sequence[Scale] | None = None
    ) -> Tensor | None:
        """As in VAR, for other scales if they are given."""
        return self._teacher_inputs(gt_ms_idx_Bl, self.scales if v_patch_nums is None else v_patch_nums)

    def idxBl_to_input(
        self, gt_ms_idx_Bl: Sequence[Tensor], v_patch_nums: Sequence[Scale] | None = None
    ) -> Tensor | None:
        """`f_hat` after each scale, pooled to the size of that scale: `(B, T, C)`."""
        scales = self.scales if v_patch_nums is None else tuple(v_patch_nums)
        steps = len(scales) if self.prog_si < 0 else min(self.prog_si, len(scales))
        if steps == 0:
            return None
        sizes = [pair(scale) for scale in scales]
        out = residual_decode(
            torch.cat([*gt_ms_idx_Bl[:steps]], dim=1),
            *self.bank(),
            scales=sizes[:steps],
            phi_index=self.phi_index(len(sizes))[:steps],
            size=sizes[-1],
            phi_ratio=self.phi_ratio,
            per_scale=True,
        )
        assert out.reconstructions is not None
        return var.pooled_rows(out.reconstructions, sizes[:steps])

    def get_next_autoregressive_input(
        self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As in VAR, but the last scale is added as it is."""
        if si != SN - 1:
            return super().get_next_autoregressive_input(si, SN, f_hat, h_BChw)
        f_hat.add_(h_BChw)
        return f_hat, f_hat


def _identity(weight: Tensor) -> Tensor:
    """A convolution `(1, C, C, 3, 3)` that changes nothing, so that phi does not, whatever its ratio."""
    identity = torch.zeros_like(weight[:1])
    torch.nn.init.dirac_(identity[0])
    return identity
