"""What a bundle says of itself to people: its README.md and LICENCES.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defense.errors import wheel_name
from defense.export.layouts import Layout
from defense.hosts.shipped import find_model

_SHOWN_LABELS = 10


def render(fields: Mapping[str, Any], layout: Layout, folder: Path) -> str:
    """Return the text of README.md, whose code runs in the bundle's folder.

    Args:
        fields: What the bundle's manifest says, but for the hashes of its files.
        layout: See `layouts`.
        folder: The bundle, in which the graphs are in place: their size is stated.
    """
    parity, labels = fields["parity"], fields["labels"]
    size = sum(path.stat().st_size for path in folder.rglob("*.onnx*")) / 2**20
    shown = ", ".join(labels[:_SHOWN_LABELS]) + (", ..." if len(labels) > _SHOWN_LABELS else "")
    return f"""# {_title(fields)}

Written by clip-defense. {_what_is_removed(fields)}

| | |
|---|---|
| CLIP | {_host(fields)} |
| labels | {len(labels)}: {shown} |
| graph | {fields["mode"]}, {fields["dtype"]}, {size:.1f} MiB |
| against PyTorch | {parity["rows"]} pictures, batches of {", ".join(map(str, parity["batches"]))}: \
largest difference {parity["max_abs_diff"]:.1e}, smallest cosine {parity["cosine"]:.6f}, \
same label {100 * parity["agreement"]:.1f} % |
{_eight_bits(fields)}
## With clip-defense, without torch

No package index has clip-defense: take its wheel, `pip install "{wheel_name()}[onnx]"`, or its sources,
`pip install -e ".[onnx]"` in the checkout. Then:

```python
from defense.export.runtime import OnnxClassifier

clf = OnnxClassifier(".")
print(clf("picture.jpg", top_k=3))
```

{_open_vocabulary(fields)}
`defense info .` checks every byte of this folder and that the graph still answers as it did.

{_with_onnxruntime(fields, must_feed=layout in ("triton", "kserve"))}
{_server(fields, layout)}"""


def _with_onnxruntime(fields: Mapping[str, Any], *, must_feed: bool) -> str:
    """Return the section for whoever has no clip-defense installed.

    Args:
        fields: See `render`.
        must_feed: Whether the graph's strength has no default.
    """
    strength = ', "strength": np.ones(1, np.float32)' if fields["defense"] and must_feed else ""
    preprocess = fields["preprocess"]
    height, width = preprocess["size"]
    return f"""## With ONNX Runtime alone

`pixel_values` is float32 [batch, 3, {height}, {width}]: an upright RGB picture, {_resize(preprocess)}, divided by 255,
minus the mean, over the standard deviation. `logits_per_image` is [batch, n_labels].

```python
import json
import os
import numpy as np
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: otherwise ONNX Runtime 1.29 and newer phones home
import onnxruntime
from PIL import Image

manifest = json.load(open("manifest.json", encoding="utf-8"))
session = onnxruntime.InferenceSession(manifest["model"], providers=["CPUExecutionProvider"])
picture = Image.open("picture.jpg").convert("RGB").resize(({width}, {height}), Image.Resampling.{_filter(preprocess)})
mean, std = (np.array(manifest["preprocess"][key], np.float32) for key in ("mean", "std"))
pixel_values = ((np.asarray(picture, np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]
feed = {{"pixel_values": pixel_values{strength}}}
image_embeds, logits = session.run(["image_embeds", "logits_per_image"], feed)
print(manifest["labels"][int(logits[0].argmax())])
```

This shortens the preparation to a plain resize; `OnnxClassifier` does all of it. Other labels: feed their normalized
embeddings as `text_embeds` [n_labels, {fields["d_embed"]}].{_strength(fields, must_feed=must_feed)}"""


def _strength(fields: Mapping[str, Any], *, must_feed: bool) -> str:
    """Return how the defense is switched off; nothing where there is none."""
    if not fields["defense"]:
        return ""
    default = "" if must_feed else ", and so it is where none is fed"
    return f"""

`strength`, float32 [1] or [batch], is how much the defense removes: 1 is all of it{default}, 0 is the CLIP without its
defense, for a rollback or a shadow run. At 0 the embeddings differed by {fields["parity"]["plain_diff"]:.1e} from
PyTorch's without a defense. `OnnxClassifier(".", strength=0)`, or `clf.with_strength(0)` beside `clf`, in the same
session."""


def _server(fields: Mapping[str, Any], layout: Layout) -> str:
    """Return the section on the files that a layout adds."""
    if layout == "bundle":
        return """
## In a container

The Dockerfile says how to build an image without torch, and how to run it: as nobody, read-only, without a network.
"""
    return _triton(fields, layout) + (_KSERVE if layout == "kserve" else _PICTURES)


_KSERVE = """
On KServe: put `model_repository` where `storageUri` in `inference-service.yaml` points, then
`kubectl apply -f inference-service.yaml`. Without Triton: install clip-defense with the extra `kserve` in place of
`onnx`, then `python -m defense.export.kserve .`, or an image by the Dockerfile; it takes pictures as files, too.
"""
_PICTURES = """
`--model-repository=picture_repository` besides serves `clip_defense_pictures`, which takes pictures as files in the
input `picture` [n, 1], and answers `label`, `score`, `scores` and `error`, row by row. Its models run in Triton's
Python backend, whose Python, the first `python3` in PATH, needs what `requirements.txt` says; they find this folder
around them.
"""


def _triton(fields: Mapping[str, Any], layout: Layout) -> str:
    """Return the section on Triton, with a client for pixel_values."""
    height, width = fields["preprocess"]["size"]
    needs = (
        " It runs in Triton's Python backend, whose Python, the first `python3` in PATH, needs what "
        "`requirements.txt` says."
        if layout == "triton-python"
        else ""
    )
    strength = ""
    if fields["defense"]:
        strength = """
strength = http.InferInput("strength", [1, 1], "FP32")  # 0 is plain CLIP; 1 where it is left out
strength.set_data_from_numpy(np.ones((1, 1), np.float32))"""
    inputs = "[request, strength]" if strength else "[request]"
    return f"""
## With NVIDIA Triton

`ORT_DISABLE_TELEMETRY=1 tritonserver --model-repository=model_repository` serves `clip_defense`.{needs} The client
prepares pictures, e.g. with this bundle and `pip install "tritonclient[http]"`:

```py
import numpy as np
import tritonclient.http as http
from defense.data import images
from defense.export import bundle

here = bundle.load(".")
pixel_values = here.preprocess(images.decode("picture.jpg").image)[None]  # [1, 3, {height}, {width}]
request = http.InferInput("pixel_values", pixel_values.shape, "FP32")
request.set_data_from_numpy(pixel_values){strength}
answer = http.InferenceServerClient("localhost:8000").infer("clip_defense", {inputs})
print(here.prompts.labels[int(answer.as_numpy("logits_per_image")[0].argmax())])
```
"""


def _eight_bits(fields: Mapping[str, Any]) -> str:
    """Return what to know of int8; nothing for another dtype."""
    if fields["dtype"] != "int8":
        return ""
    return """
The inputs of int8 layers are rounded by the range they have in a batch: the same picture in another batch may get
slightly other numbers, and close to a tie another label. Send pictures one by one where that must not be.
"""


def _title(fields: Mapping[str, Any]) -> str:
    return "A defended CLIP in ONNX" if fields["defense"] else "A CLIP in ONNX"


def _host(fields: Mapping[str, Any]) -> str:
    clip = fields["host"]
    name = " ".join(filter(None, (clip.get("model"), clip.get("pretrained")))) or "unnamed"
    return f"{name}, weights {clip['sha256'][:16]}"


def _what_is_removed(fields: Mapping[str, Any]) -> str:
    """Return one sentence on the defense inside."""
    if not fields["defense"]:
        return "There is no defense inside."
    parts = [
        f"{each['latents']} latents of the set `{each['name']}` ({each['edit']}, {each['scope']} tokens) at "
        f"`{site['hook_point']}`"
        for site in fields["defense"]["sites"]
        for each in site["sets"]
    ]
    return f"Suppressed inside: {'; '.join(parts)}."


def _open_vocabulary(fields: Mapping[str, Any]) -> str:
    """Return how other labels are chosen than those that are baked in."""
    if fields["text_model"] is None:
        return (
            "Some of its labels: `clf(picture, candidate_labels=[...])`. Embeddings of others, from the same CLIP, go "
            "to `clf.set_label_embeds(labels, text_embeds)`.\n"
        )
    return "Other labels: `clf.set_labels([...])`, or `clf(picture, candidate_labels=[...])`.\n"


def _filter(preprocess: Mapping[str, Any]) -> str:
    return str(preprocess["interpolation"]).upper()


def _resize(preprocess: Mapping[str, Any]) -> str:
    """Return in words how a picture is brought to the frame's size."""
    how = {"shortest": "cropped at its longer side", "longest": "padded at its shorter side", "squash": "stretched"}
    return f"resized ({preprocess['interpolation']}) and {how[preprocess['resize_mode']]} to the frame"


def licenses(fields: Mapping[str, Any]) -> str:
    """Return the text of LICENCES.md: what is known of the license of each part."""
    own = find_model(fields["host"].get("model"))
    return f"""# Licenses

- clip-defense, whose formula is in the graph: MIT.
- The defense: {fields["licence"]}.
- The CLIP's weights, {_host(fields)}: {"as their publisher says" if own is None else own.license}.
"""
