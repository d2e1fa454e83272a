from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hitsr_fast.metrics import niqe
from hitsr_fast.metrics.niqe import MIN_SIDE, SOURCE, fit_asymmetric
from hitsr_fast.metrics.weights import WeightsNotFoundError
from tests.metrics import pictures, stand_ins
from tests.tolerances import TOLERANCES

EXPECTED = json.loads((Path(__file__).parent / "expected.json").read_text())["pictures"]


@pytest.fixture(scope="session")
def stand_in_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("niqe")
    save_file(stand_ins.niqe_parameters(), folder / "niqe.safetensors")
    return folder


@pytest.fixture(autouse=True)
def cache(stand_in_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(stand_in_cache))
    return stand_in_cache


def truth(index: int) -> Tensor:
    return pictures.to_tensor(pictures.picture(index))


@pytest.mark.parametrize("index", range(10))
def test_equals_basicsr_with_the_same_parameters(index: int) -> None:
    """The values are those of basicsr 1.4.2 with these stand-ins for its parameters.

    As it is, basicsr sums up the picture of half size in float32. On the edge between two steps of a fit the
    order of these sums decides, which tells the more the fewer blocks there are.
    """
    expected = EXPECTED[index]
    assert pictures.digest(pictures.picture(index)) == expected["truth"]
    both = [pictures.to_tensor(make(index)) for make in (pictures.picture, pictures.spoiled)]
    actual = niqe(torch.cat(both))
    assert actual.dtype == torch.float64
    blocks = (expected["size"][0] // 96) * (expected["size"][1] // 96)
    assert actual.tolist() == pytest.approx(expected["niqe_stand_in"], abs=1e-3 if blocks > 4 else 3e-3)
    assert actual.tolist() == pytest.approx(expected["niqe_stand_in_float64"], abs=2e-4)


def test_a_border_is_left_out() -> None:
    """With a border of 4 too the value is basicsr's."""
    image = truth(4)
    assert niqe(image, border=4).item() == pytest.approx(EXPECTED[4]["niqe_stand_in_border_4"], abs=1e-3)
    framed = torch.zeros_like(image)
    framed[..., 4:-4, 4:-4] = image[..., 4:-4, 4:-4]
    assert torch.equal(niqe(framed, border=4), niqe(image, border=4))
    assert not torch.equal(niqe(framed), niqe(image))


def test_images_of_a_batch_do_not_mix() -> None:
    image = truth(1)
    other = image.flip(3)
    both = niqe(torch.cat([image, other]))
    torch.testing.assert_close(
        both, torch.cat([niqe(image), niqe(other)]), **TOLERANCES["float64_reordered"]._asdict()
    )
    assert both[0] != both[1]


def test_what_does_not_fill_a_block_is_not_looked_at() -> None:
    image = truth(3)
    height, width = (side // 96 * 96 for side in image.shape[2:])
    assert torch.equal(niqe(image), niqe(image[..., :height, :width]))


@pytest.mark.parametrize(("shape", "widths"), [(2.0, (1.0, 1.0)), (1.0, (1.0, 1.0)), (0.6, (1.0, 2.0))])
def test_the_fit_finds_the_distribution(shape: float, widths: tuple[float, float]) -> None:
    """Samples of an asymmetric generalized Gaussian, whose magnitudes are powers of gamma variates."""
    rng = np.random.default_rng(0)
    count = 400_000
    side = rng.random(count) < widths[0] / sum(widths)
    magnitude = rng.gamma(1 / shape, size=count) ** (1 / shape)
    values = np.where(side, -widths[0] * magnitude, widths[1] * magnitude).astype(np.float32)
    found = [x.item() for x in fit_asymmetric(torch.from_numpy(values).view(1, 500, 800))]
    assert found == pytest.approx([shape, *widths], rel=0.02)


def test_pictures_without_contrast_have_no_value() -> None:
    assert niqe(torch.full((1, 3, 192, 192), 0.5)).isnan().all()


def test_missing_parameters_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path))
    assert SOURCE.missing() == "no NIQE weights: hitsr-fast weights niqe"
    with pytest.raises(WeightsNotFoundError, match="hitsr-fast weights niqe"):
        niqe(truth(0))


def test_bad_arguments() -> None:
    image = torch.rand(1, 3, MIN_SIDE, MIN_SIDE)
    with pytest.raises(TypeError, match=r"images: expected a floating-point tensor, found torch\.uint8"):
        niqe(image.byte())
    with pytest.raises(ValueError, match=r"images: expected shape \(B, 3, H, W\)"):
        niqe(image[0])
    with pytest.raises(ValueError, match="border: expected an integer of at least 0, found -1"):
        niqe(image, border=-1)
    with pytest.raises(
        ValueError, match=r"two whole blocks of 96 x 96 px within the border, found \(96, 191\) px"
    ):
        niqe(image[..., :96, :191])
    with pytest.raises(ValueError, match=r"found \(190, 190\) px"):
        niqe(image, border=1)
    assert math.isfinite(niqe(truth(0)).item())


@pytest.mark.slow  # fetches basicsr's source package
def test_official_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ten pictures and their spoiled copies by basicsr 1.4.2 with its own parameters."""
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path))
    SOURCE.fetch(SOURCE.path)
    for index, expected in enumerate(EXPECTED):
        both = [pictures.to_tensor(make(index)) for make in (pictures.picture, pictures.spoiled)]
        blocks = (expected["size"][0] // 96) * (expected["size"][1] // 96)
        assert niqe(torch.cat(both)).tolist() == pytest.approx(
            expected["niqe"], abs=1e-3 if blocks > 4 else 3e-3
        )
