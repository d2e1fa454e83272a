"""`residual_quantize` and its family against VAR's loop in eager PyTorch, as it is and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._harness import AuditPlan, Benchmark, Call, Case, Inputs, Provider, ScoreLoop
from benchmarks._providers import OpCall, compiled, missing_compiler, our_backends, ours
from benchmarks.peers.var_quantizer import EagerQuantizer
from benchmarks.shapes import MODELS
from hitsr_fast.models import HitVar
from hitsr_fast.ops import (
    phi_table,
    prepare_codebook,
    residual_decode,
    residual_quantize,
    residual_step,
    tokenize_pyramid,
)
from hitsr_fast.ops import residual_quantize_triton as triton
from hitsr_fast.ops.packed_codebook import padded_channels

Task = Literal["encode", "pyramid", "decode", "steps", "train", "backward", "backward-each"]

PHIS, RATIO = 4, 0.5
USED_OPS: dict[Task, tuple[str, ...]] = {
    "encode": ("residual_quantize",),
    "pyramid": ("residual_quantize",),
    "decode": ("residual_decode",),
    "steps": ("residual_step",),
    "train": ("residual_quantize", "residual_decode_backward"),
    "backward": ("residual_decode_backward",),
    "backward-each": ("residual_decode_backward",),
}
BACKWARD = ("backward", "backward-each")


class Result(NamedTuple):
    """What a call makes: indices `(B, T)`, maps, gradients of codebook, phi_weight and phi_bias."""

    indices: Tensor | None
    maps: list[Tensor]
    gradients: tuple[Tensor, ...] = ()


class Expected(NamedTuple):
    """The eager loop's result, and the latents that its maps stand for."""

    result: Result
    latents: list[Tensor]


@dataclass(frozen=True)
class QuantizerCase(Case):
    """`B` images, `K` codes of `C` channels, latents of the size of the last scale.

    Attributes:
        task: encode: one latent over all scales. pyramid: HIT-VAR's three targets. decode: indices to the
            reconstruction. steps: the sampler's steps, each giving the next one's input. train: the pyramid,
            the loss of HIT-VAR's tokenizer training, and its gradients. backward: given the gradient of
            decode's reconstruction, those of codebook and phi. backward-each: given those of the
            reconstructions after each scale, as in training the quantizer by itself.
    """

    task: Task
    B: int
    K: int = MODELS["hit-d16"].K
    C: int = MODELS["hit-d16"].C
    model: str = "hit-d16"

    @property
    def sides(self) -> tuple[int, ...]:
        return MODELS[self.model].scales

    @property
    def lengths(self) -> list[int]:
        return MODELS[self.model].lengths

    @property
    def target_sizes(self) -> tuple[int, ...]:
        """Sides of the latents."""
        side = self.sides[-1]
        return (side // 4, side // 2, side) if self.task in ("pyramid", "train") else (side,)

    @property
    def target_steps(self) -> list[int]:
        return [sum(side <= size for side in self.sides) for size in self.target_sizes]

    @property
    def phi_index(self) -> list[int]:
        return phi_table(len(self.sides), PHIS)

    @property
    def items(self) -> int:
        return self.B

    @property
    def flops(self) -> int:
        searched = self.task in ("encode", "pyramid", "train")
        search = 2 * self.K * self.C * sum(self.lengths) if searched else 0
        convolutions = 0
        for size, steps in zip(self.target_sizes, self.target_steps, strict=True):
            # Backward, each phi costs two convolutions, however many scales share it, if one gradient does.
            phis = steps if self.task == "backward-each" else len(set(self.phi_index[:steps]))
            forward = 0 if self.task in BACKWARD else steps
            backward = 2 * phis if self.task in ("train", *BACKWARD) else 0
            convolutions += (forward + backward) * 18 * self.C**2 * size**2
        return self.B * (search + convolutions)

    def unavailable(self, device: torch.device) -> str | None:
        return "too large for a CPU" if self.B > 16 and device.type == "cpu" else None

    def inputs(self, device: torch.device) -> Inputs:
        """Codebook, phi_weight and phi_bias; then a latent a target, or indices, and gradients `(S, ...)`."""
        torch.backends.cudnn.allow_tf32 = False  # or phi would not be computed in float32
        generator = torch.Generator().manual_seed(0)
        bank = _hit_tiny_bank() if self.model == "hit-tiny" else _random_bank(self.K, self.C, generator)
        indices = torch.randint(self.K, (self.B, sum(self.lengths)), generator=generator)
        if self.task in ("decode", "steps"):
            return tuple(tensor.to(device) for tensor in (*bank, indices))
        side = self.sides[-1]
        if self.task in BACKWARD:
            maps = len(self.sides) if self.task == "backward-each" else 1
            grads = torch.randn(maps, self.B, self.C, side, side, generator=generator)
            return tuple(tensor.to(device) for tensor in (*bank, indices, grads))
        scales = [side for side in self.sides for _ in range(2)]
        decoded = torch.ops.hitsr_fast.residual_decode(
            indices[:1], *bank, scales, self.phi_index, [side, side], RATIO, False, False
        )[0]
        finest = _octaves(self.B, self.C, side, generator) * decoded.std()
        latents = [F.adaptive_avg_pool2d(finest, size) for size in self.target_sizes]
        return tuple(tensor.to(device) for tensor in (*bank, *latents))

    def expected(self, *inputs: Tensor) -> Expected:
        return Expected(eager_call(self, inputs)(), list(inputs[3:]))

    def wrong_rows(self, result: Result, expected: Expected) -> int:
        """0 if a result is as good as the eager loop's, else how many of its codes or images differ.

        Two right answers may differ: a row that lies between two codes may take either, and all later scales
        then see another residual. At least 99.9 % of the codes are to be the same, the error of the latents
        not larger by more than 1e-4 of it, and gradients the same to 5 %. Maps without codes of their own are
        to be the same to 1e-4 of their largest value.
        """
        wanted = expected.result
        if result.indices is None or wanted.indices is None:
            pairs = zip(result.maps, wanted.maps, strict=True)
            return sum(int(_differs(a, b).sum()) for a, b in pairs)
        differing = int((result.indices.to(wanted.indices.device) != wanted.indices).sum())
        fits = differing <= 1e-3 * wanted.indices.numel()
        for found, other, z in zip(result.maps, wanted.maps, expected.latents, strict=True):
            fits &= _error(found, z) <= _error(other, z) * (1 + 1e-4)
        for found, other in zip(result.gradients, wanted.gradients, strict=True):
            fits &= float((found - other).norm()) <= 0.05 * float(other.norm())
        return 0 if fits else max(differing, 1)


def _error(found: Tensor, z: Tensor) -> float:
    return float((found.detach().double() - z.double()).norm())


def _differs(found: Tensor, wanted: Tensor) -> Tensor:
    """`(B,)`: whether a map has a value that is off."""
    return (found - wanted).abs().flatten(1).amax(1) > 1e-4 * wanted.abs().max()


def _random_bank(K: int, C: int, generator: torch.Generator) -> Inputs:
    """Codes of order one half, and convolutions that keep a map's size."""
    shapes = {(K, C): 0.5, (PHIS, C, C, 3, 3): (9 * C) ** -0.5, (PHIS, C): 0.01}
    return tuple(torch.randn(shape, generator=generator) * size for shape, size in shapes.items())


@functools.cache
def _hit_tiny_bank() -> Inputs:
    quantizer = HitVar.from_pretrained("hit-tiny", dtype=torch.float32).tokenizer.quantize
    return tuple(p.detach() for p in (quantizer.codebook, quantizer.phi_weight, quantizer.phi_bias))


def _octaves(B: int, C: int, size: int, generator: torch.Generator) -> Tensor:
    """Noise with the same energy in each octave, as photos have, of variance one."""
    total, side, octaves = torch.zeros(B, C, size, size), size, 0
    while side >= 1:
        noise = torch.randn(B, C, side, side, generator=generator)
        total += F.interpolate(noise, size=(size, size), mode="bicubic")
        side, octaves = side // 2, octaves + 1
    return total / octaves**0.5


def _loss(maps: list[Tensor], latents: list[Tensor]) -> Tensor:
    """Of HIT-VAR's tokenizer training: the squared errors of the targets, over their variances."""
    errors = [F.mse_loss(found, z) / z.var() for found, z in zip(maps, latents, strict=True)]
    return torch.stack(errors).sum()


# --- VAR's loop


def eager_call(
    case: QuantizerCase,
    inputs: Inputs,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> Call:
    """A call of the eager loop; `wrap` is put on what a user would compile: the pass, or the one step."""
    codebook, weight, bias, *given = inputs
    eager = EagerQuantizer(codebook, weight, bias, case.sides, ratio=RATIO)
    sizes = [(side, side) for side in case.sides]

    def encode(z: Tensor) -> Result:
        found = eager.encode(z)
        return Result(torch.cat(found.indices, 1), found.maps)

    def pyramid(*latents: Tensor) -> Result:
        found = eager.encode_pyramid(latents, case.target_steps)
        return Result(torch.cat(found[-1].indices, 1), [encoded.maps[-1] for encoded in found])

    def decode(indices: Tensor) -> Result:
        codes = indices.split(case.lengths, dim=1)
        maps = [eager.lookup(found, size) for found, size in zip(codes, sizes, strict=True)]
        return Result(None, [eager.decode(maps)[-1]])

    def step(scale: int, f_hat: Tensor, indices: Tensor) -> Tensor:
        return eager.step(scale, f_hat, eager.lookup(indices, sizes[scale]))

    if case.task == "steps":
        advance, codes = wrap(step), given[0].split(case.lengths, dim=1)

        def steps() -> Result:
            f_hat = codebook.new_zeros(case.B, case.C, *sizes[-1])
            pooled = [advance(scale, f_hat, found) for scale, found in enumerate(codes)]
            return Result(None, pooled)

        return torch.no_grad()(steps)
    if case.task == "train":
        tokenize, parameters = wrap(pyramid), list(eager.parameters())

        def train() -> Result:
            found = tokenize(*given)
            return found._replace(gradients=torch.autograd.grad(_loss(found.maps, given), parameters))

        return train
    if case.task in BACKWARD:
        parameters = list(eager.parameters())
        with torch.enable_grad():
            codes = given[0].split(case.lengths, dim=1)
            code_maps = [eager.lookup(found, size) for found, size in zip(codes, sizes, strict=True)]
            maps = eager.decode(code_maps, every_map=case.task == "backward-each")
        grads = list(given[1])
        return lambda: Result(None, list(torch.autograd.grad(maps, parameters, grads, retain_graph=True)))
    run = wrap({"encode": encode, "pyramid": pyramid, "decode": decode}[case.task])
    return torch.no_grad()(lambda: run(*given))


def compiled_call(case: QuantizerCase, inputs: Inputs) -> Call:
    """The same under `torch.compile`."""
    call = eager_call(case, inputs, compiled)

    def run() -> object:
        with torch._dynamo.config.patch(recompile_limit=64):  # each of the sampler's steps is a graph
            return call()

    return run


def graphed_call(case: QuantizerCase, inputs: Inputs) -> Call:
    """The same, captured once and replayed as a CUDA graph."""
    call, stream = eager_call(case, inputs), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def _no_graphs(case: QuantizerCase, inputs: Inputs) -> str | None:
    if inputs[0].device.type != "cuda":
        return f"CUDA graphs need a CUDA device, found {inputs[0].device.type}"
    return "a backward pass is not captured here" if case.task in ("train", *BACKWARD) else None


def _not_compiled(case: QuantizerCase, inputs: Inputs) -> str | None:
    return "a backward pass alone is not compiled here" if case.task in BACKWARD else missing_compiler()


# --- the ops


def our_call(case: QuantizerCase, inputs: Inputs, *, prepare: bool = False) -> Call:
    """A call of the ops, with the codebook packed before where asked for."""
    codebook, weight, bias, *given = inputs
    bank, sides, phi_index = (codebook, weight, bias), case.sides, case.phi_index
    prepared = prepare_codebook(codebook) if prepare else None

    def encode() -> Result:
        out = residual_quantize(given[0], *bank, scales=sides, phi_index=phi_index, prepared=prepared)
        return Result(out.indices, [out.reconstruction])

    def pyramid() -> Result:
        return Result(
            *tokenize_pyramid(
                given,
                *bank,
                scales=sides,
                target_steps=case.target_steps,
                phi_index=[phi_index[:steps] for steps in case.target_steps],
                prepared=prepared,
            )
        )

    def decode() -> Result:
        out = residual_decode(given[0], *bank, scales=sides, phi_index=phi_index, size=sides[-1])
        return Result(None, [out.reconstruction])

    def steps() -> Result:
        f_hat = codebook.new_zeros(case.B, case.C, sides[-1], sides[-1])
        pooled = []
        for scale, found in enumerate(given[0].split(case.lengths, dim=1)):
            phi = phi_index[scale]
            following = sides[scale + 1] if scale + 1 < len(sides) else None
            pooled.append(
                residual_step(
                    f_hat,
                    found,
                    codebook,
                    weight[phi],
                    bias[phi],
                    scale=sides[scale],
                    next_scale=following,
                )
            )
        return Result(None, [*pooled[:-1], f_hat])

    def train() -> Result:
        nonlocal bank
        bank = tuple(tensor.detach().requires_grad_() for tensor in bank)
        found = pyramid()
        return found._replace(gradients=torch.autograd.grad(_loss(found.maps, given), bank))

    def backward() -> Result:
        indices, grads = given
        each = case.task == "backward-each"
        grad = torch.zeros_like(grads[0]) if each else grads[0]  # as autograd hands them over
        scales = [side for side in sides for _ in range(2)]
        arguments = (grad, grads if each else grads[:0], indices, *bank[:2], scales, phi_index, RATIO)
        return Result(None, list(torch.ops.hitsr_fast.residual_decode_backward(*arguments)))

    tasks = {"encode": encode, "pyramid": pyramid, "decode": decode, "steps": steps, "train": train}
    task = tasks.get(case.task, backward)

    def call() -> Result:
        with torch.set_grad_enabled(case.task == "train"):
            return task()

    return call


def _cannot_prepare(case: QuantizerCase, inputs: Inputs) -> str | None:
    if case.task in ("encode", "pyramid"):
        return None
    return "each step changes the codebook" if case.task == "train" else "no codebook is searched"


def _one_set(isa: str) -> Provider[QuantizerCase]:
    """Instruction sets are compared where the kernels are this op's own: the search is `nearest_code`'s."""

    def unavailable(case: QuantizerCase, inputs: Inputs) -> str | None:
        return None if case.task in BACKWARD else "only the gradient is timed on each instruction set"

    return ours("cpu", our_call, _op_arguments, isa=isa, unavailable=unavailable)


def _prepared(backend: str) -> Provider[QuantizerCase]:
    build = functools.partial(our_call, prepare=True)
    return ours(backend, build, _op_arguments, variant="prepared", unavailable=_cannot_prepare)


def _op_arguments(case: QuantizerCase, inputs: Inputs) -> list[OpCall]:
    """The ops that a task calls, with arguments as they get them."""
    bank = codebook, weight, bias = inputs[:3]
    scales = [side for side in case.sides for _ in range(2)]
    side, phi_index = case.sides[-1], case.phi_index
    z = codebook.new_zeros(case.B, case.C, side, side)
    indices = torch.zeros(case.B, sum(case.lengths), dtype=torch.int64, device=z.device)
    first, asked = indices[:, : case.lengths[0]], (False, False)
    arguments: dict[str, tuple[Any, ...]] = {
        "residual_quantize": (z, *bank, [], "", scales, phi_index, RATIO, None, "l2", *asked),
        "residual_decode": (indices, *bank, scales, phi_index, [side, side], RATIO, *asked),
        "residual_decode_backward": (z, z[None][:0], indices, codebook, weight, scales, phi_index, RATIO),
        "residual_step": (z, first, codebook, weight[0], bias[0], scales[:2], scales[2:4], RATIO),
    }
    return [(op, arguments[op]) for op in USED_OPS[case.task]]


def _compile_triton(case: QuantizerCase) -> object:
    codebook, weight, bias, z = case.inputs(torch.device("cpu"))
    scales = [side for side in case.sides for _ in range(2)]
    return triton.residual_quantize_triton(
        z, codebook, weight, bias, [], "", scales, case.phi_index, RATIO, None, "l2", False, False
    )


def _scores_per_turn(case: QuantizerCase, target: str) -> int:
    """Of the search on the last scale, which most rows belong to."""
    blocks = triton.search_constants(case.C, "l2", case.B * case.lengths[-1], 1)
    return blocks["BLOCK_N"] * blocks["BLOCK_K"] * blocks["PARTS"]


BENCHMARK = Benchmark(
    op="residual_quantize",
    providers=(
        Provider("eager", eager_call),
        Provider("torch.compile", compiled_call, _not_compiled),
        Provider("eager:cuda-graph", graphed_call, _no_graphs),
        *our_backends(our_call, _op_arguments, ("reference", "cpu", "triton", "cuda", None)),
        *(_one_set(isa) for isa in ("avx2", "portable")),
        *(_prepared(backend) for backend in ("cpu", "triton", "cuda")),
    ),
    cases=(
        *(QuantizerCase("encode", B) for B in (1, 8, 16, 64, 384)),
        QuantizerCase("pyramid", 4),
        QuantizerCase("decode", 16),
        QuantizerCase("steps", 1),
        QuantizerCase("train", 16, model="hit-tiny"),
        *(QuantizerCase(task, B) for task in BACKWARD for B in (1, 4, 16)),
    ),
    quick=tuple(QuantizerCase(task, 2, MODELS["toy"].K, MODELS["toy"].C, "toy") for task in USED_OPS),
    audit=AuditPlan(
        cases=(QuantizerCase("encode", 64), QuantizerCase("encode", 1)),
        launch=_compile_triton,
        loops={
            "_residual_quantize_search_kernel": ScoreLoop(
                scores=lambda case: case.B * case.K * sum(case.lengths),
                per_turn=_scores_per_turn,
                tensor_flops=lambda case: 2 * case.B * case.K * sum(case.lengths) * padded_channels(case.C),
            )
        },
    ),
)
