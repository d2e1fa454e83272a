"""`accelerate`: VAR models sample through the ops, by one line."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hitsr_fast.compat.var import VectorQuantizer2
from hitsr_fast.compat.var_sampler import VarSampler

Model = TypeVar("Model", bound=nn.Module)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ARGUMENTS = ["B", "label_B", "g_seed", "cfg", "top_k", "top_p", "more_smooth"]

# What is read of a VAR, of each block and of its tokenizer; what is not called must not be a subclass's own.
_MODEL = """autoregressive_infer_cfg blocks class_emb head.bias head_nm.ada_lin head_nm.ln_wo_grad lvl_1L
    lvl_embed num_classes patch_nums pos_1LC pos_start rng shared_ada_lin uniform_prob vae_proxy
    vae_quant_proxy word_embed"""
_BLOCK = """attn.attn_l2_norm attn.mat_qkv attn.num_heads attn.proj.bias attn.q_bias attn.scale attn.v_bias
    attn.zero_k_bias ffn.act ffn.fc1.bias ffn.fc2.bias ln_wo_grad shared_aln"""
_TOKENIZER = """fhat_to_img quantize.Cvae quantize.beta quantize.ema_vocab_hit_SV quantize.embedding.weight
    quantize.prog_si quantize.quant_resi quantize.quant_resi_ratio quantize.record_hit quantize.using_znorm
    quantize.v_patch_nums quantize.vocab_size"""
_MODEL_KINDS = {"head": nn.Linear, "head_nm.ln_wo_grad": nn.LayerNorm}
_BLOCK_KINDS: dict[str, type] = {
    **dict.fromkeys(("attn.mat_qkv", "attn.proj", "ffn.fc1", "ffn.fc2"), nn.Linear),
    "ffn.act": nn.GELU,
    "ln_wo_grad": nn.LayerNorm,
}
_BLOCK_VALUES: dict[str, object] = {
    "attn.mat_qkv.bias": None,
    "ffn.act.approximate": "tanh",
    "ln_wo_grad.elementwise_affine": False,
}
_MAX_SCALE = math.log(100)
_COMMON = ("attn.num_heads", "attn.scale", "attn.attn_l2_norm", "ln_wo_grad.eps")  # one value for all blocks


def accelerate(model: Model, *, dtype: torch.dtype | None = None, cuda_graphs: bool = True) -> Model:
    """Let an instance of VAR's class `VAR` sample through the ops of this package.

    Its `autoregressive_infer_cfg` is replaced, KV cache included, and the quantizer of its tokenizer, by a
    `VectorQuantizer2` that holds the same parameters. The arguments stay as they are. Greedy images
    (`top_k=1`) are the same; the others come from the same distribution, but by other random numbers.
    Training goes on untouched: `forward`, modes, parameters and state dicts are the model's own.

    Args:
        model: of VAR-d16 to d36 or any size, with AdaLN shared or not, for any `patch_nums`. Its class is not
            imported: it is known by its attributes.
        dtype: float32, bfloat16 or float16, of the blocks and the classifier while sampling. None is the
            weights' own, or autocast's where a call stands under it. In another dtype than the weights'
            each call converts them.
        cuda_graphs: False leaves out the CUDA graphs, of which there is one for each B and for each set of
            scales that are guided, from the second such call on.

    Returns:
        The same instance. `model.undo()` or `undo(model)` makes it again what it was. The end of a `with`
        block that it opens does so too, or, accelerated before already, gives it back the dtype of before.

    Raises:
        TypeError: the model is not known; the message lists what was looked for and not found, or what a
            subclass computes in its own way.
        ValueError: dtype is not one of those, or model and tokenizer have different scales.

    Notes:
        Accelerated once more, a model takes the new dtype; one `undo` ends it, in nested blocks too. Until
        then its class is a subclass of its own, with the same name.
        While sampling, blocks and head are read and not called: no hook of theirs runs, and training mode
        drops nothing. Embeddings and AdaLN are called, with a graph when it is captured.
        Source: VAR (arXiv 2404.02905), the interface of its released code.

    Example:
        With `var` an instance of VAR's class::

            with accelerate(var) as fast:
                images = fast.autoregressive_infer_cfg(B=8, label_B=207, cfg=1.5, top_k=900, top_p=0.96)

        Other models are refused:

        >>> accelerate(torch.nn.Linear(2, 2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        TypeError: model: expected VAR's `VAR`, found Linear. Looked for and not found: ...
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))} or None, found {dtype}")
    known = model._acceleration if isinstance(model, _Accelerated) else None
    if known is not None:
        known.undo()
    _expect_var(model)
    _Acceleration(model, VarSampler(model, dtype, cuda_graphs), known)
    return model


def undo(model: nn.Module) -> None:
    """Give a model that `accelerate` returned its own sampler and quantizer back; ValueError for another."""
    if not isinstance(model, _Accelerated):
        raise ValueError("model: expected one that `accelerate` returned, found that it is not accelerated")
    model.undo()


class _Accelerated:
    """What an accelerated model's class has before its own: `with` looks nowhere else."""

    _acceleration: _Acceleration

    @property
    def autoregressive_infer_cfg(self) -> Callable[..., Tensor]:
        """See `VarSampler`."""
        return self._acceleration.sampler.autoregressive_infer_cfg

    def undo(self) -> None:
        """See `accelerate`."""
        self._acceleration.undo()

    def __enter__(self) -> Any:
        self._acceleration.enter()
        return self

    def __exit__(self, *_error: object) -> None:
        if isinstance(self, _Accelerated):  # else it was undone within
            self._acceleration.leave()

    def __copy__(self) -> Any:
        other = _new(type(self).__mro__[2])
        vars(other).update(vars(self))
        self._acceleration.copy_to(other)
        return other

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(protocol)
        return _new, (type(self).__mro__[2],), *reduced[2:]


@functools.cache
def _accelerated(cls: Any) -> Any:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (_Accelerated, cls), names)


def _new(cls: type) -> Any:
    """What a copy or a pickle of an accelerated instance of a class starts from."""
    return object.__new__(_accelerated(cls))


class _Acceleration:
    """What was changed in a model, and how it was before."""

    def __init__(self, model: Any, sampler: VarSampler, known: _Acceleration | None = None) -> None:
        self.sampler = sampler
        self.before: VarSampler | None = (
            None if known is None else known.sampler
        )  # what a block that opens now goes back to
        self.blocks: list[VarSampler | None] = (
            [] if known is None else known.blocks
        )  # the same of those that are open
        self.model, self.proxy = model, model.vae_quant_proxy
        tokenizer = model.vae_proxy[0]
        quantizer = tokenizer.quantize
        _expect_tokenizer(model.patch_nums, quantizer, self.proxy[0])
        # Two models may share a tokenizer: the first one to come changes it, and changes it back.
        self.quantizer = None if isinstance(quantizer, VectorQuantizer2) else quantizer
        if self.quantizer is not None:
            tokenizer.quantize = _same_quantizer(self.quantizer)
        model.vae_quant_proxy = (tokenizer.quantize,)
        model._acceleration = self
        model.__class__ = _accelerated(model.__class__)

    def undo(self) -> None:
        """Put everything back; the quantizer keeps the tensors that it shares."""
        model, tokenizer = self.model, self.model.vae_proxy[0]
        if self.quantizer is not None:
            _share(tokenizer.quantize, self.quantizer)
            tokenizer.quantize = self.quantizer
        model.vae_quant_proxy = self.proxy
        model.__class__ = type(model).__mro__[2]
        del model._acceleration

    def enter(self) -> None:
        """Open a `with` block."""
        self.blocks.append(self.before)
        self.before = self.sampler

    def leave(self) -> None:
        """Close one: the sampler is again that of before, or the model's own."""
        before = self.blocks.pop() if self.blocks else None
        self.undo()
        if before is not None:
            _Acceleration(self.model, before, self)

    def copy_to(self, other: Any) -> None:
        """Accelerate a shallow copy of the model. The tokenizer is one for both: this one changes it back."""
        own = other._acceleration = copy.copy(self)
        own.model, own.sampler = other, self.sampler.of(other)
        own.before, own.blocks, own.quantizer = None, [], None


def _same_quantizer(theirs: Any) -> VectorQuantizer2:
    """Ours, with the parameters and buffers of VAR's."""
    bank = theirs.quant_resi
    share = len(bank.qresi_ls) if hasattr(bank, "qresi_ls") else 1 if hasattr(bank, "qresi") else 0
    with torch.device("meta"):  # draws no random numbers
        ours = VectorQuantizer2(
            *(theirs.vocab_size, theirs.Cvae, theirs.using_znorm, theirs.beta),
            *(0 if share else len(bank), theirs.v_patch_nums, theirs.quant_resi_ratio, share),
        )
    found, expected = theirs.state_dict().keys(), ours.state_dict().keys()
    if found != expected:
        raise TypeError(f"model: expected a quantizer with the state {list(expected)}, found {list(found)}")
    ours.prog_si, ours.record_hit = theirs.prog_si, theirs.record_hit
    _share(theirs, ours)
    return ours.train(theirs.training)


def _share(source: nn.Module, target: nn.Module) -> None:
    """Give a quantizer the tensors of another one; the names are the same."""
    for name, tensor in [*source.named_parameters(), *source.named_buffers()]:
        path, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(path), leaf, tensor)


def _expect_var(model: Any) -> None:
    """A model that is known, or an error."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected VAR's `VAR`, found {name}, which is no torch.nn.Module")
    missing = "; ".join(_missing(model))
    if missing:
        raise TypeError(f"model: expected VAR's `VAR`, found {name}. Looked for and not found: {missing}")


def _missing(model: Any) -> list[str]:
    """What makes a VAR and is not there, in words: of model, first block that misses something, tokenizer."""
    values: dict[str, object] = {"head_nm.ln_wo_grad.elementwise_affine": False}
    if missing := _unlike(model, _MODEL, _MODEL_KINDS, values, ("get_logits", "head_nm.forward")):
        return missing
    if list(inspect.signature(model.autoregressive_infer_cfg).parameters) != _ARGUMENTS:
        return [f"autoregressive_infer_cfg (a method with the arguments {', '.join(_ARGUMENTS)})"]
    for name in ("blocks", "vae_proxy", "vae_quant_proxy"):
        if len(getattr(model, name)) == 0:
            return [f"{name} (not empty)"]
    for i, block in enumerate(model.blocks):
        names = f"{_BLOCK} {'ada_gss' if _value(block, 'shared_aln') else 'ada_lin'}"
        if _value(block, "attn.attn_l2_norm"):
            names += " attn.scale_mul_1H11 attn.max_scale_mul"
        values = _BLOCK_VALUES | {name: _value(model.blocks[0], name) for name in _COMMON}
        missing = _unlike(block, names, _BLOCK_KINDS, values, ("forward", "attn.forward", "ffn.forward"))
        if abs((_value(block, "attn.max_scale_mul") or _MAX_SCALE) - _MAX_SCALE) > 1e-6:
            missing.append("attn.max_scale_mul (log 100)")
        if missing:
            return [f"blocks[{i}].{part}" for part in missing]
    return [f"vae_proxy[0].{part}" for part in _unlike(model.vae_proxy[0], _TOKENIZER, {}, {}, ())]


def _unlike(
    owner: Any, names: str, kinds: Mapping[str, type], values: Mapping[str, object], methods: Sequence[str]
) -> list[str]:
    """Attributes that are not there, or else those that are not as they are in VAR, in words."""
    return [name for name in names.split() if _value(owner, name) is None] or [
        *(
            f"{name} (torch.nn.{kind.__name__}, no subclass)"
            for name, kind in kinds.items()
            if type(_value(owner, name)) is not kind
        ),
        *(f"{name} ({value})" for name, value in values.items() if _value(owner, name) != value),
        *(f"{name} (no subclass's)" for name in methods if _overridden(owner, name)),
    ]


def _value(owner: Any, path: str) -> Any:
    """Of an attribute of an attribute; None where there is none."""
    return functools.reduce(lambda found, name: getattr(found, name, None), path.split("."), owner)


def _overridden(owner: Any, path: str) -> bool:
    """Whether a subclass has a method, which is not called, of its own."""
    *parts, method = path.split(".")
    classes = type(_value(owner, ".".join(parts)) if parts else owner).__mro__
    return sum(method in vars(cls) for cls in classes if cls is not nn.Module) > 1


def _expect_tokenizer(scales: Sequence[int], quantizer: Any, proxy: Any) -> None:
    """A tokenizer that fits the model, or an error."""
    if tuple(scales) != tuple(quantizer.v_patch_nums):
        expected = f"the scales of its tokenizer, {tuple(quantizer.v_patch_nums)}"
        raise ValueError(f"model: expected {expected}, found {tuple(scales)}")
    if getattr(proxy, "embedding", None) is None or proxy.embedding.weight is not quantizer.embedding.weight:
        raise ValueError("model: expected vae_quant_proxy to hold the quantizer of vae_proxy, found another")
