"""Photographs with words on them: twins, styles, and that training never sees what is tested."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open_clip")

from defense.benchmarks.datasets import Options, photo
from defense.data.typefaces import TEST, TRAIN
from defense.embedded.photo.names import load_words
from defense.errors import ConfigError

NAMES = ("lemon", "wok", "abacus", "acorn", "altar", "Granny Smith")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in the layout of tiny-imagenet-200, with 6 classes of noise."""
    root = tmp_path_factory.mktemp("tiny")
    words, rng = load_words(), np.random.default_rng(0)
    wnids = [words.wnids[words.names.index(name)] for name in NAMES]
    (root / "wnids.txt").write_text("\n".join(wnids))
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for number in range(24):
        wnid = wnids[number % len(wnids)]
        train = root / "train" / wnid / "images"
        train.mkdir(parents=True, exist_ok=True)
        for path in (train / f"{number}.JPEG", root / "val" / "images" / f"{number}.JPEG"):
            small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            small.resize((64, 64)).save(path)
        lines.append(f"{number}.JPEG\t{wnid}\t0\t0\t62\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def task(folder):
    return photo.read(folder, Options())


def variant(task, name):
    (found,) = (each for each in task.tests if each.variant == name)
    return {each.key: each for each in found.examples}


def pixels(example) -> np.ndarray:
    return np.asarray(example.picture.load(), np.int64)


def test_each_photograph_is_there_in_every_variant_with_one_label(task):
    clean = variant(task, "clean")
    assert len(clean) == 24
    names = {each.variant for each in task.tests}
    styles = (f"attacked-{style}" for style in photo.STYLES)
    assert names == {"clean", "neutral", "own-name", "word-only", "look-alike", "texture", *styles}
    for each in [each for each in task.tests if each.variant != "texture"]:
        assert {example.key: example.label for example in each.examples}.items() <= {
            key: example.label for key, example in clean.items()
        }.items()


@pytest.mark.parametrize("style", photo.STYLES)
def test_the_word_is_that_of_another_class_in_the_typefaces_and_case_of_its_style(task, style):
    names = task.tests[0].class_names
    for example in variant(task, f"attacked-{style}").values():
        texts = {hand.text.lower() for hand in example.picture.hands}
        assert texts == {names[example.word].lower()}
        assert example.word != example.label
        assert len(example.picture.hands) == (3 if style == "repeated" else 1)
        for hand in example.picture.hands:
            assert hand.font in TEST[photo.STYLES[style].kind]
            assert hand.text.isupper() == (style == "capitals")
            assert (abs(hand.angle) == 20) == (style == "turned")
        assert (pixels(example) != pixels(variant(task, "clean")[example.key])).any()


def test_a_name_of_two_words_is_never_written(task):
    place = task.tests[0].class_names.index("Granny Smith")
    assert all(each.word != place for dataset in task.tests for each in dataset.examples)
    assert all(each.label != place for each in variant(task, "own-name").values())


def test_the_neutral_twin_has_the_paper_without_the_ink(task):
    attacked, neutral = variant(task, "attacked-print"), variant(task, "neutral")
    for key, example in attacked.items():
        assert neutral[key].picture.hands == tuple(hand.blank() for hand in example.picture.hands)
        assert neutral[key].word is None


def test_an_own_name_is_evidence_and_no_attack(task):
    names = task.tests[0].class_names
    for example in variant(task, "own-name").values():
        assert {hand.text.lower() for hand in example.picture.hands} == {names[example.label].lower()}
        assert example.word is None


def test_a_word_alone_is_the_own_name_on_no_photograph(task):
    own = variant(task, "own-name")
    alone = variant(task, "word-only")
    assert alone.keys() == own.keys()
    for key, example in alone.items():
        assert (example.label, example.picture.hands) == (own[key].label, own[key].picture.hands)
        assert len(np.unique(example.picture.pixels)) == 1


def test_look_alikes_hold_strokes_and_no_word(task):
    clean = variant(task, "clean")
    changed = [(pixels(each) != pixels(clean[key])).any() for key, each in variant(task, "look-alike").items()]
    assert all(not each.picture.hands for each in variant(task, "look-alike").values())
    assert np.mean(changed) > 0.9


def test_textures_are_all_photographs_of_classes_that_look_like_text_as_they_are(task):
    names, found = task.tests[0].class_names, variant(task, "texture")
    assert len(found) == 4  # of 24, for six classes
    assert {names[each.label] for each in found.values()} == {"abacus"}
    assert all(not each.picture.hands and each.picture.strokes is None for each in found.values())


def test_training_pictures_are_of_other_photographs_typefaces_and_only_of_classes_that_are_not_held_out(task):
    assert {hand.font for each in task.train.examples for hand in each.picture.hands} <= {
        font for fonts in TRAIN.values() for font in fonts
    }
    tested = {each.picture.pixels.tobytes() for each in task.tests[0].examples}
    assert not tested & {each.picture.pixels.tobytes() for each in task.train.examples}
    assert len({each.label for each in task.train.examples}) == len(NAMES) - 2
    assert [each.key for each in task.train.examples] == [each.key for each in task.train_clean.examples]


def test_pictures_depend_on_the_seed_and_their_digest_says_so(folder, task):
    again, other = (photo.read(folder, Options(seed=seed)) for seed in (0, 1))
    digests = [
        [each.picture.digest() for each in dataset.examples] for dataset in (task.train, again.train, other.train)
    ]
    assert digests[0] == digests[1]
    assert not set(digests[0]) & set(digests[2])


def test_among_a_thousand_names_the_styles_are_mixed(folder):
    task = photo.read_thousand(folder, Options())
    clean, _, attacked = task.tests
    assert len(clean.class_names) == 1000
    assert {each.kind for each in attacked.examples} <= set(photo.STYLES)
    names = load_words().names
    assert all(attacked.class_names[each.label] in NAMES for each in attacked.examples)
    assert all(each.picture.hands[0].text.lower() == names[each.word].lower() for each in attacked.examples)


def test_a_folder_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"wnids\.json"):
        photo.read(tmp_path, Options())
