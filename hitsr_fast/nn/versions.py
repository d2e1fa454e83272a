"""Whether a tensor has been written since, as far as PyTorch counts it, and a little further."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class Version(NamedTuple):
    """Equal for a tensor at two times if nothing was written in between, but to its `.data`.

    Attributes:
        writes: PyTorch's count; 0 for inference tensors, whose writes nobody counts.
        fused_steps: Steps of all fused optimizers so far, which PyTorch does not count as writes.
    """

    writes: int
    fused_steps: int


def version_of(tensor: Tensor) -> Version:
    """That of a tensor now."""
    return Version(0 if tensor.is_inference() else tensor._version, _fused_steps.count)


class _FusedSteps:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.count += any(group.get("fused") for group in optimizer.param_groups)


_fused_steps = _FusedSteps()
register_optimizer_step_post_hook(_fused_steps)
