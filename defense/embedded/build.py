"""Rebuild the embedded model from its seed: `python -m defense.embedded.build WORK`.

Three stages, each kept in the folder WORK and resumed from there:

1. clip      draw the pictures, train the CLIP                        (train_clip.py)
2. sae       residuals of fresh pictures, a TopK SAE per edited block     (defense.train)
3. latents   for each task, choose S on fresh pictures                    (defense.fit)

and a report on pictures and fonts that none of them saw. Only with `--install` is the shipped model replaced.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

from defense.core.config import SAEConfig
from defense.core.sae import SparseAutoencoder
from defense.data import labels
from defense.data.labels import Prompts
from defense.embedded import train_clip
from defense.fit.calibrate import calibrated
from defense.fit.config import FitConfig
from defense.fit.control import activity_of, random_control
from defense.fit.encoded import Encoded
from defense.fit.material import Groups, Pairs
from defense.fit.shipping import LEAST_AGREEMENT
from defense.fit.sites import SitePlan, fit_sites
from defense.fit.validation import measure
from defense.hosts.clip import EMBEDDED, Clip, load_clip
from defense.hosts.defense import Defense, Site
from defense.hosts.golden import make_golden
from defense.hosts.shipped import MODELS
from defense.hosts.slim import restored, slim
from defense.hosts.tower import block_of
from defense.store import checkpoint, defenses, folders
from defense.store.checkpoint import Checkpoint
from defense.train.quality import measure as measure_sae
from defense.train.runs import train_in_memory
from defense.train.trainer import TrainConfig
from defense.world import draws, scenes
from defense.world.draws import GROUPINGS, Grouping, web_scenes
from defense.world.files import world_sha256
from defense.world.scenes import Scene

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
SEEDS = {"sae": 31, "sae_test": 32, "fit": 41, "report": 97, "benchmark": 101, "golden": 7, "examples": 11}
"""One stream of pictures each, all apart from the training pictures'."""


@dataclass(frozen=True)
class SiteRecipe:
    """One edited block: its SAE and its selection.

    Attributes:
        block: Which.
        train: Settings of the SAE.
        fit: Settings of the selection.
        group_share: Part of the pictures that the SAE is trained on that are birds and faces of the tasks with groups;
            the rest are of the kind that the CLIP was trained on.
    """

    block: int
    train: TrainConfig
    fit: FitConfig
    group_share: float = 0.0

    @property
    def hook_point(self) -> str:
        """Where the block's output is edited."""
        return f"blocks.{self.block}.hook_resid_post"


_TEXT_SAE = TrainConfig(d_sae=3072, k=24, steps=1500, lr=1e-3)
_TEXT_SITES = (
    SiteRecipe(2, _TEXT_SAE, FitConfig(clean_budget=0.003)),
    SiteRecipe(3, _TEXT_SAE, FitConfig(clean_budget=0.002)),
)
_GROUP_SITES = (
    SiteRecipe(
        4,
        TrainConfig(d_sae=1024, k=24, steps=1500, lr=1e-3),
        FitConfig(clean_budget=0.01),
        group_share=0.5,
    ),
)


@dataclass(frozen=True)
class Recipe:
    """What the shipped model was built with: the CLIP, and for each task the sites of its defense."""

    clip: train_clip.Recipe = field(default_factory=train_clip.Recipe)
    defenses: Mapping[str, tuple[SiteRecipe, ...]] = field(
        default_factory=lambda: {"text": _TEXT_SITES, **dict.fromkeys(GROUPINGS, _GROUP_SITES)}
    )
    n_sae_pictures: int = 5_000
    n_pairs: int = 2_000
    n_report: int = 2_000


# --- stage 1 --------------------------------------------------------------------------------------


def build_clip(work: Path, recipe: Recipe) -> Path:
    """Train the CLIP and write it as an open_clip `local-dir:` folder; return the folder."""
    folder = work / "clip"
    train_clip.check_recipe(work / "recipe.json", {"clip": asdict(recipe.clip), "world": world_sha256()})
    if (folder / "open_clip_model.safetensors").exists():
        return folder
    clip = train_clip.train(work, recipe.clip)
    state = {name: tensor.half().contiguous() for name, tensor in clip.state_dict().items() if name != "attn_mask"}
    state["token_embedding.weight"][~_known_tokens()] = 0  # rows that no caption used hold noise; zeros compress
    folder.mkdir(exist_ok=True)
    shutil.copy(HERE / "clip" / "open_clip_config.json", folder)
    with folders.replacing(folder / "open_clip_model.safetensors") as partial:
        folders.write_tensors(state, partial, save_file)
    return folder


def _known_tokens() -> Tensor:
    """Which rows of the token embedding the captions of training use, bool [vocab_size]."""
    known = torch.zeros(train_clip.load_config()["model_cfg"]["text_cfg"]["vocab_size"], dtype=torch.bool)
    for question, templates in train_clip.TEMPLATES.items():
        for template in templates:
            texts = [template.replace("{}", answer) for answer in draws.QUESTIONS[question]]
            known[open_clip.tokenize(texts).flatten()] = True
    return known


# --- stage 2 --------------------------------------------------------------------------------------


def pixel_values_of(pictures: Sequence[Scene], clip: Clip) -> Tensor:
    """Return pixel_values, float32 [n, 3, height, width], of scenes."""
    return torch.from_numpy(np.stack([clip.preprocess(scenes.render(scene)) for scene in pictures]))


def sae_scenes(n: int, seed: int, group_share: float) -> list[Scene]:
    """Return fresh pictures to train an SAE on; see `SiteRecipe.group_share`."""
    n_each = int(n * group_share) // len(GROUPINGS)
    groups = [case.scene for grouping in GROUPINGS.values() for case in grouping.draw(n_each, 20_000 + seed)]
    return web_scenes(n - len(groups), seed) + groups


def build_sae(work: Path, recipe: Recipe, site: SiteRecipe, clip: Clip) -> SparseAutoencoder:
    """Train a site's SAE, or read the one in `work`."""
    folder = work / f"sae-{site.block}-{site.train.d_sae}{'-groups' if site.group_share else ''}"
    fingerprint = {
        **asdict(site.train),
        "n_pictures": recipe.n_sae_pictures,
        "seed_pictures": SEEDS["sae"],
        "group_share": site.group_share,
        "host": clip.tower.fingerprint(),
    }
    record_path = folder / "recipe.json"
    record = json.loads(record_path.read_text()) if record_path.exists() else {}
    if record.get("train") == fingerprint:
        return SparseAutoencoder(SAEConfig.from_dict(record["sae"]), folders.read_tensors(folder / "sae.safetensors"))
    pictures = sae_scenes(recipe.n_sae_pictures, SEEDS["sae"], site.group_share)
    resid = clip.tower.resid(pixel_values_of(pictures, clip), site.hook_point).flatten(0, 1)
    sae = train_in_memory(resid, site.train)
    pictures = sae_scenes(500, SEEDS["sae_test"], site.group_share)
    held_out = clip.tower.resid(pixel_values_of(pictures, clip), site.hook_point).flatten(0, 1)
    quality = measure_sae(sae, held_out)
    log.info("SAE at block %d: %s", site.block, quality)
    folder.mkdir(exist_ok=True)
    record_path.unlink(missing_ok=True)  # it is written last: where it stands, the SAE beside it is whole and its own
    tensors = {name: torch.from_numpy(t) for name, t in sae.parameters_numpy().items()}
    folders.write_tensors(tensors, folder / "sae.safetensors", save_file)
    record = {"train": fingerprint, "sae": sae.config.to_dict(), "quality": asdict(quality)}
    record_path.write_text(json.dumps(record, indent=1))
    return sae


# --- stage 3 --------------------------------------------------------------------------------------


def text_embeds_of(clip: Clip, names: Sequence[str], template: str = "simple") -> Tensor:
    """Return text_embeds [n_labels, d_embed], normalized."""
    prompts = Prompts(tuple(names), labels.resolve_templates(template))
    return torch.from_numpy(clip.text_embeds(prompts))


def attack_pairs(n: int, seed: int, fonts: Sequence[str], clip: Clip) -> Pairs:
    """Return attacked pictures with their twins."""
    cases = list(draws.typographic(n, seed, fonts))
    names = list(scenes.OBJECTS)
    return Pairs(
        clean=pixel_values_of([case.scene.clean() for case in cases], clip),
        neutral=pixel_values_of([case.scene.neutral() for case in cases], clip),
        attacked=pixel_values_of([case.scene for case in cases], clip),
        label=torch.tensor([names.index(case.label) for case in cases]),
        word=torch.tensor([names.index(case.word) for case in cases]),
    )


def groups_of(grouping: Grouping, n: int, seed: int, clip: Clip) -> Groups:
    """Return pictures of a task with groups, all groups alike."""
    cases = list(grouping.draw(n, seed))
    return Groups(
        pixel_values_of([case.scene for case in cases], clip),
        torch.tensor([case.y for case in cases]),
        torch.tensor([case.a for case in cases]),
    )


def task_data(task: str, n: int, seed: int, fonts: Sequence[str], clip: Clip) -> tuple[Pairs | Groups, Tensor]:
    """Return pictures of a task, and text_embeds of its answers; words are written in `fonts`."""
    if task == "text":
        return attack_pairs(n, seed, fonts, clip), text_embeds_of(clip, list(scenes.OBJECTS))
    grouping = GROUPINGS[task]
    return groups_of(grouping, n, seed, clip), text_embeds_of(clip, grouping.classes, grouping.template)


# --- the whole ------------------------------------------------------------------------------------


def report_on(clip: Clip, data: Pairs | Groups, text_embeds: Tensor) -> dict[str, float]:
    """Return `validation.measure` in percent: accuracies of a CLIP as it is now, with whatever is attached to it."""
    return {name: 100 * share for name, share in measure(clip, data, text_embeds).items()}


def full_report(
    clip: Clip,
    defense: Defense,
    task: str,
    n: int,
    seed: int,
    *,
    saes: Sequence[SparseAutoencoder] | None = None,
    n_controls: int = 3,
) -> tuple[dict[str, dict[str, float]], list[dict[str, float]]]:
    """Measure plain, defended and random control (mean of `n_controls` draws), in percent, on fresh seeds and fonts.

    The control edits by the rule that the SAE was trained with.

    Args:
        clip: The CLIP.
        defense: The defense.
        task: What it is against.
        n: Pictures.
        seed: Of the pictures.
        saes: That it was fitted with; by default those that ship.
        n_controls: Draws of the control.

    Returns:
        A row for each of the three, and the rows of the control's draws.

    Raises:
        ConfigError: `clip` is not the one that the defense was fitted on.
    """
    data, text_embeds = task_data(task, n, seed, scenes.TEST_FONTS, clip)
    active = data.attacked if isinstance(data, Pairs) else data.pixel_values

    def measured(sites: Sequence[Site]) -> dict[str, float]:
        with clip.defended(replace(defense, sites=tuple(sites))):
            return report_on(clip, data, text_embeds)

    saes = [each.sae for each in checkpoint.shipped_saes(MODELS[EMBEDDED])] if saes is None else saes
    exact = restored(defense, saes, own_rule=True).sites
    activity = [activity_of(clip, site, [active[:200].numpy()]) for site in exact]
    controls = []
    for draw in range(n_controls):
        rngs = (np.random.default_rng(draw) for _ in exact)
        controls.append(measured([random_control(*each) for each in zip(exact, activity, rngs, strict=True)]))
    report = {
        "plain": report_on(clip, data, text_embeds),
        "defended": measured(defense.sites),
        "random latents": {key: float(np.mean([row[key] for row in controls])) for key in controls[0]},
    }
    for name, row in report.items():
        log.info("%-15s %s", name, {key: round(value, 2) for key, value in row.items()})
    return report, controls


def build_defense(work: Path, recipe: Recipe, task: str, clip: Clip) -> Defense:
    """Build one task's defense, site by site, measure it, and write it and its SAEs into `work`."""
    plans = [SitePlan(site.hook_point, build_sae(work, recipe, site, clip), site.fit) for site in recipe.defenses[task]]
    saes = [plan.sae.rounded(np.float16) for plan in plans]
    for plan, sae in zip(plans, saes, strict=True):
        save_sae(work, clip, plan.hook_point, sae)
    data, text_embeds = task_data(task, recipe.n_pairs, SEEDS["fit"], scenes.TRAIN_FONTS, clip)
    # Rounded as they are shipped, so that the report speaks of the shipped numbers.
    fitted = fit_sites(Encoded(clip, data), plans, text_embeds, name=task, dtype=np.float16)
    defense = Defense(clip.id_as(EMBEDDED), clip.preprocess, tuple(each.site for each in fitted), None, "MIT")
    defense = with_thresholds(clip, defense, data, text_embeds)
    report, _ = full_report(clip, defense, task, recipe.n_report, SEEDS["report"], saes=saes)
    return save_defense(work, clip, defense, task, report, recipe.n_report)


def save_sae(work: Path, clip: Clip, hook_point: str, sae: SparseAutoencoder) -> Path:
    """Write an SAE into `work` as a folder of its own: the defenses hold just the latents that they edit."""
    (work / "sae").mkdir(parents=True, exist_ok=True)
    made_by = {"recipe": "defense.embedded.build", "host": {"sha256": clip.tower.fingerprint()}}
    made = Checkpoint(sae, hook_point, EMBEDDED, clip.tower.quick_gelu, "MIT", made_by)
    return checkpoint.save(made, work / "sae" / f"block-{block_of(hook_point)}", dtype=np.float16)


def with_thresholds(clip: Clip, defense: Defense, data: Pairs | Groups, text_embeds: Tensor) -> Defense:
    """Return a defense with thresholds in place of TopK rules, slim.

    Raises:
        CalibrationError: Fewer than 99 % of the answers stay.
    """
    twins = data.twins()
    groups = np.tile(np.arange(data.n), len(twins))
    found, _ = calibrated(
        clip, defense, twins, least_agreement=LEAST_AGREEMENT, text_embeds=text_embeds.numpy(), groups=groups
    )
    return slim(found)


def save_defense(
    work: Path, clip: Clip, defense: Defense, task: str, report: dict[str, dict[str, float]], n: int
) -> Defense:
    """Write a defense into `work` with golden vectors and what was measured, and return it."""
    pictures = [np.asarray(scenes.render(scene)) for scene in _golden_scenes(task)]
    with clip.defended(defense):
        golden = make_golden(clip, np.stack(pictures))
    provenance = {**defense.provenance, "recipe": "defense.embedded.build", "n": n, "report": report}
    defense = replace(defense, golden=golden, provenance=provenance)
    defenses.save(defense, work / task, dtype=np.float16)
    return defense


def _golden_scenes(task: str) -> list[Scene]:
    drawn = draws.typographic if task == "text" else GROUPINGS[task].draw
    return [case.scene for case in drawn(3, SEEDS["golden"])]


def build(work: Path, recipe: Recipe) -> dict[str, Defense]:
    """Run all stages in `work` and return the finished defenses by task."""
    work.mkdir(parents=True, exist_ok=True)
    clip = load_clip(f"local-dir:{build_clip(work, recipe)}")
    return {task: build_defense(work, recipe, task, clip) for task in recipe.defenses}


def install(work: Path) -> None:
    """Put the CLIP, its defenses, their SAEs and the example pictures of `work` into the package."""
    shutil.copy(work / "clip" / "open_clip_model.safetensors", HERE / "clip")
    for name in (*Recipe().defenses, "sae"):
        if (HERE / name).exists():
            shutil.rmtree(HERE / name)
        shutil.copytree(work / name, HERE / name)
    draw_examples(HERE / "examples")


EXAMPLES = (
    ("apple", "pizza", 5),
    ("dog", "car", 4),
    ("guitar", "banana", 2),
    ("lion", "phone", 1),
    ("umbrella", None, 1),
)
"""(object, word on it, seed) of the pictures that ship with the package."""


def draw_examples(folder: Path, size: int = 320) -> None:
    """Draw the example pictures, in fonts that were not trained on."""
    folder.mkdir(exist_ok=True)
    for name, word, seed in EXAMPLES:
        rng = np.random.default_rng([SEEDS["examples"], seed, *name.encode()])
        writing = None if word is None else draws.sample_writing(rng, word, scenes.TEST_FONTS)
        scene = replace(draws.sample_scene(rng, draws.sample_object(rng, name), writing), oversample=1)
        path = folder / (f"{name}.png" if word is None else f"{name}-{word}.png")
        scenes.render(scene, size).save(path, optimize=True)


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for pictures, checkpoints and results (5 GB)")
    parser.add_argument("--install", action="store_true", help="replace the shipped model")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    build(arguments.work, Recipe())
    if arguments.install:
        install(arguments.work)


if __name__ == "__main__":
    main()
