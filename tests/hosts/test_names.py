"""Models by name: as papers spell them, with the GELU that their weights were trained with, and towers of our own."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil

import pytest

pytest.importorskip("open_clip")
import open_clip
import torch

from defense.errors import ConfigError
from defense.hosts import open_clip_names
from defense.hosts.clip import Clip, load_clip
from defense.hosts.open_clip_names import known_name, needs_quick_gelu, spelled


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("ViT-B-32", "ViT-B-32"),
        ("ViT-B/32", "ViT-B-32"),
        ("vit-b/32", "ViT-B-32"),
        ("ViT-L/14@336px", "ViT-L-14-336"),
        ("ViT-L/14@336", "ViT-L-14-336"),
        ("ViT-B/16-SigLIP", "ViT-B-16-SigLIP"),
        ("ViT-B/32-quickgelu", "ViT-B-32-quickgelu"),
    ],
)
def test_a_name_may_be_spelled_as_in_papers(typed, name):
    assert known_name(typed) == spelled(typed) == name


def test_every_name_of_open_clip_is_its_own():
    assert [known_name(name) for name in open_clip.list_models()] == open_clip.list_models()


def test_a_name_that_is_nearly_one_is_answered_with_those_that_are_near():
    with pytest.raises(ConfigError, match=r"did you mean .*ViT-B-32"):
        known_name("ViTB32")
    with pytest.raises(ConfigError, match=r"list_models\(\)"):
        known_name("qqqqqqqqq")
    assert spelled("local-dir:/a/b") == "local-dir:/a/b"


@pytest.mark.parametrize("name", ["timm:no_such_vit", "timm:vit_tiny_patch16_224", "transformers:/no/such/folder"])
def test_a_model_that_its_library_cannot_load_is_one_error(name, monkeypatch):
    """Also weights that are neither cached nor to be had without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if name.startswith("transformers"):
        pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=f"{name.split(':')[0]} cannot load"):
        load_clip(name)


def test_a_vit_of_timm_is_loaded_by_name_without_its_classes(monkeypatch):
    import timm

    create = timm.create_model

    def drawn(name: str, **settings):
        assert settings.pop("pretrained"), "no random weights"
        model = create(
            name, pretrained=False, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, **settings
        )
        model.pretrained_cfg |= {"crop_pct": 1.0, "crop_mode": "center"}
        return model

    monkeypatch.setattr(timm, "create_model", drawn)
    clip = load_clip("timm:vit_tiny_patch16_224")
    assert clip.image_embeds(torch.zeros(3, 3, 32, 32)).shape == (3, 32)
    assert clip.preprocess.size == clip.tower.image_size == (32, 32)


# --- GELU -------------------------------------------------------------------------------------------------------------


def test_a_tag_decides_which_gelu_a_model_takes():
    assert needs_quick_gelu("ViT-B-32", "openai"), "the name is of the exact GELU, the weights are not"
    assert not needs_quick_gelu("ViT-B-32-quickgelu", "openai"), "it takes it by its name"
    assert not needs_quick_gelu("ViT-B-32", "laion2b_e16")


@pytest.fixture
def published(monkeypatch):
    """Let a file be one of those that open_clip has a tag for: (bytes, tag's settings) by model and tag."""

    def publish(content: bytes, **settings) -> None:
        digest = hashlib.sha256(content).hexdigest()
        known = {
            ("ViT-B-32", "whole"): {"url": f"https://a.invalid/{digest}/ViT-B-32.pt", **settings},
            ("ViT-B-16", "other"): {"url": "https://a.invalid/vit-12345678.pt", "quick_gelu": True},
            ("ViT-B-16", "hub"): {"hf_hub": "a/b"},
        }
        monkeypatch.setattr(open_clip, "list_pretrained", lambda: list(known))
        monkeypatch.setattr(open_clip_names, "get_pretrained_cfg", lambda *key: known.get(key, {}))

    return publish


@pytest.mark.parametrize("is_quick", [True, False])
def test_a_file_is_known_by_its_hash(tmp_path, published, is_quick, caplog):
    file = tmp_path / "weights.pt"
    file.write_bytes(b"weights")
    published(b"weights", quick_gelu=is_quick)
    assert needs_quick_gelu("ViT-B-32", str(file)) is is_quick
    if is_quick:
        assert not needs_quick_gelu("ViT-B-32-quickgelu", str(file))
    else:
        with pytest.raises(ConfigError, match=r"trained with the exact GELU; use the name ViT-B-32$"):
            needs_quick_gelu("ViT-B-32-quickgelu", str(file))
    assert not caplog.records


def test_the_short_hash_in_a_name_of_open_clips_releases_is_read():
    address = "https://a.invalid/download/v0.2-weights/vit_b_32-quickgelu-laion400m_e31-d867053b.pt"
    assert open_clip_names._digests(address) == ["d867053b"]
    assert open_clip_names._digests("") == []
    known = [open_clip.get_pretrained_url(*each) for each in open_clip.list_pretrained()]
    assert sum(bool(open_clip_names._digests(url or "")) for url in known) > 20, "the table states hashes"


@pytest.mark.parametrize("stated", [{"quick_gelu": True}, {"quick_gelu": False}, {}])
def test_a_file_is_known_by_the_configuration_beside_it(tmp_path, stated):
    file = tmp_path / "open_clip_model.safetensors"
    file.write_bytes(b"weights")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": stated}))
    assert needs_quick_gelu("ViT-B-32", str(file)) is stated.get("quick_gelu", False)
    (tmp_path / "open_clip_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="no configuration of open_clip"):
        needs_quick_gelu("ViT-B-32", str(file))


def test_of_a_file_that_says_nothing_a_warning_says_so(tmp_path, caplog):
    file = tmp_path / "mine.pt"
    file.write_bytes(b"weights")
    with caplog.at_level(logging.WARNING):
        assert not needs_quick_gelu("ViT-B-32", str(file))
        assert not needs_quick_gelu("ViT-B-16-SigLIP", str(file))
    (record,) = caplog.records  # SigLIP's has no QuickGELU that could be meant
    assert "ViT-B-32 takes the exact GELU" in record.getMessage()


def test_a_model_is_loaded_with_the_gelu_of_its_weights(tmp_path, monkeypatch):
    small = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }
    (tmp_path / "tiny-test.json").write_text(json.dumps(small))
    try:
        open_clip.add_model_config(tmp_path / "tiny-test.json")
        torch.save(open_clip.create_model("tiny-test").state_dict(), tmp_path / "weights.pt")
        for is_quick in (True, False):
            monkeypatch.setattr(open_clip_names, "_trained_with_quick_gelu", lambda *_, is_quick=is_quick: is_quick)
            clip = load_clip("TINY/TEST", str(tmp_path / "weights.pt"))
            assert clip.tower.quick_gelu is is_quick
            assert clip.id_as("TINY/TEST").model == "tiny-test"
    finally:
        open_clip.factory._MODEL_CONFIGS.pop("tiny-test", None)
        open_clip.factory._MODEL_CONFIG_PATHS[:] = [
            path for path in open_clip.factory._MODEL_CONFIG_PATHS if path.parent != tmp_path
        ]


# --- the tower of the CLIP for photographs ----------------------------------------------------------------------------


def test_a_configuration_may_name_the_photo_tower(tmp_path):
    """In a process of its own: nothing else may have registered the tower."""
    import subprocess
    import sys
    from importlib import resources

    shutil.copy(str(resources.files("defense.embedded.photo").joinpath("open_clip_config.json")), tmp_path)
    code = (
        "import sys, torch; from defense.hosts.clip import load_clip; "
        "clip = load_clip('local-dir:' + sys.argv[1]); tower = clip.tower; "
        "print(len(tower.blocks), tower.d_model, tower.n_prefix, tower.grid_size, tower.image_size, "
        "tuple(clip.image_embeds(torch.zeros(2, 3, 160, 160)).shape))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split("\n")[0] == "6 256 1 (10, 10) (160, 160) (2, 256)"


def test_a_clip_without_texts_says_so_when_asked_for_ids(tiny_clip):
    from ..conftest import clip_of

    with pytest.raises(ConfigError, match="there is no tokenizer"):
        Clip(tiny_clip, clip_of(tiny_clip).preprocess).text_embeds(_prompts())


def _prompts():
    from defense.data.labels import Prompts

    return Prompts(("a", "b"), ("{}",))
