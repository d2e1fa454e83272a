from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hitsr_fast.nn.autoencoder import Decoder, Downsample, Encoder, NormSiLU, SpatialAttention, resize
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


def test_norm_then_silu_with_gradients() -> None:
    norm = NormSiLU(64).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 64, 3, 4, dtype=torch.float64, requires_grad=True)
    expected = F.silu(F.group_norm(x, 32, norm.weight, norm.bias, 1e-6))
    found = norm(x)
    assert torch.equal(found, expected)
    inputs = (x, norm.weight, norm.bias)
    grads = torch.autograd.grad(found.sin().sum(), inputs)
    for actual, want in zip(grads, torch.autograd.grad(expected.sin().sum(), inputs), strict=True):
        assert torch.equal(actual, want)
    assert list(norm.state_dict()) == ["weight", "bias"], "the keys are VAR's"


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
