"""Values of a recipe by their dotted names, as the command line gives them; without torch."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hitsr_fast.configs import Config
from hitsr_fast.data.presets import sources_of
from hitsr_fast.data.source_config import SourceConfig
from hitsr_fast.train.config import Recipe

ConfigT = TypeVar("ConfigT", bound=Config)

# A phase's name is that of its folder, and what its task is cannot be said by one value.
_FIXED = ("name", "task.kind")
_NEAREST = 3


def override(recipe: Recipe, words: Sequence[str]) -> Recipe:
    """A recipe with some of its values replaced.

    A name is that of a value of the recipe (`--seed`, `--data.workers`), of a phase's
    (`--tokenize.optim.lr`), or of all phases that have it (`--optim.lr`, `--task.loss.vgg`); hyphens stand
    for underscores. Later words win over earlier ones. A tuple takes several words, `none` is None, a switch
    alone is true. `--data.sources` takes names of presets, or JSON files of their form.

    Args:
        recipe: Left as it is.
        words: `--name value ...` or `--name=value`, one after the other.

    Raises:
        ValueError: No value has that name (the nearest are said), or it does not take what is given.

    Example:
        >>> from hitsr_fast.train.config import Phase
        >>> recipe = Recipe(phases=(Phase(name="a"), Phase(name="b")))
        >>> changed = override(recipe, ["--optim.lr", "0.1", "--b.optim.lr", "0.2", "--seed=3"])
        >>> [phase.optim.lr for phase in changed.phases], changed.seed
        ([0.1, 0.2], 3)
    """
    for name, values in _options(words):
        recipe = _overridden(recipe, name, values)
    return recipe


def names(recipe: Recipe) -> list[str]:
    """All names that `override` takes: the recipe's own, those of all phases, those of each phase."""
    of_phases = {phase.name: list(_hints(phase, skip=_FIXED)) for phase in recipe.phases}
    shared = dict.fromkeys(name for listed in of_phases.values() for name in listed)
    own = [f"{phase}.{name}" for phase, listed in of_phases.items() for name in listed]
    return [*_hints(recipe, skip=("phases",)), *shared, *own]


def _options(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Names, without the hyphens before them, and the words that follow each."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found.append((name.replace("-", "_"), [value] if equals else []))
        elif not found:
            raise ValueError(f"expected --name before the value, found {word!r}")
        else:
            found[-1][1].append(word)
    return iter(found)


def _overridden(recipe: Recipe, name: str, values: list[str]) -> Recipe:
    if name in _hints(recipe, skip=("phases",)):
        return _replaced(recipe, name, values, "")
    head, _, rest = name.partition(".")
    chosen = [phase for phase in recipe.phases if phase.name.replace("-", "_") == head]
    path = rest if chosen and rest in _hints(chosen[0], skip=_FIXED) else name
    if path == name:
        chosen = [phase for phase in recipe.phases if name in _hints(phase, skip=_FIXED)]
    if not chosen:
        nearest = ", ".join(_nearest(name, names(recipe)))
        raise ValueError(f"{_spelt(name)}: no such value; nearest are {nearest}")
    phases = tuple(
        _replaced(phase, path, values, f"{phase.name}.") if phase in chosen else phase
        for phase in recipe.phases
    )
    return dataclasses.replace(recipe, phases=phases)


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """The names that are most like one: those whose last part is the same first."""
    last = name.rpartition(".")[2]
    alike = difflib.get_close_matches(name, known, len(known), cutoff=0.0)
    found = sorted(alike, key=lambda other: other.rpartition(".")[2] != last)  # which keeps the order else
    return [_spelt(other) for other in found[:_NEAREST]]


def _spelt(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _hints(config: Config, prefix: str = "", skip: Sequence[str] = ()) -> dict[str, Any]:
    """Annotation of each value of a configuration and of those in it, by dotted name."""
    annotations = get_type_hints(type(config), include_extras=True)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        name, value = prefix + field.name, getattr(config, field.name)
        if name in skip:
            continue
        if isinstance(value, Config):
            found |= _hints(value, f"{name}.", skip)
        else:
            found[name] = annotations[field.name]
    return found


def _replaced(config: ConfigT, path: str, values: list[str], where: str) -> ConfigT:
    """A configuration with the value at a dotted path replaced; `where` stands before it in errors."""
    name, _, rest = path.partition(".")
    if rest:
        new = _replaced(getattr(config, name), rest, values, f"{where}{name}.")
    else:
        hint = get_type_hints(type(config), include_extras=True)[name]
        new = _parsed(hint, values, where + name)
    try:
        changed: ConfigT = dataclasses.replace(config, **{name: new})  # type: ignore[type-var]
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
    return changed


def _parsed(hint: Any, values: list[str], name: str) -> Any:
    """What words stand for where an annotation says what they must be."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return _parsed(parts[0], values, name)
    if kind in (Union, UnionType):
        (other,) = (part for part in parts if part is not type(None))
        return None if values == ["none"] else _parsed(other, values, name)
    if kind is tuple and parts[0] is SourceConfig:
        try:
            return sources_of(values)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if kind is tuple:
        items = parts[:1] * len(values) if parts[-1] is ... else parts
        if len(values) != len(items):
            raise ValueError(f"{name}: expected {len(items)} values, found {len(values)}")
        return tuple(_one(item, value, name) for item, value in zip(items, values, strict=True))
    if hint is bool and not values:
        return True
    if len(values) != 1:
        raise ValueError(f"{name}: expected one value, found {' '.join(values) or 'none'}")
    return _one(hint, values[0], name)


def _one(hint: Any, value: str, name: str) -> Any:
    """What a word stands for; ranges are for the configuration to check."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return _one(parts[0], value, name)
    if kind is Literal:
        if value not in parts:
            raise ValueError(f"{name}: expected one of {', '.join(map(str, parts))}, found {value!r}")
        return value
    if hint is bool:
        if value not in ("true", "false"):
            raise ValueError(f"{name}: expected true or false, found {value!r}")
        return value == "true"
    if hint in (int, float):
        try:
            return hint(value)
        except ValueError as error:
            expected = "a whole number" if hint is int else "a number"
            raise ValueError(f"{name}: expected {expected}, found {value!r}") from error
    return value
