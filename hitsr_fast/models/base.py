"""The shelf of models: what a family of models offers, and how a folder with weights becomes one of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hitsr_fast.checks import check_choice, check_integer
from hitsr_fast.configs import Config
from hitsr_fast.models.hub import CONFIG_FILE, WEIGHTS_FILE, find_weights
from hitsr_fast.models.state_dicts import check_state, short, taken_from, unwrap
from hitsr_fast.nn.sampling import SamplingOptions

ModelT = TypeVar("ModelT", bound="Model")

Input = Literal["photo", "clean", "unknown"]
INPUTS: tuple[Input, ...] = get_args(Input)


class SuperResolver(Protocol):
    """What a model laid out for inference offers, whatever its family."""

    @property
    def lr_tile(self) -> int:
        """Side in pixels of the square input the model takes."""

    @property
    def scale_factors(self) -> tuple[int, ...]:
        """Factors at which the model can give an output, ascending."""

    @property
    def num_scales(self) -> int:
        """Scales of its token pyramid."""

    @property
    def colour_fix_levels(self) -> Mapping[int, int]:
        """Dyadic levels that stay the model's own in the colour fix, of each factor."""

    def super_resolve(
        self,
        lr: Tensor,
        sampling: SamplingOptions = SamplingOptions(),  # noqa: B008  # frozen
        *,
        input: Input = "clean",
        factors: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[int, Tensor]:
        """Restore and enlarge LR tiles.

        Args:
            lr: `(B, 3, t, t)` floating in [-1, 1] with `t = lr_tile`.
            sampling: How codes are drawn.
            input: What the tiles are: `"photo"` has noise, blur or artefacts, `"clean"` was only made
                smaller, `"unknown"` leaves it open.
            factors: Wanted factors, out of `scale_factors`; all by default.
            generator: Source of randomness in place of `sampling.seed`; unused when greedy.

        Returns:
            `{factor: (B, 3, factor * t, factor * t)}` float32 in [-1, 1].

        Raises:
            TypeError: If an argument is of another type or dtype.
            ValueError: If the tile has the wrong side, a factor is not on offer, or an option is out of its
                range.
        """

    def to(self, dtype: torch.dtype) -> SuperResolver:
        """The same with weights in `dtype`; itself it stays as it is."""


def listed_factors(name: str, factors: object) -> tuple[int, ...]:
    """The factors of an iterable; TypeError where it is none or gives other than integers."""
    if isinstance(factors, str) or not isinstance(factors, Iterable):
        raise TypeError(f"{name}: expected a list of factors, found {factors!r}")
    listed = tuple(factors)
    for factor in listed:
        check_integer(name, factor, 1)
    return tuple(map(int, listed))


class ModelConfig(Config):
    """Configuration of a model; a family's adds `model_type`, which names the family, with a default."""

    model_type: str


class Model(nn.Module):
    """A model to train, save and load. A family derives from it, names its configuration and is registered.

    Its `forward` is what training calls.
    """

    config_class: ClassVar[type[ModelConfig]]
    config: ModelConfig

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def for_inference(self, dtype: torch.dtype | None = None) -> SuperResolver:
        """The model laid out for inference; it does not follow later changes of the weights.

        Args:
            dtype: To compute in, floating; by default that of the weights.
        """
        raise NotImplementedError

    def super_resolve(self, *args: Any, **options: Any) -> dict[int, Tensor]:
        """`self.for_inference().super_resolve(...)`: to upscale often, keep what `for_inference` gives."""
        return self.for_inference().super_resolve(*args, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, weights in their own dtypes."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {key: value.detach().contiguous() for key, value in self.state_dict().items()}
        temporary = folder / f"{WEIGHTS_FILE}.tmp"
        temporary.write_bytes(save(state))
        temporary.replace(folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(self.config.to_json())

    @classmethod
    def from_pretrained(
        cls: type[ModelT],
        name_or_folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> ModelT:
        """Load what `save_pretrained` wrote, in evaluation mode; `Model` loads any registered family.

        Args:
            name_or_folder: See `find_weights`.
            device: Where to put the weights.
            dtype: To convert them to; by default they stay as they were saved.

        Raises:
            ModelNotFoundError: No such model, or one of its two files is missing.
            CheckpointError: Keys are missing, unexpected or mis-shaped; the message names them.
            ValueError: A file is broken, or the model is of another family.

        Notes:
            A `config.json` without `model_type` is that of a HIT-VAR. Weights that a trainer has wrapped, as
            in `module.`, are unwrapped, with a warning.

        Example:
            >>> Model.from_pretrained("hit-tiny").config.model_type
            'hit_var'
        """
        folder = find_weights(name_or_folder)
        path, config = folder / WEIGHTS_FILE, load_config(folder / CONFIG_FILE)
        family = _FAMILIES[config.model_type]
        if not issubclass(family, cls):
            raise ValueError(f"{folder}: expected a {cls.__name__}, found a {family.__name__}")
        model = family(config)
        try:
            said = load_state(model, load_file(path), str(path))
        except SafetensorError as error:
            raise ValueError(f"model: {path} is broken: {error}") from error
        if said:
            warnings.warn(said, stacklevel=2)
        return model.to(device=device, dtype=dtype).eval()


_FAMILIES: dict[str, type[Model]] = {}


def register(family: type[ModelT]) -> type[ModelT]:
    """Put a family on the shelf, under its configuration's `model_type`."""
    _FAMILIES[family.config_class.model_type] = family
    return family


def load_config(path: Path) -> ModelConfig:
    """Read a model's `config.json`, of any family; raises `ValueError` with its name where it is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        model_type = values.get("model_type", "hit_var") if isinstance(values, dict) else "hit_var"
        check_choice("model_type", model_type, sorted(_FAMILIES))
        return _FAMILIES[model_type].config_class.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_state(model: nn.Module, state: Mapping[str, Any], source: str) -> str:
    """Make a complete state dict the weights of `model`, in its dtypes, or change nothing.

    Args:
        model: Changed in place.
        state: Tensors by key, also as trainers wrap them: see `unwrap`.
        source: What to call the state dict in an error.

    Returns:
        One line on what was unwrapped; empty where nothing was.

    Raises:
        CheckpointError: If keys are missing, unexpected or mis-shaped.
    """
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    own, wrapping = unwrap(state, expected)
    check_state(expected, own, source)
    model.load_state_dict(own, assign=True)
    return f"{short(source)}: {taken_from(wrapping)}" if wrapping else ""
