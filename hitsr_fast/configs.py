"""Configurations: frozen dataclasses, their fields checked, JSON both ways. No torch: quick to import."""

from __future__ import annotations

import dataclasses
import json
import math
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

ConfigT = TypeVar("ConfigT", bound="Config")


class Range(NamedTuple):
    """Bounds of a number, as metadata of its annotation; NaN is in no range."""

    low: float
    high: float = math.inf
    open: Literal["", "low", "high"] = ""  # which of the bounds is not in it

    def holds(self, value: float) -> bool:
        """Whether `value` is in the range."""
        above = self.low < value if self.open == "low" else self.low <= value
        return above and (value < self.high if self.open == "high" else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"a value above {self.low:g}" if self.open == "low" else f"at least {self.low:g}"
        left, right = "(" if self.open == "low" else "[", ")" if self.open == "high" else "]"
        return f"a value in {left}{self.low:g}, {self.high:g}{right}"


Count = Annotated[int, Range(1)]
AnyCount = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, open="high")]
Weight = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open="low")]


def check_fields(config: object) -> None:
    """Raise ValueError where a field of a dataclass is not of its annotated type, or out of its `Range`.

    A bool is no number, a whole number may stand for a float, and None is in every range. The range of a
    tuple's items is that of each; a float without one is finite.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        name, hint, value = field.name, hints[field.name], getattr(config, field.name)
        hint, *metadata = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if not _fits(value, hint):
            expected = hint.__name__ if isinstance(hint, type) else hint
            raise ValueError(f"{name}: expected {expected}, found {value!r}")
        numbers = value if isinstance(value, tuple) else (value,)
        if get_origin(hint) is tuple:
            metadata += getattr(get_args(hint)[0], "__metadata__", ())
        ranges = [bounds for bounds in metadata if isinstance(bounds, Range)]
        for number in numbers:
            if not ranges and isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name}: expected finite numbers, found {value}")
            for bounds in ranges:
                if number is not None and not bounds.holds(number):
                    raise ValueError(f"{name}: expected {bounds}, found {value}")


def _fits(value: object, hint: Any) -> bool:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return _fits(value, parts[0])
    if kind is Literal:
        return value in parts
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is tuple:
        if not isinstance(value, tuple):
            return False
        parts = parts[:1] * len(value) if parts[-1] is ... else parts
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)


class Config:
    """Base of a configuration; a frozen dataclass derives from it, whose fields all have defaults."""

    def __post_init__(self) -> None:
        check_fields(self)

    def to_json(self) -> str:
        """Return the configuration as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"  # type: ignore[call-overload]

    @classmethod
    def from_json(cls: type[ConfigT], text: str) -> ConfigT:
        """Read a configuration; raises `ValueError` on unknown keys and on wrong values."""
        return _build(cls, json.loads(text), "config")


def _build(cls: type[ConfigT], values: Any, where: str) -> ConfigT:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object, found {type(values).__name__}")
    hints = get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{where}: unknown keys {unknown}; known are {sorted(hints)}")
    return cls(**{key: _converted(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _converted(hint: Any, value: Any, where: str) -> Any:
    """A value of JSON as a field of type `hint` has it: configurations built, lists made tuples."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType) and isinstance(value, dict):
        return _build(_chosen(parts, value, where), value, where)
    if isinstance(hint, type) and issubclass(hint, Config):
        return _build(hint, value, where)
    if isinstance(value, list):
        item = parts[0] if kind is tuple else None
        return tuple(_converted(item, one, f"{where}[{i}]") for i, one in enumerate(value))
    return value


def _chosen(kinds: tuple[type[Config], ...], value: dict[str, Any], where: str) -> type[Config]:
    """That of several configurations whose `kind` is the value's."""
    by_name = {get_args(get_type_hints(cls)["kind"])[0]: cls for cls in kinds}
    if value.get("kind") not in by_name:
        raise ValueError(f"{where}.kind: expected one of {sorted(by_name)}, found {value.get('kind')!r}")
    return by_name[value["kind"]]
