"""OpenVINO behind sentence-transformers' own encode: what a user of a CPU would pick instead.

python benchmarks/openvino_peer.py MODEL FILE.xml    converts a model of encode_models.py

The library is kept out of the environment: pip puts it into a folder of the cache (see texts.py), and only the process
that measures it has that folder on its path. optimum-intel, which sentence-transformers' backend="openvino" needs, does
not go with the transformers of this environment; the model is converted by OpenVINO itself and takes the place of the
transformers model, which is what that backend does too.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from encode_models import MODELS, base_of, weights_of
from texts import Unavailable, cache, run
from torch import Tensor

VERSION = "2026.4.1"
PRECISIONS = {"OpenVINO": "f32", "OpenVINO bf16": "bf16"}
_PINS = (f"openvino=={VERSION}", "openvino-telemetry==2025.2.0")


def library() -> Path:
    """The folder that holds OpenVINO, filled by pip on first use."""
    folder = cache() / f"openvino-{VERSION}-python{sys.version_info.major}.{sys.version_info.minor}"
    if not (folder / "openvino").exists():
        with tempfile.TemporaryDirectory(dir=cache()) as name:
            pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", f"{name}/site", *_PINS)
            run(*pip, failed="OpenVINO: not installed")
            shutil.rmtree(folder, ignore_errors=True)
            shutil.move(f"{name}/site", folder)
    return folder


def converted(model: str) -> Path:
    """The model in OpenVINO's format, converted in a process of its own on first use."""
    path = cache() / f"{model}-{weights_of(model)}-openvino{VERSION}-transformers{transformers.__version__}.xml"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as name:
            made = Path(name) / "model.xml"
            program = (sys.executable, __file__, model, str(made))
            run("env", f"PYTHONPATH={path_with(library())}", *program, failed=f"OpenVINO: {model} not converted")
            # The weights first: a path.xml that exists is complete.
            shutil.move(made.with_suffix(".bin"), path.with_suffix(".bin"))
            shutil.move(made, path)
    return path


def path_with(folder: Path) -> str:
    """PYTHONPATH with the folder behind what is there."""
    return os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(folder)]))


class Body(torch.nn.Module):
    """Takes the place of a transformers model."""

    def __init__(self, path: Path, precision: str, threads: int, config: Any):
        super().__init__()
        import openvino

        self.config = config
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        self.compiled = openvino.Core().compile_model(str(path), "CPU", options)
        used = str(self.compiled.get_property("INFERENCE_PRECISION_HINT"))
        if {"f32": "'float32'", "bf16": "'bfloat16'"}[precision] not in used:
            raise Unavailable(f"OpenVINO: asked for {precision}, it runs {used}")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **ignored: Any) -> Any:
        found = self.compiled({"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()})
        return SimpleNamespace(last_hidden_state=torch.from_numpy(found[0]))


def in_place_of(model: Any, path: Path, precision: str, threads: int) -> Any:
    """A sentence-transformers model like this one, with OpenVINO in the place of its transformers model."""
    replaced, transformer = _shallow(model), _shallow(model[0])
    transformer.model = Body(path, precision, threads, model[0].auto_model.config)
    replaced[0] = transformer
    return replaced


def _shallow(module: torch.nn.Module) -> Any:
    """A copy whose children are the same and may be replaced."""
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made


def _convert(name: str, path: Path) -> None:
    import openvino

    base = base_of(MODELS[name].build()[0]).eval()

    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = base

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.base(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids, mask = torch.ones(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)
    # A batch with padding: without it the tracer would see no mask.
    mask[1, 5:] = 0
    shapes = [("input_ids", [-1, -1]), ("attention_mask", [-1, -1])]
    with torch.no_grad():
        example = {"input_ids": ids, "attention_mask": mask}
        made = openvino.convert_model(Traced(), example_input=example, input=shapes)
    openvino.save_model(made, str(path), compress_to_fp16=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    _convert(arguments.model, arguments.file)


if __name__ == "__main__":
    main()
