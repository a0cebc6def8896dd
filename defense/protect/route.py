"""From a CLIP's name to a defense: a ready one, else one fitted with a known SAE, else with one that is trained first.

    <cache>/defenses/<fingerprint>/     the defense (store/ready.py)
    <cache>/saes/<hash>/                published SAEs, imported
    <cache>/work/<hash>/                the state of a training, and the SAE that came of it

Every step that is done is found again where the command is run once more: a killed one goes on from there. What a
folder is called by is a hash of everything that decides what is in it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from defense import importers
from defense.classify.classifier import RobustClassifier
from defense.data.images import DEFAULT_LIMITS, Limits
from defense.data.labels import check_labels
from defense.data.progress import Progress as FitProgress
from defense.data.sources import Pictures, open_pictures, prepared
from defense.errors import CheckpointError, ConfigError, NonFiniteError
from defense.fit.config import FitConfig
from defense.fit.from_pictures import sample, text_material
from defense.fit.gates import GATES, explained_variance
from defense.fit.placing import fit_defense
from defense.fit.shipping import ship
from defense.fit.sites import SitePlan, plan_sites
from defense.hosts.clip import Clip, load_clip, resolve_device
from defense.hosts.defense import ClipId, Defense
from defense.hosts.golden import check_golden
from defense.store import checkpoint, defenses, folders, ready
from defense.store.cache import VARIABLE, cache_folder
from defense.store.checkpoint import Checkpoint
from defense.store.hub import Hub, in_words
from defense.store.registry import FitSettings, HostRow, SaeRow, TrainSettings, row_of
from defense.train.residuals import Stream
from defense.train.runs import train_checkpoint
from defense.train.trainer import Progress

from .estimates import fit_cost, train_block, train_config, train_cost
from .material import Wanted, wanted_pictures

log = logging.getLogger(__name__)

_N_LOOKED_AT = 64
"""Pictures that decide whether an SAE belongs to a CLIP."""
_FOLDS = 3
_NAME = "text"
_TEMPLATE = "simple"
_RECIPE = "protect"
"""Key of the provenance under which what decided a defense is."""


@dataclass(frozen=True)
class Request:
    """What to protect, and with what.

    Attributes:
        model: open_clip's name of the CLIP.
        pretrained: open_clip's tag of its weights.
        pictures: Folders and files to fit on; drawn scenes without any.
        labels: What to choose from when fitting; common nouns by default.
        may_train: Train an SAE where there is none.
        out: Folder to write the defense to, beside the cache; None for the cache alone.
        device: "auto", "cpu", "cuda".
        seed: Of pictures, writing and folds.
        measure_s: Seconds to measure before an estimate of a training; a tenth of them before one of a fit.
    """

    model: str
    pretrained: str | None = None
    pictures: tuple[Path, ...] = ()
    labels: tuple[str, ...] | None = None
    may_train: bool = False
    out: Path | None = None
    device: str = "auto"
    seed: int = 0
    measure_s: float = 10.0
    limits: Limits = DEFAULT_LIMITS


def protect(
    request: Request,
    rows: Sequence[HostRow],
    hub: Hub,
    *,
    say: Callable[[str], None] = log.info,
    report: Callable[[Progress], None] | None = None,
) -> Defense:
    """Return a defense for a CLIP, and write it into the cache and to `request.out`.

    Args:
        request: What is asked for.
        rows: Of the registry.
        hub: How the hub is asked.
        say: Called with a line before each step, which says its cost, and with what came of it.
        report: Called every few steps of a training.

    Raises:
        ConfigError: There is no defense and no SAE, and none may be trained; or nothing that was tried helps. The
            message says what to do.
        CheckpointError: What the registry lists cannot be fetched or used.
        ConfigError, ShapeError, HookPointError, MissingDependencyError: See `load_clip` and `fit_defense`.
    """
    if request.out is not None:
        defenses.check_target(request.out)
    if request.labels is not None and len(check_labels(request.labels)) < 2:
        raise ConfigError(f"{request.labels[0]!r} is all there is to choose from; give two or more labels")
    # listed once, and first: a wrong path is said before anything is loaded or fetched
    own = open_pictures(request.pictures, limits=request.limits) if request.pictures else None
    say(f"loading {request.model}{'' if request.pretrained is None else f', {request.pretrained}'}")
    clip = load_clip(request.model, request.pretrained, device=resolve_device(request.device))
    defense = defenses.load(ready.keep(_Route(request, own, rows, hub, clip, say, report).defense()))
    if request.out is not None:
        defenses.save(defense, request.out)
    return defense


class _Said(FitProgress):
    """Says the lines of a fit."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def line(self, text: str) -> None:
        self._say(text)


@dataclass(frozen=True)
class _Route:
    """One way from a CLIP to a defense, step by step."""

    request: Request
    own: Pictures | None
    rows: Sequence[HostRow]
    hub: Hub
    clip: Clip
    say: Callable[[str], None]
    report: Callable[[Progress], None] | None

    @cached_property
    def clip_id(self) -> ClipId:
        return self.clip.id_as(self.request.model, self.request.pretrained)

    @cached_property
    def row(self) -> HostRow | None:
        """What the registry knows of this CLIP."""
        return row_of(self.rows, self.clip_id.model, self.clip_id.pretrained, self.clip_id.sha256)

    @cached_property
    def wanted(self) -> Wanted:
        """What to fit on."""
        n = self.fit_settings.n_pictures
        return wanted_pictures(self.own, self.request.labels, n=n, size=self.clip.preprocess.size)

    @cached_property
    def looked_at(self) -> list[np.ndarray]:
        """Some of the pictures, prepared: batches float32 [n, 3, height, width].

        Raises:
            ConfigError: None of them can be read.
        """
        pictures = sample(self.wanted.pictures, _N_LOOKED_AT, self.request.seed)
        batches = (
            [pixels for _, pixels in batch if pixels is not None] for batch in prepared(self.clip.preprocess, pictures)
        )
        found = [np.stack(batch) for batch in batches if batch]
        if not found:
            raise ConfigError(f"none of {len(pictures)} pictures can be read; is this the right folder?")
        return found

    @property
    def candidates(self) -> tuple[SaeRow, ...]:
        """Published SAEs to fit with, in order."""
        return () if self.row is None else self.row.candidates()

    @property
    def fit_settings(self) -> FitSettings:
        return FitSettings() if self.row is None else self.row.fit

    @property
    def train_settings(self) -> TrainSettings:
        return TrainSettings() if self.row is None else self.row.train

    def defense(self) -> Defense:
        """Return the first defense that a step gives."""
        self._note_fingerprint()
        found = self._ready()
        if found is not None:
            return found
        refusals: list[str] = []
        if self.candidates or self.request.may_train:
            _ = self.looked_at  # pictures that cannot be read are no reason to fetch one SAE after the other
        for sae in self.candidates:
            try:
                return self._fitted(self._published(sae), {"sae": str(sae.source), "sha256": sae.sha256})
            except ConfigError as error:
                refusals.append(f"{sae.repo}: {error}")
                self.say(f"passed over: {error}")
        if refusals and not self.request.may_train:
            raise ConfigError(
                f"none of the {len(refusals)} SAEs that are known for {self.clip_id.name} gives a defense. "
                f"{refusals[-1]}. Give pictures of the kind it will see (--pictures DIR), or train an SAE (--train)"
            )
        return self._fitted(self._trained(), {"sae": "trained", "train": asdict(self.train_settings)})

    # --- 1: a ready one -----------------------------------------------------------------------------------------------

    def _note_fingerprint(self) -> None:
        """Print the fingerprint where the registry does not know it, and refuse the other kind of GELU."""
        if self.row is None:
            return
        if self.row.sha256 is None:
            self.say(f"vision tower: sha256 {self.clip_id.sha256} (not in the registry)")
        if self.row.quick_gelu not in (None, self.clip_id.quick_gelu):
            raise ConfigError(
                f"{self.row.name} runs with quick_gelu={self.row.quick_gelu}, and this model has "
                f"quick_gelu={self.clip_id.quick_gelu}; load it as {self.row.model}"
                f"{'-quickgelu' if self.row.quick_gelu else ''}"
            )

    def _ready(self) -> Defense | None:
        """Return a defense that was made before, or that the registry lists; None where there is none of either."""
        self.say("looking for a ready defense: seconds")
        found = ready.cached_defense(self.clip_id.sha256)
        if found is not None and self._is_what_was_asked_for(found):
            self.say("there is one in the cache")
            return found
        has_own = bool(self.request.pictures) or self.request.labels is not None
        if has_own and (self.candidates or self.request.may_train):
            return None  # a user's own pictures are for a defense of their own, where one can be made
        found = ready.listed_defense(self.clip_id, self.rows, self.hub)
        if found is not None and found.golden is not None:
            with self.clip.defended(found):
                difference = check_golden(self.clip, found.golden)
            self.say(f"the registry has one; golden vectors reproduced, max difference {difference:.1e}")
        return found

    def _is_what_was_asked_for(self, found: Defense) -> bool:
        """Return whether a defense was fitted on the pictures and labels that were given, or none were given."""
        recipe = found.provenance.get(_RECIPE)
        recipe = recipe if isinstance(recipe, Mapping) else {}
        if self.request.pictures and recipe.get("pictures") != self.wanted.pictures.fingerprint:
            return False
        return self.request.labels is None or recipe.get("labels") == list(self.request.labels)

    # --- 2: a known SAE -----------------------------------------------------------------------------------------------

    def _published(self, row: SaeRow) -> Checkpoint:
        """Return an SAE that the registry lists: fetched, checked, imported, or found where that was done before."""
        self.say(f"taking the SAE {row.source}: it is fetched once, and then converted in a minute")
        if row.unverified:
            self.say(f"nobody has checked what the registry says of its {', '.join(row.unverified)}; it is checked now")
        if row.sha256 is not None and row.source.file is not None:
            self.hub.fetch_file(row.source, row.source.file, sha256=row.sha256)
        weights = self.hub.fetch_weights(row.source)
        stated = {"tokens": row.tokens, "hook_point": row.hook_point}
        key = [row.repo, folders.sha256_of(weights), row.format, row.license, stated]
        folder = cache_folder() / "saes" / _hash(key)
        found = _converted(folder)
        if found is None:
            self.say("converting it")
            given = {name: value for name, value in stated.items() if value is not None}
            license = row.license or "not stated"
            read = importers.read(str(row.source), row.format or "auto", license=license, hub=self.hub, **given)
            folder.parent.mkdir(parents=True, exist_ok=True)
            found = checkpoint.load(checkpoint.save(read, folder))
        if row.sha256 is None or row.revision is None:
            self.say(f"SAE: {found.provenance['hub']}, sha256 {found.provenance['sha256']} (not all in the registry)")
        return found

    def _fitted(self, sae: Checkpoint, origin: Mapping[str, Any]) -> Defense:
        """Return a defense fitted with an SAE, after checking that the SAE belongs to this CLIP."""
        request, settings, wanted = self.request, self.fit_settings, self.wanted
        config = FitConfig(steps=settings.steps, clean_budget=settings.clean_budget, seed=request.seed)
        (plan,) = plan_sites(self.clip, [sae], config)
        plan.sae.to(self.clip.device)
        explained = self._explained(plan)
        cost = fit_cost(
            self.clip,
            sae.hook_point,
            plan.sae,
            plan.config,
            n_pictures=settings.n_pictures,
            folds=_FOLDS,
            seconds=request.measure_s / 10,
        )
        kind = "drawn scenes" if wanted.weak else "pictures"
        self.say(f"fitting at {sae.hook_point} on up to {settings.n_pictures} {kind}: {cost}")
        clf = RobustClassifier(self.clip).set_labels(wanted.labels, _TEMPLATE)
        material = text_material(clf, wanted.pictures, n=settings.n_pictures, seed=request.seed)
        recipe = {
            **origin,
            "pictures": wanted.pictures.fingerprint,
            "labels": list(wanted.labels),
            "fit": {**asdict(settings), "folds": _FOLDS},
            "explained_variance": explained,
        }
        weak = {} if wanted.weak is None else {"weak": wanted.weak}
        fitted = fit_defense(
            self.clip, self.clip_id, [plan], material, torch.from_numpy(clf.text_embeds()), name=_NAME, folds=_FOLDS,
            seed=request.seed, license=sae.license, explained={sae.hook_point: explained}, cache=cache_folder(),
            progress=_Said(self.say),
            provenance={
                **weak, "task": "text", "labels": list(wanted.labels), "template": _TEMPLATE, _RECIPE: recipe,
                "saes": [{"hook_point": sae.hook_point, **dict(sae.provenance)}],
            },
        )  # fmt: skip
        shipped = ship(self.clip, fitted.defense, material, clf.text_embeds(), progress=_Said(self.say))
        ready.keep(shipped.defense)
        fitted.forget()
        return shipped.defense

    def _explained(self, plan: SitePlan) -> float:
        """Return how much of the residuals' variance an SAE explains here, before anything long is done with it.

        Raises:
            GateError: So little that it is an SAE of another CLIP.
            ConfigError: See `looked_at`.
        """
        tokens = plan.sae.config.tokens
        rows = [self.clip.tower.resid(batch, plan.hook_point, tokens).flatten(0, 1) for batch in self.looked_at]
        explained = explained_variance(plan.sae, torch.cat(rows))
        GATES.check_explained(plan.hook_point, explained)
        return explained

    # --- 3: an SAE that is trained ------------------------------------------------------------------------------------

    def _trained(self) -> Checkpoint:
        """Return an SAE that was trained here; first an estimate, and without leave to train nothing more."""
        settings, request = self.train_settings, self.request
        block = train_block(settings, len(self.clip.tower.blocks))
        work = cache_folder() / "work" / _hash([self.clip_id.sha256, self._training(), asdict(settings)])
        if request.may_train and (work / "sae" / checkpoint.MANIFEST).is_file():
            self.say("the SAE was trained before")
            return checkpoint.load(work / "sae")
        self.say(f"measuring what a training takes here: {request.measure_s:.0f} s")
        cost = train_cost(self.clip, self.wanted.pictures, settings, seconds=request.measure_s)
        if not request.may_train:
            drawn = "" if request.pictures else ", reading photographs not counted"
            raise ConfigError(
                f"no defense is ready for {self.clip_id.name}, and no SAE of it is known. To train one after block "
                f"{block} takes {cost}{drawn}. To do so, run this again with --pictures DIR --train"
            )
        if not request.pictures:
            raise ConfigError("an SAE is trained on photographs; give --pictures DIR with as many as you have")
        self._check_room(cost.n_bytes)
        self.say(f"training an SAE after block {block}: {cost}; stopped, it goes on when this is run again")
        work.mkdir(parents=True, exist_ok=True)
        tokens: Any = settings.tokens
        stream = Stream(
            self.clip, f"blocks.{block}.hook_resid_post", self.wanted.pictures, tokens=tokens,
            text_rate=settings.text_rate, seed=request.seed,
        )  # fmt: skip
        trained = train_checkpoint(
            stream, train_config(settings, self.clip.tower.d_model), self.clip_id, state=work / "state.safetensors",
            report=self.report,
        )  # fmt: skip
        checkpoint.save(trained, work / "sae")
        return trained

    def _training(self) -> list[Any]:
        return [self.wanted.pictures.fingerprint, self.request.seed]

    def _check_room(self, n_bytes: int) -> None:
        folder = cache_folder()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        if n_bytes > free:
            raise ConfigError(
                f"the training takes {in_words(n_bytes)}, and {there} has {in_words(free)} left; make room, or set "
                f"{VARIABLE} to a folder on another disk"
            )


def _converted(folder: Path) -> Checkpoint | None:
    """Return an SAE that was converted before; None where it was not, or is damaged, which is logged."""
    if not folder.is_dir():
        return None
    try:
        return checkpoint.load(folder)
    except (CheckpointError, NonFiniteError) as error:
        log.warning("the SAE in the cache cannot be used, so it is converted again: %s", error)
        shutil.rmtree(folder)
        return None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
