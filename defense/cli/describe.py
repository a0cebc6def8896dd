"""`defense describe`: a catalogue of an SAE's latents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from defense.cli.common import (
    EXIT_INPUTS,
    MAX_PIXELS,
    Device,
    MaxPixels,
    Model,
    Pretrained,
    app,
    check_pretrained,
    check_there,
    coding_lines,
    exit_codes,
    log_warnings,
    put,
    say,
    say_passed_over,
    shown,
)
from defense.cli.progress import stages
from defense.hosts.shipped import DEFAULT

if TYPE_CHECKING:
    from defense.explain.catalogue import Catalogue


Lens = Literal["whole", "attention"]


# Longer than functions here are: the options of a command are its parameters, one line each.
@app.command()
def describe(
    sae: Annotated[list[Path], typer.Argument(help="SAEs that `defense train` or `import` wrote, one per block.")],
    pictures: Annotated[
        list[Path], typer.Option(help="Folder with pictures, .tar or .parquet files; or such a file. May come again.")
    ],
    words: Annotated[Path, typer.Option(help="Candidates for names, one a line.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the catalogue; <defense>.catalogue is found by itself.")
    ],
    model: Model = DEFAULT,
    pretrained: Pretrained = None,
    n_top: Annotated[int, typer.Option(min=1, help="Pictures to keep per latent.")] = 8,
    n_names: Annotated[int, typer.Option(min=1, help="Words to keep per latent.")] = 3,
    n_steered: Annotated[
        int, typer.Option(min=2, help="Pictures to steer each latent on; takes most of the time.")
    ] = 4,
    n_sampled: Annotated[
        int, typer.Option(min=1, help="Latents, neurons, channels and random directions to steer at each strength.")
    ] = 64,
    embeds: Annotated[
        Path | None, typer.Option(help="The pictures' embeddings by another encoder (.npz), for monosemanticity.")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Classes of the pictures, one a line: the latents of each, and what masking them does."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Another CLIP, as --model names one: what training it on did to the latents of the first."),
    ] = None,
    against_pretrained: Annotated[
        str | None,
        typer.Option(
            help="Weights of --against: a tag, or the path of a file. Without --against: other weights of --model."
        ),
    ] = None,
    phrases: Annotated[
        Path | None,
        typer.Option(help='Templates for longer names, one a line, such as "a red {}": names by search.'),
    ] = None,
    tree: Annotated[
        Path | None,
        typer.Option(help="Tree of --classes, a csv file with the columns class and parent: how general latents are."),
    ] = None,
    lens: Annotated[
        Lens, typer.Option(help="What names follow: all that comes behind a latent, or later attention alone.")
    ] = "whole",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the pictures drawn for names and steering.")] = 0,
    max_pixels: MaxPixels = MAX_PIXELS,
    device: Device = "auto",
) -> None:
    """Say of each latent when it fires, what it does to the answer, and which words name it."""
    log_warnings()
    with exit_codes():
        from defense.data.images import Limits
        from defense.data.labels import read_labels, resolve_templates
        from defense.data.sources import open_pictures
        from defense.explain import catalogue, describe
        from defense.explain.other_encoder import read_embeds
        from defense.explain.taxonomy import read_tree
        from defense.hosts.clip import load_clip
        from defense.store import checkpoint

        check_pretrained(model, pretrained)
        if against_pretrained is not None:
            against = against or model
            check_pretrained(against, against_pretrained)
        check_there(*sae, words, embeds, classes, phrases, tree)
        if tree is not None and classes is None:
            raise typer.BadParameter(f"--tree {shown(tree)} is of the pictures' classes; give these, with --classes")
        catalogue.check_target(out)
        names, source = read_labels(words), open_pictures(pictures, limits=Limits(max_pixels=max_pixels))
        class_names = () if classes is None else read_labels(classes)
        templates = () if phrases is None else resolve_templates(read_labels(phrases))
        taxonomy = None if tree is None else read_tree(tree)
        if taxonomy is not None:
            for name in class_names:
                taxonomy.path_of(name)
        for picture in source if class_names else ():
            source.class_of(picture, class_names)
        encoder = None if embeds is None else read_embeds(embeds)
        found = [checkpoint.load(folder) for folder in sae]
        clip = load_clip(model, pretrained, device=device)
        for each in found:
            each.check_clip(clip.tower)
        other = None if against is None else load_clip(against, against_pretrained, device=device)
        unreadable: set[str] = set()
        made_from = {"pictures": source.fingerprint, "host_model": model, "pretrained": pretrained}
        if against is not None:
            made_from |= {"against_model": against, "against_pretrained": against_pretrained}
        catalogues = []
        with stages() as progress:
            for each in found:
                progress.start(each.hook_point)
                stream = describe.examples(clip, source, unreadable.add, class_names)
                catalogues.append(
                    describe.describe(
                        clip, each.hook_point, each.sae, stream, names, n_top=n_top, n_names=n_names,
                        n_steered=n_steered, n_probed=max(16, n_steered), n_sampled=n_sampled, encoder=encoder,
                        classes=class_names, against=other, phrases=templates, tree=taxonomy, lens=lens,
                        seed=seed, provenance=made_from,
                    )
                )  # fmt: skip
        catalogue.save(catalogues, out)
        for table in catalogues:
            _print_catalogue(table)
        say_passed_over(source)
        if unreadable:
            say(f"{len(unreadable)} pictures could not be read and were left out")
            raise typer.Exit(EXIT_INPUTS)


def _print_catalogue(table: Catalogue) -> None:
    """Print what a catalogue says of its SAE as a whole."""
    from defense.core.norms import HighNorm
    from defense.explain import against, by_class, naming, searching, taxonomy

    n_firing, n_pictures = int((table.columns["frequency"] > 0).sum()), table.provenance["n_pictures"]
    put(f"{table.hook_point}  {n_firing} of {table.d_sae} latents fire, on {n_pictures} pictures")
    for line in coding_lines(table.provenance["tokens"]):
        put(f"  {line}")
    if table.provenance["high_norm"] is not None:
        put(f"  high norm: {HighNorm(**table.provenance['high_norm']).words()}")
    _print_baselines(table.provenance["baselines"])
    if "classes" in table.provenance:
        for line in by_class.lines_of(table.provenance["classes"]):
            put(f"  {line}")
    put(f"  {naming.wording_line(table.provenance['wording'])}")
    for line in naming.effect_lines(table.columns):
        put(f"  {line}")
    if "tree" in table.provenance:
        put(f"  {taxonomy.line_of(table.provenance['tree'])}")
    if "phrases" in table.provenance:
        for line in searching.lines_of(table.provenance["phrases"]):
            put(f"  {line}")
    if (compared := table.provenance.get("against")) is not None:
        for line in (*against.lines_of(compared), *coding_lines(compared["tokens"])):
            put(f"  against: {line}")


def _print_baselines(baselines: dict[str, Any]) -> None:
    """Print what latents come to beside neurons, channels and random directions."""
    swept, likeness = baselines["steerability"], baselines["monosemanticity"]
    put(f"  % steerable (S > {swept['threshold']:g}) [95 %]; words reached of {swept['n_words']}; by strength")
    put("  " + " " * 10 + "".join(f"{strength:>20g}" for strength in swept["strengths"]))
    for kind, figures in swept["kinds"].items():
        columns = zip(*(figures[name] for name in ("share", "low", "high", "n_words_reached")), strict=True)
        cells = (f"{100 * x:.0f} [{100 * low:.0f}-{100 * high:.0f}]; {n}" for x, low, high, n in columns)
        put(f"  {kind:10}" + "".join(f"{cell:>20}" for cell in cells))
    verdict = "" if swept["separates"] else ", where the intervals of latents and random directions overlap"
    put(f"  the column steerability is at strength {swept['strength']:g}{verdict}")
    medians = (
        f"{kind} {found['median']:.3f} [{found['low']:.3f}-{found['high']:.3f}]"
        for kind, found in likeness["kinds"].items()
        if found["n"]
    )
    put(f"  monosemanticity, median [95 %]: {', '.join(medians)}; all pairs {likeness['all_pairs']:.3f}")
    put(f"  by embeddings of {likeness['encoder']}")
    if baselines["no_neurons"]:
        say(f"no neurons: {baselines['no_neurons']}")
