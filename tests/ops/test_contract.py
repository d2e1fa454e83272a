"""What all ops have in common, on the calls of one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from hitsr_fast import ops
from hitsr_fast.dispatch import NAMES, BackendUnavailableError, operations, use_backend
from tests.ops.backends import threads

OPS = torch.ops.hitsr_fast
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Arguments = tuple[Any, ...]
# Arguments in the order of the schema: small ones, or with True such that threads share the work.
Make = Callable[[bool, torch.dtype], Arguments]


class Example(NamedTuple):
    """Calls of an op.

    Attributes:
        calls: of the op itself.
        public: the public function with those arguments; None for the backward of an op, which has none.
        backward: the op that computes the gradients.
        gradients: places of the arguments to which they flow.
        refused: places of the arguments whose gradient the public function refuses.
    """

    calls: tuple[Make, ...]
    public: Callable[..., Any] | None = None
    backward: str = ""
    gradients: tuple[int, ...] = ()
    refused: tuple[int, ...] = ()


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which ops keep sums."""
    return torch.promote_types(dtype, torch.float32)


def rows(large: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    B, L, C = (2, 300, 64) if large else (2, 3, 8)
    return torch.randn(B, L, C, dtype=dtype), torch.randn(B, C, dtype=dtype), torch.randn(B, C, dtype=dtype)


def modulated_layer_norm(large: bool, dtype: torch.dtype) -> Arguments:
    return *rows(large, dtype), 1e-6, dtype


def modulated_layer_norm_backward(large: bool, dtype: torch.dtype) -> Arguments:
    x, scale, _ = rows(large, dtype)
    values = x.to(wide(dtype))
    return torch.randn_like(x), x, scale, values.mean(2), values.var(2).rsqrt()


def gated_residual(large: bool, dtype: torch.dtype) -> Arguments:
    x, gate, _ = rows(large, dtype)
    return x, torch.randn_like(x), gate


def gated_residual_norm(large: bool, dtype: torch.dtype) -> Arguments:
    x, scale, shift = rows(large, dtype)
    return x, torch.randn_like(x), shift.clone(), scale, shift, 1e-6, dtype


def group_norm_silu(layout: torch.memory_format) -> Make:
    def make(large: bool, dtype: torch.dtype) -> Arguments:
        shape, groups = ((2, 96, 40, 40), 32) if large else ((2, 6, 3, 5), 3)
        x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)
        return x, torch.randn(shape[1], dtype=dtype), torch.randn(shape[1], dtype=dtype), groups, 1e-6

    return make


def group_norm_silu_backward(layout: torch.memory_format) -> Make:
    def make(large: bool, dtype: torch.dtype) -> Arguments:
        given = group_norm_silu(layout)(large, dtype)
        with use_backend("reference"):
            return torch.randn_like(given[0]), *given[:3], *OPS.group_norm_silu(*given)[1:]

    return make


def no_pixels(large: bool, dtype: torch.dtype) -> Arguments:
    x, row = torch.randn(2, 4, 0, 3, dtype=dtype), torch.randn(4, dtype=dtype)
    return x, row, row.clone(), 2, 1e-6


def attention_prologue(steps: bool) -> Make:
    def make(large: bool, dtype: torch.dtype) -> Arguments:
        B, L, NH, D = (2, 50, 4, 64) if large else (2, 3, 5, 6)
        caches = torch.zeros(2, B, L + 3, NH, D, dtype=dtype)
        angles = torch.rand(L, D // 2) * 6
        rotary = torch.stack([angles.cos(), angles.sin()], dim=-1)
        optional = (torch.randn(3 * NH * D, dtype=dtype), torch.rand(NH) + 1, rotary)
        return torch.randn(B, L, 3 * NH * D, dtype=dtype), *caches, 1, *(optional if steps else [None] * 3)

    return make


def nearest_code(
    metric: ops.Metric, *, maps: bool = False, groups: bool = False, packed: bool = False
) -> Make:
    def make(large: bool, dtype: torch.dtype) -> Arguments:
        count, codes = (5000, 300) if large else (6, 5)
        shape = (count // 6, 8, 2, 3) if maps else (2, count // 2, 8) if groups else (count, 8)
        x = torch.randn(shape, dtype=dtype)
        codebook = torch.randn((2, codes, 8) if groups else (codes, 8), dtype=dtype)
        prepared = ops.prepare_codebook(codebook, metric=metric)
        parts, layout = (list(prepared.parts), prepared.layout) if packed else ([], "")
        return x, codebook, parts, layout, metric

    return make


def no_rows(large: bool, dtype: torch.dtype) -> Arguments:
    return torch.randn(2, 0, 3, dtype=dtype), torch.randn(2, 5, 3, dtype=dtype), [], "", "l2"


def bank(K: int, C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((K, C), (2, C, C, 3, 3), (2, C))
    codebook, weight, bias = (torch.randn(shape, dtype=dtype) * 0.3 for shape in shapes)
    return codebook, weight, bias


def pyramid(large: bool) -> tuple[list[int], list[int]]:
    return [2, 2, 9, 9, 16, 16] if large else [1, 1, 2, 3, 4, 5], [0, 1, 1]


def preference_cross_entropy(large: bool, dtype: torch.dtype) -> Arguments:
    """The large one with the gradients that the forward makes, of more than a block of rows."""
    N, C, K = (700, 70, 300) if large else (6, 5, 7)
    target, rejected = torch.randint(K, (2, N))
    head = torch.randn(N, C, dtype=dtype), torch.randn(K, C, dtype=dtype), torch.randn(K, dtype=dtype)
    return *head, target, rejected, 0.1, large


def preference_cross_entropy_backward(large: bool, dtype: torch.dtype) -> Arguments:
    *given, smoothing, _ = preference_cross_entropy(large, dtype)
    with use_backend("reference"):
        lse = OPS.preference_cross_entropy(*given, smoothing, False)[2]
    return torch.randn_like(lse), torch.randn_like(lse), *given, lse, smoothing


def residual_quantize(metric: ops.Metric, everything: bool, *, packed: bool = False, replay: int = 0) -> Make:
    def make(large: bool, dtype: torch.dtype) -> Arguments:
        shape, K = ((5, 32, 16, 16), 512) if large else ((2, 3, 4, 5), 9)
        codes = bank(K, shape[1], dtype)
        prepared = ops.prepare_codebook(codes[0], metric=metric)
        parts, layout = (list(prepared.parts), prepared.layout) if packed else ([], "")
        replayed = torch.randint(K, (shape[0], pyramid(large)[0][0] ** 2)) if replay else None
        options = (0.5, replayed, metric, everything, everything)
        return torch.randn(shape, dtype=dtype), *codes, parts, layout, *pyramid(large), *options

    return make


def residual_decode(everything: bool) -> Make:
    def make(large: bool, dtype: torch.dtype) -> Arguments:
        codes, size = (bank(512, 32, dtype), [16, 16]) if large else (bank(9, 3, dtype), [4, 5])
        indices = torch.randint(9, (5, 4 + 81 + 256) if large else (2, 1 + 6 + 20))
        return indices, *codes, *pyramid(large), size, 0.5, everything, everything

    return make


def residual_decode_backward(each: bool) -> Make:
    def make(large: bool, dtype: torch.dtype) -> Arguments:
        codebook, phi, _ = bank(512, 32, dtype) if large else bank(9, 3, dtype)
        maps = torch.randn((3, 5, 32, 16, 16) if large else (3, 2, 3, 4, 5), dtype=wide(dtype))
        indices = torch.randint(9, (5, 4 + 81 + 256) if large else (2, 27))
        return maps[0], maps if each else maps[:0], indices, codebook, phi, *pyramid(large), 0.5

    return make


def residual_step(following: list[int]) -> Make:
    def make(large: bool, dtype: torch.dtype) -> Arguments:
        codebook, phi, bias = bank(512, 32, dtype) if large else bank(9, 3, dtype)
        size = (5, 32, 16, 16) if large else (2, 3, 4, 5)
        scale, after = ([9, 9], [16, 16]) if large else ([2, 3], following)
        indices = torch.randint(9, (size[0], scale[0] * scale[1]))
        return torch.randn(size, dtype=wide(dtype)), indices, codebook, phi[0], bias[0], scale, after, 0.5

    return make


def sample_codes(large: bool, dtype: torch.dtype) -> Arguments:
    logits, uncond = torch.randn((2, 300, 70) if large else (2, 2, 3, 8)).to(dtype)
    return logits, uncond, torch.tensor([1, 2]), 1.5, 3, 0.9, 0.8, None


def greedy(large: bool, dtype: torch.dtype) -> Arguments:
    return sample_codes(large, dtype)[0], None, None, 0.0, 1, 0.0, 1.0, None


def scale_block_attention(large: bool, dtype: torch.dtype) -> Arguments:
    blocks, heads, D = ([260, 40, 160], 5, 24) if large else ([2, 3], 2, 4)
    return *torch.randn(3, 1, sum(blocks), heads, D, dtype=dtype), blocks, 0.5


def scale_block_attention_backward(large: bool, dtype: torch.dtype) -> Arguments:
    q, k, v, blocks, scale = scale_block_attention(large, dtype)
    with use_backend("reference"):
        out, lse = OPS.scale_block_attention(q, k, v, blocks, scale)
    return torch.randn_like(out), q, k, v, out, lse, blocks, scale


def cached_attention(large: bool, dtype: torch.dtype) -> Arguments:
    q, k, v, *_ = scale_block_attention(large, dtype)
    return (q[:, :160], k, v, 450, 0.5) if large else (q[:, :3], k, v, 4, 0.5)


def pairs(scales: list[int]) -> list[tuple[int, int]]:
    return list(zip(scales[::2], scales[1::2], strict=True))


EXAMPLES = {
    "attention_prologue": Example(
        (attention_prologue(True), attention_prologue(False)),
        lambda qkv, k, v, start, bias, q_scale, rotary: ops.attention_prologue(
            qkv, k, v, start, bias=bias, q_scale=q_scale, rotary=rotary
        ),
        refused=(0, 1, 2, 4, 5, 6),
    ),
    "group_norm_silu": Example(
        (group_norm_silu(torch.contiguous_format), group_norm_silu(torch.channels_last), no_pixels),
        lambda x, weight, bias, groups, eps: ops.group_norm_silu(x, weight, bias, groups, eps=eps),
        "group_norm_silu_backward",
        gradients=(0, 1, 2),
    ),
    "group_norm_silu_backward": Example(
        (group_norm_silu_backward(torch.contiguous_format), group_norm_silu_backward(torch.channels_last)),
    ),
    "modulated_layer_norm": Example(
        (modulated_layer_norm,),
        lambda x, scale, shift, eps, dtype: ops.modulated_layer_norm(
            x, scale, shift, eps=eps, out_dtype=dtype
        ),
        "modulated_layer_norm_backward",
        gradients=(0, 1, 2),
    ),
    "modulated_layer_norm_backward": Example((modulated_layer_norm_backward,)),
    "gated_residual": Example(
        (gated_residual,), ops.gated_residual, "gated_residual_backward", gradients=(0, 1, 2)
    ),
    "gated_residual_backward": Example((gated_residual,)),
    "gated_residual_norm": Example(
        (gated_residual_norm,),
        lambda x, y, gate, scale, shift, eps, dtype: ops.gated_residual_norm(
            x, y, gate, scale, shift, eps=eps, out_dtype=dtype
        ),
        refused=(0, 1, 2, 3, 4),
    ),
    "nearest_code": Example(
        (
            *(nearest_code(metric, packed=packed) for metric in ("l2", "cosine") for packed in (False, True)),
            nearest_code("l2", maps=True),
            nearest_code("cosine", groups=True),
            no_rows,
        ),
        lambda x, codebook, parts, layout, metric: ops.nearest_code(x, codebook, metric=metric),
    ),
    "preference_cross_entropy": Example(
        (preference_cross_entropy,),
        lambda hidden, weight, bias, target, rejected, smoothing, units: ops.preference_cross_entropy(
            hidden, weight, bias, target, rejected, label_smoothing=smoothing
        ),
        "preference_cross_entropy_backward",
        gradients=(0, 1, 2),
    ),
    "preference_cross_entropy_backward": Example((preference_cross_entropy_backward,)),
    "residual_quantize": Example(
        (
            residual_quantize("l2", True),
            residual_quantize("l2", False, packed=True),
            residual_quantize("cosine", True, replay=True),
        ),
        lambda z, e, w, b, parts, layout, scales, phi, ratio, replay, metric, inputs, each: (
            ops.residual_quantize(
                *(z, e, w, b),
                scales=pairs(scales),
                phi_index=phi,
                phi_ratio=ratio,
                replay=replay,
                metric=metric,
                return_inputs=inputs,
                per_scale=each,
            )
        ),
        "residual_decode_backward",
        gradients=(1, 2, 3),
    ),
    "residual_decode": Example(
        (residual_decode(True), residual_decode(False)),
        lambda indices, e, w, b, scales, phi, size, ratio, inputs, each: ops.residual_decode(
            *(indices, e, w, b),
            scales=pairs(scales),
            phi_index=phi,
            size=size,
            phi_ratio=ratio,
            return_inputs=inputs,
            per_scale=each,
        ),
        "residual_decode_backward",
        gradients=(1, 2, 3),
    ),
    "residual_decode_backward": Example((residual_decode_backward(True), residual_decode_backward(False))),
    "residual_step": Example(
        (residual_step([3, 4]), residual_step([4, 5]), residual_step([0, 0])),
        lambda r, indices, e, w, b, scale, after, ratio: ops.residual_step(
            r, indices, e, w, b, scale=scale, next_scale=after if after[0] else None, phi_ratio=ratio
        ),
        refused=(0, 2, 3, 4),
    ),
    "sample_codes": Example(
        (sample_codes, greedy),
        lambda logits, uncond, state, guidance, top_k, top_p, temperature, settings: ops.sample_codes(
            logits,
            uncond_logits=uncond,
            guidance=guidance,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
        ),
    ),
    "scale_block_attention": Example(
        (scale_block_attention,),
        lambda q, k, v, blocks, scale: ops.scale_block_attention(
            q, k, v, block_lengths=blocks, softmax_scale=scale
        ),
        "scale_block_attention_backward",
        gradients=(0, 1, 2),
    ),
    "scale_block_attention_backward": Example((scale_block_attention_backward,)),
    "cached_attention": Example(
        (cached_attention,),
        lambda q, k, v, length, scale: ops.cached_attention(q, k, v, length, softmax_scale=scale),
        refused=(0, 1, 2),
    ),
}
of_the_frame = pytest.mark.backends(
    "reference", "cpu"
)  # which is around all backends: one that is quick tells
on_every_op = pytest.mark.parametrize("op", EXAMPLES)
on_public_ops = pytest.mark.parametrize("op", [name for name, example in EXAMPLES.items() if example.public])
on_ops_with_gradients = pytest.mark.parametrize(
    "op", [name for name, example in EXAMPLES.items() if example.gradients]
)


def calls(op: str, large: bool = False, dtype: torch.dtype = torch.float32) -> Iterator[Arguments]:
    """Arguments of each call of the table, the same each time."""
    for make in EXAMPLES[op].calls:
        torch.manual_seed(0)
        yield make(large, dtype)


def tensors(out: Any) -> list[Tensor]:
    """Those of a result."""
    return [out] if isinstance(out, Tensor) else [value for value in out if value is not None]


def written(op: str) -> list[int]:
    """Places of the arguments that an op writes to."""
    schema = getattr(OPS, op).default._schema
    return [i for i, given in enumerate(schema.arguments) if given.alias_info and given.alias_info.is_write]


def run(op: str, arguments: Arguments) -> list[Tensor]:
    """What an op returns and what it writes."""
    return tensors(getattr(OPS, op)(*arguments)) + [arguments[place] for place in written(op)]


def require_grad(op: str, arguments: Arguments) -> list[Tensor]:
    """The arguments to which gradients flow, asking for them."""
    return [arguments[place].requires_grad_() for place in EXAMPLES[op].gradients]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_every_op_has_an_example() -> None:
    assert set(EXAMPLES) == set(operations())


def test_opcheck(op: str, backend: str) -> None:
    backward = operations()[EXAMPLES[op].backward or op].backends
    for arguments in calls(op):
        if backend.partition(":")[0] in backward:
            require_grad(op, arguments)
        torch.library.opcheck(getattr(OPS, op).default, arguments)


@on_public_ops
def test_compiles_without_a_graph_break(op: str) -> None:
    """With neighbours, gradients, and what is written in place."""
    public = EXAMPLES[op].public
    assert public is not None

    def call(*arguments: Any) -> list[Tensor]:
        out = tensors(public(*arguments)) + [arguments[place] for place in written(op)]
        return [value + 1 for value in out]

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for one, other in zip(calls(op), calls(op), strict=True):
        results = []
        for function, arguments in ((compiled, one), (call, other)):
            inputs = require_grad(op, arguments)
            torch.manual_seed(1)
            out = function(*arguments)
            total = sum(value.square().sum() for value in out if value.requires_grad)
            grads = torch.autograd.grad(total, inputs) if inputs else ()
            results.append([*out, *grads, *(arguments[place] for place in written(op))])
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected) and found.stride() == expected.stride()


@on_every_op
def test_fake_tensors_of_a_gpu_never_synchronise(op: str) -> None:
    """They have no values; the results are those of a real call, but for values and device."""

    def fake(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        return [fake(part) for part in value] if isinstance(value, list) else value

    function = EXAMPLES[op].public or getattr(OPS, op)
    for arguments in calls(op):
        with FakeTensorMode():
            found = tensors(function(*map(fake, arguments)))
        for one, other in zip(found, tensors(function(*arguments)), strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
            assert one.device.type == "cuda"


def test_dtypes_are_those_that_it_says(op: str, backend: str) -> None:
    """A call runs where the backend gives no reason; else its error has the reason."""
    name = backend.partition(":")[0]
    answers = set()
    for dtype in DTYPES:
        arguments, others = (next(calls(op, dtype=dtype)) for _ in range(2))
        reason = operations()[op].reasons(*arguments)[name]
        answers.add(reason is None)
        if reason is None:
            with use_backend("reference"):
                expected = run(op, others)
            for found, want in zip(run(op, arguments), expected, strict=True):
                assert found.dtype == want.dtype and found.shape == want.shape
                assert torch.equal(found.isfinite(), want.isfinite())
        else:
            with pytest.raises(BackendUnavailableError) as error:
                run(op, arguments)
            assert f"{name:<10}  {reason}" in str(error.value)
    assert True in answers


@on_every_op
def test_a_forced_backend_that_cannot_run_raises_with_every_reason(op: str) -> None:
    for arguments in calls(op):
        reasons = operations()[op].reasons(*arguments)
        for name in NAMES:
            if reasons[name] is not None:
                with use_backend(name), pytest.raises(BackendUnavailableError) as error:
                    run(op, arguments)
                for other, reason in reasons.items():
                    assert f"{other:<10}  {reason or 'can run'}" in str(error.value)
        assert reasons["reference"] is None and None not in (reasons["cuda"], reasons["flash_attn"])


@of_the_frame
def test_autocast_does_not_reach_inside(op: str, backend: str) -> None:
    for one, other in zip(calls(op), calls(op), strict=True):
        outside = run(op, one)
        with torch.autocast(one[0].device.type, dtype=torch.bfloat16):
            assert_same(run(op, other), outside)


@of_the_frame
def test_inference_mode(op: str, backend: str) -> None:
    outside = [run(op, arguments) for arguments in calls(op)]
    with torch.inference_mode():
        for arguments, expected in zip(calls(op), outside, strict=True):
            assert_same(run(op, arguments), expected)


@of_the_frame
def test_autograd_learns_what_is_written(op: str, backend: str) -> None:
    for arguments in calls(op):
        before = [value._version if isinstance(value, Tensor) else 0 for value in arguments]
        run(op, arguments)
        for place, value in enumerate(arguments):
            if isinstance(value, Tensor):
                assert (value._version > before[place]) == (place in written(op)), place


@pytest.mark.backends("cpu")
def test_the_number_of_threads_changes_no_bit(op: str, backend: str) -> None:
    for dtype in DTYPES[:3]:
        found = []
        for count in (1, 2, 3):
            with threads(count):
                found.append([run(op, arguments) for arguments in calls(op, True, dtype)])
        for others in found[1:]:
            for one, other in zip(found[0], others, strict=True):
                assert_same(other, one)


@on_every_op
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")  # PyTorch's own
def test_forward_mode_derivatives_are_refused(op: str) -> None:
    """PyTorch would take them to be 0."""
    for arguments in calls(op):
        for place, value in enumerate(arguments):
            if isinstance(value, Tensor) and value.is_floating_point():
                with forward_ad.dual_level():
                    dual = forward_ad.make_dual(value, torch.ones_like(value))
                    with pytest.raises(NotImplementedError, match=f"{op}: forward-mode derivatives are not"):
                        run(op, (*arguments[:place], dual, *arguments[place + 1 :]))


@on_ops_with_gradients
def test_second_derivatives_are_refused(op: str) -> None:
    for arguments in calls(op):
        inputs = require_grad(op, arguments)
        total = sum(out.square().sum() for out in run(op, arguments) if out.requires_grad)
        grads = torch.autograd.grad(total, inputs, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
            sum(grad.sum() for grad in grads).backward()


@on_public_ops
def test_a_gradient_that_it_has_not_is_refused(op: str) -> None:
    public, refused = EXAMPLES[op].public, EXAMPLES[op].refused
    assert public is not None
    for place in refused:
        for arguments in calls(op):
            if arguments[place] is not None:
                arguments[place].requires_grad_()
                message = f"{op}: has no gradient; call it under torch.no_grad"
                with pytest.raises(RuntimeError, match=message):
                    public(*arguments)
                with torch.no_grad():
                    assert not any(out.requires_grad for out in tensors(public(*arguments)))
