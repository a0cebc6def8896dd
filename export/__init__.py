"""ONNX export of a defended CLIP, and what runs it without torch.

| file | what | needs |
|---|---|---|
| vision.py, text.py | the graphs | torch, onnxscript |
| verify.py | a graph's answers against torch's, in a process of its own | onnxruntime |
| bundle.py | a folder with a graph and everything it takes to use it | |
| manifest.py | which values of it are accepted | |
| runtime.py | `OnnxClassifier`: the calls of `RobustClassifier` | onnxruntime |
"""
