"""`VectorQuantizer2` of VAR and Switti, on the ops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.compat.phi_bank import PhiBank
from hitsr_fast.nn import ResidualQuantizer
from hitsr_fast.ops import nearest_code
from hitsr_fast.pyramid import Scale, ScalePyramid, Size


class VectorQuantizer2(ResidualQuantizer):
    """The quantizer of VAR's tokenizer: its arguments, attributes, methods, state dict and results, quicker.

    In VAR and in Switti all it takes is `from hitsr_fast.compat import VectorQuantizer2` in place of the
    model's own import; VARSR has a class of its own in `hitsr_fast.compat.varsr`.

    Args:
        vocab_size: K, the size of the codebook.
        Cvae: C, the channels.
        using_znorm: compare directions (cosine) rather than positions (L2).
        beta: weight of the commitment loss.
        default_qresi_counts: number of separate phis; one a scale if 0.
        v_patch_nums: side or (h, w) of each scale, coarsest first.
        quant_resi: r of phi, whose sign does not count; below 1e-6 there is no phi.
        share_quant_resi: number of phis that the scales share; 0 for separate ones.

    Notes:
        What differs: the search is exact, where VAR's float32 distances may prefer another code of nearly the
        same distance; scales may be (h, w) everywhere; usage statistics need no process group; under autocast
        all is computed in float32 still.
        Source: VAR (arXiv 2404.02905), the interface of its released code.
    """

    def __init__(
        self,
        vocab_size: int,
        Cvae: int,
        using_znorm: bool,
        beta: float = 0.25,
        default_qresi_counts: int = 0,
        v_patch_nums: Sequence[Scale] | None = None,
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
    ) -> None:
        if v_patch_nums is None:
            raise ValueError("v_patch_nums: expected the scales, found None")
        self._shared = share_quant_resi > 0  # read while the parameters are made
        super().__init__(
            vocab_size,
            Cvae,
            ScalePyramid(v_patch_nums),
            metric="cosine" if using_znorm else "l2",
            commitment=beta,
            phi_ratio=abs(quant_resi) if abs(quant_resi) > 1e-6 else 0.0,
            num_phi=share_quant_resi or default_qresi_counts or len(v_patch_nums),
        )
        self.vocab_size, self.Cvae, self.quant_resi_ratio = vocab_size, Cvae, quant_resi
        self.prog_si = -1  # last scale of a progressive training; -1 for none

    def _make_parameters(self, codebook_size: int, code_dim: int) -> None:
        # In VAR's order, so that one seed gives both the same weights.
        self.quant_resi = PhiBank(code_dim, self.phi_ratio, self.num_phi, self._shared)
        self.embedding = nn.Embedding(codebook_size, code_dim)

    def _parameters_as_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        codebook = self.embedding.weight
        return codebook, *self.quant_resi.stacked(codebook)

    @property
    def using_znorm(self) -> bool:
        return self.metric == "cosine"

    @using_znorm.setter
    def using_znorm(self, value: bool) -> None:
        self.metric = "cosine" if value else "l2"

    @property
    def beta(self) -> float:
        return self.commitment

    @beta.setter
    def beta(self, value: float) -> None:
        self.commitment = value

    @property
    def v_patch_nums(self) -> tuple[Scale, ...]:
        return self.pyramid.scales

    @v_patch_nums.setter
    def v_patch_nums(self, value: Sequence[Scale]) -> None:
        self.pyramid = ScalePyramid(value)

    def eini(self, eini: float) -> None:
        """Draw the codebook: truncated normal of deviation `eini`, or, below 0, uniform up to |eini| / K."""
        if eini > 0:
            nn.init.trunc_normal_(self.embedding.weight, std=eini)
        elif eini < 0:
            bound = abs(eini) / self.vocab_size
            nn.init.uniform_(self.embedding.weight, -bound, bound)

    def extra_repr(self) -> str:
        return (
            f"{self.v_patch_nums}, znorm={self.using_znorm}, beta={self.beta}  |  "
            f"S={len(self.v_patch_nums)}, quant_resi={self.quant_resi_ratio}"
        )

    def forward(  # type: ignore[override]
        self, f_BChw: Tensor, ret_usages: bool = False
    ) -> tuple[Tensor, list[float] | None, Tensor]:
        """The training pass: straight-through `f_hat`, usages in percent or None, mean loss of the scales."""
        self._expect_full_size(f_BChw, self.pyramid)
        out = super().forward(f_BChw)
        return out.reconstruction, self.usage(f_BChw) if ret_usages else None, out.loss

    def embed_to_fhat(
        self, ms_h_BChw: Sequence[Tensor], all_to_max_scale: bool = True, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """`f_hat` after each scale, or after the last, of maps `(B, C, h, w)` of codes or their mixtures."""
        if not all_to_max_scale:
            return self._grown(ms_h_BChw, last_one)
        rows = torch.cat([h.flatten(2).transpose(1, 2) for h in ms_h_BChw], dim=1)
        sizes = self.pyramid.sizes
        out = self.bank().decode(rows, sizes, sizes[-1], per_scale=not last_one)
        return out.reconstruction if out.reconstructions is None else [*out.reconstructions]

    def f_to_idxBl_or_fhat(
        self,
        f_BChw: Tensor,
        to_fhat: bool,
        v_patch_nums: Sequence[Scale] | None = None,
        noise_std: float | None = None,
    ) -> list[Tensor]:
        """Of each scale the indices `(B, h * w)`, or `f_hat` after it.

        Args:
            f_BChw: `(B, C, H, W)`.
            to_fhat: which of the two.
            v_patch_nums: other scales than the module's own.
            noise_std: Switti's: the pooled rows are shrunk, and noise of this deviation is added to them.
        """
        pyramid = self._pyramid(v_patch_nums)
        self._expect_full_size(f_BChw, pyramid)
        steps = len(pyramid.sizes) if self.prog_si < 0 else self.prog_si + 1
        if noise_std is not None:
            indices, maps = self._with_noise(f_BChw.detach(), pyramid, steps, noise_std)
        else:
            out = self.quantize(f_BChw.detach(), scales=pyramid.sizes, steps=steps, per_scale=to_fhat)
            indices = split_scales(out.indices, pyramid)
            maps = [] if out.reconstructions is None else [*out.reconstructions]
        return [f_hat.to(f_BChw.dtype) for f_hat in maps] if to_fhat else indices

    def idxBl_to_var_input(self, gt_ms_idx_Bl: Sequence[Tensor]) -> Tensor | None:
        """What teacher forcing feeds the model: `(B, T - h0 * w0, C)`; None where there is no scale to feed.

        The indices `(B, h * w)` of the last scale feed nothing.
        """
        return self._teacher_inputs([indices.long() for indices in gt_ms_idx_Bl], self.pyramid)

    def idxBl_to_switti_input(self, gt_ms_idx_Bl: Sequence[Tensor]) -> Tensor | None:
        """`idxBl_to_var_input` by the name that Switti gives it."""
        return self.idxBl_to_var_input(gt_ms_idx_Bl)

    def get_next_autoregressive_input(
        self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The sampler's step: adds a map of codes, or of mixtures of them, to `f_hat` in place.

        It is scale number `si` out of `SN`.

        Returns:
            `f_hat`, and the next scale's input `(B, C, h2, w2)`; `f_hat` again after the last scale.
        """
        B, C, h, w = h_BChw.shape
        following = None if si == SN - 1 else self.pyramid.sizes[si + 1]
        if B == 0:
            return f_hat, f_hat if following is None else f_hat.new_empty(0, C, *following)
        rows, bank = h_BChw.flatten(2).transpose(1, 2), self.bank(scales=SN)
        tensors = (rows, *bank.tensors[1:], f_hat)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            own = replace(bank, phi_index=bank.phi_index[si:])
            f_hat.add_(own.decode(rows, [(h, w)], f_hat.shape[2:]).reconstruction)
            return f_hat, f_hat if following is None else F.interpolate(f_hat, size=following, mode="area")
        weights = torch.promote_types(rows.dtype, bank.phi_weight.dtype)
        wide = f_hat.to(torch.promote_types(weights, torch.float32))
        pooled = bank.step(wide, rows, si, (h, w), following)
        if wide is not f_hat:
            f_hat.copy_(wide)
        return f_hat, f_hat if following is None else pooled.to(f_hat.dtype)

    def _pyramid(self, v_patch_nums: Sequence[Scale] | None) -> ScalePyramid:
        return self.pyramid if v_patch_nums is None else ScalePyramid(v_patch_nums)

    def _expect_full_size(self, f: Tensor, pyramid: ScalePyramid) -> None:
        size, found = pyramid.sizes[-1], tuple(f.shape[2:])
        if found != size:
            raise ValueError(f"f_BChw: expected the size of the last scale, {size}, found {found}")

    def _grown(self, maps: Sequence[Tensor], last_one: bool) -> list[Tensor] | Tensor:
        """`f_hat` enlarged from scale to scale: an experiment of VAR's, which no model is trained for."""
        f_hats: list[Tensor] = []
        sizes = self.pyramid.sizes
        f_hat = torch.zeros(maps[0].shape, device=maps[0].device)
        for scale, (h, size) in enumerate(zip(maps, sizes, strict=True)):
            if f_hats:
                f_hat = F.interpolate(f_hats[-1], size=size, mode="bicubic")
            f_hats.append(f_hat + self.quant_resi[scale / max(len(sizes) - 1, 1)](h))
        return f_hats[-1] if last_one else f_hats

    def _with_noise(
        self, f: Tensor, pyramid: ScalePyramid, steps: int, noise_std: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Indices and `f_hat` of each scale; the noise takes the scales apart."""
        bank = self.bank(scales=len(pyramid.sizes))
        codes = self._prepared(bank.codebook, metric=self.metric) or bank.codebook
        f_hat = torch.zeros_like(f)
        indices, maps = [], []
        for scale, size in enumerate(pyramid.sizes[:steps]):
            pooled = F.interpolate(f - f_hat.detach(), size=size, mode="area")
            rows = pooled.permute(0, 2, 3, 1).reshape(-1, f.shape[1])
            rows = math.sqrt(1 - noise_std**2) * rows + noise_std * torch.randn_like(rows)
            indices.append(nearest_code(rows, codes, metric=self.metric).view(len(f), -1))
            own = replace(bank, phi_index=bank.phi_index[scale:])
            f_hat = f_hat + own.decode(indices[-1], [size], f.shape[2:]).reconstruction
            maps.append(f_hat)
        return indices, maps

    def _teacher_inputs(self, given: Sequence[Tensor], pyramid: ScalePyramid) -> Tensor | None:
        sizes = pyramid.sizes
        fed = len(sizes) - 1 if self.prog_si < 0 else min(self.prog_si, len(sizes) - 1)
        if fed == 0:
            return None
        # The scale that is fed last feeds nothing itself.
        codes = torch.cat([*given[:fed], given[0].new_zeros(len(given[0]), pyramid.lengths[fed])], dim=1)
        bank = self.bank(scales=len(sizes))
        differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in bank.tensors)
        out = bank.decode(
            codes, sizes[: fed + 1], sizes[-1], return_inputs=not differentiable, per_scale=differentiable
        )
        if out.reconstructions is None:
            return out.inputs
        return pooled_rows(out.reconstructions[:-1], sizes[1 : fed + 1])


def pooled_rows(maps: Tensor, sizes: Sequence[Size]) -> Tensor:
    """Each map of `(S, B, C, H, W)` pooled to a size of its own, as rows `(B, T, C)`; differentiable."""
    pooled = [F.interpolate(m, size=size, mode="area") for m, size in zip(maps, sizes, strict=True)]
    return torch.cat([m.flatten(2).transpose(1, 2) for m in pooled], dim=1)


def split_scales(indices: Tensor, pyramid: ScalePyramid) -> list[Tensor]:
    """`(B, T)` of some first scales as `(B, h * w)` of each, contiguous."""
    steps = pyramid.ends.index(indices.shape[1]) + 1
    return [part.contiguous() for part in indices.split(pyramid.lengths[:steps], dim=1)]
