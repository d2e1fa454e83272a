"""Keys and shapes of the published checkpoints, written down from them, not from our modules."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def vqvae_shapes(
    *, channels: int = 160, codebook_size: int = 4096, scales: int = 10, phi: Literal[4, 1, 0] = 4
) -> Shapes:
    """`vae_ch160v4096z32`, for other base widths and for each `share_quant_resi` too."""
    dim = 32
    c = [channels * multiplier for multiplier in (1, 1, 2, 2, 4)]
    top = c[4]
    shapes: Shapes = {"quantize.ema_vocab_hit_SV": (scales, codebook_size)}

    def conv(key: str, inputs: int, outputs: int, side: int = 3) -> None:
        shapes[f"{key}.weight"] = (outputs, inputs, side, side)
        shapes[f"{key}.bias"] = (outputs,)

    def norm(key: str, width: int) -> None:
        shapes[f"{key}.weight"] = shapes[f"{key}.bias"] = (width,)

    def block(key: str, inputs: int, outputs: int) -> None:
        norm(f"{key}.norm1", inputs)
        conv(f"{key}.conv1", inputs, outputs)
        norm(f"{key}.norm2", outputs)
        conv(f"{key}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{key}.nin_shortcut", inputs, outputs, 1)

    def attention(key: str) -> None:
        norm(f"{key}.norm", top)
        conv(f"{key}.qkv", top, 3 * top, 1)
        conv(f"{key}.proj_out", top, top, 1)

    conv("encoder.conv_in", 3, c[0])
    for level, inputs in enumerate((c[0], c[0], c[1], c[2], c[3])):
        block(f"encoder.down.{level}.block.0", inputs, c[level])
        block(f"encoder.down.{level}.block.1", c[level], c[level])
    for level in (0, 1, 2, 3):
        conv(f"encoder.down.{level}.downsample.conv", c[level], c[level])
    for i in (0, 1):
        attention(f"encoder.down.4.attn.{i}")
    norm("encoder.norm_out", top)
    conv("encoder.conv_out", top, dim)

    conv("decoder.conv_in", dim, top)
    for level, inputs in ((4, c[4]), (3, c[4]), (2, c[3]), (1, c[2]), (0, c[1])):
        block(f"decoder.up.{level}.block.0", inputs, c[level])
        block(f"decoder.up.{level}.block.1", c[level], c[level])
        block(f"decoder.up.{level}.block.2", c[level], c[level])
    for level in (4, 3, 2, 1):
        conv(f"decoder.up.{level}.upsample.conv", c[level], c[level])
    for i in (0, 1, 2):
        attention(f"decoder.up.4.attn.{i}")
    norm("decoder.norm_out", c[0])
    conv("decoder.conv_out", c[0], 3)

    for half in ("encoder", "decoder"):
        block(f"{half}.mid.block_1", top, top)
        attention(f"{half}.mid.attn_1")
        block(f"{half}.mid.block_2", top, top)
    conv("quant_conv", dim, dim)
    conv("post_quant_conv", dim, dim)
    shapes["quantize.embedding.weight"] = (codebook_size, dim)
    prefix = "quantize.quant_resi"
    for key in {
        4: [f"{prefix}.qresi_ls.{i}" for i in range(4)],
        1: [f"{prefix}.qresi"],
        0: [f"{prefix}.{i}" for i in range(scales)],
    }[phi]:
        conv(key, dim, dim)
    return shapes


VAR_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
VARSR_SCALES = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def var_shapes(
    *,
    depth: int = 16,
    width: int = 1024,
    heads: int = 16,
    codebook_size: int = 4096,
    scales: tuple[int, ...] = VAR_SCALES,
) -> Shapes:
    """`var_d16`, for other depths, widths and scales too: 1000 classes, 32-wide codes."""
    rows = sum(side * side for side in scales)
    shapes: Shapes = {
        "pos_start": (1, 1, width),
        "pos_1LC": (1, rows, width),
        "lvl_1L": (1, rows),
        "attn_bias_for_masking": (1, 1, rows, rows),
        "word_embed.weight": (width, 32),
        "word_embed.bias": (width,),
        "class_emb.weight": (1001, width),
        "lvl_embed.weight": (len(scales), width),
        "head_nm.ada_lin.1.weight": (2 * width, width),
        "head_nm.ada_lin.1.bias": (2 * width,),
        "head.weight": (codebook_size, width),
        "head.bias": (codebook_size,),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.attn.scale_mul_1H11": (1, heads, 1, 1),
            f"blocks.{i}.attn.q_bias": (width,),
            f"blocks.{i}.attn.v_bias": (width,),
            f"blocks.{i}.attn.zero_k_bias": (width,),
            f"blocks.{i}.attn.mat_qkv.weight": (3 * width, width),
            f"blocks.{i}.attn.proj.weight": (width, width),
            f"blocks.{i}.attn.proj.bias": (width,),
            f"blocks.{i}.ffn.fc1.weight": (4 * width, width),
            f"blocks.{i}.ffn.fc1.bias": (4 * width,),
            f"blocks.{i}.ffn.fc2.weight": (width, 4 * width),
            f"blocks.{i}.ffn.fc2.bias": (width,),
            f"blocks.{i}.ada_lin.1.weight": (6 * width, width),
            f"blocks.{i}.ada_lin.1.bias": (6 * width,),
        }
    return shapes


def varsr_shapes(*, depth: int = 24, width: int = 1536, heads: int = 24, codebook_size: int = 4096) -> Shapes:
    """`VARSR.pth`, for other depths and widths too; of stem and refiner a part."""
    shapes = var_shapes(
        depth=depth, width=width, heads=heads, codebook_size=codebook_size, scales=VARSR_SCALES
    )
    del shapes["pos_1LC"]
    return shapes | {
        "class_emb.weight": (2, width),
        "pos_start": (1, 1025, width),
        "lvl_1L": (1, 3264),
        "attn_bias_for_masking": (1, 1, 3264, 3264),
        "con_embedding.conv_in.weight": (32, 3, 3, 3),
        "con_embedding.conv_in.bias": (32,),
        "decoder_norm.weight": (width,),
        "decoder_norm.bias": (width,),
        "diffloss.net.input_proj.weight": (1024, 32),
    }


VAR_BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")


def random_state(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def var_state(scales: tuple[int, ...] = VAR_SCALES, **sizes: int) -> dict[str, Tensor]:
    """A VAR of random weights, whose buffer `lvl_1L` is that of its scales."""
    lengths = torch.tensor([side * side for side in scales])
    level = torch.arange(len(scales)).repeat_interleave(lengths)[None]
    return random_state(var_shapes(scales=scales, **sizes)) | {"lvl_1L": level}


def meta_state(shapes: Shapes) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
