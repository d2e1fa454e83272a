from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from hitsr_fast.metrics import LPIPS, lpips
from hitsr_fast.metrics.lpips import MIN_SIDE
from hitsr_fast.metrics.lpips_weights import LpipsWeightsNotFoundError
from tests.metrics.lpips_package import SCOPES, FakePackage
from tests.tolerances import TOLERANCES

NETS = ["alex", "vgg"]


def images(count: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(count, 3, height, width, generator=generator) * 2 - 1
    b = (a + 0.5 * torch.randn(a.shape, generator=generator)).clamp(-1, 1)
    return a, b


@pytest.mark.parametrize("net", NETS)
def test_features_are_what_is_compared(net: Any, package: FakePackage) -> None:
    model = LPIPS(net, package.weights)
    a, b = images(2, 36, 47)
    total = torch.zeros(2)
    for x, y, head in zip(model.features(a), model.features(b), model.heads, strict=True):
        x, y = (f / (f.norm(dim=1, keepdim=True) + 1e-10) for f in (x, y))
        total += torch.einsum("bchw,c->b", (x - y) ** 2, head) / (x.shape[2] * x.shape[3])
    torch.testing.assert_close(total, model(a, b), **TOLERANCES["float32_reordered"]._asdict())


def expected_lpips(tree: dict[str, Any], net: str, a: Tensor, b: Tensor) -> Tensor:
    """LPIPS in float64 straight from the pickled parameters, written after equation 1 of the paper."""

    def features(image: Tensor) -> list[Tensor]:
        shift = torch.tensor([-0.030, -0.088, -0.188]).double()[:, None, None]
        scale = torch.tensor([0.458, 0.448, 0.450]).double()[:, None, None]
        x, taps = (image.double() - shift) / scale, []
        pool_before = {"alex": {1: 3, 2: 3}, "vgg": {2: 2, 4: 2, 7: 2, 10: 2}}[net]
        compared = {"alex": [0, 1, 2, 3, 4], "vgg": [1, 3, 6, 9, 12]}[net]
        scope = tree[SCOPES[net]]
        for index in range(len(scope)):
            if index in pool_before:
                x = functional.max_pool2d(x, pool_before[index], 2)
            kernel = torch.from_numpy(scope[f"Conv_{index}"]["kernel"]).double().permute(3, 2, 0, 1)
            bias = torch.from_numpy(scope[f"Conv_{index}"]["bias"]).double()
            first_alex = net == "alex" and index == 0
            stride, padding = (4, 2) if first_alex else (1, kernel.shape[-1] // 2)
            x = torch.relu(functional.conv2d(x, kernel, bias, stride, padding))
            if index in compared:
                taps.append(x)
        return taps

    total = torch.zeros(len(a), dtype=torch.float64)
    for stage, (x, y) in enumerate(zip(features(a), features(b), strict=True)):
        head = torch.from_numpy(tree[f"NetLinLayer_{stage}"]["Conv_0"]["kernel"]).double().flatten()
        x, y = (f / (f.norm(dim=1, keepdim=True) + 1e-10) for f in (x, y))
        total += torch.einsum("bchw,c->b", (x - y) ** 2, head) / (x.shape[2] * x.shape[3])
    return total


@pytest.mark.parametrize("net", NETS)
def test_equals_the_paper(net: Any, package: FakePackage) -> None:
    a, b = images(2, 36, 47)
    actual = LPIPS(net, package.weights)(a, b)
    assert actual.shape == (2,)
    assert actual.dtype == torch.float32
    expected = expected_lpips(package.trees[net], net, a, b)
    torch.testing.assert_close(actual.double(), expected, **TOLERANCES["float32_reordered"]._asdict())
    assert (expected > 0.01).all()


@pytest.mark.parametrize("net", NETS)
def test_zero_for_equal_images_and_the_smallest_size(net: Any, package: FakePackage) -> None:
    a, b = images(1, MIN_SIDE[net], MIN_SIDE[net])
    metric = LPIPS(net, package.weights)
    assert metric(a, a).item() == 0
    assert metric(a, b).item() > 0


def test_images_of_a_batch_do_not_mix(package: FakePackage) -> None:
    a, b = images(3, 40, 32)
    metric = LPIPS("alex", package.weights)
    single = torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(metric(a, b), single, **TOLERANCES["float32_reordered"]._asdict())
    torch.testing.assert_close(metric(b, a), single, **TOLERANCES["float32_reordered"]._asdict())


def test_gradient_is_that_of_the_value(package: FakePackage) -> None:
    metric = LPIPS("alex", package.weights).double()
    a, b = (image.double() for image in images(1, 32, 32))
    a.requires_grad_()
    b.requires_grad_()
    metric(a, b).sum().backward()
    assert b.grad is None
    assert all(parameter.grad is None for parameter in metric.parameters())
    direction = torch.randn(a.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-7
    with torch.no_grad():
        slope = (metric(a + step * direction, b) - metric(a - step * direction, b)) / (2 * step)
    expected = (a.grad * direction).sum()
    torch.testing.assert_close(slope[0], expected, **TOLERANCES["gradcheck"]._asdict())


def test_gradient_is_finite_where_features_vanish(package: FakePackage) -> None:
    metric = LPIPS("alex", package.weights)
    with torch.no_grad():
        for stage in metric.convs:
            for conv in stage:
                conv.bias.fill_(-100.0)
    a, b = images(1, 32, 32)
    a.requires_grad_()
    metric(a, b).sum().backward()
    assert a.grad.isfinite().all()


def test_as_a_loss_under_autocast(package: FakePackage) -> None:
    metric = LPIPS("vgg", package.weights).train()
    a, b = images(2, 32, 32)
    exact = metric(a, b)
    a = a.to(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        low = metric(a.bfloat16(), b)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, **TOLERANCES["bfloat16"]._asdict())
    low.sum().backward()
    assert a.grad.isfinite().all()
    assert a.grad.abs().sum() > 0


@pytest.fixture
def cache(package: FakePackage, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(package.weights.parent))
    return package.weights.parent


def test_function_reads_the_cache_and_leaves_autocast_outside(cache: Path, package: FakePackage) -> None:
    a, b = images(2, 36, 40)
    expected = LPIPS("alex", package.weights)(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        actual = lpips(a, b)
    assert torch.equal(actual, expected)
    assert torch.equal(lpips(a, b, net="vgg"), LPIPS("vgg", package.weights)(a, b))


def test_missing_weights_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path))
    a, b = images(1, 32, 32)
    with pytest.raises(LpipsWeightsNotFoundError, match="hitsr-fast weights lpips"):
        lpips(a, b)


def test_damaged_weights_say_so(package: FakePackage, tmp_path: Path) -> None:
    damaged = tmp_path / "lpips.safetensors"
    damaged.write_bytes(package.weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        LPIPS("alex", damaged)
    other = tmp_path / "other.safetensors"
    save_file({"alex.heads.0": torch.zeros(64)}, other)
    with pytest.raises(ValueError, match=r"(?s)does not hold LPIPS.*convs"):
        LPIPS("alex", other)


def test_bad_arguments(package: FakePackage, cache: Path) -> None:
    a, b = images(1, 32, 32)
    with pytest.raises(ValueError, match=r"net: expected one of .*found 'squeeze'"):
        lpips(a, b, net="squeeze")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a: expected a floating-point tensor, found torch\.uint8"):
        lpips(a.byte(), b)
    with pytest.raises(TypeError, match="b: expected a tensor, found list"):
        lpips(a, [1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a: expected shape \(B, 3, H, W\), found \(3, 32, 32\)"):
        lpips(a[0], b[0])
    with pytest.raises(ValueError, match=r"b: expected the shape of a"):
        lpips(a, b[..., 1:])
    with pytest.raises(ValueError, match=r"a: expected sides of at least 31 px, found \(30, 32\)"):
        lpips(a[..., :30, :], b[..., :30, :])
    with pytest.raises(ValueError, match="device"):
        lpips(a, b.to("meta"))


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_without_values_no_file_is_read(net: Any, tmp_path: Path) -> None:
    with torch.device("meta"):
        metric = LPIPS(net, tmp_path / "none.safetensors")
        image = torch.empty(2, 3, 64, 64)
    assert metric(image, image).shape == (2,)
    with pytest.raises(LpipsWeightsNotFoundError):
        LPIPS(net, tmp_path / "none.safetensors")
