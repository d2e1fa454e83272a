#!/usr/bin/env bash
# Linux: the peak memory that a new process reports by getrusage is its parent's.
#
# Guess: a fresh interpreter that `subprocess` starts reports, by `resource.getrusage(RUSAGE_SELF).ru_maxrss`, what it
# used itself, so that a measurement in a process of its own is a clean one.
# Found (2026-12-01, Linux, Python 3.11, numpy 2.4.6): ru_maxrss survives exec. Started from a process that has held
# 1 GiB, the child reports more than 1 GiB before it has allocated anything; differences of it read 0 up to there, and a
# test of the form "ours takes no more than a tenth of theirs" passes as 0 <= 0. VmHWM of /proc/self/status starts anew.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install "numpy==2.4.6"
cat > "$folder/peaks.py" <<'PY'
import subprocess
import sys

import numpy as np

CHILD = """
import resource
status = open("/proc/self/status").read().splitlines()
(peak,) = [line.split()[1] for line in status if line.startswith("VmHWM")]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, int(peak) // 1024)
"""


def child():
    return [int(word) for word in subprocess.check_output([sys.executable, "-c", CHILD]).split()]


small = child()
held = np.ones(2**27)  # 1 GiB
del held
large = child()
print("MiB of a child by ru_maxrss and VmHWM: of a small parent", small, "of one that held 1 GiB", large)
assert large[0] > 1000 and large[1] < 200, "this has changed"
PY
cd "$folder" && ./venv/bin/python peaks.py
