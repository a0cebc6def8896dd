"""A fit that was interrupted: what is kept, what is computed again, and that the end is the same to the byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.data.progress import Progress
from defense.fit import joint
from defense.fit.chunks import chunks
from defense.fit.config import FitConfig
from defense.fit.joint import JointState, learn_removal
from defense.fit.kept import KeptResiduals
from defense.fit.material import Material, Pairs
from defense.fit.placing import fit_defense
from defense.fit.saves import Saves
from defense.fit.sites import SitePlan
from defense.hosts.clip import load_clip
from defense.hosts.tower import VisionTower
from defense.store import defenses
from defense.store.cache import cache_folder

from ..conftest import random_sae

POINT = "blocks.{}.hook_resid_post"
CONFIG = FitConfig(n_candidates=20, steps=20, batch=6, clean_budget=1.0, sparsity=0.0)
TEXT_EMBEDS = torch.nn.functional.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(9)), dim=1)


def noise(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def clip(tiny_folder):
    return load_clip(f"local-dir:{tiny_folder}")


def material_of(clip, n: int = 24) -> Material:
    clean = noise(n, 0)
    label = (clip.image_embeds(clean) @ TEXT_EMBEDS.T).argmax(1)
    pairs = Pairs(clean, noise(n, 1), noise(n, 2), label, (label + 1) % 5)
    return Material(pairs, np.zeros(n, dtype=np.int64), (), {"kind": "text", "n": n})


def fit(clip, cache: Path | None, out: Path, *, config: FitConfig = CONFIG, **options) -> bytes:
    """Fit two blocks, and return the bytes of the defense."""
    plans = [SitePlan(POINT.format(block), random_sae(block, act="topk", k=8), config) for block in (0, 1)]
    fitted = fit_defense(
        clip, clip.id_as("tiny"), plans, material_of(clip), TEXT_EMBEDS, name="text", folds=2, cache=cache, **options
    )
    defenses.save(fitted.defense, out)
    fitted.forget()
    return b"".join(path.read_bytes() for path in sorted(out.iterdir()))


class Killed(BaseException):
    """Stands in for SIGKILL: nothing catches it."""


@pytest.mark.usefixtures("open_gates")
def test_a_fit_that_is_killed_anywhere_ends_in_the_same_bytes(clip, tmp_path, monkeypatch):
    want = fit(clip, None, tmp_path / "want")
    put, puts = Saves.put, []
    monkeypatch.setattr(Saves, "put", lambda self, key, arrays: puts.append(key) or put(self, key, arrays))
    assert fit(clip, tmp_path / "whole", tmp_path / "got") == want
    assert list((tmp_path / "whole" / "fits").iterdir()) == [], "what only this fit needs is gone when it is done"
    n_puts = len(puts)
    for n in (1, n_puts // 3, n_puts - 2):

        def killing(self, key, arrays, *, left=[n]):  # noqa: B006 - a counter
            put(self, key, arrays)
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        monkeypatch.setattr(Saves, "put", killing)
        with pytest.raises(Killed):
            fit(clip, tmp_path / str(n), tmp_path / "never")
        assert not (tmp_path / "never").exists()
        again: list[object] = []
        monkeypatch.setattr(
            Saves, "put", lambda self, key, arrays, seen=again: seen.append(key) or put(self, key, arrays)
        )
        assert fit(clip, tmp_path / str(n), tmp_path / "got") == want
        assert len(again) <= n_puts - n + 1, "what was done is not done again"


@pytest.mark.slow
def test_a_fit_that_gets_sigkill_ends_in_the_same_bytes(tiny_folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from tests.fit.test_resuming import fit, load_clip
        from defense.fit import gates, kept, saves
        for name in ("check_explained", "check_fooled", "check_validation"):
            setattr(gates.Gates, name, lambda *_: None)
        cache, out, after = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
        count = 0
        def counted(write):
            def written(*arguments):
                global count
                write(*arguments)
                count += 1
                if count == after:
                    os.kill(os.getpid(), signal.SIGKILL)
            return written
        kept.KeptResiduals._write = counted(kept.KeptResiduals._write)
        saves.Saves.put = counted(saves.Saves.put)
        fit(load_clip("local-dir:{tiny_folder}"), cache, out)
        """)
    )

    def run(name: str, after: int) -> int:
        command = [sys.executable, script, tmp_path / f"cache-{name}", tmp_path / name, str(after)]
        return subprocess.run([*map(str, command)], check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode

    assert run("want", 0) == 0
    for after in (40, 45, 8):  # of 102 files that are kept; what is there already is not written again
        assert run("got", after) == -signal.SIGKILL
    assert run("got", 0) == 0
    for path in (tmp_path / "want").iterdir():
        assert (tmp_path / "got" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("open_gates")
def test_another_budget_finds_the_joint_step_done(clip, tmp_path, monkeypatch):
    def abandoned(*_: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("defense.fit.placing._helping", abandoned)
        with pytest.raises(Killed):
            fit(clip, tmp_path / "cache", tmp_path / "out")
    learned = []
    learn = joint.learn_removal
    monkeypatch.setattr("defense.fit.selecting.learn_removal", lambda *args: learned.append(1) or learn(*args))
    fit(clip, tmp_path / "cache", tmp_path / "out")
    assert learned == []


# --- residuals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many pictures went through the tower at once, each time."""
    seen: list[int] = []
    resid = VisionTower.resid
    monkeypatch.setattr(
        VisionTower, "resid", lambda self, pixels, *where: seen.append(len(pixels)) or resid(self, pixels, *where)
    )
    return seen


def test_a_picture_is_encoded_once_for_all_fits(clip, tmp_path, encoded):
    pixels = noise(7, 3)
    first = KeptResiduals(clip.tower, tmp_path).resid(pixels, POINT.format(1))
    assert encoded == [7]
    again = KeptResiduals(clip.tower, tmp_path).resid(pixels.flip(0), POINT.format(1))
    assert encoded == [7]
    assert torch.equal(again, first.flip(0))
    KeptResiduals(clip.tower, tmp_path).resid(pixels, POINT.format(0))
    assert encoded == [7, 7], "another block is another residual"
    with torch.no_grad():
        clip.model.visual.conv1.weight.mul_(2)
    KeptResiduals(clip.tower, tmp_path).resid(pixels, POINT.format(1))
    assert encoded == [7, 7, 7], "and so is another CLIP's"


def test_a_chunk_that_was_cut_short_is_encoded_as_a_whole(clip, tmp_path, encoded, monkeypatch):
    monkeypatch.setattr("defense.fit.chunks.AT_ONCE", 1)
    monkeypatch.setattr("defense.fit.kept.chunks", lambda n, _: (slice(i, min(n, i + 3)) for i in range(0, n, 3)))
    pixels = noise(7, 3)
    kept = KeptResiduals(clip.tower, tmp_path)
    want = kept.resid(pixels, POINT.format(1))
    assert encoded == [3, 3, 1]
    kept._path(pixels[4], POINT.format(1)).unlink()
    assert torch.equal(KeptResiduals(clip.tower, tmp_path).resid(pixels, POINT.format(1)), want)
    assert encoded == [3, 3, 1, 3]


@pytest.mark.parametrize("damage", [b"", b"no safetensors", None], ids=["empty", "other", "cut"])
def test_a_damaged_residual_is_encoded_again_and_said_to_be(clip, tmp_path, caplog, damage):
    pixels = noise(2, 3)
    kept = KeptResiduals(clip.tower, tmp_path)
    want = kept.resid(pixels, POINT.format(1))
    path = kept._path(pixels[1], POINT.format(1))
    path.write_bytes(path.read_bytes()[:-7] if damage is None else damage)
    assert torch.equal(kept.resid(pixels, POINT.format(1)), want)
    assert "encoded again" in caplog.text
    assert kept._read(path, want[1].shape) is not None


def test_what_was_not_used_for_longest_goes_first(clip, tmp_path):
    kept = KeptResiduals(clip.tower, tmp_path)
    pixels = noise(4, 3)
    kept.resid(pixels, POINT.format(1))
    paths = [kept._path(each, POINT.format(1)) for each in pixels]
    for age, path in enumerate(paths):
        os.utime(path, (1000 - age, 1000 - age))
    kept.resid(pixels[3:], POINT.format(1))  # the oldest is used again
    kept.trim(2 * paths[0].stat().st_size)
    assert [path.exists() for path in paths] == [True, False, False, True]
    KeptResiduals(clip.tower, None).trim(0)


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("CLIP_DEFENSE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("CLIP_DEFENSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "clip-defense"


def test_saves_keep_apart_what_another_basis_decides(tmp_path):
    first, second = Saves(tmp_path, {"seed": 1}), Saves(tmp_path, {"seed": 2})
    first.put({"stage": "a"}, {"x": np.arange(3)})
    assert second.get({"stage": "a"}) is None
    np.testing.assert_array_equal(Saves(tmp_path, {"seed": 1}).get({"stage": "a"})["x"], [0, 1, 2])
    assert first.memo({"stage": "a"}, lambda: pytest.fail("it is there"))["x"].tolist() == [0, 1, 2]
    first.clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("n", "each", "want"), [(5, 10, [2, 2, 1]), (3, 10**9, [1, 1, 1]), (4, 1, [4]), (0, 1, [])])
def test_chunks_are_cut_by_bytes(monkeypatch, n, each, want):
    monkeypatch.setattr("defense.fit.chunks.AT_ONCE", 20)
    assert [part.stop - part.start for part in chunks(n, each)] == want


# --- the joint step ---------------------------------------------------------------------------------------------------


class Pulled:
    """A trial of one latent, which pictures that are learned from want gone, and the others only in part, or not."""

    def __init__(self, held_out_wants: float, n: int = 20) -> None:
        self.latents, self.bytes_each = np.arange(1), 1
        group = SimpleNamespace(answer=torch.zeros(n, dtype=torch.int64))
        tower = SimpleNamespace(fast=lambda: torch.no_grad() if False else torch.enable_grad())
        self.fit = SimpleNamespace(groups={"attacked": group}, device=torch.device("cpu"), tower=tower)
        _, held_out = joint._split({"attacked": n}, 0)
        self.wants = torch.ones(n)
        self.wants[held_out["attacked"]] = held_out_wants

    def logits(self, _group: str, removal: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        distance = (removal - self.wants[rows]).square()
        return torch.stack([-distance, torch.zeros_like(distance)], 1)


class Counted(Progress):
    def __init__(self) -> None:
        self.done = 0

    def stage(self, name, total):
        from contextlib import nullcontext

        def advance(n: int) -> None:
            self.done += n

        return nullcontext(advance)


def test_the_joint_step_stops_where_held_out_pictures_gain_no_more():
    config = FitConfig(steps=200, batch=8, sparsity=0.0)
    counted = Counted()
    removal = learn_removal(Pulled(0.3), config, JointState(), counted)
    assert counted.done < 100
    assert removal[0] == pytest.approx(0.3, abs=0.2), "what was best for the pictures that are not learned from"
    agreed = Counted()
    assert learn_removal(Pulled(1.0), config, JointState(), agreed)[0] > 0.95
    assert agreed.done > counted.done


def test_the_joint_step_goes_on_from_where_it_stood():
    config = FitConfig(steps=50, batch=8, sparsity=1e-3)
    kept: list[dict[str, np.ndarray]] = []
    want = learn_removal(Pulled(0.9), config, JointState(save=kept.append))
    assert len(kept) == 5
    for arrays in kept:
        np.testing.assert_array_equal(learn_removal(Pulled(0.9), config, JointState(arrays)), want)


def test_small_groups_are_learned_from_whole():
    learned, held_out = joint._split({"a": 9, "b": 50}, 0)
    assert (len(learned["a"]), len(learned["b"]), held_out) == (9, 50, {})
    learned, held_out = joint._split({"a": 10, "b": 50}, 0)
    assert (len(held_out["a"]), len(held_out["b"])) == (2, 10)
    assert not set(learned["b"].tolist()) & set(held_out["b"].tolist())
