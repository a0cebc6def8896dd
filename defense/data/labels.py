"""From labels x templates to `text_embeds`, with the CLIP tokenizer for runs with and without torch.

Labels and templates come from users, files and web forms, so they are checked here, once: `check_labels` and
`resolve_templates` build the `Prompts` that the rest of the package trusts. `encode_prompts` turns them into one unit
vector per label, with whichever text tower the caller hands over: torch's, or an ONNX session's.

This module never imports torch. `ClipTokenizer` gives the ids of `open_clip.SimpleTokenizer`, so that the text side is
the same on both paths.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from defense.errors import ConfigError, NonFiniteError, ShapeError

from .tokenizer import _DATA, _unescape

__all__ = [
    "TEMPLATES",
    "Prompts",
    "average_templates",
    "check_apart",
    "check_distinct",
    "check_labels",
    "common_nouns",
    "encode_prompts",
    "fill",
    "read_labels",
    "resolve_templates",
]

_log = logging.getLogger(__name__)

# C0, DEL and C1 controls, line and paragraph separator, what reorders text on screen, and halves of surrogate pairs,
# which no file or hash can hold. The zero-width joiner is not among them: emoji need it.
CONTROL_CHARACTER = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# What nobody sees and the text tower reads: soft hyphen, zero-width space, word joiner and such, marks of byte order
# and annotations, code points that are no characters, tags that spell no flag. Two labels would look alike.
_INVISIBLE = re.compile(
    r"[\xad\u180e\u200b\u2060-\u2064\ufeff\ufff9-\ufffb\ufdd0-\ufdef"
    + "".join(f"\\U{plane:04x}fffe\\U{plane:04x}ffff" for plane in range(17))
    + r"]|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0000-\U000e007f]"
)
# Hugging Face spells them the first way, open_clip the second.
_CONTROL_TOKEN = re.compile(r"<\|(?:start|end)oftext\|>|<(?:start|end)_of_text>")

_N_CUT_SHOWN = 3

TEMPLATES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: tuple(texts) for name, texts in json.loads((_DATA / "templates.json").read_text("utf-8")).items()}
)
"""Template sets by name: "simple" (CLIP's one line), "hf" (Hugging Face's), "openai" (CLIP's 80 for ImageNet)."""


def resolve_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Return the templates that a name, one template or several stand for.

    Args:
        templates: A name in `TEMPLATES`, a template such as "a photo of a {}.", or a sequence of templates.

    Raises:
        ConfigError: The name is unknown, the sequence is empty, or a template has not exactly one literal `{}` or
            holds control tokens or control characters.
    """
    if isinstance(templates, str):
        if templates in TEMPLATES:
            return TEMPLATES[templates]
        if "{}" not in templates:
            raise ConfigError(
                f"templates={templates!r:.80} is neither a set ({', '.join(TEMPLATES)}) nor a template with a literal "
                "{} where the label goes"
            )
        templates = (templates,)
    checked = tuple(_checked_template(text, f"templates[{i}] = {text!r:.80}") for i, text in enumerate(templates))
    if not checked:
        raise ConfigError('no template was given; pass at least one, e.g. "a photo of a {}."')
    return checked


def fill(template: str, label: str) -> str:
    """Return `template` with `label` in place of its literal `{}`; all other braces stay as they are."""
    return template.replace("{}", label)  # str.format would let "{0.__class__}" read attributes


def check_labels(labels: Sequence[str], *, are_stored: bool = False) -> tuple[str, ...]:
    """Return the labels without surrounding spaces, otherwise as given; log a warning if there is only one.

    Args:
        labels: What to choose from.
        are_stored: They stand in a file, which may be older than the rule about characters that nobody sees.

    Raises:
        ConfigError: `labels` is one string, a set or empty, or a label is not a string, is blank, stands there twice,
            or holds a control token or a control, newline, tab, bidirectional or invisible character, HTML-escaped ones
            included.
    """
    if isinstance(labels, str):
        raise ConfigError(f'labels is one string, {labels!r:.80}; pass a list of labels, e.g. ["dog", "pizza"]')
    if isinstance(labels, set | frozenset):
        raise ConfigError("labels is a set, whose order differs from run to run; pass a list, e.g. sorted(labels)")
    first_at: dict[str, int] = {}
    for position, label in enumerate(labels):
        name = f"labels[{position}] = {label!r:.80}"
        stripped = _checked_text(label, name).strip()
        if not are_stored and (found := _INVISIBLE.search(_unescape(label))):  # mojibake has some, and is repaired
            raise ConfigError(f"{name} holds U+{ord(found[0]):04X}, which nobody sees; remove it")
        if stripped in first_at:
            raise ConfigError(f"{name} repeats labels[{first_at[stripped]}]; two equal labels would share one score")
        first_at[stripped] = position
    if not first_at:
        raise ConfigError('no label was given; pass at least two, e.g. ["dog", "pizza"]')
    if len(first_at) == 1:
        _log.warning("there is one label only, so its score is 1.0 for every image; add what else it could be")
    return tuple(first_at)


def common_nouns() -> tuple[str, ...]:
    """Return names of things that photographs show, for who has no labels of their own: all different, sorted."""
    return check_labels(json.loads((_DATA / "nouns.json").read_text("utf-8")))


def check_distinct(prompts: Prompts, tokenizer: Callable[[list[str]], npt.ArrayLike], *, chunk: int = 1024) -> None:
    """Refuse labels that are the same to the text tower: their embeddings are equal, and they would share one score.

    Case, inner spaces, entities, typographic quotes and composed characters make no difference to it, nor does what
    lies beyond its context.

    Args:
        prompts: Checked labels and templates.
        tokenizer: From a list of texts to integer ids [n, context_length].
        chunk: Largest number of texts handed over at once.

    Raises:
        ConfigError: Two labels have the same ids in every template; the message names both.
    """
    alike = [list(prompts.labels)]
    for template in prompts.templates:  # the first leaves hardly any for the others
        alike = [group for labels in alike for group in _alike(labels, template, tokenizer, chunk)]
        if not alike:
            return
    first, second, *_ = alike[0]
    raise ConfigError(
        f"the labels {first!r:.80} and {second!r:.80} are the same text to this CLIP, which does not see case, spaces, "
        "kinds of quotes or what is beyond its context, so they would share one score; leave one out, or word it "
        "differently"
    )


def check_apart(labels: Sequence[str], text_embeds: np.ndarray) -> None:
    """Refuse labels whose embeddings are equal: they would share one score.

    Args:
        labels: Their names.
        text_embeds: Float [n_labels, d_embed].

    Raises:
        ConfigError: Two rows are equal; the message names both labels.
    """
    first_at: dict[bytes, str] = {}
    for label, row in zip(labels, text_embeds, strict=True):
        if (other := first_at.setdefault((row + 0.0).tobytes(), label)) is not label:
            raise ConfigError(
                f"the labels {other!r:.80} and {label!r:.80} have the same embedding, so they would share one score; "
                "leave one out, or hand over its own"
            )


def _alike(
    labels: Sequence[str], template: str, tokenizer: Callable[[list[str]], npt.ArrayLike], chunk: int
) -> list[list[str]]:
    """Return the groups of two or more labels that have the same ids in a template."""
    groups: dict[bytes, list[str]] = {}
    for start in range(0, len(labels), chunk):
        part = labels[start : start + chunk]
        ids = np.asarray(tokenizer([fill(template, label) for label in part]), dtype=np.int64)
        for label, row in zip(part, ids, strict=True):
            groups.setdefault(hashlib.sha256(row.tobytes()).digest(), []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def read_labels(path: str | Path) -> tuple[str, ...]:
    """Return the labels of a UTF-8 text file: one a line, blank lines and surrounding white space ignored.

    Raises:
        ConfigError: The file cannot be read, is not UTF-8 text or is a web page, or `check_labels` refuses its labels.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a text file, one label a line") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8, one label a line"
        ) from error
    if text.lstrip()[:9].lower().startswith(("<!doctype", "<html")):
        raise ConfigError(f"{path} is a web page, not a list of labels; download the file itself, one label a line")
    lines = (line.strip() for line in text.replace("\ufeff", "").split("\n"))  # such marks of files that were joined
    found = [line for line in lines if line]
    if not found:
        raise ConfigError(f"{path} holds no label; write at least two into it, one a line")
    try:
        return check_labels(found)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Prompts:
    """Labels and the templates that each of them is put into.

    Attributes:
        labels: What `check_labels` or `read_labels` returned.
        templates: What `resolve_templates` returned.

    Raises:
        ConfigError: One of them is not a tuple, or is empty.
    """

    labels: tuple[str, ...]
    templates: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, maker in (("labels", "check_labels"), ("templates", "resolve_templates")):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not value:
                raise ConfigError(f"Prompts got {name}={value!r:.80}, wants a filled tuple; pass it through {maker}()")

    def texts(self) -> Iterator[str]:
        """Yield the n_labels * n_templates texts, all templates of the first label first."""
        return (fill(template, label) for label in self.labels for template in self.templates)

    def sha256(self) -> str:
        """Return a hex key that changes with any label, any template and their order."""
        return hashlib.sha256(json.dumps([self.labels, self.templates]).encode()).hexdigest()


def average_templates(
    embeds: np.ndarray, n_labels: int, n_templates: int, *, normalize_each: bool = True
) -> np.ndarray:
    """Return one unit vector per label, float32 [n_labels, d_embed]: the direction of its templates' mean.

    Args:
        embeds: Text embeddings [n_labels * n_templates, d_embed] in the order of `Prompts.texts`.
        n_labels: Number of labels.
        n_templates: Number of templates.
        normalize_each: Normalize before averaging too, as open_clip's `build_zero_shot_classifier` does. False is the
            rule of the published SCAM figures, where longer embeddings weigh more.

    Raises:
        ShapeError: `embeds` has another shape.
        NonFiniteError: `embeds` holds NaN or infinity.
        ConfigError: A vector to normalize is zero.
    """
    embeds = np.asarray(embeds, dtype=np.float32)
    if embeds.ndim != 2 or len(embeds) != n_labels * n_templates:
        raise ShapeError(
            f"embeds is {list(embeds.shape)}, wants [{n_labels} labels * {n_templates} templates, d_embed]; the text "
            "tower must return one row per text"
        )
    if not np.isfinite(embeds).all():
        raise NonFiniteError("embeds")
    if normalize_each:
        embeds = _unit(embeds)
    return _unit(embeds.reshape(n_labels, n_templates, -1).mean(axis=1))  # [n_labels, d_embed]


def encode_prompts(
    prompts: Prompts,
    tokenizer: Callable[[list[str]], npt.ArrayLike],
    encode_text: Callable[[np.ndarray], np.ndarray],
    *,
    chunk: int = 1024,
    normalize_each: bool = True,
) -> np.ndarray:
    """Return `text_embeds`, float32 [n_labels, d_embed], one unit vector per label.

    Texts are made, tokenized and encoded in chunks, and averaged per label as they come, so that memory grows with the
    result alone. If the tokenizer has `kept_text`, labels whose prompt is too long are named in one logged warning.

    Args:
        prompts: Checked labels and templates.
        tokenizer: From a list of texts to integer ids [n, context_length]; an array or a CPU tensor.
        encode_text: From int64 ids [n, context_length] to embeddings [n, d_embed].
        chunk: Largest number of texts handed over at once.
        normalize_each: See `average_templates`.

    Raises:
        ConfigError: `chunk` is below 1, or an embedding is zero.
        ShapeError: The text tower returned another number of rows than it got.
        NonFiniteError: The text tower returned NaN or infinity.
    """
    if chunk < 1:
        raise ConfigError(f"chunk is {chunk}, must be 1 text or more")
    n_templates = len(prompts.templates)
    n_labels_at_once = max(1, chunk // n_templates)
    text_embeds: list[np.ndarray] = []
    cut: dict[str, str] = {}  # label -> what is left of the first of its texts that is too long
    for first in range(0, len(prompts.labels), n_labels_at_once):
        labels = prompts.labels[first : first + n_labels_at_once]
        texts = list(Prompts(labels, prompts.templates).texts())
        embeds: list[np.ndarray] = []
        for start in range(0, len(texts), chunk):
            batch = texts[start : start + chunk]
            ids = np.asarray(tokenizer(batch), dtype=np.int64)
            for row, kept in _find_cut(tokenizer, batch, ids):
                cut.setdefault(labels[(start + row) // n_templates], kept)
            embeds.append(encode_text(ids))
        text_embeds.append(
            average_templates(np.concatenate(embeds), len(labels), n_templates, normalize_each=normalize_each)
        )
    if cut:
        _log.warning(_cut_message(cut))
    return np.concatenate(text_embeds)


def _checked_text(text: object, name: str) -> str:
    """Return a text as it is; raise ConfigError if it is no string, is blank, or could act as anything but text."""
    if not isinstance(text, str):
        raise ConfigError(f"{name} is of type {type(text).__name__}, must be a string")
    unescaped = _unescape(text)
    for form in (text, unescaped):  # the text tower sees the second; the first holds what the repair takes out
        if found := CONTROL_CHARACTER.search(form):
            raise ConfigError(f"{name} holds the control character U+{ord(found[0]):04X}; remove it")
        if found := _CONTROL_TOKEN.search(form.casefold()):
            raise ConfigError(f"{name} holds {found[0]}, which can start or end a prompt; remove it")
    if not unescaped.strip():
        raise ConfigError(f"{name} is blank; remove it")
    return text


def _checked_template(template: object, name: str) -> str:
    """Return a template as it is; raise ConfigError if it is not a clean text with exactly one literal `{}`."""
    text = _checked_text(template, name)
    if (n_slots := text.count("{}")) != 1:
        raise ConfigError(f"{name} has {n_slots} literal {{}}, wants exactly one, where the label goes")
    return text


def _find_cut(tokenizer: object, texts: list[str], ids: np.ndarray) -> Iterator[tuple[int, str]]:
    """Yield row and remaining text for each text that was cut; nothing if the tokenizer cannot tell."""
    kept_text = getattr(tokenizer, "kept_text", None)
    if kept_text is None:
        return
    for row in np.flatnonzero(ids[:, -1]):  # a padded row was not cut
        if (kept := kept_text(texts[row])) is not None:
            yield int(row), kept


def _cut_message(cut: Mapping[str, str]) -> str:
    """Return the message about labels whose text is too long: how many, and how the first few are read."""
    shown = "; ".join(f"{label!r:.80} is read as {kept!r}" for label, kept in islice(cut.items(), _N_CUT_SHOWN))
    return f"{len(cut)} label(s) do not fit into the text tower's context, shorten them: {shown}"


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Return the rows of [n, d_embed] at length 1."""
    with np.errstate(over="ignore"):
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(norms).all():  # the squares of finite numbers may be infinite
        raise NonFiniteError("embeds")
    if not norms.all():
        raise ConfigError("a text embedding is zero and has no direction; check the text tower's weights")
    unit: np.ndarray = vectors / norms
    return unit
