from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.nn.autoencoder import Decoder, Downsample, Encoder, NormSiLU, SpatialAttention, resize
from hitsr_fast.nn.discriminator import PatchDiscriminator
from tests.tolerances import TOLERANCES

CLOSE = TOLERANCES["float32_reordered"]._asdict()


@pytest.mark.parametrize(
    ("multipliers", "stem_patch", "stride"), [((1, 1, 2, 2, 4), 1, 16), ((1, 2), 4, 8), ((1,), 2, 2)]
)
@pytest.mark.parametrize("linear_skip", [False, True])
@torch.no_grad()
def test_stride(multipliers: tuple[int, ...], stem_patch: int, stride: int, linear_skip: bool) -> None:
    encoder = Encoder(32, multipliers, 1, 5, stem_patch, linear_skip)
    decoder = Decoder(32, multipliers, 1, 5, stem_patch, linear_skip)
    latent = encoder(torch.rand(1, 3, 2 * stride, 3 * stride))
    assert latent.shape == (1, 5, 2, 3)
    assert decoder(latent).shape == (1, 3, 2 * stride, 3 * stride)


@torch.no_grad()
def test_linear_skips_alone_are_a_linear_autoencoder() -> None:
    encoder, decoder = Encoder(32, (1,), 1, 48, 4, True), Decoder(32, (1,), 1, 48, 4, True)
    assert encoder.skip is not None and decoder.skip is not None
    for last in (encoder.conv_out, decoder.conv_out, encoder.skip, decoder.skip):
        last.weight.zero_()
        last.bias.zero_()
    for identity in (decoder.post_quant_conv, encoder.skip, decoder.skip):
        torch.nn.init.dirac_(identity.weight)
    decoder.post_quant_conv.bias.zero_()
    image = torch.rand(1, 3, 8, 12)
    torch.testing.assert_close(decoder(encoder(image)), image, **CLOSE)


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 2, 2)])
@torch.no_grad()
def test_lr_input_of_the_decoder(multipliers: tuple[int, ...]) -> None:
    decoder = Decoder(32, multipliers, 1, 5, 2, False, lr_input=True)
    assert decoder.lr_in is not None and decoder.lr_out is not None
    latent = torch.randn(2, 5, 3, 4)
    lr = torch.randn(2, 3, 3 * decoder.stride, 4 * decoder.stride)
    plain = decoder(latent)
    torch.testing.assert_close(decoder(latent, lr), (plain + lr) / 2, **CLOSE)
    torch.nn.init.dirac_(decoder.lr_out.weight)
    torch.testing.assert_close(decoder(latent, lr), lr, **CLOSE)
    torch.nn.init.zeros_(decoder.lr_out.weight)
    torch.testing.assert_close(decoder(latent, lr), plain, **CLOSE)
    torch.nn.init.normal_(decoder.lr_in.weight)
    assert not torch.allclose(decoder(latent, lr), plain)


@torch.no_grad()
def test_downsample_pads_right_and_bottom_only() -> None:
    down = Downsample(1)
    down.conv.weight.zero_()
    down.conv.bias.zero_()
    down.conv.weight[0, 0, 0, 0] = 1.0  # the window's upper left corner
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(down(image), image[..., ::2, ::2])
    down.conv.weight.copy_(down.conv.weight.flip(2, 3))  # its lower right corner
    assert torch.equal(down(image)[0, 0], torch.tensor([[10.0, 0.0], [0.0, 0.0]]))


@torch.no_grad()
def test_spatial_attention_is_single_head_attention_over_positions() -> None:
    attention = SpatialAttention(32)
    x = torch.randn(2, 32, 3, 4)
    q, k, v = attention.qkv(F.group_norm(x, 32, eps=1e-6)).flatten(2).chunk(3, dim=1)
    weights = (q.transpose(1, 2) @ k / 32**0.5).softmax(-1)
    out = (v @ weights.transpose(1, 2)).view_as(x)
    torch.testing.assert_close(attention(x), x + attention.proj_out(out), **CLOSE)


def norm_and_inputs(channels_last: bool, mean: float = 0.0) -> tuple[NormSiLU, Tensor, Tensor]:
    """With the gradient of the result."""
    norm = NormSiLU(64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, grad = torch.randn(2, 2, 64, 12, 11)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return norm, (mean + x).contiguous(memory_format=layout).requires_grad_(), grad


def expected_of(norm: NormSiLU, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Result and gradients by PyTorch's formula in float64."""
    wide = [t.detach().double().contiguous().requires_grad_() for t in (x, norm.weight, norm.bias)]
    out = F.silu(F.group_norm(wide[0], 32, wide[1], wide[2], 1e-6))
    return [out.detach(), *torch.autograd.grad(out, wide, grad.double())]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("mean", "tolerance"), [(0.0, "float32_training"), (100.0, "mean_of_100")])
def test_norm_then_silu_with_gradients(channels_last: bool, mean: float, tolerance: str) -> None:
    """Over the largest value of each. About 100 PyTorch's own norm in float32 is far off in channels-last."""
    norm, x, grad = norm_and_inputs(channels_last, mean)
    out = norm(x)
    grads = torch.autograd.grad(out, (x, norm.weight, norm.bias), grad)
    for found, want in zip((out, *grads), expected_of(norm, x, grad), strict=True):
        size = want.abs().max()
        torch.testing.assert_close(found.double() / size, want / size, **TOLERANCES[tolerance]._asdict())
    assert out.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert list(norm.state_dict()) == ["weight", "bias"], "the keys are VAR's"


def test_norm_then_silu_under_autocast() -> None:
    """The map's dtype stays, and parameters in float32 have gradients in float32."""
    norm, x, grad = norm_and_inputs(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(x.bfloat16())
    grads = torch.autograd.grad(out, (x, norm.weight, norm.bias), grad.bfloat16())
    assert out.dtype == torch.bfloat16
    for found, want in zip((out, *grads), expected_of(norm, x, grad), strict=True):
        size = want.abs().max()
        torch.testing.assert_close(found.double() / size, want / size, **TOLERANCES["bfloat16"]._asdict())


@torch.no_grad()
def test_no_other_norm_loses_digits_in_channels_last() -> None:
    discriminator = PatchDiscriminator(32)
    (norm, *_) = (module for module in discriminator.modules() if isinstance(module, torch.nn.GroupNorm))
    x = 100 + torch.randn(1, 64, 6, 5)
    found = norm(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(
        found.double(), norm.double()(x.double()), **TOLERANCES["mean_of_100"]._asdict()
    )


@torch.no_grad()
def test_attention_keeps_its_digits_in_channels_last() -> None:
    attention = SpatialAttention(32)
    x = 100 + torch.randn(1, 32, 6, 5)
    found = attention(x.contiguous(memory_format=torch.channels_last)) - x
    expected = attention.double()(x.double()) - x
    torch.testing.assert_close(found.double(), expected, **TOLERANCES["mean_of_100"]._asdict())


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "area"])
def test_resize(mode: str) -> None:
    image = torch.rand(1, 3, 8, 8)
    assert resize(image, (8, 8), mode) is image
    flat = torch.full((1, 3, 8, 8), 0.25)
    torch.testing.assert_close(resize(flat, (2, 4), mode), torch.full((1, 3, 2, 4), 0.25), **CLOSE)
    # Antialiased: the finest pattern there is becomes grey.
    checks = (torch.arange(64) + torch.arange(64)[:, None]).remainder(2).float().expand(1, 3, -1, -1)
    inner = resize(checks, (16, 16), mode)[..., 2:-2, 2:-2]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.5), **CLOSE)
