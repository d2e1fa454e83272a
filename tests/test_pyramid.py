from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from hitsr_fast.models.hit_var.config import HIT_D16
from hitsr_fast.pyramid import ScalePyramid


def test_the_scales_of_hit_var() -> None:
    pyramid = HIT_D16.tokenizer.pyramid
    assert pyramid.lengths == (16, 36, 64, 100, 196, 256, 400, 576, 784, 1024)
    assert pyramid.ends == (16, 52, 116, 216, 412, 668, 1068, 1644, 2428, 3452)
    assert (pyramid.targets, pyramid.steps) == (((8, 8), (16, 16), (32, 32)), (3, 6, 10))
    assert pyramid.num_tokens == 3452
    assert pyramid.block_lengths(1024) == [1040, *pyramid.lengths[1:]]


def test_sizes_that_are_no_squares() -> None:
    pyramid = ScalePyramid([1, [2, 3], (4, 7)])  # type: ignore[list-item]  # as from a configuration file
    assert pyramid.sizes == ((1, 1), (2, 3), (4, 7))
    assert pyramid.scales == (1, [2, 3], (4, 7))
    assert (pyramid.lengths, pyramid.ends) == ((1, 6, 28), (1, 7, 35))
    assert (pyramid.targets, pyramid.steps) == (((4, 7),), (3,))


def test_a_target_takes_the_scales_that_fit_into_it() -> None:
    assert ScalePyramid([2, (3, 4), 4, (6, 8)], [4, (6, 8)]).steps == (3, 4)


def test_equal_sizes_are_one_pyramid_however_they_are_written() -> None:
    pyramid, same = ScalePyramid([1, 2]), ScalePyramid([(1, 1), (2, 2)], [2])
    assert pyramid == same and hash(pyramid) == hash(same)
    assert pyramid != ScalePyramid([1, 2], [1, 2]) and pyramid != ScalePyramid([1, 3])
    for twin in (copy.deepcopy(pyramid), pickle.loads(pickle.dumps(pyramid))):
        assert twin == pyramid and twin.ends == pyramid.ends
    with pytest.raises(AttributeError):
        pyramid.scales = (1,)  # type: ignore[misc]


def test_any_iterable_is_a_list() -> None:
    assert ScalePyramid(iter([1, 2]), iter([2])) == ScalePyramid([1, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [4, None, "12"])
def test_what_is_no_list_is_an_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"scales: expected a list of sides or \(height, width\), found"):
        ScalePyramid(wrong)
    with pytest.raises(TypeError, match=r"targets: expected a list of sides or \(height, width\), found"):
        ScalePyramid([1, 2], wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "scales: expected at least one, found none"),
        (([1, 0],), r"scales: expected a side or \(height, width\) of at least 1, found 0"),
        (([1, (2, -1)],), r"scales: expected a side or .*, found \(2, -1\)"),
        (([1, (2, 2, 2)],), r"scales: expected a side or .*, found \(2, 2, 2\)"),
        (([1.5],), r"scales: expected a side or .*, found 1\.5"),
        (([1, (2.0, 2)],), r"scales: expected a side or .*, found \(2\.0, 2\)"),
        ((["ab"],), "scales: expected a side or .*, found ab"),
        (([4, 2],), r"scales: expected none larger than the last, found \(4, 2\)"),
        (([(1, 3), 2],), "scales: expected none larger than the last"),
        (([1, 4], [2, 4]), r"targets: expected some of scales, up to the last, found \(2, 4\)"),
        (([1, 2, 4], [1, 2]), r"targets: expected some of scales, up to the last, found \(1, 2\)"),
        (([1, 2], [0, 2]), r"targets: expected a side or .*, found 0"),
    ],
)
def test_what_is_no_pyramid_is_an_error(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScalePyramid(*arguments)
