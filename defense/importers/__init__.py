"""Published SAE checkpoints, converted once to our own form (checkpoint.py).

| module | what it reads |
|---|---|
| prisma | `weights.pt` or `n_images_*.pt` of ViT-Prisma, with its `config.json` |
| saelens | `sae_weights.safetensors` and `cfg.json` of SAELens, before and since version 6 |
| sparsify | `sae.safetensors` and `cfg.json` of EleutherAI's sparsify |
| dictionary_learning | `ae.pt` and `config.json` of dictionary_learning |
| patchsae | the `.pt` files of PatchSAE, HugoFry and ConceptScope |
| sae_for_vlm | the same as dictionary_learning, as "SAEs learn monosemantic features in VLMs" names its runs |
| overcomplete | state dicts of Overcomplete |
| saev | the `.pt` files of saev: a line of JSON, then the weights |
| clipscope | the `.pt` files of clipscope |
| msae | the `.pth` files of Matryoshka SAE for CLIP, whose settings are in the file name |
| openai | the `.pt` files of openai/sparse_autoencoder |

Each module has `detect` and `read`, and its docstring states the layout it reads and every transpose and fold.
`common.py` holds what they share, `pickles.py` and
`opcodes.py` read pickles without running them. What a file does not say is never
guessed: the caller states it, or the import is refused with the name of what is missing.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np

from defense.core.sae import SparseAutoencoder
from defense.errors import CheckpointError, ConfigError
from defense.store.checkpoint import Checkpoint
from defense.store.folders import read_tensors, sha256_of
from defense.store.hub import Hub, commit_of, hub_source

from .common import Given, Importer, Source

FORMATS = {
    "prisma": "prisma",
    "saelens": "saelens",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
    "patchsae": "patchsae",
    "sae-for-vlm": "sae_for_vlm",
    "overcomplete": "overcomplete",
    "saev": "saev",
    "clipscope": "clipscope",
    "msae": "msae",
    "openai": "openai",
}
"""Name of a format -> the module that knows it."""


def read(
    path: str | os.PathLike[str],
    format: str = "auto",
    *,
    config: str | os.PathLike[str] | None = None,
    license: str = "not stated",
    hub: Hub | None = None,
    **stated: Any,
) -> Checkpoint:
    """Return the SAE of a published checkpoint; `checkpoint.save` writes it.

    Args:
        path: The file with the weights, or the folder that it is alone in; also on the hub, "hf://org/repo/file" or
            "org/repo" (see hub.py), which is then fetched.
        format: A key of `FORMATS`, or "auto": the one that recognizes the file.
        config: Its configuration, where that is not beside it under its usual name.
        license: Of the weights; checkpoints do not say it.
        hub: How the hub is asked.
        stated: What the file does not say, by the names of `common.OPTIONS`.

    Raises:
        CheckpointError: The file is damaged, needs code to be read, has no known format, or leaves something open; or
            see `Hub.fetch_weights`.
        ConfigError: A kind of SAE that there is no arithmetic for, or `stated` contradicts the file.
        ShapeError: Its tensors have other sizes than it says.
        HookPointError: It was trained elsewhere than after a block.
        NonFiniteError: A tensor holds NaN or infinity.
    """
    address = hub_source(path)
    where = Path(path) if address is None else (hub or Hub()).fetch_weights(address)
    source = Source(where, Path(config) if config is not None else None)
    given = Given(source, stated)
    name = _detect(source) if format == "auto" else format
    imported = _importer(name).read(source, given)
    hook_point = given.value("hook_point", imported.hook_point)
    host_model = given.optional("host_model", imported.host_model)
    quick_gelu = given.optional("quick_gelu", imported.quick_gelu)
    given.check_all_used()
    sae = SparseAutoencoder(imported.config, imported.parameters)
    provenance = {"format": name, "file": source.path.name, "sha256": sha256_of(source.path)}
    if address is not None:
        provenance["hub"] = str(address._replace(revision=commit_of(where)))
    return Checkpoint(sae, hook_point, host_model, quick_gelu, license, provenance)


def read_vector(path: Path) -> np.ndarray:
    """Return the one array of a `.npy` or safetensors file.

    Raises:
        CheckpointError: It is no such file, or holds several arrays.
    """
    if path.suffix == ".safetensors":
        arrays = list(read_tensors(path).values())
        if len(arrays) != 1:
            raise CheckpointError(f"{path} holds {len(arrays)} arrays; it must hold one")
        return arrays[0]
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: its header may promise more than is there
        return np.array(mapped)
    except (OSError, ValueError, EOFError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a readable .npy file: {error}") from error


def _importer(name: str) -> Importer:
    if name not in FORMATS:
        raise ConfigError(f"there is no format {name!r}; there are auto, {', '.join(FORMATS)}")
    return cast(Importer, import_module(f".{FORMATS[name]}", __name__))


def _detect(source: Source) -> str:
    found = [name for name in FORMATS if _importer(name).detect(source)]
    if len(found) != 1:
        what = f"could be {' or '.join(found)}" if found else "has no format that is recognized"
        raise CheckpointError(f"{source} {what}; pass --format, one of {', '.join(FORMATS)}")
    return found[0]
