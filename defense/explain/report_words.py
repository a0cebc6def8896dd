"""The sentences and figures that both reports, HTML and PNG, show."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from defense.data.preprocess import Box
from defense.store.folders import package_version

if TYPE_CHECKING:
    from defense.classify.answers import Prediction
    from defense.classify.explanation import Explanation
    from defense.hosts.defense import Defense

    from .catalogue import Catalogue
    from .counterfactual import Counterfactual
    from .nearest import Nearest
    from .strengths import LeastStrengths

LABELS = 6
"""Labels of either side that are drawn as bars."""
HTML_LATENTS, PNG_LATENTS = 40, 7
_WORDS = 3
"""Of a latent's names that are shown."""
_PARTS = 5
"""Latents of which a part is removed that are named."""

READING = (
    "CLIP's vision transformer carries a picture as one vector per patch, the residual stream. A sparse autoencoder "
    "(SAE) reads each of these vectors as a sum of a few latents. The defense subtracts what chosen latents wrote, "
    "and the network goes on from there. Both answers are a softmax over the same labels: one without the "
    "subtraction, one with it.",
    "The large map shows, at each patch, the length of all that was subtracted; the small maps show what one latent "
    "wrote. A latent that was removed need not have mattered for the answer, and a name, where there is one, is a "
    "computed guess.",
    "Energy is the squared length of what a latent wrote, times what the edit takes of it, summed over tokens; "
    "share is its part of the sum over all latents. Latents overlap, so energies do not add up to what was "
    "subtracted in all. The edit project subtracts more than they wrote: all that lies in the span of those that "
    "fire.",
)
PATCHES = (
    "Behind {block} the network sees one patch at a time, and each says the label that it would be answered with. "
    "A patch also holds what earlier blocks brought to it from elsewhere."
)
REGION = (
    "Brighter is nearer to the phrase, on one scale for both sides; outlined are the patches above the threshold that "
    "tells those of this picture apart best. It always finds a region, also for what is not there."
)
NO_NAME = "no word is near, or it fires on all classes alike"
"""What is said in place of the name of a latent that a catalogue has no words for."""
FIRES_ON = "What a latent fires on is in `defense demo`, tab Latents: search its number."
NEAREST = (
    ("by_latents", "By latents: overlap of activations, 1 where they are the same."),
    ("by_embedding", "By the whole embedding of plain CLIP: cosine."),
)
"""Sides of `Nearest`, each with a heading."""


class Bar(NamedTuple):
    """One label's scores on both sides, from 0 to 1; None where it is not among the labels that were kept."""

    label: str
    plain: float | None
    robust: float | None

    @property
    def change(self) -> str:
        """In percentage points, with its sign."""
        if self.plain is None or self.robust is None:
            return "-"
        points = round(100 * (self.robust - self.plain), 1)
        return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}") if points else "0.0"


def bars(plain: Prediction, robust: Prediction) -> list[Bar]:
    """Return the best labels of either side, those with the highest score first."""
    sides = [{entry["label"]: entry["score"] for entry in answer} for answer in (plain, robust)]
    kept = {entry["label"] for answer in (plain, robust) for entry in answer[:LABELS]}
    scored = [Bar(label, sides[0].get(label), sides[1].get(label)) for label in kept]
    return sorted(scored, key=lambda bar: (-max(bar.plain or 0, bar.robust or 0), bar.label))


def percent(score: float | None) -> str:
    """Return a share of 1 in percent, or a dash for None."""
    return "-" if score is None else f"{100 * score:.1f} %"


def number(value: float) -> str:
    """Return a value with at least three significant digits; with an exponent only below 0.0001."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def verdict(explanation: Explanation) -> str:
    """Return the answer in a sentence or two."""
    plain, robust = explanation.plain[0], explanation.robust[0]
    if explanation.changed:
        return (
            f"Plain CLIP says {plain['label']} ({percent(plain['score'])}). "
            f"Defended, it says {robust['label']} ({percent(robust['score'])})."
        )
    return (
        f"Plain and defended CLIP agree: {plain['label']} ({percent(plain['score'])} and {percent(robust['score'])})."
    )


def summary(explanation: Explanation) -> str:
    """Return how much was removed, and what it cost."""
    times = f"Image tower: {explanation.plain_ms:.0f} ms plain, {explanation.robust_ms:.0f} ms defended."
    if not explanation.removed:
        return f"Nothing was removed: the answer is that of stock CLIP, bit for bit. {times}"
    count = f"{len(explanation.removed)} latent{'s' * (len(explanation.removed) != 1)}"
    return (
        f"{count} removed, on {explanation.where}: {100 * explanation.fraction:.1f} % of "
        f"the residual's length at the edited blocks. {times}"
    )


def minimum(counterfactual: Counterfactual, catalogues: Mapping[str, Catalogue]) -> str:
    """Return what a counterfactual says."""
    if counterfactual.flipped is None:
        return "No set of these latents was found whose removal changes the answer of plain CLIP."
    listed = [_called(catalogues, *unit) for unit in counterfactual.latents]
    which = "this one latent" if len(listed) == 1 else f"these {len(listed)} latents"
    flipped = counterfactual.flipped[0]
    return (
        f"Removing just {which} turns {counterfactual.plain[0]['label']} into {flipped['label']} "
        f"({percent(flipped['score'])}): {'; '.join(listed)}."
    )


def least(strengths: LeastStrengths, catalogues: Mapping[str, Catalogue]) -> str:
    """Return by how little of its latents an answer changes."""
    if strengths.flipped is None:
        return "No part of these latents was found whose removal changes the answer of plain CLIP."
    listed = [
        f"{percent(part)} of {_called(catalogues, *unit)}" for unit, part in list(strengths.strengths.items())[:_PARTS]
    ]
    n_more = len(strengths.strengths) - len(listed)
    more = f"; and less of {n_more} more" if n_more else ""
    return (
        f"Removed in part, {len(strengths.strengths)} latents turn {strengths.plain[0]['label']} into "
        f"{strengths.flipped[0]['label']}: {'; '.join(listed)}{more}. The parts come to "
        f"{sum(strengths.strengths.values()):.2g} latents in sum."
    )


def near(nearest: Nearest, catalogues: Mapping[str, Catalogue]) -> str:
    """Return by which latents pictures are near, and how that differs from the whole embedding."""
    listed = [_called(catalogues, *unit) for unit in nearest.latents]
    which, they = ("latent", "it") if len(listed) == 1 else ("latents", "any of them")
    n = len(nearest.by_latents)
    found = (
        f"Of the {n} nearest, {nearest.n_shared} are among the nearest by the whole embedding, too."
        if n
        else f"On none of these does {they} fire."
    )
    return f"By the {which} {'; '.join(listed)}, among {nearest.n_pictures:,} pictures. {found}"


def block_words(hook_point: str) -> str:
    """Return a hook point in words."""
    return hook_point.removesuffix(".hook_resid_post").replace("blocks.", "block ")


def _called(catalogues: Mapping[str, Catalogue], hook_point: str, latent: int) -> str:
    names = names_of(catalogues, hook_point, latent)
    return f"{latent} at {hook_point}" + (f" ({names})" if names else "")


def names_of(catalogues: Mapping[str, Catalogue], hook_point: str, latent: int) -> str:
    """Return the best words for a latent, or nothing."""
    found = catalogues.get(hook_point)
    return ", ".join(word for word, _ in found.names_of(latent)[:_WORDS]) if found is not None else ""


def facts(explanation: Explanation, defense: Defense | None) -> list[tuple[str, str]]:
    """Return what it takes to get the same answer again."""
    listed = [("clip-defense", package_version())]
    for package in ("torch", "open_clip_torch"):
        try:
            listed.append((package, version(package)))
        except PackageNotFoundError:
            continue
    if defense is not None:
        clip = defense.clip
        listed += [
            ("CLIP", clip.name),
            ("its vision tower, sha256", clip.sha256),
            ("defense, sha256 of the manifest", defense.manifest_sha256 or "not read from disk"),
        ]
    controls = explanation.controls
    listed.append(
        ("latent sets", ", ".join(dict.fromkeys(item.set_name for item in explanation.removed)) or "none fired")
    )
    if controls.sets is not None:
        listed.append(("only the sets", ", ".join(controls.sets) or "none"))
    listed.append(("strength", f"{controls.strength:g}"))
    listed.append(("edit", controls.edit or "each set's own"))
    if controls.off:
        listed.append(("left alone", ", ".join(f"{latent} at {point}" for point, latent in sorted(controls.off))))
    if controls.steer:
        steered = (f"{latent} at {point} to {value:g}" for (point, latent), value in controls.steer.items())
        listed.append(("steered", ", ".join(steered)))
    return listed


def sized(picture: Image.Image, box: Box, least: int, most: int) -> tuple[Image.Image, Box]:
    """Return a picture whose longer side has `least` to `most` pixels, and the box of the same part of it."""
    longest = max(picture.size)
    factor = min(max(longest, least), most) / longest
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    left, upper, right, lower = (round(edge * factor) for edge in box)
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), (left, upper, right, lower)


def seen_part(picture: Image.Image, box: Box, side: int) -> Image.Image:
    """Return the part of a picture that the model saw, `side` pixels wide."""
    left, upper, right, lower = box
    return picture.crop(box).resize((side, max(1, round(side * (lower - upper) / (right - left)))))
