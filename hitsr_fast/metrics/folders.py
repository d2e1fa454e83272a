"""FID and KID of folders, by torch-fidelity."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

_KEYS = {"fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean"}


def missing() -> str | None:
    """Why FID and KID cannot be measured here, with the extra that helps; None where they can."""
    if importlib.util.find_spec("torch_fidelity") is None:
        return "torch-fidelity is not installed: pip install 'hitsr-fast[fid]'"
    return None


def fid(results: Path, truths: Path, **options: Any) -> float:
    """Fréchet Inception distance between the pictures of two folders, by torch-fidelity; lower is closer.

    Args:
        results: a folder of pictures.
        truths: another; number and names may differ.
        options: further arguments of `torch_fidelity.calculate_metrics`, as `feature_extractor` or
            `batch_size`: pictures of different sizes need 1. `cuda` is whether there is a GPU.

    Raises:
        ImportError: torch-fidelity is not installed; the message names the extra.
        ValueError: no such folder, or no pictures in it.

    Notes:
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
        2017. torch-fidelity itself fetches the weights of its Inception-v3.
    """
    return _measure("fid", results, truths, options)


def kid(results: Path, truths: Path, **options: Any) -> float:
    """Kernel Inception distance between the pictures of two folders, by torch-fidelity; lower is closer.

    Arguments and errors are those of `fid`. The value is a mean over random subsets of `kid_subset_size`
    pictures: by itself torch-fidelity's 1000, or all pictures of the smaller folder where it has fewer.

    Notes:
        Binkowski et al., "Demystifying MMD GANs", 2018.
    """
    return _measure("kid", results, truths, options)


def _measure(name: str, results: Path, truths: Path, options: dict[str, Any]) -> float:
    if reason := missing():
        raise ImportError(f"{name}: {reason}")
    fidelity = importlib.import_module("torch_fidelity")
    defaults = importlib.import_module("torch_fidelity.defaults").DEFAULTS
    suffixes = options.get("samples_find_ext", defaults["samples_find_ext"])
    count = min(_count("results", results, suffixes), _count("truths", truths, suffixes))
    arguments = {"input1": str(results), "input2": str(truths), name: True, "verbose": False}
    arguments["cuda"] = torch.cuda.is_available()
    if name == "kid":
        arguments["kid_subset_size"] = min(count, defaults["kid_subset_size"])
    return float(fidelity.calculate_metrics(**{**arguments, **options})[_KEYS[name]])


def _count(name: str, folder: Path, suffixes: str) -> int:
    """How many files torch-fidelity will take for pictures."""
    wanted = [f".{suffix.strip()}" for suffix in suffixes.split(",")]
    found = sum(path.suffix.lower() in wanted for path in folder.iterdir()) if folder.is_dir() else 0
    if found == 0:
        raise ValueError(f"{name}: expected a folder with {suffixes} pictures, found none in {folder}")
    return found
