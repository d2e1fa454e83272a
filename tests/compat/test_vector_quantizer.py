"""`VectorQuantizer2` against VAR's quantizer in eager PyTorch, in float64: equal up to the order of sums."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.var_quantizer import EagerQuantizer
from benchmarks.shapes import MODELS
from hitsr_fast.compat import VectorQuantizer2, varsr
from hitsr_fast.ops import ResidualQuantized
from tests.nn.eager import eager_of, randomize
from tests.ops.residual_quantizer import assert_as_good
from tests.tolerances import TOLERANCES

SAME = TOLERANCES["float64_reordered"]._asdict()
VAR_16, VAR_32 = MODELS["var-256"].scales, MODELS["var-512"].scales
PAIRS = ((1, 1), (2, 3), (5, 4), (6, 7))
SCALES = {"1..16": VAR_16, "1..32": VAR_32, "pairs": PAIRS}
GRID = [
    *itertools.product(SCALES, (0, 1, 4), (False, True), (0.5,)),
    *itertools.product(["pairs"], (0, 1, 4), (False, True), (-0.3, 0.0)),
]


def make(
    scales: Sequence[Any] = PAIRS,
    share: int = 4,
    znorm: bool = False,
    ratio: float = 0.5,
    cls: type[VectorQuantizer2] = VectorQuantizer2,
    **options: Any,
) -> VectorQuantizer2:
    quantizer = cls(
        50, 4, znorm, v_patch_nums=scales, quant_resi=ratio, share_quant_resi=share, **options
    ).double()
    randomize(quantizer)
    return quantizer.requires_grad_(False)


def latent(quantizer: VectorQuantizer2, batch: int = 2) -> Tensor:
    side = quantizer.v_patch_nums[-1]
    H, W = (side, side) if isinstance(side, int) else side
    return torch.randn(batch, 4, H, W, dtype=torch.float64)


def check_lists(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        if a.dtype == torch.int64:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, **SAME)


@pytest.mark.parametrize(("scales", "share", "znorm", "ratio"), GRID)
def test_every_method_gives_what_var_gives(scales: str, share: int, znorm: bool, ratio: float) -> None:
    quantizer = make(SCALES[scales], share, znorm, ratio)
    eager, z = eager_of(quantizer), latent(quantizer)
    encoded = eager.encode(z, every_map=True)

    indices = quantizer.f_to_idxBl_or_fhat(z, to_fhat=False)
    assert all(found.is_contiguous() for found in indices)
    check_lists(indices, encoded.indices)
    check_lists(quantizer.f_to_idxBl_or_fhat(z, to_fhat=True), encoded.maps)

    teacher = quantizer.idxBl_to_var_input(indices)
    assert teacher is not None
    torch.testing.assert_close(teacher, eager.teacher_inputs(encoded.indices), **SAME)
    without_last = quantizer.idxBl_to_var_input(indices[:-1])
    assert without_last is not None and torch.equal(without_last, teacher)

    maps = [eager.lookup(found, size) for found, size in zip(indices, eager.scales, strict=True)]
    check_lists(quantizer.embed_to_fhat(maps), encoded.maps)
    last = quantizer.embed_to_fhat(maps, last_one=True)
    assert isinstance(last, Tensor)
    torch.testing.assert_close(last, encoded.maps[-1], **SAME)

    walk(quantizer, eager, maps)


def walk(quantizer: VectorQuantizer2, eager: EagerQuantizer, maps: Sequence[Tensor]) -> None:
    """The sampler's steps over all scales, by both."""
    f_hat = torch.zeros(maps[-1].shape, dtype=maps[-1].dtype)
    expected = f_hat.clone()
    for scale, h in enumerate(maps):
        out, following = quantizer.get_next_autoregressive_input(scale, len(maps), f_hat, h)
        assert out is f_hat
        wanted = eager.step(scale, expected, h)
        torch.testing.assert_close(f_hat, expected, **SAME)
        torch.testing.assert_close(following, wanted, **SAME)
    assert following is f_hat


@pytest.mark.parametrize("share", [0, 1, 4])
@pytest.mark.parametrize("znorm", [False, True])
def test_the_training_pass(share: int, znorm: bool) -> None:
    quantizer = make(VAR_16, share, znorm, beta=0.4).requires_grad_()
    eager = eager_of(quantizer)
    z = latent(quantizer).requires_grad_()
    again = z.detach().clone().requires_grad_()
    for _ in range(2):
        f_hat, usages, loss = quantizer(z, ret_usages=True)
        expected = eager(again)
    torch.testing.assert_close(f_hat, expected.reconstruction, **SAME)
    torch.testing.assert_close(loss, expected.loss, **SAME)
    assert usages == eager.usage(z)
    assert quantizer(z)[1] is None
    for output, wanted in ((loss, expected.loss), (f_hat, expected.reconstruction)):
        (found,) = torch.autograd.grad(output.sum(), z, retain_graph=True)
        torch.testing.assert_close(
            found, torch.autograd.grad(wanted.sum(), again, retain_graph=True)[0], **SAME
        )


def test_half_input_trains_in_float32() -> None:
    quantizer = make(PAIRS).float()
    z = latent(quantizer).half().requires_grad_()
    f_hat, _, loss = quantizer(z)
    assert f_hat.dtype == loss.dtype == torch.float32
    loss.backward()
    assert z.grad is not None and z.grad.dtype == torch.float16


@pytest.mark.parametrize("share", [0, 1, 4])
def test_mixtures_of_codes(share: int) -> None:
    """What VAR's smooth sampling puts in: convex combinations of codes, which are no codes themselves."""
    quantizer = make(VAR_16, share)
    eager = eager_of(quantizer)
    maps = []
    for h, w in eager.scales:
        mixture = torch.randn(2, h * w, 50, dtype=torch.float64).softmax(-1) @ quantizer.embedding.weight
        maps.append(mixture.transpose(1, 2).unflatten(2, (h, w)))
    check_lists(quantizer.embed_to_fhat(maps), eager.decode(maps, every_map=True))
    walk(quantizer, eager, maps)


def test_keeping_the_native_resolution() -> None:
    quantizer = make(VAR_16)
    eager = eager_of(quantizer)
    maps = [torch.randn(2, 4, side, side) for side in VAR_16]
    f_hat, expected = torch.zeros(2, 4, 1, 1), []
    quantizer.float(), eager.float()
    for scale, h in enumerate(maps):
        f_hat = F.interpolate(f_hat, size=h.shape[2:], mode="bicubic") + eager.phi(h, scale, len(maps))
        expected.append(f_hat)
    tolerance = TOLERANCES["float32_reordered"]._asdict()
    for found, wanted in zip(quantizer.embed_to_fhat(maps, all_to_max_scale=False), expected, strict=True):
        torch.testing.assert_close(found, wanted, **tolerance)
    last = quantizer.embed_to_fhat(maps, all_to_max_scale=False, last_one=True)
    torch.testing.assert_close(last, expected[-1], **tolerance)


def test_other_scales() -> None:
    quantizer, scales = make(VAR_16), [2, (3, 5), (7, 9)]
    z = torch.randn(1, 4, 7, 9, dtype=torch.float64)
    expected = eager_of(quantizer).encode(z, scales=scales, every_map=True)
    check_lists(quantizer.f_to_idxBl_or_fhat(z, False, v_patch_nums=scales), expected.indices)
    check_lists(quantizer.f_to_idxBl_or_fhat(z, True, scales), expected.maps)
    lists: Any = [2, [3, 5], [7, 9]]  # as they come out of a configuration file
    check_lists(quantizer.f_to_idxBl_or_fhat(z, False, lists), expected.indices)
    with pytest.raises(ValueError, match=r"the size of the last scale, \(16, 16\), found \(7, 9\)"):
        quantizer.f_to_idxBl_or_fhat(z, False)
    with pytest.raises(ValueError, match="the size of the last scale"):
        quantizer(z)


def test_progressive_training_stops_early() -> None:
    quantizer = make(PAIRS)
    eager, z = eager_of(quantizer), latent(quantizer)
    encoded = eager.encode(z, every_map=True)
    teacher = eager.teacher_inputs(encoded.indices)
    rows = [0, 6, 26, 68]  # of the inputs up to each scale
    for last in range(4):
        quantizer.prog_si = last
        check_lists(quantizer.f_to_idxBl_or_fhat(z, False), encoded.indices[: last + 1])
        check_lists(quantizer.f_to_idxBl_or_fhat(z, True), encoded.maps[: last + 1])
        found = quantizer.idxBl_to_var_input(encoded.indices)
        if last == 0:
            assert found is None
        else:
            torch.testing.assert_close(found, teacher[:, : rows[last]], **SAME)


def test_switti_adds_noise() -> None:
    quantizer = make(VAR_16)
    z = latent(quantizer)
    torch.manual_seed(5)
    expected = eager_of(quantizer).encode(z, noise=0.3, every_map=True)
    for to_fhat, wanted in ((False, expected.indices), (True, expected.maps)):
        torch.manual_seed(5)
        check_lists(quantizer.f_to_idxBl_or_fhat(z, to_fhat, noise_std=0.3), wanted)
    teacher = quantizer.idxBl_to_var_input(expected.indices)
    found = quantizer.idxBl_to_switti_input(expected.indices)
    assert teacher is not None and found is not None and torch.equal(found, teacher)


@pytest.mark.parametrize("share", [0, 1, 4])
@pytest.mark.parametrize("ratio", [0.5, 0.3, 0.0])
def test_varsr_leaves_phi_out_of_the_last_scale(share: int, ratio: float) -> None:
    quantizer = make(VAR_16, share, ratio=ratio, cls=varsr.VectorQuantizer2)
    eager, z = eager_of(quantizer, last_phi=False), latent(quantizer)
    encoded = eager.encode(z, every_map=True)
    left = (z - encoded.maps[-2]).permute(0, 2, 3, 1).reshape(2, 256, 4)
    for to_fhat, expected in ((False, encoded.indices), (True, encoded.maps)):
        found, indices = quantizer.f_to_idxBl_or_fhat(z, to_fhat)
        check_lists(found, [*expected, left])
        check_lists(indices, encoded.indices)
    teacher = quantizer.idxBl_to_var_input(encoded.indices)
    torch.testing.assert_close(teacher, eager.teacher_inputs(encoded.indices), **SAME)
    maps = [eager.lookup(i, size) for i, size in zip(encoded.indices, eager.scales, strict=True)]
    walk(quantizer, eager, maps)
    every_phi = eager_of(quantizer)
    rows = [
        F.interpolate(m, size=size, mode="area").flatten(2).transpose(1, 2)
        for m, size in zip(every_phi.decode(maps, every_map=True), eager.scales, strict=True)
    ]
    torch.testing.assert_close(quantizer.idxBl_to_input(encoded.indices), torch.cat(rows, 1), **SAME)
    quantizer.prog_si = 3
    torch.testing.assert_close(quantizer.idxBl_to_input(encoded.indices), torch.cat(rows[:3], 1), **SAME)
    with pytest.raises(ValueError, match="prog_si: expected -1"):
        quantizer.f_to_idxBl_or_fhat(z, False)


def test_varsr_with_other_scales() -> None:
    quantizer, scales = make(VAR_16, cls=varsr.VectorQuantizer2), [1, 3, 8]
    eager = eager_of(quantizer, last_phi=False)
    eager.scales = [(1, 1), (3, 3), (8, 8)]
    encoded = eager.encode(torch.randn(1, 4, 8, 8, dtype=torch.float64))
    teacher = quantizer.idxBl_to_var_input(encoded.indices, v_patch_nums=scales)
    torch.testing.assert_close(teacher, eager.teacher_inputs(encoded.indices), **SAME)


def test_gradients_are_not_lost() -> None:
    """Where parameters ask for one, methods that VAR calls without gradients give it as VAR's would."""
    quantizer = make(VAR_16, share=1).requires_grad_()
    eager, z = eager_of(quantizer), latent(quantizer)
    encoded = eager.encode(z, every_map=True)

    def gradient(loss: Tensor, codebook: Tensor) -> Tensor:
        return torch.autograd.grad(loss.square().sum(), codebook, retain_graph=True)[0]

    teacher = quantizer.idxBl_to_var_input(encoded.indices)
    assert teacher is not None
    pairs = [
        (teacher, eager.teacher_inputs(encoded.indices)),
        (quantizer.f_to_idxBl_or_fhat(z, True)[4], encoded.maps[4]),
    ]
    maps = [
        q(encoded.indices[3]).transpose(1, 2).unflatten(2, (4, 4))
        for q in (quantizer.embedding, lambda i: F.embedding(i, eager.codebook))
    ]
    f_hat, expected = torch.zeros_like(z), torch.zeros_like(z)
    _, following = quantizer.get_next_autoregressive_input(3, 10, f_hat, maps[0])
    pairs += [(following, eager.step(3, expected, maps[1])), (f_hat, expected)]
    for found, wanted in pairs:
        torch.testing.assert_close(
            gradient(found, quantizer.embedding.weight), gradient(wanted, eager.codebook), **SAME
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_models_step_in_their_own_dtype(dtype: torch.dtype) -> None:
    quantizer = make(PAIRS).to(dtype)
    f_hat, h = torch.randn(2, 4, 6, 7, dtype=dtype), torch.randn(2, 4, 2, 3, dtype=dtype)
    wide = make(PAIRS).float()
    wide.load_state_dict(quantizer.state_dict())
    expected = f_hat.float()
    _, following = wide.get_next_autoregressive_input(1, 4, expected, h.float())
    out, found = quantizer.get_next_autoregressive_input(1, 4, f_hat, h)
    assert out is f_hat and found.dtype == dtype
    torch.testing.assert_close(f_hat, expected.to(dtype))
    torch.testing.assert_close(found, following.to(dtype))
    z = torch.randn(2, 4, 6, 7, dtype=dtype)
    assert {m.dtype for m in quantizer.f_to_idxBl_or_fhat(z, True)} == {dtype}


def test_float32_models_of_the_published_size_are_as_good() -> None:
    """4096 codes of 32 channels: 99.9 % of VAR's tokens, and no larger an error."""
    quantizer = VectorQuantizer2(4096, 32, False, v_patch_nums=VAR_16)
    randomize(quantizer)
    z = torch.randn(4, 32, 16, 16)
    indices = quantizer.f_to_idxBl_or_fhat(z, False)
    f_hat = quantizer.f_to_idxBl_or_fhat(z, True)[-1]
    with torch.no_grad():
        expected = eager_of(quantizer).encode(z)
    found, wanted = (
        ResidualQuantized(torch.cat(codes, 1), m.detach(), None, None)
        for codes, m in ((indices, f_hat), (expected.indices, expected.maps[-1]))
    )
    assert_as_good(found, wanted, z)


def test_attributes() -> None:
    quantizer = VectorQuantizer2(50, 4, True, 0.3, 7, PAIRS, -0.25, 0)
    assert (quantizer.vocab_size, quantizer.Cvae, quantizer.using_znorm, quantizer.beta) == (50, 4, True, 0.3)
    assert quantizer.v_patch_nums == PAIRS
    assert quantizer.quant_resi_ratio == -0.25
    assert (quantizer.record_hit, quantizer.prog_si) == (0, -1)
    assert quantizer.ema_vocab_hit_SV.shape == (4, 50)
    assert quantizer.embedding.weight.shape == (50, 4)
    assert len(quantizer.quant_resi) == 7
    assert quantizer.extra_repr() == f"{PAIRS}, znorm=True, beta=0.3  |  S=4, quant_resi=-0.25"
    quantizer.using_znorm, quantizer.beta, quantizer.v_patch_nums = False, 1.0, (1, 2)
    assert (quantizer.metric, quantizer.commitment, quantizer.pyramid.scales) == ("l2", 1.0, (1, 2))
    with pytest.raises(ValueError, match="v_patch_nums: expected the scales, found None"):
        VectorQuantizer2(50, 4, True)


@pytest.mark.parametrize(("share", "places"), [(0, [0, 1, 3]), (1, [0, 0, 0]), (4, [0, 1, 3])])
def test_phis_are_found_by_position(share: int, places: list[int]) -> None:
    quantizer = make(share=share)
    h = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    _, weight, bias = quantizer.bank().tensors
    for position, place in zip((0.0, 1 / 3, 1.0), places, strict=True):
        expected = 0.5 * h + 0.5 * F.conv2d(h, weight[place], bias[place], padding=1)
        torch.testing.assert_close(quantizer.quant_resi[position](h), expected, **SAME)
    assert isinstance(make(share=share, ratio=0.0).quant_resi[0.5], torch.nn.Identity)


def test_eini() -> None:
    quantizer = VectorQuantizer2(4096, 8, False, v_patch_nums=PAIRS)
    quantizer.eini(0.02)
    assert quantizer.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    quantizer.eini(-0.5)
    bound = 0.5 / 4096
    assert 0.9 * bound < quantizer.embedding.weight.max().item() <= bound
    assert -bound <= quantizer.embedding.weight.min().item() < -0.9 * bound
    before = quantizer.embedding.weight.clone()
    quantizer.eini(0)
    assert torch.equal(quantizer.embedding.weight, before)
