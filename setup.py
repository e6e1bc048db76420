"""Builds the compiled libraries with ninja; everything else about the package is in pyproject.toml.

An installation never fails for want of kernels: what cannot be built is said, here and by `python -m sentfast doctor`,
and the package runs on plain PyTorch. `python setup.py build_ext --inplace` does fail.

Environment:
    SENTFAST_NO_EXT=1     install without compiled libraries (plain PyTorch and Triton); 0: fail rather than do so
    SENTFAST_CUDA=0|1     never / always build the CUDA library (default: if nvcc is found and PyTorch has CUDA)
    SENTFAST_CUDA_ARCHS   its architectures, default "80 86 89 90a 100 120"
    MAX_JOBS              compilers at a time, default one per core
    CXX, NVCC             the compilers
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_TARGET = (2, 10)  # the oldest PyTorch whose stable ABI the libraries need
TORCH = f"torch>={'.'.join(map(str, TORCH_TARGET))}"

_AVX2 = "-mavx2 -mfma -mf16c"
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
# GCC 12 warns about its own intrinsics headers (GCC bug 105593).
# Vectors wider than a tier has are only passed to inline functions, so their ABI does not matter.
_QUIET = "-Wno-uninitialized -Wno-maybe-uninitialized -Wno-psabi"
# Of clang: it knows neither all of GCC's pragmas nor all of GCC's warnings.
_QUIET_CLANG = "-Wno-unknown-warning-option -Wno-unknown-pragmas -Wno-pass-failed -Wno-psabi"
TIERS = {
    "scalar": "-O2",
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_vnni": f"{_AVX512} -mavx512vnni",
    "avx512_bf16": f"{_AVX512} -mavx512bf16",
}
ARM_TIERS = {
    "scalar": "-O2",
    "neon": "",
    "neon_dot": "-march=armv8.2-a+dotprod",
    "neon_bf16": "-march=armv8.2-a+dotprod+bf16+i8mm",
}
WITH_TORCH = (
    *("pooling", "similarity", "linear", "encoder", "attention", "layers", "product", "losses"),
    *("search_topk", "search_above", "search_pack"),
)


# Where the package came from, and the number of its sources, are asked for in one place.
install = SimpleNamespace(**runpy.run_path(str(ROOT / "sentfast" / "install.py")))


class NoKernelsError(Exception):
    """Why the libraries cannot be built."""


def tiers(machine: str) -> dict[str, str]:
    """The instruction sets to compile for a machine, with the flags of each."""
    if machine in ("x86_64", "AMD64"):
        return TIERS
    return ARM_TIERS if machine in ("aarch64", "arm64", "ARM64") else {"scalar": ""}


def compiler(system: str) -> str:
    """The command of the C++ compiler: CXX, else the first that is there."""
    if os.environ.get("CXX"):
        names = [os.environ["CXX"]]
    else:
        names = {"Darwin": ["clang++", "g++"], "Windows": ["clang-cl"]}.get(system, ["g++", "clang++"])
    for name in names:
        if shutil.which(shlex.split(name)[0]):
            return name
    raise NoKernelsError(f"no C++ compiler: {' or '.join(names)} was not found")


def python_headers() -> Path:
    """The folder with Python.h, which Debian and others leave out of the package of Python itself."""
    folder = Path(sysconfig.get_path("include"))
    if not (folder / "Python.h").exists():
        advice = "on Debian and Ubuntu: apt-get install python3-dev"
        raise NoKernelsError(f"no headers of Python {platform.python_version()} in {folder}; {advice}")
    return folder


def accepted(cxx: str, flags: str) -> bool:
    """Whether the compiler knows these instruction sets."""
    words = [*shlex.split(cxx), *flags.split(), "-x", "c++", "-E", os.devnull]
    return subprocess.run(words, capture_output=True).returncode == 0


def compile_command(system: str, cxx: str) -> str:
    """The command that makes $out of $in and the file with its dependencies."""
    if system == "Windows":  # clang-cl: the kernels need GCC's vector extensions, which MSVC's own compiler lacks
        quiet = _QUIET_CLANG
        return f"{cxx} /O2 /std:c++17 /EHsc /clang:-MD /clang:-MF$out.d {quiet} /c $in /Fo$out $flags"
    common = "-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -MMD -MF $out.d -c $in -o $out"
    quiet = f" {_QUIET_CLANG}" if system == "Darwin" or "clang" in cxx else ""
    oldest = " -mmacosx-version-min=11.0" if system == "Darwin" else ""
    return f"{cxx} {common}{quiet}{oldest} $flags"


def link_command(system: str, cxx: str, torch_lib: Path) -> str:
    """The command that makes the library $out of the objects $in.

    No rpath: `import torch` has the libraries open already, and a stable ABI must not tie itself to one.
    """
    if system == "Windows":
        python = Path(sys.base_prefix) / "libs"
        paths = f"/LIBPATH:{quoted(torch_lib)} /LIBPATH:{quoted(python)}"
        return f"{cxx} /LD $in /Fe$out /link {paths} torch_cpu.lib"
    if system == "Darwin":  # what the process has open resolves the rest
        return f"{cxx} -bundle -undefined dynamic_lookup -mmacosx-version-min=11.0 $in -o $out"
    return f"{cxx} -shared $in -o $out -L{quoted(torch_lib)} -ltorch_cpu -Wl,-z,relro,-z,now"


def quoted(path: Path | str) -> str:
    """A path as a word of a command."""
    return shlex.quote(str(path)) if os.name == "posix" else f'"{path}"'


def escaped(path: Path | str) -> str:
    """A path as ninja's build lines want it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class Torch:
    """The PyTorch to build against, read from its files: importing it takes seconds, and in an isolated build the one
    beside which the package will be installed cannot be imported, but its headers are as good."""

    def __init__(self, folder: Path):
        facts = runpy.run_path(str(folder / "version.py"))
        self.version, self.cuda = str(facts["__version__"]), facts.get("cuda")
        include = folder / "include"
        self.include = " ".join(f"-isystem {quoted(path)}" for path in (include, include / "torch/csrc/api/include"))
        self.lib = folder / "lib"

    @classmethod
    def find(cls) -> Torch | None:
        """One that can be imported here, else one beside which the package will be installed."""
        spec = importlib.util.find_spec("torch")
        places = [Path(found) for found in (spec.submodule_search_locations or [])] if spec is not None else []
        roots = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
        if site.ENABLE_USER_SITE:
            roots.append(site.getusersitepackages())
        places += [Path(root) / "torch" for root in roots]
        for folder in places:
            if (folder / "version.py").exists() and (folder / "include" / "torch" / "csrc" / "stable").is_dir():
                torch = cls(folder)
                if tuple(int(part) for part in torch.version.split(".")[:2]) >= TORCH_TARGET:
                    return torch
        return None


def torch_flags(torch: Torch) -> str:
    """What a source that includes PyTorch's headers is compiled with: nothing that TORCH_TARGET lacks can be called."""
    major, minor = TORCH_TARGET
    return f"{torch.include} -DTORCH_TARGET_VERSION={(major << 56) | (minor << 48):#x}ULL"


def cuda_link_command(nvcc: str, torch_lib: Path, stubs: Path) -> str:
    """The command that makes the CUDA library $out of the objects $in, with a CUDA runtime of its own.

    Its needed libraries name both of PyTorch's that it calls: Python opens PyTorch so that other libraries do not see
    its symbols, unless they ask for it by name. The one for CUDA is linked as an empty library of that name, since the
    PyTorch at hand may have none. No rpath, as in link_command.
    """
    libraries = f"-L{quoted(torch_lib)} -ltorch_cpu -L{quoted(stubs)} -ltorch_cuda"
    return f"{nvcc} -shared -cudart static -Xlinker --no-as-needed,-z,relro,-z,now $in -o $out {libraries}"


def nvcc(torch: Torch) -> str | None:
    """The compiler of the CUDA library; None if the library is not wanted or of no use."""
    wanted = os.environ.get("SENTFAST_CUDA") or ("0" if torch.cuda is None else "")
    if wanted == "0":
        return None
    found = os.environ.get("NVCC") or shutil.which("nvcc")
    if found is None and Path("/usr/local/cuda/bin/nvcc").exists():
        found = "/usr/local/cuda/bin/nvcc"
    if wanted == "1" and found is None:
        raise NoKernelsError("SENTFAST_CUDA=1, but nvcc was not found; set NVCC or put it on PATH")
    return found


def jobs() -> str:
    if os.environ.get("MAX_JOBS"):
        return os.environ["MAX_JOBS"]
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return str(len(affinity(0)) if affinity is not None else os.cpu_count() or 1)


class Ninja:
    """A build.ninja file in the making."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lines = ["ninja_required_version = 1.8"]

    def rule(self, name: str, command: str) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", "  depfile = $out.d", "  deps = gcc"]

    def build(self, rule: str, out: Path, inputs: list[Path], after: Sequence[Path] = (), **variables: str) -> Path:
        """after: what has to be made before, though the rule's command does not name it."""
        before = f" | {' '.join(map(escaped, after))}" if after else ""
        self.lines.append(f"build {escaped(out)}: {rule} {' '.join(map(escaped, inputs))}{before}")
        self.lines += [f"  {name} = {value}" for name, value in variables.items()]
        return out

    def run(self) -> None:
        import ninja

        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(self.folder), "-j", jobs()]
        errors = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout or ():
                sys.stdout.write(line)
                sys.stdout.flush()
                if "error" in line.lower() or "undefined" in line:
                    errors.append(line.strip())
        if process.returncode:
            silent = (
                f"ninja ended with {process.returncode}, and the compiler ({os.environ.get('CXX', 'CXX is not set')})"
            )
            first = errors[0][:400] if errors else f"{silent} said nothing"
            raise NoKernelsError(f"compiling failed: {first}")


def say(text: str) -> None:
    """To stderr, and to the terminal: pip shows nothing of what a build that succeeds has written."""
    text = f"\nsentfast: {text}\n"
    sys.stderr.write(text)
    if not sys.stderr.isatty():
        try:
            with open("/dev/tty", "w") as terminal:
                terminal.write(text)
        except OSError:  # none, as in CI and on Windows
            pass


class BuildLibraries(build_ext):
    """Compiles csrc/ into sentfast/_C and, with nvcc, sentfast/_cuda.so, and writes sentfast/_build.json."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        self.package = ROOT / "sentfast" if in_place else Path(self.build_lib).resolve() / "sentfast"
        self.package.mkdir(parents=True, exist_ok=True)
        if not in_place:  # what an earlier build has left there would be installed beside a note that this one failed
            for library in (*self.package.glob("_C*"), *self.package.glob("_cuda.so")):
                library.unlink()
        # Who calls this command by name, or says SENTFAST_NO_EXT=0, wants the libraries and nothing else.
        must = (self.inplace and not self.editable_mode) or os.environ.get("SENTFAST_NO_EXT") == "0"
        try:
            info = self._libraries(must)
        except NoKernelsError as error:
            if must:
                raise SystemExit(f"sentfast: {error}") from error
            say(f"installed WITHOUT compiled kernels, so on the CPU everything runs at stock speed: {error}")
            info = {"failed": str(error)}
        (self.package / "_build.json").write_text(json.dumps(info, indent=2) + "\n")

    def _libraries(self, must: bool) -> dict[str, object]:
        torch = Torch.find()
        if torch is None:
            raise NoKernelsError(f"no PyTorch to build against: expected {TORCH} beside this package")
        missing = [name for name in ("ninja", "pybind11") if importlib.util.find_spec(name) is None]
        if missing:
            raise NoKernelsError(f"no {' and no '.join(missing)} to build with")
        self.torch = torch
        self.temporary = Path(self.build_temp).resolve()
        self.torch_flags = torch_flags(torch)
        self.sources = install.sources(ROOT / "csrc")
        self._cpu_library(self.package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
        try:
            found = nvcc(torch)
            if found is not None:
                self._cuda_library(found, self.package / "_cuda.so")
        except NoKernelsError as error:
            if must:
                raise
            say(f"installed without the compiled CUDA kernels; Triton's are there: {error}")
            found = None
        return {
            "sources": self.sources,
            "torch": torch.version,
            "torch_target": TORCH_TARGET,
            "python": platform.python_version(),
            "ext_suffix": sysconfig.get_config_var("EXT_SUFFIX"),
            "cuda": found is not None,
        }

    def get_outputs(self) -> list[str]:
        """Nothing for setuptools to copy or check: the libraries are written where they belong."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def _cpu_library(self, library: Path) -> None:
        import pybind11

        system = platform.system()
        cxx = compiler(system)
        ninja = Ninja(self.temporary)
        ninja.rule("cxx", compile_command(system, cxx))
        ninja.rule("link", link_command(system, cxx, self.torch.lib))
        folders = (pybind11.get_include(), python_headers())
        chosen = tiers(platform.machine())
        known = {tier: flags for tier, flags in chosen.items() if not tier.endswith("bf16") or accepted(cxx, flags)}
        sources = {f"cpu/tier_{tier}": f"{flags} {_QUIET}" for tier, flags in known.items()}
        sources["cpu/isa"] = "" if known == chosen else "-DSENTFAST_WITHOUT_BF16"
        sources |= {f"cpu/{name}": self.torch_flags for name in WITH_TORCH}
        sources["module"] = " ".join(f"-isystem {quoted(folder)}" for folder in folders)
        sources["watch"] = f"{sources['module']} {self.torch_flags}"
        objects = [
            ninja.build("cxx", ninja.folder / f"{name}.o", [ROOT / "csrc" / f"{name}.cpp"], flags=flags)
            for name, flags in sources.items()
        ]
        objects.append(ninja.build("cxx", ninja.folder / "sources.o", [self._mark(ninja.folder)]))
        ninja.build("link", library, objects)
        ninja.run()

    def _mark(self, folder: Path) -> Path:
        """A source with nothing but the number of the sources, by which a library is known before it is opened."""
        path = folder / "sources.cpp"
        constant = f'__attribute__((used)) const char sentfast_sources[] = "{install.mark(self.sources)}";'
        text = f'extern "C" {{\n{constant}\n}}\n'
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return path

    def _cuda_library(self, nvcc: str, library: Path) -> None:
        archs = os.environ.get("SENTFAST_CUDA_ARCHS", "80 86 89 90a 100 120").split()
        codes = " ".join(f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs)
        newest = archs[-1].rstrip("af")  # as PTX too, for GPUs that are not made yet
        codes += f" -gencode arch=compute_{newest},code=compute_{newest}"
        options = f"-O3 -std=c++17 -DUSE_CUDA -Xcompiler -fPIC,-fvisibility=hidden -MD -MF $out.d {codes}"
        ninja = Ninja(self.temporary / "cuda")
        ninja.rule("nvcc", f"{nvcc} {options} -c $in -o $out {self.torch_flags}")
        objects = [
            ninja.build("nvcc", ninja.folder / f"{source.stem}.o", [source])
            for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        ]
        objects.append(ninja.build("nvcc", ninja.folder / "sources.o", [self._mark(ninja.folder)]))
        stubs = ninja.folder / "stubs"
        stubs.mkdir(parents=True, exist_ok=True)
        (stubs / "empty.c").write_text("")
        ninja.rule("stub", f"{compiler('Linux')} -shared -x c $in -o $out -Wl,-soname,libtorch_cuda.so")
        stub = ninja.build("stub", stubs / "libtorch_cuda.so", [stubs / "empty.c"])
        ninja.rule("nvlink", cuda_link_command(nvcc, self.torch.lib, stubs))
        ninja.build("nvlink", library, objects, after=[stub])
        ninja.run()


def needed() -> list[str]:
    """What an isolated build must install: PyTorch only where none is found that the package will run beside."""
    try:
        compiler(platform.system())
    except NoKernelsError:
        return []
    return [TORCH] if Torch.find() is None and "egg_info" in sys.argv else []


# The extension is named so that the wheel gets its platform tag; BuildLibraries knows the sources.
if __name__ == "__main__":
    if os.environ.get("SENTFAST_NO_EXT") == "1":
        setup()
    else:
        extension = Extension("sentfast._C", [])
        setup(ext_modules=[extension], cmdclass={"build_ext": BuildLibraries}, setup_requires=needed())
