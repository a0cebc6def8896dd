"""A bundle says that it removes what is read, where its labels name text."""

import logging

from defense.export.runtime import OnnxClassifier


def test_labels_that_name_text_are_named_unless_the_defense_is_off(tiny_bundle, caplog):
    clf = OnnxClassifier(tiny_bundle)
    assert clf.bundle.set_names == ("text",)
    with caplog.at_level(logging.WARNING):
        clf.set_labels(["a menu", "a dog"]).text_embeds()
        clf.with_strength(0).set_labels(["a poster", "a dog"]).text_embeds()
    (said,) = caplog.messages
    assert "'a menu'" in said
