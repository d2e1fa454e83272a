from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hitsr_fast.models import CheckpointError, HitVar, ModelNotFoundError
from hitsr_fast.models.hit_var.config import HitConfig
from hitsr_fast.nn.sampling import SamplingOptions
from hitsr_fast.reference import hit_sampler
from tests.models.micro import MICRO, micro_model
from tests.tolerances import TOLERANCES

OPTIONS = [
    MICRO,
    replace(MICRO, transformer=replace(MICRO.transformer, ar_grid="full", prefix_injection=True)),
]

BICUBIC = replace(MICRO, transformer=replace(MICRO.transformer, position_resample="bicubic"))


def lr_tiles(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1


def test_geometry() -> None:
    model = micro_model()
    assert model.config.lr_tile == 8
    assert model.config.scale_factors == (1, 2, 4)


@pytest.mark.parametrize("config", OPTIONS, ids=["target grid", "full grid"])
def test_super_resolve(config: HitConfig) -> None:
    out = micro_model(config).super_resolve(lr_tiles())
    assert {factor: tuple(image.shape) for factor, image in out.items()} == {
        factor: (2, 3, 8 * factor, 8 * factor) for factor in (1, 2, 4)
    }
    for image in out.values():
        assert image.dtype == torch.float32 and image.abs().max() <= 1 and image.std() > 0


@pytest.mark.parametrize("config", OPTIONS, ids=["target grid", "full grid"])
@pytest.mark.parametrize("factors", [(1,), (2,), (4,), (1, 2), (4, 1)])
def test_some_factors_give_the_images_of_all(config: HitConfig, factors: tuple[int, ...]) -> None:
    model = micro_model(config)
    every = model.super_resolve(lr_tiles(), SamplingOptions(guidance=1.0))
    some = model.super_resolve(lr_tiles(), SamplingOptions(guidance=1.0), factors=factors)
    assert tuple(some) == factors
    for factor, image in some.items():
        assert torch.equal(image, every[factor])


def test_class_matters() -> None:
    model = micro_model()
    degraded, clean = (model.super_resolve(lr_tiles(), input=input)[4] for input in ("photo", "clean"))
    assert not torch.equal(degraded, clean)


def of_scales(scales: tuple[int, ...], targets: tuple[float, ...]) -> HitConfig:
    tokenizer = replace(MICRO.tokenizer, scales=scales, targets=targets)
    return replace(MICRO, tokenizer=tokenizer, colour_fix_levels=(2,) * len(targets))


@pytest.mark.parametrize(
    ("scales", "targets", "factors"),
    [
        ((1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16), (0.25, 0.5, 1.0), (1, 2, 4)),  # eleven
        ((1, 2, 3, 4, 6, 8), (1.0,), (4,)),
        ((8,), (1.0,), (4,)),
        ((4, 6, 8), (0.5, 0.75, 1.0), (2, 3, 4)),
    ],
)
@torch.no_grad()
def test_any_scales_and_targets(
    scales: tuple[int, ...], targets: tuple[float, ...], factors: tuple[int, ...]
) -> None:
    """Images to tokens to logits, and LR tiles to images, by the sampler and by its definition."""
    config = of_scales(scales, targets)
    model, side = micro_model(config), config.tokenizer.image_size
    lr = torch.rand(2, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
    tokens = model.tokenizer.tokenize(torch.zeros(2, 3, side, side)).indices
    assert tokens.shape == (2, sum(scale * scale for scale in scales))
    logits = model(lr, torch.tensor([0, 1]), tokens)
    assert logits.shape == (*tokens.shape, 48) and logits.isfinite().all()
    found, expected = model.super_resolve(lr), hit_sampler.super_resolve(model, lr)
    assert tuple(found) == factors == model.config.scale_factors
    for factor, image in found.items():
        assert image.shape == (2, 3, factor * side // 4, factor * side // 4)
        torch.testing.assert_close(image, expected[factor], **TOLERANCES["float32_reordered"]._asdict())


@pytest.mark.parametrize("num_classes", [3, 5])
@torch.no_grad()
def test_an_unknown_input_has_the_class_free_row(num_classes: int) -> None:
    transformer = replace(MICRO.transformer, num_classes=num_classes)
    model = micro_model(replace(MICRO, transformer=transformer))
    features = model.lr_features(lr_tiles())
    row = torch.full((len(features),), num_classes - 1)
    _, latents = model.sample(features, row)
    for guided in (SamplingOptions(), SamplingOptions(guidance=2.0)):  # from itself nothing leads away
        found = model.super_resolve(lr_tiles(), guided, input="unknown")[4]
        expected = model.decode(latents, 2, lr_tiles()).clamp(-1, 1)
        torch.testing.assert_close(found, expected, **TOLERANCES["float32_reordered"]._asdict())


@pytest.mark.parametrize("config", [MICRO, BICUBIC], ids=["area", "bicubic"])
def test_bfloat16_weights_give_float32_images(config: HitConfig) -> None:
    model, guided = micro_model(config, torch.bfloat16), SamplingOptions(guidance=1.0)
    out = model.super_resolve(lr_tiles(), guided, factors=[1, 4])
    assert all(image.dtype == torch.float32 and image.isfinite().all() for image in out.values())


@pytest.mark.parametrize("shape", [(1, 3, 8, 9), (1, 3, 32, 32), (3, 8, 8), (1, 1, 8, 8)])
def test_wrong_tiles_are_errors(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"lr: expected shape \(B, C=3, h=8, w=8\), found"):
        micro_model().super_resolve(torch.zeros(shape))


@pytest.mark.parametrize("factors", [(3,), (), (1, 8)])
def test_wrong_factors_are_errors(factors: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"factors: expected some of \(1, 2, 4\), found"):
        micro_model().super_resolve(lr_tiles(), factors=factors)


@pytest.mark.parametrize("options", [{"top_k": -1}, {"top_k": 5, "top_p": -0.1}, {"top_p": 1.5}])
def test_wrong_sampling_options_are_errors(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"top_[kp]: expected"):
        micro_model().super_resolve(lr_tiles(), SamplingOptions(**options))  # type: ignore[arg-type]


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    model = micro_model()
    model.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    loaded = HitVar.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert not loaded.training
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    before, after = model.super_resolve(lr_tiles()), loaded.super_resolve(lr_tiles())
    assert all(torch.equal(before[factor], after[factor]) for factor in (1, 2, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    model = micro_model(dtype=dtype)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    loaded = HitVar.from_pretrained(tmp_path).state_dict()
    assert all(loaded[key].dtype == dtype and torch.equal(loaded[key], stored[key]) for key in stored)
    wide = HitVar.from_pretrained(tmp_path, dtype=torch.float32)
    assert {value.dtype for value in wide.state_dict().values()} == {torch.float32}


def test_loading_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        HitVar.from_pretrained(tmp_path)
    micro_model().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    head = stored.pop("transformer.head.bias")
    save_file(stored | {"wings": head}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"does not fit .* missing keys: \['transformer\.head\.bias'\]; unexpected keys: \['wings'\]",
    ):
        HitVar.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"wings": 2}))
    with pytest.raises(ValueError, match=r"unknown keys \['wings'\]"):
        HitVar.from_pretrained(tmp_path)


def test_state_dict_round_trip() -> None:
    model, other = micro_model(), HitVar(MICRO)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert set(dict(model.named_parameters())) == set(model.state_dict()), "no hidden buffers are saved"


DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("tiles", DTYPES)
def test_forward_runs_in_the_dtype_of_the_weights(weights: torch.dtype, tiles: torch.dtype) -> None:
    config = replace(MICRO, tokenizer=replace(MICRO.tokenizer, decoder_lr=True))
    model, lr = micro_model(config, weights), lr_tiles().to(tiles)
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)).to(tiles)
    tokens = model.tokenizer.tokenize(image).indices
    logits = model(lr, torch.tensor([0, 1]), tokens)
    assert logits.shape == (2, config.tokenizer.pyramid.num_tokens, 48)
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert model.lr_features(lr).dtype == weights
    for image in model.super_resolve(lr).values():
        assert image.dtype == torch.float32 and image.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_tokenizer_goes_there_and_back_in_half_precision(dtype: torch.dtype) -> None:
    model = micro_model(dtype=dtype)
    images = model.tokenizer(torch.rand(1, 3, 32, 32) * 2 - 1)
    assert {factor: (image.dtype, image.shape[-1]) for factor, image in images.items()} == {
        factor: (dtype, 8 * factor) for factor in (1, 2, 4)
    }


def test_logits_of_the_packaged_model_are_those_of_float32() -> None:
    """In its own float16, as it is saved."""
    half, wide = (HitVar.from_pretrained("hit-tiny", dtype=dtype) for dtype in (None, torch.float32))
    side, length = half.config.lr_tile, half.config.tokenizer.pyramid.num_tokens
    generator = torch.Generator().manual_seed(3)
    lr = torch.rand(1, 3, side, side, generator=generator) * 2 - 1
    tokens = torch.randint(half.config.tokenizer.codebook_size, (1, length), generator=generator)
    expected, found = (model(lr, torch.tensor([1]), tokens) for model in (wide, half))
    assert (expected - found).norm() < 0.02 * expected.norm()


def test_what_is_no_list_or_no_options_is_an_error() -> None:
    model = micro_model()
    features = model.lr_features(lr_tiles())
    with pytest.raises(TypeError, match="sampling: expected SamplingOptions, found None"):
        model.super_resolve(lr_tiles(), None)
    with pytest.raises(TypeError, match="options: expected SamplingOptions, found None"):
        model.sample(features, torch.tensor([0, 1]), options=None)
    for wrong in (4, "4"):
        with pytest.raises(TypeError, match=f"factors: expected a list of factors, found {wrong!r}"):
            model.super_resolve(lr_tiles(), factors=wrong)
    with pytest.raises(TypeError, match="factors: expected an integer of at least 1, found '4'"):
        model.super_resolve(lr_tiles(), factors=["4"])


def test_a_folder_may_be_a_string(tmp_path: Path) -> None:
    micro_model().save_pretrained(str(tmp_path / "model"))
    assert HitVar.from_pretrained(str(tmp_path / "model")).config == MICRO
