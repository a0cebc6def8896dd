"""From the command line's arguments to an `Engine`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from defense.classify.classifier import RobustClassifier
from defense.classify.finding import check_named
from defense.demo.engine import DemoTask, Engine, own_tasks, tasks_of
from defense.explain import catalogue
from defense.explain.catalogue import Catalogue
from defense.hosts import shipped
from defense.hosts.clip import load_clip
from defense.hosts.defense import join
from defense.hosts.shipped import ShippedClip
from defense.store.defenses import find_defense


def defended(
    source: str = shipped.DEFAULT,
    labels: Sequence[str] | None = None,
    template: str | None = None,
    *,
    model: str | None = None,
    pretrained: str | None = None,
    device: str = "auto",
) -> Engine:
    """Return the engine of a defense and the CLIP it was fitted on; a shipped one's name stands for all its defenses.

    Args:
        source: See `find_defense`.
        labels: What to classify into where a visitor gives nothing; a shipped model's own where None.
        template: The prompt; a shipped model's own where None.
        model: See `RobustClassifier.from_pretrained`.
        pretrained: As above.
        device: As above.

    Raises:
        ConfigError, CheckpointError: See `RobustClassifier.from_pretrained`.
    """
    from defense.hosts.slim import restored  # it brings torch, which a bundle is served without
    from defense.store.checkpoint import shipped_saes

    check_named(model, pretrained)
    shipped.check_own_model(source, model, pretrained)
    own = shipped.find(source)
    sources = [source] if own is None or ":" in source else _own_sources(own.model)
    defense = join([find_defense(each) for each in sources]) if len(sources) > 1 else find_defense(sources[0])
    if own is not None:  # any latent can be steered and mapped: the SAEs ship
        defense = restored(defense, [each.sae for each in shipped_saes(own.model)])
    if model is None:
        model, pretrained = defense.clip.model, defense.clip.pretrained
    clf = RobustClassifier(load_clip(model, pretrained, device=device), defense)
    catalogues: dict[str, Catalogue] = {}
    for each in sources:
        for hook_point, found in catalogue.find(each).items():
            if any(found.is_of(site) for site in defense.sites):  # else: of another SAE at the same block
                catalogues.setdefault(hook_point, found)
    title = ", ".join(part for part in (model, pretrained) if part)
    return Engine(clf, tasks_of(defense.sets, model, labels, template), catalogues, title)


def _own_sources(model: ShippedClip) -> list[str]:
    """Return the defenses of a shipped model, in the order of their tasks."""
    return [f"{model.name}:{task.name}" for task in own_tasks(model) if task.name in model.defenses]


def bundled(folder: str | os.PathLike[str], labels: Sequence[str] | None = None, template: str | None = None) -> Engine:
    """Return the engine of an exported bundle, without torch.

    Args:
        folder: The bundle.
        labels: What to classify into where a visitor gives nothing; those baked into the bundle where None.
        template: The prompt; that of the bundle where None.
    """
    from defense.export.runtime import OnnxClassifier

    clf = OnnxClassifier(folder)
    if labels is not None:
        clf.set_labels(labels, template or "simple")
    assert clf.prompts is not None  # a bundle has labels
    asked = clf.prompts.labels, template or clf.prompts.templates[0]
    known = (task for model in shipped.MODELS.values() for task in own_tasks(model))
    task = next((task for task in known if (task.labels, task.template) == asked), DemoTask("", "", *asked))
    return Engine(clf, (task,), title=f"bundle {Path(folder).name}, {clf.running_on}")
