"""Labels that name text."""

import pytest

from defense.data.written import names_text, reading_labels


@pytest.mark.parametrize(
    "label",
    ["stop sign", "Speed Limit Signs", "handwritten note", "the word no", "license numbers", "brand logo", "text"],
)
def test_what_is_recognized_by_reading_it_names_text(label):
    assert names_text(label)


@pytest.mark.parametrize("label", ["dog", "wordless picture", "sign of rust", "signal", "banknote", "", "42"])
def test_what_is_seen_does_not(label):
    assert not names_text(label)


def test_a_few_such_names_in_a_long_list_do_not_make_reading_the_task():
    things = [f"thing {letter}" for letter in "abcdefghijklmnopqr"]
    assert reading_labels([*things, "menu"]) == []
    assert reading_labels([*things, "menu", "stop sign"]) == ["menu", "stop sign"]
    assert reading_labels(["dog", "menu"]) == ["menu"]
    assert reading_labels([]) == []
