"""The multi-scale residual quantizer of VAR with HIT-VAR's hierarchical targets, on the `residual_*` ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.nn.prepared import CodebookCache
from hitsr_fast.ops import (
    ResidualDecoded,
    TokenizedPyramid,
    phi_table,
    residual_decode,
    residual_step,
    tokenize_pyramid,
)


class PyramidGeometry(Protocol):
    """What a quantizer must know of a tokenizer; `TokenizerConfig` explains and provides it."""

    @property
    def code_dim(self) -> int: ...
    @property
    def codebook_size(self) -> int: ...
    @property
    def scales(self) -> tuple[int, ...]: ...
    @property
    def target_sizes(self) -> tuple[int, ...]: ...
    @property
    def target_steps(self) -> tuple[int, ...]: ...
    @property
    def num_phi(self) -> int: ...
    @property
    def phi_ratio(self) -> float: ...
    @property
    def phi_indexing(self) -> Literal["global", "per_target"]: ...


class MultiScaleQuantizer(nn.Module):
    """Codebook and phi bank, and the walks over the steps that use them.

    Source: VAR, Algorithms 1 and 2; HIT-VAR, Algorithm 1 (hierarchical targets).
    """

    def __init__(self, config: PyramidGeometry) -> None:
        super().__init__()
        self.config = config
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.code_dim))
        self.phi_weight = nn.Parameter(torch.zeros(config.num_phi, config.code_dim, config.code_dim, 3, 3))
        self.phi_bias = nn.Parameter(torch.zeros(config.num_phi, config.code_dim))
        self._prepared = CodebookCache()
        nn.init.kaiming_uniform_(self.phi_weight.view(-1, *self.phi_weight.shape[2:]), a=5**0.5)

    def phi_index(self, target: int) -> list[int]:
        """Phi of each step of target number `target`."""
        steps = self.config.target_steps[target]
        if self.config.phi_indexing == "per_target":
            return phi_table(steps, self.config.num_phi)
        return phi_table(len(self.config.scales), self.config.num_phi)[:steps]

    def token_offset(self, steps: int) -> int:
        """Number of tokens of the first `steps` steps."""
        return sum(scale * scale for scale in self.config.scales[:steps])

    def tokenize(self, latents: Sequence[Tensor]) -> TokenizedPyramid:
        """Quantize the latents of all targets; each continues the tokens of the one before (Algorithm 1).

        Args:
            latents: One `(B, C, h, w)` map a target, from the coarsest on; fewer targets give fewer tokens.

        Returns:
            Tokens `(B, T)` and the reconstruction of each target, with gradients to codebook and phi.
        """
        if not latents:
            raise ValueError("latents: expected at least one map, found none")
        for target, latent in enumerate(latents):
            size = self.config.target_sizes[target]
            if latent.shape[-2:] != (size, size):
                raise ValueError(
                    f"latents[{target}]: expected a map of side {size}, found {tuple(latent.shape[-2:])}"
                )
        return tokenize_pyramid(
            latents,
            self.codebook,
            self.phi_weight,
            self.phi_bias,
            scales=self.config.scales,
            target_steps=self.config.target_steps,
            phi_index=[self.phi_index(target) for target in range(len(self.config.target_steps))],
            phi_ratio=self.config.phi_ratio,
            prepared=self._prepared(self.codebook),
        )

    def reconstruct(self, indices: Tensor, target: int) -> Tensor:
        """Latent `(B, C, h, w)` of tokens `(B, T)` at target number `target`; later tokens are left out."""
        return self._decode(indices, self.config.target_steps[target], target).reconstruction

    def _decode(self, indices: Tensor, steps: int, target: int, *, inputs: bool = False) -> ResidualDecoded:
        return residual_decode(
            indices[:, : self.token_offset(steps)],
            self.codebook,
            self.phi_weight,
            self.phi_bias,
            scales=self.config.scales[:steps],
            phi_index=self.phi_index(target)[:steps],
            size=self.config.target_sizes[target],
            phi_ratio=self.config.phi_ratio,
            inputs=inputs,
        )

    @torch.no_grad()
    def teacher_inputs(self, indices: Tensor, *, ar_grid: str = "target") -> Tensor:
        """Inputs of the transformer under teacher forcing: `(B, T - tokens of step 0, C)`, float32 or wider.

        Args:
            indices: `(B, T)` int64.
            ar_grid: `"target"` or `"full"`, see `TransformerConfig`.
        """
        targets = range(len(self.config.target_steps))
        first = known = self.token_offset(1)
        segments = []
        for target in targets if ar_grid == "target" else targets[-1:]:
            steps = self.config.target_steps[target]
            inputs = self._decode(indices, steps, target, inputs=True).inputs
            assert inputs is not None
            segments.append(inputs[:, known - first :])  # those of the steps that this target owns
            known = self.token_offset(steps)
        return torch.cat(segments, 1)


class ReconstructionWalk:
    """The reconstruction as it grows step by step: what the sampler and teacher forcing feed on.

    With `ar_grid="target"` a step accumulates on the grid of its own target; when a target is complete its
    reconstruction is kept in `finished` and the tokens so far are decoded again on the next target's grid, so
    the map that conditions a step is the one whose residual was quantized at that step.
    """

    def __init__(self, quantizer: MultiScaleQuantizer, batch: int, *, ar_grid: str = "target") -> None:
        self.quantizer = quantizer
        self.ar_grid = ar_grid
        self.step = 0
        self.finished: list[Tensor] = []
        self._indices: list[Tensor] = []
        self._last = len(quantizer.config.target_sizes) - 1
        self._target = 0 if ar_grid == "target" else self._last
        size = quantizer.config.target_sizes[self._target]
        codebook = quantizer.codebook
        dtype = torch.promote_types(codebook.dtype, torch.float32)
        self._map = torch.zeros(batch, codebook.shape[1], size, size, dtype=dtype, device=codebook.device)

    def advance(self, indices: Tensor) -> Tensor:
        """Add the tokens `(B, L)` of the current step; returns the next step's input map `(B, C, h, w)`.

        After the last step the returned map is empty, `(B, C, 0, 0)`.
        """
        with torch.no_grad():  # not as a decorator, which the compiler does not see through here
            return self._advanced(indices)

    def _advanced(self, indices: Tensor) -> Tensor:
        quantizer, config = self.quantizer, self.quantizer.config
        step, scale = self.step, config.scales[self.step]
        self._indices.append(indices)
        self.step += 1
        following = config.scales[self.step] if self.step < len(config.scales) else None
        completed = config.target_steps.index(self.step) if self.step in config.target_steps else None
        phi = quantizer.phi_index(self._target)[step]
        crossing = self.ar_grid == "target" and completed is not None and following is not None
        side = None if following is None or crossing else (following, following)
        pooled = residual_step(
            self._map,
            indices,
            quantizer.codebook,
            quantizer.phi_weight[phi],
            quantizer.phi_bias[phi],
            scale=(scale, scale),
            next_scale=side,
            phi_ratio=config.phi_ratio,
        )
        if completed is not None:
            self.finished.append(self._completed(completed))
        if crossing and following is not None:
            self._target += 1
            decoded = quantizer._decode(torch.cat(self._indices, 1), self.step, self._target)
            self._map = decoded.reconstruction
            pooled = F.adaptive_avg_pool2d(self._map, following)
        return pooled

    def _completed(self, target: int) -> Tensor:
        if target == self._target:
            return self._map
        return self.quantizer.reconstruct(torch.cat(self._indices, 1), target)
