"""How crops are drawn and cut, each rule by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hitsr_fast.data.crops import Decoded, NoPhotosError, PhotoCrops
from hitsr_fast.data.folder import photo_names
from hitsr_fast.data.manifest import index_image, scan
from hitsr_fast.data.readers import FileReader
from hitsr_fast.data.source_config import CropConfig, SourceConfig, check_sources
from tests.data.photos_of import write


def crops_of(folder: Path, side: int = 16, **values: Any) -> PhotoCrops:
    photos = scan(folder, photo_names(folder), index_image)
    return PhotoCrops(FileReader(folder), photos, side, CropConfig(**values))


def drawn(crops: PhotoCrops, count: int) -> np.ndarray:
    """uint8 `(count, side, side, 3)`."""
    return np.stack([crops.crop(0, "x", i, crops.side).permute(1, 2, 0).numpy() for i in range(count)])


@pytest.mark.parametrize(("draw", "low", "high"), [("image", 0.42, 0.58), ("area", 0.8, 0.97)])
def test_images_are_drawn_alike_or_by_their_area(tmp_path: Path, draw: str, low: float, high: float) -> None:
    write(tmp_path / "large.png", 1, 64, 36)  # nine times the area
    write(tmp_path / "small.png", 0, 16, 16)
    assert low < (drawn(crops_of(tmp_path, draw=draw), 300)[:, 0, 0, 0] == 1).mean() < high


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", [False, True])
def test_crops_are_mirrored_and_turned_as_they_are_told(tmp_path: Path, flip: bool, turns: bool) -> None:
    pixels = write(tmp_path / "a.png", 7, 16, 16)
    variants = {
        np.rot90(image, quarter).tobytes()
        for image in ([pixels, pixels[:, ::-1]] if flip else [pixels])
        for quarter in (range(4) if turns else [0])
    }
    assert {crop.tobytes() for crop in drawn(crops_of(tmp_path, flip=flip, turns=turns), 100)} == variants


def test_a_crop_lies_anywhere(tmp_path: Path) -> None:
    rows = np.repeat(np.arange(40, dtype=np.uint8)[:, None], 40, axis=1)
    Image.fromarray(np.stack([rows, rows.T, rows], axis=-1)).save(tmp_path / "a.png")
    corners = {tuple(crop[0, 0, :2]) for crop in drawn(crops_of(tmp_path, flip=False), 300)}
    assert {top for top, _ in corners} == {left for _, left in corners} == set(range(25))
    assert len(corners) > 200


def test_resize_centre_is_lanczos_of_the_shorter_side_and_the_middle(tmp_path: Path) -> None:
    pixels = write(tmp_path / "a.png", 9, 50, 81)
    crops = crops_of(tmp_path, cut="resize-centre", shorter_side=20, centre=16, flip=False)
    whole = np.asarray(Image.fromarray(pixels).resize((32, 20), Image.Resampling.LANCZOS))  # 81 * 20 // 50
    assert np.array_equal(drawn(crops, 1)[0], whole[2:18, 8:24])
    assert crops.counts == {"images": 1, "enlarged": 0, "too small": 0, "fault": 0}
    with pytest.raises(ValueError, match="centre: expected the 16 of the model's crops, found 24"):
        crops_of(tmp_path, cut="resize-centre", centre=24, shorter_side=30)


@pytest.mark.parametrize(("height", "width"), [(10, 24), (24, 10), (10, 10)])
def test_small_images_are_enlarged(tmp_path: Path, height: int, width: int) -> None:
    pixels = write(tmp_path / "a.png", 3, height, width)
    crops = crops_of(tmp_path, small="enlarge", flip=False)
    size = (width * 16 // min(height, width), height * 16 // min(height, width))
    whole = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    places = np.lib.stride_tricks.sliding_window_view(whole, (16, 16, 3)).reshape(-1, 16, 16, 3)
    crop = drawn(crops, 1)[0]
    assert any(np.array_equal(crop, place) for place in places)
    assert crops.counts["enlarged"] == 1


def test_resize_centre_enlarges_what_is_below_its_shorter_side(tmp_path: Path) -> None:
    for number, side in enumerate((10, 16, 19, 20, 30)):
        write(tmp_path / f"{number}.png", number, side, 40)
    values = {"cut": "resize-centre", "shorter_side": 20, "centre": 16}
    assert crops_of(tmp_path, **values).counts == {"images": 5, "enlarged": 3, "too small": 0, "fault": 0}
    left = crops_of(tmp_path, small="leave out", **values)
    assert left.counts == {"images": 4, "enlarged": 2, "too small": 1, "fault": 0}


@pytest.mark.parametrize(("height", "width"), [(12, 16), (16, 12), (5, 6), (1, 16)])
def test_small_images_are_reflected(tmp_path: Path, height: int, width: int) -> None:
    pixels = write(tmp_path / "a.png", 3, height, width)
    crops = crops_of(tmp_path, small="reflect", flip=False)
    # ... 2 1 0 1 2 ...: the edge is there once.
    rows, columns = (
        [at if at < n else 2 * (n - 1) - at for at in (i % max(1, 2 * (n - 1)) for i in range(16))]
        for n in (height, width)
    )
    assert np.array_equal(drawn(crops, 1)[0], pixels[np.ix_(rows, columns)])
    assert crops.counts == {"images": 1, "reflected": 1, "too small": 0, "fault": 0}


def test_small_images_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.png", 3, 15, 40)
    write(tmp_path / "b.png", 4)
    (tmp_path / "c.png").touch()
    crops = crops_of(tmp_path, small="leave out")
    assert crops.counts == {"images": 1, "too small": 1, "fault": 1}
    assert (drawn(crops, 20)[..., 0] == 4).all()
    with pytest.raises(NoPhotosError, match=r"at least 64 x 64, found none among 3"):
        crops_of(tmp_path, side=64, small="leave out")


def test_the_sharpness_bar_is_off_by_default(tmp_path: Path) -> None:
    write(tmp_path / "sharp.png", 200)
    Image.fromarray(np.full((32, 32, 3), 9, np.uint8)).save(tmp_path / "flat.png")
    assert 0.4 < (drawn(crops_of(tmp_path), 200)[:, 0, 0, 0] == 9).mean() < 0.6
    barred = crops_of(tmp_path, sharpness_db=32.0, flat_fraction=0.0)
    assert (drawn(barred, 50)[:, 0, 0, 0] == 9).mean() < 0.05  # eight draws in a row were flat


def test_what_is_held_is_what_crops_are_cut_from(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / f"{number}.png", number, 100, 100)
    photos = scan(tmp_path, photo_names(tmp_path), index_image)
    config = CropConfig(cut="resize-centre", shorter_side=20, centre=16)
    crops = PhotoCrops(FileReader(tmp_path), photos, 16, config, decoded=Decoded(2 * 16 * 16 * 3))
    first = drawn(crops, 40)
    assert crops.decoded.held == 2 * 16 * 16 * 3
    assert np.array_equal(first, drawn(crops, 40))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"small": "crop"}, "small"),
        ({"sharpness_db": 0.0}, "sharpness_db"),
        ({"cut": "resize-centre", "small": "reflect"}, 'small: expected "enlarge" or "leave out"'),
        ({"cut": "resize-centre", "shorter_side": 500}, "shorter_side: expected at least the centre of 512"),
        ({"weight": 0.0}, "weight"),
        ({"name": "a b"}, "name: expected letters"),
        ({"path": ""}, "path"),
        ({"scores": "a.csv"}, "scores: expected one of below and below_share"),
        ({"scores": "a.csv", "below": 1.0, "below_share": 0.5}, "found 2"),
        ({"below": 1.0}, "scores: expected no threshold without scores"),
        ({"below_share": 1.5, "scores": "a.csv"}, "below_share"),
    ],
)
def test_values_that_do_not_fit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceConfig(**values)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"name": "a"}, {"name": "a"}], "names of their own, found 'a' twice"),
        ([{"name": "a", "role": "negative"}], "one to train on at least"),
        ([{"name": "a", "weight": 1.0}, {"name": "b", "role": "negative"}], "none for 'b'"),
    ],
)
def test_sources_that_do_not_fit_together(sources: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sources([SourceConfig(**values) for values in sources])
