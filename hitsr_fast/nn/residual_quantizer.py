"""`ResidualQuantizer`: the multi-scale quantizer as a layer to train, with the state dict of VAR's."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hitsr_fast.nn.phi_bank import phi_bank, stacked
from hitsr_fast.nn.prepared import CodebookCache
from hitsr_fast.ops import (
    Metric,
    ResidualDecoded,
    ResidualQuantized,
    phi_table,
    residual_decode,
    residual_quantize,
)

Scale = int | tuple[int, int]


class TrainedQuantization(NamedTuple):
    """What `ResidualQuantizer` returns; see there."""

    reconstruction: Tensor
    loss: Tensor
    indices: Tensor


class ResidualQuantizer(nn.Module):
    """Quantizes latents from coarse to fine, and lets the gradient through as if it had not.

    Calling it is the training pass. `quantize`, `decode` and `teacher_inputs` are the ops on its parameters.

    Args:
        codebook_size: K.
        code_dim: C.
        scales: side or (h, w) of each scale, coarsest first.
        metric: of `nearest_code`.
        commitment: weight of the loss that draws the latent to its codes.
        phi_ratio: r of phi, from 0 to 1; 0 leaves phi out, and its parameters too.
        share_phi: number of phis that the scales share; 0 gives each its own.
        separate_phi: number of phis where `share_phi` is 0, one a scale by default.

    Attributes:
        embedding: the codebook, `embedding.weight` `(K, C)`.
        quant_resi: the phis.
        ema_vocab_hit_SV: `(S, K)` float32, how often training hit each code lately.
        record_hit: how often that was updated.

    Notes:
        Source: VAR (arXiv 2404.02905), Algorithm 1, and the training pass of its released quantizer, whose
        state dict has the same names. A state whose `ema_vocab_hit_SV` has another shape, as it is for other
        scales, loads, and leaves the statistics here as they are.
    """

    ema_vocab_hit_SV: Tensor  # noqa: N815

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        scales: Sequence[Scale],
        *,
        metric: Metric = "l2",
        commitment: float = 0.25,
        phi_ratio: float = 0.5,
        share_phi: int = 4,
        separate_phi: int | None = None,
    ) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.metric: Metric = metric
        self.commitment = commitment
        self.phi_ratio = phi_ratio
        # Made in VAR's order, so that one seed gives both the same weights.
        self.quant_resi = phi_bank(code_dim, phi_ratio, share_phi, separate_phi or len(self.scales))
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(self.scales), codebook_size))
        self.embedding = nn.Embedding(codebook_size, code_dim)
        self.record_hit = 0
        self._prepared = CodebookCache()

    def bank(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codebook `(K, C)`, phi weights `(P, C, C, 3, 3)` and phi biases `(P, C)`, as the ops take them."""
        codebook = self.embedding.weight
        return codebook, *stacked(self.quant_resi, codebook)

    def phi_index(self, num_scales: int) -> list[int]:
        """Which phi each of `num_scales` scales uses."""
        return phi_table(num_scales, len(self.quant_resi.phis))

    def quantize(
        self,
        z: Tensor,
        *,
        scales: Sequence[Scale] | None = None,
        steps: int | None = None,
        inputs: bool = False,
        per_scale: bool = False,
    ) -> ResidualQuantized:
        """`residual_quantize` of a latent `(B, C, H, W)`.

        Args:
            z: floating.
            scales: other ones than the module's own.
            steps: stop after so many of them, with the phis of the whole list.
            inputs: see there.
            per_scale: see there.
        """
        sizes = self.scales if scales is None else tuple(scales)
        return residual_quantize(
            z,
            *self.bank(),
            scales=sizes[:steps],
            phi_index=self.phi_index(len(sizes))[:steps],
            phi_ratio=self.phi_ratio,
            metric=self.metric,
            prepared=self._prepared(self.embedding.weight, metric=self.metric),
            inputs=inputs,
            per_scale=per_scale,
        )

    def decode(self, indices: Tensor, *, inputs: bool = False, per_scale: bool = False) -> ResidualDecoded:
        """`residual_decode` of int64 indices `(B, T)` of all scales, or of some first ones, at full size.

        Args:
            indices: as `quantize` gives them.
            inputs: see there.
            per_scale: see there.
        """
        lengths = [h * w for h, w in map(pair, self.scales)]
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        if indices.dim() != 2 or indices.shape[1] not in ends:
            raise ValueError(
                f"indices: expected shape (B, T) with T one of {ends}, found {tuple(indices.shape)}"
            )
        steps = ends.index(indices.shape[1]) + 1
        return residual_decode(
            indices,
            *self.bank(),
            scales=self.scales[:steps],
            phi_index=self.phi_index(len(self.scales))[:steps],
            size=pair(self.scales[-1]),
            phi_ratio=self.phi_ratio,
            inputs=inputs,
            per_scale=per_scale,
        )

    @torch.no_grad()
    def teacher_inputs(self, indices: Tensor) -> Tensor:
        """Of int64 indices `(B, T)`, what teacher forcing feeds a model: `(B, T - h0 * w0, C)`."""
        inputs = self.decode(indices, inputs=True).inputs
        assert inputs is not None
        return inputs

    def forward(self, z: Tensor) -> TrainedQuantization:
        """The training pass.

        Args:
            z: floating, `(B, C, H, W)`.

        Returns:
            reconstruction: `(B, C, H, W)`, float32 or wider; its gradient goes to z as it is.
            loss: scalar, with Q_s the reconstruction after scale s, the mean over the scales of
                `mse(Q_s, sg(z)) + commitment * mse(sg(Q_s), z)`; its gradient goes to codebook, phi and z.
            indices: int64 `(B, T)`.

        Notes:
            In training mode the usage statistics are updated, summed over all processes where
            `torch.distributed` runs.
        """
        z = z.to(torch.promote_types(self.embedding.weight.dtype, torch.float32))
        out = self.quantize(z, per_scale=True)
        assert out.reconstructions is not None
        loss: Tensor = _ScaleLosses.apply(z, out.reconstructions, self.commitment)
        reconstruction = (out.reconstruction.detach() - z.detach()) + z
        if self.training:
            self._count(out.indices)
        return TrainedQuantization(reconstruction, loss, out.indices)

    def usage(self, z: Tensor) -> list[float]:
        """Of each scale, the percentage of codes that training hits at least 8 % as often as chance would.

        Args:
            z: `(B, C, H, W)`, a batch of the size that each process trains on.
        """
        processes = torch.distributed.get_world_size() if _distributed() else 1
        enough = processes * (z.numel() / z.shape[1]) / self.ema_vocab_hit_SV.shape[1] * 0.08
        hits = self.ema_vocab_hit_SV[: len(self.scales)]
        return [share * 100 for share in (hits >= enough).float().mean(dim=1).tolist()]

    def extra_repr(self) -> str:
        return (
            f"scales={self.scales}, metric={self.metric}, commitment={self.commitment}, "
            f"phi_ratio={self.phi_ratio}"
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the counter would compile anew each time
    @torch.no_grad()
    def _count(self, indices: Tensor) -> None:
        """Update the usage statistics: a plain copy at the very first scale, then a moving average.

        The counter that lets the average slow down ticks once a scale.
        """
        S, K = len(self.scales), self.ema_vocab_hit_SV.shape[1]
        lengths = [h * w for h, w in map(pair, self.scales)]
        scale = torch.arange(S, device=indices.device).repeat_interleave(
            torch.tensor(lengths, device=indices.device), output_size=sum(lengths)
        )
        place = (indices + K * scale).flatten()
        # A count in 16 bits would stop growing at a few hundred.
        hits = torch.bincount(place, minlength=S * K).float().view(S, K)
        if _distributed():
            torch.distributed.all_reduce(hits)
        ticks = range(self.record_hit, self.record_hit + S)
        keep = hits.new_tensor([0.0 if t == 0 else 0.9 if t < 100 else 0.99 for t in ticks])[:, None]
        take = hits.new_tensor([1.0 if t == 0 else 0.1 if t < 100 else 0.01 for t in ticks])[:, None]
        average = self.ema_vocab_hit_SV[:S]
        average.copy_(average.float() * keep + hits * take)
        self.record_hit += S

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "ema_vocab_hit_SV"
        if key in state_dict and state_dict[key].shape != self.ema_vocab_hit_SV.shape:
            state_dict[key] = self.ema_vocab_hit_SV
        super()._load_from_state_dict(state_dict, prefix, *args)


class _ScaleLosses(torch.autograd.Function):
    """Mean over s of `mse(Q_s, sg(z)) + commitment * mse(sg(Q_s), z)`; the two terms share their differences.

    Autograd would take each difference twice, and go over all S maps more than twice as often.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, each: Tensor, commitment: float) -> Tensor:
        """Of z `(B, C, H, W)` and Q `(S, B, C, H, W)`."""
        ctx.save_for_backward(z, each)
        ctx.commitment = commitment
        errors = torch.stack([F.mse_loss(reconstruction, z) for reconstruction in each])
        return errors.mean() * (1 + commitment)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, each = ctx.saved_tensors
        grad_each = (each - z).mul_(2 * grad / each.numel())
        return grad_each.sum(dim=0) * -ctx.commitment, grad_each, None


def pair(scale: Scale) -> tuple[int, int]:
    """Of a side or (h, w)."""
    sides: Any = (scale, scale) if isinstance(scale, Integral) else scale
    return int(sides[0]), int(sides[1])


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
