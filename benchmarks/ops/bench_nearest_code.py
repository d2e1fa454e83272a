"""`nearest_code` against what people use today."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks._harness import (
    AuditPlan,
    Benchmark,
    Call,
    Case,
    Inputs,
    Provider,
    ScoreLoop,
    Unavailable,
    missing_package,
    package_version,
)
from benchmarks._providers import OpCall, compiled, missing_compiler, our_backends, ours
from benchmarks.shapes import MODELS
from hitsr_fast.ops import nearest_code, prepare_codebook
from hitsr_fast.ops import nearest_code_triton as triton
from hitsr_fast.reference.nearest_code import nearest_code as reference

Search = Callable[[Tensor], Tensor]  # (N, C) -> (N,)

_HIT, _HITOK = MODELS["hit-d16"], MODELS["hitoksr"]


@dataclass(frozen=True)
class NearestCodeCase(Case):
    """`N` rows, `K` codes of `C` channels, in `G` groups; rows and codes are normally distributed."""

    N: int
    K: int
    C: int
    G: int = 1
    dtype: str = "float32"
    metric: Literal["l2", "cosine"] = "l2"

    @property
    def flops(self) -> int:
        return 2 * self.N * self.K * self.C * self.G

    @property
    def items(self) -> int:
        return self.N * self.G

    def inputs(self, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        groups = (self.G,) if self.G > 1 else ()
        x = torch.randn(*groups, self.N, self.C, generator=generator)
        codebook = torch.randn(*groups, self.K, self.C, generator=generator)
        dtype = getattr(torch, self.dtype)
        return x.to(device, dtype), codebook.to(device, dtype)

    def expected(self, *inputs: Tensor) -> Tensor:
        x, codebook = inputs
        return reference(x, codebook, self.metric)

    def wrong_rows(self, result: Tensor, expected: Tensor) -> int:
        return int((result.to(expected.device) != expected).sum())


def _by_group(prepare: Callable[[Tensor], Search]) -> Callable[[NearestCodeCase, Inputs], Call]:
    """`build` of a provider that knows no groups: one search after the other."""

    def build(case: NearestCodeCase, inputs: Inputs) -> Call:
        x, codebook = inputs
        if case.G == 1:
            search = prepare(codebook)
            return lambda: search(x)
        searches = [prepare(codes) for codes in codebook]
        return lambda: torch.stack([find(rows) for find, rows in zip(searches, x, strict=True)])

    return build


def _only(
    *reasons: Callable[[], str | None], devices: tuple[str, ...] = ("cpu", "cuda")
) -> Unavailable[NearestCodeCase]:
    """`unavailable` of a peer: the devices and cases that it is written for, then what the machine lacks."""

    def unavailable(case: NearestCodeCase, inputs: Inputs) -> str | None:
        device = inputs[0].device.type
        if device not in devices:
            return f"does not run on {device}"
        if (case.metric, case.dtype) != ("l2", "float32"):
            return f"needs l2 and float32, found {case.metric} and {case.dtype}"
        return next((text for text in (reason() for reason in reasons) if text), None)

    return unavailable


def distance_matrix_argmin(x: Tensor, codebook: Tensor) -> Tensor:
    """As VAR's quantizer writes it."""
    distance = x.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1)
    distance.addmm_(x, codebook.T, alpha=-2, beta=1)
    return distance.argmin(dim=1)


def _torch(codebook: Tensor) -> Search:
    return lambda x: distance_matrix_argmin(x, codebook)


def _torch_compile(codebook: Tensor) -> Search:
    function = compiled(distance_matrix_argmin)
    return lambda x: function(x, codebook)


def _faiss(level: str | None = None) -> Callable[[Tensor], Search]:
    """An exact index, held to an instruction set if one is named."""

    def prepare(codebook: Tensor) -> Search:
        faiss = importlib.import_module("faiss")
        # By default small problems go one row at a time, which is several times slower.
        faiss.cvar.distance_compute_blas_threshold = 1
        index = faiss.IndexFlatL2(codebook.shape[1])
        index.add(codebook.numpy())

        def search(x: Tensor) -> Tensor:
            _, found = index.search(x.numpy(), 1)
            return torch.from_numpy(found[:, 0])

        def limited(x: Tensor) -> Tensor:
            best = faiss.SIMDConfig.get_level()
            faiss.SIMDConfig.set_level(faiss.to_simd_level(level))
            found = search(x)
            faiss.SIMDConfig.set_level(best)
            return found

        return limited if level else search

    return prepare


def _faiss_threads(threads: int) -> int:
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(threads)
    used: int = faiss.omp_get_max_threads()
    return used


def _faiss_version() -> str:
    config = getattr(importlib.import_module("faiss"), "SIMDConfig", None)
    return f"{package_version('faiss-cpu')()} {config.get_level_name() if config else ''}".strip()


def _missing_faiss_level() -> str | None:
    config = getattr(importlib.import_module("faiss"), "SIMDConfig", None)
    if config is None or not config.has_dynamic_dispatch():
        return "needs a faiss that chooses its instruction set at run time"
    return None


def _sklearn(codebook: Tensor) -> Search:
    argmin = importlib.import_module("sklearn.metrics").pairwise_distances_argmin
    codes = codebook.numpy()
    return lambda x: torch.from_numpy(argmin(x.numpy(), codes))


def _sklearn_threads(threads: int) -> int:
    pools = importlib.import_module("threadpoolctl")
    importlib.import_module("sklearn.metrics")
    pools.threadpool_limits(threads)
    return max(int(pool["num_threads"]) for pool in pools.threadpool_info())


def _keops(codebook: Tensor) -> Search:
    importlib.import_module("pykeops").set_verbose(False)
    lazy = importlib.import_module("pykeops.torch").LazyTensor
    codes = lazy(codebook[None])

    def search(x: Tensor) -> Tensor:
        indices: Tensor = ((lazy(x[:, None]) - codes) ** 2).sum(-1).argmin(dim=1)
        return indices[:, 0]

    return search


def _our_call(case: NearestCodeCase, inputs: Inputs) -> Call:
    return lambda: nearest_code(*inputs, metric=case.metric)


def _prepared_call(case: NearestCodeCase, inputs: Inputs) -> Call:
    codes = prepare_codebook(inputs[1], metric=case.metric)
    return lambda: nearest_code(inputs[0], codes, metric=case.metric)


def _ops(case: NearestCodeCase, inputs: Inputs) -> list[OpCall]:
    return [("nearest_code", (*inputs, [], "", case.metric))]


def _peer(name: str, prepare: Callable[[Tensor], Search], **options: Any) -> Provider[NearestCodeCase]:
    return Provider(name=name, build=_by_group(prepare), **options)


def _compile_triton(case: NearestCodeCase) -> object:
    x, codebook = case.inputs(torch.device("cpu"))
    return triton.nearest_code_triton(x, codebook, [], "", case.metric)


def _scores_per_turn(case: NearestCodeCase, target: str) -> int:
    blocks = triton.screen_constants(case.C)
    return blocks["BLOCK_N"] * blocks["BLOCK_K"] * blocks["PARTS"]


BENCHMARK = Benchmark(
    op="nearest_code",
    providers=(
        _peer("torch", _torch, unavailable=_only()),
        _peer("torch.compile", _torch_compile, unavailable=_only(missing_compiler)),
        _peer(
            "faiss-cpu",
            _faiss(),
            unavailable=_only(lambda: missing_package("faiss"), devices=("cpu",)),
            version=_faiss_version,
            set_threads=_faiss_threads,
        ),
        _peer(
            "faiss-cpu:avx2",
            _faiss("AVX2"),
            unavailable=_only(lambda: missing_package("faiss"), _missing_faiss_level, devices=("cpu",)),
            version=lambda: f"{package_version('faiss-cpu')()} AVX2",
            set_threads=_faiss_threads,
            limit="avx2",
        ),
        _peer(
            "scikit-learn",
            _sklearn,
            unavailable=_only(lambda: missing_package("sklearn"), devices=("cpu",)),
            version=package_version("scikit-learn"),
            set_threads=_sklearn_threads,
        ),
        _peer(
            "pykeops",
            _keops,
            unavailable=_only(lambda: missing_package("pykeops"), missing_compiler),
            version=package_version("pykeops"),
            # It has no setting of its own: it counts on OMP_NUM_THREADS, which the harness checks.
            set_threads=lambda threads: int(os.environ["OMP_NUM_THREADS"]),
        ),
        *our_backends(_our_call, _ops, ("reference", "cpu", "triton")),
        ours("cpu", _prepared_call, _ops, variant="prepared"),
        ours("triton", _prepared_call, _ops, variant="prepared"),
        *(ours("cpu", _our_call, _ops, isa=isa) for isa in ("avx512_bf16", "avx512", "avx2", "portable")),
    ),
    cases=(
        NearestCodeCase(65536, _HIT.K, _HIT.C),
        NearestCodeCase(16384, 16384, 32),
        NearestCodeCase(65536, _HITOK.K, _HITOK.C),
        NearestCodeCase(65536, _HITOK.K, _HITOK.C, _HITOK.G),
        NearestCodeCase(_HIT.tokens, _HIT.K, _HIT.C),
    ),
    quick=(NearestCodeCase(300, 130, 8), NearestCodeCase(100, 70, 32, G=2)),
    audit=AuditPlan(
        cases=(NearestCodeCase(65536, _HIT.K, _HIT.C), NearestCodeCase(65536, _HITOK.K, _HITOK.C)),
        launch=_compile_triton,
        loops={
            "_nearest_code_screen_kernel": ScoreLoop(
                scores=lambda case: case.N * case.K * case.G,
                per_turn=_scores_per_turn,
                tensor_flops=lambda case: 2 * case.N * case.K * case.G * triton.padded_channels(case.C),
            )
        },
    ),
)
