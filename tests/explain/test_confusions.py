"""Latents that fire on one class and push another, in a network in which they were planted."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.core.config import SAEConfig
from defense.core.sae import SparseAutoencoder
from defense.errors import ConfigError, ShapeError
from defense.explain.confusions import confusions
from defense.explain.sums import Example

from .described import POINT, sparse_sae

CLASSES = ("ant", "bee", "cow", "dog", "eel")
WIDTH, N_TOKENS, SCALE = 8, 3, 10.0
DOG, SIDE, ALWAYS = 3, 5, 6
"""Channels: of dogs, which says bee; up on ants, which says cow a little; up on all pictures, which says eel."""


class Planted:
    """Channels 0 to 4 are up on their class and name it, but for the one of dogs; the picture is the residual."""

    n_prefix, device, logit_scale = 1, torch.device("cpu"), SCALE

    def __init__(self) -> None:
        self.says = torch.zeros(WIDTH, 5)
        self.says[range(5), range(5)] = 1.0
        self.says[DOG, DOG], self.says[DOG, 1] = 0.4, 0.9
        self.says[SIDE, 2] = 0.3
        self.says[ALWAYS, 4] = 5.0

    @property
    def tower(self) -> Planted:
        return self

    def undefended(self) -> nullcontext[None]:
        return nullcontext()

    def check_width(self, width: int, what: str) -> None:
        if width != WIDTH:
            raise ShapeError(what)

    def effective_scope(self, *_: str) -> str:
        return "all"

    def resid(self, pixel_values: np.ndarray, _hook_point: str) -> torch.Tensor:
        return torch.from_numpy(pixel_values)

    def embeds_from(self, resid: torch.Tensor, _hook_point: str) -> torch.Tensor:
        return resid.mean(1) @ self.says

    def text_embeds(self, _prompts: object) -> np.ndarray:
        return np.eye(5, dtype=np.float32)


def sae(**fields) -> SparseAutoencoder:
    """Each channel is a latent."""
    eye = np.eye(WIDTH, dtype=np.float32)
    parameters = {"W_enc": eye, "b_enc": np.zeros(WIDTH), "W_dec": eye, "b_dec": np.zeros(WIDTH)}
    return SparseAutoencoder(SAEConfig(WIDTH, WIDTH, "relu", **fields), parameters)


def pictures(n: int = 40, classes: tuple[str, ...] = CLASSES) -> list[Example]:
    """Pictures whose class is up by 2 on every token."""
    found = []
    for index in range(n):
        place = index % len(classes)
        resid = np.zeros((N_TOKENS, WIDTH), np.float32)
        resid[:, place], resid[:, ALWAYS] = 2.0, 7.0
        if place == 0:
            resid[:, SIDE] = 1.0
        found.append(Example(str(index), resid, classes[place]))
    return found


def test_the_latent_that_was_planted_is_found_with_what_it_pushes_to_first_order():
    found = confusions(Planted(), POINT, sae(), pictures(), CLASSES)
    assert [(each.latent, each.shown, each.aimed) for each in found] == [(DOG, "dog", "bee"), (SIDE, "ant", "cow")]
    # Up by 2, less the mean over five classes; on the mean over tokens; of what it says, less the mean over classes.
    assert found[0].push == pytest.approx(SCALE * 2.0 * 0.8 * (0.9 - 1.3 / 5), abs=1e-3)
    assert found[1].push == pytest.approx(SCALE * 1.0 * 0.8 * (0.3 - 0.3 / 5), abs=1e-3)


def test_how_the_pictures_are_cut_into_batches_does_not_matter_nor_do_pictures_of_other_classes():
    strangers = [Example("x", np.full((N_TOKENS, WIDTH), 9, np.float32), label) for label in ("fly", None)]
    want = confusions(Planted(), POINT, sae(), pictures(), CLASSES)
    assert confusions(Planted(), POINT, sae(), [*strangers, *pictures()], CLASSES, batch=7) == want


def test_what_a_latent_writes_counts_at_the_length_of_the_stream():
    """An SAE that normalizes its input writes as much more as that was longer."""
    normed = sae(norm="constant_norm_rescale")
    first, second = (
        confusions(Planted(), POINT, normed, [e._replace(pixel_values=k * e.pixel_values) for e in pictures()], CLASSES)
        for k in (1, 3)
    )
    assert second[0].push == pytest.approx(3 * first[0].push, rel=1e-3)


@pytest.mark.parametrize(
    ("given", "classes", "message"),
    [
        (pictures(), CLASSES[:2], "it takes three"),
        (pictures(classes=CLASSES[:4]), CLASSES, "no picture of 'eel'"),
        ([], CLASSES, "no picture of 'ant'"),
    ],
)
def test_too_few_classes_and_a_class_without_pictures_are_refused(given, classes, message):
    with pytest.raises(ConfigError, match=message):
        confusions(Planted(), POINT, sae(), given, classes)


def test_an_sae_of_another_width_is_refused():
    with pytest.raises(ShapeError):
        confusions(Planted(), POINT, sparse_sae(), pictures(), CLASSES)
