"""Whether a tensor has been written since, as far as PyTorch counts it, and a little further."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class Snapshot:
    """A tensor as it is now, to tell later whether it was written in between, but to its `.data`.

    PyTorch counts the writes; not those of fused optimizers, whose steps are counted here.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._alias = tensor.detach()  # keeps the memory, which so can't be given to another tensor
        self._state = _state(tensor)

    def is_of(self, tensor: Tensor) -> bool:
        """Whether a tensor is the same, unwritten; never of inference tensors, whose writes nobody counts."""
        return not tensor.is_inference() and _state(tensor) == self._state


def _state(tensor: Tensor) -> tuple[Hashable, ...]:
    writes = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.device, writes, _fused_steps.count


class _FusedSteps:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.count += any(group.get("fused") for group in optimizer.param_groups)


_fused_steps = _FusedSteps()
register_optimizer_step_post_hook(_fused_steps)
