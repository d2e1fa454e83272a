#!/usr/bin/env bash
# PyTorch: setting cuDNN's precision by the new attribute makes the old one raise when it is read.
#
# Guess: `torch.backends.cudnn.conv.fp32_precision = "ieee"` makes `torch.backends.cudnn.allow_tf32`, its predecessor,
# read False, or leaves it True; code that saves and restores the old flag goes on working.
# Found (2026-12-01, torch 2.14.1): to read it raises RuntimeError, as convolutions and recurrent layers now differ and
# it stands for both. A context that saves `allow_tf32`, as many libraries have, fails in a program that has set the new
# attribute anywhere; `torch.backends.cudnn.flags()` does so too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install "torch==2.14.1" numpy
cat > "$folder/flags.py" <<'PY'
import torch

cudnn = torch.backends.cudnn


def outcome(read):
    try:
        return str(read())
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error)[:90]}..."


def save_and_restore():
    with cudnn.flags(enabled=True):
        return "entered"


print("torch", torch.__version__)
print("conv at first:", cudnn.conv.fp32_precision, "| allow_tf32:", outcome(lambda: cudnn.allow_tf32))
cudnn.conv.fp32_precision = "ieee"
old, flags = outcome(lambda: cudnn.allow_tf32), outcome(save_and_restore)
print("conv now:     ", cudnn.conv.fp32_precision, "| allow_tf32:", old)
print("cudnn.flags():", flags)
assert old.startswith("RuntimeError") and flags.startswith("RuntimeError"), "this has changed"
PY
cd "$folder" && ./venv/bin/python flags.py
