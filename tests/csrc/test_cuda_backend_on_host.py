"""The public ops on the CUDA backend, with the kernel's own code run by the CPU in place of a launch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hitsr_fast import dispatch, extension
from hitsr_fast.backends import Backend
from hitsr_fast.dispatch import BackendUnavailableError, use_backend
from hitsr_fast.ops import packed_codebook as packing
from hitsr_fast.ops import residual_decode, residual_quantize
from hitsr_fast.ops import residual_quantize_cuda as cuda
from tests.csrc.host_kernel import NEEDS_COMPILER, Problem, build, run
from tests.ops.backends import require
from tests.tolerances import TOLERANCES

SCALES, PHI = [(1, 2), (4, 4), (8, 6)], [0, 1, 1]

pytestmark = NEEDS_COMPILER


class OnHost(Backend):
    """Takes tensors of the CPU."""

    name = "cuda"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("program"), "-O2", "-march=native")


@pytest.fixture
def on_host(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend as it is, but for its answer whether it can run and for the launch."""

    def launch(
        z: Tensor | None,
        codebook: Tensor,
        parts: list[Tensor],
        phi_weight: Tensor,
        phi_bias: Tensor,
        scales: list[int],
        phi_index: list[int],
        phi_ratio: float,
        replay: Tensor | None,
        batch: int,
        size: list[int],
        inputs: bool,
        per_scale: bool,
    ) -> tuple[Tensor, ...]:
        for tensor in (codebook, phi_weight, phi_bias, *(() if z is None else (z,))):
            assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        pairs = list(zip(scales[::2], scales[1::2], strict=True))
        bank = (codebook, phi_weight, phi_bias)
        found = run(
            program,
            Problem(
                *(
                    z,
                    *bank,
                    pairs,
                    phi_index,
                    (size[0], size[1]),
                    batch,
                    phi_ratio,
                    replay,
                    inputs,
                    per_scale,
                ),
                parts=parts,
            ),
            tmp_path,
        )
        return found.reconstruction, found.indices, found.inputs, found.reconstructions

    monkeypatch.setattr(torch.ops.hitsr_fast, "_residual_quantize_cuda", launch, raising=False)
    for name, function in (
        ("residual_quantize", cuda.residual_quantize_cuda),
        ("residual_decode", cuda.residual_decode_cuda),
    ):
        backend = OnHost(function)
        backend.bind(["z"], [0], [])
        monkeypatch.setitem(dispatch.operations()[name].backends, "cuda", backend)


def bank(dtype: torch.dtype = torch.float32, C: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((200, C), (2, C, C, 3, 3), (2, C))
    codebook, weight, bias = (torch.randn(shape).mul_(0.3).to(dtype) for shape in shapes)
    return codebook, weight, bias


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_and_decode(dtype: torch.dtype) -> None:
    z, codes = torch.randn(2, 6, 8, 16, dtype=torch.float64).permute(0, 3, 2, 1), bank(dtype)
    arguments = {"scales": SCALES, "phi_index": PHI}
    with use_backend("cuda"):
        out = residual_quantize(z, *codes, **arguments, return_inputs=True, per_scale=True)
        decoded = residual_decode(
            out.indices, *codes, **arguments, size=(8, 6), return_inputs=True, per_scale=True
        )
    with use_backend("reference"):
        expected = residual_quantize(z, *codes, **arguments, return_inputs=True, per_scale=True)
    assert torch.equal(out.indices, expected.indices)
    close = TOLERANCES["float32_reordered"]._asdict()
    for name in ("reconstruction", "inputs", "reconstructions"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), **close)
        assert torch.equal(getattr(decoded, name), getattr(out, name))


@pytest.mark.usefixtures("on_host")
def test_indices_beyond_the_codebook_read_nothing_beyond_it() -> None:
    """On a GPU nobody looks at them before: they count as the first and the last code."""
    codes, flat = bank(), [side for scale in SCALES for side in scale]
    indices = torch.randint(-(2**40), 2**40, (2, sum(h * w for h, w in SCALES)))
    options = (flat, PHI, [8, 6], 0.5, False, False)
    found, expected = (
        cuda.residual_decode_cuda(given, *codes, *options)[0]
        for given in (indices, indices.clamp(0, len(codes[0]) - 1))
    )
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("on_host")
def test_packed_codebooks_and_replays_are_taken() -> None:
    z, codes = torch.randn(2, 16, 8, 6), bank()
    flat = [side for scale in SCALES for side in scale]
    _, parts = packing.pack_eager(codes[0], "l2")
    replay = torch.randint(0, 200, (2, 18))

    def quantize(parts: Sequence[Tensor], layout: str, backend: str) -> Tensor:
        with use_backend(backend):
            found = torch.ops.hitsr_fast.residual_quantize(
                z, *codes, list(parts), layout, flat, PHI, 0.5, replay, "l2", False, False
            )
        assert found[2].shape == (2, 0, 16)
        assert found[3].shape == (0, 2, 16, 8, 6)
        indices: Tensor = found[1]
        return indices

    packed = quantize(parts, packing.LAYOUT, "cuda")
    assert torch.equal(packed[:, :18], replay)
    assert torch.equal(packed, quantize((), "", "cuda"))
    assert torch.equal(packed, quantize((), "", "reference"))


def reason(
    z: Tensor, codebook: Tensor, metric: str = "l2", scales: Sequence[int] = (1, 1, 2, 2), size: int = 2
) -> str | None:
    phi = (torch.empty(1, device=z.device), torch.empty(1, device=z.device))
    backends = {
        name: dispatch.operations()[name].backends["cuda"]
        for name in ("residual_quantize", "residual_decode")
    }
    bank = codebook, *phi
    quantizing = backends["residual_quantize"].refusal(
        (z, *bank, [], "", scales, [0, 0], 0.5, None, metric, False, False)
    )
    if metric == "l2":
        given = z, *bank, scales, [0, 0], (size, size), 0.5, False, False
        decoding = backends["residual_decode"].refusal(given)
        assert quantizing is None or decoding == quantizing.replace("found z", "found indices")
    return quantizing


def test_what_it_does_not_take_is_said() -> None:
    assert reason(torch.empty(1, 16, 2, 2), torch.empty(5, 16)) == "needs CUDA tensors, found z on cpu"
    with FakeTensorMode():
        z = torch.empty(1, 16, 2, 2, device="cuda")
        codebook = torch.empty(5, 16, device="cuda")
        assert reason(z, torch.empty(5, 16)) == "needs CUDA tensors, found codebook on cpu"
        assert reason(z, codebook, "cosine") == "needs metric l2, found cosine"
        found = "found codebook of float64"
        assert reason(z, codebook.double()) == f"needs float16, bfloat16 or float32, {found}"
        assert reason(z, codebook[:, :12]) == "needs C of 8, 16, 32, 64, found 12"
        assert reason(z, codebook, scales=[1] * 66) == "needs at most 32 scales, found 33"


@pytest.mark.parametrize(
    ("capability", "plan", "expected"),
    [
        ((9, 0), (2, 232448), None),
        (
            (8, 0),
            (0, 166912),
            "needs the residual of an image in shared memory: (16, 2, 2) does not fit into 166912 bytes",
        ),
        ((7, 5), (1, 65536), "needs compute capability 8.0, found 7.5"),
    ],
)
def test_the_device_is_asked(
    capability: tuple[int, int], plan: tuple[int, int], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def planned(*arguments: object) -> tuple[int, int]:
        asked.append(arguments)
        return plan

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.ops.hitsr_fast, "_residual_quantize_cuda_plan", planned, raising=False)
    monkeypatch.setattr(torch.ops.hitsr_fast, "_cuda_unloadable", lambda device: "", raising=False)
    with FakeTensorMode():
        z, codebook = torch.empty(1, 16, 2, 2, device="cuda"), torch.empty(5, 16, device="cuda")
        assert reason(z, codebook) == expected
    assert all(arguments == (0, 16, 2, 2, [1, 1, 2, 2]) for arguments in asked)


def test_its_absence_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "unavailable", lambda module="_C": f"no {module} in this test")
    assert dispatch.operations()["residual_quantize"].reasons()["cuda"] == "no _C_cuda in this test"
    with use_backend("cuda"), pytest.raises(BackendUnavailableError, match="no _C_cuda in this test"):
        residual_quantize(torch.randn(1, 16, 2, 2), *bank(), scales=[2], phi_index=[0])
    monkeypatch.setattr(extension, "unavailable", lambda module="_C": None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dispatch.operations()["residual_quantize"].reasons()["cuda"] == "no CUDA device"


@pytest.mark.gpu
def test_a_gpu_gives_what_the_host_gives(program: Path, tmp_path: Path) -> None:
    """The same code, but for the order of sums on tensor cores, which decides nothing."""
    require("cuda")
    z, codes = torch.randn(3, 16, 8, 6), bank()
    with use_backend("cuda"):
        out = residual_quantize(
            z.cuda(), *(t.cuda() for t in codes), scales=SCALES, phi_index=PHI, return_inputs=True
        )
    expected = run(program, Problem(z, *codes, SCALES, PHI, (8, 6), 3, inputs=True), tmp_path)
    assert torch.equal(out.indices.cpu(), expected.indices)
    assert torch.equal(out.reconstruction.cpu(), expected.reconstruction)
    assert torch.equal(out.inputs.cpu(), expected.inputs)
