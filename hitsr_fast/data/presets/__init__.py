"""Data sets as the papers name them, a JSON file each: data, not code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hitsr_fast.configs import Config
from hitsr_fast.data.source_config import SourceConfig, check_sources

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Preset(Config):
    """The sources of a paper's training.

    Args:
        paper: Where they are named.
        silent: What the paper does not say, and what is done instead.
        expected: What lies in each source's folder, in their order.
        sources: The sources, relative to one root.
    """

    paper: str = ""
    silent: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()
    sources: tuple[SourceConfig, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sources(self.sources)
        if len(self.expected) not in (0, len(self.sources)):
            found = f"{len(self.expected)} for {len(self.sources)} sources"
            raise ValueError(f"expected: expected a text a source, found {found}")


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem.replace("_", "-") for path in _FOLDER.glob("*.json"))


def load_preset(name_or_file: str | Path) -> Preset:
    """The preset of a name, or of a JSON file of the same form.

    Raises:
        ValueError: There is no such preset, or the file is none; the message names it.

    Example:
        >>> [source.name for source in load_preset("hitoksr").sources]
        ['lsdir', 'ffhq', 'div2k-valid']
    """
    name = str(name_or_file)
    path = Path(name)
    if name.replace("_", "-") in preset_names():
        path = _FOLDER / f"{name.replace('-', '_')}.json"
    elif not path.is_file():
        raise ValueError(
            f"preset: expected one of {', '.join(preset_names())}, or a JSON file, found {name!r}"
        )
    try:
        return Preset.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def sources_of(names_or_files: Sequence[str]) -> tuple[SourceConfig, ...]:
    """The sources of some presets, one after the other; one that several have alike is there once.

    Raises:
        ValueError: There is no such preset, or their sources do not fit together.
    """
    sources = tuple(dict.fromkeys(source for name in names_or_files for source in load_preset(name).sources))
    check_sources(sources)
    return sources
