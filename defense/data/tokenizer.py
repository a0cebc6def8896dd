"""CLIP's byte-pair tokenizer, from the vocabulary that ships with the package."""

from __future__ import annotations

import gzip
import html
from collections.abc import Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from defense.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


__all__ = ["ClipTokenizer"]

_DATA = Path(__file__).parent
_N_MERGES = 48_894  # the vocabulary file lists 262,144 merges, CLIP was trained with the first of them
_START, _END = 49_406, 49_407

# Contractions, runs of letters, single digits, runs of anything else. CLIP's pattern ignores case, which matters to two
# characters of lower-case text: the long s counts as s, the combining iota as neither letter nor symbol, so it is lost.
_WORD = r"'[s\x{17f}]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"


class ClipTokenizer:
    """CLIP's byte-pair encoding without torch, with the ids of `open_clip.SimpleTokenizer`.

    The ids differ in two cases. A control token spelled out in a text ("<end_of_text>") is plain text here, where
    open_clip would end the prompt. And letters or digits that joined Unicode after version 16 count as symbols here,
    where open_clip follows the version of its `regex` package.

    Args:
        context_length: Ids per text, start and end token included.

    Raises:
        ConfigError: `context_length` is below 3, which leaves no room for text.
    """

    def __init__(self, context_length: int = 77) -> None:
        if context_length < 3:
            raise ConfigError(f"context_length is {context_length}, must be 3 or more: start, text, end")
        self.context_length = context_length

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return int64 ids [len(texts), context_length]: start, text, end, then zeros.

        A text that is too long is cut; the end token stays last.

        Raises:
            ConfigError: `texts` is one string.
        """
        if isinstance(texts, str):
            raise ConfigError(f"the tokenizer got one string, {texts!r:.80}; pass a list of texts")
        ids = np.zeros((len(texts), self.context_length), dtype=np.int64)
        for row, text in zip(ids, texts, strict=True):
            kept = _encode(_clean(text)).ids[: self.context_length - 2]
            row[: len(kept) + 2] = [_START, *kept, _END]
        return ids

    def kept_text(self, text: str) -> str | None:
        """Return what is left of a text that is too long, cleaned and in lower case; None if all of it fits."""
        cleaned = _clean(text)
        offsets = _encode(cleaned).offsets
        n_kept = self.context_length - 2
        return cleaned[: offsets[n_kept - 1][1]] if len(offsets) > n_kept else None


def _unescape(text: str) -> str:
    """Return a text with mojibake, typographic quotes and twice-escaped HTML put right, as CLIP's training did."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text  # nothing to put right, and most labels are such: the repair would take nine tenths of a check
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _clean(text: str) -> str:
    """Return a text as CLIP's byte-pair encoding wants it: repaired, single spaces, lower case."""
    return " ".join(_unescape(text).split()).lower()


def _encode(cleaned: str) -> Encoding:
    """Return ids and character offsets of a cleaned text, without start and end token."""
    return _bpe().encode(cleaned)


@cache
def _bpe() -> Tokenizer:
    """Return CLIP's byte-pair encoding, built once from the shipped vocabulary."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    with gzip.open(_DATA / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as lines:
        merges = [(left, right) for left, right in map(str.split, islice(lines, 1, 1 + _N_MERGES))]
    # One printable character per byte: the bytes that print stand for themselves, the others come after U+0100.
    printable = [chr(byte) for byte in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))]
    alphabet = printable + [chr(0x100 + n) for n in range(256 - len(printable))]
    # The order is the ids: bytes, bytes that end a word, merges.
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *(left + right for left, right in merges)]
    bpe = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, end_of_word_suffix="</w>")
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return bpe
