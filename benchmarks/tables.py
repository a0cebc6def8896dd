"""Results as Markdown: a table per task, a row per method, and a caption that says what the figures rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from defense.benchmarks import method_tables
from defense.benchmarks.environment import machine_words
from defense.benchmarks.method_tables import laid_out
from defense.errors import ConfigError

BASELINE = "zero-shot"
OURS = "defense"
RANDOM = "random-latents"
BEFORE = "before-reading"
CANNOT_WORK = "cannot work here"
"""In place of the figures of a method that lacks what it rests on; the reason stands below the table."""
_MUST_AGREE = (
    "shortfall", "n", "n_unreadable", "choice", "class_names", "templates", "normalise_each", "data_sha256",
    "host_sha256", "preprocess", "train_counts", "facts", "seed",
)  # fmt: skip
_N_TEMPLATES_SHOWN = 2

Result = Mapping[str, Any]


def markdown(results: Sequence[Result]) -> str:
    """Return the tables of all tasks; tasks and methods by name, the baseline first.

    Raises:
        ConfigError: Results of one data set differ in classes, prompts, pictures or CLIP.
    """
    check_comparable(results)
    tasks = sorted({(result["robust"]["task"], result["model"], result["pretrained"]) for result in results})
    return "\n\n".join(
        _section([r for r in results if (r["robust"]["task"], r["model"], r["pretrained"]) == task]) for task in tasks
    )


def check_comparable(results: Sequence[Result]) -> None:
    """Raise `ConfigError` where results that share a table do not share what they were asked.

    Results of one data set and CLIP are compared; two with the same method are refused as well.
    """
    first: dict[tuple[str, ...], Result] = {}
    methods: set[tuple[str, ...]] = set()
    for result in results:
        place = (result["dataset"], result["model"], result["pretrained"])
        other = first.setdefault(place, result)
        for name in _MUST_AGREE:
            if result["robust"][name] != other["robust"][name]:
                raise ConfigError(
                    f"{result['method']} and {other['method']} on {', '.join(place)} differ in {name}, so they cannot "
                    "share a table; measure both in one run"
                )
        if (*place, result["method"]) in methods:
            raise ConfigError(f"there are two results of {result['method']} on {', '.join(place)}")
        methods.add((*place, result["method"]))


def clip_name(result: Result) -> str:
    """Return what the CLIP of a result is called, and whether its weights mean anything."""
    if result["robust"]["has_random_weights"]:
        return f"{result['model']}, **random weights: a rehearsal, no figure means anything**"
    return ", ".join(dict.fromkeys((result["model"], result["pretrained"])))


def in_order(results: Sequence[Result]) -> list[Result]:
    """Return results sorted: clean pictures before attacked ones, then the baseline first and the rest by name."""

    def place(result: Result) -> tuple[Any, ...]:
        robust, method = result["robust"], result["method"]
        return robust["variant"] != "clean", robust["is_attacked"], robust["variant"], method != BASELINE, method

    return sorted(results, key=place)


def _section(results: Sequence[Result]) -> str:
    results = in_order(results)
    datasets = list(dict.fromkeys(result["dataset"] for result in results))
    methods = list(dict.fromkeys(result["method"] for result in results))
    by_place = {(result["dataset"], result["method"]): result for result in results}
    headings = ["method"]
    rows: list[list[str]] = [[_row_name(method, results)] for method in methods]
    for dataset in datasets:
        first = next(result for result in results if result["dataset"] == dataset)
        is_main = first["robust"]["is_attacked"] or first["robust"]["groups"]
        others = [BASELINE, OURS] if is_main and len(methods) > 2 and (dataset, OURS) in by_place else [BASELINE]
        names = _columns(first, others)
        headings += names
        for row, method in zip(rows, methods, strict=True):
            found = by_place.get((dataset, method))
            row += ["-"] * len(names) if found is None else _cells(found, others)
    headings += ["ms", "MiB"]
    for row, method in zip(rows, methods, strict=True):
        row += _cost([result for result in results if result["method"] == method])
    rows += [[method, CANNOT_WORK, *["-"] * (len(headings) - 2)] for method in cannot_work(results)]
    parts = [f"### {results[0]['robust']['title']}", laid_out(headings, rows), _caption(results)]
    return "\n\n".join([*parts, *_draws(results), method_tables.tuning(results)])


def _row_name(method: str, results: Sequence[Result]) -> str:
    """Return a method's name and, where its thresholds were set on this task, how often the exact rule agrees."""
    found = next(result["robust"]["settings"].get("agreement") for result in results if result["method"] == method)
    return method if found is None else f"{method} (agrees {100 * found:.1f} %)"


def cannot_work(results: Sequence[Result]) -> dict[str, str]:
    """Return the methods that lack what they rest on, by name the reason; older results name none."""
    found = {
        name: result["robust"]["not_applicable"][name]
        for result in results
        for name in result["robust"].get("cannot_work", ())
    }
    return {name: found[name] for name in sorted(found)}


def is_draw(method: str) -> bool:
    """Return whether this is a draw of the control: what follows its "@" is a seed, no strength."""
    return method.partition("@")[0] == RANDOM


def mean_and_range(values: Sequence[float]) -> str:
    """Return percentages as their mean and, of more than one, the lowest and the highest."""
    mean = f"{sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def _draws(results: Sequence[Result]) -> list[str]:
    """Return a paragraph on how much the control differs from draw to draw; none where there is no control."""
    parts = []
    for dataset in dict.fromkeys(result["dataset"] for result in results):
        drawn = [each for each in results if each["dataset"] == dataset and is_draw(each["method"])]
        if drawn:
            robust, what = drawn[0]["robust"], "worst_group" if drawn[0]["robust"]["groups"] else "accuracy"
            values = [100 * each["robust"]["figures"][what]["value"] for each in drawn]
            name = "worst group" if what == "worst_group" else f"{robust['variant']} accuracy"
            parts.append(f"{name} {mean_and_range(values)}")
            n_draws = len(drawn)
    if not parts:
        return []
    spread = "mean (lowest to highest)" if n_draws > 1 else "how far draws differ was not measured"
    return [f"{RANDOM}, {n_draws} draw{'s'[: n_draws != 1]}, {spread}: {'; '.join(parts)}."]


def _columns(result: Result, others: Sequence[str]) -> list[str]:
    robust, variant = result["robust"], result["robust"]["variant"]
    against = [f"against {other}" for other in others]
    if robust["groups"]:
        adjusted = ["train-weighted average"] if "accuracy_adjusted" in robust["figures"] else []
        return ["worst group", "of", "average", *adjusted, "gap", *against]
    names = [f"{variant} accuracy", *against, *([] if robust["is_attacked"] else ["same answers"])]
    if robust["kinds"]:
        names.append(", ".join(robust["kinds"]))
    if robust["is_attacked"]:
        names += ["margin"] if robust["choice"] == "pair" else ["attack success", "object over word", "margin"]
    return names


def _cells(result: Result, others: Sequence[str]) -> list[str]:
    robust = result["robust"]
    figures = robust["figures"]
    against = [_against(result, other) for other in others]
    if robust["groups"]:
        worst = min(robust["groups"], key=lambda name: robust["groups"][name][1])
        adjusted = [_percent(figures["accuracy_adjusted"])] if "accuracy_adjusted" in figures else []
        cells = [_percent(figures["worst_group"]), worst, _percent(figures["accuracy"]), *adjusted]
        return [*cells, _percent(figures["gap"]), *against]
    cells = [_percent(figures["accuracy"]), *against, *([] if robust["is_attacked"] else [_same(result)])]
    if robust["kinds"]:
        cells.append(", ".join(f"{100 * accuracy:.1f}" for _, accuracy in robust["kinds"].values()))
    if robust["is_attacked"]:
        if robust["choice"] != "pair":
            cells += [_percent(figures["attack_success"]), _percent(figures["object_over_word"])]
        margin = figures["margin"]
        cells.append(f"{margin['value']:.2f} ({margin['low']:.2f} to {margin['high']:.2f})")
    return cells


def _percent(figure: Mapping[str, float]) -> str:
    return f"{100 * figure['value']:.1f} ({100 * figure['low']:.1f} to {100 * figure['high']:.1f})"


def _against(result: Result, other: str) -> str:
    """Return the change of accuracy against another method, in points, with its interval and McNemar's p."""
    found = result["robust"]["versus"].get(other)
    return "-" if found is None else change_words(found)


def change_words(found: Mapping[str, Any]) -> str:
    """Return the change of accuracy from one method to another, of `metrics.versus`: points, 95 % interval and p."""
    change = found["difference"]
    p = f"{found['p']:.2g}" if found["p"] >= 1e-4 else "< 0.0001"
    return f"{100 * change['value']:+.1f} ({100 * change['low']:+.1f} to {100 * change['high']:+.1f}; p {p})"


def _same(result: Result) -> str:
    """Return the share of answers that are plain CLIP's, right or wrong; older results do not have it."""
    found = result["robust"]["versus"].get(BASELINE, {}).get("same")
    return "-" if found is None else _percent(found)


def _cost(results: Sequence[Result]) -> list[str]:
    runs = [result["robust"]["run"] for result in results]
    peaks = [run["peak_mib"] for run in runs if run["peak_mib"] is not None]
    n = sum(result["robust"]["n"] for result in results)
    ms = sum(result["robust"]["n"] * result["robust"]["run"]["encode_ms"] for result in results) / n
    return [f"{ms:.1f}", f"{max(peaks):.0f}" if peaks else "-"]


def _caption(results: Sequence[Result]) -> str:
    first = results[0]["robust"]
    lines = []
    if first["shortfall"]:
        lines.append(f"**Not the published data: {first['shortfall']}.**")
    if unreadable := {r["dataset"]: r["robust"]["n_unreadable"] for r in results if r["robust"]["n_unreadable"]}:
        counts = ", ".join(f"{count:,} of {name}" for name, count in unreadable.items())
        lines.append(f"**Incomplete: pictures that could not be read: {counts}.**")
    counts = ", ".join(
        f"{name} {n:,}" for name, n in dict.fromkeys((r["robust"]["variant"], r["robust"]["n"]) for r in results)
    )
    lines.append(f"{clip_name(results[0])}. Pictures: {counts}.")
    lines.append(f"{_question(first)} {_groups(first)}".strip())
    for name, why in (unable := cannot_work(results)).items():
        lines.append(f"{CANNOT_WORK[0].upper()}{CANNOT_WORK[1:]}: {name}: {why}.")
    reasons = {name: why for r in results for name, why in r["robust"]["not_applicable"].items()}
    measured = {r["method"] for r in results}
    left_out = [name for name in reasons if name not in measured and name not in unable]
    for why in dict.fromkeys(reasons[name] for name in left_out):
        lines.append(f"Not applicable: {', '.join(name for name in left_out if reasons[name] == why)}: {why}.")
    hashes = {
        r["method"]: r["robust"]["settings"]["defense_sha256"][:16]
        for r in results
        if "defense_sha256" in r["robust"]["settings"]
    }
    if hashes:
        lines.append("Defenses (sha256 of the manifest): " + ", ".join(f"{k} {v}" for k, v in hashes.items()) + ".")
    lines.append(
        "Percent, and 95 % bootstrap intervals over pictures. Against a method: points of accuracy, and p of McNemar's "
        "exact test, not corrected for the number of tests. Same answers: as zero-shot's, right or wrong. Margin: "
        "logit of the object less that of the word. ms: per picture. MiB: at the peak of a chunk, above what was held "
        "before. EXIF orientation is not applied."
    )
    lines += list(dict.fromkeys(machine_words(r["robust"]["run"]["environment"]) for r in results))
    return "\n".join(lines)


def _question(robust: Mapping[str, Any]) -> str:
    templates = robust["templates"]
    shown = ", ".join(f'"{template}"' for template in templates[:_N_TEMPLATES_SHOWN])
    if len(templates) > _N_TEMPLATES_SHOWN:
        shown = f"{len(templates)} templates ({shown}, ...)"
    if robust["choice"] == "pair":
        return f"Two-way, object or word, {shown}."
    names = robust["class_names"]
    which = ", ".join(names) if len(names) <= _N_TEMPLATES_SHOWN else f"{len(names)} classes"
    return f"Classes: {which} ({robust['facts'].get('class_rule', 'given')}), {shown}."


def _groups(robust: Mapping[str, Any]) -> str:
    if not robust["groups"]:
        return ""
    counts = ", ".join(f"{name} {n:,}" for name, (n, _) in robust["groups"].items())
    return f"Groups: {counts}."
