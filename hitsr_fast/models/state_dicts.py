"""State dicts as trainers write them: read, unwrapped, and held to what a model expects."""

from __future__ import annotations

import argparse
import pickle
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hitsr_fast.models.hub import WEIGHTS_FILE

# What `torch.compile`, FSDP and activation checkpointing put into the names of parameters, at any place.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_SHOWN = 5  # keys that an error names
_LONGEST_KEY, _LONGEST_SOURCE = 60, 100


class CheckpointError(ValueError):
    """A file or state dict is not what a model expects; the message names some of the keys at fault."""


def read_state(path: str | Path) -> dict[str, Any]:
    """What a `.safetensors` file, a file of `torch.save`, or a folder with `model.safetensors` holds.

    On the CPU, nested as it was saved; `unwrap` finds a model's weights in it.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It cannot be read, holds Python objects beside tensors and plain values, which could
            run code, or is no mapping.
    """
    path = Path(path)
    path = path / WEIGHTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # of a trainer's arguments
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{short(str(path))}: expected tensors and plain values, found Python objects, which could run "
            "code as they are loaded; save the weights alone to another file"
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{short(str(path))}: expected a checkpoint, found a broken file") from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{short(str(path))}: expected a state dict, found {type(state).__name__}")
    return dict(state)


def unwrap(state: Mapping[str, Any], keys: Collection[str]) -> tuple[dict[str, Tensor], str]:
    """The state dict that has most of `keys`, wherever in a checkpoint it lies.

    A checkpoint may hold it nested (`trainer.var_wo_ddp`, `model`, `state_dict`), under a prefix (`module.`,
    as `DistributedDataParallel` adds), or with names that a compiler or FSDP has put in between
    (`_orig_mod`). Where two have equally many of the keys, averaged weights (`ema`) go first.

    Returns:
        Its tensors by their own keys, and what was taken off, as `"trainer.var_wo_ddp"`; `""` is nothing.
        Where no key is found: all tensors.
    """
    flat = dict(_tensors(state))
    parts = {path: [part for part in path.split(".") if part not in _WRAPPERS] for path in flat}
    found: Counter[str] = Counter()
    for names in parts.values():
        for i in range(len(names)):
            if ".".join(names[i:]) in keys:
                found[".".join(names[:i])] += 1
    prefix = max(found, key=lambda p: (found[p], "ema" in p.lower(), -len(p)), default="")
    before = [] if prefix == "" else prefix.split(".")
    own = {
        ".".join(names[len(before) :]): flat[path]
        for path, names in parts.items()
        if names[: len(before)] == before and len(names) > len(before)
    }
    inside = sorted({part for path in flat for part in path.split(".") if part in _WRAPPERS})
    return own, ".".join([*before, *inside])


def taken_from(wrapping: str) -> str:
    """What `unwrap` took off, in words; empty where that is nothing."""
    return f"the weights under {wrapping!r}" if wrapping else ""


def check_state(
    expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], source: str, hint: str = ""
) -> None:
    """Raise CheckpointError unless `state` has exactly the keys of `expected`, in these shapes.

    The message has the first keys at fault and stays under 600 characters; `hint` is its last words.
    """
    common = set(expected) & set(state)
    if expected and not common:
        raise CheckpointError(
            f"{short(source)} does not fit the model; expected keys such as "
            f"{_listed(sorted(expected), 2)}, found {_listed(sorted(state), 3)}{_ending(hint)}"
        )
    problems = {
        "missing": sorted(set(expected) - set(state)),
        "unexpected": sorted(set(state) - set(expected)),
        "mis-shaped": [
            f"{short(key, _LONGEST_KEY)}: expected {expected[key]}, found {tuple(state[key].shape)}"
            for key in sorted(common)
            if tuple(state[key].shape) != expected[key]
        ],
    }
    problems = {name: keys for name, keys in problems.items() if keys}
    if problems:
        each = {1: _SHOWN, 2: 2, 3: 1}[len(problems)]
        text = "; ".join(f"{name} keys: {_listed(keys, each)}" for name, keys in problems.items())
        raise CheckpointError(f"{short(source)} does not fit the model; {text}{_ending(hint)}")


def short(text: str, longest: int = _LONGEST_SOURCE) -> str:
    """The text, its beginning left out where it is longer."""
    return text if len(text) <= longest else "..." + text[3 - longest :]


def _tensors(state: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield f"{path}{key}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{path}{key}.")


def _listed(keys: list[str], most: int) -> str:
    """The first keys, in the words of an error; those of shapes are short already."""
    shown = str([key if ": " in key else short(key, _LONGEST_KEY) for key in keys[:most]])
    return shown if len(keys) <= most else f"{shown} and {len(keys) - most} more"


def _ending(hint: str) -> str:
    return f"; {hint}" if hint else ""
