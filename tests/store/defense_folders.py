"""Defenses on disk for tests: one of random numbers, and how its files are changed with and without the manifest."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from defense.core.config import SAEConfig
from defense.core.latents import LatentSet
from defense.errors import CheckpointError, DefenseError
from defense.hosts.defense import Defense, Site
from defense.store.defenses import MANIFEST, load
from defense.store.folders import sha256_of

D_MODEL, D_SAE = 6, 10
SITE_0, SITE_1, GOLDEN = "site-0.safetensors", "site-1.safetensors", "golden.safetensors"
FILES = (SITE_0, SITE_1, GOLDEN)


def random_site(block: int, act: str, *sets: LatentSet, seed: int = 0) -> Site:
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (D_MODEL, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_MODEL), "b_dec": (D_MODEL,)}
    if act == "jumprelu":
        shapes["threshold"] = (D_SAE,)
    config = SAEConfig(D_MODEL, D_SAE, act, k=3 if act == "topk" else None)
    parameters = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Site(f"blocks.{block}.hook_resid_post", config, parameters, sets)


def arrays_of(defense: Defense) -> list[dict[str, np.ndarray]]:
    golden = [] if defense.golden is None else [vars(defense.golden)]
    return [*(dict(site.parameters) for site in defense.sites), *golden]


def are_equal(one: Defense, other: Defense) -> bool:
    """Whether all tensors are equal in names, types, shapes and bits."""
    return [
        {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}
        for arrays in arrays_of(one)
    ] == [
        {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}
        for arrays in arrays_of(other)
    ]


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    edit(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def state_in_manifest(folder: Path, name: str) -> None:
    """Let the manifest state the size and sha256 that a file has now."""
    entry = {"sha256": sha256_of(folder / name), "size": (folder / name).stat().st_size}
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: entry}))


def rewrite_tensors(folder: Path, name: str, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change the tensors of a file, and the manifest with it."""
    tensors = safetensors.numpy.load_file(folder / name)
    edit(tensors)
    safetensors.numpy.save_file(tensors, folder / name)
    state_in_manifest(folder, name)


def everything_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_refused(
    folder: Path, *parts: str, verify: str = "sha256", error: type[DefenseError] = CheckpointError
) -> None:
    with pytest.raises(error) as caught:
        load(folder, verify=verify)
    assert type(caught.value) is error
    for part in parts:
        assert part in str(caught.value)


def flip_byte(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)
