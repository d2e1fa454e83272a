#!/usr/bin/env bash
# PyTorch: torch.special.bessel_j0, j1, y0 and y1 of float64 have six digits where the argument is just above 5.
#
# Guess: of float64 a special function is right to about 1e-15, as scipy.special.j1 is, and as torch.special.i1 and
# modified_bessel_k0 are; sinc filters for degradations (Real-ESRGAN's are 2-D, by J1) can be made in torch as in scipy.
# Found (2026-12-01, torch 2.14.1, CPU): up to 2 they are right to 1e-14; from there the error grows to 1e-8 at 5, jumps to
# 2e-7 to 9e-7 above it and falls to 1e-9 by 8. Nothing is said, and the dtype is float64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install "torch==2.14.1" "mpmath==1.3.0" numpy
cat > "$folder/bessel.py" <<'PY'
import mpmath
import torch

FUNCTIONS = {
    "bessel_j0": lambda x: mpmath.besselj(0, x),
    "bessel_j1": lambda x: mpmath.besselj(1, x),
    "bessel_y0": lambda x: mpmath.bessely(0, x),
    "bessel_y1": lambda x: mpmath.bessely(1, x),
    "i1": lambda x: mpmath.besseli(1, x),
}


def error(name, low, high):
    """Largest, over 1 or the value where that is larger."""
    x = torch.linspace(low, high, 200, dtype=torch.float64)
    found = getattr(torch.special, name)(x).tolist()
    exact = [FUNCTIONS[name](mpmath.mpf(value)) for value in x.tolist()]
    return max(float(abs(a - b) / max(1, abs(b))) for a, b in zip(found, exact))


print("torch", torch.__version__, "mpmath", mpmath.__version__)
print(f"{'largest error in':18}{'[0.1, 2]':>10}{'[4, 5]':>10}{'(5, 6]':>10}{'[8, 30]':>10}{'[30, 300]':>10}")
for name in FUNCTIONS:
    errors = [error(name, *part) for part in ((0.1, 2), (4, 5), (5.001, 6), (8, 30), (30, 300))]
    print(f"{name:18}" + "".join(f"{value:10.0e}" for value in errors))
    if name == "i1":
        assert max(errors) < 1e-14, "this has changed"
    else:
        assert errors[0] < 1e-13 and errors[1] > 1e-9 and errors[2] > 1e-7, "this has changed"
PY
cd "$folder" && ./venv/bin/python bessel.py
