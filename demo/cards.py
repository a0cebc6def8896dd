"""What is known of a latent: its card, and lists of latents to choose from."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from defense.core.latents import LatentSet
from defense.demo import views
from defense.demo.engine import Engine
from defense.errors import ConfigError, DefenseError
from defense.explain.catalogue import BIN_EDGES, Catalogue, picture, search
from defense.explain.heat import overlay

if TYPE_CHECKING:
    from defense.hosts.controls import LatentKey

NOT_HELD = "This defense is slim: it holds the latents that it removes, and where others fire cannot be shown."
NO_CATALOGUE = "This defense comes without a catalogue of its latents, so they have numbers and no names or pictures."

_NO_FILES = "These pictures are files that the catalogue was made from, and they do not come with it."

_N_PICTURES = 6
_N_LISTED = 24
_N_THUMBNAILS = 4
_CARD_SIDE, _THUMBNAIL_SIDE = 112, 56

SCORES = {
    "contrast": "more activation where the cue is",
    "effect": "how far its removal moves fooled pictures back to the right answer (logits)",
}
COLUMNS = {
    "frequency": "share of tokens on which it fires",
    "mean_activation": "mean activation where it fires",
    "largest_activation": "largest activation seen",
    "monosemanticity": "likeness of the pictures on which it fires; 1: all alike",
    "class_entropy": "spread over classes, in nats; 0: one class alone",
    "n_classes": "classes on whose pictures it fires",
    "steerability": "how far steering it moves the answers",
}
SORTS = ("steerability", "monosemanticity", "contrast", "effect", "frequency", "largest_activation")


def card(engine: Engine, gallery: Gallery, latent_key: LatentKey, here: Image.Image | None = None) -> str:
    """Return a latent's card.

    Args:
        engine: The model.
        gallery: For the pictures.
        latent_key: The latent.
        here: The visitor's picture, to show where it fires there.
    """
    hook_point, latent = latent_key
    catalogue = engine.catalogues.get(hook_point)
    name = engine.name_of(hook_point, latent)
    latent_set = engine.set_of(hook_point, latent)
    role = f"removed, as one of the set {escape(latent_set.name)}" if latent_set else "left alone by the defense"
    title = f"Latent {latent}" + (f" <em>{escape(name)}</em>" if name else "")
    known = _known(gallery, latent_key, catalogue) if catalogue is not None else f'<p class="empty">{NO_CATALOGUE}</p>'
    why = _why(latent_set, latent) if latent_set is not None else ""
    return (
        f'<article class="card" aria-label="Latent {latent}"><header><h2>{title}</h2>'
        f"<p>{escape(views.block_of(hook_point))} · {role}</p></header>"
        f"{_here(engine, latent_key, here) if here is not None else ''}{known}{why}</article>"
    )


def _here(engine: Engine, latent_key: LatentKey, image: Image.Image) -> str:
    if not engine.can_map(*latent_key):
        return f'<section class="here"><h3>in this picture</h3><p class="empty">{NOT_HELD}</p></section>'
    map = engine.activation_map(image, *latent_key)
    peak = float(map.max(initial=0.0))
    return (
        '<section class="here"><h3>in this picture</h3><figure>'
        f'<img src="{views.data_uri(overlay(image, np.square(map), box=engine.seen_box(image)), _CARD_SIDE)}" '
        'alt="Where the latent fires in this picture">'
        f"<figcaption>{peak:.1f}</figcaption></figure></section>"
    )


def _known(gallery: Gallery, latent_key: LatentKey, catalogue: Catalogue) -> str:
    latent = latent_key[1]
    names = catalogue.names_of(latent)
    words = "".join(f"<li>{escape(word)} <span>{score:.2f}</span></li>" for word, score in names)
    none = '<p class="empty">no word is near, or it fires on all classes alike</p>'
    names_html = f'<ol class="names">{words}</ol>' if words else none
    return (
        f"<section><h3>names it might have</h3>{names_html}</section>"
        f"<section><h3>activation, tokens by octave</h3>{histogram(catalogue.histogram[latent])}</section>"
        f"{_pictures(gallery, latent_key, catalogue)}"
        f'<section class="wide"><h3>measured</h3>{_numbers(_row(catalogue.columns, latent), COLUMNS)}</section>'
    )


def _why(latent_set: LatentSet, latent: int) -> str:
    index = latent_set.latents.index(latent)
    scores = {name: column[index] for name, column in latent_set.scores.items()}
    rank = f"Number {index + 1} of {len(latent_set.latents)} in its set; keeps {100 * latent_set.gains[index]:.0f} %."
    if not scores:
        return f'<section class="wide"><h3>why it was chosen</h3><p>{rank} The defense does not say why.</p></section>'
    return (
        f'<section class="wide"><h3>why it was chosen, and its effect</h3><p>{rank}</p>'
        f"{_numbers(scores, SCORES)}</section>"
    )


def _row(columns: Mapping[str, np.ndarray], latent: int) -> dict[str, float]:
    return {name: float(column[latent]) for name, column in columns.items()}


def _numbers(values: Mapping[str, float], meanings: Mapping[str, str]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th><td class="n">{number(values[name])}</td>'
        f"<td>{escape(meaning)}</td></tr>"
        for name, meaning in meanings.items()
        if name in values
    )
    return f'<table class="numbers"><tbody>{rows}</tbody></table>'


def number(value: float) -> str:
    """Return a number in three figures; a dash where it means nothing."""
    if not math.isfinite(value):
        return "-"
    return (
        f"{value:.0f}"
        if abs(value) >= 100 or value == int(value)
        else f"{value:.2g}"
        if abs(value) < 0.1
        else f"{value:.2f}"
    )


def histogram(counts: np.ndarray) -> str:
    """Return a histogram as SVG: a bar per octave of activation, heights by the logarithm of the count."""
    heights = np.log1p(counts) / max(1e-9, float(np.log1p(counts).max(initial=0)))
    width, height = 14, 56
    bars = "".join(
        f'<rect x="{i * width + 1}" y="{height * (1 - h):.1f}" width="{width - 2}" height="{height * h:.1f}">'
        f"<title>{BIN_EDGES[i]:g} to {BIN_EDGES[i + 1]:g}: {int(n):,} tokens</title></rect>"
        for i, (h, n) in enumerate(zip(heights, counts, strict=True))
    )
    ticks = "".join(
        f'<text x="{i * width}" y="{height + 12}">{BIN_EDGES[i]:g}</text>' for i in range(0, len(counts) + 1, 4)
    )
    label = f"Histogram of activations over {int(counts.sum()):,} tokens"
    return (
        f'<svg class="histogram" viewBox="0 0 {len(counts) * width + 24} {height + 16}" role="img" '
        f'aria-label="{label}">{bars}{ticks}</svg>'
    )


def _pictures(gallery: Gallery, latent_key: LatentKey, catalogue: Catalogue) -> str:
    try:
        figures = _top_pictures(gallery, latent_key, catalogue)
    except ConfigError:
        figures = f'<p class="empty">{_NO_FILES}</p>'
    return f'<section class="tops"><h3>fires most on</h3><div class="strip">{figures}</div></section>'


def _top_pictures(gallery: Gallery, latent_key: LatentKey, catalogue: Catalogue) -> str:
    figures = []
    for key, activation in top_keys(catalogue, latent_key[1], _N_PICTURES):
        figures.append(
            f'<figure><img src="{gallery.with_map(key, *latent_key)}" '
            'alt="A picture on which the latent fires, with where">'
            f"<figcaption>{activation:.1f}</figcaption></figure>"
        )
    return "".join(figures) or '<p class="empty">it fired on no picture</p>'


def top_keys(catalogue: Catalogue, latent: int, n: int) -> list[tuple[str, float]]:
    """Return the pictures on which a latent fires most, at most `n`, each with its activation there."""
    top, activations = catalogue.top[latent][:n], catalogue.top_activation[latent][:n]
    return [(catalogue.pictures[i], float(a)) for i, a in zip(top, activations, strict=True) if i >= 0]


class Gallery:
    """The catalogues' pictures as data URIs, cached for all visitors: none of the pictures is a visitor's."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.with_map = functools.lru_cache(maxsize=512)(self._with_map)
        self.thumbnail = functools.lru_cache(maxsize=2048)(self._thumbnail)

    def _with_map(self, key: str, hook_point: str, latent: int) -> str:
        """Return a picture with where a latent fires on it, as a data URI."""
        image = picture(key)
        map = self.engine.activation_map(image, hook_point, latent)
        return views.data_uri(overlay(image, np.square(map), box=self.engine.seen_box(image)), _CARD_SIDE)

    def _thumbnail(self, key: str) -> str:
        return views.data_uri(picture(key), _THUMBNAIL_SIDE)


# --- the list to choose from ------------------------------------------------------------------------------------------


def listed(engine: Engine, gallery: Gallery, hook_point: str, query: str, sort: str) -> str:
    """Return the latents of a catalogue that a visitor asked for.

    Args:
        engine: The model.
        gallery: For the pictures.
        hook_point: Where.
        query: A number, a part of a name, or a phrase, whose nearest latents are found; all where blank.
        sort: A column, by falling value; a phrase sorts by nearness.
    """
    catalogue = engine.catalogues[hook_point]
    latents, said = _chosen(engine, catalogue, query.strip(), sort)
    if not latents:
        return f'<p class="empty">{escape(said)}</p>'
    tiles = "".join(_tile(engine, gallery, hook_point, latent, sort) for latent in latents)
    return f'<p class="said" role="status">{escape(said)}</p><div class="tiles">{tiles}</div>'


def _chosen(engine: Engine, catalogue: Catalogue, query: str, sort: str) -> tuple[list[int], str]:
    """Return latents, and what they are."""
    if query.isdecimal():
        latent = int(query)
        if latent >= catalogue.d_sae:
            return [], f"There is no latent {latent}; this SAE has 0 to {catalogue.d_sae - 1}."
        return [latent], f"Latent {latent}."
    column = catalogue.columns.get(sort)
    order = np.arange(catalogue.d_sae) if column is None else np.argsort(-np.nan_to_num(column, nan=-np.inf))
    by = "" if column is None else f", by {sort.replace('_', ' ')}"
    if not query:
        return order[:_N_LISTED].tolist(), f"The first {_N_LISTED} of {catalogue.d_sae:,} latents{by}."
    named = [int(i) for i in order if any(query.lower() in word.lower() for word, _ in catalogue.names_of(i))]
    if named:
        shown = min(len(named), _N_LISTED)
        return named[:_N_LISTED], f'{shown} of {len(named):,} latents named "{query}"{by}.'
    found = search(catalogue, engine.phrase(query, engine.tasks[0].template), _N_LISTED)
    return [latent for latent, _ in found], f'No latent has that name. The {len(found)} that push nearest to "{query}".'


def _tile(engine: Engine, gallery: Gallery, hook_point: str, latent: int, sort: str) -> str:
    catalogue = engine.catalogues[hook_point]
    key = escape(views.text_of((hook_point, latent)), quote=True)
    names = ", ".join(word for word, _ in catalogue.names_of(latent)) or "no name"
    column = catalogue.columns.get(sort)
    value = "" if column is None else f"{sort.replace('_', ' ')} {number(float(column[latent]))}"
    badge = ' <span class="badge">removed</span>' if engine.set_of(hook_point, latent) is not None else ""
    return (
        f'<button type="button" class="tile" data-event="open" data-place="{key}" data-key="tile-{key}">'
        f'<span class="title">{latent} <em>{escape(names)}</em>{badge}</span>'
        f'<span class="thumbs">{_thumbnails(gallery, catalogue, latent)}</span><span class="value">{value}</span>'
        "</button>"
    )


def _thumbnails(gallery: Gallery, catalogue: Catalogue, latent: int) -> str:
    try:
        shown = [gallery.thumbnail(key) for key, _ in top_keys(catalogue, latent, _N_THUMBNAILS)]
    except DefenseError:  # files that are not here; the card says so
        return ""
    return "".join(f'<img src="{uri}" alt="">' for uri in shown)
