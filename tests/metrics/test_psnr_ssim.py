from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast.metrics import psnr_rgb, psnr_y, ssim_rgb, ssim_y
from tests.tolerances import TOLERANCES


def images(count: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(count, 3, height, width, generator=generator)
    return a, (a + 0.1 * torch.randn(a.shape, generator=generator)).clamp(0, 1)


def matlab_luma(image: Tensor) -> np.ndarray:
    """First row of the matrix in `rgb2ycbcr`, on one (3, H, W) image."""
    red, green, blue = image.double().numpy()
    return (65.481 * red + 128.553 * green + 24.966 * blue) + 16


def test_psnr_equals_its_definition() -> None:
    a, b = images(3, 17, 14)
    expected = []
    for i in range(3):
        error = (matlab_luma(a[i]) - matlab_luma(b[i]))[4:-4, 4:-4]
        expected.append(20 * math.log10(255 / math.sqrt((error**2).mean())))
    actual = psnr_y(a, b)
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64), **TOLERANCES["float64_reordered"]._asdict()
    )


@given(offset=st.floats(1e-3, 1.0))
def test_psnr_of_a_grey_offset(offset: float) -> None:
    """A grey step of d moves luma by 219 d."""
    a = torch.zeros(1, 3, 12, 12, dtype=torch.float64)
    expected = 20 * math.log10(255 / (219 * offset))
    assert psnr_y(a, a + offset).item() == pytest.approx(expected, **approx("float64_reordered"))


def approx(name: str) -> dict[str, float]:
    return {"rel": TOLERANCES[name].rtol, "abs": TOLERANCES[name].atol}


def test_equal_images_score_highest() -> None:
    a, b = images(1, 24, 24)
    assert psnr_y(a, a).item() == math.inf
    assert ssim_y(a, a).item() == pytest.approx(1, **approx("float64_reordered"))
    assert ssim_y(a, b).item() < 0.99


@pytest.mark.parametrize("metric", [psnr_y, ssim_y, psnr_rgb, ssim_rgb])
def test_border_is_left_out(metric: object) -> None:
    assert callable(metric)
    a, b = images(2, 26, 24)
    framed = torch.zeros_like(b)
    framed[..., 5:-5, 5:-5] = b[..., 5:-5, 5:-5]
    assert torch.equal(metric(a, framed, border=5), metric(a, b, border=5))
    assert (metric(a, framed, border=4) < metric(a, b, border=4)).all()
    assert torch.equal(metric(a, b, border=0), metric(a[..., :, :], b, 0))


def test_ssim_equals_its_definition() -> None:
    """Window by window with full two-dimensional weights, as the paper's equation 13 reads."""
    a, b = images(2, 24, 22)
    x = np.arange(11) - 5
    window = np.exp(-(x[:, None] ** 2 + x[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = []
    for i in range(2):
        y_a, y_b = matlab_luma(a[i])[4:-4, 4:-4], matlab_luma(b[i])[4:-4, 4:-4]
        values = []
        for row in range(y_a.shape[0] - 10):
            for column in range(y_a.shape[1] - 10):
                p, q = (y[row : row + 11, column : column + 11] for y in (y_a, y_b))
                mean_p, mean_q = (window * p).sum(), (window * q).sum()
                var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
                cov = (window * (p - mean_p) * (q - mean_q)).sum()
                luminance = (2 * mean_p * mean_q + c1) / (mean_p**2 + mean_q**2 + c1)
                values.append(luminance * (2 * cov + c2) / (var_p + var_q + c2))
        expected.append(np.mean(values))
    torch.testing.assert_close(
        ssim_y(a, b), torch.tensor(expected, dtype=torch.float64), **TOLERANCES["float64_reordered"]._asdict()
    )


@given(seed=st.integers(0, 2**16))
def test_symmetric_and_per_image(seed: int) -> None:
    a, b = images(2, 20, 23, seed)
    for metric in (psnr_y, ssim_y, psnr_rgb, ssim_rgb):
        both = metric(a, b)
        assert both.shape == (2,)
        torch.testing.assert_close(both, metric(b, a), **TOLERANCES["float64_reordered"]._asdict())
        single = torch.cat([metric(a[:1], b[:1]), metric(a[1:], b[1:])])
        torch.testing.assert_close(both, single, **TOLERANCES["float64_reordered"]._asdict())


def test_bad_arguments() -> None:
    a, b = images(1, 18, 18)
    with pytest.raises(ValueError, match="border: expected an integer of at least 0, found -1"):
        psnr_y(a, b, border=-1)
    with pytest.raises(ValueError, match=r"a: expected sides of at least 19 px, found \(18, 18\)"):
        ssim_y(a, b, border=4)
    with pytest.raises(ValueError, match="at least 9 px"):
        psnr_y(a[..., :8], b[..., :8], border=4)
    with pytest.raises(TypeError, match="b: expected a floating-point tensor"):
        psnr_y(a, b.byte())
    with pytest.raises(ValueError, match=r"a: expected shape \(B, 3, H, W\), found \(1, 1, 18, 18\)"):
        ssim_y(a[:, :1], b[:, :1])


def test_psnr_rgb_equals_its_definition() -> None:
    """One mean over all pixels and channels, not of three PSNRs."""
    a, b = images(3, 17, 14)
    b[:, 0] = a[:, 0]
    expected = []
    for i in range(3):
        error = (a[i].double().numpy() - b[i].double().numpy())[:, 2:-2, 2:-2]
        expected.append(10 * math.log10(1 / (error**2).mean()))
    torch.testing.assert_close(
        psnr_rgb(a, b, border=2),
        torch.tensor(expected, dtype=torch.float64),
        **TOLERANCES["float64_reordered"]._asdict(),
    )
    assert psnr_rgb(a, a).tolist() == [math.inf] * 3


@given(offset=st.floats(1e-3, 1.0))
def test_psnr_rgb_of_a_grey_offset(offset: float) -> None:
    a = torch.zeros(1, 3, 12, 12, dtype=torch.float64)
    assert psnr_rgb(a, a + offset).item() == pytest.approx(
        -20 * math.log10(offset), **approx("float64_reordered")
    )


def test_ssim_rgb_is_the_mean_over_channels() -> None:
    a, b = images(2, 24, 22)
    channels = [ssim_rgb(a[:, [c] * 3], b[:, [c] * 3]) for c in range(3)]
    torch.testing.assert_close(
        ssim_rgb(a, b), torch.stack(channels).mean(dim=0), **TOLERANCES["float64_reordered"]._asdict()
    )
    assert len({channel[0].item() for channel in channels}) == 3
    # Of images whose luma is their value: (Y - 16) / 219.
    grey_a, grey_b = ((x[:, :1].double() * 255 - 16) / 219 for x in (a, b))
    same = ssim_y(grey_a.expand(-1, 3, -1, -1), grey_b.expand(-1, 3, -1, -1), border=0)
    torch.testing.assert_close(channels[0], same, **TOLERANCES["float64_reordered"]._asdict())
