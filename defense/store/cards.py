"""The card of a defense: what a repository on the hub says of it, made from its manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from defense.core.intervals import wilson
from defense.hosts.defense import Defense

MARK = "<!-- made by defense push -->"
"""In every card that was made here: one without it is a person's, and stays."""

_HUB_LICENSES = {"MIT", "Apache-2.0", "BSD-3-Clause", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC0-1.0"}
_MEASURES = {
    "clean": "right, nothing written",
    "neutral": "right, an empty plate",
    "attacked": "right, another word written",
    "attack_success": "the written word is the answer",
    "average": "right, mean over groups",
    "weighted": "right, groups as frequent as in training",
    "worst": "right, worst group",
}


def card(defense: Defense, repo: str) -> str:
    """Return a card in Markdown with the hub's front matter.

    Args:
        defense: The defense.
        repo: Where it is published, for the lines on how to use it.
    """
    sections = [
        _front(defense),
        MARK,
        f"# {repo.partition('/')[2]}",
        _what(defense),
        _weak(defense),
        _use(defense, repo),
    ]
    sections += [_figures(defense.provenance), _origin(defense), _LIMITS]
    return "\n\n".join(section for section in sections if section) + "\n"


_LIMITS = """## Limits

It is bound to the weights above by their fingerprint, and refuses others. It was fitted on the pictures and labels
named here; on others, measure it first: `defense bench --help`."""


def _front(defense: Defense) -> str:
    license = defense.license.lower() if defense.license in _HUB_LICENSES else "other"
    return "\n".join(
        (
            "---",
            f"license: {license}",
            "library_name: clip-defense",
            "pipeline_tag: zero-shot-image-classification",
            "tags:",
            "- clip",
            "- sparse-autoencoder",
            "- typographic-attack",
            "---",
        )
    )


def _what(defense: Defense) -> str:
    clip = defense.clip
    gelu = ", QuickGELU" if clip.quick_gelu else ""
    lines = [
        f"A defense of the CLIP `{clip.name}` ({clip.n_layers} blocks, {clip.d_model} wide{gelu}), for clip-defense. "
        "It takes out of the residual stream what some latents of a sparse autoencoder write there.",
        f"The vision tower's weights have the fingerprint `{clip.sha256}`; it works with these, whatever their name.",
        "| block | SAE | latents edited | edit | tokens |",
        "|---|---|---|---|---|",
    ]
    for site in defense.sites:
        sae = site.sae_config
        for each in site.sets:
            lines.append(
                f"| {site.hook_point} | {sae.act}, {sae.d_sae} latents | {each.name}: {len(each.latents)} | "
                f"{each.edit} | {each.tokens} |"
            )
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])


def _weak(defense: Defense) -> str:
    weak = defense.provenance.get("weak")
    return f"**Weak: {weak}.**" if isinstance(weak, str) else ""


def _use(defense: Defense, repo: str) -> str:
    return f"""## Use

```python
from defense import RobustClassifier
clf = RobustClassifier.from_pretrained("{repo}")
clf("picture.jpg", candidate_labels=["dog", "cat"])
```

`from_pretrained` loads `{defense.clip.name}`; for the same weights under another name, give `model=` and
`pretrained=`."""


def _figures(provenance: Mapping[str, Any]) -> str:
    """Return what was measured on held-out pictures, with intervals; nothing where nothing was."""
    validation = provenance.get("cross_validation")
    validation = validation if isinstance(validation, Mapping) else {}
    held_out = validation.get("held_out", validation.get("fitted_on"))
    if not isinstance(held_out, Mapping) or not held_out:
        return ""
    pictures = provenance.get("pictures")
    n = pictures.get("n") if isinstance(pictures, Mapping) else None
    rows = list(_rows(held_out, n if isinstance(n, int) and n > 0 else None))
    of = f"{n} pictures" if isinstance(n, int) else "pictures"
    how = (
        f"Cross-validated on {of}, each held out once" if "held_out" in validation else f"On the {of} it was fitted on"
    )
    lines = [f"{how}; in percent, with 95 % intervals where the number of pictures is known."]
    gained = validation.get("gain_interval")
    if isinstance(gained, list) and len(gained) == 2:
        low, high = gained
        lines += ["", f"Gained on what it is for: {100 * low:+.1f} to {100 * high:+.1f} points (95 % interval)."]
    return "\n".join(["## Figures", "", *lines, "", "| | plain | defended |", "|---|---|---|", *rows])


def _rows(held_out: Mapping[str, Any], n: int | None) -> Iterator[str]:
    for key, values in held_out.items():
        if isinstance(values, Mapping) and {"plain", "defended"} <= values.keys():
            # A group has fewer pictures than all: its interval would be too narrow.
            counted = n if key in ("clean", "neutral", "attacked", "attack_success") else None
            cells = " | ".join(_share(values[side], counted) for side in ("plain", "defended"))
            yield f"| {_MEASURES.get(key, f'right, group {key}')} | {cells} |"


def _share(share: float, n: int | None) -> str:
    if n is None:
        return f"{100 * share:.1f}"
    _, low, high = wilson(share * n, n)
    return f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _origin(defense: Defense) -> str:
    """Return which SAEs and pictures it was made with, and under which licenses."""
    provenance = defense.provenance
    saes = provenance.get("saes")
    lines = [f"- License of the defense, which holds weights of the SAE: {defense.license}"]
    for sae in saes if isinstance(saes, Sequence) and not isinstance(saes, str) else ():
        if isinstance(sae, Mapping):
            source = sae.get("hub") or sae.get("file") or "trained by its author"
            lines.append(f"- SAE at {sae.get('hook_point')}: {source}")
    pictures = provenance.get("pictures")
    if isinstance(pictures, Mapping):
        lines.append(
            f"- Pictures: {pictures.get('n')} ({pictures.get('kind')}); none of them is in here, and their license is "
            "not recorded"
        )
    return "\n".join(["## Made from", "", *lines])
