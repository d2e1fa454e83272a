"""float32 of the definitions is float32: what PyTorch allows is taken back inside, and restored."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hitsr_fast.backends import Reference
from hitsr_fast.dispatch import operations
from hitsr_fast.precision import autocast_dtype, exact_float32
from tests.ops.test_contract import EXAMPLES, calls

BACKENDS = torch.backends
MATMUL, CONV = (("cuda", "matmul"), ("mkldnn", "matmul")), (("cuda", "conv"), ("mkldnn", "conv"))
PLACES = (*MATMUL, *CONV, ("cuda", "rnn"), ("cuda", "all"), ("mkldnn", "all"), ("generic", "all"))
MULTIPLY = ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm", "mv", "dot")


def _legacy(allowed: str) -> Callable[[], None]:
    def choose() -> None:
        torch.set_float32_matmul_precision(allowed)
        BACKENDS.cudnn.allow_tf32 = allowed != "highest"

    return choose


def _legacy_products() -> None:
    BACKENDS.cuda.matmul.allow_tf32 = True


def _of_each() -> None:
    BACKENDS.cuda.matmul.fp32_precision = "tf32"
    BACKENDS.mkldnn.matmul.fp32_precision = "bf16"
    BACKENDS.mkldnn.conv.fp32_precision = "bf16"


def _of_all() -> None:
    BACKENDS.fp32_precision = "tf32"


# The ways in which a user may have chosen.
CHOICES: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "older, highest": _legacy("highest"),
    "older, high": _legacy("high"),
    "older, medium": _legacy("medium"),
    "older, products": _legacy_products,
    "of each": _of_each,
    "of all": _of_all,
}
every_choice = pytest.mark.parametrize("choice", CHOICES)


def _defaults() -> None:
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    for place in (*MATMUL, CONV[1], ("cuda", "all"), ("mkldnn", "all")):
        torch._C._set_fp32_precision_setter(*place, "none")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """PyTorch's defaults for each test, and after it."""
    _defaults()
    yield
    _defaults()


def precision() -> dict[str, Any]:
    """All settings, of both kinds; the older ones cannot be read where the newer contradict them."""
    found: dict[str, Any] = {".".join(place): torch._C._get_fp32_precision_getter(*place) for place in PLACES}
    older: dict[str, Callable[[], Any]] = {
        "matmul": torch.get_float32_matmul_precision,
        "cublas": lambda: BACKENDS.cuda.matmul.allow_tf32,
        "cudnn": lambda: BACKENDS.cudnn.allow_tf32,
    }
    for name, read in older.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "mixed"
    others = (BACKENDS.cudnn.enabled, BACKENDS.cudnn.benchmark, BACKENDS.cudnn.deterministic)
    return found | {"others": others}


class Recorder(TorchDispatchMode):
    """Of what multiplies: its name, and what is allowed for products and convolutions as it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in MULTIPLY:
            places = CONV if name.startswith("convolution") else MATMUL
            self.seen += [(name, torch._C._get_fp32_precision_getter(*place)) for place in places]
        return func(*args, **(kwargs or {}))


@every_choice
def test_the_definitions_multiply_in_float32(choice: str) -> None:
    CHOICES[choice]()
    before = precision()
    assert choice in ("nothing", "older, highest") or "tf32" in before.values()
    multiplied = set()
    for op in EXAMPLES:
        for arguments in calls(op):
            with Recorder() as recorder:
                operations()[op].backends["reference"].run(*arguments)
            assert {allowed for _, allowed in recorder.seen} <= {"ieee", "none"}, (op, recorder.seen)
            multiplied |= {(op, name) for name, _ in recorder.seen}
            assert precision() == before
    assert {
        ("residual_quantize", "convolution"),
        ("residual_decode", "convolution"),
        ("residual_step", "convolution"),
        ("residual_decode_backward", "convolution_backward"),
        ("scale_block_attention", "bmm"),
        ("scale_block_attention_backward", "bmm"),
        ("cached_attention", "bmm"),
    } <= multiplied


@every_choice
def test_a_definition_that_raises_leaves_the_settings(choice: str) -> None:
    CHOICES[choice]()
    before = precision()

    def definition() -> None:
        assert BACKENDS.cudnn.conv.fp32_precision in ("ieee", "none")
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        Reference(definition).run()
    assert precision() == before


def test_what_follows_the_common_setting_goes_on_to_follow_it() -> None:
    _of_all()
    with exact_float32():
        pass
    BACKENDS.fp32_precision = "ieee"
    for place in (*MATMUL, CONV[1]):
        assert torch._C._get_fp32_precision_getter(*place) == "ieee"


def test_the_older_setting_of_products_can_be_read_inside() -> None:
    """PyTorch's profiler reads it."""
    _legacy("medium")()
    with exact_float32():
        assert torch.get_float32_matmul_precision() == "highest" and not BACKENDS.cuda.matmul.allow_tf32


def test_calls_that_overlap_in_threads() -> None:
    """The one that came first leaves first; the other stays exact, and only then all is as before."""
    _legacy("high")()
    before, inside, leave = precision(), threading.Event(), threading.Event()
    found = []

    def other() -> None:
        with exact_float32():
            inside.set()
            leave.wait()
            found.append((BACKENDS.cudnn.conv.fp32_precision, BACKENDS.cuda.matmul.fp32_precision))

    thread = threading.Thread(target=other)
    with exact_float32():
        thread.start()
        inside.wait()
    assert BACKENDS.cudnn.conv.fp32_precision == "ieee"
    leave.set()
    thread.join()
    assert found == [("ieee", "ieee")] and precision() == before


@pytest.mark.gpu
def test_a_convolution_on_a_gpu_is_not_tf32() -> None:
    """TF32 has 10 bits: 1 + 2^-12 would be 1."""
    x, weight = (
        torch.full((1, 8, 8, 8), 1 + 2**-12, device="cuda"),
        torch.eye(8, device="cuda")[..., None, None],
    )
    run = Reference(torch.nn.functional.conv2d).run
    assert torch.equal(run(x, weight), x)


def test_autocast_dtype_is_that_of_a_product() -> None:
    assert autocast_dtype("cpu") is None
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert autocast_dtype(torch.device("cpu")) == dtype == (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
            with torch.autocast("cpu", enabled=False):
                assert autocast_dtype("cpu") is None


def test_a_device_without_autocast_has_none_on() -> None:
    assert autocast_dtype("meta") is None
