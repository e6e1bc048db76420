"""What is installed, what runs where, and a short self-test of every operator."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PACKAGES = ("sentfast", "torch", "sentence-transformers", "transformers", "triton", "numpy")
_OPENMP = re.compile(r"/(lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*)$")


HEALTHY, BROKEN, STOCK_SPEED = 0, 4, 3  # exit codes of the command
_VERDICTS = {
    HEALTHY: "healthy",
    STOCK_SPEED: "healthy, but at stock speed: nothing is accelerated here",
    BROKEN: "broken: what does not work runs the original code, or not at all",
}


class Diagnosis:
    """Returned by :func:`doctor`; prints as text, the verdict first.

    Attributes:
        facts: section -> what was found, ready for JSON.
        missing: what would make it faster, with the command that adds it.
        broken: what is wrong; empty if healthy.
        stock: why everything runs at stock speed though nothing is broken; empty if something is accelerated.
    """

    def __init__(
        self, facts: dict[str, Any], missing: tuple[str, ...], broken: tuple[str, ...], stock: tuple[str, ...] = ()
    ):
        self.facts, self.missing, self.broken, self.stock = facts, missing, broken, stock

    @property
    def healthy(self) -> bool:
        return not self.broken

    @property
    def exit_code(self) -> int:
        """0 healthy, 3 healthy but at stock speed, 4 broken."""
        return BROKEN if self.broken else STOCK_SPEED if self.stock else HEALTHY

    @property
    def verdict(self) -> str:
        return _VERDICTS[self.exit_code]

    def to_dict(self) -> dict[str, Any]:
        return {
            "healthy": self.healthy,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "missing": list(self.missing),
            "broken": list(self.broken),
            "stock": list(self.stock),
            **self.facts,
        }

    def text(self, verbose: bool = False) -> str:
        """Verdict, remedies, then what was found; the operators one by one only if `verbose`."""
        lines = [self.verdict]
        lines += [f"BROKEN: {line}" for line in self.broken]
        lines += [f"stock speed: {line}" for line in self.stock]
        lines += [f"missing: {line}" for line in self.missing]
        for section, found in self.facts.items():
            lines.append(section)
            if not verbose and section in _SUMMARIES:
                lines.append(f"  {_SUMMARIES[section](found)}")
            elif isinstance(found, dict):
                lines += [f"  {key:28} {_text(value)}" for key, value in found.items()]
            else:
                lines.append(f"  {_text(found)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {inner}" for key, inner in value.items())
    return ", ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)


def _summary_of_backends(table: dict[str, dict[str, str]]) -> str:
    counts = {
        backend: sum(row[backend] == "yes" for row in table.values()) for backend in next(iter(table.values()), {})
    }
    runs = ", ".join(f"{backend} {count}" for backend, count in counts.items())
    return f"of {len(table)} operators run on: {runs} (each with -v)"


def _summary_of_test(results: dict[str, str]) -> str:
    failed = [name for name, result in results.items() if result != "OK"]
    return f"{len(results) - len(failed)} of {len(results)} OK" + (f"; failed: {', '.join(failed)}" if failed else "")


_SUMMARIES: dict[str, Callable[[Any], str]] = {
    "backends": _summary_of_backends,
    "patched": lambda names: f"{len(names)} functions and methods (by name with -v)",
    "self-test": _summary_of_test,
}


def doctor() -> Diagnosis:
    """Looks at the installation and runs every operator once against its definition in float64."""
    facts: dict[str, Any] = {"versions": _versions()}
    if not _installed("torch"):
        return Diagnosis(facts, (), ("PyTorch is not installed: python -m pip install torch",))
    try:
        importlib.import_module("sentfast.ops")
    except Exception as error:
        return Diagnosis(facts, (), (f"the operators do not load: {type(error).__name__}: {error}",))
    missing: list[str] = []
    broken: list[str] = []
    stock: list[str] = []
    facts["installed"] = _installation()
    facts["libraries"] = _libraries(missing, broken, stock)
    facts["machine"] = _machine()
    facts["backends"] = _backends()
    facts["patched"] = _patched(missing, broken, stock)
    facts["self-test"] = self_test()
    broken += [f"self-test of {name}: {result}" for name, result in facts["self-test"].items() if result != "OK"]
    return Diagnosis(facts, tuple(missing), tuple(broken), tuple(stock))


def _installed(package: str) -> bool:
    return importlib.import_module("importlib.util").find_spec(package) is not None


def _versions() -> dict[str, str]:
    metadata = importlib.import_module("importlib.metadata")
    versions = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["sentfast"] = importlib.import_module("sentfast").__version__
    return versions


def _installation() -> dict[str, str]:
    from sentfast import install

    root, other = install.clone(), install.shadowed()
    found = {"package": os.path.dirname(os.path.abspath(__file__))}
    if root is not None:
        found["kind"] = f"sources, imported from {root}"
    if other is not None:
        found["shadowed"] = f"the installed package in {other}, which has kernels, is not the one that is imported"
    return found


def _libraries(missing: list[str], broken: list[str], stock: list[str]) -> dict[str, str]:
    import torch

    from sentfast import install, native

    reasons = {"cpu": native.why_no_cpu(), "cuda": native.why_no_cuda(), "triton": native.why_no_triton("cuda")}
    gpu = torch.cuda.is_available()
    without_cpu = missing if gpu and not reasons["triton"] else stock
    if reasons["cpu"] and native.built():
        broken.append(f"{reasons['cpu']}. Mend it with: {install.remedy()}")
    elif reasons["cpu"]:
        without_cpu.append(f"{reasons['cpu']}. {native.advice()}")
    elif native.cpu_isa() == "scalar" and len(native.supported_cpu_isas()) > 1:
        missing.append(
            "the scalar kernels run because SENTFAST_CPU_ISA asks for them, several times slower than the original; "
            f"this CPU has {native.supported_cpu_isas()[-1]}: unset it"
        )
    elif native.cpu_isa() == "scalar":
        without_cpu.append("this CPU has no instruction set that there are fast kernels for")
    elif not native.state.products:
        missing.append(
            f"the encoder and matrices of scores run the original code: the kernels of {native.cpu_isa()} were never "
            f"measured. Try them with: SENTFAST_CPU_ISA={native.cpu_isa()}"
        )
    if gpu:
        if reasons["cuda"] and native.build_info().get("cuda"):
            broken.append(f"{reasons['cuda']}. Mend it with: {install.remedy()}")
        elif reasons["cuda"]:
            missing.append(f"{reasons['cuda']}. Add it with nvcc on PATH and: {install.remedy()}")
        if reasons["triton"]:
            missing.append(f"{reasons['triton']}. Add it with: python -m pip install triton")
    return {name: reason or "loaded" for name, reason in reasons.items()}


def _machine() -> dict[str, Any]:
    import torch

    from sentfast import native

    machine: dict[str, Any] = {
        "cpu isa selected": _isa(),
        "cpu isas": native.supported_cpu_isas(),
        "threads": torch.get_num_threads(),
        "cpus of this process": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "openmp runtimes": openmp_runtimes(),
    }
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        machine[f"gpu {index}"] = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
    return machine


def _isa() -> str:
    from sentfast import native

    if not native.cpu_loaded():
        return "none"
    return native.cpu_isa() + ("" if native.state.structure else ": the original code runs, which is faster [SF131]")


def openmp_runtimes() -> list[str]:
    """The OpenMP runtimes in this process; more than one of them share the cores badly."""
    if not os.path.exists("/proc/self/maps"):
        return []
    with open("/proc/self/maps") as maps:
        found = [_OPENMP.search(line.rstrip()) for line in maps]
    return sorted({match.group(1) for match in found if match is not None})


def _backends() -> dict[str, dict[str, str]]:
    """Operator -> backend -> "yes" or why not, for float32 on the device that the backend is for."""
    import torch

    from sentfast import registry

    cpu = torch.empty(1, device="cpu")
    cuda = torch.empty(1, device="cuda") if torch.cuda.is_available() else None
    table: dict[str, dict[str, str]] = {}
    for name, op in registry.ops.items():
        table[name] = {}
        for backend in registry.BACKENDS:
            probe = cpu if backend in ("cpu", "reference") else cuda
            why = "no GPU" if probe is None else op.why_not(backend, probe)
            table[name][backend] = why or "yes"
    return table


def _patched(missing: list[str], broken: list[str], stock: list[str]) -> list[str]:
    from sentfast import switch

    if not _installed(switch.TARGET):
        stock.append(
            "sentence-transformers is not installed, so only the operators themselves run: "
            "python -m pip install sentence-transformers"
        )
        return []
    if not switch.is_enabled():
        by = "SENTFAST_DISABLE is set" if os.environ.get("SENTFAST_DISABLE", "0") not in ("", "0") else "disable()"
        stock.append(f"sentfast is switched off ({by}): unset it, or call sentfast.enable()")
        return switch.patched()
    try:
        importlib.import_module(switch.TARGET)
    except ImportError as error:
        broken.append(f"sentence-transformers does not import: {error}")
    if switch.problem():
        broken.append(f"sentence-transformers is not accelerated: {switch.problem()}")
    elif switch.TARGET in sys.modules and not switch.patched():
        version, tested = _versions()["sentence-transformers"], _tested()
        stock.append(
            f"sentence-transformers {version} is not known and nothing of it is patched; tested are {tested}: "
            "python -m pip install 'sentence-transformers>=5.1,<6.3', or a newer sentfast"
        )
    return switch.patched()


def _tested() -> str:
    tested: str = importlib.import_module("sentfast.integrations.versions").TESTED
    return tested


def self_test() -> dict[str, str]:
    """Every public operator on random input, on every device here: "OK", or what is wrong."""
    import torch

    results = {}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for name, run in _cases().items():
            try:
                results[f"{name} ({device})"] = _compare(run, device)
            except Exception as error:
                results[f"{name} ({device})"] = f"FAILED: {type(error).__name__}: {error}"
    return results


def _cases() -> dict[str, Callable]:
    """Public operator -> a call of it on tokens [4, 33, 65], a mask and two matrices [17, 65], [9, 65]."""
    import torch

    from sentfast import functional

    def sequences(x: Any) -> Any:
        return torch.tensor([0, 20, 33], dtype=torch.int32, device=x.device)

    def heads(x: Any) -> Any:
        return x.unflatten(-1, (5, 13))

    return {
        "pool": lambda x, mask, a, b: functional.pool(x, mask, mode=("mean", "max", "weightedmean"), normalize=True),
        "l2_normalize": lambda x, mask, a, b: functional.l2_normalize(a),
        "cosine_similarity": lambda x, mask, a, b: functional.cosine_similarity(a, b),
        "dot_similarity": lambda x, mask, a, b: functional.dot_similarity(a, b),
        "pairwise_similarity": lambda x, mask, a, b: functional.pairwise_similarity(a[:9], b, "euclidean"),
        "pairwise_cosine_similarity": lambda x, mask, a, b: functional.pairwise_cosine_similarity(a[:9], b),
        "contrastive_loss": lambda x, mask, a, b: functional.contrastive_loss(b, a),
        "linear": lambda x, mask, a, b: functional.linear(a, b),
        "linear_activation": lambda x, mask, a, b: functional.linear_activation(a, b, b[:, 0]),
        "bias_activation": lambda x, mask, a, b: functional.bias_activation(a, b[0]),
        "dropout": lambda x, mask, a, b: functional.dropout(a, 0.3, seed=1),
        "dropout_add_layer_norm": lambda x, mask, a, b: functional.dropout_add_layer_norm(a[:9], b, a[9], a[10]),
        "varlen_attention": lambda x, mask, a, b: functional.varlen_attention(
            heads(x[0]), heads(x[1]), heads(x[2]), sequences(x), dropout_p=0.2, seed=1
        ),
        "varlen_attention_qkvpacked": lambda x, mask, a, b: functional.varlen_attention_qkvpacked(
            heads(x[:3]).transpose(0, 1), sequences(x), causal=True
        ),
    }


def _compare(run: Callable, device: str) -> str:
    """Against the definition in float64; the bound is some hundred times the rounding error of float32."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = (4, 33, 65), (17, 65), (9, 65)
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for shape in shapes]
    mask = torch.arange(33, device="cpu") < torch.tensor([33, 1, 16, 20], device="cpu").unsqueeze(1)
    inputs = [value.float() for value in exact]
    x, a, b = (value.double() for value in inputs)
    expected = run(x, mask, a, b)
    x, a, b = (value.to(device) for value in inputs)
    result = run(x, mask.to(device), a, b).cpu().double()
    error = ((result - expected).abs().max() / expected.abs().max()).item()
    return "OK" if error < 1e-5 else f"FAILED: relative error {error:.1e}"
