"""The naive way to edit with an SAE: its reconstruction takes the residual's place, with the chosen latents at zero.

    resid'  =  decode(f'),     f'_i = gain_i f_i  for i in S,  f_i  for all others

The defense subtracts what the latents write and keeps the SAE's reconstruction error; this loses the error with them,
at every token that the SAE was trained on.

Source: the masking of PatchSAE (arXiv:2412.05276) without the error term that its footnote adds back; sae-for-vlm
(arXiv:2504.02821) steers in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from defense.benchmarks.datasets import Task
from defense.benchmarks.methods.base import Encoder
from defense.benchmarks.methods.defended import Defended
from defense.classify.classifier import RobustClassifier
from defense.errors import ConfigError
from defense.hosts.clip import Host
from defense.hosts.defense import Defense, Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from defense.hosts.tower import VisionHost


@dataclass(frozen=True)
class NaiveSplice:
    """The latents of a defense, zeroed in the SAE's reconstruction.

    Attributes:
        name: In tables.
        chosen: The defense whose SAEs and latents are used.
    """

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

    def fit(self, host: Host, task: Task) -> None:
        """Learn nothing: the latents were chosen before, on other pictures."""

    @contextmanager
    def apply(self, host: Host) -> Iterator[Encoder]:
        """Put the reconstructions in."""
        from defense.hosts.attach import check_host
        from defense.hosts.tower import VisionHost

        vision = VisionHost.of(host.model)
        check_host(vision, self.chosen.defense.host)
        with ExitStack() as hooks:
            for site in self.chosen.defense.sites:
                handle = vision.block(site.hook_point).register_forward_hook(_splice(vision, site))
                hooks.callback(handle.remove)
            yield Encoder(RobustClassifier(host))


def _splice(vision: VisionHost, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Return the hook that puts a site's edited reconstruction in the place of its block's output."""
    import torch

    from defense.core.suppress import token_slice
    from defense.hosts.attach import sae_of

    sae = sae_of(site).to(next(vision.blocks.parameters()).device)
    gains = {each.name: torch.tensor(each.gains, device=sae.W_enc.device) for each in site.sets}
    trained_on = token_slice(sae.config.tokens, vision.n_prefix)

    def hook(_block: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        resid = vision.to_batch_first(output).clone()
        for picture in resid:  # one at a time: the activations of all latents may be large
            acts = picture.new_zeros(len(picture), sae.config.d_sae, dtype=torch.float32)
            acts[trained_on] = sae.encode(picture[trained_on].float())
            for latent_set in site.sets:
                tokens = token_slice(latent_set.scope, vision.n_prefix)
                acts[tokens, list(latent_set.latents)] *= gains[latent_set.name]
            picture[trained_on] = sae.decode(acts[trained_on], picture[trained_on].float()).to(picture.dtype)
        return vision.to_batch_first(resid)

    return hook
