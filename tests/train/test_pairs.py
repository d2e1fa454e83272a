"""Low-resolution images of training: keyed by the sample alone, made without a host read."""

from __future__ import annotations

import typing
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hitsr_fast.data.degradation import degrade, lr_pair
from hitsr_fast.data.degradation_config import PRESETS, DegradationConfig
from hitsr_fast.data.sharpen import unsharp_mask
from hitsr_fast.train.config import DataConfig
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.pairs import lr_pairs, targets
from hitsr_fast.train.task import images_of
from tests.train import task_checks as checks
from tests.train.fake_gpu import DEVICE, FakeGpu, no_autocast


def crops(count: int, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, side // 4, side // 4, generator=generator)
    return torch.nn.functional.interpolate(small, size=(side, side), mode="bicubic").clamp(0, 1) * 2 - 1


def draw(*index: int, seed: int = 0, phase: str = "phase", device: str = "cpu") -> Draw:
    return Draw(seed, phase, torch.tensor(index), device)


def test_a_sample_depends_on_its_key_alone() -> None:
    hr, data = crops(6), DataConfig(clean_prob=0.7)
    lr, class_id = lr_pairs(hr, draw(*range(10, 16)), data)
    assert lr.shape == (6, 3, 8, 8)
    assert class_id.dtype == torch.int64
    assert set(class_id.tolist()) == {0, 1}
    for rows in ([0, 2, 4], [1, 3, 5], [5], [3, 0]):
        part, part_class = lr_pairs(hr[rows], draw(*(10 + row for row in rows)), data)
        assert torch.equal(part, lr[rows])
        assert torch.equal(part_class, class_id[rows])
    for other in (draw(*range(10, 16), seed=1), draw(*range(10, 16), phase="other"), draw(*range(20, 26))):
        assert not torch.equal(lr_pairs(hr, other, data)[0], lr)


def test_range_and_grid() -> None:
    lr, _ = lr_pairs(crops(4), draw(*range(4)), DataConfig())
    levels = (lr + 1) * 127.5
    assert -1 <= lr.min() < lr.max() <= 1
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


def test_share_and_strength_are_those_of_the_data() -> None:
    hr, keys = crops(1, 8).expand(300, -1, -1, -1), draw(*range(300))
    clean = lr_pairs(hr, keys, DataConfig(clean_prob=0.25))[1].float().mean()
    assert 0.15 < clean < 0.35
    for prob in (0.0, 1.0):
        assert lr_pairs(hr[:4], keys[:4], DataConfig(clean_prob=prob))[1].eq(int(prob)).all()
    hr = crops(8)
    true = lr_pairs(hr, keys[:8], DataConfig(clean_prob=1.0))[0]
    errors = [
        (lr_pairs(hr, keys[:8], DataConfig(clean_prob=0.0, degradation=kind))[0] - true).square().mean()
        for kind in ("varsr", "x4plus", "real-esrgan")
    ]
    assert errors[0] < min(errors[1:])


def test_every_preset_can_be_trained_with() -> None:
    """By the names of the presets; the default keeps what earlier runs had."""
    field = typing.get_type_hints(DataConfig)["degradation"]
    assert typing.get_args(field) == tuple(PRESETS)
    assert PRESETS[DataConfig().degradation] == DegradationConfig()


def test_targets_are_the_photos_unless_asked_otherwise() -> None:
    hr = crops(2)
    assert targets(hr, DataConfig(degradation="x4plus")) is hr
    sharp = targets(hr, DataConfig(sharp_target=True))
    torch.testing.assert_close((sharp + 1) / 2, unsharp_mask((hr + 1) / 2), rtol=0, atol=1e-6)
    assert (sharp - hr).abs().max() > 0.05


def test_a_task_sharpens_its_targets_and_not_what_it_degrades() -> None:
    """LR images are made of the photos as they are."""
    batch = checks.samples()
    draw, images = checks.draw_of(batch), images_of(batch)
    for task in (checks.make(checks.NEXT_SCALE), checks.make(checks.TOKENIZE)):
        plain, plain_lr, _ = task.pairs(batch, draw)
        task.data = replace(task.data, sharp_target=True)
        sharp, lr, _ = task.pairs(batch, draw)
        assert torch.equal(plain, images)
        assert torch.equal(sharp, task.images(batch))
        assert torch.equal(sharp, targets(images, task.data)) and not torch.equal(sharp, images)
        assert torch.equal(lr, plain_lr)


def test_autocast_changes_nothing() -> None:
    hr = crops(2)
    expected = lr_pairs(hr, draw(0, 1), DataConfig(clean_prob=0.0))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lr_pairs(hr, draw(0, 1), DataConfig(clean_prob=0.0))[0], expected)


def test_nothing_is_read_back() -> None:
    with no_autocast(), FakeGpu():
        for step in range(3):
            hr = torch.zeros(5, 3, 32, 32, device=DEVICE)
            index = torch.arange(5 * step, 5 * step + 5)
            for kind in PRESETS:
                data = DataConfig(clean_prob=0.3, degradation=kind, sharp_target=True)  # type: ignore[arg-type]
                assert targets(hr, data).is_meta
                lr, class_id = lr_pairs(hr, Draw(0, "phase", index, DEVICE), data)
                assert lr.is_meta and class_id.is_meta
                assert lr.shape == (5, 3, 8, 8)
            assert lr_pair(hr, step, clean_prob=0.3)[0].is_meta
            assert degrade(hr, step).is_meta


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="hr"):
        lr_pairs(crops(1)[..., :30], draw(0), DataConfig())
    with pytest.raises(ValueError, match="keys"):
        lr_pairs(crops(2), draw(0), DataConfig())
