"""The optional compiled module `hitsr_fast._C`. That it is missing is a normal state, with a reason."""

from __future__ import annotations

import functools
import importlib
import importlib.util


@functools.cache
def unavailable() -> str | None:
    """Why the extension cannot be used, or None once it is loaded.

    Example:
        >>> unavailable() is None or isinstance(unavailable(), str)
        True
    """
    if importlib.util.find_spec("hitsr_fast._C") is None:
        return "not built (install with --no-build-isolation where torch and a C++ compiler are)"
    importlib.import_module("torch")  # _C links against its libraries
    try:
        importlib.import_module("hitsr_fast._C")
    except ImportError as error:
        # Typically a torch of another version than the one it was built with.
        return f"built, but does not load: {error}"
    return None


def build_info() -> dict[str, str | int]:
    """What the extension was built with: torch, compiler, cxx_standard.

    Raises:
        RuntimeError: the extension is unavailable; the message says why.
    """
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"hitsr_fast._C: {reason}")
    info: dict[str, str | int] = importlib.import_module("hitsr_fast._C").build_info()
    return info
