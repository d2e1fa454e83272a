"""The benchmark of the quantizer flags what is wrong, and leaves out what is too large."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ops.bench_residual_quantize import BENCHMARK, Expected, QuantizerCase, Result, eager_call

CPU = torch.device("cpu")


def expected(case: QuantizerCase) -> Expected:
    return case.expected(*case.inputs(CPU))


def test_a_few_codes_may_differ_but_not_the_error() -> None:
    case = QuantizerCase("encode", 8, K=60, C=4, model="toy")
    wanted = expected(case)
    result = wanted.result
    assert result.indices is not None and result.indices.numel() == 8 * 130
    assert case.wrong_rows(result, wanted) == 0
    flipped = result.indices.clone()
    flipped[0, 0] += 1
    assert case.wrong_rows(result._replace(indices=flipped), wanted) == 0
    flipped[1, 0] += 1
    assert case.wrong_rows(result._replace(indices=flipped), wanted) == 2
    farther = [wanted.latents[0] + 1.001 * (result.maps[0] - wanted.latents[0])]
    assert case.wrong_rows(result._replace(maps=farther), wanted) == 1


@pytest.mark.parametrize("task", ["decode", "steps"])
def test_maps_without_codes_are_compared_by_image(task: str) -> None:
    case = QuantizerCase(task, 3, K=60, C=4, model="toy")  # type: ignore[arg-type]
    wanted = expected(case)
    maps = [m.clone() for m in wanted.result.maps]
    assert case.wrong_rows(Result(None, maps), wanted) == 0
    maps[-1][1, 0, 0, 0] += 1
    assert case.wrong_rows(Result(None, maps), wanted) == 1


def test_gradients_are_compared() -> None:
    case = QuantizerCase("train", 2, K=60, C=4, model="toy")
    wanted = expected(case)
    assert len(wanted.result.gradients) == 3
    wrong = (2 * wanted.result.gradients[0], *wanted.result.gradients[1:])
    assert case.wrong_rows(wanted.result._replace(gradients=wrong), wanted) == 1


def test_the_eager_loop_runs_again_from_the_same_start() -> None:
    case = QuantizerCase("steps", 1, K=60, C=4, model="toy")
    call = eager_call(case, case.inputs(CPU))
    first, second = call(), call()
    assert all(torch.equal(a, b) for a, b in zip(first.maps, second.maps, strict=True))


def test_large_batches_are_left_to_gpus() -> None:
    assert [case.B for case in BENCHMARK.cases if case.unavailable(CPU)] == [64, 384]
    assert not any(case.unavailable(torch.device("cuda")) for case in BENCHMARK.cases)


def test_flops_are_those_of_the_facts() -> None:
    """0.905 GFLOP of search and 0.189 of convolutions an image."""
    assert QuantizerCase("encode", 1).flops == 2 * 4096 * 32 * 3452 + 10 * 18 * 32**2 * 32**2
    assert QuantizerCase("decode", 2).flops == 2 * 10 * 18 * 32**2 * 32**2
