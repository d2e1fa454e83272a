"""The colour fix takes low frequencies from the input, and the same by rows as at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hitsr_fast.imaging.colour import RowColourFix, low_pass, wavelet_colour_fix
from tests.tolerances import TOLERANCES


def test_low_pass_is_the_dilated_binomial_filter() -> None:
    image = np.random.default_rng(0).random((20, 17))
    expected = image
    for step in (1, 2, 4):
        padded = np.pad(expected, step, mode="edge")
        expected = np.zeros_like(image)
        for dy, wy in ((0, 0.25), (1, 0.5), (2, 0.25)):
            for dx, wx in ((0, 0.25), (1, 0.5), (2, 0.25)):
                expected += wy * wx * padded[dy * step :, dx * step :][: image.shape[0], : image.shape[1]]
    found = low_pass(torch.from_numpy(image)[None, None], 3)[0, 0].numpy()
    np.testing.assert_allclose(found, expected, **TOLERANCES["float64_reordered"]._asdict())


def test_a_colour_shift_is_undone_and_detail_kept() -> None:
    lr = torch.rand(1, 3, 40, 40, dtype=torch.float64)
    shift = torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64)[:, None, None]
    fixed = wavelet_colour_fix(lr + shift, lr)
    torch.testing.assert_close(fixed, lr, **TOLERANCES["float64_reordered"]._asdict())
    detail = torch.zeros(1, 3, 40, 40, dtype=torch.float64)
    detail[..., 20, 20] = 1
    changed = (wavelet_colour_fix(lr + detail, lr) - (lr + detail)).abs().max()
    assert changed < 0.01  # one bright pixel has next to no low frequencies


def test_no_levels_leave_the_input() -> None:
    lr = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(wavelet_colour_fix(torch.rand(1, 3, 8, 8), lr, levels=0), lr)


@given(
    chunks=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    levels=st.integers(0, 4),
    seed=st.integers(0, 9),
)
def test_by_rows_it_equals_the_whole(chunks: list[int], levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    output, lr = torch.rand(2, 1, 2, sum(chunks), 9, generator=generator)
    fix = RowColourFix(levels)
    parts, kept, top = [], 0, 0
    for i, n in enumerate(chunks):
        rows = slice(top, top + n)
        parts.append(fix.add_rows(output[:, :, rows], lr[:, :, rows], last=i + 1 == len(chunks)))
        top += n
        kept = max(kept, top - sum(part.shape[2] for part in parts))
    assert kept <= 2**levels - 1
    expected = wavelet_colour_fix(output, lr, levels)
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, **TOLERANCES["float32_reordered"]._asdict())


def test_bad_arguments_are_named() -> None:
    x = torch.rand(1, 3, 4, 4)
    with pytest.raises(TypeError, match="expected one floating dtype"):
        wavelet_colour_fix(x, x.double())
    with pytest.raises(ValueError, match="shape"):
        wavelet_colour_fix(x, x[..., :3])
    with pytest.raises(ValueError, match="levels: expected at least 0, found -1"):
        wavelet_colour_fix(x, x, levels=-1)
