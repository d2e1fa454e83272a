"""Networks laid out for inference give what the trained ones give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hitsr_fast.nn.autoencoder import Decoder, Encoder, Upsample
from hitsr_fast.nn.inference import FoldedUpsample, for_inference
from tests.tolerances import TOLERANCES


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4), (8, 8)])
@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_upsampling_inside_its_convolution(size: tuple[int, int], channels_last: bool) -> None:
    plain = Upsample(6).double()
    folded = FoldedUpsample(plain)
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    expected = plain.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    torch.testing.assert_close(folded(x), expected, **TOLERANCES["float64_reordered"]._asdict())


@torch.no_grad()
def test_folded_weights_are_sums_in_float32() -> None:
    plain = Upsample(4).bfloat16()
    exact = FoldedUpsample(plain.to(torch.float64)).weight
    folded = FoldedUpsample(plain.to(torch.bfloat16)).weight
    assert torch.equal(folded, exact.float().bfloat16())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2)])
@torch.no_grad()
def test_the_prepared_networks_give_the_same(dtype: torch.dtype, multipliers: tuple[int, ...]) -> None:
    encoder = Encoder(32, multipliers, 1, 5, 2, False).double()
    decoder = Decoder(32, multipliers, 1, 5, 2, False, lr_input=True).double()
    image = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    latent = encoder(image)
    decoded = decoder(latent, image)
    close = TOLERANCES["float64_reordered" if dtype == torch.float64 else "bfloat16"]
    for network, given, expected in ((encoder, (image,), latent), (decoder, (latent, image), decoded)):
        prepared = for_inference(network, dtype)
        arguments = [x.to(dtype, memory_format=torch.channels_last) for x in given]
        found = prepared(*arguments)
        assert found.dtype == dtype
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error <= close.rtol
        assert not any(parameter.requires_grad for parameter in prepared.parameters())
    assert all(parameter.requires_grad for parameter in decoder.parameters()), "the original is as it was"
