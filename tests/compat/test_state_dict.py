"""State dicts of VAR's quantizer: they load here, and those from here load there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hitsr_fast.compat import VectorQuantizer2


def of_var(share: int, scales: int = 3, K: int = 20, C: int = 4) -> dict[str, Tensor]:
    """What VAR's class saves: names and shapes as in its checkpoints."""
    phis = {0: [str(i) for i in range(scales)], 1: ["qresi"], 4: [f"qresi_ls.{i}" for i in range(4)]}[share]
    state = {"ema_vocab_hit_SV": torch.rand(scales, K)}
    for name in phis:
        state[f"quant_resi.{name}.weight"] = torch.randn(C, C, 3, 3)
        state[f"quant_resi.{name}.bias"] = torch.randn(C)
    return state | {"embedding.weight": torch.randn(K, C)}


@pytest.mark.parametrize("share", [0, 1, 4])
def test_both_ways(share: int) -> None:
    quantizer = VectorQuantizer2(20, 4, False, v_patch_nums=(1, 2, 3), share_quant_resi=share)
    given = of_var(share)
    quantizer.load_state_dict(given)
    saved = quantizer.state_dict()
    assert list(saved) == list(given)
    assert all(torch.equal(saved[name], given[name]) for name in given)


def test_without_phi_there_are_no_parameters_of_it() -> None:
    for share in (0, 1, 4):
        quantizer = VectorQuantizer2(
            20, 4, False, v_patch_nums=(1, 2), quant_resi=0.0, share_quant_resi=share
        )
        assert list(quantizer.state_dict()) == ["ema_vocab_hit_SV", "embedding.weight"]
        assert not list(quantizer.quant_resi.parameters())


@pytest.mark.parametrize("share", [1, 4])
def test_statistics_of_another_number_of_scales(share: int) -> None:
    quantizer = VectorQuantizer2(20, 4, False, v_patch_nums=(1, 2, 3), share_quant_resi=share)
    given = of_var(share, scales=14)
    quantizer.load_state_dict(given)
    assert torch.equal(quantizer.embedding.weight, given["embedding.weight"])
    assert torch.equal(quantizer.ema_vocab_hit_SV, torch.zeros(3, 20))
    assert given["ema_vocab_hit_SV"].shape == (14, 20)  # the caller's is left alone


def test_inside_a_tokenizer() -> None:
    """Under the prefix that a tokenizer's state dict has."""
    tokenizer = torch.nn.ModuleDict({"quantize": VectorQuantizer2(20, 4, False, v_patch_nums=(1, 2, 3))})
    state = {f"quantize.{name}": value for name, value in of_var(4, scales=10).items()}
    tokenizer.load_state_dict(state)
    assert torch.equal(
        tokenizer.state_dict()["quantize.embedding.weight"], state["quantize.embedding.weight"]
    )


def test_what_does_not_fit_is_an_error() -> None:
    quantizer = VectorQuantizer2(20, 4, False, v_patch_nums=(1, 2, 3))
    with pytest.raises(RuntimeError, match=r"quant_resi\.qresi\.weight"):
        quantizer.load_state_dict(of_var(1))
    with pytest.raises(RuntimeError, match=r"size mismatch for embedding\.weight"):
        quantizer.load_state_dict(of_var(4, K=30))
