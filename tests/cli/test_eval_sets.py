"""Released folders, protocols, outside pictures, saved results and resuming of `hitsr-fast eval`."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.nn import functional

from hitsr_fast.cli.eval import Eval
from hitsr_fast.evaluate import (
    Bicubic,
    Column,
    EvaluationError,
    Journal,
    Pictures,
    columns_of,
    evaluate,
    find_set,
    runnable,
)
from hitsr_fast.evaluate.pair_set import make_pairs
from hitsr_fast.evaluate.protocols import PROTOCOLS
from hitsr_fast.metrics import METRICS, imresize, psnr_rgb, psnr_y


def photo(seed: int, height: int, width: int) -> Image.Image:
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return Image.fromarray((smooth * 255).round().byte().permute(1, 2, 0).numpy())


def write(path: Path, seed: int, height: int = 48, width: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(seed, height, width).save(path)


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def run(*args: str | Path) -> int:
    return tyro.cli(Eval, args=[str(arg) for arg in args]).run()


RELEASES = {
    "RealSR": ("Canon/Test/4/Canon_001_HR", "Canon/Test/4/Canon_001_LR4", "Canon_001"),
    "RealSR Nikon": ("Nikon/Test/4/Nikon_001_HR", "Nikon/Test/4/Nikon_001_LR4", "Nikon_001"),
    "DRealSR": ("Test_x4/test_HR/Canon_10_x4", "Test_x4/test_LR/Canon_10_x1", "Canon_10"),
    "StableSR": ("test_HR/0801_pch_00001", "test_LR/0801_pch_00001", "0801_pch_00001"),
    "DIV2K_V2_val": ("gt/0801_pch_00001", "lq/0801_pch_00001", "0801_pch_00001"),
    "DIV2K": ("DIV2K_valid_HR/0801", "DIV2K_valid_LR_bicubic/X4/0801x4", "0801"),
    "Set14": ("image_SRF_4/img_001_SRF_4_HR", "image_SRF_4/img_001_SRF_4_LR", "img_001_SRF_4"),
    "VARSR": ("HR/a", "LR/a", "a"),
    "DIV2K in short": ("HR/0801", "LR_bicubic/X4/0801x4", "0801"),
}


@pytest.mark.parametrize("release", RELEASES)
def test_released_folders_are_read(tmp_path: Path, release: str) -> None:
    hr, lr, name = RELEASES[release]
    write(tmp_path / f"{hr}.png", 0)
    write(tmp_path / f"{lr}.png", 0, 12, 16)
    found = find_set("set", tmp_path)
    assert [pair.name for pair in found.pairs] == [name]
    loaded = found.load(0)
    assert loaded.hr is not None
    assert (loaded.hr.shape, loaded.lr.shape) == ((1, 3, 48, 64), (1, 3, 12, 16))
    assert not loaded.notes


def test_both_cameras_of_realsr_are_one_set(tmp_path: Path) -> None:
    for camera in ("Canon", "Nikon"):
        write(tmp_path / f"{camera}/Test/4/{camera}_001_HR.png", 0)
        write(tmp_path / f"{camera}/Test/4/{camera}_001_LR4.png", 0, 12, 16)
    assert [pair.name for pair in find_set("RealSR", tmp_path).pairs] == ["Canon_001", "Nikon_001"]


def test_inputs_of_the_size_of_hr_are_brought_down(tmp_path: Path) -> None:
    write(tmp_path / "a_HR.png", 0, 49, 64)
    write(tmp_path / "a_LR4.png", 1, 49, 64)
    loaded = find_set("RealSR", tmp_path).load(0)
    expected = imresize(tensor(photo(1, 49, 64))[..., :48, :], 1 / 4)
    assert torch.equal(loaded.lr, (expected.clamp(0, 1) * 255).round() / 255)
    assert loaded.hr is not None and loaded.hr.shape == (1, 3, 48, 64)
    assert "brought down to 1/4" in loaded.notes[0]


def test_a_missing_partner_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}_HR.png", 0)
    write(tmp_path / "a_LR.png", 0, 12, 16)
    out = tmp_path / "out.json"
    assert run("--set", f"s={tmp_path}", "--model", "--metrics", "psnr", "--out", out, "--device", "cpu") == 0
    printed = capsys.readouterr()
    assert printed.err.count("without a partner") == 1 and "b_HR.png" in printed.err
    report = json.loads(out.read_text())
    assert {image["image"] for image in report["images"]} == {"a"}
    assert len(report["notes"]) == 1 and "b_HR.png" in report["notes"][0]


def test_sets_without_ground_truth(tmp_path: Path) -> None:
    write(tmp_path / "lq/001.png", 0, 24, 32)
    found = find_set("RealLQ250", tmp_path)
    assert not found.has_truth and find_set("x", None, tmp_path / "lq").pairs == found.pairs
    write(tmp_path / "other/LR/001.png", 0, 24, 32)
    assert not find_set("x", tmp_path / "other").has_truth
    with pytest.raises(EvaluationError, match="RealLQ250: has no ground truth"):
        evaluate([found], [Bicubic()], columns=columns_of(["psnr"]))


def test_centre_crop(tmp_path: Path) -> None:
    write(tmp_path / "a_HR.png", 0, 64, 80)
    write(tmp_path / "a_LR.png", 1, 16, 20)
    loaded = find_set("s", tmp_path, center_crop=32).load(0)
    assert loaded.hr is not None
    assert torch.equal(loaded.hr, tensor(photo(0, 64, 80))[..., 16:48, 24:56])
    assert torch.equal(loaded.lr, tensor(photo(1, 16, 20))[..., 4:12, 6:14])
    assert "keep their sides" in find_set("s", tmp_path, center_crop=72).load(0).notes[0]
    with pytest.raises(EvaluationError, match="center_crop: expected a multiple of 4"):
        find_set("s", tmp_path, center_crop=30)


def test_channels_and_borders_are_columns(tmp_path: Path) -> None:
    write(tmp_path / "a_HR.png", 0)
    write(tmp_path / "a_LR.png", 0, 12, 16)
    columns = columns_of(["psnr"], ["y", "rgb"], [4, 0])
    report = evaluate([find_set("s", tmp_path)], [Bicubic()], scales=[4], columns=columns)
    result = tensor(photo(0, 12, 16).resize((64, 48), Image.Resampling.BICUBIC))
    truth = tensor(photo(0, 48, 64))
    assert report.scores[0].values == {
        f"psnr_{channel}_border_{border}": measure(result, truth, border).item()
        for border in (4, 0)
        for channel, measure in (("y", psnr_y), ("rgb", psnr_rgb))
    }
    assert report.head[4:6] == ("PSNR-Y border 4", "PSNR-RGB border 4")
    for wrong in ({"metrics": ["other"]}, {"metrics": ["psnr"], "borders": [-1]}, {"metrics": []}):
        with pytest.raises(EvaluationError, match="expected"):
            columns_of(**wrong)  # type: ignore[arg-type]


def test_protocols() -> None:
    own, papers, iqa = (PROTOCOLS[name] for name in ("own", "papers", "iqa"))
    assert (own.channels, own.borders, own.colour_fix, own.center_crop) == (("y",), ("scale",), True, None)
    assert (papers.channels, papers.borders, papers.colour_fix, papers.center_crop) == (
        ("y",),
        (0,),
        False,
        512,
    )
    assert (iqa.channels, iqa.borders, iqa.colour_fix, iqa.scales) == (("rgb",), (0,), False, (4,))
    names, notes = runnable(papers, saves=False)
    assert "fid" not in names and any(note.startswith("FID left out") for note in notes)


def test_pictures_of_another_program(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"set/{name}_HR.png", 0)
        write(tmp_path / f"set/{name}_LR.png", 0, 12, 16)
    write(tmp_path / "peer/s/x4/a_LR.png", 3)
    report = evaluate(
        [find_set("s", tmp_path / "set")], [Pictures("peer", tmp_path / "peer")], columns=columns_of(["psnr"])
    )
    (score,) = report.scores
    assert (score.image, score.scale) == ("a", 4)
    assert score.values["psnr_y"] == psnr_y(tensor(photo(3, 48, 64)), tensor(photo(0, 48, 64)), 4).item()
    assert "peer has no x4 pictures of s: b" in report.notes
    assert "peer has no x1 pictures of s" in report.notes
    write(tmp_path / "flat/a.png", 3, 40, 64)
    with pytest.raises(EvaluationError, match=r"peer on s/a x4 .*a.png\): expected shape"):
        evaluate(
            [find_set("s", tmp_path / "set")],
            [Pictures("peer", tmp_path / "flat")],
            columns=columns_of(["psnr"]),
        )


class Counting(Bicubic):
    """Counts its calls, and can be interrupted."""

    def __init__(self, stop_at: int = -1) -> None:
        self.calls, self.stop_at = 0, stop_at

    def upscale(self, lr: Tensor, scales: Sequence[int]) -> dict[int, Tensor]:
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        return super().upscale(lr, scales)


def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / f"set/{name}_HR.png", ord(name))
        write(tmp_path / f"set/{name}_LR.png", ord(name), 12, 16)
    eval_set, columns = find_set("s", tmp_path / "set"), columns_of(["psnr"])
    expected = evaluate([eval_set], [Bicubic()], columns=columns)
    place = tmp_path / "t.json.scores.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate([eval_set], [Counting(2)], columns=columns, journal=Journal(place))
    with place.open("a") as file:
        file.write('{"torn')
    rest = Counting()
    assert evaluate([eval_set], [rest], columns=columns, journal=Journal(place)) == expected
    assert rest.calls == 1
    other = Counting()
    evaluate([eval_set], [other], columns=columns, journal=Journal(place), settings_digest="other")
    assert other.calls == 3
    write(tmp_path / "set/b_LR.png", 9, 12, 16)
    changed = Counting()
    evaluate([eval_set], [changed], columns=columns, journal=Journal(place))
    assert changed.calls == 1


def test_results_are_saved_and_drawn(tmp_path: Path) -> None:
    write(tmp_path / "set/a_HR.png", 0)
    write(tmp_path / "set/a_LR.png", 0, 12, 16)
    saved, sheet = tmp_path / "saved", tmp_path / "sheet.png"
    arguments = ("--set", f"s={tmp_path}/set", "--model", "--metrics", "psnr", "--device", "cpu")
    arguments += ("--out", tmp_path / "t.md", "--save", saved, "--sheet", sheet)
    assert run(*arguments) == 0
    with Image.open(saved / "bicubic/s/x4/a.png") as image:
        expected = photo(0, 12, 16).resize((64, 48), Image.Resampling.BICUBIC)
        assert image.convert("RGB").tobytes() == expected.tobytes()
    with Image.open(sheet) as image:
        assert image.size == (3 * (192 + 6) + 6, 16 + 6 + 192 + 6 + 16)
    (saved / "bicubic/s/x2/a.png").unlink()
    assert run(*arguments) == 0
    assert (saved / "bicubic/s/x2/a.png").is_file()


def test_pairs_are_made_and_gone_on_with(tmp_path: Path) -> None:
    write(tmp_path / "photos/p.png", 0, 90, 100)
    write(tmp_path / "photos/q.png", 1, 80, 70)
    write(tmp_path / "photos/small.png", 1, 40, 70)
    first = make_pairs(tmp_path / "photos", tmp_path / "one", count=5, crop=64, seed=2)
    assert (first.made, first.found) == (5, 0) and "small.png" in first.notes[0]
    found = find_set("s", tmp_path / "one")
    assert len(found.pairs) == 5 and found.load(0).lr.shape == (1, 3, 16, 16)
    listed = json.loads((tmp_path / "one/manifest.json").read_text())["pairs"]
    pair = listed[0]
    source = Image.open(tmp_path / "photos" / pair["photo"])
    cut = source.crop((pair["left"], pair["top"], pair["left"] + 64, pair["top"] + 64))
    assert Image.open(tmp_path / f"one/HR/{pair['name']}.png").tobytes() == cut.tobytes()
    (tmp_path / f"one/LR/{pair['name']}.png").unlink()
    again = make_pairs(tmp_path / "photos", tmp_path / "one", count=5, crop=64, seed=2)
    assert (again.made, again.found, again.digest) == (1, 4, first.digest)
    with pytest.raises(EvaluationError, match="holds another set, of other seed"):
        make_pairs(tmp_path / "photos", tmp_path / "one", count=5, crop=64, seed=3)


def test_what_lies_in_the_folder_of_pairs_is_not_trusted(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    write(photos / "p.png", 0, 90, 100)
    first = make_pairs(photos, out, count=3, crop=64)
    place = out / "HR/p_00001.png"
    original = place.read_bytes()
    write(place, 5, 64, 64)
    again = make_pairs(photos, out, count=3, crop=64)
    assert (again.made, again.found, again.digest) == (1, 2, first.digest)
    assert "p_00001" in again.notes[0] and place.read_bytes() == original
    write(out / "HR/foreign.png", 1)
    with pytest.raises(EvaluationError, match=r"HR: expected images of this set only, found foreign\.png"):
        make_pairs(photos, out, count=3, crop=64)
    write(tmp_path / "other/LR/p_00000.png", 1)
    with pytest.raises(EvaluationError, match="LR: expected images of this set only"):
        make_pairs(photos, tmp_path / "other", count=3, crop=64)
    for inside in (photos, photos / "set", tmp_path):
        with pytest.raises(EvaluationError, match="out: expected a folder apart from the photos"):
            make_pairs(photos, inside, count=3, crop=64)


def test_interrupted_pairs_keep_the_manifest(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    write(photos / "p.png", 0, 90, 100)

    def stop(name: str) -> None:
        if name == "p_00002":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_pairs(photos, out, count=3, crop=64, progress=stop)
    manifest = json.loads((out / "manifest.json").read_text())
    assert [pair["name"] for pair in manifest["pairs"]] == ["p_00000", "p_00001"] and "digest" not in manifest
    whole = make_pairs(photos, out, count=3, crop=64)
    assert (whole.made, whole.found) == (1, 2)
    text = (out / "manifest.json").read_text()
    assert json.loads(text)["digest"] == whole.digest
    with pytest.raises(KeyboardInterrupt):
        make_pairs(photos, out, count=3, crop=64, progress=stop)
    assert (out / "manifest.json").read_text() == text


def test_names_that_end_like_marks_stay_apart(tmp_path: Path) -> None:
    for name in ("box1", "box2"):
        write(tmp_path / f"HR/{name}.png", 0)
        write(tmp_path / f"LR/{name}.png", 0, 12, 16)
        write(tmp_path / f"X4/{name}x4.png", 0, 12, 16)
        write(tmp_path / f"peer/{name}.png", ord(name[-1]))
    for found in (
        find_set("s", tmp_path / "HR", tmp_path / "LR"),
        find_set("s", tmp_path / "HR", tmp_path / "X4"),
        find_set("s", tmp_path / "HR", degrade_seed=0),
    ):
        assert [pair.name for pair in found.pairs] == ["box1", "box2"] and not found.notes
    peer = Pictures("peer", tmp_path / "peer")
    assert peer.find("s", "box2", 4) == tmp_path / "peer/box2.png"
    with pytest.raises(EvaluationError, match=r"box2\.png: peer's result has the same name as box1\.png"):
        peer.find("s", "bo", 4)


def test_inputs_of_one_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.png", 0)
    write(tmp_path / "a.jpg", 0)
    with pytest.raises(EvaluationError, match=r"a\.png: has the same name as a\.jpg"):
        find_set("s", None, tmp_path)


def test_the_hr_half_of_a_release_is_enough_to_degrade(tmp_path: Path) -> None:
    write(tmp_path / "DIV2K_valid_HR/0801.png", 0)
    (pair,) = find_set("s", tmp_path, degrade_seed=0).pairs
    assert pair.hr == tmp_path / "DIV2K_valid_HR/0801.png"


def test_names_that_would_be_one_file_are_refused(tmp_path: Path) -> None:
    for name in ("a!b", "A?b", "c"):
        write(tmp_path / f"HR/{name}.png", 0)
    found, counting = find_set("s", tmp_path / "HR", degrade_seed=0), Counting()
    with pytest.raises(
        EvaluationError, match=r"images of s: expected names that differ as .*, found A\?b, a!b"
    ):
        evaluate([found], [counting], columns=columns_of(["psnr"]), save=tmp_path / "saved")
    assert not counting.calls and not (tmp_path / "saved").exists()


def test_a_foreign_picture_among_those_compared_is_said_before_any_work(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}/x.png", 0)
    metric = replace(METRICS["fid"], missing=lambda: None, measure=lambda results, truths: 0.0)
    columns, counting = [Column("fid", "FID", metric)], Counting()
    sets = [find_set(name, tmp_path / name, degrade_seed=0) for name in ("a", "b")]
    foreign = tmp_path / "saved/bicubic/b/x4/foreign.png"
    write(foreign, 0)
    with pytest.raises(EvaluationError, match=r"expected the pictures of this run only, found foreign\.png"):
        evaluate(sets, [counting], columns=columns, save=tmp_path / "saved", scales=[4])
    assert not counting.calls
    foreign.unlink()
    evaluate(sets, [counting], columns=columns, save=tmp_path / "saved", scales=[4])
    assert counting.calls == 2


def test_one_note_for_all_small_images_also_after_a_set_is_renamed(tmp_path: Path) -> None:
    for index in range(7):
        write(tmp_path / f"HR/{index}.png", index, 40, 40)
    write(tmp_path / "HR/large.png", 9, 64, 64)
    columns, place = columns_of(["psnr", "ssim"]), tmp_path / "t.scores.jsonl"
    methods = [Counting(), Pictures("peer", tmp_path / "HR")]
    for name in ("old", "new"):
        found = find_set(name, tmp_path / "HR", degrade_seed=0)
        report = evaluate([found], methods, columns=columns, scales=[1], journal=Journal(place))
        names = "0, 1, 2, 3, 4 and 2 more"
        assert f"{name} x1: SSIM-Y needs sides of 13 px, left out: {names}" in report.notes
        assert sum("SSIM" in note for note in report.notes) == 1
    assert methods[0].calls == 8  # of the second run none


def test_scores_of_another_package_are_kept_by_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.png", 0)
    found = find_set("s", tmp_path, degrade_seed=0)
    metric = replace(METRICS["musiq"], missing=lambda: None, measure=lambda image, border: image.mean()[None])
    for version, calls in (("1", 1), ("1", 0), ("2", 1)):
        monkeypatch.setattr(importlib.metadata, "version", lambda package, version=version: version)
        counting = Counting()
        columns, journal = [Column("musiq", "MUSIQ", metric)], Journal(tmp_path / "t.scores.jsonl")
        evaluate([found], [counting], columns=columns, journal=journal)
        assert (metric.version(), counting.calls) == (f"pyiqa {version}", calls)


def test_a_bar_in_a_name_does_not_part_cells(tmp_path: Path) -> None:
    write(tmp_path / "HR/a.png", 0)
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer/.hidden").touch()
    found = find_set("a|b", tmp_path / "HR", degrade_seed=0)
    methods = [Bicubic(), Pictures("peer", tmp_path / "peer")]
    report = evaluate([found], methods, columns=columns_of(["psnr"]), scales=[4])
    assert report.markdown().splitlines()[2].startswith(r"| a\|b | x4 | bicubic |")
    assert report.notes == ("peer has no x4 pictures of a|b",)


def test_the_limits_in_the_documentation_are_those_of_the_metrics() -> None:
    text = " ".join((Path(__file__).parents[2] / "docs/evaluation.md").read_text().split())
    sides = {title: METRICS[name].min_side for title, name in (("NIQE", "niqe"), ("MANIQA", "maniqa"))}
    assert all(f"{side} px for {title}" in text for title, side in sides.items())
