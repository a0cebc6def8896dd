"""What the latents of an SAE do on pictures: how much each fires, and how far each pushes the answer to its rival.

Every number is of one picture, so that a fold needs no pass of its own: it takes the mean over its pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from defense.core.latents import LatentSet
from defense.core.norms import high_tokens
from defense.core.ops import reference
from defense.core.sae import SparseAutoencoder, normalize
from defense.core.suppress import Suppressor
from defense.data.progress import SILENT, Progress
from defense.hosts.clip import Clip
from defense.hosts.tower import block_of

from .chunks import COPIES, bytes_behind, chunks
from .material import Groups, Pairs


@dataclass(frozen=True)
class _Largest:
    """What a TopK rule keeps: acts float32 and indices int32, both [n, n_tokens, k]."""

    acts: Tensor
    indices: Tensor


class Seen:
    """Pictures of some kinds at a hook point, and what an SAE's latents do there. Each number is computed once.

    Args:
        clip: The CLIP; what is attached to other blocks is at work.
        hook_point: Where the SAE reads.
        sae: The SAE, on the CLIP's device.
        text_embeds: Of all answers, [n_labels, d_embed], normalized.
        data: The pictures, for what is right and what rivals it.
        resid: Their residuals by kind, float32 [n, pos, d_model].
        progress: Told of the pictures.
        spares_high_norm: Whether patches of high norm count as ones on which nothing fires.
    """

    def __init__(
        self,
        clip: Clip,
        hook_point: str,
        sae: SparseAutoencoder,
        text_embeds: Tensor,
        data: Pairs | Groups,
        resid: Mapping[str, Tensor],
        progress: Progress = SILENT,
        spares_high_norm: bool = False,
    ) -> None:
        self.spares_high_norm = spares_high_norm
        self.tower, self.logit_scale, self.device = clip.tower, clip.logit_scale, clip.device
        self.hook_point, self.sae, self.resid, self.progress = hook_point, sae, resid, progress
        self.text_embeds = text_embeds.to(self.device)
        # Copies: what was made in inference mode cannot take part in a backward pass.
        self.answer = (data.label if isinstance(data, Pairs) else data.y).clone().to(self.device)
        """What is right, int64 [n], of every kind."""
        self._word = data.word.clone().to(self.device) if isinstance(data, Pairs) else None
        self._rivals: dict[str, Tensor] = {}
        self._activity: dict[tuple[str, int | None, int | None], Tensor] = {}
        self._largest: dict[tuple[str, int | None, int | None], _Largest] = {}
        self._effects: dict[tuple[str, int | None, int | None], Tensor] = {}

    def rival(self, kind: str) -> Tensor:
        """Return the answers that they are mistaken for, int64 [n]: what is written, or the likeliest wrong one."""
        if self._word is not None:
            return self._word
        if kind not in self._rivals:
            with torch.no_grad():
                logits = self.logits(self.resid[kind])
            self._rivals[kind] = logits.scatter(1, self.answer[:, None], -torch.inf).argmax(1)
        return self._rivals[kind]

    def logits(self, resid: Tensor) -> Tensor:
        """Return logits_per_image [n, n_labels] of residuals at the hook point; differentiable."""
        return self.logit_scale * self.tower.embeds_from(resid, self.hook_point) @ self.text_embeds.T

    def activity(self, kind: str, positions: slice) -> Tensor:
        """Return each latent's activation, summed over tokens, float32 [n, d_sae]."""
        key = kind, positions.start, positions.stop
        if key not in self._activity:
            self._look(kind, positions)
        return self._activity[key]

    def effects(self, kind: str, positions: slice) -> Tensor:
        """Return what removing each latent takes from the rival's margin, to first order, float32 [n, d_sae].

        That is its activation times the gradient of the margin along its decoder row, summed over tokens.
        """
        key = kind, positions.start, positions.stop
        if key not in self._effects:
            self._effects[key] = self._attribute(kind, positions)
        return self._effects[key]

    @torch.no_grad()
    def acts(self, kind: str, positions: slice, latents: np.ndarray, rows: Tensor) -> Tensor:
        """Return activations of some latents on some pictures, float32 [len(rows), n_tokens, len(latents)]."""
        n_tokens = len(range(self.resid[kind].shape[1])[positions])
        found = torch.empty(len(rows), n_tokens, len(latents), device=self.device)
        if not len(latents):
            return found
        if self._is_sparse:
            largest = self._kept_largest(kind, positions)
            place = torch.full((self.sae.config.d_sae,), len(latents), dtype=torch.int64, device=self.device)
            place[torch.from_numpy(latents).to(self.device)] = torch.arange(len(latents), device=self.device)
            for part in chunks(len(rows), 8 * n_tokens * (len(latents) + 2 * largest.acts.shape[-1])):
                acts, indices = largest.acts[rows[part]], largest.indices[rows[part]]
                wide = acts.new_zeros(*acts.shape[:-1], len(latents) + 1)
                found[part] = wide.scatter_(-1, place[indices.long()], acts)[..., :-1]
            return found
        alone = Suppressor(self.sae, LatentSet("candidates", tuple(latents.tolist())), backend="reference")
        alone = alone.to(self.device)
        for part in chunks(len(rows), 4 * COPIES * n_tokens * len(latents)):
            resid = self.resid[kind][rows[part]]
            found[part] = alone.acts(resid[:, positions]) * self._counts(resid, positions)
        return found

    def _counts(self, resid: Tensor, positions: slice) -> Tensor | float:
        """Return which of the tokens count, as what their activations [n, n_tokens, ...] are multiplied by."""
        if not self.spares_high_norm:
            return 1.0
        return 1 - high_tokens(resid, self.tower.n_prefix)[:, positions, None].float()

    @property
    def _is_sparse(self) -> bool:
        """Whether what counts at a token are its k largest, which are kept; else activations are computed anew."""
        return self.sae.config.act == "topk" and self.sae.config.topk_relu != "none"

    def _kept_largest(self, kind: str, positions: slice) -> _Largest:
        key = kind, positions.start, positions.stop
        if key not in self._largest:
            self._look(kind, positions)
        return self._largest[key]

    @torch.no_grad()
    def _look(self, kind: str, positions: slice) -> None:
        """Encode the pictures of a kind: one pass of the whole encoder."""
        config, resid = self.sae.config, self.resid[kind]
        activity = torch.zeros(len(resid), config.d_sae, device=self.device)
        largest: list[tuple[Tensor, Tensor]] = []
        n_tokens = len(range(resid.shape[1])[positions])
        with self.progress.stage(f"latents of block {block_of(self.hook_point)}, {kind}", len(resid)) as advance:
            for part in chunks(len(resid), 4 * COPIES * n_tokens * config.d_sae):
                tokens = resid[part][:, positions]
                if self._is_sparse:
                    acts, indices = self._encode_sparse(tokens)
                    acts = acts * self._counts(resid[part], positions)
                    activity[part].scatter_add_(1, indices.flatten(1), acts.flatten(1))
                    largest.append((acts, indices.int()))
                else:
                    activity[part] = (self.sae.encode(tokens) * self._counts(resid[part], positions)).sum(1)
                advance(part.stop - part.start)
        key = kind, positions.start, positions.stop
        self._activity[key] = activity
        if largest:
            self._largest[key] = _Largest(*(torch.cat(column) for column in zip(*largest, strict=True)))

    def _encode_sparse(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return acts and indices of the k largest latents of each token, both [n, n_tokens, k]."""
        k = self.sae.config.k
        assert k is not None
        rows = normalize(tokens.flatten(0, 1), self.sae.config.norm).z
        acts, indices = reference.encode_topk(rows, self.sae.W_enc, self.sae.folded_bias, k)
        return acts.view(*tokens.shape[:2], k), indices.view(*tokens.shape[:2], k)

    def _attribute(self, kind: str, positions: slice) -> Tensor:
        resid, answer, rival = self.resid[kind], self.answer, self.rival(kind)
        found = torch.zeros(len(resid), self.sae.config.d_sae, device=self.device)
        n_tokens = len(range(resid.shape[1])[positions])
        each = bytes_behind(self.tower, self.hook_point, resid.shape[1])
        each = max(each, 4 * COPIES * n_tokens * self.sae.config.d_sae)
        with self.progress.stage(f"effects of block {block_of(self.hook_point)}, {kind}", len(resid)) as advance:
            for part in chunks(len(resid), each):
                leaf = resid[part].clone().requires_grad_()
                logits = self.logits(leaf)
                margins = logits.gather(1, rival[part, None]) - logits.gather(1, answer[part, None])
                (gradient,) = torch.autograd.grad(margins.sum(), leaf)
                with torch.no_grad():
                    self._write_effects(found[part], kind, part, positions, gradient[:, positions])
                advance(part.stop - part.start)
        return found

    def _write_effects(self, found: Tensor, kind: str, part: slice, positions: slice, gradient: Tensor) -> None:
        """Fill in what the latents of some pictures do, [m, d_sae], from the gradient there, [m, n_tokens, d_model]."""
        tokens = self.resid[kind][part][:, positions]
        scale = normalize(tokens, self.sae.config.norm).scale
        if scale is not None:
            gradient = gradient * scale
        if not self._is_sparse:
            acts = self.sae.encode(tokens) * self._counts(self.resid[kind][part], positions)
            found += (acts * (gradient @ self.sae.W_dec.T)).sum(1)
            return
        largest = self._kept_largest(kind, positions)
        acts, indices = largest.acts[part], largest.indices[part].long()
        for picture in range(len(found)):
            # Decoder rows of the latents that fire: far fewer than all.
            rows = self.sae.W_dec[indices[picture]]  # [n_tokens, k, d_model]
            along = torch.einsum("tkd,td->tk", rows, gradient[picture])
            found[picture].scatter_add_(0, indices[picture].flatten(), (acts[picture] * along).flatten())
