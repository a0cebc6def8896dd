"""What a language model says of a picture when latents of its vision tower are set to a value.

    python -m defense.benchmarks.language PICTURE --model llava-hf/llava-1.5-7b-hf --sae SAE --latent 812 \
        --values 0,10,20,40 --word zebra --out said.json

The SAE is one of the tower that the language model looks through, at a block that it reads: of LLaVA 1.5 that is
CLIP's ViT-L/14 at 336 pixels, up to block 22 ("blocks.22.hook_resid_post"), and its patches alone. Setting a latent of
such an SAE is how arXiv:2504.02821 steers LLaVA. Beside it stands a control: another latent that fires on the picture,
drawn at random and set to the same values. What both do alike is not due to the latent.

The real model takes 14 GB in half precision, and a GPU; the tests do this with a tiny random one.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from defense.benchmarks.environment import environment_of, write_json
from defense.core.latents import LatentSet
from defense.data import images
from defense.errors import ConfigError
from defense.hosts.attach import attach, detach
from defense.hosts.clip import resolve_device
from defense.hosts.defense import Site
from defense.hosts.families import tower_of
from defense.hosts.transformers_inputs import loading
from defense.store import checkpoint
from defense.store.checkpoint import Checkpoint

PROMPT = "USER: <image>\nWhat is in this picture? ASSISTANT:"


@dataclass(frozen=True)
class Said:
    """What the model says with one latent at one value.

    Attributes:
        latent: None where nothing is set.
        value: Activation that the latent is set to on every token that the SAE reads and the model is given.
        text: What the model says, its likeliest word at each step.
        word_nats: Log-probability of the word as the answer, summed over its tokens; None without a word.
    """

    latent: int | None
    value: float | None
    text: str
    word_nats: float | None


@contextmanager
def steered(model: Any, found: Checkpoint, latent: int, value: float) -> Iterator[None]:
    """Set a latent of the vision tower to a value; at the end of the context the model is bit for bit what it was.

    Args:
        model: A LLaVA-type model of transformers, or whatever `wrap` takes.
        found: The SAE, of a block that the model reads.
        latent: Which.
        value: Its activation.

    Raises:
        ConfigError: There is no such latent.
        HookPointError: The model does not read that block, or not the tokens that the SAE is made for.
    """
    sae = found.sae
    latent_set = LatentSet("steered", (latent,), edit="set", values=(value,), scope=sae.config.tokens)
    attach(model, [Site(found.hook_point, sae.config, sae.parameters_numpy(copy=False), (latent_set,))])
    try:
        yield
    finally:
        detach(model)


class Speaker:
    """A language model with eyes, a picture and a question.

    Args:
        model: A LLaVA-type model of transformers, in eval mode.
        processor: Its processor.
        picture: RGB.
        prompt: With the processor's word for the picture in it.
        word: Of which the log-probability is measured, or None.
        n_tokens: That are said, at most.
    """

    def __init__(
        self, model: Any, processor: Any, picture: Image.Image, prompt: str, word: str | None, n_tokens: int
    ) -> None:
        self.model, self.tokenizer, self.n_tokens = model, processor.tokenizer, n_tokens
        self.inputs = processor(images=picture, text=prompt, return_tensors="pt").to(model.device)
        self.inputs["pixel_values"] = self.inputs["pixel_values"].to(tower_of(model).dtype)
        self.word = None if word is None else self.tokenizer(word, add_special_tokens=False, return_tensors="pt")

    @torch.inference_mode()
    def says(self) -> tuple[str, float | None]:
        """Return what the model says, and the log-probability of the word, as the model is now."""
        said = self.model.generate(**self.inputs, max_new_tokens=self.n_tokens, do_sample=False)
        n = self.inputs["input_ids"].shape[1]
        text = self.tokenizer.decode(said[0, n:], skip_special_tokens=True)
        return text.strip(), None if self.word is None else self._nats(self.word["input_ids"].to(self.model.device))

    def _nats(self, word: torch.Tensor) -> float:
        ids = torch.cat([self.inputs["input_ids"], word], 1)
        inputs = {**self.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        n = word.shape[1]
        logs = self.model(**inputs).logits[0, -n - 1 : -1].float().log_softmax(-1)
        return float(logs.gather(1, word.T).sum())

    @torch.inference_mode()
    def fires(self, found: Checkpoint) -> list[int]:
        """Return the latents that fire on the picture where the model reads it."""
        tower = tower_of(self.model)
        resid = tower.resid(self.inputs["pixel_values"], found.hook_point, found.sae.config.tokens)
        is_on = (found.sae.to(resid.device).encode(resid[0]) > 0).any(0)
        latents: list[int] = is_on.nonzero()[:, 0].tolist()
        return latents


def measure(
    speaker: Speaker, found: Checkpoint, latent: int, values: Sequence[float], seed: int = 0
) -> dict[str, list[Said]]:
    """Return what the model says: "plain", with the latent at each value, and with the control at each.

    Args:
        speaker: The model.
        found: The SAE.
        latent: Which.
        values: That it is set to.
        seed: Of the control.

    Raises:
        ConfigError: There is no such latent, or no other fires on the picture, which the control needs.
        HookPointError: See `steered`.
    """
    others = [each for each in speaker.fires(found) if each != latent]
    if not others:
        raise ConfigError(f"no latent but {latent} fires on this picture at {found.hook_point}; give another picture")
    control = others[int(torch.randint(len(others), (), generator=torch.Generator().manual_seed(seed)))]

    def at(which: int) -> Iterator[Said]:
        for value in values:
            with steered(speaker.model, found, which, value):
                yield Said(which, value, *speaker.says())

    return {"plain": [Said(None, None, *speaker.says())], "latent": list(at(latent)), "control": list(at(control))}


def lines_of(found: Mapping[str, Sequence[Said]]) -> list[str]:
    """Return a line for each answer."""
    return [
        f"{name:8}{'' if each.latent is None else each.latent!s:>8}{'' if each.value is None else f'{each.value:g}':>8}"
        f"{'' if each.word_nats is None else f'{each.word_nats:.2f}':>10}  {each.text}"
        for name, answers in found.items()
        for each in answers
    ]


def load(source: str, device: str) -> tuple[Any, Any]:
    """Return a language model with eyes, of transformers, and its processor; weights from safetensors, no code run.

    Raises:
        MissingDependencyError, ConfigError: See `loading`.
    """
    with loading(source) as library:
        model = library.AutoModelForImageTextToText.from_pretrained(
            source, use_safetensors=True, trust_remote_code=False, dtype="auto"
        )
        return model.to(device).eval(), library.AutoProcessor.from_pretrained(source, trust_remote_code=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Load, measure, write and print."""
    parser = argparse.ArgumentParser(
        prog="python -m defense.benchmarks.language", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("picture", type=Path)
    parser.add_argument("--model", required=True, help="folder or hub id of a LLaVA-type model")
    parser.add_argument("--sae", type=Path, required=True, help="SAE that `defense train` or `import` wrote")
    parser.add_argument("--latent", type=int, required=True, help="which is set")
    parser.add_argument("--values", default="0,10,20,40", help="that it is set to (default: %(default)s)")
    parser.add_argument("--word", help="measure its log-probability as the answer")
    parser.add_argument("--prompt", default=PROMPT, help="with the processor's word for the picture in it")
    parser.add_argument("--n-tokens", type=int, default=30, help="that are said, at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the control")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="JSON file for all of it")
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    values = [float(each) for each in options.values.split(",")]
    picture = images.decode(options.picture).image
    sae = checkpoint.load(options.sae)
    model, processor = load(options.model, resolve_device(options.device))
    sae.check_clip(tower_of(model))
    speaker = Speaker(model, processor, picture, options.prompt, options.word, options.n_tokens)
    found = measure(speaker, sae, options.latent, values, options.seed)
    if options.out is not None:
        command = shlex.join(["python", "-m", "defense.benchmarks.language", *argv])
        answers = {name: [asdict(each) for each in said] for name, said in found.items()}
        write_json(options.out, {"environment": asdict(environment_of(command)), "prompt": options.prompt, **answers})
    print("\n".join(lines_of(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
