"""Readers of the benchmark data: real files give the right answer or the right refusal, and so do made-up ones."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from defense.benchmarks import metrics
from defense.benchmarks.datasets import (
    READERS,
    SUITES,
    Dataset,
    Example,
    File,
    Options,
    celeba,
    named,
    read_tasks,
    scam,
    synthetic,
    waterbirds,
)
from defense.benchmarks.datasets import folders as classified
from defense.benchmarks.datasets.files import read_rows, read_text
from defense.errors import ConfigError, InvalidImageError, NonFiniteError

PARTIAL = Options(allow_partial=True)


def png(value: int = 128, size: tuple[int, int] = (40, 30)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 7)).save(stream, "PNG")
    return stream.getvalue()


def read(name: str, folder: Path, options: Options = Options()):  # noqa: B008  # frozen
    return READERS[name].read(folder, options)


# --- pictures named label=..._text=... --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        ("label=hair dryer_text=light bulb.jpg", ("hair dryer", "light bulb")),
        ("label=iPhone_text=DVD.JPG", ("iPhone", "DVD")),
        ("label=laptop_text=TV.jpeg", ("laptop", "TV")),
        ("label=a_b=c_text=d_e.png", ("a_b=c", "d_e")),
        ("label=v1.5_text=2.0.png", ("v1.5", "2.0")),
    ],
    ids=["spaces", "capitals", "jpeg", "underscores", "dots"],
)
def test_names_are_parsed_as_they_are_spelled(name, pair):
    assert named.parse(Path(name)) == pair


@pytest.mark.parametrize("name", ["label=cat.jpg", "cat_text=dog.jpg", "label=cat_text=dog.txt", "label=_text=x.png"])
def test_other_names_are_refused(name):
    with pytest.raises(ConfigError, match="is not named"):
        named.parse(Path(name))


@pytest.fixture
def named_folder(tmp_path):
    """Pictures of three classes in a nested folder with a space, beside what unzipping leaves behind."""
    home = tmp_path / "set" / "ours" / "my data"
    home.mkdir(parents=True)
    for label, word in (("cat", "dog"), ("dog", "red fox"), ("red fox", "cat")):
        (home / f"label={label}_text={word}.png").write_bytes(png())
    for junk in (".DS_Store", "._label=cat_text=dog.png", "Thumbs.db"):
        (home / junk).write_bytes(b"junk")
    (home / "__MACOSX").mkdir()
    (home / "__MACOSX" / "label=cat_text=dog.png").write_bytes(b"junk")
    return tmp_path / "set"


def test_a_partial_set_is_refused_or_says_so(named_folder):
    with pytest.raises(ConfigError, match="3 of 1,000 pictures; 3 of 100 classes"):
        read("rta100", named_folder)
    (dataset,) = read("rta100", named_folder, PARTIAL).tests
    assert dataset.shortfall == "3 of 1,000 pictures; 3 of 100 classes"
    assert dataset.class_names == ("cat", "dog", "red fox")
    assert [(e.key, e.label, e.word) for e in dataset.examples] == [
        ("label=cat_text=dog.png", 0, 1),
        ("label=dog_text=red fox.png", 1, 2),
        ("label=red fox_text=cat.png", 2, 0),
    ]


def test_the_whole_set_has_no_shortfall(tmp_path):
    names = [f"thing {i:02}" for i in range(100)]
    for i, label in enumerate(names):
        for step in range(1, 11):
            (tmp_path / f"label={label}_text={names[(i + step) % 100]}.jpg").touch()
    (dataset,) = read("rta100", tmp_path).tests
    assert dataset.shortfall is None
    assert len(dataset.examples) == 1000
    assert dataset.class_names == tuple(names)


def test_a_stranger_between_the_pictures_is_an_error_that_names_it(named_folder):
    (named_folder / "ours" / "my data" / "readme.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"readme\.txt is not named"):
        read("rta100", named_folder, PARTIAL)


def test_pictures_in_two_folders_are_refused(named_folder):
    (named_folder / "label=cat_text=cow.png").write_bytes(png())
    with pytest.raises(ConfigError, match="2 folders with pictures"):
        read("rta100", named_folder, PARTIAL)


def test_a_class_with_and_without_spaces_is_refused(named_folder):
    (named_folder / "ours" / "my data" / "label=cat _text=dog.png").write_bytes(png())
    with pytest.raises(ConfigError, match="with and without spaces"):
        read("rta100", named_folder, PARTIAL)


def test_a_word_that_equals_the_label_is_refused(named_folder):
    (named_folder / "ours" / "my data" / "label=cat_text=cat.png").write_bytes(png())
    with pytest.raises(ConfigError, match="'cat' written on itself"):
        read("rta100", named_folder, PARTIAL)


def test_a_missing_set_says_where_to_get_it(tmp_path):
    with pytest.raises(ConfigError, match=r"RTA-100 is not at .*Defense-Prefix"):
        read("rta100", tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"no pictures named .*Defense-Prefix"):
        read("rta100", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><title>Quota exceeded</title>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n", r"12,345 bytes.*git lfs pull"),
        (b"PK\x03\x04", "unpack it"),
    ],
    ids=["web-page", "lfs", "zip"],
)
def test_a_file_in_place_of_the_folder_is_told_for_what_it_is(tmp_path, content, message):
    (tmp_path / "rta100.zip").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read("rta100", tmp_path / "rta100.zip")


def test_real_rta100(shared_data):
    with pytest.raises(ConfigError, match="100 of 1,000 pictures"):
        read("rta100", shared_data / "rta100")
    (dataset,) = read("rta100", shared_data / "rta100", PARTIAL).tests
    assert dataset.shortfall == "100 of 1,000 pictures"  # the sample has all 100 classes
    assert len(dataset.class_names) == 100
    assert {"iPad", "DVD", "light bulb"} <= set(dataset.class_names)
    assert all(e.picture.load().size == (512, 512) for e in dataset.examples[:5])


def test_real_paint(shared_data):
    (dataset,) = read("paint", shared_data / "paint", PARTIAL).tests
    assert dataset.shortfall == "32 of 110 pictures; 53 of 159 classes"
    assert "TV" in dataset.class_names
    assert not [name for name in dataset.class_names if name.endswith(".")]  # the reference loader's "TV."
    pairs = {(dataset.class_names[e.label], dataset.class_names[e.word]) for e in dataset.examples}
    assert {("apple", "ipod"), ("iphone", "apple"), ("water bottle", "pencil")} <= pairs
    assert {e.picture.load().mode for e in dataset.examples} == {"RGB"}


# --- Disentangling ----------------------------------------------------------------------------------------------------


@pytest.fixture
def disentangling_folder(tmp_path):
    folder = tmp_path / "typographic_attack_dataset"
    (folder / "images").mkdir(parents=True)
    (folder / "classes.json").write_text(json.dumps({"cup": 0, "apple": 1, "good": 2}))
    annotations = {
        f"IMG_{i}.JPG": {"true object": label, "typographic attack label": word}
        for i, (label, word) in enumerate([("cup", "good"), ("apple", "cup"), ("apple", "unknown word")])
    }
    (folder / "annotations.json").write_text(json.dumps(annotations))
    return folder


def test_disentangling_keeps_the_order_of_classes(disentangling_folder):
    with pytest.raises(ConfigError, match="3 of 180 pictures"):
        read("disentangling", disentangling_folder.parent)
    (dataset,) = read("disentangling", disentangling_folder.parent, PARTIAL).tests
    assert dataset.class_names == ("cup", "apple", "good")
    assert dataset.templates == ("a photo of {}.",)
    assert [(e.label, e.word) for e in dataset.examples] == [(0, 2), (1, 0), (1, None)]
    (disentangling_folder / "annotations.json").rename(disentangling_folder / "annotation.json")
    assert read("disentangling", disentangling_folder, PARTIAL).tests[0] == dataset


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ({"a.jpg": {"true object": "spoon", "typographic attack label": "good"}}, "'spoon'"),
        ({"a.jpg": {"label": "cup"}}, "true object"),
        ({"../a.jpg": {"true object": "cup", "typographic attack label": "good"}}, "inside"),
        (["a.jpg"], "no object"),
    ],
    ids=["label", "keys", "path", "list"],
)
def test_disentangling_refuses_what_it_cannot_read(disentangling_folder, annotations, message):
    (disentangling_folder / "annotations.json").write_text(json.dumps(annotations))
    with pytest.raises(ConfigError, match=message):
        read("disentangling", disentangling_folder, PARTIAL)


# --- SCAM -------------------------------------------------------------------------------------------------------------

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


# --- Waterbirds -------------------------------------------------------------------------------------------------------

HEADER = "img_id,img_filename,y,split,place,place_filename"


def waterbird_lines(counts: dict[int, tuple[int, int, int, int]]) -> list[str]:
    """Rows with the given number of pictures: split -> groups."""
    lines, index = [HEADER], 0
    for split, groups in counts.items():
        for group, count in enumerate(groups):
            for _ in range(count):
                index += 1
                lines.append(f"{index},001.Bird/Bird_{index}.jpg,{group // 2},{split},{group % 2},/b/x.jpg")
    return lines


SMALL = {0: (4, 1, 1, 3), 1: (1, 1, 1, 1), 2: (2, 3, 1, 2)}


def write_waterbirds(folder: Path, lines: list[str], end: str = "\n") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metadata.csv").write_bytes(end.join(lines).encode())
    return folder


def test_the_published_waterbirds_have_no_shortfall(tmp_path):
    counts = {0: waterbirds.TRAIN_COUNTS, 1: (467, 466, 133, 133), 2: waterbirds.TEST_COUNTS}
    task = read("waterbirds", write_waterbirds(tmp_path, waterbird_lines(counts)))
    (test,) = task.tests
    assert test.shortfall is None
    assert len(test.examples) == 5794
    assert test.group_counts() == (2255, 2255, 642, 642)
    assert test.train_counts == (3498, 184, 56, 1057)
    assert task.train is not None
    assert task.train.group_counts() == test.train_counts
    assert task.val is not None
    assert len(task.val.examples) == 1199


def test_one_row_more_is_not_waterbirds(tmp_path):
    counts = {0: waterbirds.TRAIN_COUNTS, 1: (467, 466, 133, 133), 2: (2255, 2255, 642, 643)}
    with pytest.raises(ConfigError, match=r"test groups of \(2255, 2255, 642, 643\)"):
        read("waterbirds", write_waterbirds(tmp_path, waterbird_lines(counts)))


def test_waterbirds_groups_and_pictures(tmp_path):
    (test,) = read("waterbirds", write_waterbirds(tmp_path, waterbird_lines(SMALL)), PARTIAL).tests
    assert test.class_names == ("landbird", "waterbird")
    assert test.group_counts() == (2, 3, 1, 2)
    assert test.group_names[1] == "landbird on water"
    third = test.examples[2]
    assert (third.label, third.attribute, third.group, third.word) == (0, 1, 1, None)
    assert third.picture == File(tmp_path / "001.Bird" / "Bird_16.jpg")
    assert not test.is_attacked


@pytest.mark.parametrize(("end", "head"), [("\r\n", ""), ("\n", "\ufeff"), ("\r\n", "\ufeff")])
def test_line_ends_and_byte_order_marks_change_nothing(tmp_path, end, head):
    lines = [line.partition(",")[2] for line in waterbird_lines(SMALL)]  # a column that matters comes first
    plain = waterbirds.read_metadata(write_waterbirds(tmp_path / "a", lines) / "metadata.csv")
    other = waterbirds.read_metadata(
        write_waterbirds(tmp_path / "b", [head + lines[0], *lines[1:]], end) / "metadata.csv"
    )
    assert plain == other


def test_columns_are_read_by_name(tmp_path):
    lines = waterbird_lines(SMALL)
    plain = waterbirds.read_metadata(write_waterbirds(tmp_path / "a", lines) / "metadata.csv")
    turned = [",".join(["extra", *reversed(line.split(","))]) for line in lines]
    assert waterbirds.read_metadata(write_waterbirds(tmp_path / "b", turned) / "metadata.csv") == plain


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,a.jpg,2,0,0,x", r"line 2: y is '2'"),
        ("1,a.jpg,0,3,0,x", r"line 2: split is '3'"),
        ("1,a.jpg,0,0,land,x", r"line 2: place is 'land'"),
        ("1,a.jpg,0,0", "line 2: 4 cells; want 6"),
        ("1,a.jpg,0,0,0,x,y", "line 2: 7 cells; want 6"),
        ("1,/etc/passwd,0,2,0,x", "inside of"),
        ("1,../a.jpg,0,2,0,x", "inside of"),
        ("1,C:\\a.jpg,0,2,0,x", "inside of"),
        ("9,001.Bird/Bird_1.jpg,0,2,0,x", r"Bird_1\.jpg' twice"),
    ],
)
def test_waterbirds_rows_that_cannot_be_right_are_refused(tmp_path, row, message):
    head, *rest = waterbird_lines(SMALL)
    with pytest.raises(ConfigError, match=message):
        read("waterbirds", write_waterbirds(tmp_path, [head, row, *rest]), PARTIAL)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({**SMALL, 2: (2, 3, 0, 2)}, "'waterbird on land' is empty"),
        ({**SMALL, 2: (0, 0, 0, 0)}, "waterbirds-test holds no pictures"),
        ({**SMALL, 0: (0, 0, 0, 0)}, "waterbirds-train holds no pictures"),
    ],
    ids=["group", "test", "train"],
)
def test_an_empty_group_or_split_is_refused_by_name(tmp_path, counts, message):
    with pytest.raises(ConfigError, match=message):
        read("waterbirds", write_waterbirds(tmp_path, waterbird_lines(counts)), PARTIAL)


def test_a_missing_column_is_named(tmp_path):
    lines = [line.rpartition(",")[0].rpartition(",")[0] for line in waterbird_lines(SMALL)]
    with pytest.raises(ConfigError, match=r"\['place'\] are missing"):
        read("waterbirds", write_waterbirds(tmp_path, lines), PARTIAL)


def test_the_real_variant_is_not_waterbirds(shared_data, tmp_path):
    (tmp_path / "metadata.csv").write_bytes((shared_data / "waterbirds" / "metadata-variant.csv").read_bytes())
    with pytest.raises(ConfigError, match=r"not the published Waterbirds: train groups of \(2054, 109, 105, 1992\)"):
        read("waterbirds", tmp_path)
    task = read("waterbirds", tmp_path, PARTIAL)
    assert task.tests[0].group_counts() == (123, 124, 144, 143)
    assert task.tests[0].train_counts == (2054, 109, 105, 1992)
    assert task.val is not None
    assert task.val.group_counts() == (126, 127, 140, 139)
    assert "test groups of (123, 124, 144, 143)" in task.tests[0].shortfall


def test_published_test_counts_are_those_of_the_official_labels(shared_data):
    labels = np.load(shared_data / "waterbirds" / "test_labels_y_place.npy")[..., 0]
    assert tuple(np.bincount(2 * labels[:, 0] + labels[:, 1])) == waterbirds.TEST_COUNTS


# --- CelebA -----------------------------------------------------------------------------------------------------------


def celeba_tables(
    folder: Path, rows: list[tuple[str, int, int, int]], *, kaggle: bool = False, stated: int | None = None
):
    """Write both tables for rows of (name, blond, male, split), and an empty folder for the pictures."""
    (folder / "img_align_celeba").mkdir(parents=True, exist_ok=True)

    def values(blond: int, male: int) -> list[str]:
        held = {"Blond_Hair": blond, "Male": male, "Young": 1}
        return [str(1 if held.get(name) else -1) for name in celeba.ATTRIBUTES]

    if kaggle:
        lines = [",".join(["image_id", *celeba.ATTRIBUTES])]
        lines += [",".join([name, *values(blond, male)]) for name, blond, male, _ in rows]
        (folder / "list_attr_celeba.csv").write_bytes("\r\n".join(lines).encode())
        lines = ["image_id,partition", *(f"{name},{split}" for name, _, _, split in rows)]
        (folder / "list_eval_partition.csv").write_bytes("\r\n".join(lines).encode())
    else:
        lines = [str(len(rows) if stated is None else stated), " ".join(celeba.ATTRIBUTES) + " "]
        lines += [name + "".join(f"{value:>3}" for value in values(blond, male)) for name, blond, male, _ in rows]
        (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
        lines = [f"{name} {split}" for name, _, _, split in rows]
        (folder / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")


ROWS = [
    (f"{1000 * split + 10 * group + i:06}.jpg", group // 2, group % 2, split)
    for split in range(3)
    for group, count in enumerate((3, 2, 2, 1))
    for i in range(count)
]


@pytest.mark.parametrize("kaggle", [False, True], ids=["txt", "csv"])
def test_celeba_groups_in_both_directions(tmp_path, kaggle):
    celeba_tables(tmp_path, ROWS, kaggle=kaggle)
    blond = read("celeba-blond", tmp_path, PARTIAL)
    male = read("celeba-male", tmp_path, PARTIAL)
    assert blond.tests[0].group_counts() == (3, 2, 2, 1)
    assert male.tests[0].group_counts() == (3, 2, 2, 1)  # groups 1 and 2 swap, and hold as many here
    assert blond.tests[0].group_names[1] == male.tests[0].group_names[2] == "dark-haired men"
    by_key = {e.key: e for e in male.tests[0].examples}
    for example in blond.tests[0].examples:
        twin = by_key[example.key]
        assert (example.label, example.attribute) == (twin.attribute, twin.label)
        assert blond.tests[0].group_names[example.group] == male.tests[0].group_names[twin.group]
    assert blond.tests[0].examples[0].picture == File(tmp_path / "img_align_celeba" / "002000.jpg")
    assert blond.tests[0].class_names == ("dark hair", "blond hair")
    assert blond.tests[0].facts["direction"] != male.tests[0].facts["direction"]


def test_celeba_tables_are_joined_by_name(tmp_path):
    celeba_tables(tmp_path, ROWS)
    expected = read("celeba-blond", tmp_path, PARTIAL).tests
    path = tmp_path / "list_eval_partition.txt"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert read("celeba-blond", tmp_path, PARTIAL).tests == expected


def test_celeba_in_two_folders_as_kaggle_packs_it(tmp_path):
    celeba_tables(tmp_path, ROWS)
    (tmp_path / "img_align_celeba" / "img_align_celeba").mkdir()
    path = read("celeba-blond", tmp_path, PARTIAL).tests[0].examples[0].picture.path
    assert path == tmp_path / "img_align_celeba" / "img_align_celeba" / "002000.jpg"


def test_celeba_without_the_folder_of_pictures_is_refused(tmp_path):
    celeba_tables(tmp_path, ROWS)
    (tmp_path / "img_align_celeba").rmdir()
    with pytest.raises(ConfigError, match="img_align_celeba, is not at"):
        read("celeba-blond", tmp_path, PARTIAL)


def test_a_lying_first_line_is_refused_with_both_numbers(tmp_path):
    celeba_tables(tmp_path, ROWS, stated=202_599)
    with pytest.raises(ConfigError, match="states 202599 rows and has 24"):
        read("celeba-blond", tmp_path)
    assert "states 202599 rows and has 24" in read("celeba-blond", tmp_path, PARTIAL).tests[0].shortfall


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("000001.jpg -1", "000001.jpg", r"line 4: 40 fields"),
        ("000001.jpg -1", "000001.jpg -1 -1", r"line 4: 42 fields"),
        ("000001.jpg -1", "000000.jpg -1", r"line 4: 000000.jpg is there twice"),
        ("000001.jpg -1", "000001.jpg  0", r"line 4: the value '0'"),
        ("000001.jpg -1", "../001.jpg -1", r"line 4: '../001.jpg'; want the name of a file"),
        ("000001.jpg -1", "000001.jpg  x", r"line 4: the value 'x'"),
        ("Blond_Hair", "Blonde_Hair", "want the 40 of CelebA"),
    ],
    ids=["short", "long", "twice", "mixed", "path", "value", "names"],
)
def test_celeba_attributes_that_cannot_be_right_are_refused(tmp_path, old, new, message):
    celeba_tables(tmp_path, ROWS)
    edited(tmp_path / "list_attr_celeba.txt", old, new)
    with pytest.raises(ConfigError, match=message):
        read("celeba-blond", tmp_path, PARTIAL)


def test_celeba_values_may_be_0_and_1_throughout(tmp_path):
    celeba_tables(tmp_path, ROWS, kaggle=True)
    expected, _ = celeba.read_attributes(tmp_path / "list_attr_celeba.csv")
    text = (tmp_path / "list_attr_celeba.csv").read_text().replace("-1", "0")
    (tmp_path / "list_attr_celeba.csv").write_text(text)
    assert celeba.read_attributes(tmp_path / "list_attr_celeba.csv")[0] == expected


def test_a_web_page_in_place_of_a_table_is_told(tmp_path):
    celeba_tables(tmp_path, ROWS)
    (tmp_path / "list_attr_celeba.txt").write_text("\n<!DOCTYPE html><title>Google Drive - Quota exceeded</title>")
    with pytest.raises(ConfigError, match="web page"):
        read("celeba-blond", tmp_path, PARTIAL)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("000001.jpg 0", "000001.jpg", "line 2: want a name"),
        ("000001.jpg 0", "000001.jpg 3", "line 2: the split is '3'"),
    ],
)
def test_celeba_splits_that_cannot_be_right_are_refused(tmp_path, old, new, message):
    celeba_tables(tmp_path, ROWS)
    edited(tmp_path / "list_eval_partition.txt", old, new)
    with pytest.raises(ConfigError, match=message):
        read("celeba-blond", tmp_path, PARTIAL)


def test_the_real_excerpt_of_attributes(shared_data):
    attributes, problems = celeba.read_attributes(shared_data / "celeba" / "list_attr_celeba.first20000.txt")
    assert problems == [
        "list_attr_celeba.first20000.txt states 202599 rows and has 20000",
        "20,000 of 202,599 rows of attributes",
    ]
    counts = {pair: list(attributes.values()).count(pair) for pair in set(attributes.values())}
    assert counts == {(0, 0): 8778, (0, 1): 8245, (1, 0): 2791, (1, 1): 186}


def test_the_real_partition(shared_data):
    splits = celeba.read_partition(shared_data / "celeba" / "list_eval_partition.csv")
    values = list(splits.values())
    assert [values.count(split) for split in ("train", "val", "test")] == [162_770, 19_867, 19_962]
    assert [sum(groups.values()) for groups in celeba.COUNTS.values()] == [162_770, 19_867, 19_962]
    assert splits["162771.jpg"] == "val"
    assert splits["182638.jpg"] == "test"


def test_the_real_excerpt_with_the_real_partition_is_refused(shared_data, tmp_path):
    source = shared_data / "celeba"
    (tmp_path / "img_align_celeba").mkdir()
    (tmp_path / "list_attr_celeba.txt").write_bytes((source / "list_attr_celeba.first20000.txt").read_bytes())
    (tmp_path / "list_eval_partition.csv").write_bytes((source / "list_eval_partition.csv").read_bytes())
    with pytest.raises(ConfigError, match=r"states 202599 rows and has 20000.*182,599 pictures in one of the two"):
        read("celeba-blond", tmp_path)
    with pytest.raises(ConfigError, match="holds no pictures"):  # the excerpt is all training pictures
        read("celeba-blond", tmp_path, PARTIAL)


@pytest.mark.slow
def test_the_published_celeba_has_no_shortfall(tmp_path):
    rows, index = [], 0
    for split, groups in enumerate(celeba.COUNTS.values()):
        for (blond, male), count in groups.items():
            for _ in range(count):
                index += 1
                rows.append((f"{index:06}.jpg", blond, male, split))
    celeba_tables(tmp_path, rows)
    (test,) = read("celeba-blond", tmp_path).tests
    assert test.shortfall is None
    assert test.group_counts() == (9767, 7535, 2480, 180)
    assert read("celeba-male", tmp_path).tests[0].group_counts() == (9767, 2480, 7535, 180)


# --- classified pictures, and words drawn on them ---------------------------------------------------------------------


@pytest.fixture
def image_folder(tmp_path):
    root = tmp_path / "pictures"
    for label, name in enumerate(("dog", "red_fox", "sheep")):
        (root / name).mkdir(parents=True)
        for i in range(2):
            (root / name / f"{i}.png").write_bytes(png(20 * label + i))
    return root


@pytest.fixture
def shard_folder(tmp_path, image_folder):
    """The same pictures as WebDataset shards."""
    root = tmp_path / "shards"
    (root / "test").mkdir(parents=True)
    files = sorted(image_folder.rglob("*.png"))
    for shard in range(2):
        with tarfile.open(root / "test" / f"{shard}.tar", "w") as tar:
            for i, path in enumerate(files[shard::2]):
                label = ("dog", "red_fox", "sheep").index(path.parent.name)
                for suffix, data in (("png", path.read_bytes()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{i:06}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (root / "test" / "nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("dog\nred fox\nsheep\n")
    return root


def test_folders_and_shards_hold_the_same(image_folder, shard_folder):
    a, b = classified.read_classified(image_folder), classified.read_classified(shard_folder)
    assert a.class_names == b.class_names == ("dog", "red fox", "sheep")
    assert sorted((p.digest(), label) for _, p, label in a.pictures) == sorted(
        (p.digest(), label) for _, p, label in b.pictures
    )
    for _, picture, _ in b.pictures:
        assert picture.load().size == (40, 30)


def test_templates_of_shards_are_read(shard_folder):
    (shard_folder / "zeroshot_classification_templates.txt").write_text("a {c}.\nthe {c} of it.\n")
    assert classified.read_classified(shard_folder).templates == ("a {}.", "the {} of it.")


def test_class_names_may_stand_in_a_file(image_folder):
    (image_folder / "classnames.txt").write_text("Hund\nFuchs\nSchaf\n")
    assert classified.read_classified(image_folder).class_names == ("Hund", "Fuchs", "Schaf")
    (image_folder / "classnames.txt").write_text("Hund\n\nSchaf\n")
    with pytest.raises(ConfigError, match="line 2 is blank"):
        classified.read_classified(image_folder)
    (image_folder / "classnames.txt").write_text("Hund\nFuchs\n")
    with pytest.raises(ConfigError, match="2 names for 3 folders"):
        classified.read_classified(image_folder)


def test_strangers_among_classified_pictures_are_refused(image_folder):
    (image_folder / "dog" / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"dog/notes\.txt"):
        classified.read_classified(image_folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "test" / "1.tar").write_bytes(b"<html>no</html>"), "web page"),
        (lambda root: (root / "test" / "1.tar").write_bytes(b"no tar at all"), "cannot be read as a shard"),
        (lambda root: (root / "test" / "1.tar").unlink(), "cannot be read as a shard"),
        (lambda root: (root / "classnames.txt").write_text("dog\nred fox\n"), "'2'; want one of 0, 1"),
        (lambda root: (root / "test" / "nshards.txt").write_text("many"), "'many'"),
    ],
    ids=["web-page", "no-tar", "missing", "label", "nshards"],
)
def test_damaged_shards_are_refused(shard_folder, damage, message):
    damage(shard_folder)
    with pytest.raises(ConfigError, match=message):
        classified.read_classified(shard_folder)


def test_a_picture_without_a_label_is_refused(shard_folder):
    with tarfile.open(shard_folder / "test" / "0.tar", "w") as tar:
        member = tarfile.TarInfo("x.png")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(ConfigError, match=r"without a .cls file"):
        classified.read_classified(shard_folder)


def test_drawn_words_have_clean_twins(image_folder):
    clean, attacked = read("synthetic", image_folder).tests
    assert (clean.variant, attacked.variant) == ("clean", "attacked")
    assert attacked.is_attacked
    assert not clean.is_attacked
    for plain, drawn in zip(clean.examples, attacked.examples, strict=True):
        assert (plain.key, plain.label, plain.word) == (drawn.key, drawn.label, None)
        before, after = np.asarray(plain.picture.load()), np.asarray(drawn.picture.load())
        assert before.shape == after.shape == (224, 224, 3)
        changed = (before != after).any(2)
        assert 0 < changed.mean() < 0.25
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert rows[0] > 0 or rows[-1] < 223  # it does not fill the picture
        assert columns[0] > 0 or columns[-1] < 223


def test_what_is_drawn_depends_on_seed_and_key_alone(image_folder):
    first = {e.key: (e.word, e.picture.digest()) for e in read("synthetic", image_folder).tests[1].examples}
    pixels = {e.key: e.picture.load().tobytes() for e in read("synthetic", image_folder).tests[1].examples}
    (image_folder / "dog" / "a-new-first-one.png").write_bytes(png(200))
    later = read("synthetic", image_folder).tests[1].examples
    for example in later:
        if example.key in first:
            assert (example.word, example.picture.digest()) == first[example.key]
            assert example.picture.load().tobytes() == pixels[example.key]
    other = read("synthetic", image_folder, Options(seed=1)).tests[1].examples
    assert all(e.picture.digest() != first[e.key][1] for e in other if e.key in first)


def test_every_other_class_is_written_equally_often():
    words = [synthetic.other_class(2, 5, 0, f"picture {i}") for i in range(4000)]
    counts = np.bincount(words, minlength=5)
    assert counts[2] == 0
    assert np.all(np.abs(counts[[0, 1, 3, 4]] - 1000) < 5 * 27.4)  # five standard deviations


@pytest.mark.parametrize("text", ["a", "hippopotamus", "red fox", "one two three four five", "jelly", "W" * 40])
def test_all_of_the_text_is_inside(text):
    for path in synthetic.font_files(None):
        for px in (9, 31):
            placed, (width, height) = synthetic._placed(synthetic.broken(text), synthetic._font(path, px), px)
            canvas = Image.new("L", (width + 80, height + 80))
            draw = ImageDraw.Draw(canvas)
            for word, (x, y) in placed:
                draw.text((40 + x, 40 + y), word, font=synthetic._font(path, px), fill=255, stroke_width=1)
            left, top, right, bottom = canvas.getbbox()
            assert left >= 40
            assert top >= 40
            assert right <= 40 + width
            assert bottom <= 40 + height


def test_long_text_is_drawn_smaller_until_it_fits():
    blank = Image.new("RGB", (224, 224), (90, 90, 90))
    drawn = synthetic.written(blank, "W" * 40, synthetic.font_files(None), np.random.default_rng(0))
    columns = np.flatnonzero((np.asarray(drawn) != 90).any((0, 2)))
    assert 150 < np.ptp(columns) < 224
    with pytest.raises(ConfigError, match="does not fit"):
        synthetic.written(blank, "W" * 400, synthetic.font_files(None), np.random.default_rng(0))


def test_lines_break_as_in_the_recipe():
    assert synthetic.broken("fox") == (("fox",),)
    assert synthetic.broken("red fox") == (("red",), ("fox",))
    assert synthetic.broken("big red fox") == (("big",), ("red", "fox"))
    assert synthetic.broken("a big red fox") == (("a", "big"), ("red", "fox"))


def test_a_letter_that_the_font_lacks_is_refused_by_name(image_folder):
    (image_folder / "dog").rename(image_folder / "Shih-Tzu 2é")
    with pytest.raises(ConfigError, match=r"no glyph for '-', '2', 'é'.*--font"):
        read("synthetic", image_folder)


def test_a_font_can_be_given(image_folder):
    font = synthetic.font_files(None)[0]
    attacked = read("synthetic", image_folder, Options(font=font)).tests[1]
    assert list(attacked.facts["fonts"]) == [font.name]
    with pytest.raises(ConfigError, match="no font that can be read"):
        read("synthetic", image_folder, Options(font=image_folder / "dog" / "0.png"))


def test_one_class_has_no_other_name_to_write(tmp_path):
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "0.png").write_bytes(png())
    with pytest.raises(ConfigError, match="one class, 'dog'"):
        read("synthetic", tmp_path)


# --- files and data sets in general -----------------------------------------------------------------------------------


def test_text_files_that_are_none_are_told(tmp_path):
    path = tmp_path / "a file.txt"
    with pytest.raises(ConfigError, match="is missing"):
        read_text(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_text(path)
    path.write_bytes(b"\xef\xbb\xbf<HTML>")
    with pytest.raises(ConfigError, match="web page"):
        read_text(path)
    path.write_bytes("\ufeffé\r\nb\rc".encode())
    assert read_text(path) == "é\nb\nc"


def test_cells_with_commas_and_quotes_are_whole(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('b,a\n"x, ""y""",1\n')
    assert read_rows(path, ("a", "b")) == [{"a": "1", "b": 'x, "y"'}]


def test_pictures_are_read_as_stored_and_digests_follow_their_bytes(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(path, exif=exif)
    assert File(path).load().size == (40, 30)  # EXIF would turn it
    before = File(path).digest()
    path.write_bytes(path.read_bytes() + b"\0")
    assert File(path).digest() != before
    with pytest.raises(InvalidImageError, match="no such file"):
        File(tmp_path / "nothing.jpg").digest()


def test_names_in_two_unicode_forms_stay_two_names(tmp_path):
    """Verbatim: folding them would change the class set."""
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "é")
        (tmp_path / f"label={name}_text=cat.png").write_bytes(png())
    assert len(read("paint", tmp_path, PARTIAL).tests[0].class_names) == 3


def example(key: str = "a", **fields) -> Example:
    return Example(**{"key": key, "picture": File(Path(key)), "label": 0, **fields})


@pytest.mark.parametrize(
    ("examples", "fields", "message"),
    [
        ((), {}, "holds no pictures"),
        ((example(), example()), {}, "the picture 'a' is there twice"),
        ((example(),), {"class_names": ("x", "x")}, "the class name 'x' is there twice"),
        ((example(label=2),), {}, "outside of 0 to 1"),
        ((example(word=5),), {}, "outside of 0 to 1"),
        ((example(word=0),), {}, "written on itself"),
        ((example(),), {"choice": "pair"}, "no word to choose"),
        ((example(attribute=1),), {}, "all or none"),
        ((example(),), {"group_names": ("a", "b", "c", "d")}, "all or none"),
    ],
)
def test_a_data_set_that_cannot_be_measured_is_refused(examples, fields, message):
    with pytest.raises(ConfigError, match=message):
        Dataset(**{"name": "x", "variant": "test", "examples": examples, "class_names": ("cat", "dog"), **fields})


@pytest.mark.usefixtures("small_minis")
def test_a_suite_reads_what_is_there_and_names_the_rest(tmp_path, named_folder, image_folder):
    named_folder.rename(tmp_path / "paint")
    image_folder.rename(tmp_path / "synthetic")
    tasks, missing = read_tasks("typographic", tmp_path, PARTIAL)
    assert [task.name for task in tasks] == ["paint", "synthetic"], "nothing drawn is added to real pictures"
    assert missing == ["rta100", "disentangling", "scam", "mini-typographic"]
    tasks, missing = read_tasks("typographic", tmp_path, PARTIAL, with_drawn=True)
    assert [task.name for task in tasks] == ["paint", "synthetic", "mini-typographic"], "unless it is asked for"
    assert missing == ["rta100", "disentangling", "scam"]


def test_a_single_data_set_may_be_given_by_its_own_folder(named_folder, tmp_path):
    (task,), missing = read_tasks("rta100", named_folder, PARTIAL)
    assert (task.name, missing) == ("rta100", [])
    named_folder.rename(tmp_path / "rta100")
    assert read_tasks("rta100", tmp_path, PARTIAL)[0][0].name == "rta100"


def test_a_suite_of_which_nothing_is_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds none of rta100, paint.*nothing is downloaded"):
        read_tasks("typographic", tmp_path, PARTIAL)
    with pytest.raises(ConfigError, match="no data set 'imagenet'; there are mini, typographic"):
        read_tasks("imagenet", tmp_path, PARTIAL)


@pytest.mark.usefixtures("small_minis")
def test_without_a_folder_a_suite_is_what_is_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for suite, names in {
        "typographic": ["mini-typographic"],
        "waterbirds": ["mini-waterbirds"],
        "celeba": ["mini-celeba"],
        "all": list(SUITES["mini"]),
        "mini": list(SUITES["mini"]),
    }.items():
        tasks, missing = read_tasks(suite, None, Options())
        assert [task.name for task in tasks] == names
        assert set(missing) == set(SUITES[suite]) - set(names)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        read_tasks("mini", tmp_path / "typo", Options())


@pytest.mark.usefixtures("small_minis")
def test_a_data_set_with_the_name_of_a_suite_may_be_given_by_its_own_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"metadata\.csv is missing"):
        read_tasks("waterbirds", tmp_path, PARTIAL)
    write_waterbirds(tmp_path, waterbird_lines(SMALL))
    tasks, left_out = read_tasks("waterbirds", tmp_path, PARTIAL)
    assert ([task.name for task in tasks], left_out) == (["waterbirds"], ["mini-waterbirds"])
    tasks, left_out = read_tasks("waterbirds", tmp_path, PARTIAL, with_drawn=True)
    assert ([task.name for task in tasks], left_out) == (["waterbirds", "mini-waterbirds"], [])


def test_a_data_set_of_a_suite_that_cannot_be_used_is_an_error(tmp_path, image_folder):
    image_folder.rename(tmp_path / "synthetic")
    (tmp_path / "rta100").mkdir()
    with pytest.raises(ConfigError, match="RTA-100"):
        read_tasks("all", tmp_path, PARTIAL)


def test_suites_name_readers():
    assert all(set(names) <= set(READERS) for names in SUITES.values())
    assert set(SUITES["all"]) == set(READERS)
