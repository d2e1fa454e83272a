"""How often Triton compiles in a sampling pass: once a kernel where it can be, whatever the scales' sizes."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.shapes import MODELS, ModelShape
from hitsr_fast.ops import attention_prologue_triton as prologue
from hitsr_fast.ops import modulated_layer_norm_triton as layer_norm
from hitsr_fast.ops import residual_quantize_triton as residual
from hitsr_fast.ops import sample_codes_triton as sampling
from hitsr_fast.ops import scale_block_attention_triton as attention
from tests.kernels.aot import KINDS, TARGETS, count_compilations

BF16 = torch.bfloat16
ATTENTION = "_cached_attention_kernel"


def sampling_pass(model: ModelShape, B: int, guided: bool, guided_scales: int = 10) -> None:
    """The launches of a pass of a model over all its scales, of one block and of what is outside blocks.

    As `sample_scales` does: a second branch of B sequences for the guided scales, which are the first ones.
    """
    branches = 2 * B if guided else B
    NH, D, width = model.heads, model.D, model.width
    caches = torch.empty(2, branches, sum(model.blocks), NH, D, dtype=BF16)
    latent = torch.empty(B, model.C, model.scales[-1], model.scales[-1])
    codebook, phi = torch.empty(model.K, model.C), torch.empty(4, model.C, model.C, 3, 3)
    states = torch.empty(len(model.scales), 2, dtype=torch.int64)
    modulation = torch.empty(6, branches, width)
    for number, (side, length) in enumerate(zip(model.scales, model.lengths, strict=True)):
        if number == guided_scales:
            branches, caches, modulation = B, caches[:, :B], modulation[:, :B]
        (start, L), row = model.step(number), modulation[0]
        x, y = torch.empty(branches, L, width), torch.empty(branches, L, width, dtype=BF16)
        layer_norm.modulated_layer_norm_triton(x, row, row, 1e-6, BF16)
        qkv = torch.empty(branches, L, 3 * width, dtype=BF16)
        bias, scale = torch.empty(3 * width, dtype=BF16), torch.empty(NH)
        q = prologue.attention_prologue_triton(qkv, *caches, start, bias, scale, None)
        attention.cached_attention_triton(q, *caches, start + L, 0.125)
        layer_norm.gated_residual_norm_triton(x, y, row, row, row, 1e-6, BF16)
        rows, branch = x[:, -length:], y[:, -length:]
        layer_norm.gated_residual_norm_triton(rows, branch, row, row, row, 1e-6, x.dtype)
        logits = torch.empty(branches, length, model.K)
        free, guidance = (logits[B:], 1.5) if branches > B else (None, 0.0)
        sampling.sample_codes_triton(logits[:B], free, states[number], guidance, 900, 0.96, 1.0, None)
        following = model.scales[number + 1 : number + 2] * 2 or (0, 0)
        indices = torch.empty(B, length, dtype=torch.int64)
        residual.residual_step_triton(
            latent, indices, codebook, phi[0], codebook[0], (side, side), following, 0.5
        )


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize(("B", "guided"), [(1, False), (1, True), (8, True)])
def test_a_pass_of_hit_var(target: str, B: int, guided: bool) -> None:
    """Attention by the size of its tiles and whether keys are shared out; others by a dtype or a block."""
    found = count_compilations(TARGETS[target], partial(sampling_pass, MODELS["hit-d16"], B, guided))
    assert 0 < found[ATTENTION] <= 4, found
    others = {name: count for name, count in found.items() if name != ATTENTION}
    assert others.pop("_residual_quantize_pool_kernel") <= 3, found  # by how many lanes share a bin
    assert max(others.values()) <= 2, found


def test_branches_that_end_within_a_pass_compile_nothing_again() -> None:
    passes = (partial(sampling_pass, MODELS["hit-d16"], 8, True, last) for last in (4, 10))
    found, whole = (count_compilations(TARGETS["sm_90"], launch) for launch in passes)
    assert found[ATTENTION] == whole[ATTENTION]


def test_what_triton_tells_apart_is_counted() -> None:
    """Lengths that 16 divides, others, and one of 1, where a kernel does not ask to leave them be."""

    def launch() -> None:
        for T in (16, 32, 33, 1):
            q = torch.empty(1, T, 2, 64)
            attention.scale_block_attention_triton(q, q, q, [T], 0.125)

    assert count_compilations(TARGETS["sm_90"], launch) == {"_scale_block_attention_fwd_kernel": 3}
