"""`accelerate` against VAR's model in eager PyTorch: images, tokens, distribution, and the way back."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.peers import var_model
from benchmarks.peers.var_autoencoder import VQVAE
from benchmarks.peers.var_model import VAR
from benchmarks.shapes import MODELS
from hitsr_fast.compat import VectorQuantizer2, accelerate, undo
from hitsr_fast.compat.var_sampler import mixtures
from hitsr_fast.dispatch import use_backend
from hitsr_fast.nn.cached_body import CachedBody
from hitsr_fast.nn.sampling import Classifier, guided_logits
from tests.ops.chi_square import chi_square, chi_square_bound
from tests.tolerances import TOLERANCES

SAME = TOLERANCES["float32_reordered"]._asdict()
VAR_256, VAR_512 = MODELS["var-256"].scales, MODELS["var-512"].scales
SEVERAL = (1, 2, 3, 5, 8)
FEW = (1, 2, 4)


def make(
    patch_nums: tuple[int, ...] = FEW,
    *,
    shared_aln: bool = False,
    l2_norm: bool = True,
    codes: int = 40,
    depth: int = 2,
    share: int = 4,
    drop_path: float = 0.0,
    head: float = 4.0,
) -> VAR:
    """A small VAR whose every parameter matters to what it samples."""
    torch.manual_seed(1)
    vae = VQVAE(codes, 4, 32, (1, 1), v_patch_nums=patch_nums, share_quant_resi=share)
    model = VAR(
        vae,
        num_classes=10,
        depth=depth,
        embed_dim=32,
        num_heads=2,
        shared_aln=shared_aln,
        attn_l2_norm=l2_norm,
        patch_nums=patch_nums,
        drop_path_rate=drop_path,
    )
    with torch.no_grad():
        model.init_weights(init_adaln=1.0, init_adaln_gamma=3.0, init_head=1.0)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif "scale_mul" in name:
                parameter.uniform_(0.0, 6.0)  # some beyond the largest that counts
        model.head.weight.mul_(head)
        model.pos_1LC.mul_(5.0)  # or all tokens of a scale would be alike
        vae.quantize.embedding.weight.normal_(std=0.5)
    return model.eval()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small spend more time on waking threads than on arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def recorded(module: Any, name: str, what: Callable[..., Any]) -> Iterator[list[Any]]:
    """What a function of a module is called with or returns, call by call."""
    original, calls = getattr(module, name), []

    def spy(*args: Any, **options: Any) -> Any:
        out = original(*args, **options)
        calls.append(what(out, *args, **options))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, spy)
        yield calls


def both(model: VAR, **options: Any) -> SimpleNamespace:
    """Images and tokens of one call, by the model's own sampler and by ours."""
    with recorded(var_model, "sample", lambda out, *args: out) as expected:
        theirs = model.autoregressive_infer_cfg(**options)
    with recorded(Classifier, "codes", lambda out, *args: out) as found:
        ours = accelerate(model).autoregressive_infer_cfg(**options)
    undo(model)
    return SimpleNamespace(theirs=theirs, ours=ours, expected=expected, found=found)


def check_same(model: VAR, **options: Any) -> None:
    """Tokens exactly, images up to the order of sums."""
    out = both(model, top_k=1, **options)
    assert all(torch.equal(a, b) for a, b in zip(out.found, out.expected, strict=True))
    torch.testing.assert_close(out.ours, out.theirs, **SAME)
    assert len(torch.cat(out.found, dim=1).unique()) > 6


@pytest.mark.parametrize("cfg", [0, 2.5, -0.5])
@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("shared_aln", [False, True])
def test_greedy_images_are_the_same(shared_aln: bool, l2_norm: bool, cfg: float) -> None:
    model = make(SEVERAL, shared_aln=shared_aln, l2_norm=l2_norm)
    check_same(model, B=2, label_B=torch.tensor([3, 7]), cfg=cfg)


@pytest.mark.parametrize("patch_nums", [VAR_256, VAR_512])
def test_greedy_images_of_the_published_sizes_are_the_same(patch_nums: tuple[int, ...]) -> None:
    check_same(make(patch_nums, shared_aln=patch_nums == VAR_512), B=1, label_B=4, cfg=1.5)


@pytest.mark.parametrize("label_B", [5, -1, None, torch.tensor([2, 9, 10])])
def test_labels(label_B: int | Tensor | None) -> None:
    check_same(make(), B=3, label_B=label_B, g_seed=6, cfg=1.5)


def test_labels_without_a_seed_come_from_the_default_generator() -> None:
    model = make()
    torch.manual_seed(3)
    theirs = model.autoregressive_infer_cfg(4, None, cfg=0, top_k=1)
    torch.manual_seed(3)
    ours = accelerate(model).autoregressive_infer_cfg(4, None, cfg=0, top_k=1)
    torch.testing.assert_close(ours, theirs, **SAME)


@pytest.mark.parametrize("share", [0, 1])
def test_other_banks_of_phi(share: int) -> None:
    check_same(make(share=share), B=2, label_B=1, cfg=1.0)


def test_other_backends() -> None:
    with use_backend("reference"):
        check_same(make(), B=2, label_B=1, cfg=1.0)


def test_without_guidance_there_is_one_branch() -> None:
    model = accelerate(make())
    for cfg, rows in ((0, 3), (1.5, 6)):
        with recorded(CachedBody, "__call__", lambda out, body, x, *rest: len(x)) as sizes:
            model.autoregressive_infer_cfg(3, 1, cfg=cfg)
        assert sizes == [rows] * len(FEW)


def test_modulation_is_computed_once_a_call() -> None:
    model = make()
    linear = model.blocks[0].ada_lin[1]
    calls: list[int] = []
    linear.register_forward_hook(lambda *args: calls.append(1))
    model.autoregressive_infer_cfg(1, 1)
    assert len(calls) == len(FEW)
    calls.clear()
    accelerate(model).autoregressive_infer_cfg(1, 1)
    assert len(calls) == 1


@pytest.mark.parametrize("top_k, top_p", [(0, 0.0), (12, 0.0), (0, 0.7), (20, 0.9), (0, 1.5), (-1, -1.0)])
def test_the_distribution_is_the_same(top_k: int, top_p: float) -> None:
    """Chi-square of the first scale's codes, and of the last one's first after the most frequent of those."""
    model, n = make((1, 2), head=2.0), 8000
    model.vae_proxy[0].fhat_to_img = lambda f_hat: f_hat  # images are not looked at
    options = {"B": n, "label_B": 3, "g_seed": 0, "cfg": 2.0, "top_k": top_k, "top_p": top_p}
    with recorded(Classifier, "codes", lambda out, *args: out) as drawn:
        accelerate(model).autoregressive_infer_cfg(**options)
    undo(model)
    with recorded(var_model, "sample", lambda out, logits, *args: (out, logits.clone())) as peer:
        model.autoregressive_infer_cfg(**options | {"B": 200})
    first, second = drawn[0][:, 0], drawn[1][:, 0]
    check_distribution(first, peer[0][1][0, 0])
    mode = first.mode().values
    same = peer[0][0][:, 0] == mode
    check_distribution(second[first == mode], peer[1][1][same][0, 0])


def check_distribution(drawn: Tensor, filtered: Tensor) -> None:
    probabilities = filtered.double().softmax(0)
    freedom = int((probabilities * len(drawn) >= 5).sum())
    assert freedom >= 3
    assert chi_square(drawn, probabilities) < chi_square_bound(freedom)
    # A distribution that is sharper than this is seen.
    assert chi_square(drawn, (filtered.double() * 2).softmax(0)) > chi_square_bound(freedom)


def test_a_seed_repeats_itself() -> None:
    model = accelerate(make())
    first, again, other = (
        model.autoregressive_infer_cfg(2, 3, g_seed=seed, cfg=1.5, top_k=20) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(4)
    free = model.autoregressive_infer_cfg(2, 3, cfg=1.5, top_k=20)
    assert not torch.equal(free, model.autoregressive_infer_cfg(2, 3, cfg=1.5, top_k=20))
    torch.manual_seed(4)
    assert torch.equal(free, model.autoregressive_infer_cfg(2, 3, cfg=1.5, top_k=20))


@pytest.mark.parametrize("cfg", [0, 2.0])
def test_smooth_images_are_the_same_when_greedy(cfg: float) -> None:
    model = make(SEVERAL)
    options = {"B": 2, "label_B": 3, "g_seed": 0, "cfg": cfg, "top_k": 1, "more_smooth": True}
    theirs = model.autoregressive_infer_cfg(**options)
    torch.testing.assert_close(accelerate(model).autoregressive_infer_cfg(**options), theirs, **SAME)


@pytest.mark.parametrize("top_k, top_p", [(0, 0.0), (12, 0.0), (20, 0.8)])
@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_mixtures_are_those_of_var(ratio: float, top_k: int, top_p: float) -> None:
    """With the same noise, the same mixtures."""
    cond, uncond = torch.randn(2, 3, 5, 40).mul(2).unbind()
    codebook = torch.randn(40, 4)
    seeded = torch.Generator().manual_seed(7)
    logits = guided_logits(torch.stack([cond, uncond]), 1.5 * ratio)
    torch.testing.assert_close(logits, (1 + 1.5 * ratio) * cond - 1.5 * ratio * uncond, **SAME)
    found = mixtures(logits, codebook, ratio=ratio, top_k=top_k, top_p=top_p, generator=seeded)
    var_model.sample(logits, top_k, top_p, None)
    weights = var_model.gumbel_softmax(
        logits * (1 + ratio), max(0.27 * (1 - ratio * 0.95), 0.005), seeded.manual_seed(7)
    )
    torch.testing.assert_close(found, weights @ codebook, **SAME)


def test_smooth_images_differ_from_plain_ones_and_repeat() -> None:
    model = accelerate(make())
    plain, smooth, again = (
        model.autoregressive_infer_cfg(2, 3, g_seed=1, cfg=1.5, more_smooth=smooth)
        for smooth in (False, True, True)
    )
    assert torch.equal(smooth, again)
    assert not torch.equal(smooth, plain)


def test_bfloat16_and_autocast() -> None:
    """Under autocast the blocks run in its dtype, and both ways to bfloat16 give the same."""
    model = make()
    options = {"B": 16, "label_B": torch.arange(16) % 11, "cfg": 0, "top_k": 1}
    with recorded(Classifier, "logits", lambda out, *args: out) as logits:
        accelerate(model).autoregressive_infer_cfg(**options)
        with torch.autocast("cpu", torch.bfloat16):
            ambient = model.autoregressive_infer_cfg(**options)
            accelerate(model, dtype=torch.bfloat16)
            assert torch.equal(model.autoregressive_infer_cfg(**options), ambient)
    wide, narrow, asked = logits[:: len(FEW)]  # of the first scale, from which on codes may differ
    size = wide.std()
    assert torch.equal(narrow, asked) and not torch.equal(narrow, wide)
    torch.testing.assert_close(narrow / size, wide / size, **TOLERANCES["bfloat16"]._asdict())
    assert model.autoregressive_infer_cfg(**options).dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_nothing_waits_for_a_gpu() -> None:
    """On fake tensors of a GPU, where reading a value is an error."""
    model = make()
    modules = (model, model.vae_proxy[0])
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    with FakeTensorMode():
        memo: dict[int, Any] = {id(model.rng): model.rng}
        for tensor in (*tensors, model.uniform_prob):
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
            trained = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(fake, requires_grad=False) if trained else fake
        fake_model = copy.deepcopy(model, memo)
        for dtype in (None, torch.bfloat16):
            accelerate(fake_model, dtype=dtype)
            for options in ({"top_k": 1}, {"top_k": 9, "top_p": 0.9, "g_seed": 0}, {"more_smooth": True}):
                for label, cfg in ((3, 0.0), (None, 1.5)):
                    image = fake_model.autoregressive_infer_cfg(2, label, cfg=cfg, **options)
                    assert image.shape == (2, 3, 8, 8) and image.device.type == "cuda"


def test_parameters_may_change() -> None:
    """Also where they are converted, and where no version counts it."""
    for dtype in (None, torch.bfloat16):
        model, other = make(), make()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        before = accelerate(model, dtype=dtype).autoregressive_infer_cfg(2, 3, top_k=1)
        model.load_state_dict(other.state_dict())
        after = model.autoregressive_infer_cfg(2, 3, top_k=1)
        assert not torch.equal(before, after)
        expected = accelerate(other, dtype=dtype).autoregressive_infer_cfg(2, 3, top_k=1)
        assert torch.equal(after, expected)
    for fused in (False, True):
        model = accelerate(make(), dtype=torch.bfloat16)
        before = model.autoregressive_infer_cfg(2, 3, top_k=1)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused).step()
        after = model.autoregressive_infer_cfg(2, 3, top_k=1)
        assert not torch.equal(before, after)
        expected = accelerate(model, dtype=torch.bfloat16).autoregressive_infer_cfg(2, 3, top_k=1)
        assert torch.equal(after, expected)
    for dtype in (None, torch.bfloat16):
        model, other = accelerate(make(), dtype=dtype), make()
        model.autoregressive_infer_cfg(2, 3, top_k=1)
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.1)
        found, expected = (
            m.autoregressive_infer_cfg(2, 3, top_k=1) for m in (model, accelerate(other, dtype=dtype))
        )
        assert torch.equal(found, expected)


def attributes(model: VAR) -> dict[str, dict[str, Any]]:
    """Everything that model and tokenizer hold, module by module."""
    owners = {"var": model} | {f"vae{i}": vae for i, vae in enumerate(model.vae_proxy)}
    return {
        f"{owner}.{name}": vars(module)
        | dict(module._parameters)
        | dict(module._buffers)
        | dict(module._modules)
        for owner, top in owners.items()
        for name, module in top.named_modules()
    }


def identities(model: VAR) -> dict[str, dict[str, int]]:
    containers = ("_parameters", "_buffers", "_modules")
    return {
        name: {key: id(value) for key, value in found.items() if key not in containers}
        for name, found in attributes(model).items()
    }


def test_undo_restores_every_attribute() -> None:
    model = make()
    kept, before = attributes(model), identities(model)  # kept alive, so that no identity is given twice
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model.autoregressive_infer_cfg(2, 3, g_seed=0)
    assert accelerate(model) is model
    assert isinstance(model.vae_proxy[0].quantize, VectorQuantizer2)
    assert model.vae_quant_proxy == (model.vae_proxy[0].quantize,)
    assert identities(model) != before
    model.autoregressive_infer_cfg(2, 3, g_seed=0)
    model.undo()
    assert identities(model) == before and len(kept) == len(before)
    assert "autoregressive_infer_cfg" not in vars(model) and not hasattr(model, "undo")
    assert torch.equal(model.autoregressive_infer_cfg(2, 3, g_seed=0), expected)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    with pytest.raises(ValueError, match="found that it is not accelerated"):
        undo(model)


def test_as_a_context_it_undoes_itself() -> None:
    model = make()
    before, expected = identities(model), model.autoregressive_infer_cfg(2, 3, top_k=1)
    with accelerate(model) as fast:
        assert fast is model and isinstance(model, VAR) and type(model).__name__ == "VAR"
        assert isinstance(model.vae_proxy[0].quantize, VectorQuantizer2)
        torch.testing.assert_close(fast.autoregressive_infer_cfg(2, 3, top_k=1), expected, **SAME)
    assert identities(model) == before and type(model) is VAR
    with pytest.raises(ZeroDivisionError), accelerate(model):
        raise ZeroDivisionError
    assert identities(model) == before and type(model) is VAR
    with accelerate(model):
        model.undo()
    assert identities(model) == before and type(model) is VAR


def test_the_end_of_a_nested_context_is_not_that_of_the_outer_one() -> None:
    model = make()
    before = identities(model)

    def dtype() -> torch.dtype | None:
        with recorded(CachedBody, "__call__", lambda out, body, *args: body.dtype) as dtypes:
            model.autoregressive_infer_cfg(1, 3, top_k=1)
        return dtypes[0] if dtypes else None

    with accelerate(model):
        with accelerate(model, dtype=torch.bfloat16):
            with model, accelerate(model, dtype=torch.float16):
                assert dtype() == torch.float16
            assert dtype() == torch.bfloat16
        assert dtype() == torch.float32
        accelerate(model, dtype=torch.float16)
        assert dtype() == torch.float16
    assert identities(model) == before and dtype() is None
    accelerate(model)
    with accelerate(model, dtype=torch.bfloat16):
        assert dtype() == torch.bfloat16
    assert dtype() == torch.float32
    with model, accelerate(model):
        undo(model)
    assert identities(model) == before and type(model) is VAR
    with accelerate(model):
        undo(model)
        accelerate(model)
    assert identities(model) == before and type(model) is VAR


def test_subclasses_are_known_and_stay_what_they_are() -> None:
    class Own(VAR):
        def forward(self, *args: Any) -> Tensor:  # of training only
            return super().forward(*args)

    model = make()
    model.__class__ = Own
    assert isinstance(accelerate(model), Own)
    undo(model)
    assert type(model) is Own


def test_undo_restores_a_method_that_was_patched_in() -> None:
    model = make()
    own = type(model).autoregressive_infer_cfg.__get__(model)
    model.autoregressive_infer_cfg = own
    undo(accelerate(model))
    assert vars(model)["autoregressive_infer_cfg"] is own


def test_undo_brings_along_what_has_changed_since() -> None:
    model = make()
    quantizer = model.vae_proxy[0].quantize
    accelerate(model)
    model.vae_proxy[0].to(torch.float64)
    model.undo()
    assert model.vae_proxy[0].quantize is quantizer
    assert {value.dtype for value in quantizer.state_dict().values()} == {torch.float64}


def test_twice_is_once_with_the_later_dtype() -> None:
    model = make()
    before = identities(model)
    accelerate(accelerate(model, dtype=torch.bfloat16))
    found = model.autoregressive_infer_cfg(2, 3, top_k=1)
    model.undo()
    assert identities(model) == before
    torch.testing.assert_close(found, model.autoregressive_infer_cfg(2, 3, top_k=1), **SAME)


def test_two_models_with_one_tokenizer() -> None:
    first, second = make(), make()
    second.vae_proxy, second.vae_quant_proxy = first.vae_proxy, first.vae_quant_proxy
    before = identities(first), identities(second)
    expected = second.autoregressive_infer_cfg(1, 3, top_k=1)
    accelerate(first), accelerate(second)
    torch.testing.assert_close(second.autoregressive_infer_cfg(1, 3, top_k=1), expected, **SAME)
    second.undo(), first.undo()
    assert (identities(first), identities(second)) == before


def test_state_dicts_and_random_numbers_are_left_alone() -> None:
    model = make()
    vae = model.vae_proxy[0]
    before = {key: value.clone() for part in (model, vae) for key, value in part.state_dict().items()}
    names, trained = list(before), [id(parameter) for parameter in (*model.parameters(), *vae.parameters())]
    random = torch.get_rng_state()
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), random)
    after = {key: value for part in (model, vae) for key, value in part.state_dict().items()}
    assert list(after) == names
    assert all(torch.equal(after[name], before[name]) for name in names)
    assert [id(parameter) for parameter in (*model.parameters(), *vae.parameters())] == trained


def test_the_tokenizer_gives_the_same_tokens() -> None:
    model, image = make(), torch.rand(2, 3, 8, 8) * 2 - 1
    expected = model.vae_proxy[0].img_to_idxBl(image)
    found = accelerate(model).vae_proxy[0].img_to_idxBl(image)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def step(model: VAR) -> tuple[Tensor, list[Tensor]]:
    """A training step: loss and gradients."""
    torch.manual_seed(2)
    quantizer = model.vae_proxy[0].quantize
    indices = [torch.randint(40, (2, side * side)) for side in FEW]
    logits = model.train()(torch.tensor([1, 2]), quantizer.idxBl_to_var_input(indices))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat(indices, 1).flatten())
    return loss, list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


def test_training_is_untouched() -> None:
    model = make(drop_path=0.3)
    expected = step(model)
    for change in (accelerate, undo):
        change(model)
        loss, gradients = step(model)
        torch.testing.assert_close(loss, expected[0], **SAME)
        for found, wanted in zip(gradients, expected[1], strict=True):
            torch.testing.assert_close(found, wanted, **SAME)
        assert model.training


def test_training_mode_drops_nothing_while_sampling() -> None:
    model = make(drop_path=0.5)
    expected = model.autoregressive_infer_cfg(2, 3, top_k=1)
    found = accelerate(model.train()).autoregressive_infer_cfg(2, 3, top_k=1)
    torch.testing.assert_close(found, expected, **SAME)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_accelerated_on_their_own(how: str) -> None:
    model = accelerate(make(), dtype=torch.bfloat16)
    expected = model.autoregressive_infer_cfg(1, 3, top_k=1)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(other.autoregressive_infer_cfg(1, 3, top_k=1), expected)
    with torch.no_grad():
        other.class_emb.weight.zero_()
    assert not torch.equal(other.autoregressive_infer_cfg(1, 3, top_k=1), expected)
    assert torch.equal(model.autoregressive_infer_cfg(1, 3, top_k=1), expected)
    other.undo()
    assert not isinstance(other.vae_proxy[0].quantize, VectorQuantizer2)
    assert isinstance(model.vae_proxy[0].quantize, VectorQuantizer2)


def test_a_shallow_copy_is_undone_on_its_own() -> None:
    model = make()
    before, expected = identities(model), model.autoregressive_infer_cfg(1, 3, top_k=1)
    other = copy.copy(accelerate(model))
    assert torch.equal(
        other.autoregressive_infer_cfg(1, 3, top_k=1), model.autoregressive_infer_cfg(1, 3, top_k=1)
    )
    undo(other)
    assert type(other) is VAR and type(model) is not VAR
    torch.testing.assert_close(model.autoregressive_infer_cfg(1, 3, top_k=1), expected, **SAME)
    second = copy.copy(model)
    undo(model)
    assert identities(model) == before and type(model) is VAR
    torch.testing.assert_close(second.autoregressive_infer_cfg(1, 3, top_k=1), expected, **SAME)
    undo(second)
    assert identities(second) == before


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"expected VAR's `VAR`, found int, which is no torch\.nn\.Module"):
        accelerate(3)  # type: ignore[type-var]
    with pytest.raises(TypeError) as error:
        accelerate(nn.Linear(2, 2))
    for part in ("blocks", "autoregressive_infer_cfg", "pos_1LC", "head_nm.ada_lin"):
        assert part in str(error.value).split(": ")[-1].split("; ")
    assert "found Linear. Looked for and not found:" in str(error.value)


class LowRank(nn.Linear):
    """A linear that computes something else than its weight says."""


def without_bias(model: VAR) -> None:
    del model.blocks[1].attn.q_bias


def adapted(model: VAR) -> None:
    model.blocks[0].ffn.fc1 = LowRank(32, 128)


def other_activation(model: VAR) -> None:
    model.blocks[0].ffn.act = nn.GELU()


def affine(model: VAR) -> None:
    model.blocks[0].ln_wo_grad = nn.LayerNorm(32)


def without_tokenizer(model: VAR) -> None:
    model.vae_proxy = ()


def without_phi(model: VAR) -> None:
    del model.vae_proxy[0].quantize.quant_resi


def other_arguments(model: VAR) -> None:
    model.autoregressive_infer_cfg = lambda B, lr_inp, cfg: None


def without_gates(model: VAR) -> None:
    del model.blocks[0].ada_lin


def without_blocks(model: VAR) -> None:
    model.blocks = nn.ModuleList()


def without_head_bias(model: VAR) -> None:
    model.head.bias = None


def other_scale(model: VAR) -> None:
    model.blocks[1].attn.scale = 3


def other_heads(model: VAR) -> None:
    model.blocks[1].attn.num_heads = 1


def one_without_l2_norm(model: VAR) -> None:
    model.blocks[1].attn.attn_l2_norm = not model.blocks[0].attn.attn_l2_norm


def other_eps(model: VAR) -> None:
    model.blocks[1].ln_wo_grad.eps = 0.1


def with_a_bias(model: VAR) -> None:
    model.blocks[0].attn.mat_qkv = nn.Linear(32, 96)


def other_block(model: VAR) -> None:
    class Block(type(model.blocks[1])):  # type: ignore[misc]
        def forward(self, *args: Any) -> Tensor:
            return super().forward(*args) + 1

    model.blocks[1].__class__ = Block


def other_classifier(model: VAR) -> None:
    class Model(VAR):
        def get_logits(self, *args: Any) -> Tensor:
            return -super().get_logits(*args)

    model.__class__ = Model


def other_greatest_scale(model: VAR) -> None:
    model.blocks[0].attn.max_scale_mul = 3.0


def other_phi(model: VAR) -> None:
    model.vae_proxy[0].quantize.quant_resi.qresi_ls[0].extra = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_bias, r"not found: blocks\[1\]\.attn\.q_bias$"),
        (adapted, r"not found: blocks\[0\]\.ffn\.fc1 \(torch\.nn\.Linear, no subclass\)$"),
        (other_activation, r"not found: blocks\[0\]\.ffn\.act\.approximate \(tanh\)$"),
        (affine, r"not found: blocks\[0\]\.ln_wo_grad\.elementwise_affine \(False\)$"),
        (without_tokenizer, r"not found: vae_proxy \(not empty\)$"),
        (without_phi, r"not found: vae_proxy\[0\]\.quantize\.quant_resi$"),
        (other_arguments, r"not found: autoregressive_infer_cfg \(a method with the arguments B, label_B, "),
        (without_gates, r"not found: blocks\[0\]\.ada_lin$"),
        (without_blocks, r"not found: blocks \(not empty\)$"),
        (without_head_bias, r"not found: head\.bias$"),
        (other_scale, r"not found: blocks\[1\]\.attn\.scale \([\d.]+\)$"),
        (other_heads, r"not found: blocks\[1\]\.attn\.num_heads \(\d\)$"),
        (one_without_l2_norm, r"not found: blocks\[1\]\.attn\.attn_l2_norm \(\w+\)$"),
        (other_eps, r"not found: blocks\[1\]\.ln_wo_grad\.eps \(1e-06\)$"),
        (with_a_bias, r"not found: blocks\[0\]\.attn\.mat_qkv\.bias \(None\)$"),
        (other_block, r"not found: blocks\[1\]\.forward \(no subclass's\)$"),
        (other_classifier, r"found Model\. .*not found: get_logits \(no subclass's\)$"),
        (other_greatest_scale, r"not found: blocks\[0\]\.attn\.max_scale_mul \(log 100\)$"),
        (other_phi, r"expected a quantizer with the state .*found .*extra"),
    ],
)
def test_what_is_missing_is_named(change: Callable[[VAR], None], message: str) -> None:
    model = make()
    change(model)
    before = identities(model)
    with pytest.raises(TypeError, match=message):
        accelerate(model)
    assert identities(model) == before


def test_bad_values_are_refused() -> None:
    model = make()
    with pytest.raises(ValueError, match=r"dtype: expected one of torch.float32, .*found torch.int8"):
        accelerate(model, dtype=torch.int8)
    model.vae_proxy[0].quantize.v_patch_nums = (1, 2, 3)
    with pytest.raises(ValueError, match=r"scales of its tokenizer, \(1, 2, 3\), found \(1, 2, 4\)"):
        accelerate(model)
    model = make()
    model.vae_quant_proxy = make().vae_quant_proxy
    with pytest.raises(ValueError, match="expected vae_quant_proxy to hold the quantizer of vae_proxy"):
        accelerate(model)
    model = accelerate(make())
    with pytest.raises(ValueError, match="B: expected at least 1, found 0"):
        model.autoregressive_infer_cfg(0, 3)
    with pytest.raises(ValueError, match=r"label_B: expected shape \(B=2,\), found \(3,\)"):
        model.autoregressive_infer_cfg(2, torch.tensor([1, 2, 3]))
