"""FID and KID of folders, by torch-fidelity."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

_KEYS = {"fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean"}


def missing() -> str | None:
    """Why FID and KID cannot be measured here; None where they can."""
    if importlib.util.find_spec("torch_fidelity") is None:
        return "torch-fidelity is not installed: pip install 'hitsr-fast[fid]'"
    return None


def fid(results: Path, truths: Path, **options: Any) -> float:
    """Fréchet Inception distance between the images of two folders, by torch-fidelity; lower is closer.

    Args:
        results: a folder of images, all of one size.
        truths: a folder of others, also of one size; their number and names may differ.
        options: further arguments of `torch_fidelity.calculate_metrics`, as `cuda`, `batch_size` or
            `feature_extractor`; by itself it fetches the weights of its Inception-v3.

    Raises:
        ImportError: torch-fidelity is not installed; the message names the extra.

    Notes:
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
        Equilibrium", 2017.
    """
    return _measure("fid", results, truths, options)


def kid(results: Path, truths: Path, **options: Any) -> float:
    """Kernel Inception distance between the images of two folders, by torch-fidelity; lower is closer.

    Arguments and errors are those of `fid`. The value is the mean over random subsets of `kid_subset_size`
    images, by torch-fidelity's choice 1000: smaller folders need a smaller one.

    Notes:
        Binkowski et al., "Demystifying MMD GANs", 2018.
    """
    return _measure("kid", results, truths, options)


def _measure(name: str, results: Path, truths: Path, options: dict[str, Any]) -> float:
    if reason := missing():
        raise ImportError(f"{name}: {reason}")
    fidelity = importlib.import_module("torch_fidelity")
    arguments = {"input1": str(results), "input2": str(truths), name: True, "verbose": False, **options}
    return float(fidelity.calculate_metrics(**arguments)[_KEYS[name]])
