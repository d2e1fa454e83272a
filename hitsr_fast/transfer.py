"""Tensors on their way to a device, without making the caller wait for what runs there."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on a device: `tensor.to(device)`, which to a GPU would wait until it is idle.

    From pinned memory it need not: PyTorch keeps that until the copy is done.

    Example:
        >>> to_device(torch.tensor([1.0]), "cpu")
        tensor([1.])
    """
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
