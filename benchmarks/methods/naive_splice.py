"""The naive way to edit with an SAE: its reconstruction takes the residual's place, with the chosen latents at zero.

    resid'  =  decode(f'),     f'_i = gain_i f_i  for i in S,  f_i  for all others

The defense subtracts what the latents write and keeps the SAE's reconstruction error; this loses the error with them,
at every token that the SAE was trained on.

Source, and what differs from it: `NaiveSplice.record`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from defense.benchmarks.datasets import Task
from defense.benchmarks.methods.base import Encoder, Record
from defense.benchmarks.methods.defended import Defended, exact
from defense.errors import ConfigError
from defense.hosts.clip import Clip
from defense.hosts.defense import Defense, Site

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NaiveSplice:
    """The latents of a defense, zeroed in the SAE's reconstruction.

    Attributes:
        name: In tables.
        chosen: The defense whose SAEs and latents are used.
    """

    record: ClassVar[Record] = Record(
        "Lim et al. (PatchSAE), arXiv:2412.05276",
        "the masking",
        "Without the error term that its footnote adds back; sae-for-vlm (arXiv:2504.02821) steers in the same "
        "way. SAE and latents are the defense's.",
    )
    name: str
    chosen: Defended

    @classmethod
    def of(cls, name: str, defense: Defense | None, strength: float | None) -> NaiveSplice:
        """Return the method for a name; it has no strength to set.

        Raises:
            ConfigError: A strength was given.
        """
        if strength is not None:
            raise ConfigError(f"{name!r}: this method has no strength; leave out what follows @")
        return cls(name, Defended.of(name, defense, None))

    def settings(self) -> Mapping[str, Any]:
        """Return which defense."""
        return {"defense_sha256": self.chosen.settings()["defense_sha256"]}

    def fitted_before(self) -> Mapping[str, Any]:
        """Return what the defense says of its fit; the exact rule acts here, so no thresholds could disagree."""
        return {**self.chosen.fitted_before(), "agreement": None}

    def fit(self, clip: Clip, task: Task) -> None:
        """Learn nothing: the latents were chosen before, on other pictures.

        Raises:
            NotApplicableError: See `exact`.
        """
        exact(self.name, self.chosen.defense)

    @contextmanager
    def apply(self, clip: Clip) -> Iterator[Encoder]:
        """Put the reconstructions in."""
        from defense.hosts.attach import check_clip

        check_clip(clip.tower, self.chosen.defense.clip)
        with ExitStack() as stack:
            for site in exact(self.name, self.chosen.defense).sites:
                stack.enter_context(clip.tower.changed(site.hook_point, _splice(clip, site)))
            yield Encoder(clip)


def _splice(clip: Clip, site: Site) -> Callable[[Tensor], Tensor]:
    """Return what puts a site's edited reconstruction in the place of a residual [batch, pos, d_model]."""
    import torch

    from defense.core.latents import token_slice
    from defense.hosts.attach import sae_of

    sae = sae_of(site).to(clip.device)
    gains = {each.name: torch.tensor(each.gains, device=clip.device) for each in site.sets}
    n_prefix = clip.tower.n_prefix
    trained_on = token_slice(sae.config.tokens, n_prefix)

    def spliced(resid: Tensor) -> Tensor:
        resid = resid.clone()
        for picture in resid:  # one at a time: the activations of all latents may be large
            acts = picture.new_zeros(len(picture), sae.config.d_sae, dtype=torch.float32)
            acts[trained_on] = sae.encode(picture[trained_on].float())
            for latent_set in site.sets:
                acts[token_slice(latent_set.scope, n_prefix), list(latent_set.latents)] *= gains[latent_set.name]
            picture[trained_on] = sae.decode(acts[trained_on], picture[trained_on].float()).to(picture.dtype)
        return resid

    return spliced
