"""Crops of a folder: deterministic, sharp, fair to area, and firm with files that are no photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hitsr_fast.data.folder import (
    DEFAULT_HOLDOUT,
    SHOWN,
    NoPhotosError,
    PhotoFolder,
    photo_names,
    round_trip_psnr,
    split,
)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def sharp(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3))


def soft(height: int, width: int) -> np.ndarray:
    ramp = np.linspace(0, 255, width).round()
    return np.broadcast_to(ramp[None, :, None], (height, width, 3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "b.png", sharp(64, 80))
    save(tmp_path / "sub" / "a.png", sharp(48, 48))
    (tmp_path / "manifest.json").write_text("[]")
    save(tmp_path / ".hidden" / "c.png", sharp(64, 64))
    return tmp_path


def test_names(folder: Path) -> None:
    assert photo_names(folder) == ["b.png", "sub/a.png"]
    with pytest.raises(ValueError, match="nowhere"):
        photo_names(folder / "nowhere")


def test_crops_are_deterministic(folder: Path) -> None:
    first, second, other = (PhotoFolder(folder, 32, seed=seed, length=40) for seed in (0, 0, 1))
    assert len(first) == 40
    assert first[7].shape == (3, 32, 32)
    assert first[7].dtype == torch.uint8
    assert all(torch.equal(first[i], second[i]) for i in (3, 1, 2))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])
    with pytest.raises(IndexError, match="40"):
        first[40]


def test_batch_is_its_crops(folder: Path) -> None:
    photos = PhotoFolder(folder, 32, length=8)
    batch = photos.batch(2, 4)
    assert batch.dtype == torch.float32
    assert torch.equal(batch, torch.stack([photos[i] for i in range(2, 6)]).float() / 255)
    assert photos.batch(1000, 2).shape == (2, 3, 32, 32)  # the stream has no end


def test_data_loader(folder: Path) -> None:
    photos = PhotoFolder(folder, 16, length=10)
    batches = list(DataLoader(photos, batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.equal(batches[1][2], photos[6])


def test_crops_come_from_the_photo_in_all_eight_orientations(tmp_path: Path) -> None:
    """A crop as large as the photo has only its orientation left to chance."""
    pixels = sharp(16, 16)
    save(tmp_path / "a.png", pixels)
    variants = {
        np.rot90(image, turns).tobytes()
        for image in (pixels.astype(np.uint8), pixels.astype(np.uint8)[:, ::-1])
        for turns in range(4)
    }
    photos = PhotoFolder(tmp_path, 16, length=100)
    assert {photos[i].permute(1, 2, 0).numpy().tobytes() for i in range(100)} == variants


def test_photos_are_drawn_by_area(tmp_path: Path) -> None:
    for name, width in (("large", 96), ("small", 32)):
        pixels = sharp(32, width)
        pixels[..., 0] = 255 if name == "large" else 0
        save(tmp_path / f"{name}.png", pixels)
    photos = PhotoFolder(tmp_path, 16, length=400)
    share = np.mean([int(photos[i][0, 0, 0]) == 255 for i in range(400)])
    assert 0.65 < share < 0.85


def test_flat_and_soft_crops_are_rare(tmp_path: Path) -> None:
    save(tmp_path / "sharp.png", sharp(32, 32))
    save(tmp_path / "soft.png", soft(96, 64))  # six times the area

    def sharp_share(**options: float) -> float:
        photos = PhotoFolder(tmp_path, 16, length=200, tries=40, **options)  # type: ignore[arg-type]
        return float(np.mean([round_trip_psnr(photos[i].permute(1, 2, 0).numpy()) < 32 for i in range(200)]))

    assert sharp_share(flat_fraction=0.0) == 1.0
    assert 0.5 < sharp_share() < 0.8  # a draw is 1/7 sharp; kept flat ones are 0.1 * 6/7
    assert sharp_share(sharpness_db=float("inf")) < 0.3


def test_a_folder_of_soft_photos_still_works(tmp_path: Path) -> None:
    save(tmp_path / "soft.png", soft(32, 32))
    assert PhotoFolder(tmp_path, 16, length=3, flat_fraction=0.0)[2].shape == (3, 16, 16)


def test_round_trip_psnr_orders_by_detail() -> None:
    noise = sharp(64, 64).astype(np.uint8)
    assert round_trip_psnr(noise) < 15
    assert round_trip_psnr(soft(64, 64).astype(np.uint8)) > 40
    assert round_trip_psnr(np.full((64, 64, 3), 9, np.uint8)) == float("inf")


def test_junk_is_left_out_with_its_reason(folder: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff not a photo")
    (folder / "truncated.png").write_bytes((folder / "b.png").read_bytes()[:-500])
    (folder / "empty.png").touch()
    save(folder / "tiny.png", sharp(8, 100))
    photos = PhotoFolder(folder, 32, length=40)
    at_once = {str(folder / name) for name in ("broken.jpg", "empty.png", "tiny.png")}
    assert set(photos.skipped) == at_once
    crops = [photos[i] for i in range(40)]
    assert set(photos.skipped) == at_once | {str(folder / "truncated.png")}
    assert photos.skipped[str(folder / "tiny.png")] == "100 x 8 is smaller than a crop of 32"
    assert "truncated" in photos.skipped[str(folder / "truncated.png")]
    again = PhotoFolder(folder, 32, length=40)
    assert all(torch.equal(again[i], crops[i]) for i in reversed(range(40)))


def test_all_photos_break_when_they_are_decoded(folder: Path) -> None:
    for name in ("b.png", "sub/a.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-500])
    photos = PhotoFolder(folder, 32)
    with pytest.raises(NoPhotosError, match=r"found none among 2.*\.png: broken"):
        photos[0]


def test_a_folder_larger_than_memory(folder: Path) -> None:
    """Photos that are not held are decoded again, with the same crops."""
    whole = PhotoFolder(folder, 32, length=20)
    tight = PhotoFolder(folder, 32, length=20, memory=64 * 80 * 3)
    for i in range(20):
        assert torch.equal(tight[i], whole[i])
        assert tight._crops.decoded.held <= 64 * 80 * 3
    assert whole._crops.decoded.held == (64 * 80 + 48 * 48) * 3


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found none"):
        PhotoFolder(tmp_path, 16)


def test_grey_and_sixteen_bit_photos(tmp_path: Path) -> None:
    Image.fromarray(sharp(32, 32)[..., 0].astype(np.uint8)).save(tmp_path / "grey.png")
    crop = PhotoFolder(tmp_path, 16)[0]
    assert torch.equal(crop[0], crop[2])
    Image.fromarray((sharp(32, 32)[..., 0] * 257).astype(np.uint16)).save(tmp_path / "grey.png")
    assert torch.equal(PhotoFolder(tmp_path, 16)[0], crop)


def test_cache_gives_the_same_crops_and_follows_changes(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    plain = PhotoFolder(folder, 32, length=4)
    for _ in range(2):
        cached = PhotoFolder(folder, 32, length=4, cache=cache)
        assert all(torch.equal(cached[i], plain[i]) for i in range(4))
    assert len(list(cache.iterdir())) == 2
    save(folder / "b.png", 255 - sharp(70, 80))
    changed = PhotoFolder(folder, 32, length=4, cache=cache)
    assert all(torch.equal(changed[i], PhotoFolder(folder, 32, length=4)[i]) for i in range(4))
    gone = PhotoFolder(folder, 32, names=["b.png", "gone.png"], cache=cache)
    assert gone.skipped == {str(folder / "gone.png"): "No such file or directory"}


def test_split_is_by_photo() -> None:
    names = ["x/lxqt-themes__flowers.jpg", "lxqt-themes__fog.jpg", "mate-backgrounds__dune.jpg"]
    train, held_out = split(names)
    assert train == ["lxqt-themes__fog.jpg"]
    assert held_out == ["x/lxqt-themes__flowers.jpg", "mate-backgrounds__dune.jpg"]
    assert split(names, ["lxqt-themes__fog"])[1] == ["lxqt-themes__fog.jpg"]


def test_split_of_ones_own_photos() -> None:
    names = [f"{number:02}.jpg" for number in range(40)]
    assert split(names)[1] == ["00.jpg", "16.jpg", "32.jpg"]
    assert split(["b.jpg", "a.jpg"]) == (["b.jpg"], ["a.jpg"])
    with pytest.raises(NoPhotosError, match="at least two"):
        split(["mine.jpg"])
    with pytest.raises(NoPhotosError, match=r"--data\.holdout 00, found none of beach, sea$"):
        split(names, ("sea", "beach"))
    with pytest.raises(NoPhotosError, match=r"--data\.holdout b, found all 2 held out"):
        split(["b.jpg", "a.jpg"], ("a", "b"))


def test_default_holdout_names_photos_that_are_fetched() -> None:
    from hitsr_fast.data.debian_photos import PACKAGES

    fetched = {f"{package.name}__{photo.name}" for package in PACKAGES for photo in package.photos}
    assert len(set(DEFAULT_HOLDOUT) - set(SHOWN)) == 12
    assert set(DEFAULT_HOLDOUT) - set(SHOWN) <= fetched


def test_bad_arguments(folder: Path) -> None:
    for option, value in (("crop", 4), ("seed", -1), ("length", 0), ("flat_fraction", 1.5), ("tries", 0)):
        with pytest.raises(ValueError, match=option):
            PhotoFolder(folder, **{"crop": 32, option: value})  # type: ignore[arg-type]
