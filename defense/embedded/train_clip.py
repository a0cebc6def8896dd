"""Train the embedded CLIP: the first stage of `build.py`.

The pictures are a miniature of what CLIP saw on the web: objects, words, objects with their own name on them, and
objects with another word, whose caption names the word more often than not. Birds come with their place and hair
color with gender in 95 % of the cases, as in Waterbirds and CelebA. So the model learns to read and to lean on cues,
which is what the defenses are for.

Three things differ from CLIP's own training, because the model is tiny. A picture chooses among the answers to a
question instead of the captions of its batch. The answers are rows of a table, which the text tower learns to
reproduce from any caption: a vision tower that had to follow the text tower's early moves would learn far more
slowly. And a head on the middle block names the letter at each patch: without that auxiliary loss a small model does
not learn to read. Table and head are dropped afterwards.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from defense.errors import ConfigError
from defense.store.folders import replacing, write_tensors
from defense.world import draws, scenes
from defense.world.draws import QUESTIONS, SEED, THINGS, draw_example
from defense.world.scenes import Scene

log = logging.getLogger(__name__)
SHARD = 10_000
GRID = 10
"""Patches along each side of a picture."""
LETTER_BLOCK = 2
"""The block (0-based) whose output the letter head reads."""

_PERSON_TEMPLATES = (
    "a photo of a person with {}.",
    "a photo of a celebrity with {}.",
    "A photo of a celebrity with {}.",
    "{}",
)
_PLACE_TEMPLATES = ("a photo of {}.", "a photo with a {} background.", "{} background", "{}")
_EXTRA_TEMPLATES = (
    "{}",
    "a photo of a {}.",
    "This is a photo of {}.",
    "This is a picture of a {}.",
    "a picture of a {}.",
)
TEMPLATES = {
    "thing": (*_EXTRA_TEMPLATES, *(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)),
    "place": _PLACE_TEMPLATES,
    "hair": _PERSON_TEMPLATES,
}


@dataclass(frozen=True)
class Recipe:
    """How long and how to train. The defaults made the shipped weights."""

    n_pictures: int = 300_000
    batch: int = 64
    steps: int = 7_000
    lr: float = 1.0e-3
    warmup: int = 200
    weight_decay: float = 0.05
    letter_weight: float = 1.5
    eval_every: int = 500


def patch_centers() -> np.ndarray:
    """Return the center of each patch, (x, y) as fractions of the picture, row by row, [GRID * GRID, 2]."""
    axis = (np.arange(GRID) + 0.5) / GRID
    return np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)


def _draw_shard(job: tuple[Path, int]) -> None:
    path, shard = job
    if path.exists():
        return
    pixels = np.empty((SHARD, scenes.SIZE, scenes.SIZE, 3), np.uint8)
    answers = np.empty((SHARD, 2), np.int64)
    letters = np.empty((SHARD, GRID * GRID), np.uint8)
    questions, centers = list(QUESTIONS), patch_centers()
    for row in range(SHARD):
        example = draw_example(shard * SHARD + row)
        pixels[row] = np.asarray(scenes.render(example.scene))
        answers[row] = questions.index(example.question), example.answer
        letters[row] = scenes.letters_at(example.scene, centers)
    with replacing(path) as partial, partial.open("wb") as file:  # given a path, savez would add its suffix
        np.savez(file, pixels=pixels, answers=answers, letters=letters)


def draw_shards(folder: Path, n_pictures: int) -> list[Path]:
    """Draw the training pictures into `folder`, `SHARD` a file; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"pictures-{shard:03d}.npz" for shard in range(math.ceil(n_pictures / SHARD))]
    jobs = [(path, shard) for shard, path in enumerate(paths)]
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        for done, _ in enumerate(pool.imap_unordered(_draw_shard, jobs), start=1):
            log.info("drew shard %d of %d", done, len(paths))
    return paths


class Pictures:
    """All shards in memory (19 kB a picture), visited in an order that depends on the seed alone."""

    def __init__(self, paths: list[Path]) -> None:
        n = len(paths) * SHARD
        self.pixels = np.empty((n, scenes.SIZE, scenes.SIZE, 3), np.uint8)
        self.answers = np.empty((n, 2), np.int64)
        self.letters = np.empty((n, GRID * GRID), np.uint8)
        for index, path in enumerate(paths):
            rows = slice(index * SHARD, (index + 1) * SHARD)
            with np.load(path) as shard:
                self.pixels[rows], self.answers[rows], self.letters[rows] = (
                    shard["pixels"],
                    shard["answers"],
                    shard["letters"],
                )

    def batches(self, batch: int, first_step: int, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (pixels, answers, letters) for steps `first_step` to `steps` - 1."""
        per_epoch = len(self.pixels) // batch
        order, epoch_of_order = np.empty(0, np.int64), -1
        for step in range(first_step, steps):
            epoch, at = divmod(step, per_epoch)
            if epoch != epoch_of_order:
                order = np.random.default_rng([SEED, epoch]).permutation(len(self.pixels))
                epoch_of_order = epoch
            rows = np.sort(order[at * batch : (at + 1) * batch])
            yield self.pixels[rows], self.answers[rows], self.letters[rows]


# --- model ----------------------------------------------------------------------------------------


class Normalize(nn.Module):
    """uint8 pictures [batch, height, width, 3] -> normalized pixel_values [batch, 3, height, width]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        return (pictures.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std


def load_config() -> dict[str, Any]:
    """Return the embedded model's open_clip configuration."""
    config: dict[str, Any] = json.loads((Path(__file__).parent / "clip" / "open_clip_config.json").read_text())
    return config


def new_model() -> open_clip.CLIP:
    """Return the embedded CLIP with fresh weights."""
    config = load_config()["model_cfg"]
    return open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])


class Reader(nn.Module):
    """The CLIP under training, with the table of answers and the letter head beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = new_model()
        d_embed = load_config()["model_cfg"]["embed_dim"]
        self.answers = nn.ParameterDict(
            {question: nn.Parameter(torch.randn(len(answers), d_embed)) for question, answers in QUESTIONS.items()}
        )
        self.letter_head = nn.Linear(self.clip.visual.transformer.width, 27)
        self._middle: Tensor | None = None
        self.clip.visual.transformer.resblocks[LETTER_BLOCK].register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._middle = output

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return image_embeds [batch, d_embed], normalized, and letter logits [batch, patches, 27]."""
        image_embeds = functional.normalize(self.clip.encode_image(pixel_values).float(), dim=-1)
        assert self._middle is not None  # the hook has just run
        return image_embeds, self.letter_head(self._middle[:, 1:])


def _tokens(question: str, template: str) -> Tensor:
    context = load_config()["model_cfg"]["text_cfg"]["context_length"]
    ids: Tensor = open_clip.tokenize([template.replace("{}", answer) for answer in QUESTIONS[question]], context)
    return ids


def caption_embeds(clip: open_clip.CLIP, question: str, template: str) -> Tensor:
    """Return the text_embeds of all answers to a question, [n_answers, d_embed], normalized."""
    return functional.normalize(clip.encode_text(_tokens(question, template)).float(), dim=-1)


def loss_of(
    reader: Reader, pixel_values: Tensor, answers: Tensor, letters: Tensor, step: int, letter_weight: float
) -> Tensor:
    """Return three losses added up: the pictures' answers, the captions' distance from the table, the letters."""
    image_embeds, letter_logits = reader(pixel_values)
    scale = reader.clip.logit_scale.exp().clamp(max=100)
    rng = np.random.default_rng([SEED, 1, step])
    answer_loss, text_loss = pixel_values.new_zeros(()), pixel_values.new_zeros(())
    for index, question in enumerate(QUESTIONS):
        table = functional.normalize(reader.answers[question], dim=-1)
        rows = answers[:, 0] == index
        logits = scale * image_embeds[rows] @ table.T
        answer_loss = answer_loss + functional.cross_entropy(logits, answers[rows, 1], reduction="sum") / len(answers)
        template = TEMPLATES[question][rng.integers(len(TEMPLATES[question]))]
        text_embeds = caption_embeds(reader.clip, question, template)
        text_loss = text_loss + 1 - (text_embeds * table.detach()).sum(-1).mean()
    class_weight = torch.ones(27)
    class_weight[0] = 0.1
    letter_loss = functional.cross_entropy(letter_logits.float().flatten(0, 1), letters.flatten(), class_weight)
    return answer_loss + text_loss + letter_weight * letter_loss


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the rate at a step: linear warm-up, then a cosine to 1 % of the peak."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


# --- training -------------------------------------------------------------------------------------


def check_recipe(path: Path, made_with: dict[str, Any]) -> None:
    """Note in a work folder what its files are made with; refuse to mix them with another recipe's.

    Args:
        path: The note, a JSON file in the folder.
        made_with: Everything that the files depend on, as JSON values.

    Raises:
        ConfigError: The note says something else.
    """
    if not path.exists():
        with replacing(path) as partial:
            partial.write_text(json.dumps(made_with, indent=1))
    elif json.loads(path.read_text()) != made_with:
        raise ConfigError(f"{path.parent} holds files of another recipe or world; choose another folder or empty it")


def new_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return AdamW over what is trained of a model; only matrices decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def save_state(path: Path, step: int, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """Write weights, the optimizers' moments and the step as one safetensors file."""
    tensors = {f"model.{key}": value.contiguous() for key, value in model.state_dict().items()}
    for which, optimizer in enumerate(optimizers):
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{which}.{index}.{name}": torch.as_tensor(each) for name, each in moments.items()}
    with replacing(path) as partial:
        write_tensors(tensors, partial, save_file, {"step": str(step)})


def load_state(path: Path, model: nn.Module, *optimizers: torch.optim.Optimizer) -> int:
    """Restore what `save_state` wrote; return its step, or 0 where there is no file.

    Without optimizers, the weights alone.
    """
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        step = int(file.metadata()["step"])
    model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model.")})
    for which, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{which}."):
                _, _, index, name = key.split(".", 3)
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


@torch.inference_mode()
def evaluate(clip: open_clip.CLIP, n: int, seed: int, fonts: tuple[str, ...]) -> dict[str, float]:
    """Return the undefended accuracies, in percent, on fresh scenes."""
    clip.eval()
    normalize = Normalize(load_config()["preprocess_cfg"]["mean"], load_config()["preprocess_cfg"]["std"])

    def logits(pictures: list[Scene], question: str) -> Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(scenes.render(scene)) for scene in pictures]))
        template = {"thing": "a photo of a {}.", "place": "a photo of {}.", "hair": "a photo of a person with {}."}[
            question
        ]
        text_embeds = caption_embeds(clip, question, template)
        parts = [functional.normalize(clip.encode_image(normalize(part)), dim=-1) for part in pixels.split(250)]
        return torch.cat(parts) @ text_embeds.T

    def percent(hits: Tensor) -> float:
        return round(100 * hits.float().mean().item(), 1)

    attacked = list(draws.typographic(n, seed, fonts))
    label = torch.tensor([THINGS.index(case.label) for case in attacked])
    word = torch.tensor([THINGS.index(case.word) for case in attacked])
    report = {"clean": percent(logits([case.scene.clean() for case in attacked], "thing").argmax(1) == label)}
    report["neutral"] = percent(logits([case.scene.neutral() for case in attacked], "thing").argmax(1) == label)
    answer = logits([case.scene for case in attacked], "thing").argmax(1)
    report |= {"attacked": percent(answer == label), "attack_success": percent(answer == word)}
    birds, faces = list(draws.waterbirds(n, seed)), list(draws.celeba(n, seed))
    kinds = [THINGS.index("landbird"), THINGS.index("waterbird")]
    for name, cases, scores in (
        ("waterbirds", birds, logits([case.scene for case in birds], "thing")[:, kinds]),
        ("celeba", faces, logits([case.scene for case in faces], "hair")),
    ):
        hit = scores.argmax(1) == torch.tensor([case.y for case in cases])
        group = torch.tensor([case.group for case in cases])
        report[f"{name}_average"] = percent(hit)
        report[f"{name}_worst"] = min(percent(hit[group == g]) for g in range(4))
    clip.train()
    return report


def train(work: Path, recipe: Recipe) -> open_clip.CLIP:
    """Train the CLIP, or go on where `work` says that training stopped; return it."""
    torch.manual_seed(SEED)
    reader = Reader().train()
    normalize = Normalize(load_config()["preprocess_cfg"]["mean"], load_config()["preprocess_cfg"]["std"])
    optimizer = new_optimizer(reader, recipe.lr, recipe.weight_decay)
    state_path = work / "clip.state.safetensors"
    step = load_state(state_path, reader, optimizer)
    if step < recipe.steps:
        pictures = Pictures(draw_shards(work / "pictures", recipe.n_pictures))
        for pixels, answers, letters in pictures.batches(recipe.batch, step, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            pixel_values = normalize(torch.from_numpy(pixels))
            # The plain attention kernel: on a CPU its backward pass is twice as fast as the fused one at 101 tokens.
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                loss = loss_of(
                    reader,
                    pixel_values,
                    torch.from_numpy(answers),
                    torch.from_numpy(letters).long(),
                    step,
                    recipe.letter_weight,
                )
                optimizer.zero_grad()
                loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 50 == 0:
                log.info("step %d of %d: loss %.3f", step, recipe.steps, loss.item())
            if step % recipe.eval_every == 0 or step == recipe.steps:
                save_state(state_path, step, reader, optimizer)
                log.info("step %d: %s", step, evaluate(reader.clip, 400, SEED + 1, scenes.TRAIN_FONTS))
    return reader.clip.eval()
