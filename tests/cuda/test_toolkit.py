"""The chips that a toolkit compiles for, by what its compiler lists."""

from __future__ import annotations

import pytest

from tests.cuda.toolkit import load_nvcc

OLDER = "sm_50 sm_52 sm_53 sm_60 sm_61 sm_62 sm_70 sm_72 sm_75 sm_80 sm_86 sm_87 sm_89 sm_90 sm_90a"
# As toolkits print them: 13.0's nvcc --list-gpu-code; of those before, ptxas --help, which has the same list.
LISTED = {
    "12.4": OLDER,
    "12.6": OLDER,
    "12.8": f"sm_100 sm_100a sm_101 sm_101a sm_120 sm_120a {OLDER}",
    "13.0": "sm_75 sm_80 sm_86 sm_87 sm_88 sm_89 sm_90 sm_100 sm_110 sm_103 sm_120 sm_121",
}


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("12.4", ("sm_80", "sm_90", "compute_90")),
        ("12.6", ("sm_80", "sm_90", "compute_90")),
        ("12.8", ("sm_80", "sm_90", "sm_100", "sm_120", "compute_90")),
        ("13.0", ("sm_80", "sm_90", "sm_100", "sm_120", "compute_90")),
    ],
)
def test_only_what_the_compiler_knows_is_asked_for(release: str, expected: tuple[str, ...]) -> None:
    nvcc = load_nvcc()
    for separator in ("\n", "','"):  # nvcc's, ptxas's
        assert nvcc.known_targets(LISTED[release].replace(" ", separator)) == expected
    assert [option.rpartition("=")[2] for option in nvcc.architectures(expected)] == list(expected)


def test_a_compiler_that_knows_none_is_no_toolkit() -> None:
    assert load_nvcc().known_targets("sm_50\nsm_75") == ()
