#!/usr/bin/env bash
# PyTorch: `torch.backends.mkldnn.fp32_precision = ...` is not a setting of oneDNN alone.
#
# Guess: the attribute sits between the generic `torch.backends.fp32_precision` and the operators of oneDNN, so that
# setting it leaves CUDA's matrices and cuDNN alone, as `torch.backends.cudnn.fp32_precision` leaves oneDNN alone.
# Found (2026-12-01, torch 2.14.1): it writes the generic setting, and with it what CUDA's matrix products and cuDNN
# read. A program that allows TF32 on its CPU has allowed it on its GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install "torch==2.14.1" numpy
cat > "$folder/precision.py" <<'PY'
import torch

backends = torch.backends


def settings():
    return {
        "generic": backends.fp32_precision,
        "cuda.matmul": backends.cuda.matmul.fp32_precision,
        "cudnn": backends.cudnn.fp32_precision,
        "mkldnn": backends.mkldnn.fp32_precision,
    }


print("torch", torch.__version__)
before = settings()
print("at first:             ", before)
backends.mkldnn.fp32_precision = "tf32"
after = settings()
print("after mkldnn = 'tf32':", after)
assert set(before.values()) == {"none"} and set(after.values()) == {"tf32"}, "this has changed"
PY
cd "$folder" && ./venv/bin/python precision.py
