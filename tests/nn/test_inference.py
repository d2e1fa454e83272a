"""Networks laid out for inference give what the trained ones give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hitsr_fast.dispatch import operations
from hitsr_fast.nn.autoencoder import Decoder, Encoder, NormSiLU, SpatialAttention, Upsample
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_norms_without_gradients_skip_pytorchs_dispatch(
    dtype: torch.dtype, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a prepared network, which asks for none, and in one that trains, under no_grad."""
    asked = []
    op = operations()["group_norm_silu"]
    overload = op._overload
    monkeypatch.setattr(op, "_overload", lambda *args: (asked.append(1), overload(*args))[1])
    norm = NormSiLU(96)
    prepared = for_inference(norm, dtype)
    x = torch.randn(2, 96, 5, 7).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    with torch.no_grad():
        found = [prepared(x), norm.to(dtype)(x)]
    found.append(prepared(x))
    assert not asked
    for out in found:
        assert out.dtype == dtype and torch.equal(out, found[0])
        assert out.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert norm(x).requires_grad and asked


def test_what_is_swapped() -> None:
    decoder = Decoder(32, (1, 2), 1, 5, 2, False)
    prepared = for_inference(decoder, torch.bfloat16)
    kinds = {type(module) for module in prepared.modules()}
    assert Upsample not in kinds and {FoldedUpsample, NormSiLU, SpatialAttention} <= kinds
    assert all(parameter.dtype == torch.bfloat16 for parameter in prepared.parameters())


def test_a_prepared_network_compiles_whole() -> None:
    decoder = for_inference(Decoder(32, (1, 2), 1, 5, 2, False), torch.float32)
    latent = torch.randn(1, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    torch._dynamo.reset()
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(latent), decoder(latent), **TOLERANCES["float32_reordered"]._asdict())


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
