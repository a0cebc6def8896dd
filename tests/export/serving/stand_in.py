"""What stands in for Triton's ONNX Runtime backend, which no package carries: the same files in its Python backend."""

from __future__ import annotations

from pathlib import Path

_MODEL = '''
import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """A graph, held to what the ONNX Runtime backend holds it to (its ModelInstanceState::ValidateInputs)."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.session = onnxruntime.InferenceSession(
            Path(args["model_repository"]) / args["model_version"] / "model.onnx", providers=["CPUExecutionProvider"]
        )
        self.inputs = config["input"]
        self.outputs = [each["name"] for each in config["output"]]
        needed = {each.name for each in self.session.get_inputs()}
        with_default = {each.name for each in self.session.get_overridable_initializers()}
        optional = {each["name"] for each in self.inputs if each.get("optional")}
        if optional and config["max_batch_size"]:
            raise ValueError("optional inputs are not supported for models that support batching")
        if {each["name"] for each in self.inputs} - optional != needed or optional - with_default:
            raise ValueError(f"the graph needs {needed} and has defaults of {with_default}")

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        feed = {}
        for each in self.inputs:
            tensor = pb_utils.get_input_tensor_by_name(request, each["name"])
            if tensor is not None:
                feed[each["name"]] = tensor.as_numpy()
        arrays = self.session.run(self.outputs, feed)
        tensors = [pb_utils.Tensor(name, array) for name, array in zip(self.outputs, arrays)]
        return pb_utils.InferenceResponse(tensors)
'''


def run_in_python(repository: Path) -> list[str]:
    """Have the Python backend run the graphs of a repository; return the names of their models."""
    changed = []
    for config in repository.glob("*/config.pbtxt"):
        text = config.read_text(encoding="utf-8")
        if 'backend: "onnxruntime"' in text:
            text = text.replace('backend: "onnxruntime"', 'backend: "python"').replace("KIND_AUTO", "KIND_CPU")
            config.write_text(text, encoding="utf-8")
            (config.parent / "1" / "model.py").write_text(_MODEL, encoding="utf-8")
            changed.append(config.parent.name)
    return changed
