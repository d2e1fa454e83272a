"""The model laid out for inference against the trained one and against the plain path."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from hitsr_fast.models import HitSampler, HitUpscaler
from hitsr_fast.nn.autoencoder import resize
from hitsr_fast.reference import hit_sampler as reference
from tests.models.micro import MICRO, micro_model
from tests.tolerances import TOLERANCES

CLOSE = TOLERANCES["float32_reordered"]._asdict()
SEEING = replace(MICRO, tokenizer=replace(MICRO.tokenizer, decoder_lr=True))


def lr_tiles(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize("config", [MICRO, SEEING], ids=["tokens only", "decoders see the input"])
@torch.no_grad()
def test_the_plain_path_gives_the_same_images(config: Any) -> None:
    model, lr = micro_model(config, torch.float64), lr_tiles().double()
    images, expected = HitUpscaler(model).super_resolve(lr), reference.super_resolve(model, lr)
    assert images.keys() == expected.keys() == {1, 2, 4}
    for factor, image in images.items():
        assert image.dtype == torch.float32
        torch.testing.assert_close(image, expected[factor], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    upscaler, lr = HitUpscaler(micro_model(SEEING), dtype=dtype), lr_tiles()
    expected = upscaler.super_resolve(lr)
    with torch.autocast("cpu", torch.bfloat16):
        found = upscaler.super_resolve(lr)
    assert all(torch.equal(found[factor], image) for factor, image in expected.items())


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("tokenizer", "encoder.conv_in.bias"),
        ("transformer", "blocks.0.ffn.fc2.bias"),
        ("tokenizer", "decoders.2.conv_in.bias"),
    ],
)
def test_nan_anywhere_is_nan_in_the_image(part: str, name: str) -> None:
    """So that it is seen, and done again in float32 where half precision is the cause."""
    model = micro_model()
    with torch.no_grad():
        getattr(model, part).get_parameter(name)[0] = torch.nan
    assert HitUpscaler(model).super_resolve(lr_tiles())[4].isnan().any()


def test_an_overflow_of_half_precision_is_seen() -> None:
    """Values of a block's keys that float16 cannot hold; float32 gives the image of the model before."""
    model, lr = micro_model(), lr_tiles()
    expected = HitUpscaler(model).super_resolve(lr)[4]
    attention = model.transformer.blocks[1].attn
    width = attention.proj.in_features
    with torch.no_grad():
        attention.mat_qkv.weight[2 * width :] *= 2**15
        attention.v_bias *= 2**15
        attention.proj.weight /= 2**15
    torch.testing.assert_close(HitUpscaler(model).super_resolve(lr)[4], expected, **CLOSE)
    assert HitUpscaler(model, dtype=torch.float16).super_resolve(lr)[4].isnan().all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lr": [1.0]}, TypeError, "lr: expected a float16 or .* tensor, found list"),
        ({"lr": lr_tiles().long()}, TypeError, "lr: expected dtype float16 or .*, found int64"),
        ({"lr": lr_tiles()[:0]}, ValueError, "lr: expected B of at least 1"),
        ({"lr": lr_tiles()[..., 1:]}, ValueError, r"lr: expected shape \(B, C=3, h=8, w=8\)"),
        ({"input": "scan"}, ValueError, "input: expected one of photo, clean, unknown, found 'scan'"),
        ({"input": 0.5}, ValueError, "input: expected one of photo, clean, unknown, found 0.5"),
        ({"factors": [3]}, ValueError, r"factors: expected some of \(1, 2, 4\), found \(3,\)"),
    ],
)
def test_wrong_arguments_are_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HitUpscaler(micro_model()).super_resolve(**({"lr": lr_tiles()} | changes))


def test_it_is_laid_out_by_the_model_alone() -> None:
    model, lr = micro_model(), lr_tiles()
    upscaler = model.for_inference(torch.bfloat16)
    assert upscaler.sampler.body_dtype == torch.bfloat16
    assert not isinstance(upscaler, torch.nn.Module) and not hasattr(upscaler, "load_state_dict")
    assert model.for_inference().sampler.body_dtype == torch.float32
    expected = HitUpscaler(model, dtype=torch.bfloat16).super_resolve(lr)
    assert all(torch.equal(image, expected[factor]) for factor, image in upscaler.super_resolve(lr).items())


def test_it_can_be_pickled() -> None:
    upscaler = HitUpscaler(micro_model(), dtype=torch.bfloat16)
    other = pickle.loads(pickle.dumps(upscaler))
    assert torch.equal(other.super_resolve(lr_tiles())[4], upscaler.super_resolve(lr_tiles())[4])


@torch.no_grad()
def test_decoders_see_the_tile_at_the_size_of_their_output() -> None:
    model, lr = micro_model(SEEING), lr_tiles()
    upscaler = HitUpscaler(model)
    out = upscaler.super_resolve(lr)
    _, latents = upscaler.sampler.sample(upscaler.lr_features(lr), torch.ones(2, dtype=torch.int64))
    for target, (factor, latent) in enumerate(zip((1, 2, 4), latents, strict=True)):
        seen = resize(lr, (8 * factor, 8 * factor), "bilinear")
        expected = model.tokenizer.decode(latent, target, seen).clamp(-1, 1)
        torch.testing.assert_close(out[factor], expected, **CLOSE)
        assert (out[factor] - model.tokenizer.decode(latent, target).clamp(-1, 1)).abs().max() > 1e-2


@pytest.mark.parametrize(("factors", "steps"), [([1], 2), ([2], 4), ([4], 6), ([1, 2], 4)])
def test_steps_and_decoders_that_no_factor_needs_are_not_run(
    factors: list[int], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    upscaler = HitUpscaler(micro_model())
    embedded: list[int] = []
    decoded: list[int] = []

    def embed(step: int, *rest: Any, real: Any = upscaler.sampler._embed) -> torch.Tensor:
        embedded.append(step)
        return real(step, *rest)

    monkeypatch.setattr(upscaler.sampler, "_embed", embed)
    for target, decoder in enumerate(upscaler.decoders):
        decoder.register_forward_hook(lambda *_, target=target: decoded.append(target))
    upscaler.super_resolve(lr_tiles(1), factors=factors)
    assert embedded == list(range(steps))
    assert decoded == [(1, 2, 4).index(factor) for factor in factors]


@torch.no_grad()
def test_bfloat16_gives_nearly_the_images_of_float32() -> None:
    model, lr = micro_model(SEEING), lr_tiles()
    half = HitUpscaler(model, dtype=torch.bfloat16)
    assert half.sampler.body_dtype == torch.bfloat16
    tokens, latents = HitSampler(model).sample(model.lr_features(lr), torch.ones(2, dtype=torch.int64))
    assert tokens.shape[0] == 2
    for target, latent in enumerate(latents):
        exact = HitUpscaler(model).decode(latent, target, lr)
        mse = (half.decode(latent, target, lr) - exact).square().mean() / 4  # of values in [-1, 1]
        assert -10 * mse.log10() > 35


@torch.no_grad()
def test_a_copy_in_float32_is_what_a_tile_of_nan_is_done_again_with() -> None:
    model, lr = micro_model(SEEING), lr_tiles(1)
    half = HitUpscaler(model, dtype=torch.bfloat16)
    again = half.to(torch.float32)
    assert (half.sampler.body_dtype, again.sampler.body_dtype) == (torch.bfloat16, torch.float32)
    latent = half.lr_features(lr)
    exact = HitUpscaler(model).decode(latent, 2, lr)
    mse = (again.decode(latent, 2, lr) - exact).square().mean() / 4  # the weights have been rounded
    assert -10 * mse.log10() > 35
    assert all(image.isfinite().all() for image in again.super_resolve(lr).values())


def test_upscaling_does_not_need_the_model() -> None:
    model, lr = micro_model(), lr_tiles(1)
    upscaler = HitUpscaler(model)
    expected = upscaler.super_resolve(lr)
    del model
    for factor, image in upscaler.super_resolve(lr).items():
        assert torch.equal(image, expected[factor])
