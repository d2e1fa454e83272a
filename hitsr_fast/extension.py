"""The optional compiled modules `_C` and `_C_cuda`. That one is missing is a normal state, with a reason."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings

MODULES = {
    "_C": "install with --no-build-isolation where torch and a C++ compiler are",
    "_C_cuda": "install with --no-build-isolation where torch, a CUDA toolkit and a GPU are; "
    "HITSR_FAST_CUDA=1 needs no GPU",
}


@functools.cache
def unavailable(module: str = "_C") -> str | None:
    """Why an extension, "_C" or "_C_cuda", cannot be used, or None once it is loaded.

    Example:
        >>> unavailable() is None or isinstance(unavailable(), str)
        True
    """
    if importlib.util.find_spec(f"hitsr_fast.{module}") is None:
        return f"not built ({MODULES[module]})"
    importlib.import_module("torch")  # both link against its libraries
    try:
        importlib.import_module(f"hitsr_fast.{module}")
    except ImportError as error:
        # Typically a torch of another version than the one it was built with.
        return f"built, but does not load: {error}"
    return None


def build_info(module: str = "_C") -> dict[str, str | int]:
    """What an extension was built with: torch, and the compiler and its standard, or cuda and its targets.

    Raises:
        RuntimeError: the extension is unavailable; the message says why.
    """
    reason = unavailable(module)
    if reason is not None:
        raise RuntimeError(f"hitsr_fast.{module}: {reason}")
    info: dict[str, str | int] = importlib.import_module(f"hitsr_fast.{module}").build_info()
    return info


@functools.cache
def warn_once() -> None:
    """Say that ops run in plain PyTorch for lack of `_C`, and what to do about it; the first time only."""
    warnings.warn(f"hitsr_fast._C: {unavailable()}; ops run in plain PyTorch", RuntimeWarning, stacklevel=2)
