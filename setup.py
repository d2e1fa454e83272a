"""Packages and the optional C++ extension; all other metadata is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def kernel_packages() -> dict[str, str]:
    """Each folder of kernels/ as a package of hitsr_fast.kernels.

    A top-level package `kernels` would hide another project's of that name; mapping the whole folder onto
    hitsr_fast.kernels would hide the __init__.py that stands there.
    """
    folders = sorted(path.parent for path in (ROOT / "kernels").glob("*/__init__.py"))
    return {f"hitsr_fast.kernels.{folder.name}": f"kernels/{folder.name}" for folder in folders}


def extension() -> dict[str, Any]:
    """Arguments of setup() that build hitsr_fast._C; none where it is not wanted or cannot be built.

    The package works without it, and `hitsr-fast info` says that it is missing. What goes wrong once the
    build has started is an error.
    """
    if os.environ.get("HITSR_FAST_EXTENSION") == "0":
        print("hitsr_fast: HITSR_FAST_EXTENSION=0, the C++ extension is left out")
        return {}
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        print(f"hitsr_fast: no C++ compiler ({compiler}), the C++ extension is left out")
        return {}
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        print(f"hitsr_fast: no Python.h in {headers} (Debian: python3-dev), the C++ extension is left out")
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("hitsr_fast: no torch in the build environment, the C++ extension is left out;")
        print("            install torch first, then this package with --no-build-isolation")
        return {}
    sources = [
        "csrc/registration.cpp",
        *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp")),
    ]
    module = CppExtension(
        "hitsr_fast._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h")],
        extra_compile_args=[
            "-O3",
            "-fopenmp",
            "-ffp-contract=off",
            "-Wall",
            "-Wextra",
            "-fvisibility=hidden",
        ],
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


kernels = kernel_packages()
setup(
    packages=[*find_packages(include=["hitsr_fast", "hitsr_fast.*"]), *kernels],
    package_dir=kernels,
    package_data={"hitsr_fast": ["py.typed", "weights/**/*"]},
    **extension(),
)
