"""SCAM: real triples, published similarities, and the form in which it is packed."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from defense.benchmarks import metrics
from defense.benchmarks.datasets import scam
from defense.errors import ConfigError, NonFiniteError

from .datasets_made import PARTIAL, read

# Of 1,162 pictures, in percent: without a note, with a post-it, with a drawn word. Models with one set of weights.
PUBLISHED = {
    "RN50": (97.76, 36.66, 22.46),
    "RN101": (97.93, 40.19, 26.25),
    "RN50x4": (98.19, 32.87, 26.33),
    "RN50x16": (98.80, 37.18, 34.25),
    "RN50x64": (98.97, 32.01, 31.76),
    "ViT-L-14-336": (99.23, 33.91, 26.51),
    "ViT-B-32-256": (98.54, 73.32, 60.76),
    "ViT-L-14-CLIPA": (99.48, 72.63, 63.60),
    "ViT-L-14-CLIPA-336": (99.57, 74.78, 65.83),
    "ViT-H-14-CLIPA": (99.66, 64.72, 57.06),
    "ViT-bigG-14-CLIPA": (99.66, 68.07, 59.38),
    "ViT-bigG-14-CLIPA-336": (99.74, 64.03, 56.71),
    "roberta-ViT-B-32": (97.68, 75.47, 57.49),
    "xlm-roberta-base-ViT-B-32": (98.62, 76.85, 59.04),
    "xlm-roberta-large-ViT-H-14": (99.23, 63.77, 47.93),
    "nllb-clip-base": (94.66, 76.68, 61.70),
    "nllb-clip-large": (97.50, 61.45, 48.62),
    "convnext_base": (98.54, 59.12, 40.45),
    "convnext_large_d": (99.40, 67.21, 54.82),
    "ViT-B-16-SigLIP": (99.23, 81.41, 75.47),
    "ViT-B-16-SigLIP-256": (99.31, 80.98, 75.99),
    "ViT-B-16-SigLIP-384": (99.48, 84.25, 80.46),
    "ViT-B-16-SigLIP-512": (99.66, 85.71, 81.15),
    "ViT-B-16-SigLIP-i18n-256": (99.40, 89.67, 85.71),
    "ViT-L-16-SigLIP-256": (99.57, 86.49, 80.12),
    "ViT-L-16-SigLIP-384": (99.66, 87.26, 81.67),
    "ViT-SO400M-14-SigLIP": (99.74, 84.08, 82.19),
    "ViT-SO400M-14-SigLIP-378": (99.66, 85.63, 85.03),
    "ViT-SO400M-14-SigLIP-384": (99.66, 85.46, 84.60),
    "ViT-SO400M-16-SigLIP-i18n-256": (99.74, 88.90, 83.99),
}


def test_published_scam_accuracies_follow_from_the_published_similarities(shared_data):
    similarities = scam.read_similarities(shared_data / "scam")
    n = scam.N_TRIPLES
    for model, percents in PUBLISHED.items():
        found = []
        for variant in scam.VARIANTS.values():
            to_object, to_word = similarities.of(model, variant)
            pair = np.zeros(n, int), np.ones(n, int), np.full(n, -1)
            answers = metrics.answers_of(np.stack([to_object, to_word], 1), *pair, is_pair=True)
            assert len(answers.label) == n
            found.append(round(100 * answers.is_correct.mean(), 2))
        assert tuple(found) == percents, model


def test_similarities_are_looked_up_by_name(shared_data):
    """The metadata list models in another order than columns."""
    meta = json.loads((shared_data / "scam" / "vlm_similarity_metadata.json").read_text())
    similarities = scam.read_similarities(shared_data / "scam")
    assert meta["columns"][0] != f"{meta['models'][0]}_object_similarities"
    first = meta["columns"][0].removesuffix("_object_similarities")
    raw = np.fromfile(shared_data / "scam" / "vlm_similarity_data.bin", "<f4", offset=8).reshape(3486, 88)
    np.testing.assert_array_equal(similarities.of(first, "post-it")[0], raw[0::3, 0])
    np.testing.assert_array_equal(similarities.of(first, "clean")[1], raw[1::3, 1])
    with pytest.raises(ConfigError, match="no similarities of 'ViT-Z'"):
        similarities.of("ViT-Z", "clean")


@pytest.fixture
def similarity_folder(tmp_path):
    """Two triples and two models, in the layout of the project page."""
    columns = ["b_object_similarities", "b_attack_similarities", "a_object_similarities", "a_attack_similarities"]
    meta = {"columns": columns, "models": ["a", "b"], "num_rows": 6, "num_columns": 4}
    index = [
        {
            "image_id": f"SCAM_img_{i + 1:04}",
            "object_label": "cup",
            "attack_word": "car",
            "variants": {kind: {"row_index": 3 * i + j} for j, kind in enumerate(("SCAM", "NoSCAM", "SynthSCAM"))},
        }
        for i in range(2)
    ]
    (tmp_path / "vlm_similarity_metadata.json").write_text(json.dumps(meta))
    (tmp_path / "vlm_similarity_index.json").write_text(json.dumps(index))
    values = np.arange(1, 25, dtype="<f4")
    (tmp_path / "vlm_similarity_data.bin").write_bytes(struct.pack("<II", 6, 4) + values.tobytes())
    return tmp_path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "it was cut"),
        (lambda data: data[:4], "it was cut"),
        (lambda data: struct.pack("<II", 4, 6) + data[8:], "it was cut"),
        (lambda data: data[:8] + bytes(4) + data[12:], "exact zeros"),
    ],
    ids=["truncated", "empty", "header", "zero"],
)
def test_damaged_similarities_are_refused(similarity_folder, damage, message):
    assert scam.read_similarities(similarity_folder).of("a", "clean")[0].tolist() == [7, 19]
    path = similarity_folder / "vlm_similarity_data.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=message):
        scam.read_similarities(similarity_folder)


def test_similarities_that_are_not_finite_are_refused(similarity_folder):
    path = similarity_folder / "vlm_similarity_data.bin"
    path.write_bytes(path.read_bytes()[:8] + struct.pack("<f", float("nan")) + path.read_bytes()[12:])
    with pytest.raises(NonFiniteError):
        scam.read_similarities(similarity_folder)


def test_real_scam_triples(shared_data):
    with pytest.raises(ConfigError, match="12 of 1,162 triples"):
        read("scam", shared_data / "scam")
    tests = read("scam", shared_data / "scam", PARTIAL).tests
    assert [d.variant for d in tests] == ["clean", "post-it", "synthetic"]
    assert [d.is_attacked for d in tests] == [False, True, True]
    for dataset in tests:
        assert len(dataset.examples) == 12
        assert dataset.choice == "pair"
        assert not dataset.normalize_each
        assert [e.key for e in dataset.examples] == [f"{n:04}" for n in range(1, 121, 10)]
        first = dataset.examples[0]
        assert (dataset.class_names[first.label], dataset.class_names[first.word]) == ("ball", "car")
        assert first.picture.load().size == (384, 384)
    assert len({e.examples[0].picture.digest() for e in tests}) == 3


def test_scam_has_its_32_templates():
    assert len(scam.TEMPLATES_32) == 32
    assert scam.TEMPLATES_32[0] == "a bad photo of a {}."
    assert scam.TEMPLATES_32[-1] == "a blurry photo of the {}."


def scam_rows() -> list[dict[str, str]]:
    rows = []
    for kind in ("SCAM", "NoSCAM", "SynthSCAM"):
        for number, label in (("0001", "tea pot, blue"), ("0002", "pan")):
            name = f"{kind}_img_{number}"
            rows.append(
                {"file_name": f"{name}.png", "type": kind, "id": name, "object_label": label, "attack_word": "car"}
            )
    return rows


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_scam_as_hugging_face_packs_it(tmp_path, form):
    rows = scam_rows()
    if form == "csv":
        lines = ["type,file_name,id,postit_area_pct,attack_word,object_label"]
        lines += [f'{r["type"]},{r["file_name"]},{r["id"]},1.5,{r["attack_word"]},"{r["object_label"]}"' for r in rows]
    else:
        lines = [json.dumps(row) for row in rows]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"metadata.{form}").write_bytes("\r\n".join(lines).encode())
    tests = read("scam", tmp_path, PARTIAL).tests
    assert tests[0].class_names == ("car", "pan", "tea pot, blue")
    for kind, dataset in zip(scam.VARIANTS, tests, strict=True):
        assert [e.picture.path.name for e in dataset.examples] == [f"{kind}_img_0001.png", f"{kind}_img_0002.png"]


def test_scam_compares_only_whole_triples(tmp_path):
    rows = [row for row in scam_rows() if row["id"] != "NoSCAM_img_0002"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for dataset in read("scam", tmp_path, PARTIAL).tests:
        assert [e.key for e in dataset.examples] == ["0001"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Scam"}, "id 'SCAM_img_0001' with type 'Scam'"),
        ({"id": "SCAM_img_0002"}, "SCAM_img_0002 is there twice"),
        ({"file_name": "/etc/passwd"}, "inside of"),
    ],
    ids=["type", "twice", "path"],
)
def test_scam_rows_that_cannot_be_right_are_refused(tmp_path, change, message):
    rows = scam_rows()
    rows[0] |= change
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ConfigError, match=message):
        read("scam", tmp_path, PARTIAL)
