"""Triton kernels, one package per op: in a wheel they lie here, in a checkout in its folder kernels/."""

from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[2]
if (_CHECKOUT / "setup.py").is_file():
    __path__.append(str(_CHECKOUT / "kernels"))
