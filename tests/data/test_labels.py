import logging
import re
import tracemalloc

import numpy as np
import pytest

from defense.data import labels
from defense.data.labels import (
    TEMPLATES,
    Prompts,
    average_templates,
    check_labels,
    encode_prompts,
    fill,
    read_labels,
    resolve_templates,
)
from defense.data.tokenizer import ClipTokenizer
from defense.errors import ConfigError, NonFiniteError, ShapeError

from .texts import END, LONG_LABEL, START, prompts, text_ids


def hashed_text_tower(ids: np.ndarray) -> np.ndarray:
    """Embed each row of ids on its own, so that the result cannot depend on the chunks."""
    angles = np.arange(1, 6) * (ids * np.arange(1, ids.shape[1] + 1)).sum(axis=1, keepdims=True)
    return (np.sin(angles) * (1 + ids[:, 2:3] % 7)).astype(np.float32)  # [n, 5]


class TestTemplates:
    def test_sets_are_the_published_ones(self):
        assert TEMPLATES["simple"] == ("a photo of a {}.",)
        assert TEMPLATES["hf"] == ("This is a photo of {}.",)
        assert len(TEMPLATES["openai"]) == 80
        assert set(TEMPLATES) == {"simple", "hf", "openai"}

    def test_openai_set_equals_open_clip(self):
        open_clip = pytest.importorskip("open_clip")
        assert TEMPLATES["openai"] == tuple(make("{}") for make in open_clip.OPENAI_IMAGENET_TEMPLATES)

    def test_every_set_is_valid(self):
        for name, texts in TEMPLATES.items():
            assert resolve_templates(name) == resolve_templates(texts) == texts

    def test_sets_cannot_be_changed(self):
        with pytest.raises(TypeError):
            TEMPLATES["simple"] = ()

    def test_one_template_or_several(self):
        assert resolve_templates("a {} on a table") == ("a {} on a table",)
        assert resolve_templates(["a {}", "the {}"]) == ("a {}", "the {}")
        assert resolve_templates(t for t in ["a {}"]) == ("a {}",)

    @pytest.mark.parametrize(
        ("templates", "message"),
        [
            pytest.param("imagenet", "neither a set", id="unknown name"),
            pytest.param("a photo", "neither a set", id="no slot"),
            pytest.param("", "neither a set", id="empty string"),
            pytest.param("{0.__class__}", "neither a set", id="attribute access"),
            pytest.param("a photo of {label}", "neither a set", id="named slot"),
            pytest.param(["a {}", "a photo"], r"templates\[1\] = 'a photo' has 0", id="one of two without slot"),
            pytest.param(["{0.__class__}"], "has 0 literal {}", id="attribute access in a list"),
            pytest.param("a {} and a {}", "has 2 literal {}", id="two slots"),
            pytest.param([], "no template", id="none"),
            pytest.param([""], "is blank", id="blank"),
            pytest.param([str.upper], "of type method_descriptor", id="function"),
            pytest.param("a {}<|endoftext|>", r"<\|endoftext\|>", id="control token"),
            pytest.param("a {}\n", r"U\+000A", id="newline"),
        ],
    )
    def test_fault_48_bad_templates_are_refused(self, templates, message):
        with pytest.raises(ConfigError, match=message):
            resolve_templates(templates)

    def test_fault_48_only_a_literal_slot_is_replaced(self):
        template = "{0.__class__} {label} %s $x {} {{"
        assert resolve_templates(template) == (template,)
        assert fill(template, "dog") == "{0.__class__} {label} %s $x dog {{"

    def test_fault_48_braces_of_a_label_stay(self):
        assert fill("a {}.", "{} {0.__class__} \\1") == "a {} {0.__class__} \\1."


class TestCheckLabels:
    def test_labels_stay_as_given_but_for_spaces_around_them(self):
        assert check_labels(["Mercedes-Benz", " hot  dog ", "dog", "Dog"]) == (
            "Mercedes-Benz",
            "hot  dog",
            "dog",
            "Dog",
        )

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            pytest.param("dog", "one string, 'dog'", id="bare string"),
            pytest.param([], "no label", id="none"),
            pytest.param(["dog", "cat", " dog"], r"labels\[2\] = ' dog' repeats labels\[0\]", id="duplicate"),
            pytest.param(["dog", ""], r"labels\[1\] = '' is blank", id="empty"),
            pytest.param(["dog", " \u3000"], "is blank", id="spaces"),
            pytest.param(["dog", "&nbsp;"], "is blank", id="escaped space"),
            pytest.param(["dog", 3], r"labels\[1\] = 3 is of type int", id="number"),
            pytest.param(["dog", None], "of type NoneType", id="None"),
            pytest.param(b"dog", "of type int", id="bytes"),
        ],
    )
    def test_fault_44_label_lists_without_meaning_are_refused(self, labels, message):
        with pytest.raises(ConfigError, match=message):
            check_labels(labels)

    def test_fault_44_one_label_is_allowed_with_one_warning(self, caplog):
        assert check_labels(["dog"]) == ("dog",)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "one label only" in caplog.text

    def test_fault_44_two_labels_are_silent(self, caplog):
        check_labels(["dog", "cat"])
        assert not caplog.records

    @pytest.mark.parametrize(
        "label",
        [
            "<|endoftext|>",
            "<|startoftext|>",
            "<start_of_text>",
            "<end_of_text>",
            "dog<|EndOfText|>cat",
            "&lt;|endoftext|&gt;",
            "&amp;lt;|endoftext|&amp;gt;",
            "&#60;end_of_text&#62;",
            "\uff1c\uff5cendoftext\uff5c\uff1e",
            "<|endof\ufefftext|>",
            "<\u017ftart_of_text>",
        ],
    )
    def test_fault_46_control_tokens_are_refused(self, label):
        with pytest.raises(ConfigError, match=r"^labels\[1\] = .* holds <.*(start|end)"):
            check_labels(["dog", label])

    @pytest.mark.parametrize(
        "character",
        "\0\a\t\n\r\x1b\x7f\x85\u2028\u2029"
        "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
        "\ud83d",
        ids=lambda character: f"U+{ord(character):04X}",
    )
    @pytest.mark.parametrize("form", ["a{}b", "dog{}", "{}dog"])
    def test_fault_46_control_and_bidi_characters_are_refused(self, character, form):
        label = form.format(character)
        with pytest.raises(ConfigError) as caught:
            check_labels(["dog", "cat", label])
        assert str(caught.value).startswith(f"labels[2] = {label!r}")
        assert f"U+{ord(character):04X}" in str(caught.value)

    @pytest.mark.parametrize(
        "label",
        ["do\u200bg", "do\xadg", "do&shy;g", "dog\u2060", "dog\U000e0041", "dog\ufffe", "dog\U0010ffff", "do\ufdd0g"],
        ids=ascii,
    )
    def test_fault_125_characters_that_nobody_sees_are_refused(self, label):
        with pytest.raises(ConfigError, match="nobody sees"):
            check_labels(["dog", label])
        assert check_labels(["dog", label], are_stored=True) == ("dog", label), "older files still load"

    @pytest.mark.parametrize(
        "label", ["\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "\u2764\ufe0f"]
    )
    def test_fault_125_emoji_that_are_made_of_such_characters_pass(self, label):
        assert check_labels(["dog", label]) == ("dog", label)

    @pytest.mark.parametrize("kind", [set, frozenset])
    def test_fault_126_labels_without_an_order_are_refused(self, kind):
        with pytest.raises(ConfigError, match=r"a set.* pass a list"):
            check_labels(kind(["dog", "cat"]))

    @pytest.mark.parametrize("label", ["dog&#10;cat", "dog&Tab;cat", "dog&#x202e;god", "dog&amp;#x202e;god", "a&rlm;b"])
    def test_fault_46_escaped_control_characters_are_refused(self, label):
        with pytest.raises(ConfigError, match="control character"):
            check_labels(["cat", label])

    @pytest.mark.parametrize(
        "label", ["\U0001f469\u200d\U0001f467", "\u0645\u06cc\u200c\u062e", "rock & roll", "a < b > c", "<|end|>", "'s"]
    )
    def test_fault_46_ordinary_text_passes(self, label):
        assert check_labels(["dog", label]) == ("dog", label)

    def test_fault_46_a_control_token_spelled_out_stays_text(self):
        for token in ("<end_of_text>", "<start_of_text>", "<|endoftext|>", "<|startoftext|>"):
            assert not {START, END} & set(text_ids(f"dog {token} cat"))

    def test_long_labels_are_cut_in_messages(self):
        with pytest.raises(ConfigError) as caught:
            check_labels(["x" * 10_000 + "\0"])
        assert len(str(caught.value)) < 200


class TestReadLabels:
    @pytest.mark.parametrize(
        "content",
        [b"dog\ncaf\xc3\xa9\n", b"\xef\xbb\xbfdog\r\ncaf\xc3\xa9", b"\n dog \n\n\t\ncaf\xc3\xa9\r\n\r\n"],
        ids=["lf", "bom and crlf", "blank lines"],
    )
    def test_one_label_a_line(self, tmp_path, content):
        path = tmp_path / "labels.txt"
        path.write_bytes(content)
        assert read_labels(path) == read_labels(str(path)) == ("dog", "caf\u00e9")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            pytest.param(b"<!DOCTYPE html>\n<html>\n", "is a web page", id="doctype"),
            pytest.param(b"\xef\xbb\xbf \n<HTML><body>404</body>", "is a web page", id="html"),
            pytest.param("dog\ncaf\u00e9".encode("latin-1"), "is not UTF-8 text .* at byte 7", id="latin-1"),
            pytest.param("dog\ncat".encode("utf-16"), "is not UTF-8 text", id="utf-16"),
            pytest.param(b"\n\n", "no label", id="empty"),
            pytest.param(b"dog\n\ndog\n", "repeats", id="duplicate"),
            pytest.param(b"1\tdog\n2\tcat\n", r"U\+0009", id="columns"),
        ],
    )
    def test_files_that_are_no_list_are_refused(self, tmp_path, content, message):
        path = tmp_path / "labels.txt"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}.*{message}"):
            read_labels(path)

    def test_what_cannot_be_read_is_named_with_what_to_give(self, tmp_path):
        for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "nowhere.txt", "No such file")):
            with pytest.raises(
                ConfigError, match=f"{re.escape(str(path))} cannot be read .*{reason}.* give a text file"
            ):
                read_labels(path)


class TestPrompts:
    def test_texts_go_label_by_label(self):
        assert list(prompts("dog", "cat", templates=["a {}", "the {}"]).texts()) == [
            "a dog",
            "the dog",
            "a cat",
            "the cat",
        ]

    def test_sha256_is_stable(self):
        assert (
            prompts("dog", "caf\u00e9").sha256() == "f3082142ea8413746278811df2f7977883ffeaa0da5b48d0e6927304a6890484"
        )

    def test_sha256_tells_prompts_apart(self):
        variants = [
            prompts("dog", "cat"),
            prompts("cat", "dog"),
            prompts("dog cat"),
            prompts("dog", "Cat"),
            prompts("dog", "cat", templates="hf"),
            prompts("dog", "cat", templates=["a {}", "the {}"]),
            prompts("dog", "cat", templates=["the {}", "a {}"]),
            Prompts(("a {}",), ("dog", "cat")),
            Prompts(("dog", "cat", "a {}"), ("the {}",)),
        ]
        assert len({variant.sha256() for variant in variants}) == len(variants)

    @pytest.mark.parametrize(
        ("labels", "templates", "message"),
        [
            pytest.param(("dog",), "simple", "templates='simple'", id="name"),
            pytest.param(["dog"], ("{}",), "labels=", id="list"),
            pytest.param((), ("{}",), r"labels=\(\)", id="no label"),
            pytest.param(("dog",), (), r"templates=\(\)", id="no template"),
        ],
    )
    def test_unchecked_parts_are_refused(self, labels, templates, message):
        with pytest.raises(ConfigError, match=message):
            Prompts(labels, templates)


class TestAverageTemplates:
    @pytest.fixture
    def embeds(self):
        rng = np.random.default_rng(0)
        return (rng.normal(size=(12, 5)) * rng.uniform(0.1, 10, size=(12, 1))).astype(np.float32)

    def test_each_template_weighs_the_same_by_default(self, embeds):
        got = average_templates(embeds, 3, 4)
        for label in range(3):
            total = sum(row / np.sqrt(np.dot(row, row)) for row in embeds[4 * label : 4 * label + 4].astype(np.float64))
            np.testing.assert_allclose(got[label], total / np.sqrt(np.dot(total, total)), atol=1e-6)
        assert got.dtype == np.float32

    def test_scam_rule_averages_first(self, embeds):
        got = average_templates(embeds, 3, 4, normalize_each=False)
        for label in range(3):
            total = sum(embeds[4 * label : 4 * label + 4].astype(np.float64))
            np.testing.assert_allclose(got[label], total / np.sqrt(np.dot(total, total)), atol=1e-6)
        assert np.abs(got - average_templates(embeds, 3, 4)).max() > 0.01

    def test_open_clip_gives_the_same(self, embeds):
        open_clip = pytest.importorskip("open_clip")
        torch = pytest.importorskip("torch")

        class Tower:
            def encode_text(self, ids, normalize):
                assert normalize
                return torch.nn.functional.normalize(torch.from_numpy(embeds)[ids], dim=-1)

        expected = open_clip.build_zero_shot_classifier(
            Tower(),
            lambda texts: torch.tensor([int(text) for text in texts]),
            ["0", "1", "2"],
            [lambda c, i=i: str(4 * int(c) + i) for i in range(4)],
            num_classes_per_batch=None,
        )
        np.testing.assert_allclose(average_templates(embeds, 3, 4), expected.numpy().T, atol=1e-6)

    def test_half_precision_comes_back_as_float32(self, embeds):
        got = average_templates(embeds.astype(np.float16), 3, 4)
        assert got.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)

    @pytest.mark.parametrize("shape", [(11, 5), (12,), (3, 4, 5)])
    def test_a_wrong_shape_is_refused(self, shape):
        with pytest.raises(ShapeError, match=r"3 labels \* 4 templates"):
            average_templates(np.ones(shape, np.float32), 3, 4)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_non_finite_numbers_are_refused(self, embeds, value):
        embeds[7, 2] = value
        with pytest.raises(NonFiniteError):
            average_templates(embeds, 3, 4)

    @pytest.mark.parametrize("normalize_each", [True, False])
    def test_a_zero_vector_is_refused(self, normalize_each):
        with pytest.raises(ConfigError, match="no direction"):
            average_templates(np.zeros((2, 5), np.float32), 1, 2, normalize_each=normalize_each)


class TestEncodePrompts:
    @pytest.mark.parametrize("normalize_each", [True, False])
    @pytest.mark.parametrize("chunk", [1, 2, 3, 5, 6, 7, 1000])
    def test_the_result_does_not_depend_on_the_chunk(self, chunk, normalize_each):
        several = prompts("dog", "cat", "pizza", "tea pot", "car", templates=["a {}.", "the {}.", "{}!"])
        tokenizer = ClipTokenizer(16)
        sizes = []

        def encode_text(ids):
            sizes.append(len(ids))
            assert ids.dtype == np.int64
            return hashed_text_tower(ids)

        got = encode_prompts(several, tokenizer, encode_text, chunk=chunk, normalize_each=normalize_each)
        embeds = hashed_text_tower(tokenizer(list(several.texts())))
        np.testing.assert_array_equal(got, average_templates(embeds, 5, 3, normalize_each=normalize_each))
        assert got.dtype == np.float32
        assert sum(sizes) == 15
        assert max(sizes) <= chunk

    def test_torch_tokenizers_are_accepted(self):
        open_clip = pytest.importorskip("open_clip")
        pair = prompts("dog", "cat", templates="openai")
        expected = encode_prompts(pair, ClipTokenizer(), hashed_text_tower)
        np.testing.assert_array_equal(encode_prompts(pair, open_clip.SimpleTokenizer(), hashed_text_tower), expected)

    def test_fault_45_cut_labels_are_warned_about_once(self, caplog):
        pair = prompts("dog", f"first {LONG_LABEL}", f"second {LONG_LABEL}", templates="openai")
        encode_prompts(pair, ClipTokenizer(), hashed_text_tower, chunk=100)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        message = record.getMessage()
        assert message.startswith("2 label(s)")
        assert repr(ClipTokenizer().kept_text(f"a bad photo of a first {LONG_LABEL}.")) in message
        assert "a bad photo of a second w0" in message

    def test_fault_45_only_a_few_of_many_cut_labels_are_shown(self, caplog):
        many = prompts(*(f"{n} {LONG_LABEL}" for n in range(10)))
        encode_prompts(many, ClipTokenizer(), hashed_text_tower)
        assert caplog.text.count("is read as") == 3
        assert "10 label(s)" in caplog.text

    def test_fault_45_labels_that_just_fit_are_silent(self, caplog):
        encode_prompts(prompts("dog"), ClipTokenizer(8), hashed_text_tower)  # a photo of a dog.
        assert not caplog.records

    def test_fault_49_memory_does_not_grow_with_the_text(self):
        n_labels, d_embed = 100_000, 4
        many = prompts(*map(str, range(n_labels)), templates=["a photo of a {}.", "a picture of the {}."])
        sizes = []

        def encode_text(ids):
            sizes.append(len(ids))
            return np.repeat(ids[:, :1], d_embed, axis=1).astype(np.float32)

        tracemalloc.start()
        try:
            got = encode_prompts(many, lambda texts: [[len(text), 1] for text in texts], encode_text)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert got.shape == (n_labels, d_embed)
        assert max(sizes) <= 1024
        assert peak < 3 * got.nbytes  # the texts alone would take 15 MB, 10 times the result

    def test_a_chunk_of_none_is_refused(self):
        with pytest.raises(ConfigError, match="chunk is 0"):
            encode_prompts(prompts("dog"), ClipTokenizer(), hashed_text_tower, chunk=0)

    def test_a_tower_that_loses_rows_is_refused(self):
        with pytest.raises(ShapeError, match=r"\[1, 5\]"):
            encode_prompts(prompts("dog", "cat"), ClipTokenizer(), lambda ids: hashed_text_tower(ids)[:1])


def test_public_surface():
    public = {name for name, value in vars(labels).items() if getattr(value, "__module__", "") == "defense.data.labels"}
    assert {name for name in public if not name.startswith("_")} | {"TEMPLATES"} == set(labels.__all__)
