"""Run a graph in ONNX Runtime and write down what it does: `python -m defense.export.probe FOLDER`.

A graph can end the process that loads it, so this is always a process of its own. It reads job.json and
inputs.safetensors in FOLDER, and leaves signature.json and outputs.safetensors there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from safetensors.numpy import load_file, save_file

from defense.export.sessions import make_options

JOB, INPUTS, SIGNATURE, OUTPUTS = "job.json", "inputs.safetensors", "signature.json", "outputs.safetensors"


def probe(folder: Path) -> None:
    """Check the graph of a job, run it on every batch of the job and record its signature and answers."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    onnx.checker.check_model(job["model"], full_check=True)
    session = ort.InferenceSession(job["model"], make_options(job["options"]), providers=["CPUExecutionProvider"])
    signature = {
        "inputs": {value.name: value.shape for value in session.get_inputs()},
        "outputs": {value.name: value.shape for value in session.get_outputs()},
    }
    (folder / SIGNATURE).write_text(json.dumps(signature), encoding="utf-8")
    inputs = load_file(folder / INPUTS)
    names = list(signature["outputs"])
    answers: dict[str, np.ndarray] = {}
    for start, stop in job["batches"]:
        feed = {name: np.ascontiguousarray(rows[start:stop]) for name, rows in inputs.items()}
        for name, array in zip(names, session.run(names, feed), strict=True):
            answers[f"{name}.{start}.{stop}"] = np.ascontiguousarray(array)
    save_file(answers, folder / OUTPUTS)


if __name__ == "__main__":
    probe(Path(sys.argv[1]))
