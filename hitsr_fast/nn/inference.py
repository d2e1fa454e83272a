"""Convolutional networks laid out for inference: channels-last, one dtype, neighbouring steps in one."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.nn.autoencoder import Upsample

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class FoldedUpsample(nn.Module):
    """Nearest x2 and a 3x3 convolution as one 2x2 convolution of the small map: 2.25 times fewer products.

    An output pixel of even row sees the 3x3 window's rows on two input rows only, the upper one once and the
    lower one twice; odd rows and columns likewise. So the four pixels that an input pixel becomes are 2x2
    convolutions with sums of the 3x3 weights, padding included. Exact but for the rounding of those sums.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, upsample: Upsample) -> None:
        super().__init__()
        weight = upsample.conv.weight.detach()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        # Rows of the window by the input row that they fall on: even output rows 0 | 1 + 2, odd 0 + 1 | 2.
        groups = torch.tensor(
            [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=wide.dtype, device=wide.device
        )
        folded = torch.einsum("oikl,pyk,qxl->pqoiyx", wide, groups, groups).flatten(0, 2)
        bias = upsample.conv.bias
        assert bias is not None
        self.register_buffer("weight", folded.to(weight.dtype), persistent=False)
        self.register_buffer("bias", bias.detach().repeat(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, C, 2 H, 2 W)`, channels-last."""
        b, _, h, w = x.shape
        maps = F.conv2d(x, self.weight, self.bias, padding=1)  # (B, 4 C, H + 1, W + 1)
        channels = maps.shape[1] // 4
        out = maps.new_empty(b, 2 * h, 2 * w, channels).permute(0, 3, 1, 2)
        for p in range(2):
            for q in range(2):
                part = maps[:, (2 * p + q) * channels :][:, :channels, p : p + h, q : q + w]
                out[:, :, p::2, q::2] = part
        return out


@torch.no_grad()
def for_inference(module: ModuleT, dtype: torch.dtype) -> ModuleT:
    """A copy of a network of `nn.autoencoder`, faster and without gradients; for channels-last inputs."""
    prepared = copy.deepcopy(module).requires_grad_(False).eval()
    for parent in list(prepared.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Upsample):
                setattr(parent, name, FoldedUpsample(child))
    prepared.to(dtype)
    for tensors in (prepared.parameters(), prepared.buffers()):
        for tensor in tensors:
            if tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return prepared
