"""The same random weights in two libraries: a model of open_clip or timm, and its twin of transformers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import open_clip
import timm
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from defense.core.latents import LatentSet
from defense.data.preprocess import Preprocess
from defense.hosts.clip import Clip
from defense.hosts.defense import Defense, Site

from ..conftest import D_MODEL, random_sae

N_BLOCKS, N_WORDS = 3, 49408
POINT = "blocks.1.hook_resid_post"
PREPROCESS = Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest")
FRAME = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
LABELS = ["cat", "red fish", "3 dogs!"]
SIZES = {
    "hidden_size": D_MODEL,
    "intermediate_size": 4 * D_MODEL,
    "num_hidden_layers": N_BLOCKS,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": N_WORDS,
    "max_position_embeddings": 16,
}


def _both(to: str, of: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight and bias, under another name."""
    return {f"{to}.{kind}": state[f"{of}.{kind}"] for kind in ("weight", "bias")}


def _thirds(to: str, of: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values that stand in one matrix; `to` and `of` have {} for what differs."""
    return {
        f"{to.format(part)}.{kind}": third
        for kind in ("weight", "bias")
        for part, third in zip("qkv", state[of.format(kind)].chunk(3), strict=True)
    }


def _open_clip_blocks(to: str, of: str, n: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    found: dict[str, Tensor] = {}
    for block in range(n):
        here, there = f"{to}encoder.layers.{block}.", f"{of}transformer.resblocks.{block}."
        for name, own in names.items():
            found |= _both(here + name, there + own, state)
        found |= _thirds(here + "self_attn.{}_proj", there + "attn.in_proj_{}", state)
    return found


def open_clip_pair(*, quick_gelu: bool = True) -> tuple[nn.Module, nn.Module]:
    """A CLIP of open_clip, and its twin."""
    vision = {"image_size": 32, "layers": N_BLOCKS, "width": D_MODEL, "head_width": 32, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": N_WORDS, "width": 32, "heads": 2, "layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own = open_clip.CLIP(32, vision, text, quick_gelu=quick_gelu)
        own.logit_scale.data.fill_(3.0)
    act = {"hidden_act": "quick_gelu" if quick_gelu else "gelu"}
    config = transformers.CLIPConfig(
        vision_config={**SIZES, **act, "projection_dim": 32},
        text_config={**TEXT_SIZES, **act, "projection_dim": 32, "bos_token_id": 49406, "eos_token_id": 49407},
        projection_dim=32,
    )
    twin = transformers.CLIPModel(config)
    state = own.state_dict()
    twin.load_state_dict(
        {
            **_open_clip_blocks("vision_model.", "visual.", N_BLOCKS, state),
            **_open_clip_blocks("text_model.", "", 1, state),
            **_both("vision_model.pre_layrnorm", "visual.ln_pre", state),
            **_both("vision_model.post_layernorm", "visual.ln_post", state),
            **_both("text_model.final_layer_norm", "ln_final", state),
            "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
            "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
            "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
            "visual_projection.weight": state["visual.proj"].T,
            "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
            "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
            "text_projection.weight": state["text_projection"].T,
            "logit_scale": state["logit_scale"],
        }
    )
    return _still(own), _still(twin)


def siglip_pair(kind: str = "Siglip") -> tuple[nn.Module, nn.Module]:
    """SigLIP's vision tower as open_clip wraps timm's, and the same inside a twin, "Siglip" or "Siglip2"."""
    own = OnlyVision(
        _drawn("vit_base_patch16_siglip_224", img_size=32, patch_size=8, act_layer="gelu_tanh", num_classes=0)
    )
    sizes = dict(SIZES)
    if kind == "Siglip2":
        sizes["num_patches"] = (sizes.pop("image_size") // 8) ** 2
    config = getattr(transformers, f"{kind}Config")(
        vision_config=sizes, text_config={**TEXT_SIZES, "projection_size": D_MODEL}
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        twin = getattr(transformers, f"{kind}Model")(config)
    state = own.visual.trunk.state_dict()
    found = _timm_blocks("encoder.layers.", "self_attn.{}_proj", "self_attn.out_proj", state)
    found = {name.replace(".norm", ".layer_norm"): tensor for name, tensor in found.items()}
    patches = state["patch_embed.proj.weight"]
    queries = {kind: state[f"attn_pool.q.{kind}"] for kind in ("weight", "bias")}
    twin.vision_model.load_state_dict(
        {
            **found,
            **_both("embeddings.patch_embedding", "patch_embed.proj", state),
            "embeddings.patch_embedding.weight": (
                patches.permute(0, 2, 3, 1).flatten(1) if kind == "Siglip2" else patches
            ),
            "embeddings.position_embedding.weight": state["pos_embed"][0],
            **_both("post_layernorm", "norm", state),
            "head.probe": state["attn_pool.latent"],
            **{
                f"head.attention.in_proj_{kind}": torch.cat([query, state[f"attn_pool.kv.{kind}"]])
                for kind, query in queries.items()
            },
            **_both("head.attention.out_proj", "attn_pool.proj", state),
            **_both("head.layernorm", "attn_pool.norm", state),
            **_both("head.mlp.fc1", "attn_pool.mlp.fc1", state),
            **_both("head.mlp.fc2", "attn_pool.mlp.fc2", state),
        }
    )
    return _still(own), _still(twin)


def dinov2_pair() -> tuple[nn.Module, nn.Module]:
    """DINOv2 of timm, on its own, and its twin."""
    own = _drawn("vit_small_patch14_dinov2", img_size=32, patch_size=8, num_classes=0)
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    twin = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    state = own.state_dict()
    found = _timm_blocks("encoder.layer.", "attention.{}_proj", "attention.o_proj", state)
    if not found.keys() <= twin.state_dict().keys():  # as earlier releases called the layers
        before = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
        for now, then in {**before, "o_proj": "output.dense"}.items():
            found = {name.replace(now, then): tensor for name, tensor in found.items()}
    for block in range(N_BLOCKS):
        for scale in "12":
            found[f"encoder.layer.{block}.layer_scale{scale}.lambda1"] = state[f"blocks.{block}.ls{scale}.gamma"]
    twin.load_state_dict(
        {
            **found,
            **_both("embeddings.patch_embeddings.projection", "patch_embed.proj", state),
            **_both("layernorm", "norm", state),
            "embeddings.cls_token": state["cls_token"],
            "embeddings.mask_token": torch.ones(1, D_MODEL),
            "embeddings.position_embeddings": state["pos_embed"],
        }
    )
    return _still(own), _still(twin)


def _timm_blocks(to: str, attention: str, out: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for block in range(N_BLOCKS):
        here, there = f"{to}{block}.", f"blocks.{block}."
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            found |= _both(here + name, there + name, state)
        found |= _both(here + out, there + "attn.proj", state)
        found |= _thirds(here + attention, there + "attn.qkv.{}", state)
    return found


class OnlyVision(nn.Module):
    """A vision transformer of timm as open_clip's `CustomTextCLIP` holds it, and nothing else."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.trunk, self.visual.head = trunk, nn.Sequential()
        self.visual.image_size = (32, 32)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        return self.visual.trunk(pixel_values)


def _drawn(name: str, **settings) -> nn.Module:
    """A small model of timm whose every weight is random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(
            name, pretrained=False, embed_dim=D_MODEL, depth=N_BLOCKS, num_heads=2, **settings
        ).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def _still(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def llava_of(vision: nn.Module, **settings) -> nn.Module:
    """A language model of random weights that is given what a CLIP's vision tower of transformers sees."""
    config = transformers.LlavaConfig(
        vision_config=vision.config,
        text_config=transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=200, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        image_token_id=199, image_seq_length=16, **settings,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = transformers.LlavaForConditionalGeneration(config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    return _still(model)


# --- what goes through them -------------------------------------------------------------------------------------------


def pixels(n: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def a_defense(model, *, block: int = 1, **fields):
    """A defense fitted, so to say, on a model; `fields` of its latent set."""
    latent_set = LatentSet("text", tuple(range(60)), **fields)
    clip_id = Clip(model, PREPROCESS).id_as("twin")
    site = random_site(block, latent_set)
    return Defense(clip_id, PREPROCESS, (site,))


def random_site(block: int, latent_set: LatentSet):
    sae = random_sae(act="topk", k=20)
    return Site(f"blocks.{block}.hook_resid_post", sae.config, sae.parameters_numpy(), (latent_set,))


def embeds(model) -> torch.Tensor:
    return Clip(model, PREPROCESS).image_embeds(pixels())


def vision_model(clip, **settings):
    """The vision tower of a CLIP of transformers alone."""
    model = transformers.CLIPVisionModel(clip.config.vision_config)
    model.load_state_dict(clip.vision_model.state_dict())
    return model.eval()


def pictures(n: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(n)]
