"""The formula as a module.

    resid_post'  =  resid_post  -  s * sum over i in S of (1 - gain_i) * f_i(resid_post) * W_dec[i]

| term | where |
|---|---|
| S, gain_i | `LatentSet` (latents.py), held here as `latents` and `removal` = 1 - gain |
| s, z | `normalize` (sae.py) |
| f_i(resid_post) | `ops.reference.acts_of_set` |
| the sum | `ops.reference.scaled`; `projected` and `steered` for the other two edits |
| the difference | `Suppressor.subtract` |
| all of it, in one go on a GPU | `ops.fused_suppress` |

A `Suppressor` holds copies of just the rows and columns that it needs. Its buffers are not persistent: they follow
`.to()` and `.half()` of the model that it is attached to and leave that model's state_dict keys alone. The artifact
is what is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from defense.errors import ConfigError, ShapeError

from . import ops
from .latents import LatentSet, Scope, token_slice
from .norms import high_tokens
from .ops import Backend, reference
from .ops.reference import Encoder
from .sae import SparseAutoencoder, normalize


class Suppressor(nn.Module):
    """Removes from a residual stream what one set of latents writes there.

    With every gain 1, with `strength` 0, or (but for the edit "set") with no latent in S active at a token, that token
    passes through bit for bit.

    Args:
        sae: The autoencoder that the latents belong to.
        latent_set: Which latents, and what becomes of them.
        scope: Tokens to edit, in place of the set's own.
        backend: What computes it: "auto", "fused" or "reference" (see `ops`).

    Attributes:
        strength: Factor on what is removed, in [0, 1], a 0-dim buffer: 0 switches the edit off without touching
            hooks, also within a compiled model.

    Raises:
        ConfigError: A latent that the SAE does not have, an edit that does not go with it, or an unknown backend.
        BackendError: `backend` is "fused", and there is no kernel for this SAE or edit.
    """

    latents: Tensor
    removal: Tensor
    strength: Tensor
    W_S: Tensor
    b_S: Tensor
    W_dec_S: Tensor
    b_dec: Tensor
    values: Tensor | None
    threshold_S: Tensor | None
    W_mag_S: Tensor | None
    b_mag_S: Tensor | None
    W_enc: Tensor | None
    b: Tensor | None
    b_others: Tensor | None

    _EXACT = ("threshold_S", "latents")
    """Buffers whose values must survive `.half()`: a rounded threshold decides differently."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        latent_set: LatentSet,
        scope: Scope | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        config = sae.config
        latent_set.check_range(config.d_sae)
        self.latent_set = latent_set
        self.scope: Scope = scope or latent_set.scope
        self.norm = config.norm
        self.d_model = config.d_model
        self.k = config.k or 0
        self.negative_counts = config.act == "topk" and config.topk_relu == "none"
        columns = sae.columns(latent_set.latents)  # of the SAE's tensors: all of them, or those of a slim defense
        latents = torch.tensor(latent_set.latents, dtype=torch.int64)
        tensors: dict[str, Tensor | None] = {
            "latents": latents,
            "removal": 1 - torch.tensor(latent_set.gains, dtype=torch.float32),
            "strength": torch.ones(()),
            "W_dec_S": sae.W_dec[columns],
            "b_dec": sae.b_dec,
            "values": torch.tensor(latent_set.values) if latent_set.edit == "set" else None,
            **_encoder_tensors(sae, columns),
        }
        for name, tensor in tensors.items():  # shared with the SAE where it needs all of it: W_enc may be large
            self.register_buffer(name, tensor, persistent=False)
        ops.check_backend(backend, self.encoder(), latent_set.edit)
        self.backend = backend

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Suppressor:
        exact: dict[str, Any] = {name: getattr(self, name) for name in self._EXACT}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch gives it no types
        for name, tensor in exact.items():
            if tensor is not None:
                setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    def set_strength(self, strength: float) -> None:
        """Set the factor on what is removed, in place.

        Raises:
            ConfigError: `strength` lies outside [0, 1].
        """
        if not 0 <= strength <= 1:
            raise ConfigError(f"strength={strength}; it must lie in [0, 1]: 0 is stock CLIP, 1 the full edit")
        self.strength.fill_(strength)

    def encoder(self) -> Encoder:
        """Return the encoder parts needed for the activations of the latents in S; ask anew after `.to()`."""
        return Encoder(
            self.W_S, self.b_S, self.threshold_S, self.W_mag_S, self.b_mag_S,
            self.W_enc, self.b, self.latents, self.k, self.negative_counts, self.b_others,
        )  # fmt: skip

    def acts(self, resid: Tensor) -> Tensor:
        """Return f_i for i in S, [..., n], of a residual [..., d_model] (every token, whatever the scope)."""
        self._check(resid)
        rows = resid.reshape(-1, self.d_model).to(self.W_S.dtype)
        with _without_autocast(resid):
            acts = reference.acts_of_set(normalize(rows, self.norm).z, self.encoder())
            unflattened: Tensor = acts.unflatten(0, resid.shape[:-1])
            return unflattened

    def acts_in_scope(self, resid: Tensor, n_prefix: int) -> Tensor:
        """Return `acts` of the scope's tokens, [batch, n_tokens, n]; 0 where the set spares a patch of high norm.

        Args:
            resid: Of whole pictures, [batch, pos, d_model].
            n_prefix: Tokens before the patches.
        """
        tokens = token_slice(self.scope, n_prefix)
        acts = self.acts(resid[:, tokens])
        if not self.latent_set.spares_high_norm:
            return acts
        return acts.masked_fill(high_tokens(resid, n_prefix)[:, tokens, None], 0)

    def removed(self, resid: Tensor, acts: Tensor | None = None) -> Tensor:
        """Return what is subtracted from a residual [..., d_model] (every token, whatever the scope).

        Args:
            resid: The residual.
            acts: `acts(resid)`, where they are known already.
        """
        acts = self.acts(resid) if acts is None else acts
        z, scale, _ = normalize(resid.reshape(-1, self.d_model).to(self.W_S.dtype), self.norm)
        acts = acts.flatten(0, -2)
        removal = self.removal * self.strength
        if self.values is not None:
            delta = reference.steered(acts, removal, self.W_dec_S, self.values)
        elif self.latent_set.edit == "project":
            delta = reference.projected(acts, removal, self.W_dec_S, z - self.b_dec)
        else:
            delta = reference.scaled(acts, removal, self.W_dec_S)
        return (delta if scale is None else delta * scale).view(resid.shape)

    def subtract(self, edited: Tensor, resid: Tensor, n_prefix: int, acts: Tensor | None = None) -> Tensor:
        """Return `edited` less what is removed from the tokens of the scope, both [batch, pos, d_model].

        Args:
            edited: `resid` itself, which is left as it is, or what other suppressors left of it, which may change.
            resid: What the SAE reads.
            n_prefix: Tokens before the patches.
            acts: `acts_in_scope`, where they are known already.
        """
        tokens = token_slice(self.scope, n_prefix)
        encoder = self.encoder()
        if ops.runs_fused(self.backend, resid, encoder, self.latent_set.edit):
            self._check(resid)
            removal = self.removal * self.strength
            parts = edited, resid, tokens, self.norm, encoder, self.W_dec_S, removal
            fused = ops.fused_suppress(*parts, backend=self.backend)
            if fused is not None:  # the kernels know no patches, so those that are spared are put back
                spares = self.latent_set.spares_high_norm
                return torch.where(high_tokens(resid, n_prefix)[..., None], edited, fused) if spares else fused
        acts = self.acts_in_scope(resid, n_prefix) if acts is None else acts
        edited = edited.to(torch.promote_types(edited.dtype, torch.float32), copy=edited is resid)
        edited[:, tokens] -= self.removed(resid[:, tokens], acts)
        return edited

    def energy(self, resid: Tensor, acts: Tensor) -> Tensor:
        """Return the squared norm of what each latent of S wrote, times what the edit takes of it, [..., n].

        Decoder rows are not orthogonal: the energies at a token do not add up to that of the sum. And `project` removes
        more: whatever lies in the span of the rows, not only what the SAE says that the latents wrote there.

        Args:
            resid: The residual, [..., d_model].
            acts: `acts(resid)`.
        """
        _, scale, _ = normalize(resid.to(self.W_S.dtype), self.norm)
        moved = acts if self.values is None else acts - self.values
        written: Tensor = moved * (self.removal * self.strength * self.W_dec_S.norm(dim=1))
        return (written if scale is None else written * scale).float().square()

    def _check(self, resid: Tensor) -> None:
        if resid.shape[-1] != self.d_model:
            raise ShapeError(f"this SAE expects d_model={self.d_model}; the residual is {resid.shape[-1]} wide")

    def forward(self, resid: Tensor, n_prefix: int = 1) -> Tensor:
        """Return the edited residual [batch, pos, d_model], in the dtype of `resid`, which is left as it is."""
        if not len(self.latents):
            return resid
        with _without_autocast(resid):
            return self.subtract(resid, resid, n_prefix).to(resid.dtype)


def _encoder_tensors(sae: SparseAutoencoder, columns: Tensor) -> dict[str, Tensor | None]:
    """Return the tensors of `reference.Encoder` by name: columns of S, and the whole encoder where latents compete."""
    config, bias = sae.config, sae.folded_bias
    is_gated = config.act == "gated"
    return {
        "W_S": sae.W_enc[:, columns],
        "b_S": bias[columns],
        "threshold_S": sae.threshold[columns] if config.act in ("jumprelu", "batchtopk") else None,
        "W_mag_S": sae.W_enc[:, columns] * sae.r_mag[columns].exp() if is_gated else None,
        "b_mag_S": sae.folded_magnitude_bias[columns] if is_gated else None,
        "W_enc": sae.W_enc if config.couples_latents else None,
        "b": bias if config.couples_latents else None,
        "b_others": bias.index_fill(0, columns, -torch.inf) if config.couples_latents else None,
    }


@dataclass(frozen=True)
class Suppression:
    """What several suppressors did to a residual.

    Attributes:
        resid: As it was, [batch, pos, d_model].
        edited: What they left of it, in the same dtype.
        suppressors: Those that name any latent.
        acts: For each of them, `Suppressor.acts_in_scope`, [batch, n_tokens, n].
    """

    resid: Tensor
    edited: Tensor
    suppressors: tuple[Suppressor, ...]
    acts: tuple[Tensor, ...]


def suppress(resid: Tensor, suppressors: Sequence[Suppressor], n_prefix: int) -> Tensor:
    """Return a residual [batch, pos, d_model] edited by several suppressors, each of which sees the unedited one."""
    active = [suppressor for suppressor in suppressors if len(suppressor.latents)]
    return _suppressed(resid, active, n_prefix, [None] * len(active))


def suppress_and_tell(resid: Tensor, suppressors: Sequence[Suppressor], n_prefix: int) -> Suppression:
    """Do what `suppress` does, and return the activations too; each encoder runs once."""
    active = [suppressor for suppressor in suppressors if len(suppressor.latents)]
    acts = [suppressor.acts_in_scope(resid, n_prefix) for suppressor in active]
    return Suppression(resid, _suppressed(resid, active, n_prefix, acts), tuple(active), tuple(acts))


def _suppressed(resid: Tensor, active: Sequence[Suppressor], n_prefix: int, acts: Sequence[Tensor | None]) -> Tensor:
    # Several subtract in float32: in half precision each in turn would round the stream once more.
    edited = resid if len(active) < 2 else resid.to(torch.promote_types(resid.dtype, torch.float32))
    with _without_autocast(resid):
        for suppressor, known in zip(active, acts, strict=True):
            edited = suppressor.subtract(edited, resid, n_prefix, known)
    return edited.to(resid.dtype)


def _without_autocast(resid: Tensor) -> torch.autocast:
    """Return a context without the caller's autocast: which latents fire must not depend on it."""
    return torch.autocast(resid.device.type, enabled=False)
