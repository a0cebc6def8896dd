"""Defense-Prefix: one learned token before each class name, which says "the object, not the word".

With the prefixed prompts' embeddings in place of the plain ones, the token's embedding v is learned by gradient descent
on the input of the text tower, both towers frozen:

    loss(v)  =  eta CE(attacked pictures, labels)  +  gamma KL(plain answers on clean pictures || prefixed answers)

Source, and what differs from it: `DefensePrefix.record`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from defense.benchmarks.datasets import Dataset, Task
from defense.benchmarks.methods.base import Encoder, NotApplicableError, Record, Stock
from defense.benchmarks.methods.material import class_embeds_of, digest_of, image_embeds_of, picked, training_twins
from defense.benchmarks.methods.text_tower import check_reads_context
from defense.data.labels import Prompts, fill
from defense.errors import ConfigError
from defense.hosts.clip import Clip

if TYPE_CHECKING:
    from torch import Tensor, nn

ETA, GAMMA = 1.0, 3.0
STEPS, BATCH, LR = 200, 128, 0.01
SEED = 0

_PLACEHOLDER = "*"
"""Stands in prompts where the learned token goes; its own embedding is never used."""
_INITIAL_STD = 0.02


class _Prefixed(Stock):
    edits_text = True

    def text_embeds(self, prompts: Prompts, *, normalize_each: bool = True) -> np.ndarray:
        """Return embeddings of the prompts with the placeholder before each class name."""
        return super().text_embeds(with_placeholder(prompts), normalize_each=normalize_each)


def with_placeholder(prompts: Prompts) -> Prompts:
    """Return the prompts with the placeholder before each label.

    Raises:
        ConfigError: It occurs in them already.
    """
    for text in (*prompts.labels, *prompts.templates):
        if _PLACEHOLDER in text:
            raise ConfigError(f"{text!r} holds {_PLACEHOLDER!r}, which marks the learned token; leave it out")
    return replace(prompts, templates=tuple(fill(each, f"{_PLACEHOLDER} {{}}") for each in prompts.templates))


@dataclass
class DefensePrefix:
    """Prompts with one learned token.

    Attributes:
        name: In tables.
        token: Its embedding, float32 [d_text].
    """

    record: ClassVar[Record] = Record(
        "Azuma and Matsui 2023, arXiv:2304.04512",
        "section 3",
        "A few hundred steps of Adam on the task's own training pictures, in place of 10 epochs of SGD on 130,000 "
        "pictures of ImageNet-100. Weights of the loss, start and one template for each step as there.",
        needs_context=True,
    )
    name: str
    token: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32), init=False)

    def settings(self) -> Mapping[str, Any]:
        """Return how the token was learned, and a hash of it."""
        return {
            "eta": ETA,
            "gamma": GAMMA,
            "steps": STEPS,
            "batch": BATCH,
            "lr": LR,
            "seed": SEED,
            "token_sha256": digest_of(self.token),
        }

    def fit(self, clip: Clip, task: Task) -> None:
        """Learn the token.

        Raises:
            NotApplicableError: The task has no training pictures with twins, or the CLIP's text tower no table of
                token embeddings.
            CannotWorkError: See `check_reads_context`.
        """
        attacked, clean = training_twins(task, self.name)
        _token_table(clip, self.name)
        check_reads_context(clip, task, self.name)
        rows = picked(attacked)
        self.token = _learn(clip, attacked, clean, rows)

    @contextmanager
    def apply(self, clip: Clip) -> Iterator[Encoder]:
        """Yield the stock CLIP with the token in its prompts."""
        import torch

        table = _token_table(clip, self.name)
        with _inserted(clip, table, torch.from_numpy(self.token).to(table.weight.device)):
            yield _Prefixed(clip)


def _learn(clip: Clip, attacked: Dataset, clean: Dataset, rows: list[int]) -> np.ndarray:
    import torch
    from torch.nn import functional

    table = _token_table(clip, "the prefix")
    device, logit_scale = table.weight.device, clip.logit_scale
    generator = torch.Generator().manual_seed(SEED)
    token = (_INITIAL_STD * torch.randn(table.weight.shape[1], generator=generator)).to(device).requires_grad_()
    optimizer = torch.optim.Adam([token], lr=LR)
    attacked_embeds, clean_embeds = (
        torch.from_numpy(image_embeds_of(clip, [dataset.examples[row] for row in rows])).to(device)
        for dataset in (attacked, clean)
    )
    label = torch.tensor([attacked.examples[row].label for row in rows], device=device)
    plain = logit_scale * clean_embeds @ torch.from_numpy(class_embeds_of(clip, attacked)).to(device).T
    prompts = with_placeholder(Prompts(attacked.class_names, attacked.templates))
    input_ids = [
        torch.as_tensor(np.asarray(clip.tokenizer([fill(template, name) for name in prompts.labels])), device=device)
        for template in prompts.templates
    ]
    with torch.enable_grad(), _inserted(clip, table, token):
        for _ in range(STEPS):
            template = int(torch.randint(len(input_ids), (), generator=generator))
            batch = torch.randint(len(rows), (min(BATCH, len(rows)),), generator=generator).to(device)
            text_embeds = functional.normalize(clip.model.encode_text(input_ids[template]).float(), dim=-1)
            on_attacked = logit_scale * attacked_embeds[batch] @ text_embeds.T
            on_clean = logit_scale * clean_embeds[batch] @ text_embeds.T
            loss = ETA * functional.cross_entropy(on_attacked, label[batch]) + GAMMA * functional.kl_div(
                on_clean.log_softmax(1), plain[batch].softmax(1), reduction="batchmean"
            )
            (token.grad,) = torch.autograd.grad(loss, token)
            optimizer.step()
    return token.detach().cpu().numpy()


def _token_table(clip: Clip, who: str) -> nn.Embedding:
    """Return the text tower's table of token embeddings; raise `NotApplicableError` where it has none."""
    for tower in (clip.model, getattr(clip.model, "text", None)):
        table = getattr(tower, "token_embedding", None)
        if table is not None:
            return table
    raise NotApplicableError(f"{who} needs a text tower of open_clip's own, with a table of token embeddings")


@contextmanager
def _inserted(clip: Clip, table: nn.Embedding, token: Tensor) -> Iterator[None]:
    """Let a token's embedding take the placeholder's place."""
    import torch

    placeholder = int(np.asarray(clip.tokenizer([_PLACEHOLDER]))[0, 1])  # after the start token

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where((inputs[0] == placeholder)[..., None], token.to(output.dtype), output)

    handle = table.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
