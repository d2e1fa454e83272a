from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from hitsr_fast.metrics import DISTS, dists
from hitsr_fast.metrics import lpips_weights as backbone_weights
from hitsr_fast.metrics.dists import SOURCE, missing_dists
from hitsr_fast.metrics.weights import WeightsNotFoundError
from tests.metrics import pictures, stand_ins
from tests.tolerances import TOLERANCES

EXPECTED = json.loads((Path(__file__).parent / "expected.json").read_text())["pictures"]


@pytest.fixture(scope="session")
def stand_in_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dists")
    save_file(stand_ins.vgg(), folder / "lpips.safetensors")
    save_file(stand_ins.dists_heads(), folder / "dists.safetensors")
    return folder


@pytest.fixture
def cache(stand_in_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(stand_in_cache))
    return stand_in_cache


@pytest.fixture(scope="session")
def module(stand_in_cache: Path) -> DISTS:
    return DISTS(stand_in_cache / "dists.safetensors", stand_in_cache / "lpips.safetensors")


def images(count: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(count, 3, height, width, generator=generator)
    return a, (a + 0.2 * torch.randn(a.shape, generator=generator)).clamp(0, 1)


def expected_dists(a: Tensor, b: Tensor) -> Tensor:
    """Of two float64 images `(3, H, W)`: texture from means, structure from covariances, by channel."""
    weights = {name: value.double() for name, value in stand_ins.vgg().items()}

    def maps(image: Tensor) -> list[Tensor]:
        shift = torch.tensor([0.485, 0.456, 0.406]).double()[:, None, None]
        scale = torch.tensor([0.229, 0.224, 0.225]).double()[:, None, None]
        found, x = [image], ((image - shift) / scale)[None]
        for stage, depth in enumerate((2, 2, 3, 3, 3)):
            if stage > 0:
                rows = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]).double() / 16
                padded = functional.pad(x**2, (1, 1, 1, 1))
                windows = padded.unfold(2, 3, 2).unfold(3, 3, 2)
                x = ((windows * rows).sum(dim=(4, 5)) + 1e-12).sqrt()
            for conv in range(depth):
                name = f"vgg.convs.{stage}.{conv}"
                x = functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1).relu()
            found.append(x[0])
        return found

    heads = {name: value.double() for name, value in stand_ins.dists_heads().items()}
    similarity, index = torch.zeros((), dtype=torch.float64), 0
    for x, y in zip(maps(a), maps(b), strict=True):
        for p, q in zip(x.flatten(1), y.flatten(1), strict=True):
            texture = (2 * p.mean() * q.mean() + 1e-6) / (p.mean() ** 2 + q.mean() ** 2 + 1e-6)
            covariance = ((p - p.mean()) * (q - q.mean())).mean()
            structure = (2 * covariance + 1e-6) / (p.var(correction=0) + q.var(correction=0) + 1e-6)
            similarity += heads["alpha"][index] * texture + heads["beta"][index] * structure
            index += 1
    return 1 - similarity / (heads["alpha"].sum() + heads["beta"].sum())


def test_equals_its_definition(module: DISTS) -> None:
    a, b = images(2, 19, 26)
    expected = torch.stack([expected_dists(x.double(), y.double()) for x, y in zip(a, b, strict=True)])
    actual = module(a, b)
    assert actual.shape == (2,)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, **TOLERANCES["float32_reordered"]._asdict())


@pytest.mark.parametrize("index", range(10))
def test_equals_the_authors_package_with_the_same_weights(index: int, module: DISTS) -> None:
    """Of 16 px and more; the value is that of `DISTS_pytorch` 0.1 with these stand-ins for its weights."""
    truth, result = pictures.picture(index), pictures.spoiled(index)
    assert pictures.digest(truth) == EXPECTED[index]["truth"]
    assert pictures.digest(result) == EXPECTED[index]["result"]
    a, b = (pictures.to_tensor(pictures.small(image, index)) for image in (result, truth))
    assert module(a, b).item() == pytest.approx(EXPECTED[index]["dists_stand_in"], abs=1e-4)


def test_zero_for_equal_images_and_one_pixel(module: DISTS) -> None:
    a, b = images(1, 24, 24)
    assert module(a, a).item() == pytest.approx(0, abs=TOLERANCES["float32_reordered"].atol)
    assert module(a, b).item() > 0.01
    assert module(a[..., :1, :1], b[..., :1, :1]).isfinite().all()


def test_images_of_a_batch_do_not_mix(module: DISTS) -> None:
    a, b = images(3, 24, 20)
    single = torch.cat([module(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(module(a, b), single, **TOLERANCES["float32_reordered"]._asdict())
    torch.testing.assert_close(module(b, a), single, **TOLERANCES["float32_reordered"]._asdict())


def test_gradient_is_that_of_the_value(stand_in_cache: Path) -> None:
    metric = DISTS(stand_in_cache / "dists.safetensors", stand_in_cache / "lpips.safetensors").double()
    a, b = (image.double() for image in images(1, 16, 16))
    a.requires_grad_()
    b.requires_grad_()
    metric(a, b).sum().backward()
    assert b.grad is None
    assert all(parameter.grad is None for parameter in metric.parameters())
    direction = torch.randn(a.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        slope = (metric(a + step * direction, b) - metric(a - step * direction, b)) / (2 * step)
    torch.testing.assert_close(slope[0], (a.grad * direction).sum(), **TOLERANCES["gradcheck"]._asdict())


def test_gradient_is_finite_where_features_vanish(module: DISTS) -> None:
    a = torch.zeros(1, 3, 16, 16, requires_grad=True)
    module(a, torch.zeros(1, 3, 16, 16)).sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_function_reads_the_cache_and_leaves_autocast_outside(cache: Path, module: DISTS) -> None:
    a, b = images(2, 24, 20)
    with torch.autocast("cpu", torch.bfloat16):
        actual = dists(a, b)
        low = module(a, b)
    assert torch.equal(actual, module(a, b))
    torch.testing.assert_close(low, actual, **TOLERANCES["bfloat16"]._asdict())


def test_missing_weights_name_their_command(
    tmp_path: Path, stand_in_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path))
    a, b = images(1, 16, 16)
    assert missing_dists() == "no DISTS weights: hitsr-fast weights dists"
    with pytest.raises(WeightsNotFoundError, match="hitsr-fast weights dists"):
        dists(a, b)
    (tmp_path / "dists.safetensors").write_bytes((stand_in_cache / "dists.safetensors").read_bytes())
    assert missing_dists() == "no LPIPS weights: hitsr-fast weights lpips"
    with pytest.raises(WeightsNotFoundError, match="hitsr-fast weights lpips"):
        dists(a, b)
    (tmp_path / "lpips.safetensors").touch()
    assert "damaged" in (missing_dists() or "")
    with pytest.raises(ValueError, match="damaged"):
        dists(a, b)


def test_other_weights_are_refused(stand_in_cache: Path, tmp_path: Path) -> None:
    save_file({"alpha": torch.zeros(1475)}, tmp_path / "dists.safetensors")
    with pytest.raises(ValueError, match=r"(?s)do not hold DISTS.*beta"):
        DISTS(tmp_path / "dists.safetensors", stand_in_cache / "lpips.safetensors")


def test_bad_arguments(cache: Path) -> None:
    a, b = images(1, 16, 16)
    with pytest.raises(TypeError, match=r"a: expected a floating-point tensor, found torch\.uint8"):
        dists(a.byte(), b)
    with pytest.raises(ValueError, match="b: expected the shape of a"):
        dists(a, b[..., 1:])


@pytest.mark.slow  # fetches 64 MB
def test_official_values(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ten pictures, whole, by `DISTS_pytorch` 0.1 with its own weights: within 1e-4."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HITSR_FAST_CACHE", str(folder))
    for source in (SOURCE, backbone_weights.SOURCE):
        source.fetch(source.path)
    for index, expected in enumerate(EXPECTED):
        result, truth = (pictures.to_tensor(make(index)) for make in (pictures.spoiled, pictures.picture))
        assert dists(result, truth).item() == pytest.approx(expected["dists"], abs=1e-4)
