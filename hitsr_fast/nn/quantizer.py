"""`ResidualQuantizer`: VAR's multi-scale quantizer, with HIT-VAR's targets, as a layer to train."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hitsr_fast import ops
from hitsr_fast.checks import check_choice, check_integer, check_number
from hitsr_fast.nn.bank import QuantizerBank
from hitsr_fast.nn.prepared import CodebookCache
from hitsr_fast.ops.nearest_code import METRICS
from hitsr_fast.pyramid import Scale, ScalePyramid
from hitsr_fast.transfer import to_device

PhiIndexing = Literal["global", "per_target"]


def _uncompiled(method: Callable[..., None]) -> Callable[..., None]:
    """`torch.compiler.disable`, put on at the call: it imports the compiler, and nobody else must wait."""

    @functools.wraps(method)
    def call(*args: Any) -> None:
        torch.compiler.disable(method)(*args)

    return call


class TrainedQuantization(NamedTuple):
    """What `ResidualQuantizer` returns; see there."""

    reconstruction: Tensor
    loss: Tensor
    indices: Tensor


class ResidualQuantizer(nn.Module):
    """Quantizes latents from coarse to fine, and lets the gradient through as if it had not.

    Calling it is the training pass. The other methods are the ops on its parameters.

    Args:
        codebook_size: K.
        code_dim: C.
        pyramid: scales, and the targets that the latents of `tokenize` have.
        metric: of `nearest_code`.
        commitment: weight of the loss that draws the latent to its codes.
        phi_ratio: r of phi, from 0 to 1; 0 leaves phi out.
        num_phi: number of phis; each scale uses the one nearest to its place.
        phi_indexing: `"global"` counts a scale's place among all scales, `"per_target"` among its target's.
        track_usage: count in training how often each code is hit.

    Attributes:
        codebook, phi_weight, phi_bias: `(K, C)`, `(P, C, C, 3, 3)` and `(P, C)`.
        ema_vocab_hit_SV: `(S, K)` float32, how often training hit each code lately, if that is tracked.
        record_hit: how often that was updated.

    Notes:
        Source: VAR (arXiv 2404.02905), Algorithms 1 and 2, and the training pass of its released quantizer;
        HIT-VAR (arXiv 2506.04990), Algorithm 1, for the targets. `compat.VectorQuantizer2` has the names of
        VAR's parameters. A state whose `ema_vocab_hit_SV` has another shape, as it is for other scales,
        loads, and leaves the statistics here as they are.
    """

    undecayed = ("codebook", "phi_weight", "phi_bias")
    ema_vocab_hit_SV: Tensor  # noqa: N815

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        pyramid: ScalePyramid,
        *,
        metric: ops.Metric = "l2",
        commitment: float = 0.25,
        phi_ratio: float = 0.5,
        num_phi: int = 4,
        phi_indexing: PhiIndexing = "global",
        track_usage: bool = True,
    ) -> None:
        super().__init__()
        for name, count in (("codebook_size", codebook_size), ("code_dim", code_dim), ("num_phi", num_phi)):
            check_integer(name, count, 1)
        check_choice("metric", metric, METRICS)
        check_number("commitment", commitment, 0)
        check_number("phi_ratio", phi_ratio, 0, 1)
        check_choice("phi_indexing", phi_indexing, get_args(PhiIndexing))
        self.pyramid, self.commitment, self.track_usage = pyramid, commitment, track_usage
        self.metric: ops.Metric = metric
        self.phi_ratio, self.num_phi, self.phi_indexing = phi_ratio, num_phi, phi_indexing
        if track_usage:
            self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(pyramid.scales), codebook_size))
        self.record_hit = 0
        self._prepared = CodebookCache()
        self._make_parameters(codebook_size, code_dim)

    def _make_parameters(self, codebook_size: int, code_dim: int) -> None:
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))
        self.phi_weight = nn.Parameter(torch.zeros(self.num_phi, code_dim, code_dim, 3, 3))
        self.phi_bias = nn.Parameter(torch.zeros(self.num_phi, code_dim))
        nn.init.kaiming_uniform_(self.phi_weight.view(-1, *self.phi_weight.shape[2:]), a=5**0.5)

    def _parameters_as_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codebook, self.phi_weight, self.phi_bias

    def bank(self, target: int = -1, *, scales: int | None = None) -> QuantizerBank:
        """The parameters as the ops take them, with the phi of each scale of a target.

        `scales` is the number of scales, where they are other ones than the pyramid's.
        """
        steps = self.pyramid.steps[target] if scales is None else scales
        own = scales is None and self.phi_indexing == "global"
        phi_index = tuple(ops.phi_table(len(self.pyramid.scales) if own else steps, self.num_phi)[:steps])
        return QuantizerBank(*self._parameters_as_tensors(), phi_index, self.phi_ratio, self.metric)

    def banks(self) -> list[QuantizerBank]:
        """Of each target."""
        return [self.bank(target) for target in range(len(self.pyramid.targets))]

    def quantize(
        self, z: Tensor, *, scales: Sequence[Scale] | None = None, steps: int | None = None, **options: Any
    ) -> ops.ResidualQuantized:
        """`residual_quantize` of a latent `(B, C, H, W)`.

        Args:
            scales: other ones than the module's own.
            steps: stop after so many of them, with the phis of the whole list.
            options: `replay`, `return_inputs`, `per_scale` of the op.
        """
        sizes = self.pyramid.scales if scales is None else scales
        bank = self.bank(scales=len(sizes))
        return bank.quantize(z, sizes[:steps], prepared=self.prepared(), **options)

    def prepared(self) -> ops.PreparedCodebook | None:
        """The codebook as it is now, for the op's `prepared`; None off the CPU, where each call packs it."""
        return self._prepared(self._parameters_as_tensors()[0], metric=self.metric)

    def tokenize(self, latents: Sequence[Tensor]) -> ops.TokenizedPyramid:
        """Quantize the latents of all targets; each continues the tokens of the one before (Algorithm 1).

        Args:
            latents: One `(B, C, h, w)` map a target, from the coarsest on; fewer targets give fewer tokens.

        Returns:
            Tokens `(B, T)` and the reconstruction of each target, with gradients to codebook and phi.
        """
        if not latents:
            raise ValueError("latents: expected at least one map, found none")
        for target, (latent, size) in enumerate(zip(latents, self.pyramid.targets, strict=False)):
            found = tuple(latent.shape[-2:])
            if found != size:
                raise ValueError(f"latents[{target}]: expected a map of size {size}, found {found}")
        banks = self.banks()
        return ops.tokenize_pyramid(
            latents,
            *banks[0].tensors,
            scales=self.pyramid.scales,
            target_steps=self.pyramid.steps,
            phi_index=[bank.phi_index for bank in banks],
            phi_ratio=self.phi_ratio,
            metric=self.metric,
            prepared=self.prepared(),
        )

    def decode(self, indices: Tensor, target: int = -1, **options: Any) -> ops.ResidualDecoded:
        """`residual_decode` of int64 indices `(B, T)` at the size of a target.

        Args:
            indices: of all scales, or of some first ones; those of later targets are left out.
            target: its number, 0 the coarsest; by default the last.
            options: `return_inputs`, `per_scale` of the op.
        """
        pyramid = self.pyramid
        if indices.dim() != 2 or indices.shape[1] not in pyramid.ends:
            expected = f"shape (B, T) with T one of {list(pyramid.ends)}"
            raise ValueError(f"indices: expected {expected}, found {tuple(indices.shape)}")
        steps = min(pyramid.ends.index(indices.shape[1]) + 1, pyramid.steps[target])
        return self.bank(target).decode(
            indices[:, : pyramid.ends[steps - 1]], pyramid.scales[:steps], pyramid.targets[target], **options
        )

    @torch.no_grad()
    def teacher_inputs(self, indices: Tensor, *, ar_grid: str = "target") -> Tensor:
        """What teacher forcing feeds a model: `(B, T - h0 * w0, C)`, float32 or wider.

        Indices are int64 `(B, T)`; for `ar_grid` see `ReconstructionWalk`.
        """
        pyramid = self.pyramid
        targets = range(len(pyramid.targets))
        first = known = pyramid.lengths[0]
        segments = []
        for target in targets if ar_grid == "target" else targets[-1:]:
            inputs = self.decode(indices, target, return_inputs=True).inputs
            assert inputs is not None
            segments.append(inputs[:, known - first :])  # those of the steps that this target owns
            known = first + inputs.shape[1]
        return torch.cat(segments, 1)

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
        z = z.to(torch.promote_types(next(self.parameters()).dtype, torch.float32))
        out = self.quantize(z, per_scale=True)
        assert out.reconstructions is not None
        loss: Tensor = _ScaleLosses.apply(z, out.reconstructions, self.commitment)
        reconstruction = (out.reconstruction.detach() - z.detach()) + z
        if self.training and self.track_usage:
            self._count(out.indices)
        return TrainedQuantization(reconstruction, loss, out.indices)

    def usage(self, z: Tensor) -> list[float]:
        """Of each scale, the percentage of codes that training hits at least 8 % as often as chance would.

        `z` `(B, C, H, W)` is a batch of the size that each process trains on.
        """
        processes = torch.distributed.get_world_size() if _distributed() else 1
        enough = processes * (z.numel() / z.shape[1]) / self.ema_vocab_hit_SV.shape[1] * 0.08
        hits = self.ema_vocab_hit_SV[: len(self.pyramid.scales)]
        return [share * 100 for share in (hits >= enough).float().mean(dim=1).tolist()]

    def extra_repr(self) -> str:
        return (
            f"scales={self.pyramid.scales}, metric={self.metric}, commitment={self.commitment}, "
            f"phi_ratio={self.phi_ratio}"
        )

    @_uncompiled  # the counter would compile anew each time
    @torch.no_grad()
    def _count(self, indices: Tensor) -> None:
        """Update the usage statistics: a plain copy at the very first scale, then a moving average.

        The counter that lets the average slow down ticks once a scale.
        """
        S, K = len(self.pyramid.scales), self.ema_vocab_hit_SV.shape[1]
        # In integers: a count in 16 bits would stop growing at a few hundred, one in floats depend on order.
        first = (torch.arange(S) * K).repeat_interleave(torch.tensor(self.pyramid.lengths))
        place = (indices + to_device(first, indices.device)).flatten()
        hits = place.new_zeros(S * K).scatter_add_(0, place, torch.ones_like(place)).float().view(S, K)
        if _distributed():
            torch.distributed.all_reduce(hits)
        ticks = range(self.record_hit, self.record_hit + S)
        shares = [(0.0, 1.0) if t == 0 else (0.9, 0.1) if t < 100 else (0.99, 0.01) for t in ticks]
        keep, take = to_device(torch.tensor(shares), hits.device).T[..., None]
        average = self.ema_vocab_hit_SV[:S]
        average.copy_(average.float() * keep + hits * take)
        self.record_hit += S

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "ema_vocab_hit_SV"
        if key in state_dict and self.track_usage and state_dict[key].shape != self.ema_vocab_hit_SV.shape:
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


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
