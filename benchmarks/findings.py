"""What was found that does not flatter the defense, in sentences whose every figure comes from stored results.

A statement that the stored results cannot make says which run would make it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from defense.benchmarks.robust_results import read_results
from defense.benchmarks.tables import BASELINE, BEFORE, OURS, cannot_work, change_words, is_draw, mean_and_range

MINI, PHOTO, SEEDS, LATENTS = "mini.json", "photo.json", "photo-seeds.json", "latents.json"
_DYSLEXIFY, _LEACE = "dyslexify", "leace"
_WAYS = "photo-100-attacked-"
_SURE = 0.05
"""Above this p two methods are called level."""

Result = Mapping[str, Any]


class Found:
    """Stored results, by data set and method; files that are not there are taken to be empty.

    Args:
        folder: `benchmarks/results`.
    """

    def __init__(self, folder: Path) -> None:
        self.mini = read_results(folder / MINI) if (folder / MINI).exists() else []
        self.photo = read_results(folder / PHOTO) if (folder / PHOTO).exists() else []
        self.seeds, self.latents = (
            json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else None
            for name in (SEEDS, LATENTS)
        )
        self.by_place = {(each["dataset"], each["method"]): each["robust"] for each in [*self.mini, *self.photo]}

    def figure(self, dataset: str, method: str, name: str = "accuracy") -> str | None:
        """Return a figure in percent; None where it was not measured."""
        robust = self.by_place.get((dataset, method))
        return None if robust is None else f"{100 * robust['figures'][name]['value']:.1f}"

    def before_and_after(self, dataset: str, name: str = "accuracy") -> str | None:
        """Return a figure of plain CLIP and of the defense; None where one was not measured."""
        plain, defended = (self.figure(dataset, method, name) for method in (BASELINE, OURS))
        return None if plain is None or defended is None else f"{plain} -> {defended} %"

    def against(self, dataset: str, other: str) -> Mapping[str, Any] | None:
        """Return how the defense does against another method on the same pictures; None where that is not known."""
        return self.by_place.get((dataset, OURS), {}).get("versus", {}).get(other)


def _place(found: Mapping[str, Any]) -> str:
    """Return whether the defense is ahead, behind or level by a paired test."""
    if found["p"] > _SURE:
        return "level"
    return "ahead" if found["difference"]["value"] > 0 else "behind"


def dyslexify_on_drawings(found: Found) -> str:
    """Return how the defense does against Dyslexify on the drawn world."""
    both = {kind: found.against(f"mini-typographic-{kind}", _DYSLEXIFY) for kind in ("attacked", "clean")}
    if None in both.values():
        return "**Dyslexify on drawings:** not measured; `defense bench mini --methods zero-shot,defense,dyslexify`."
    parts = [f"{kind} {change_words(each)}, {_place(each)}" for kind, each in both.items() if each]
    n = found.by_place["mini-typographic-attacked", OURS]["n"]
    return (
        "**Dyslexify** does without an SAE and silences the heads that read. On drawings, the defense less Dyslexify: "
        f"{'; '.join(parts)}. Points of accuracy, 95 % interval and McNemar's p; {n:,} pictures of one seed, of which "
        "`--seed 1` draws others."
    )


def dyslexify_on_photographs(found: Found) -> str:
    """Return how the defense does against Dyslexify on ways to write that nothing was tuned on."""
    ways = {name: found.against(name, _DYSLEXIFY) for name, _ in found.by_place if name.startswith(_WAYS)}
    known = {name.removeprefix(_WAYS): each for name, each in sorted(ways.items()) if each is not None}
    if not known:
        return "**Dyslexify on unseen styles:** not measured; `defense bench photo --data DATA --methods all`."
    listed = "; ".join(f"{name} {change_words(each)}, {_place(each)}" for name, each in known.items())
    return (
        f"**Dyslexify, unseen styles**: on photographs in typefaces that nothing was tuned on, the defense less "
        f"Dyslexify: {listed}. No tuning picture bears a word more than once. The drawn world has no further styles."
    )


def groups(found: Found) -> str:
    """Return what the defenses of tasks with groups cost."""
    parts = []
    for name in ("waterbirds", "celeba"):
        weighted = found.before_and_after(f"mini-{name}-test", "accuracy_adjusted")
        worst = found.before_and_after(f"mini-{name}-test", "worst_group")
        leace = found.figure(f"mini-{name}-test", _LEACE, "worst_group")
        if weighted is not None:
            beside = "" if leace is None else f" (LEACE {leace} %)"
            parts.append(f"mini-{name} {weighted}, worst group {worst}{beside}")
    if not parts:
        return "**Tasks with groups:** not measured; `defense bench mini`."
    return (
        "**Tasks with groups.** Accuracy weighted as the CLIP was trained, and of the worst group, plain -> defended: "
        f"{'; '.join(parts)}."
    )


def reach(found: Found) -> str:
    """Return how much of what reading took the defense brings back on photographs."""
    places = sorted({name for name, method in found.by_place if name.startswith(_WAYS) and method == BEFORE})
    rows = {
        method: [100 * found.by_place[place, method]["figures"]["accuracy"]["value"] for place in places]
        for method in (BASELINE, OURS, BEFORE)
    }
    if not places:
        return "**How far a defense can lead on photographs:** not measured; `defense bench photo --data DATA`."
    plain, ours, before = (sum(values) / len(values) for values in rows.values())
    behind = max(zip(rows[BEFORE], rows[OURS], places, strict=True), key=lambda row: row[0] - row[1])
    plate = found.figure("photo-100-neutral", OURS)
    return (
        "**How far a defense can lead on photographs.** Letters disturb a picture network that cannot read, too, as "
        f"any pattern does. Right answers to attacked photographs, mean over {len(places)} ways to write: plain "
        f"{plain:.1f} %, defended {ours:.1f} %, the same CLIP before it learned to read {before:.1f} %. So the defense "
        f"takes back {ours - plain:.1f} of the {before - plain:.1f} points that reading took; an empty plate ({plate} "
        "%) is out of reach for what acts behind the picture network. Most is left in "
        f"{behind[2].removeprefix(_WAYS)}: {behind[1]:.1f} of {behind[0]:.1f} %."
    )


def _reading(found: Found, variant: str, title: str, more: str) -> str:
    """Return what happens to pictures whose words are evidence."""
    parts = []
    for name, dataset, command in (
        ("photographs", "photo-100", "defense bench photo --data DATA"),
        ("drawings", "mini-typographic", "defense bench mini"),
    ):
        shown = found.before_and_after(f"{dataset}-{variant}")
        parts.append(f"{name} " + (shown or f"not measured yet (`{command}` does)"))
    return f"**{title}** Right answers, plain -> defended: {'; '.join(parts)}.{more}"


def own_name(found: Found) -> str:
    """Return what happens to a thing with its own name on it."""
    half = found.figure("photo-100-own-name", f"{OURS}@0.5")
    rival = found.figure("photo-100-own-name", _DYSLEXIFY)
    more = "" if half is None else f" On photographs at half strength {half} %."
    more += "" if rival is None else f" Dyslexify: {rival} %."
    before = found.figure("photo-100-own-name", BEFORE)
    more += "" if before is None else f" The same CLIP before it could read: {before} %."
    return _reading(found, "own-name", "A thing with its own name on it.", more)


def word_only(found: Found) -> str:
    """Return what happens to a picture that shows a word and nothing else."""
    return _reading(found, "word-only", "A picture of nothing but a word, to be read.", "")


def repeated(found: Found) -> str:
    """Return how often a word wins that stands there three times."""
    shown = found.before_and_after(f"{_WAYS}repeated", "attack_success")
    if shown is None:
        return "**A word written three times:** not measured; `defense bench photo --data DATA`."
    return (
        f"**A word written three times** is the answer on {shown} of photographs, plain -> defended. "
        "On drawings there is one word a picture, so that was not measured."
    )


def seeds(found: Found) -> str:
    """Return how much the figures depend on the seed of the fit."""
    parts = []
    if found.seeds is not None:
        rows = found.seeds["rows"]
        sha256 = found.by_place.get(("photo-100-clean", OURS), {}).get("settings", {}).get("defense_sha256")
        ours = [str(row["seed"]) for row in rows if row["sha256"] == sha256]
        which = f"; the tables show seed {ours[0]}" if ours else ""
        figures = mean_and_range([row["attacked"] for row in rows])
        parts.append(f"attacked photographs {figures} % of {len(rows)} seeds{which}")
    if found.latents is not None and found.latents["rows"]:
        values = [100 * each for each in found.latents["rows"]["ours"]["by_seed"]["attacked"]]
        parts.append(f"attacked drawings, edited at one block, {mean_and_range(values)} % of {len(values)} seeds")
    parts.append("the defenses of drawings that ship were fitted with one seed, so their range is not known")
    return f"**Seeds of the fit**, mean (lowest to highest): {'; '.join(parts)}."


def _draws(values: Sequence[float]) -> str:
    return f"{len(values)} draws" if len(values) > 1 else "a single draw"


def random_latents(found: Found) -> str:
    """Return how far random latents differ from draw to draw."""
    parts = []
    for name, dataset in (("drawings", "mini-typographic-attacked"), ("photographs", f"{_WAYS}print")):
        values = [
            100 * robust["figures"]["accuracy"]["value"]
            for (place, method), robust in found.by_place.items()
            if place == dataset and is_draw(method)
        ]
        plain = found.figure(dataset, BASELINE)
        if values:
            parts.append(f"{name} {mean_and_range(values)} % of {_draws(values)}, plain CLIP {plain} %")
    if found.latents is not None and found.latents["rows"]:
        values = [100 * each for each in found.latents["rows"]["random, as many"]["by_seed"]["attacked"]]
        parts.append(f"drawings, at one block and removed in full, {mean_and_range(values)} % of {_draws(values)}")
    if not parts:
        return "**Random latents:** not measured; `defense bench mini --methods all`."
    return f"**Random latents,** by draw, attacked pictures right: {'; '.join(parts)}."


def unable(found: Found) -> str:
    """Return which methods rest on what a text tower lacks."""
    from defense.benchmarks.methods import FACTORIES

    names = [name for name, factory in FACTORIES.items() if factory.record.needs_context]
    tested = [each for each in found.mini if "cannot_work" in each["robust"]]
    if not tested:
        return (
            f"**{', '.join(names)}** rest on a text tower that tells a name from the same name among other words. "
            "These results are older than the test of that: on drawings, read nothing into these rows."
        )
    return (
        f"**{', '.join(names)}** rest on a text tower that tells a name from the same name among other words. On "
        f"drawings they {'cannot work: ' + '; '.join(reasons) if (reasons := _reasons(tested)) else 'can work'}."
    )


def _reasons(results: Sequence[Result]) -> list[str]:
    return [f"{name}: {why.partition(': ')[2]}" for name, why in cannot_work(results).items()]


ALL: tuple[Callable[[Found], str], ...] = (
    dyslexify_on_drawings,
    dyslexify_on_photographs,
    groups,
    reach,
    own_name,
    word_only,
    repeated,
    seeds,
    random_latents,
    unable,
)
LIMITS = (reach, own_name, word_only, repeated, groups)
"""What somebody who puts the defense into production has to know."""


def as_list(folder: Path, statements: Sequence[Callable[[Found], str]] = ALL) -> str:
    """Return statements about the results in a folder as a Markdown list.

    Raises:
        ConfigError: See `read_results`.
    """
    found = Found(folder)
    return "\n".join(f"- {statement(found)}" for statement in statements)
