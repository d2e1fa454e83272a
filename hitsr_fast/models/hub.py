"""Where weights are found: in the package, in a folder, on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

PACKAGED = Path(__file__).parents[1] / "weights"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class ModelNotFoundError(ValueError):
    """A model name that leads to no weights; the message says where was looked."""


def packaged_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in PACKAGED.glob(f"*/{WEIGHTS_FILE}"))


def find_weights(name_or_folder: str | Path) -> Path:
    """The folder with the two files of a model.

    Args:
        name_or_folder: the name of a packaged model (`hit-tiny`), a local folder, or a Hugging Face hub id
            `owner/name` (needs the `hub` extra), looked for in this order.

    Raises:
        ModelNotFoundError: no such model, or one of its two files is missing.
    """
    name = str(name_or_folder)
    if name in packaged_models():
        return PACKAGED / name
    folder = Path(name_or_folder)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
            packaged = ", ".join(packaged_models()) or "there are none"
            raise ModelNotFoundError(
                f"model: {name!r} is no packaged model ({packaged}), no folder and no hub id owner/name"
            )
        folder = _fetched_from_hub(name)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise ModelNotFoundError(f"model: {folder} has no {file}")
    return folder


def _fetched_from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ModelNotFoundError(
            f"model: there is no folder {name!r}, and to look on the hub huggingface_hub is needed: "
            "pip install 'hitsr-fast[hub]'"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFoundError(f"model: {name!r} could not be fetched from the hub: {error}") from error
