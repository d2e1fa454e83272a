"""`nearest_code` against what people use today."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks._harness import (
    AuditPlan,
    Benchmark,
    Call,
    Case,
    Provider,
    ScoreLoop,
    missing_package,
    package_version,
)
from benchmarks._providers import missing_compiler
from hitsr_fast import __version__
from hitsr_fast.dispatch import operations, use_backend
from hitsr_fast.ops import nearest_code, prepare_codebook
from hitsr_fast.ops import nearest_code_triton as triton
from hitsr_fast.ops.nearest_code_cpu import instruction_sets
from hitsr_fast.reference.nearest_code import nearest_code as reference

Inputs = tuple[Tensor, ...]
Search = Callable[[Tensor], Tensor]  # (N, C) -> (N,)


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
) -> Callable[[NearestCodeCase, Inputs], str | None]:
    """`unavailable` of a peer: the devices and cases that it is written for, then what the machine lacks."""

    def unavailable(case: NearestCodeCase, inputs: Inputs) -> str | None:
        device = inputs[0].device.type
        if device not in devices:
            return f"does not run on {device}"
        if (case.metric, case.dtype) != ("l2", "float32"):
            return f"needs l2 and float32, found {case.metric} and {case.dtype}"
        return next((text for text in (reason() for reason in reasons) if text), None)

    return unavailable


def _distance_matrix_argmin(x: Tensor, codebook: Tensor) -> Tensor:
    """As VAR's quantizer writes it."""
    distance = x.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1)
    distance.addmm_(x, codebook.T, alpha=-2, beta=1)
    return distance.argmin(dim=1)


def _torch(codebook: Tensor) -> Search:
    return lambda x: _distance_matrix_argmin(x, codebook)


def _torch_compile(codebook: Tensor) -> Search:
    torch.compiler.reset()  # each case has shapes of its own, and their number is limited
    compiled = torch.compile(_distance_matrix_argmin, fullgraph=True, dynamic=False)
    return lambda x: compiled(x, codebook)


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


def _ours(backend: str, isa: str = "", *, prepared: bool = False) -> Provider[NearestCodeCase]:
    """One of our backends; `isa` holds the CPU's to an instruction set, else it is the best there is."""

    def set_of() -> str:
        return isa or instruction_sets()[0] if backend == "cpu" else ""

    def build(case: NearestCodeCase, inputs: Inputs) -> Call:
        x, codebook = inputs
        chosen = set_of()
        with _cpu_isa(chosen):
            codes = prepare_codebook(codebook, metric=case.metric) if prepared else codebook

        def search() -> Tensor:
            with _cpu_isa(chosen), use_backend(backend):
                return nearest_code(x, codes, metric=case.metric)

        return search

    def unavailable(case: NearestCodeCase, inputs: Inputs) -> str | None:
        reason = operations()["nearest_code"].reasons(*inputs, [], "", case.metric)[backend]
        if reason is not None:
            return reason
        if isa and isa not in instruction_sets():
            return f"this machine has no {isa}, but {', '.join(instruction_sets())}"
        if backend == "triton" and inputs[0].device.type == "cpu":
            return "Triton's interpreter is not worth timing"
        return None

    name = ":".join(part for part in (backend, isa, "prepared" if prepared else "") if part)
    return Provider(
        name=name,
        build=build,
        unavailable=unavailable,
        version=lambda: f"{__version__} {set_of()}".strip(),
        ours=True,
        limit=isa if isa == "avx2" else "",
    )


@contextmanager
def _cpu_isa(name: str) -> Iterator[None]:
    """HITSR_FAST_CPU_ISA in this context; as it was, if the name is empty."""
    if not name:
        yield
        return
    before = os.environ.get("HITSR_FAST_CPU_ISA")
    os.environ["HITSR_FAST_CPU_ISA"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["HITSR_FAST_CPU_ISA"]
        else:
            os.environ["HITSR_FAST_CPU_ISA"] = before


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
        _peer("torch", _torch, unavailable=_only(), version=package_version("torch")),
        _peer(
            "torch.compile",
            _torch_compile,
            unavailable=_only(missing_compiler),
            version=package_version("torch"),
        ),
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
        _ours("reference"),
        _ours("cpu"),
        _ours("cpu", prepared=True),
        _ours("cpu", "avx512_bf16"),
        _ours("cpu", "avx512"),
        _ours("cpu", "avx2"),
        _ours("cpu", "portable"),
        _ours("triton"),
        _ours("triton", prepared=True),
    ),
    cases=(
        NearestCodeCase(65536, 4096, 32),
        NearestCodeCase(16384, 16384, 32),
        NearestCodeCase(65536, 1024, 8),
        NearestCodeCase(65536, 1024, 8, G=4),
        NearestCodeCase(3452, 4096, 32),
    ),
    quick=(NearestCodeCase(300, 130, 8), NearestCodeCase(100, 70, 32, G=2)),
    audit=AuditPlan(
        cases=(NearestCodeCase(65536, 4096, 32), NearestCodeCase(65536, 1024, 8)),
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
