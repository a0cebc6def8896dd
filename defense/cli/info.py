"""`defense info`: what a defense, a bundle or an SAE is, after checking every byte of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from defense.cli.common import app, check_pretrained, coding_lines, exit_codes, put, say, shown
from defense.errors import CheckpointError, MissingDependencyError, cannot_import
from defense.hosts import shipped
from defense.hosts.defense import Defense
from defense.hosts.shipped import DEFAULT
from defense.store import folders

_N_OF_A_LIST = 8
"""Elements of a list that are shown."""
_DEPTH = 8
"""Values within others that get lines of their own; a manifest from elsewhere may hold any number."""


@app.command()
def info(
    source: Annotated[str, typer.Argument(help='"photo", "embedded", a folder, or a hub id.')] = DEFAULT,
    expect: Annotated[str | None, typer.Option(help="sha256 that the manifest must have.")] = None,
    check: Annotated[
        bool,
        typer.Option(help="Recompute golden vectors; a defense's on its host. A bundle's and an SAE's always are."),
    ] = False,
    model: Annotated[str | None, typer.Option(help="open_clip model for --check.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag for --check.")] = None,
) -> None:
    """Say what a defense, an exported bundle or an SAE is, after checking every byte of it."""
    with exit_codes():
        folders.restore(Path(source))
        if (Path(source) / "sae.json").is_file():
            _refuse_host(model, pretrained)
            _print_sae(Path(source), expect)
            return
        from defense.export import bundle
        from defense.store.defenses import MANIFEST, find_defense

        if bundle.is_bundle(source):
            _refuse_host(model, pretrained)
            _print_bundle(source, expect, check=check)
            return
        if shipped.find(source) is None and Path(source).is_dir() and not (Path(source) / MANIFEST).is_file():
            raise CheckpointError(
                f"{source} is no defense (as `defense fit` writes), no bundle (`defense export`) and no SAE "
                "(`defense train`): none of their manifests is in it, so check the path"
            )
        check_pretrained(model, pretrained)
        defense = find_defense(source)
        manifest = defense.manifest_sha256
        _check_pinned(manifest, expect)
        tag = f", {defense.clip.pretrained}" if defense.clip.pretrained else ""
        put(f"host        {defense.clip.model}{tag}, weights {defense.clip.sha256[:16]}")
        put(f"manifest    {manifest}")
        put(f"license     {defense.license}")
        for site in defense.sites:
            sae = site.sae_config
            put(f"site        {site.hook_point}: {sae.act} SAE, {sae.d_sae} latents")
            if site.part is not None:
                put(f"  slim      holds just the {len(site.part.latents)} latents that it edits")
            elif sae.couples_latents:
                put("  whole     its latents compete: tokens on which one of S is positive meet the whole encoder")
            for latent_set in site.sets:
                put(
                    f"  set       {latent_set.name}: {len(latent_set.latents)} latents, edit {latent_set.edit}, "
                    f"tokens {latent_set.tokens}"
                )
        for line in _in_lines(defense.provenance):
            put(line)
        if check:
            _check_golden(defense, source, model, pretrained)


def _in_lines(values: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yield a line for each of JSON's values, those within others further to the right; the end of a long list is cut.

    Args:
        values: By name.
        indent: What each line begins with.
    """
    for name, value in values.items():
        named = f"{indent}{name:{max(0, 11 - len(indent))}}"
        rows = value if isinstance(value, list) else [value]
        if rows and len(indent) < 2 * _DEPTH and all(isinstance(row, Mapping) for row in rows):
            for row in rows:
                yield named.rstrip()
                yield from _in_lines(row, f"{indent}  ")
            continue
        shown_rows = ", ".join(map(_short, rows[:_N_OF_A_LIST]))
        more = f", ... ({len(rows):,} in all)" if len(rows) > _N_OF_A_LIST else ""
        yield f"{named} {shown_rows}{more}".rstrip()


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value if value.isprintable() else repr(value)  # a line break could look like a line of ours
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def _check_pinned(manifest: str | None, expect: str | None) -> None:
    if expect is not None and expect != manifest:
        raise CheckpointError(f"the manifest's sha256 is {manifest}, not {expect}: it was changed, or is another one")


def _refuse_host(model: str | None, pretrained: str | None) -> None:
    if model is not None or pretrained is not None:
        raise typer.BadParameter("--model and --pretrained are for a defense; a bundle or an SAE is checked without")


def _print_sae(folder: Path, expect: str | None) -> None:
    """Print what an SAE is, after checking every byte of it, and that it still gives the golden activations."""
    try:
        from defense.store import checkpoint
    except (ImportError, OSError) as error:
        raise cannot_import("torch", error) from error
    manifest = folders.sha256_of(folder / checkpoint.MANIFEST)
    found = checkpoint.load(folder)
    _check_pinned(manifest, expect)
    put(f"host        {found.host_model or 'not stated'}")
    put(f"manifest    {manifest}")
    put(f"license     {found.license}")
    put(f"hook point  {found.hook_point}")
    for key, value in found.sae.config.to_dict().items():
        put(f"{key:11} {value}")
    quality = found.provenance.get("quality")
    by_kind = quality.get("by_kind") if isinstance(quality, dict) else None  # of an import it may be anything
    for key, value in found.provenance.items():
        has_kinds = key == "quality" and by_kind is not None
        told = {n: v for n, v in value.items() if n != "by_kind"} if has_kinds else value
        for line in _in_lines({key: told}):
            put(line)
    for line in coding_lines(by_kind or {}):
        put(line)
    put("golden      acts and reconstructions reproduced")
    say(f"Fit a defense with it: defense fit OUT PICTURES --sae {shown(folder)}")


def _print_bundle(source: str, expect: str | None, *, check: bool) -> None:
    """Print what a bundle is, after checking every byte of it, and that its graph still gives the golden embeddings.

    Args:
        source: The bundle.
        expect: sha256 that its manifest must have, or None.
        check: Raise where the graph cannot be run here; else that is said, and no error.
    """
    from defense.export import bundle
    from defense.export.runtime import OnnxClassifier

    found = bundle.load(source)
    _check_pinned(found.manifest_sha256, expect)
    clip = " ".join(filter(None, (found.clip.get("model"), found.clip.get("pretrained"))))
    put(f"host        {clip or 'unnamed'}, weights {found.clip['sha256'][:16]}")
    put(f"manifest    {found.manifest_sha256}")
    put(f"license     {found.license}")
    put(f"graph       {found.model}, {found.mode}, {found.dtype}")
    put(f"labels      {len(found.prompts.labels)}, {'others by text.onnx' if found.text_model else 'fixed'}")
    for site in found.defense["sites"] if found.defense else ():
        put(f"site        {site['hook_point']}: {site['act']} SAE, {site['d_sae']} latents")
        for each in site["sets"]:
            put(f"  set       {each['name']}: {each['latents']} latents, edit {each['edit']}, tokens {each['scope']}")
    try:
        clf = OnnxClassifier(source, verify="size")  # the bytes were checked above
    except MissingDependencyError as error:
        if check:
            raise
        say(f"golden embeddings not checked: {error}")
        return
    put(f"strength    {'0 to 1, 1 by default' if clf.has_strength else 'fixed'}")
    put(f"golden      reproduced on {clf.running_on}, max difference {clf.check_golden():.1e}")


def _check_golden(defense: Defense, source: str, model: str | None, pretrained: str | None) -> None:
    from defense.classify.classifier import RobustClassifier
    from defense.hosts.golden import check_golden

    if defense.golden is None:
        raise CheckpointError("this defense holds no golden vectors to check")
    clf = RobustClassifier.from_pretrained(source, model=model, pretrained=pretrained, device="cpu")
    difference = check_golden(clf.clip, defense.golden)
    put(f"golden      reproduced, max difference {difference:.1e}")
