"""Builds the compiled libraries with ninja; everything else about the package is in pyproject.toml.

Environment:
    SENTFAST_NO_EXT=1     install without compiled libraries (plain PyTorch and Triton)
    SENTFAST_CUDA=0|1     never / always build the CUDA library (default: if nvcc is found)
    SENTFAST_CUDA_ARCHS   its architectures, default "80 86 89 90a 100 120"
    MAX_JOBS              compilers at a time, default one per core
    CXX, NVCC             the compilers
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_TARGET = (2, 10)  # the oldest PyTorch whose stable ABI the libraries need

_AVX2 = "-mavx2 -mfma -mf16c"
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
# GCC 12 warns about its own intrinsics headers (GCC bug 105593).
# Vectors wider than a tier has are only passed to inline functions, so their ABI does not matter.
_QUIET = "-Wno-uninitialized -Wno-maybe-uninitialized -Wno-psabi"
TIERS = {
    "scalar": "-O2",
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_vnni": f"{_AVX512} -mavx512vnni",
    "avx512_bf16": f"{_AVX512} -mavx512bf16",
}


def _nvcc() -> str | None:
    wanted = os.environ.get("SENTFAST_CUDA")
    if wanted == "0":
        return None
    found = os.environ.get("NVCC") or shutil.which("nvcc")
    if found is None and Path("/usr/local/cuda/bin/nvcc").exists():
        found = "/usr/local/cuda/bin/nvcc"
    if wanted == "1" and found is None:
        raise SystemExit("SENTFAST_CUDA=1, but nvcc was not found; set NVCC or put it on PATH")
    return found


class Ninja:
    """A build.ninja file in the making."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lines = ["ninja_required_version = 1.8"]

    def rule(self, name: str, command: str) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", "  depfile = $out.d", "  deps = gcc"]

    def build(self, rule: str, out: Path, inputs: list[Path], **variables: str) -> Path:
        self.lines.append(f"build {out}: {rule} {' '.join(map(str, inputs))}")
        self.lines += [f"  {name} = {value}" for name, value in variables.items()]
        return out

    def run(self) -> None:
        import ninja

        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        subprocess.run([os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(self.folder), "-j", jobs], check=True)


class BuildLibraries(build_ext):
    """Compiles csrc/ into sentfast/_C and, with nvcc, sentfast/_cuda.so, and writes sentfast/_build.json."""

    def run(self) -> None:
        import torch.utils.cpp_extension as torch_paths
        from torch import __version__ as torch_version

        in_place = self.inplace or self.editable_mode
        package = ROOT / "sentfast" if in_place else Path(self.build_lib).resolve() / "sentfast"
        package.mkdir(parents=True, exist_ok=True)
        self.ninja = Ninja(Path(self.build_temp).resolve())
        self.torch_include = " ".join(f"-isystem {path}" for path in torch_paths.include_paths())
        self.torch_lib = torch_paths.library_paths()[0]
        self._cpu_library(package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
        nvcc = _nvcc()
        if nvcc:
            self._cuda_library(nvcc, package / "_cuda.so")
        self.ninja.run()
        info = {
            "torch": torch_version,
            "torch_target": TORCH_TARGET,
            "python": platform.python_version(),
            "ext_suffix": sysconfig.get_config_var("EXT_SUFFIX"),
            "cuda": bool(nvcc),
        }
        (package / "_build.json").write_text(json.dumps(info, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        """Nothing for setuptools to copy or check: the libraries are written where they belong."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def _cpu_library(self, library: Path) -> None:
        import pybind11

        major, minor = TORCH_TARGET
        self.target = f"-DTORCH_TARGET_VERSION={(major << 56) | (minor << 48):#x}ULL"
        common = "-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -MMD -MF $out.d -c $in -o $out $flags"
        self.ninja.rule("cxx", f"{os.environ.get('CXX', 'g++')} {common}")
        self.ninja.rule("link", f"{os.environ.get('CXX', 'g++')} -shared $in -o $out $flags")
        python = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
        tiers = TIERS if platform.machine() in ("x86_64", "AMD64") else {"scalar": ""}
        sources = {f"cpu/tier_{tier}": f"{flags} {_QUIET}" for tier, flags in tiers.items()}
        sources |= {
            "cpu/isa": "",
            "cpu/pooling": self.torch_flags,
            "cpu/similarity": self.torch_flags,
            "cpu/linear": self.torch_flags,
            "cpu/encoder": self.torch_flags,
            "cpu/attention": self.torch_flags,
            "cpu/layers": self.torch_flags,
            "cpu/product": self.torch_flags,
            "cpu/losses": self.torch_flags,
            "cpu/search_topk": self.torch_flags,
            "cpu/search_above": self.torch_flags,
            "cpu/search_pack": self.torch_flags,
            "module": python,
        }
        objects = [
            self.ninja.build("cxx", self.ninja.folder / f"{name}.o", [ROOT / "csrc" / f"{name}.cpp"], flags=flags)
            for name, flags in sources.items()
        ]
        # No rpath: `import torch` has the libraries open already, and a stable ABI must not tie itself to one.
        self.ninja.build("link", library, objects, flags=f"-L{self.torch_lib} -ltorch_cpu -Wl,-z,relro,-z,now")

    @property
    def torch_flags(self) -> str:
        return f"{self.torch_include} {self.target}"

    def _cuda_library(self, nvcc: str, library: Path) -> None:
        archs = os.environ.get("SENTFAST_CUDA_ARCHS", "80 86 89 90a 100 120").split()
        codes = " ".join(f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs)
        newest = archs[-1].rstrip("af")  # as PTX too, for GPUs that are not made yet
        codes += f" -gencode arch=compute_{newest},code=compute_{newest}"
        options = f"-O3 -std=c++17 -DUSE_CUDA -Xcompiler -fPIC,-fvisibility=hidden -MD -MF $out.d {codes}"
        self.ninja.rule("nvcc", f"{nvcc} {options} -c $in -o $out {self.torch_flags}")
        objects = [
            self.ninja.build("nvcc", self.ninja.folder / "cuda" / f"{source.stem}.o", [source])
            for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        ]
        self.ninja.rule("nvlink", f"{nvcc} -shared -cudart static $in -o $out")
        self.ninja.build("nvlink", library, objects)


def _buildable() -> bool:
    if os.environ.get("SENTFAST_NO_EXT") == "1":
        return False
    try:
        import ninja  # noqa: F401
        import pybind11  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:  # an isolated build: a working pure install rather than another torch
        print(
            f"sentfast: no {error.name} to build with; use --no-build-isolation for the fast kernels", file=sys.stderr
        )
        return False
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        print("sentfast: no C++ compiler found; installing without the fast kernels", file=sys.stderr)
        return False
    return True


# The extension is named so that the wheel gets its platform tag; BuildLibraries knows the sources.
if __name__ == "__main__":
    if _buildable():
        setup(ext_modules=[Extension("sentfast._C", [])], cmdclass={"build_ext": BuildLibraries})
    else:
        setup()
