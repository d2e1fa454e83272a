"""Triton kernels, one package per op: `setup.py` puts them here in a wheel; a checkout keeps them in kernels/."""

from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[2]
if (_CHECKOUT / "setup.py").is_file():
    __path__.append(str(_CHECKOUT / "kernels"))
