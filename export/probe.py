"""Run a graph in ONNX Runtime and write down what it does: `python -m defense.export.probe FOLDER`.

A graph can end the process that loads it, so this is always a process of its own. It reads job.json and
inputs.safetensors in FOLDER, and leaves signature.json and outputs.safetensors there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from safetensors.numpy import load_file, save_file

from defense.export.sessions import make_options
from defense.store.folders import write_tensors

_kept: list[Any] = []
"""What sessions use and do not own."""
JOB, INPUTS, SIGNATURE, OUTPUTS = "job.json", "inputs.safetensors", "signature.json", "outputs.safetensors"


def probe(folder: Path) -> None:
    """Check the graph of a job, run it on every batch of the job and record its signature and answers.

    An answer's name is "<output>.<first row>.<last row>", that of a further batch "<output>.<its name>".
    """
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    onnx.checker.check_model(job["model"], full_check=True)
    session = _session(job, {})
    signature = {
        "inputs": {value.name: value.shape for value in session.get_inputs()},
        "outputs": {value.name: value.shape for value in session.get_outputs()},
    }
    (folder / SIGNATURE).write_text(json.dumps(signature), encoding="utf-8")
    inputs = load_file(folder / INPUTS)
    feeds = {
        f"{start}.{stop}": {name: np.ascontiguousarray(inputs[name][start:stop]) for name in signature["inputs"]}
        for start, stop in job["batches"]
    }
    answers: dict[str, np.ndarray] = {}

    def answer(batch: str, session: Any, feed: dict[str, np.ndarray]) -> None:
        for name, array in zip(signature["outputs"], session.run(list(signature["outputs"]), feed), strict=True):
            answers[f"{name}.{batch}"] = np.ascontiguousarray(array)

    for batch, feed in feeds.items():
        answer(batch, session, feed)
    for batch, fields in job["further"].items():
        constants, feed = ({name: inputs[f"{batch}.{name}"] for name in fields[key]} for key in ("constants", "inputs"))
        answer(batch, _session(job, constants) if constants else session, feed)
    write_tensors(answers, folder / OUTPUTS, save_file)


def _session(job: dict[str, Any], constants: dict[str, np.ndarray]) -> Any:
    """Return a session of the job's graph, in which `constants` stand in for initializers of these names."""
    options = make_options(job["options"])
    for name, array in constants.items():
        value = ort.OrtValue.ortvalue_from_numpy(array)
        options.add_initializer(name, value)
        _kept.append(value)
    return ort.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    probe(Path(sys.argv[1]))
