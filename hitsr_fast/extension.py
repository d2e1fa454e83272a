"""The optional compiled modules `_C` and `_C_cuda`. That one is missing is a normal state, with a reason."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from pathlib import Path

MODULES = {
    "_C": "pip install builds it from the sources where a C++ compiler is; wheels for Linux hold it",
    "_C_cuda": "pip install builds it from the sources where a CUDA toolkit and a GPU are; "
    "HITSR_FAST_CUDA=1 needs no GPU",
}
NEEDS = "it needs torch 2.10 or later"


@functools.cache
def unavailable(module: str = "_C") -> str | None:
    """Why an extension, "_C" or "_C_cuda", cannot be used, or None once it is loaded.

    Example:
        >>> unavailable() is None or isinstance(unavailable(), str)
        True
    """
    if importlib.util.find_spec(f"hitsr_fast.{module}") is None:
        return f"not built ({MODULES[module]})"
    torch = importlib.import_module("torch")  # both link against its libraries
    try:
        importlib.import_module(f"hitsr_fast.{module}")
    except ImportError as error:
        return f"built, but does not load ({NEEDS}, found {torch.__version__}): {error}"
    return None


@functools.cache
def warn_once() -> None:
    """Warn, the first time, if "_C" is unavailable: PyTorch then computes in its place, and slower.

    Example:
        >>> warn_once()
    """
    reason = unavailable()
    if reason is not None:
        message = f"hitsr_fast._C: {reason}; ops run in plain PyTorch"
        warnings.warn(message, RuntimeWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """How many frames the warning is below the code that called this package."""
    package, frame, level = str(Path(__file__).parent), sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    return level


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
