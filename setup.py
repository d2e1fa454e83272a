"""Packages and the optional extensions in C++ and CUDA; all other metadata is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
CUDA = "hitsr_fast._C_cuda"
# One build serves every torch from 2.10 and every Python from 3.10 on, as pyproject.toml has them: it takes
# what torch's stable ABI had then, and Python's limited API.
STABLE_ABI = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
LIMITED_API = "cp310"


def kernel_packages() -> dict[str, str]:
    """Each folder of kernels/ as a package of hitsr_fast.kernels.

    A top-level package `kernels` would hide another project's of that name; mapping the whole folder onto
    hitsr_fast.kernels would hide the __init__.py that stands there.
    """
    folders = sorted(path.parent for path in (ROOT / "kernels").glob("*/__init__.py"))
    return {f"hitsr_fast.kernels.{folder.name}": f"kernels/{folder.name}" for folder in folders}


def nvcc_module() -> ModuleType:
    """csrc/cuda/nvcc.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("nvcc", ROOT / "csrc" / "cuda" / "nvcc.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nvcc"] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def cuda_wanted() -> str:
    """`HITSR_FAST_CUDA`: "0" leaves the CUDA extension out, "1" asks for it; "": it is built for a GPU."""
    wanted = os.environ.get("HITSR_FAST_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"HITSR_FAST_CUDA: expected 0 or 1, found {wanted!r}")
    return wanted


def cuda_toolkit() -> Any:
    """The toolkit for hitsr_fast._C_cuda, or None where it is not wanted or cannot be built.

    Where it was asked for and cannot be built, that is an error.
    """
    import torch

    wanted, toolkit = cuda_wanted(), None
    if wanted == "0":
        reason = "HITSR_FAST_CUDA=0"
    elif torch.version.cuda is None:
        reason = "torch is built without CUDA"
    elif not wanted and not torch.cuda.is_available():
        reason = "no GPU (HITSR_FAST_CUDA=1 builds it none the less)"
    else:
        major = int(torch.version.cuda.split(".")[0])
        toolkit = nvcc_module().find_toolkit(major)
        reason = (
            f"no CUDA {major} toolkit (set CUDA_HOME, or pip install 'cuda-toolkit[nvcc,cccl]=={major}.*')"
        )
    if toolkit is None and wanted == "1":
        raise RuntimeError(f"HITSR_FAST_CUDA=1: {reason}")
    if toolkit is None:
        print(f"hitsr_fast: {reason}, the CUDA extension is left out")
    return toolkit


def build_command(base: Any, toolkit: Any) -> Any:
    """build_ext that compiles the CUDA extension's kernels by nvcc, and leaves the extension out if it fails.

    Neither a mismatched compiler nor a full disk must cost the CPU backends; where the extension was asked
    for, the failure is an error none the less.
    """

    class Build(base):  # type: ignore[misc]
        def build_extension(self, extension: Any) -> None:
            if extension.name != CUDA:
                super().build_extension(extension)
                return
            try:
                extension.extra_objects = self.compiled_kernels()
                super().build_extension(extension)
            except Exception as error:
                if cuda_wanted() == "1":
                    raise
                print(f"hitsr_fast: the CUDA extension is left out, for its build failed: {error}")

        def compiled_kernels(self) -> list[str]:
            nvcc, folder = nvcc_module(), Path(self.build_temp).resolve()
            newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())
            folder.mkdir(parents=True, exist_ok=True)
            found = []
            for op in nvcc.KERNELS:
                out = folder / f"{op}_cuda.o"
                if not out.exists() or out.stat().st_mtime < newest:
                    nvcc.compile_kernels(toolkit, op, "-c", *nvcc.architectures(toolkit.targets), out=out)
                found.append(str(out))
            return found

    return Build


def cuda_extension(base: Any, toolkit: Any) -> Any:
    """hitsr_fast._C_cuda, but for its kernels: those are compiled by nvcc, which sees no header of torch."""
    targets = " ".join(toolkit.targets)
    return base(
        CUDA,
        sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cpp")),
        include_dirs=[str(ROOT / "csrc"), str(toolkit.include)],
        depends=[str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.is_file()],
        libraries=["torch_cuda"],
        define_macros=[*STABLE_ABI, ("USE_CUDA", "1"), ("HITSR_FAST_CUDA_TARGETS", f'"{targets}"')],
        py_limited_api=True,
        extra_compile_args=["-O2", "-Wall", "-fvisibility=hidden"],
        extra_link_args=[f"-L{toolkit.library}", f"-l:libcudart.so.{toolkit.version[0]}"],
        optional=cuda_wanted() != "1",
    )


def extension() -> dict[str, Any]:
    """Arguments of setup() that build hitsr_fast._C, and hitsr_fast._C_cuda for a GPU or on demand.

    None where they are not wanted or cannot be built. The package works without them, and `hitsr-fast info`
    says what is missing. What goes wrong once the build of _C has started is an error.
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
        print("hitsr_fast: no torch in the build environment, the C++ extension is left out")
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
        define_macros=STABLE_ABI,
        py_limited_api=True,
        extra_compile_args=[
            "-O3",
            "-fopenmp-simd",
            "-ffp-contract=off",
            # Wherever else a kernel began, the same instructions would take up to a tenth longer or less.
            "-falign-functions=64",
            "-Wall",
            "-Wextra",
            # GCC 12 finds such values in its own AVX-512 intrinsics.
            "-Wno-uninitialized",
            "-Wno-maybe-uninitialized",
            "-fvisibility=hidden",
        ],
    )
    toolkit = cuda_toolkit()
    modules = [module, cuda_extension(CppExtension, toolkit)] if toolkit else [module]
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": build_command(BuildExtension, toolkit)},
        "options": {"bdist_wheel": {"py_limited_api": LIMITED_API}},
    }


kernels = kernel_packages()
setup(
    packages=[*find_packages(include=["hitsr_fast", "hitsr_fast.*"]), *kernels],
    package_dir=kernels,
    package_data={"hitsr_fast": ["py.typed", "weights/**/*", "train/recipes/*.json", "data/presets/*.json"]},
    **extension(),
)
