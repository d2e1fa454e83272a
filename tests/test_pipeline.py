"""HitSR: any image through a model that sees tiles only. The model repeats pixels: all results are known."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hitsr_fast.imaging.colour import wavelet_colour_fix
from hitsr_fast.imaging.io import Picture
from hitsr_fast.models import hub
from hitsr_fast.pipeline import (
    HitSR,
    ModelNotFoundError,
    NonFiniteOutputError,
    UpscaleOptions,
    find_weights,
    pick_device,
)
from hitsr_fast.pipeline.pictures import enlarged_rows
from tests.imaging.nearest_model import NearestModel
from tests.models.micro import MICRO, micro_model
from tests.tolerances import TOLERANCES


def repeated(x: Tensor, factor: int) -> Tensor:
    return x.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, **TOLERANCES["float32_reordered"]._asdict())


@given(
    height=st.integers(1, 50),
    width=st.integers(1, 50),
    overlap=st.integers(0, 15),
    batch=st.integers(1, 5),
    colour_fix=st.booleans(),
)
def test_tiles_bands_and_batches_leave_no_trace(
    height: int, width: int, overlap: int, batch: int, colour_fix: bool
) -> None:
    image = torch.rand(2, 3, height, width)
    out = HitSR(NearestModel()).upscale(image, overlap=overlap, batch=batch, colour_fix=colour_fix)
    for factor, found in ((1, out.x1), (2, out.x2), (4, out.x4)):
        expected = repeated(image, factor)
        if colour_fix and factor > 1:
            bicubic = torch.nn.functional.interpolate(image, scale_factor=factor, mode="bicubic")
            levels = NearestModel.colour_fix_levels[factor]
            expected = wavelet_colour_fix(expected, bicubic, levels).clamp(0, 1)
        assert found is not None and found.dtype == torch.float32
        close(found, expected)


def test_colour_fix_undoes_a_shift_and_can_be_turned_off() -> None:
    image = torch.rand(1, 3, 40, 30) * 0.5 + 0.2
    sr = HitSR(NearestModel(shift=0.2))
    fixed, raw = sr.upscale(image, scales=(1,)).x1, sr.upscale(image, scales=(1,), colour_fix=False).x1
    assert fixed is not None and raw is not None
    close(fixed, image)
    close(raw, image + 0.1)


@given(height=st.integers(1, 12), factor=st.sampled_from([1, 2, 4]), data=st.data())
def test_enlarged_rows_equal_those_of_the_whole(height: int, factor: int, data: st.DataObject) -> None:
    image = torch.rand(1, 2, height, 5)
    begin = data.draw(st.integers(0, height * factor - 1))
    end = data.draw(st.integers(begin + 1, height * factor))
    whole = (
        torch.nn.functional.interpolate(image, scale_factor=factor, mode="bicubic") if factor > 1 else image
    )
    close(enlarged_rows(lambda a, b: image[:, :, a:b], begin, end, height, factor), whole[:, :, begin:end])


def test_only_what_is_asked_for() -> None:
    out = HitSR(NearestModel()).upscale(torch.rand(1, 3, 5, 5), scales=(4,))
    assert out.x1 is None and out.x2 is None and out.x4 is not None and out.x4.shape == (1, 3, 20, 20)


def test_progress_counts_every_tile_and_batches_are_bounded() -> None:
    calls: list[tuple[int, int]] = []
    model = NearestModel()
    HitSR(model).upscale(
        torch.rand(2, 3, 40, 40), batch=3, progress=lambda done, total: calls.append((done, total))
    )
    assert calls[-1] == (18, 18) and calls == sorted(calls) and len(calls) == len(model.batches)
    assert max(model.batches) == 3 and sum(model.batches) == 18


def test_the_outputs_are_a_mapping_by_factor() -> None:
    out = HitSR(NearestModel()).upscale(torch.rand(1, 3, 5, 5), scales=(2, 4))
    assert list(out) == [2, 4] and out.x2 is out[2] and out.x1 is None
    with pytest.raises(AttributeError, match="no attribute 'y4'"):
        _ = out.y4


@pytest.mark.parametrize(("class_id", "input"), [(0, "photo"), (1, "clean")])
def test_class_id_still_works_and_warns(class_id: int, input: str) -> None:
    model = NearestModel()
    with pytest.warns(DeprecationWarning, match="class_id is deprecated"):
        HitSR(model).upscale(torch.rand(1, 3, 5, 5), class_id=class_id)
    assert model.told == [input]
    with (
        pytest.warns(DeprecationWarning),
        pytest.raises(ValueError, match="class_id: expected an integer"),
    ):
        HitSR(model).upscale(torch.rand(1, 3, 5, 5), class_id=2)


def test_draws_follow_the_seed() -> None:
    image, sr = torch.rand(1, 3, 20, 20), HitSR(NearestModel())
    a, b, c = (sr.upscale(image, scales=(1,), top_k=0, seed=seed).x1 for seed in (1, 1, 2))
    assert a is not None and b is not None and c is not None
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_tile_that_overflows_is_done_again_in_float32() -> None:
    image = torch.rand(1, 3, 40, 40) * 0.5
    image[..., 20, 39] = 1
    model = NearestModel(bad_above=0.9)
    out = HitSR(model).upscale(image, scales=(1,), batch=4, overlap=0, colour_fix=False).x1
    assert out is not None
    close(out, image)
    assert model.weight.dtype == torch.bfloat16  # the model itself is left as it was


def test_a_tile_that_stays_nan_is_named() -> None:
    image = torch.zeros(1, 3, 40, 40)
    image[..., 20, 39] = 1
    with pytest.raises(NonFiniteOutputError, match=r"tile at input pixel x=24, y=12$"):
        HitSR(NearestModel(bad_above=0.9, heals=False)).upscale(image, overlap=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": (3,)}, r"scales: expected some of \(1, 2, 4\), each once, found \(3,\)"),
        ({"scales": ()}, "scales: "),
        ({"scales": (2, 2)}, "scales: "),
        ({"overlap": 16}, "overlap: "),
        ({"batch": 0}, "batch: "),
        ({"guidance": -1.0}, "guidance: "),
        ({"top_k": -1}, "top_k: "),
        ({"top_p": -0.1}, "top_p: "),
        ({"guidance": float("nan")}, "guidance: "),
        ({"seed": -1}, "seed: "),
        ({"seed": 2**63}, "seed: "),
        ({"guided_scales": (10,)}, r"guided_scales: expected numbers from 0 to 9, found \[10\]"),
        ({"input": "scan"}, "input: expected one of photo, clean, unknown, found 'scan'"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        HitSR(NearestModel()).upscale(torch.rand(1, 3, 8, 8), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("image", "error"),
    [
        ("a path", TypeError),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError),
        (torch.zeros(3, 4, 4), ValueError),
        (torch.zeros(1, 1, 4, 4), ValueError),
        (torch.zeros(1, 3, 0, 4), ValueError),
        (torch.full((1, 3, 4, 4), 1.5), ValueError),
        (torch.full((1, 3, 4, 4), torch.nan), ValueError),
    ],
)
def test_bad_images_are_named(image: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^image: expected"):
        HitSR(NearestModel()).upscale(image)  # type: ignore[type-var]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK"])
def test_pil_images_of_any_mode(mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("L" if mode == "LA" else "RGB").convert(mode)
    image.info["icc_profile"] = b"" if mode == "CMYK" else b"some profile"
    out = HitSR(NearestModel()).upscale(image, colour_fix=False)
    kept = {"P": "RGB", "1": "L", "CMYK": "RGB"}.get(mode, mode)
    assert out.x1 is not None and out.x2 is not None and out.x4 is not None
    assert out.x4.mode == kept and out.x4.size == (120, 80) and out.x2.size == (60, 40)
    assert np.array_equal(np.asarray(out.x1), np.asarray(image.convert(kept)))
    assert out.x4.info.get("icc_profile") == (None if mode == "CMYK" else b"some profile")


def test_orientation_of_a_pil_image() -> None:
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[274] = 6
    out = HitSR(NearestModel()).upscale(image).x2
    assert out is not None and out.size == (8, 12) and out.getexif()[274] == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_stay(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (18, 21, channels), dtype=np.uint16)
    pictures = HitSR(NearestModel()).upscale_picture(Picture(pixels), UpscaleOptions(colour_fix=False))
    assert np.abs(pictures[1].pixels.astype(int) - pixels).max() <= 1
    assert pictures[4].pixels.dtype == np.uint16 and pictures[4].pixels.shape == (72, 84, channels)


def test_colours_under_transparent_pixels_do_not_bleed() -> None:
    pixels = np.full((24, 24, 3), 255, np.uint8)
    pixels[:, 12:] = (200, 100, 50)
    alpha = np.full((24, 24), 255, np.uint8)
    alpha[:, :12] = 0  # white, but invisible
    out = HitSR(NearestModel()).upscale_picture(Picture(pixels, alpha), UpscaleOptions(colour_fix=False))[4]
    assert out.alpha is not None
    assert (out.alpha[:, :40] == 0).all() and (out.alpha[:, 56:] == 255).all()
    visible = out.pixels[:, 48:].reshape(-1, 3).astype(int)
    assert np.abs(visible[:, 2] * 2 - visible[:, 1]).max() <= 2  # the seam keeps the hue: no white in it
    assert np.abs(out.pixels[:, 56:].astype(int) - (200, 100, 50)).max() <= 1


MEMORY = """
import torch
from benchmarks._machine import peak_extra_bytes
from hitsr_fast.pipeline import HitSR, UpscaleOptions
from hitsr_fast.pipeline.pictures import enlarged_rows
from tests.imaging.nearest_model import NearestModel
from tests.models.micro import MICRO, micro_model
torch.set_num_threads(1)
sr, row = HitSR(NearestModel()), torch.rand(1, 3, 1, 64)
def stream(height):
    read_rows = lambda begin, end: row.expand(-1, -1, end - begin, -1)
    rows = sum(r.image.shape[2] for r in sr.stream(read_rows, height, 64, UpscaleOptions()))
    assert rows == 7 * height
stream(256)
print(*(peak_extra_bytes(lambda: stream(height), torch.device("cpu")) for height in (256, 8192)))
"""


def test_memory_does_not_grow_with_the_height() -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=root, capture_output=True, text=True, check=True
    )
    low, tall = map(int, done.stdout.split())
    assert low > 0
    # The tall output alone is 100 MB in float32 at x4; 8 MB is what the allocator may keep.
    assert tall - low < 8 * 2**20, done.stdout


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device("auto").type == expected
    if expected == "cpu":
        with pytest.raises(ValueError, match="device: cuda was asked for"):
            pick_device("cuda")


def test_a_saved_model_is_loaded_with_its_colour_fix(tmp_path: Path) -> None:
    micro_model(replace(MICRO, colour_fix_levels=(0, 2, 6))).save_pretrained(tmp_path)
    sr = HitSR.from_pretrained(tmp_path, "cpu")
    assert sr.model.colour_fix_levels == {1: 0, 2: 2, 4: 6}
    image = torch.rand(1, 3, 11, 9)
    out = sr.upscale(image, scales=(1, 4))
    assert out.x1 is not None and out.x4 is not None and out.x4.shape == (1, 3, 44, 36)
    close(out.x1, image)  # with no level of its own x1 is the input


def test_broken_models_are_named(tmp_path: Path) -> None:
    micro_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"^model: .*model\.safetensors is broken: "):
        HitSR.from_pretrained(tmp_path, "cpu")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: "):
        HitSR.from_pretrained(tmp_path, "cpu")


def test_where_models_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PACKAGED", tmp_path / "packaged")
    for folder in (tmp_path / "packaged" / "small", tmp_path / "mine"):
        folder.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes(b"")
    assert find_weights("small") == tmp_path / "packaged" / "small"
    assert find_weights(tmp_path / "mine") == tmp_path / "mine"
    with pytest.raises(ModelNotFoundError, match=r"'other' is no packaged model \(small\), no folder"):
        find_weights("other")
    (tmp_path / "mine" / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"mine has no config\.json"):
        find_weights(tmp_path / "mine")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelNotFoundError, match=r"pip install 'hitsr-fast\[hub\]'"):
        find_weights("owner/name")


def test_class_id_and_input_together_are_an_error() -> None:
    with (
        pytest.warns(DeprecationWarning),
        pytest.raises(ValueError, match=r"class_id: expected .*, found class_id=0 and input='clean'"),
    ):
        HitSR(NearestModel()).upscale(torch.rand(1, 3, 5, 5), class_id=0, input="clean")


def test_scales_may_be_any_iterable() -> None:
    sr, image = HitSR(NearestModel()), torch.rand(1, 3, 5, 5)
    assert list(sr.upscale(image, scales=(factor for factor in (1, 2)))) == [1, 2]
    for wrong in (4, "4"):
        with pytest.raises(TypeError, match=f"scales: expected a list of factors, found {wrong!r}"):
            sr.upscale(image, scales=wrong)


def test_sampling_has_to_be_options() -> None:
    with pytest.raises(TypeError, match="sampling: expected SamplingOptions, found None"):
        UpscaleOptions(sampling=None)  # type: ignore[arg-type]


def test_a_model_that_is_not_laid_out_for_inference_is_an_error() -> None:
    with pytest.raises(TypeError, match="model: expected what `for_inference` gives, found a HitVar"):
        HitSR(micro_model())  # type: ignore[arg-type]
