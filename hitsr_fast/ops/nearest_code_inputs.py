"""The inputs that the compiled backends of `nearest_code` take, and the one form in which they take them."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_CHANNELS = 256


def unsupported(x: Tensor, codebook: Tensor, device: str | None) -> str | None:
    """Why a backend for tensors on a type of device (None: on any) cannot take these, or None."""
    for name, tensor in (("x", x), ("codebook", codebook)):
        if device is not None and tensor.device.type != device:
            wanted = {"cpu": "CPU", "cuda": "CUDA or HIP"}[device]
            return f"needs {wanted} tensors, found {name} on {tensor.device.type}"
        if tensor.dtype not in DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            return f"needs float16, bfloat16 or float32, found {name} of {dtype}"
    if codebook.shape[-1] > MAX_CHANNELS:
        return f"needs C of at most {MAX_CHANNELS}, found {codebook.shape[-1]}"
    return None


def as_maps(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Rows `(N, C)`, `(G, N, C)` or a map `(B, C, H, W)` as a view `(G, B, H, W, C)`; shape of the result."""
    if x.dim() == 4:
        return x.movedim(1, -1)[None], (x.shape[0], *x.shape[2:])
    rows = x if x.dim() == 3 else x[None]
    return rows[:, None, None], tuple(x.shape[:-1])
