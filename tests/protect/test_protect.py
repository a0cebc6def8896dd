"""From a CLIP's name to a defense, with the embedded CLIP, whose published SAE is on an imitation of the hub."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch
from PIL import Image

from defense import protect as room
from defense.classify.classifier import RobustClassifier
from defense.core.latents import LatentSet
from defense.errors import CheckpointError, ConfigError
from defense.fit.config import FitConfig
from defense.hosts.clip import embedded_folder, load_clip
from defense.hosts.defense import Defense, Site
from defense.hosts.shipped import EMBEDDED, MODELS
from defense.protect import route
from defense.store import cache as cache_module
from defense.store import checkpoint, defenses, registry
from defense.store.hub import Hub
from defense.train import runs

from ..command import run
from ..hub_server import FakeHub

NAME = f"local-dir:{embedded_folder('clip')}"
BLOCK = 3
SAE = "Prisma/sae-block-3"
FIT = {"hook_points": [f"blocks.{BLOCK}.hook_resid_post"], "n_pictures": 60, "clean_budget": 0.5, "steps": 40}
TRAIN = {"block": 2, "d_sae": 256, "k": 8, "n_tokens": 4000, "batch": 250, "text_rate": 0.3}


def prisma_files(scale: float = 1.0) -> dict[str, bytes]:
    """The embedded model's SAE as ViT-Prisma writes one; with another scale it is one of another CLIP."""
    site = next(each for each in checkpoint.shipped_saes(MODELS[EMBEDDED]) if each.hook_point == FIT["hook_points"][0])
    state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in site.sae.parameters_numpy().items()}
    state["W_dec"] = state["W_dec"] * scale
    config = {
        "d_in": site.sae.config.d_model, "expansion_factor": 16, "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": site.sae.config.k}, "normalize_activations": "none", "cls_token_only": False,
        "use_patches_only": False, "hook_point": site.hook_point, "architecture": "standard", "is_transcoder": False,
    }  # fmt: skip
    weights = io.BytesIO()
    torch.save(state, weights)
    return {"weights.pt": weights.getvalue(), "config.json": json.dumps(config).encode(), "README.md": b"# an SAE"}


def host(**fields: Any) -> dict[str, Any]:
    sae = {"repo": SAE, "file": "weights.pt", "format": "prisma", "hook_point": FIT["hook_points"][0], "tokens": "all"}
    return {"model": NAME, "saes": [{**sae, "license": "Apache-2.0"}], "fit": FIT, "train": TRAIN, **fields}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv(cache_module.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., tuple[registry.HostRow, ...]]:
    """Rows of a user's registry: one host, with fields changed."""

    def made(**fields: Any) -> tuple[registry.HostRow, ...]:
        path = tmp_path / "mine.json"
        path.write_text(json.dumps({"schema": 1, "hosts": [host(**fields)]}))
        return registry.rows(path)

    return made


class Told(list[str]):
    """The lines that were said."""

    def text(self) -> str:
        return "\n".join(self)


def protect(rows, **fields: Any) -> tuple[Any, Told]:
    told = Told()
    request = replace(room.Request(NAME, measure_s=0.1), **fields)
    return room.protect(request, rows, Hub(report=told.append), say=told.append), told


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def fitted_at_once(monkeypatch) -> list[str]:
    """In place of a fit, what ships for the embedded model; returns where it was asked for."""
    shipped = defenses.load(embedded_folder("text"))
    asked: list[str] = []

    def fit_defense(clip, clip_id, plans, *_: Any, **options: Any) -> Any:
        asked.append(plans[0].hook_point)
        sites = tuple(site for site in shipped.sites if site.hook_point == plans[0].hook_point)
        provenance = {**options["provenance"], "seed": options["seed"]}
        return SimpleNamespace(
            defense=replace(shipped, clip=clip_id, sites=sites, golden=None, provenance=provenance), forget=lambda: None
        )

    monkeypatch.setattr(route, "fit_defense", fit_defense)
    return asked


@pytest.fixture(params=["open", pytest.param("real", marks=pytest.mark.slow)])
def gates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick fit through open gates; and one on pictures enough for the real ones, which takes minutes."""
    if request.param == "open":
        request.getfixturevalue("open_gates")
    for name, value in {"open": {"n_pictures": 24, "steps": 5}, "real": {"n_pictures": 160, "steps": 60}}[
        request.param
    ].items():
        monkeypatch.setitem(FIT, name, value)


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gates")
def test_one_call_makes_a_defense_that_everything_uses_and_a_second_one_finds_it(
    hub: FakeHub, cache: Path, rows, tmp_path: Path
) -> None:
    commit = hub.add(SAE, prisma_files())
    out = tmp_path / "defense"
    defense, told = protect(rows(), out=out)
    (site,) = defense.sites
    assert site.hook_point == FIT["hook_points"][0]
    assert site.sets[0].latents
    assert defense.license == "Apache-2.0"
    assert defense.provenance["saes"][0]["hub"] == f"hf://{SAE}/weights.pt@{commit}"
    assert "knows nothing of photographs" in defense.provenance["weak"]
    assert everything(out) == everything(cache / "defenses" / defense.clip.sha256)
    for step in ("looking for a ready defense: seconds", "fetching Prisma/sae-block-3/weights.pt, ", "fitting at"):
        assert step in told.text()
    assert re.search(r"about \d+ (s|min) at most \(host .*, SAE .*, joint step .*\)", told.text())

    hub.status = 500  # nobody is asked any more
    hub.asked.clear()
    again, told = protect(rows())
    assert again.manifest_sha256 == defenses.load(out).manifest_sha256
    assert told[-1] == "there is one in the cache"
    by_name = RobustClassifier.from_pretrained(NAME, device="cpu").set_labels(["apple", "pizza"])
    by_folder = RobustClassifier.from_pretrained(out, device="cpu").set_labels(["apple", "pizza"])
    picture = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    assert by_name(picture) == by_folder(picture)
    assert hub.asked == []


@pytest.mark.parametrize("place", ["download", "conversion", "fit", "writing"])
def test_what_was_killed_goes_on_to_the_same_bytes(
    hub: FakeHub, cache: Path, rows, tmp_path: Path, monkeypatch, fitted_at_once, place: str
) -> None:
    hub.add(SAE, prisma_files())
    monkeypatch.setenv(cache_module.VARIABLE, str(tmp_path / "whole"))
    protect(rows(), out=tmp_path / "expected")
    monkeypatch.setenv(cache_module.VARIABLE, str(cache))

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner, name = {
            "download": (Hub, "fetch_weights"),
            "conversion": (checkpoint, "save"),
            "fit": (route, "fit_defense"),
            "writing": (defenses, "_write"),
        }[place]
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            protect(rows(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(cache.glob("defenses/*/*"))
    n_before = len(hub.bodies())
    _, told = protect(rows(), out=tmp_path / "out")
    assert everything(tmp_path / "out") == everything(tmp_path / "expected")
    assert ("converting it" in told) == (place in ("download", "conversion"))
    assert len(hub.bodies()) == n_before  # the first run of all had filled the hub's cache


# --- a known SAE ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "empty", "unreadable"])
def test_pictures_that_are_not_there_are_said_before_anything_is_fetched(
    hub: FakeHub, cache: Path, rows, tmp_path: Path, kind: str
) -> None:
    hub.add(SAE, prisma_files())
    folder = tmp_path / "photos"
    if kind != "missing":
        folder.mkdir()
    if kind == "unreadable":
        (folder / "1.jpg").write_bytes(b"\xff\xd8 no picture")
    hub.asked.clear()
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"folder|holds no pictures"):
        room.protect(
            room.Request(NAME, pictures=(folder,), measure_s=0.1), rows(), Hub(report=said.append), say=said.append
        )
    assert hub.asked == []
    assert not any("passed over" in line for line in said)


def test_an_sae_of_another_clip_is_refused_and_nothing_is_written(hub: FakeHub, cache: Path, rows, tmp_path) -> None:
    hub.add(SAE, prisma_files(scale=-1.0))
    with pytest.raises(ConfigError, match=r"explains -\d+ % of the variance of .* it was trained on another CLIP"):
        protect(rows(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (cache / "defenses").exists()


def test_saes_are_tried_in_the_order_of_the_settings_until_one_passes(
    hub: FakeHub, cache: Path, rows, fitted_at_once
) -> None:
    hub.add(SAE, prisma_files())
    hub.add("Prisma/other", prisma_files(scale=-1.0))
    good = host()["saes"][0]
    both = [good, {**good, "repo": "Prisma/other"}]
    _, told = protect(rows(saes=both[::-1]))
    assert f"passed over: the SAE at {good['hook_point']} explains" in told.text()
    assert fitted_at_once == [good["hook_point"]]


@pytest.mark.parametrize(
    ("files", "fields", "message"),
    [
        pytest.param({"README.md": b""}, {}, r"has no file|has no weights|is not there", id="no-weights"),
        pytest.param(None, {"sha256": "ab" * 32}, r"has sha256 .*, and abab.* was asked for", id="wrong-hash"),
        pytest.param(
            {"weights.pt": b"\x80\x04cos\nsystem\n(S'touch x'\ntR."}, {}, r"needs os\.system to be read", id="pickle"
        ),
        pytest.param({"weights.pt": b"<html>"}, {}, r"weights\.pt is no checkpoint that can be read", id="damaged"),
        pytest.param(None, {"revision": "0" * 40}, r"has no revision '000", id="revision"),
        pytest.param(None, {"tokens": "cls"}, r"tokens='all', --tokens says 'cls'", id="contradiction"),
    ],
)
def test_an_sae_that_cannot_be_used_is_one_sentence_and_leaves_nothing(
    hub: FakeHub, cache: Path, rows, tmp_path: Path, files, fields, message
) -> None:
    hub.add(SAE, files or prisma_files())
    sae = {**host()["saes"][0], **fields}
    with pytest.raises((CheckpointError, ConfigError), match=message) as told:
        protect(rows(saes=[sae]), out=tmp_path / "out")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()
    assert not list(cache.rglob("*.safetensors"))


def test_where_it_cannot_be_written_is_said_before_anything_is_loaded(cache: Path, rows, tmp_path, monkeypatch) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    monkeypatch.setattr(route, "load_clip", lambda *_, **__: pytest.fail("the CLIP was loaded"))
    with pytest.raises(ConfigError, match="is no defense, or holds other files too"):
        protect(rows(), out=tmp_path)


def test_a_users_own_pictures_and_labels_make_a_defense_of_their_own(
    hub: FakeHub, cache: Path, rows, tmp_path: Path, fitted_at_once
) -> None:
    hub.add(SAE, prisma_files())
    pictures = photographs(tmp_path / "photos", 3)
    protect(rows())
    own, _ = protect(rows(), pictures=(pictures,))
    assert "weak" not in own.provenance
    assert {"camera", "bicycle"} <= set(own.provenance["labels"])
    named, _ = protect(rows(), pictures=(pictures,), labels=("dog", "cat"))
    assert named.provenance["labels"] == ["dog", "cat"]
    assert len(fitted_at_once) == 3
    for options in ({}, {"pictures": (pictures,)}, {"labels": ("dog", "cat")}):
        again, told = protect(rows(), **options)
        assert again.provenance == named.provenance
        assert told[-1] == "there is one in the cache"
    assert len(fitted_at_once) == 3


# --- a ready defense --------------------------------------------------------------------------------------------------


def published(hub: FakeHub, change: Callable[[Any], Any] = lambda defense: defense) -> dict[str, Any]:
    """A registry's row of the embedded model's own defense, which is put on the hub."""
    with tempfile.TemporaryDirectory() as folder:
        path = defenses.save(change(defenses.load(embedded_folder("text"))), Path(folder) / "defense")
        files = {each.name: each.read_bytes() for each in path.iterdir()}
    commit = hub.add("org/defense", {**files, "README.md": b"", "config.json": b"{}", ".gitattributes": b""})
    digest = hashlib.sha256(files["manifest.json"]).hexdigest()
    return {"repo": "org/defense", "revision": commit, "sha256": digest}


def test_a_listed_defense_is_fetched_checked_and_kept(hub: FakeHub, cache: Path, rows, monkeypatch) -> None:
    found = rows(defense=published(hub), saes=[])
    defense, told = protect(found)
    assert told[-1].startswith("the registry has one; golden vectors reproduced, max difference")
    kept = everything(cache)[f"defenses/{defense.clip.sha256}/golden.safetensors"]
    assert kept == hub.files("org/defense")["golden.safetensors"]
    (cache / "defenses").rename(cache / "gone")
    monkeypatch.setattr(registry, "rows", lambda *_: found)
    with pytest.raises(CheckpointError, match=r"no defense is ready for local-dir.*; make one: defense protect local"):
        RobustClassifier.from_pretrained(NAME, local_files_only=True, device="cpu")
    clf = RobustClassifier.from_pretrained(NAME, device="cpu")
    assert clf.defense.manifest_sha256 == defense.manifest_sha256
    assert RobustClassifier.from_pretrained(NAME, sets=["text"], device="cpu").defense.sets == ("text",)


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        pytest.param(lambda d: d, {"sha256": "ab" * 32}, r"the registry says abab.*: it is another defense", id="hash"),
        pytest.param(
            lambda d: replace(d, clip=replace(d.clip, sha256="cd" * 32)), {}, r"a defense of weights cdcd", id="clip"
        ),
        pytest.param(
            lambda d: replace(d, golden=replace(d.golden, defended=d.golden.plain)), {}, "golden vectors", id="golden"
        ),
        pytest.param(lambda d: d, {"file": "other"}, r"other/manifest\.json is not there", id="folder"),
    ],
)
def test_a_listed_defense_that_is_another_one_is_refused(
    hub: FakeHub, cache: Path, rows, change, fields, message
) -> None:
    with pytest.raises(CheckpointError, match=message):
        protect(rows(defense={**published(hub, change), **fields}))
    assert not (cache / "defenses").exists()


def test_a_damaged_defense_in_the_cache_is_passed_over_and_that_is_logged(
    hub: FakeHub, cache: Path, rows, caplog
) -> None:
    found = rows(defense=published(hub))
    defense, _ = protect(found)
    manifest = cache / "defenses" / defense.clip.sha256 / "manifest.json"
    manifest.write_text("{")
    hub.asked.clear()
    assert protect(found)[0].manifest_sha256 == defense.manifest_sha256
    assert "cannot be used, so it is passed over" in caplog.text


# --- an SAE that is trained -------------------------------------------------------------------------------------------


def photographs(folder: Path, n: int) -> Path:
    folder.mkdir()
    for seed in range(n):
        pixels = np.random.default_rng(seed).integers(0, 256, (80, 80, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    return folder


def test_without_an_sae_there_is_an_estimate_and_no_training(hub: FakeHub, cache: Path, rows, monkeypatch) -> None:
    monkeypatch.setattr(route, "train_checkpoint", lambda *_, **__: pytest.fail("it was trained"))
    pattern = (
        r"about \d+ (s|min) for 4,000 tokens at [\d,]+ a second on this machine \(CLIP [\d,]+, SAE [\d,]+\), \d+ .B"
    )
    with pytest.raises(ConfigError, match=pattern) as told:
        protect(rows(saes=[]))
    assert "run this again with --pictures DIR --train" in str(told.value)
    with pytest.raises(ConfigError, match="an SAE is trained on photographs; give --pictures DIR"):
        protect(rows(saes=[]), may_train=True)
    assert not cache.exists()


def test_a_training_that_was_killed_goes_on_to_the_same_bytes(
    hub: FakeHub, cache: Path, rows, tmp_path: Path, monkeypatch
) -> None:
    found, pictures = rows(saes=[]), photographs(tmp_path / "photos", 4)
    monkeypatch.setattr(route, "train_checkpoint", partial(route.train_checkpoint, n_held_out=2))
    monkeypatch.setitem(runs.train.__kwdefaults__, "save_every", 5)
    monkeypatch.setattr(route._Route, "_fitted", lambda self, sae, origin: stand_in(self, sae))
    monkeypatch.setenv(cache_module.VARIABLE, str(tmp_path / "whole"))
    protect(found, pictures=(pictures,), may_train=True)
    monkeypatch.setenv(cache_module.VARIABLE, str(cache))

    def killed(progress: Any) -> None:
        if progress.step >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        room.protect(
            room.Request(NAME, pictures=(pictures,), may_train=True, measure_s=0.1), found, Hub(), report=killed
        )
    assert list(cache.glob("work/*/state.safetensors"))
    steps: list[int] = []
    room.protect(
        room.Request(NAME, pictures=(pictures,), may_train=True, measure_s=0.1), found, Hub(),
        report=lambda progress: steps.append(progress.step),
    )  # fmt: skip
    assert min(steps) > 10  # a report comes every ten steps, and the tenth was saved
    assert everything(cache / "work") == everything(tmp_path / "whole" / "work")
    monkeypatch.setattr(route, "train_checkpoint", lambda *_, **__: pytest.fail("it was trained again"))
    (cache / "defenses").rename(cache / "gone")
    assert "the SAE was trained before" in protect(found, pictures=(pictures,), may_train=True)[1]


def stand_in(way: Any, sae: Any) -> Any:
    """A defense around an SAE, without a fit."""
    site = Site(sae.hook_point, sae.sae.config, sae.sae.parameters_numpy(), (LatentSet("text", (0, 1)),))
    return Defense(way.clip_id, way.clip.preprocess, (site,), license=sae.license)


def test_an_estimate_has_a_split_and_a_sum() -> None:
    clip = load_clip(EMBEDDED)
    site = checkpoint.shipped_saes(MODELS[EMBEDDED])[0]
    cost = room.fit_cost(clip, site.hook_point, site.sae, FitConfig(steps=10), n_pictures=30, folds=2)
    assert cost.seconds == pytest.approx(cost.host_s + cost.sae_s + cost.joint_s)
    assert min(cost.host_s, cost.sae_s, cost.joint_s) > 0
    last = room.fit_cost(clip, "blocks.5.hook_resid_post", site.sae, FitConfig(steps=10), n_pictures=30, folds=2)
    assert last.joint_s / last.host_s < cost.joint_s / cost.host_s  # less of the tower lies behind it


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_takes_a_registry_on_the_hub_and_info_says_what_is_weak(
    hub: FakeHub, cache: Path, tmp_path: Path, fitted_at_once
) -> None:
    hub.add(SAE, prisma_files())
    hub.add("org/registry", {"registry.json": json.dumps({"schema": 1, "hosts": [host()]}).encode()})
    out = tmp_path / "defense"
    code, stdout, stderr = run("protect", NAME, "--registry", "org/registry", "--out", out, "--device", "cpu")
    assert code == 0, stderr
    assert f"written     {out}" in stdout
    assert "weak        fitted on drawn scenes" in stdout
    assert f"ready       RobustClassifier.from_pretrained({NAME!r})" in stdout
    assert "looking for a ready defense" in stderr
    code, stdout, _ = run("info", out)
    assert code == 0
    assert "weak        fitted on drawn scenes" in stdout


@pytest.mark.parametrize(
    "arguments", [[], ["--pretrained", "openai"], ["--list", "--verify-registry"], ["ViT-B-32", "--list"]]
)
def test_the_command_does_one_thing(arguments: list[str]) -> None:
    code, stdout, stderr = run("protect", *arguments)
    assert (code, stdout) == (2, "")
    assert "give the name of a model, or --list, or --verify-registry" in " ".join(stderr.replace("│", " ").split())
