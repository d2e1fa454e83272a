"""The only reader of environment variables. Each is read when asked for, never at import."""

from __future__ import annotations

import os
from pathlib import Path


def backend() -> str | None:
    """Name of the backend forced for every op by `HITSR_FAST_BACKEND`, or None."""
    return os.environ.get("HITSR_FAST_BACKEND") or None


def cpu_isa() -> str | None:
    """Instruction set forced for the compiled CPU backends by `HITSR_FAST_CPU_ISA`, or None."""
    return os.environ.get("HITSR_FAST_CPU_ISA") or None


def cache_dir() -> Path:
    """Folder for downloaded weights and photos.

    `HITSR_FAST_CACHE`, else `$XDG_CACHE_HOME/hitsr_fast`, else `~/.cache/hitsr_fast`. It need not exist yet.
    """
    own = os.environ.get("HITSR_FAST_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hitsr_fast"


def triton_interpret() -> bool:
    """Whether `TRITON_INTERPRET`, Triton's own variable, asks for its interpreter in place of a GPU."""
    return (os.environ.get("TRITON_INTERPRET") or "0").lower() in ("1", "true", "on", "y", "yes")


def rank() -> int:
    """Number of this process among those that `torchrun` started, which it says by `RANK`; else 0."""
    return int(os.environ.get("RANK") or 0)


def world() -> int:
    """Number of processes that `torchrun` started, which it says by `WORLD_SIZE`; else 1."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def local_rank() -> int:
    """Number of this process among those of its machine, which `torchrun` says by `LOCAL_RANK`; else 0."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def of_child(path: Path, **variables: str) -> dict[str, str]:
    """The environment for a Python to be started: this one's and `variables`, with `path` searched first."""
    paths = filter(None, (str(path), os.environ.get("PYTHONPATH")))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}
