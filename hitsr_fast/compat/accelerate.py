"""`accelerate`: VAR models sample through the ops, by one line."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from hitsr_fast.compat.var import VectorQuantizer2
from hitsr_fast.compat.var_sampler import VarSampler

Model = TypeVar("Model", bound=nn.Module)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ARGUMENTS = ["B", "label_B", "g_seed", "cfg", "top_k", "top_p", "more_smooth"]
_REPLACED = ("autoregressive_infer_cfg", "undo", "vae_quant_proxy")


def accelerate(model: Model, *, dtype: torch.dtype | None = None) -> Model:
    """Let an instance of VAR's class `VAR` sample through the ops of this package.

    Its `autoregressive_infer_cfg` is replaced, KV cache included, and the quantizer of its tokenizer, by a
    `VectorQuantizer2` that holds the same parameters. The arguments stay as they are. Greedy images
    (`top_k=1`) are the same; the others come from the same distribution, but by other random numbers.
    Training goes on untouched: `forward`, modes, parameters and state dicts are the model's own.

    Args:
        model: of VAR-d16 to d36 or any size, with AdaLN shared or not, for any `patch_nums`. Its class is not
            imported: it is known by its attributes.
        dtype: float32, bfloat16 or float16, of the blocks and the classifier while sampling. None is the
            weights' own, or autocast's where a call stands under it. In another dtype than the weights' a
            converted copy of them is kept.

    Returns:
        The same instance. `model.undo()`, or `undo(model)`, makes it again what it was.

    Raises:
        TypeError: the model is not known; the message lists what was looked for and not found.
        ValueError: dtype is not one of those, or model and tokenizer have different scales.

    Notes:
        Accelerated once more, a model takes the new dtype; one `undo` ends it.
        While sampling, blocks and head are read and not called: no hook of theirs runs, no `forward` or
        `get_logits` of a subclass counts, and training mode drops nothing.
        Source: VAR (arXiv 2404.02905), the interface of its released code.

    Example:
        >>> from benchmarks.peers.var_autoencoder import VQVAE
        >>> from benchmarks.peers.var_model import VAR
        >>> vae = VQVAE(vocab_size=16, z_channels=4, ch=32, ch_mult=(1, 1), v_patch_nums=(1, 2))
        >>> var = VAR(vae, num_classes=10, depth=1, embed_dim=32, num_heads=2, patch_nums=(1, 2)).eval()
        >>> theirs = var.autoregressive_infer_cfg(B=2, label_B=3, cfg=1.5, top_k=1)
        >>> ours = accelerate(var).autoregressive_infer_cfg(B=2, label_B=3, cfg=1.5, top_k=1)
        >>> torch.testing.assert_close(ours, theirs)
        >>> var.undo()
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))} or None, found {dtype}")
    if (known := _acceleration(model)) is not None:
        known.undo()
    _expect_var(model)
    _Acceleration(model, dtype)
    return model


def undo(model: nn.Module) -> None:
    """Give a model that `accelerate` has changed its own sampler and quantizer back.

    Args:
        model: as `accelerate` returned it.

    Raises:
        ValueError: it is not accelerated.
    """
    known = _acceleration(model)
    if known is None:
        raise ValueError("model: expected one that `accelerate` returned, found that it is not accelerated")
    known.undo()


class _Acceleration:
    """What was changed in a model, and how it was before."""

    def __init__(self, model: Any, dtype: torch.dtype | None) -> None:
        self.model = model
        self.before = {name: vars(model)[name] for name in _REPLACED if name in vars(model)}
        tokenizer = model.vae_proxy[0]
        quantizer = tokenizer.quantize
        _expect_tokenizer(model.patch_nums, quantizer, model.vae_quant_proxy[0])
        # Two models may share a tokenizer: the first one to come changes it, and changes it back.
        self.quantizer = None if isinstance(quantizer, VectorQuantizer2) else quantizer
        if self.quantizer is not None:
            tokenizer.quantize = _same_quantizer(self.quantizer)
        model.vae_quant_proxy = (tokenizer.quantize,)
        model.autoregressive_infer_cfg = VarSampler(model, dtype).autoregressive_infer_cfg
        model.undo = self.undo

    def undo(self) -> None:
        """Put everything back; the quantizer keeps the tensors that it shares."""
        tokenizer = self.model.vae_proxy[0]
        if self.quantizer is not None:
            _share(tokenizer.quantize, self.quantizer)
            tokenizer.quantize = self.quantizer
        for name in _REPLACED:
            if name in self.before:
                setattr(self.model, name, self.before[name])
            else:
                delattr(self.model, name)


def _acceleration(model: object) -> _Acceleration | None:
    """What accelerates a model now, if anything does."""
    owner = getattr(getattr(model, "undo", None), "__self__", None)
    return owner if isinstance(owner, _Acceleration) else None


def _same_quantizer(theirs: Any) -> VectorQuantizer2:
    """Ours, with the parameters and buffers of VAR's."""
    bank = theirs.quant_resi
    share = len(bank.qresi_ls) if hasattr(bank, "qresi_ls") else 1 if hasattr(bank, "qresi") else 0
    with torch.device("meta"):  # draws no random numbers
        ours = VectorQuantizer2(
            theirs.vocab_size,
            theirs.Cvae,
            theirs.using_znorm,
            theirs.beta,
            0 if share else len(bank),
            theirs.v_patch_nums,
            theirs.quant_resi_ratio,
            share,
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


class _Part(NamedTuple):
    """An attribute that VAR's class has: its path, what it is in words, and whether a value is that."""

    path: str
    kind: str
    fits: Callable[[Any], bool]

    def missing(self, owner: Any, prefix: str) -> Iterator[str]:
        """This part in words, where an object does not have it."""
        value = owner
        for name in self.path.split("."):
            if not hasattr(value, name):
                break
            value = getattr(value, name)
        else:
            if self.fits(value):
                return
        yield f"{prefix}{self.path} ({self.kind})"


def _kind(kind: type | tuple[type, ...], words: str) -> Callable[[str], list[_Part]]:
    """Parts of a kind by their names."""

    def parts(names: str) -> list[_Part]:
        return [_Part(name, words, lambda value: isinstance(value, kind)) for name in names.split()]

    return parts


def _plain_linear(names: str, *, bias: bool) -> list[_Part]:
    """Parts whose weights are read instead of calling them: a subclass might compute something else."""
    kind = f"torch.nn.Linear, no subclass, {'with' if bias else 'without'} bias"
    return [
        _Part(name, kind, lambda value: type(value) is nn.Linear and (value.bias is not None) == bias)
        for name in names.split()
    ]


_module = _kind(nn.Module, "a module")
_tensor = _kind(Tensor, "a tensor")
_number = _kind((int, float), "a number")
_flag = _kind((bool, int), "a bool")
_plain_norm = _Part(
    "ln_wo_grad",
    "torch.nn.LayerNorm without affine part",
    lambda value: type(value) is nn.LayerNorm and not value.elementwise_affine,
)
_gelu = _Part(
    "ffn.act", "torch.nn.GELU, tanh", lambda value: type(value) is nn.GELU and value.approximate == "tanh"
)

_MODEL = [
    _Part(
        "autoregressive_infer_cfg",
        f"a method with the arguments {', '.join(_ARGUMENTS)}",
        lambda value: callable(value) and list(inspect.signature(value).parameters) == _ARGUMENTS,
    ),
    *_kind((tuple, list), "sides of the scales")("patch_nums"),
    *_number("num_classes"),
    *_kind(torch.Generator, "a torch.Generator")("rng"),
    *_tensor("uniform_prob lvl_1L pos_start pos_1LC"),
    *_module("class_emb lvl_embed word_embed shared_ada_lin head_nm head_nm.ada_lin"),
    _plain_norm._replace(path="head_nm.ln_wo_grad"),
    *_plain_linear("head", bias=True),
    _Part(
        "blocks",
        "a torch.nn.ModuleList, not empty",
        lambda value: isinstance(value, nn.ModuleList) and len(value) > 0,
    ),
    _Part(
        "vae_proxy", "a tuple of the tokenizer", lambda value: isinstance(value, tuple) and len(value) == 1
    ),
    _Part(
        "vae_quant_proxy",
        "a tuple of its quantizer",
        lambda value: isinstance(value, tuple) and len(value) == 1,
    ),
]
_BLOCK = [
    *_plain_linear("attn.mat_qkv", bias=False),
    *_plain_linear("attn.proj ffn.fc1 ffn.fc2", bias=True),
    *_tensor("attn.q_bias attn.zero_k_bias attn.v_bias"),
    *_number("attn.num_heads attn.scale"),
    *_flag("attn.attn_l2_norm shared_aln"),
    _gelu,
    _plain_norm,
]
_L2_NORM = [
    *_tensor("attn.scale_mul_1H11"),
    _Part(
        "attn.max_scale_mul",
        "log 100",
        lambda value: isinstance(value, float) and abs(value - math.log(100)) < 1e-6,
    ),
]
# One value serves all blocks.
_COMMON = ["attn.num_heads", "attn.scale", "attn.attn_l2_norm", "ln_wo_grad.eps"]
_TOKENIZER = [
    *_module("quantize"),
    _Part("fhat_to_img", "a method", callable),
]
_QUANTIZER = [
    *_number("vocab_size Cvae beta quant_resi_ratio prog_si record_hit"),
    *_flag("using_znorm"),
    *_kind((tuple, list), "sides of the scales")("v_patch_nums"),
    *_module("embedding quant_resi"),
    *_tensor("embedding.weight ema_vocab_hit_SV"),
]


def _as_in(first: Any) -> list[_Part]:
    """What other blocks share with the first."""

    def part(path: str) -> _Part:
        expected = operator.attrgetter(path)(first)
        return _Part(path, f"{expected}, as in blocks[0]", lambda value: value == expected)

    return [part(path) for path in _COMMON]


def _missing(model: Any) -> Iterator[str]:
    """What makes a VAR and is not there, in words."""

    def look(parts: list[_Part], owner: Any, prefix: str = "") -> Iterator[str]:
        for part in parts:
            yield from part.missing(owner, prefix)

    top = list(look(_MODEL, model))
    yield from top
    for i, block in enumerate(getattr(model, "blocks", ())):
        prefix = f"blocks[{i}]."
        own = list(look(_BLOCK, block, prefix))
        if getattr(getattr(block, "attn", None), "attn_l2_norm", False):
            own += look(_L2_NORM, block, prefix)
        shared = getattr(block, "shared_aln", False)
        own += look(_tensor("ada_gss") if shared else _module("ada_lin"), block, prefix)
        if not own:
            own += look(_as_in(model.blocks[0]), block, prefix)
        yield from own
        if own:
            return  # the others miss the same
    if not top:
        yield from look(_TOKENIZER, model.vae_proxy[0], "vae_proxy[0].")
        yield from look(_QUANTIZER, getattr(model.vae_proxy[0], "quantize", None), "vae_proxy[0].quantize.")


def _expect_var(model: Any) -> None:
    """A model that is known, or an error."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected VAR's `VAR`, found {name}, which is no torch.nn.Module")
    missing = "; ".join(_missing(model))
    if missing:
        raise TypeError(f"model: expected VAR's `VAR`, found {name}. Looked for and not found: {missing}")


def _expect_tokenizer(scales: Sequence[int], quantizer: Any, proxy: Any) -> None:
    """A tokenizer that fits the model, or an error."""
    if tuple(scales) != tuple(quantizer.v_patch_nums):
        raise ValueError(
            f"model: expected the scales of its tokenizer, {tuple(quantizer.v_patch_nums)}, "
            f"found {tuple(scales)}"
        )
    if getattr(proxy, "embedding", None) is None or proxy.embedding.weight is not quantizer.embedding.weight:
        raise ValueError("model: expected vae_quant_proxy to hold the quantizer of vae_proxy, found another")
