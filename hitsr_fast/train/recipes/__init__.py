"""Recipes that come with the package, a JSON file each: data, not code."""

from __future__ import annotations

from pathlib import Path

from hitsr_fast.train.config import Recipe

_FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem.replace("_", "-") for path in _FOLDER.glob("*.json"))


def load_recipe(name_or_file: str | Path) -> Recipe:
    """The recipe of a name, or of a JSON file.

    Raises:
        ValueError: There is no such recipe, or the file is none; the message names it.

    Example:
        >>> [phase.name for phase in load_recipe("hit-tiny").phases]
        ['autoencode', 'tokenize', 'next_scale', 'decode']
    """
    path = Path(name_or_file)
    if str(name_or_file).replace("_", "-") in recipe_names():
        path = _FOLDER / f"{str(name_or_file).replace('-', '_')}.json"
    elif not path.is_file():
        what = "the folder " if path.is_dir() else ""
        known = ", ".join(recipe_names())
        raise ValueError(f"recipe: expected one of {known}, or a JSON file, found {what}{str(path)!r}")
    try:
        return Recipe.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
