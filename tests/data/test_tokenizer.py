"""CLIP's tokenizer: the ids of the reference, whatever the text."""

import html
import subprocess
import sys
import unicodedata

import ftfy
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from defense.data.tokenizer import ClipTokenizer, _unescape
from defense.errors import ConfigError

from .texts import END, LONG_LABEL, START, prompts, text_ids

NASTY = [
    "",
    " ",
    "dog",
    "  leading and trailing  ",
    "tabs\tand\nnew\r\nlines",
    "MiXeD CaSe",
    "Mercedes-Benz",
    "it's we're they've I'm he'll she'd don't",
    "IT'S WE'RE THEY'VE",
    "'s",
    "''''s",
    "x'\u017f long s",
    "dogs' toys",
    "2024 1,000 3.14 1/2 007",
    "a1b2c3",
    "\u201csmart\u201d \u2018quotes\u2019 it\u2019s",
    "en\u2013dash em\u2014dash ellipsis\u2026",
    "caf\u00e9",
    "cafe\u0301",
    "caf\u00c3\u00a9",
    "donâ€™t",
    "L&amp;M",
    "L&amp;amp;M",
    "a < b &amp;lt; c &amp;amp;lt; d",
    "&lt;b&gt;bold&lt;/b&gt;",
    "&quot;quoted&quot; &#39;s &nbsp; &eacute;",
    "&notanentity; & &; &#xZZ;",
    "<b>tag</b>",
    "a\u0327\u0301\u0323 stacked marks",
    "Z\u0351\u034f\u0345algo",
    ".\u0345.",
    "\u1fb3 \u03b1\u0345 \u0399",
    "\U0001f34e",
    "\U0001f34e\U0001f34f\U0001f34e",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 family",
    "\U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\u72d7",
    "\u4e00\u53ea\u72d7\u7684\u7167\u7247",
    "\u72ac\u3068\u732b\u3001\u30c6\u30b9\u30c8\u3002",
    "\uac15\uc544\uc9c0",
    "\u0643\u0644\u0628 \u0648\u0642\u0637\u0629",
    "\u05db\u05dc\u05d1",
    "\u0915\u0941\u0924\u094d\u0924\u093e",
    "\u0e2a\u0e38\u0e19\u0e31\u0e02",
    "\u0421\u043e\u0431\u0430\u043a\u0430",
    "\u0130stanbul \u0131",
    "\u212a \u212b \u2126 \u1e9e \u00df",
    "\uff26\uff35\uff2c\uff2c\uff37\uff29\uff24\uff34\uff28 \uff11\uff12",
    "\ufb01sh \ufb02ower",
    "\u0663\u0664 \u00b2\u00bd \u2167 \u2460",
    "a\u00a0b\u2003c\u3000d\u200be\ufefff",
    "soft\u00adhyphen",
    "\x00nul \x1b[31mred\x1b[0m \x1c\x85",
    "\ud83d lone surrogate",
    "\U00010348\U0001d538",
    "supercalifragilisticexpialidocious",
    "x" * 500,
    "!?" * 200,
    "dog " * 200,
    LONG_LABEL,
    "__init__ snake_case C:\\path\\to /usr/bin",
    "{} {0.__class__} %s $x",
    "<|endoftext",
    "< |endoftext| >",
]

# Ids of open_clip 3.3, start and end token left out.
GOLDEN = {
    "a photo of a dog.": [320, 1125, 539, 320, 1929, 269],
    "a Granny Smith&#39;s apple": [320, 22710, 2915, 568, 3055],
    "it\u2019s \u201csmart\u201d": [585, 568, 257, 4115, 257],
    "L&amp;amp;M": [331, 261, 332],
    "a < b &amp;lt; c": [320, 283, 321, 283, 322],
    "caf\xc3\xa9": [15304],
    "cafe\u0301": [15304],
    "x'\u017f .\u0345.": [343, 6, 129, 379, 269, 269],
    "\U0001f469\u200d\U0001f467 2024": [26304, 964, 356, 273, 271, 273, 275],
    "\u4e00\u53ea\u72d7": [19759, 222, 34517, 103, 163, 233, 501],
    "\u0643\u0644\u0628": [33499, 14251, 35330],
    "\uff26\uff35\uff2c\uff2c \u0130\xdf": [1476, 328, 16384, 127, 509],
    "supercalifragilisticexpialidocious": [1642, 2857, 13093, 2076, 5868, 26850, 835, 639, 38466],
}


class TestClipTokenizer:
    @pytest.mark.parametrize("text", GOLDEN, ids=ascii)
    def test_fault_47_ids_equal_the_golden_ones(self, text):
        assert text_ids(text) == GOLDEN[text]

    @pytest.mark.parametrize("context_length", [32, 77])
    def test_fault_47_nasty_strings_equal_open_clip(self, context_length):
        open_clip = pytest.importorskip("open_clip")
        expected = open_clip.SimpleTokenizer(context_length=context_length)(NASTY).numpy()
        got = ClipTokenizer(context_length)(NASTY)
        assert [text for text, a, b in zip(NASTY, got, expected, strict=True) if (a != b).any()] == []

    def test_fault_47_templates_equal_open_clip(self):
        open_clip = pytest.importorskip("open_clip")
        words = ["dog", "granny smith", "Mercedes-Benz", "jack-o'-lantern", "caf\u00e9", "\u72d7", "4x4", "iPod"]
        texts = list(prompts(*words, templates="openai").texts())
        np.testing.assert_array_equal(ClipTokenizer()(texts), open_clip.SimpleTokenizer()(texts).numpy())

    @settings(max_examples=300, deadline=None)
    @given(text=st.text() | st.text("aeinrst'&;#<>. \u017f\u00e9\u00c3\u00a9\u2019\u0345\u72d7\U0001f34e19"))
    def test_fault_47_any_text_equals_open_clip(self, text):
        open_clip = pytest.importorskip("open_clip")
        assume("of_text" not in text.casefold())
        # Repair can turn assigned characters into unassigned ones: "\xd6\x8c" is read as UTF-8 for U+058C.
        repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
        assume(not any(unicodedata.category(character) == "Cn" for character in repaired))
        np.testing.assert_array_equal(ClipTokenizer()([text]), open_clip.tokenizer._tokenizer([text]).numpy())

    @settings(max_examples=300, deadline=None)
    @given(
        text=st.text(st.characters(max_codepoint=0x7F))
        | st.lists(st.sampled_from(["a", " ", "<", "&", ";", "&amp;", "&lt", "&#39;", "\r", "\x1b[m"])).map("".join)
    )
    def test_plain_text_is_left_to_no_repair_because_that_changes_nothing(self, text):
        assert _unescape(text) == html.unescape(html.unescape(ftfy.fix_text(text)))

    def test_layout_is_start_text_end_zeros(self):
        ids = ClipTokenizer(8)(["dog", ""])
        assert ids.dtype == np.int64
        assert ids.tolist() == [[START, 1929, END, 0, 0, 0, 0, 0], [START, END, 0, 0, 0, 0, 0, 0]]

    def test_no_text_gives_no_row(self):
        assert ClipTokenizer(8)([]).shape == (0, 8)

    @pytest.mark.parametrize("context_length", [3, 32, 77])
    def test_a_cut_text_ends_with_the_end_token(self, context_length):
        ids = ClipTokenizer(context_length)([LONG_LABEL])
        assert ids.shape == (1, context_length)
        assert ids[0, -1] == END
        assert (ids[0, :-1] != END).all()

    def test_one_string_is_refused(self):
        with pytest.raises(ConfigError, match="one string, 'dog'"):
            ClipTokenizer()("dog")

    def test_a_context_without_room_is_refused(self):
        with pytest.raises(ConfigError, match="context_length is 2"):
            ClipTokenizer(2)

    @pytest.mark.parametrize("context_length", [32, 77])
    def test_fault_45_kept_text_is_what_the_ids_hold(self, context_length):
        tokenizer = ClipTokenizer(context_length)
        kept = tokenizer.kept_text(f"A photo of {LONG_LABEL}")
        assert kept.startswith("a photo of w0 w1 ")
        assert tokenizer.kept_text(kept) is None
        np.testing.assert_array_equal(tokenizer([kept]), tokenizer([f"A photo of {LONG_LABEL}"]))

    def test_fault_45_a_text_that_just_fits_is_not_cut(self):
        assert ClipTokenizer(6).kept_text("one two three four") is None
        assert ClipTokenizer(6).kept_text("one two three four five") == "one two three four"
        assert ClipTokenizer(6).kept_text("Caf\u00c3\u00a9 &amp;amp; one TWO three") == "caf\u00e9 & one two"

    def test_import_is_light(self):
        code = (
            "import sys, defense.data.labels; "
            "print([m for m in ('torch', 'open_clip', 'tokenizers', 'ftfy') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"

    def test_no_torch_is_needed_to_tokenize(self):
        code = (
            "import sys; sys.modules['torch'] = None; "
            "from defense.data.tokenizer import ClipTokenizer as T; T()(['dog'])"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
