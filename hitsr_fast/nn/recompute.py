"""Training layers that keep little for the backward pass: what is cheap to make is made again.

Of a block of VAR's, PyTorch keeps some 23 maps of a token's width. These keep 10: inputs of the norms, q, k,
v and the result of the attention, and the hidden layer before its GELU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hitsr_fast.dispatch import forced_backend, use_backend
from hitsr_fast.ops import attention_prologue, gated_residual, modulated_layer_norm
from hitsr_fast.ops.scale_block_attention import scale_block_attention
from hitsr_fast.precision import autocast_dtype

_SMALLEST_NORM = 1e-12  # of torch.nn.functional.normalize
_PIECES = 4  # that a batch is cut in, so that what is made again is never there whole


def _plainly() -> bool:
    """Whether PyTorch is left to keep what it likes."""
    return torch.compiler.is_compiling() or not torch.is_grad_enabled() or forced_backend() == "reference"


def linear_of(
    prepare: Callable[..., Tensor], inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """`F.linear(prepare(*inputs), weight, bias)`; of `prepare`, only the inputs are kept.

    Args:
        prepare: cheap beside the product, such as a norm or an activation, and differentiable; it gives
            `(B, ..., C)`, the same each time, of each image by itself.
        inputs: its arguments, `(B, ...)`.
        weight, bias: `(O, C)` and `(O,)`.

    Notes:
        Under `torch.compile`, which decides itself what it makes again, and by the reference backend it is
        what it says.

    Example:
        >>> x = torch.tensor([[-1.0, 2.0]], requires_grad=True)
        >>> linear_of(torch.relu, [x], torch.eye(2), None).sum().backward()
        >>> x.grad
        tensor([[0., 1.]])
    """
    if _plainly():
        return F.linear(prepare(*inputs), weight, bias)
    out: Tensor = _LinearOf.apply(prepare, weight, bias, *inputs)
    return out


def modulated_linear(
    x: Tensor, modulation: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """`F.linear` of the `modulated_layer_norm` of x `(B, L, C)`, whose result is not kept.

    `modulation` are its scale and shift, `(B, C)`.
    """
    return linear_of(modulated_layer_norm, (x, *modulation), weight, bias)


def gated_linear(
    x: Tensor,
    gate: Tensor,
    prepare: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """`gated_residual` of x and `linear_of`, whose result is not kept.

    Args:
        x: `(B, L, O)`.
        gate: `(B, O)`.
        prepare, inputs, weight, bias: of `linear_of`, which gives `(B, L, O)`; of inputs `(B, L, ...)`, each
            row by itself.

    Notes:
        With P the product of the transposed gradient and the prepared rows, of an image, the gradient in the
        gate is the sum over C of `P * weight`, plus what the bias adds: it needs no result of the linear.
        In float16 the branch is kept: without its gate, which starts small, P would overflow.
    """
    if _plainly() or (autocast_dtype(x.device) or weight.dtype) == torch.float16:
        return gated_residual(x, linear_of(prepare, inputs, weight, bias), gate)
    out: Tensor = _GatedLinear.apply(prepare, weight, bias, x, gate, *inputs)
    return out


class _LinearOf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, prepare: Callable[..., Tensor], weight: Tensor, bias: Tensor | None, *inputs: Tensor
    ) -> Tensor:
        ctx.prepare, ctx.bias_dtype = prepare, None if bias is None else bias.dtype
        ctx.forced = forced_backend()  # autograd's threads have contexts of their own
        ctx.save_for_backward(weight, *inputs)
        return F.linear(prepare(*inputs), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, *inputs = ctx.saved_tensors
        of_weight, of_bias, *wanted = ctx.needs_input_grad[1:]
        grad_weight = torch.zeros_like(weight) if of_weight else None
        grads = _places(inputs, wanted)
        with use_backend(ctx.forced):
            for piece, remade in _pieces(ctx.prepare, inputs, grads, grad):
                if grad_weight is not None:
                    grad_weight += piece.flatten(0, -2).mT @ remade.rows.flatten(0, -2).to(piece.dtype)
                remade.pass_on(lambda piece=piece: piece @ weight.to(piece.dtype))
        grad_bias = grad.flatten(0, -2).sum(0, dtype=ctx.bias_dtype) if of_bias else None
        return None, grad_weight, grad_bias, *grads


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        prepare: Callable[..., Tensor],
        weight: Tensor,
        bias: Tensor,
        x: Tensor,
        gate: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        branch = F.linear(prepare(*inputs), weight, bias)
        ctx.prepare, ctx.dtype, ctx.forced = prepare, branch.dtype, forced_backend()
        ctx.save_for_backward(weight, bias, gate, *inputs)
        return gated_residual(x, branch, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, bias, gate, *inputs = ctx.saved_tensors
        wide = torch.promote_types(ctx.dtype, torch.float32)
        grad_weight, grad_bias = (torch.zeros_like(t, dtype=wide) for t in (weight, bias))
        grad_gate = torch.zeros_like(gate)
        grads = _places(inputs, ctx.needs_input_grad[5:])
        with use_backend(ctx.forced):
            parts = _pieces(ctx.prepare, inputs, grads, grad, gate, grad_gate, by_rows=len(grad) < _PIECES)
            for piece, gates, to, remade in parts:
                given, factor = piece.to(ctx.dtype), gates.to(wide)
                products = (given.mT @ remade.rows.to(ctx.dtype)).to(wide)
                sums = given.sum(1, dtype=wide)
                for of_image, product in zip(factor, products, strict=True):
                    grad_weight.addcmul_(of_image[:, None], product)
                grad_bias += (factor * sums).sum(0)
                to += (products * weight).sum(2) + sums * bias
                scaled = given * gates.to(ctx.dtype)[:, None]
                remade.pass_on(lambda scaled=scaled: scaled @ weight.to(scaled.dtype))
        return None, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), grad, grad_gate, *grads


class _Remade:
    """What `prepare` gives of some images, once more, and the way back to its inputs."""

    def __init__(
        self, prepare: Callable[..., Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> None:
        wanted = [to is not None for to in grads]
        leaves = [t.detach().requires_grad_(want) for t, want in zip(inputs, wanted, strict=True)]
        with torch.enable_grad():
            self._out = prepare(*leaves)
        self.rows = self._out.detach()
        self._asked = [(leaf, to) for leaf, to in zip(leaves, grads, strict=True) if to is not None]

    def pass_on(self, gradient: Callable[[], Tensor]) -> None:
        """Write the gradients of the inputs that want one, of what `gradient` gives for the rows."""
        if self._asked:
            given = gradient().to(self._out.dtype)
            found = torch.autograd.grad(self._out, [leaf for leaf, _ in self._asked], given)
            for (_, to), value in zip(self._asked, found, strict=True):
                to.copy_(value)


def _places(inputs: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    return [torch.empty_like(t) if want else None for t, want in zip(inputs, wanted, strict=True)]


def _pieces(
    prepare: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    *others: Tensor,
    by_rows: bool = False,
) -> Iterator[tuple[Any, ...]]:
    """A piece of each of `others`, and of the inputs what is made again, which is never there as a whole.

    A piece is some images, or by rows some rows of all of them; what has no rows is then given as it is.
    """
    count = len(others[0].chunk(_PIECES, int(by_rows)))

    def cut(t: Tensor) -> Sequence[Tensor]:
        return t.chunk(_PIECES, int(by_rows)) if t.dim() > 2 or not by_rows else [t] * count

    for number, pieces in enumerate(zip(*map(cut, others), strict=True)):
        given = [cut(t)[number] for t in inputs]
        to = [None if t is None else cut(t)[number] for t in grads]
        yield *pieces, _Remade(prepare, given, to)


def qkv_attention(
    qkv: Tensor, factor: Tensor | None, *, heads: int, block_lengths: Sequence[int], softmax_scale: float
) -> Tensor:
    """`scale_block_attention` of a qkv product, q and k of which may be brought to length one.

    Args:
        qkv: floating, `(B, T, 3 * NH * D)`, with its bias.
        factor: float32 `(NH,)`, what normalised queries are multiplied by, with a gradient; None normalises
            neither queries nor keys.
        heads: NH.
        block_lengths, softmax_scale: of the op.

    Returns:
        `(B, T, NH * D)` in the dtype of qkv. The norm is taken in float32 at least.

    Notes:
        What is kept are q, k and v as the attention takes them and a number a head and token, not qkv.
    """
    if factor is None or _plainly():
        q, k, v = qkv.unflatten(2, (3, heads, -1)).unbind(2)
        if factor is not None:
            wide = torch.promote_types(q.dtype, torch.float32)
            q = (F.normalize(q.to(wide), dim=-1) * factor[:, None]).to(v.dtype)
            k = F.normalize(k.to(wide), dim=-1).to(v.dtype)
    else:
        q, k, v = _Normalised.apply(qkv, factor, heads)
    out = scale_block_attention(q, k, v, block_lengths=block_lengths, softmax_scale=softmax_scale)
    return out.flatten(2)


class _Normalised(torch.autograd.Function):
    """q, k and v `(B, T, NH, D)` of a qkv product; q and k of length one, q times a factor a head.

    The gradient of `q = f x / |x|` is `f (g - n (n . g)) / |x|` with n = q / f, which needs no x.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, factor: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        B, T, width = qkv.shape
        k, v = (qkv.new_empty(B, T, heads, width // (3 * heads)) for _ in range(2))
        q = attention_prologue(qkv, k, v, 0, q_scale=factor)
        parts = qkv.view(B, T, 3, heads, -1)[:, :, :2]
        wide = torch.promote_types(qkv.dtype, torch.float32)
        norms = torch.linalg.vector_norm(parts, dim=-1, dtype=wide).clamp_min_(_SMALLEST_NORM)
        ctx.save_for_backward(q, k, factor, norms)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Any, ...]:
        q, k, factor, norms = ctx.saved_tensors
        B, T, heads, D = q.shape
        grads = q.new_empty(B, T, 3, heads, D)
        # Of q: g . n, of which the sum is the gradient of the factor too.
        along_q = torch.linalg.vecdot(grad_q.to(norms.dtype), q.to(norms.dtype)) / factor
        along_k = torch.linalg.vecdot(grad_k.to(norms.dtype), k.to(norms.dtype))
        share_q, share_k = factor / norms[:, :, 0], norms[:, :, 1].reciprocal()
        for i, (grad, unit, share, along) in enumerate(
            ((grad_q, q, share_q, along_q / factor), (grad_k, k, share_k, along_k))
        ):
            part = grads[:, :, i]
            torch.mul(grad, share[..., None].to(grad.dtype), out=part)
            part.addcmul_(unit, (along * share)[..., None].to(unit.dtype), value=-1)
        grads[:, :, 2] = grad_v
        return grads.flatten(2), along_q.sum((0, 1)), None
