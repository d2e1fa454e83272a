"""What the commands that run a model have in common."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from hitsr_fast.pipeline import HitSR, UpscaleOptions


@dataclass(frozen=True)
class ModelOptions:
    """Where a model runs, and how it samples."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto is cuda where there is a device."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """To compute in; auto is bfloat16 where the device multiplies it in hardware, else float32."""

    seed: int = 0
    """Of the draws, where top-k is not 1, and of what else is random."""

    guidance: float = 0.0
    """Classifier-free guidance; 0 is none."""

    guided_scales: tuple[int, ...] | None = None
    """Numbers of the scales of the token pyramid that are guided, 0 the coarsest; all by default."""

    top_k: int = 1
    """Draw among that many codes; 1 takes the likeliest, 0 draws among all."""

    top_p: float = 1.0
    """Draw among the likeliest codes of that total probability."""

    temperature: float = 1.0
    """What the logits are divided by before the draw."""

    colour_fix: bool = True
    """Take colours (the low frequencies) from the input."""

    input: Literal["photo", "clean", "unknown"] | None = None
    """What the model is told of the inputs: photo has noise, blur or artefacts, clean, the default, was only
    made smaller, unknown leaves it open."""

    class_id: Literal[0, 1] | None = None
    """Deprecated: 0 is --input photo, 1 is --input clean."""

    def load(self, model: str) -> HitSR:
        """The model of that name, see `HitSR.from_pretrained`."""
        import torch

        from hitsr_fast.pipeline import HitSR, pick_device

        check_settings()
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        return HitSR.from_pretrained(model, pick_device(self.device), dtype)

    def upscale_options(self, **others: Any) -> UpscaleOptions:
        """These and `others` as checked options; a deprecated one is a line on stderr."""
        from hitsr_fast.pipeline import UpscaleOptions

        options = {name: value for name, value in asdict(self).items() if name not in ("device", "dtype")}
        class_id = options.pop("class_id")
        if self.input is None:
            del options["input"]
        if class_id is not None:
            if self.input is not None:
                raise ValueError(f"class_id: expected no --input beside it, found {self.input!r}")
            options["input"] = ("photo", "clean")[class_id]
            print(f"warning: --class-id is deprecated: use --input {options['input']}", file=sys.stderr)
        return UpscaleOptions.of(**options, **others)


def setting_faults() -> dict[str, str]:
    """Of each environment variable that names a backend or an instruction set there is not, what is wrong."""
    from hitsr_fast import backends, dispatch, env

    faults = {}
    try:
        dispatch.forced_backend()
    except ValueError as error:
        faults["HITSR_FAST_BACKEND"] = str(error)
    try:
        if env.cpu_isa() is not None:
            backends.active_instruction_set()
    except (ValueError, RuntimeError) as error:  # RuntimeError: no set can run without the extension
        faults["HITSR_FAST_CPU_ISA"] = str(error)
    return {name: fault.removeprefix(f"{name}: ") for name, fault in faults.items()}


def check_settings() -> None:
    """Raise ValueError, before any work, if there are `setting_faults`."""
    for name, fault in setting_faults().items():
        raise ValueError(f"{name}: {fault}")
