"""`VectorQuantizer2` of VARSR, on the ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hitsr_fast.compat import var
from hitsr_fast.pyramid import Scale


class VectorQuantizer2(var.VectorQuantizer2):
    """VAR's quantizer as VARSR has it: tokens of the last scale go without phi, for a refiner corrects them.

    Arguments, attributes and the other methods are those of `hitsr_fast.compat.VectorQuantizer2`.

    Notes:
        Source: VARSR (arXiv 2501.18993), the interface of its released code.
    """

    def f_to_idxBl_or_fhat(  # type: ignore[override]
        self, f_BChw: Tensor, to_fhat: bool, v_patch_nums: Sequence[Scale] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As in VAR; then what the last scale had to code.

        Returns:
            The list of `(B, h * w)`, or of `(B, C, H, W)`, with the residual before the last scale, as rows
            `(B, H * W, C)`, at its end; and the list of the indices.
        """
        pyramid = self._pyramid(v_patch_nums)
        self._expect_full_size(f_BChw, pyramid)
        if self.prog_si >= 0:
            raise ValueError(f"prog_si: expected -1, for the last scale is asked for, found {self.prog_si}")
        f, bank = f_BChw.detach(), self.bank(scales=len(pyramid.sizes))
        without_last_phi = replace(
            bank,
            phi_weight=torch.cat([bank.phi_weight, _identity(bank.phi_weight)]),
            phi_bias=torch.cat([bank.phi_bias, torch.zeros_like(bank.phi_bias[:1])]),
            phi_index=(*bank.phi_index[:-1], len(bank.phi_weight)),
        )
        prepared = self._prepared(bank.codebook, metric=self.metric)
        out = without_last_phi.quantize(f, pyramid.sizes, prepared=prepared, per_scale=True)
        assert out.reconstructions is not None
        indices = var.split_scales(out.indices, pyramid)
        f_hats = [f_hat.to(f.dtype) for f_hat in out.reconstructions]
        left = f - f_hats[-2] if len(f_hats) > 1 else f
        rows = left.flatten(2).transpose(1, 2).contiguous()
        return [*(f_hats if to_fhat else indices), rows], indices

    def idxBl_to_var_input(
        self, gt_ms_idx_Bl: Sequence[Tensor], v_patch_nums: Sequence[Scale] | None = None
    ) -> Tensor | None:
        """As in VAR, for other scales if they are given."""
        return self._teacher_inputs(gt_ms_idx_Bl, self._pyramid(v_patch_nums))

    def idxBl_to_input(
        self, gt_ms_idx_Bl: Sequence[Tensor], v_patch_nums: Sequence[Scale] | None = None
    ) -> Tensor | None:
        """`f_hat` after each scale, pooled to the size of that scale: `(B, T, C)`."""
        sizes = self._pyramid(v_patch_nums).sizes
        steps = len(sizes) if self.prog_si < 0 else min(self.prog_si, len(sizes))
        if steps == 0:
            return None
        codes = torch.cat([*gt_ms_idx_Bl[:steps]], dim=1)
        out = self.bank(scales=len(sizes)).decode(codes, sizes[:steps], sizes[-1], per_scale=True)
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
