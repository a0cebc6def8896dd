"""The formula against a plain float64 implementation of encode, activation, zero, decode, plus error term."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from defense.core.latents import LatentSet, token_slice
from defense.core.ops import reference
from defense.core.ops.reference import Encoder
from defense.core.suppress import Suppressor, suppress, suppress_and_tell
from defense.errors import ConfigError, ShapeError

from ..conftest import D_MODEL, D_SAE, random_sae

RULES = {
    "relu": {"act": "relu"},
    "jumprelu": {"act": "jumprelu"},
    "batchtopk": {"act": "batchtopk"},
    "gated": {"act": "gated"},
    "topk-before": {"act": "topk", "k": 8},
    "topk-after": {"act": "topk", "k": 8, "topk_relu": "after"},
    "topk-none": {"act": "topk", "k": 8, "topk_relu": "none"},
    "topk-1": {"act": "topk", "k": 1},
    "topk-all": {"act": "topk", "k": D_SAE},
}
NORMS = ("none", "layer_norm", "constant_norm_rescale")

rules = pytest.mark.parametrize("fields", RULES.values(), ids=RULES)
norms = pytest.mark.parametrize("norm", NORMS)


def plain_acts(sae, resid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(acts, scale, shift) in float64 numpy, written from the specification and not from the library."""
    p = {name: tensor.astype(np.float64) for name, tensor in sae.parameters_numpy().items()}
    config = sae.config
    shift, scale, z = np.zeros((len(resid), 1)), np.ones((len(resid), 1)), resid
    if config.norm == "layer_norm":
        shift, scale = resid.mean(1, keepdims=True), resid.std(1, ddof=1, keepdims=True)
        z = (resid - shift) / (scale + 1e-5)
    elif config.norm == "constant_norm_rescale":
        scale = np.linalg.norm(resid, axis=1, keepdims=True) / np.sqrt(config.d_model)
        z = resid / scale
    centered = z - p["b_dec"] if config.subtract_b_dec else z
    h = centered @ p["W_enc"] + p["b_enc"]
    if config.act == "relu":
        acts = np.maximum(h, 0)
    elif config.act in ("jumprelu", "batchtopk"):
        acts = np.maximum(h, 0) * (h > p["threshold"])
    elif config.act == "gated":
        acts = np.maximum(centered @ (p["W_enc"] * np.exp(p["r_mag"])) + p["b_mag"], 0) * (h > 0)
    else:
        acts = np.zeros_like(h)
        for row, pre_acts in enumerate(h):
            kept = np.argsort(-pre_acts)[: config.k]
            acts[row, kept] = pre_acts[kept] if config.topk_relu == "none" else np.maximum(pre_acts[kept], 0)
    return acts, scale, shift


def plain_edit(sae, latent_set: LatentSet, resid: np.ndarray) -> np.ndarray:
    """Encode, edit, decode, add the error term back: the long way round, in float64."""
    acts, scale, shift = plain_acts(sae, resid)
    W_dec = sae.W_dec.numpy().astype(np.float64)
    b_dec = sae.b_dec.numpy().astype(np.float64)

    def decode(a: np.ndarray) -> np.ndarray:
        return (a @ W_dec + b_dec) * scale + shift

    edited = acts.copy()
    for latent, gain in zip(latent_set.latents, latent_set.gains, strict=True):
        edited[:, latent] *= gain
    return decode(edited) + (resid - decode(acts))


def residuals(n: int, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, D_MODEL)) * 1.5 + 0.2).float()


def some_set(n: int = 40, seed: int = 2, **fields) -> LatentSet:
    rng = np.random.default_rng(seed)
    latents = tuple(rng.choice(D_SAE, n, replace=False).tolist())
    return LatentSet("test", latents, tuple(rng.uniform(0, 1, n).tolist()), **fields)


@rules
@norms
@pytest.mark.parametrize("subtract_b_dec", [True, False], ids=["pre-bias", "no-pre-bias"])
def test_scale_equals_encode_edit_decode_plus_error(fields, norm, subtract_b_dec):
    sae = random_sae(norm=norm, subtract_b_dec=subtract_b_dec, **fields)
    resid = residuals(197)
    latent_set = some_set()
    want = plain_edit(sae, latent_set, resid.double().numpy())
    got = Suppressor(sae, latent_set)(resid[None])[0]
    assert not torch.equal(got, resid), "the case must edit something"
    # layer_norm's eps makes s * z differ from the residual by 1e-5 / std.
    np.testing.assert_allclose(got.numpy(), want, atol=5e-5 if norm == "layer_norm" else 5e-6)


@rules
@norms
def test_encode_equals_the_plain_implementation(fields, norm):
    sae = random_sae(norm=norm, **fields)
    resid = residuals(50)
    acts, scale, shift = plain_acts(sae, resid.double().numpy())
    np.testing.assert_allclose(sae.encode(resid).numpy(), acts, atol=5e-6)
    x_hat = (acts @ sae.W_dec.double().numpy() + sae.b_dec.double().numpy()) * scale + shift
    np.testing.assert_allclose(sae.decode(sae.encode(resid), resid).numpy(), x_hat, atol=2e-5)


@rules
@pytest.mark.parametrize("n", [1, 64, D_SAE], ids=lambda n: f"S{n}")
@pytest.mark.parametrize("tokens", [1, 50, 257], ids=lambda n: f"tokens{n}")
def test_activations_of_the_set_equal_those_of_the_whole_encoder(fields, n, tokens):
    sae = random_sae(**fields)
    resid = residuals(tokens)
    suppressor = Suppressor(sae, some_set(n))
    want = sae.encode(resid)[:, suppressor.latents]
    torch.testing.assert_close(suppressor.acts(resid), want, atol=1e-5, rtol=0)


@rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("edit", ["scale", "project", "set"])
def test_every_gain_one_is_the_identity_bit_for_bit(fields, dtype, edit):
    values = (3.0,) * 40 if edit == "set" else ()
    latent_set = LatentSet("kept", some_set().latents, (1.0,) * 40, edit=edit, values=values)
    resid = residuals(50).to(dtype)[None]
    assert torch.equal(Suppressor(random_sae(**fields), latent_set).to(dtype)(resid), resid)


@rules
@pytest.mark.parametrize("edit", ["scale", "project", "set"])
def test_strength_zero_is_the_identity_bit_for_bit(fields, edit):
    values = (3.0,) * 40 if edit == "set" else ()
    suppressor = Suppressor(random_sae(**fields), LatentSet("off", some_set().latents, edit=edit, values=values))
    suppressor.set_strength(0)
    resid = residuals(50)[None]
    assert torch.equal(suppressor(resid), resid)


def test_fault_60_an_empty_set_is_the_identity():
    resid = residuals(50)[None]
    assert torch.equal(Suppressor(random_sae(), LatentSet("empty", ()))(resid), resid)


@pytest.mark.parametrize("edit", ["scale", "project"])
@pytest.mark.parametrize("fields", [RULES["relu"], RULES["topk-before"]], ids=["relu", "topk"])
def test_tokens_where_nothing_fires_pass_bit_for_bit(fields, edit):
    sae = random_sae(**fields)
    latent_set = LatentSet("few", (3, 5), edit=edit)
    resid = residuals(400)
    fires = (sae.encode(resid)[:, [3, 5]] > 0).any(1)
    assert 0 < fires.sum() < 400
    got = Suppressor(sae, latent_set)(resid[None])[0]
    assert torch.equal(got[~fires], resid[~fires])
    assert (got[fires] != resid[fires]).any(1).all()


def test_the_edit_is_linear_in_what_is_removed():
    sae, resid = random_sae(**RULES["topk-before"]), residuals(50)
    latents = some_set().latents
    deltas = [
        Suppressor(sae, LatentSet("s", latents, (gain,) * 40)).removed(resid.double().float()) for gain in (0.0, 0.75)
    ]
    torch.testing.assert_close(deltas[1], deltas[0] * 0.25)


def test_permuting_tokens_permutes_the_result():
    sae, resid = random_sae(**RULES["topk-before"]), residuals(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    suppressor = Suppressor(sae, some_set())
    torch.testing.assert_close(suppressor(resid[None])[0][order], suppressor(resid[order][None])[0], atol=1e-6, rtol=0)


def test_a_non_contiguous_residual_gives_the_same_and_is_left_alone():
    sae = random_sae(**RULES["topk-before"])
    suppressor = Suppressor(sae, some_set())
    wide = residuals(100).view(2, 50, D_MODEL)
    strided = wide.transpose(0, 1).contiguous().transpose(0, 1)
    before = strided.clone()
    assert not strided.is_contiguous()
    torch.testing.assert_close(suppressor(strided), suppressor(wide), atol=1e-6, rtol=0)
    assert torch.equal(strided, before)


def test_ties_at_rank_k_are_all_kept():
    # Four equal latents at the boundary: which of them top-k keeps is unspecified, so none may be treated differently.
    z = torch.ones(1, 1)
    pre_acts = torch.tensor([[5.0, 4.0, 2.0, 2.0, 2.0, 2.0, 1.0]])
    latents = torch.arange(7)
    encoder = Encoder(pre_acts, torch.zeros(7), None, None, None, pre_acts, torch.zeros(7), latents, k=4)
    assert reference.acts_of_set(z, encoder).tolist() == [[5.0, 4.0, 2.0, 2.0, 2.0, 2.0, 0.0]]


def test_a_latent_exactly_at_rank_k_counts_itself_out():
    # Recomputed in another product, a value may differ in its last bit; comparing it with itself would drop it.
    sae = random_sae(act="topk", k=8)
    resid = residuals(2000)
    acts = sae.encode(resid)
    kth = acts.topk(8, dim=1).indices[:, -1]
    for latent in kth.unique()[:40]:
        rows = kth == latent
        got = Suppressor(sae, LatentSet("one", (int(latent),))).acts(resid[rows])[:, 0]
        assert (got > 0).all()


def test_chunks_of_the_whole_encoder_do_not_change_the_result(monkeypatch):
    sae, resid = random_sae(**RULES["topk-before"]), residuals(197)
    suppressor = Suppressor(sae, some_set())
    whole = suppressor.acts(resid)
    for name, chunk in (("_CHUNK_ROWS_CPU", 5), ("_CHUNK_ELEMENTS", 3 * D_SAE)):
        monkeypatch.setattr(reference, name, chunk)
        torch.testing.assert_close(suppressor.acts(resid), whole, atol=1e-6, rtol=0)


def test_the_whole_encoder_runs_only_for_tokens_with_a_positive_latent():
    sae = random_sae(**RULES["topk-before"])
    suppressor = Suppressor(sae, LatentSet("few", (3,)))
    resid = residuals(300)
    positive = ((resid @ sae.W_enc + sae.folded_bias)[:, 3] > 0).sum()
    seen = []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.addmm and args[2].shape[1] == D_SAE:
                seen.append(len(args[1]))
            return func(*args, **(kwargs or {}))

    with Count():
        suppressor.acts(resid)
    assert sum(seen) == positive < 300


@rules
def test_project_with_gain_zero_is_the_orthogonal_projection(fields):
    sae = random_sae(**fields)
    resid = residuals(60)
    latent_set = LatentSet("span", some_set(12).latents, edit="project")
    got = Suppressor(sae, latent_set).removed(resid)
    acts = sae.encode(resid)[:, list(latent_set.latents)]
    rows = sae.W_dec[list(latent_set.latents)].double().numpy()
    for token in range(60):
        active = rows[(acts[token] != 0).numpy()]
        centered = (resid[token] - sae.b_dec).double().numpy()
        want = np.linalg.pinv(active) @ (active @ centered) if len(active) else np.zeros(D_MODEL)
        np.testing.assert_allclose(got[token].numpy(), want, atol=2e-5)


def test_project_survives_parallel_decoder_rows():
    from defense.core.config import SAEConfig
    from defense.core.sae import SparseAutoencoder

    from ..conftest import random_parameters

    config = SAEConfig(D_MODEL, D_SAE, "relu")
    parameters = random_parameters(config)
    parameters["W_dec"][7] = parameters["W_dec"][3]
    parameters["W_enc"][:, 7] = parameters["W_enc"][:, 3]
    parameters["b_enc"][7] = parameters["b_enc"][3]
    sae = SparseAutoencoder(config, parameters)
    resid = residuals(60)
    twice = Suppressor(sae, LatentSet("twice", (3, 7), edit="project")).removed(resid)
    once = Suppressor(sae, LatentSet("once", (3,), edit="project")).removed(resid)
    torch.testing.assert_close(twice, once, atol=1e-4, rtol=0)


def test_project_survives_rows_that_bfloat16_makes_parallel():
    from defense.core.config import SAEConfig
    from defense.core.sae import SparseAutoencoder

    from ..conftest import random_parameters

    config = SAEConfig(D_MODEL, D_SAE, "relu")
    parameters = random_parameters(config)
    for name in ("W_enc", "W_dec"):
        rows = parameters[name] if name == "W_dec" else parameters[name].T
        rows[7] = rows[3] + 1e-4 * rows[9]
    parameters["b_enc"][7] = parameters["b_enc"][3]
    sae = SparseAutoencoder(config, parameters)
    resid = residuals(60)
    suppressor = Suppressor(sae, LatentSet("twice", (3, 7), edit="project")).bfloat16()
    removed, centered = suppressor.removed(resid).float(), resid - sae.b_dec
    fires = (suppressor.acts(resid) != 0).all(1)
    assert fires.any()
    assert (removed[fires].norm(dim=1) < 1.02 * centered[fires].norm(dim=1)).all(), "a projection cannot lengthen"
    left = (centered - removed)[fires] @ sae.W_dec[3]
    assert left.abs().max() < 0.05, "nothing may be left along the rows"


@rules
@norms
def test_set_moves_activations_to_their_target(fields, norm):
    sae = random_sae(norm=norm, **fields)
    resid = residuals(60)
    latent_set = LatentSet("steer", (3, 9), edit="set", values=(2.0, -1.0))
    acts, scale, _ = plain_acts(sae, resid.double().numpy())
    want = resid.double().numpy() - scale * ((acts[:, [3, 9]] - [2.0, -1.0]) @ sae.W_dec[[3, 9]].double().numpy())
    np.testing.assert_allclose(Suppressor(sae, latent_set)(resid[None])[0].numpy(), want, atol=2e-5)


@pytest.mark.parametrize(("scope", "touched"), [("cls", [0]), ("patch", [1, 2, 3, 4]), ("all", [0, 1, 2, 3, 4])])
def test_scope_names_the_tokens_that_may_change(scope, touched):
    sae = random_sae()
    resid = residuals(15).view(3, 5, D_MODEL)
    got = Suppressor(sae, some_set(scope=scope))(resid)
    changed = (got != resid).any(-1)
    assert changed[:, touched].all()
    assert changed.sum() == 3 * len(touched)


@pytest.mark.parametrize("edit", ["scale", "project"])
@pytest.mark.parametrize("scope", ["cls", "patch", "all"])
@pytest.mark.parametrize("fields", [RULES["relu"], RULES["topk-before"]], ids=["relu", "topk"])
def test_patches_of_high_norm_are_spared_and_no_other_token_is_touched_otherwise(fields, scope, edit):
    sae, n_prefix = random_sae(**fields), 2
    resid = residuals(3 * 12).view(3, 12, D_MODEL)
    resid[:2, 7] *= 20
    resid[:, 0] *= 20  # no patch: a long CLS token or register is edited as ever
    full = Suppressor(sae, some_set(scope=scope, edit=edit))
    sparing = Suppressor(sae, some_set(scope=scope, edit=edit, spares_high_norm=True))
    want = full(resid, n_prefix)
    if scope != "cls":
        assert (want[:2, 7] != resid[:2, 7]).any(-1).all()
    want[:2, 7] = resid[:2, 7]
    torch.testing.assert_close(sparing(resid, n_prefix), want, atol=1e-5, rtol=0)
    assert torch.equal(sparing(resid, n_prefix)[:2, 7], resid[:2, 7])
    told = suppress_and_tell(resid, [sparing], n_prefix)
    assert torch.equal(told.edited, sparing(resid, n_prefix))
    tokens = torch.arange(12)[token_slice(scope, n_prefix)]
    assert not told.acts[0][:2, tokens == 7].any(), "what is spared is not told as removed"
    assert told.acts[0].any()


def test_two_sets_at_a_block_both_see_the_unedited_residual():
    sae = random_sae(**RULES["topk-before"])
    resid = residuals(50)[None]
    first, second = LatentSet("a", tuple(range(40))), LatentSet("b", tuple(range(40, 80)))
    both = suppress(resid, [Suppressor(sae, first), Suppressor(sae, second)], 1)
    union = Suppressor(sae, LatentSet("ab", tuple(range(80))))(resid)
    torch.testing.assert_close(both, union, atol=1e-6, rtol=0)


def test_thresholds_survive_half_precision():
    suppressor = Suppressor(random_sae(act="jumprelu"), some_set())
    exact = suppressor.threshold_S.clone()
    suppressor.half()
    assert suppressor.W_S.dtype == torch.float16
    assert suppressor.threshold_S.dtype == torch.float32
    assert torch.equal(suppressor.threshold_S, exact)
    assert suppressor.latents.dtype == torch.int64


def test_energy_of_orthogonal_latents_adds_up_to_what_was_removed():
    from defense.core.config import SAEConfig
    from defense.core.sae import SparseAutoencoder

    from ..conftest import random_parameters

    config = SAEConfig(D_MODEL, D_MODEL, "relu")
    parameters = random_parameters(config) | {"W_dec": np.eye(D_MODEL, dtype=np.float32)}
    suppressor = Suppressor(SparseAutoencoder(config, parameters), LatentSet("s", tuple(range(10))))
    resid = residuals(50)[None]
    total = suppressor.removed(resid).square().sum()
    torch.testing.assert_close(suppressor.energy(resid, suppressor.acts(resid)).sum(), total)


def test_fault_56_a_residual_of_another_width_is_refused():
    with pytest.raises(ShapeError, match=r"d_model=64.*65"):
        Suppressor(random_sae(), some_set())(torch.zeros(1, 5, 65))
    with pytest.raises(ShapeError, match=r"d_model=64.*65"):
        random_sae().encode(torch.zeros(5, 65))


def test_fault_60_a_latent_out_of_range_is_refused():
    with pytest.raises(ConfigError, match=rf"latent {D_SAE}.*0 to {D_SAE - 1}"):
        Suppressor(random_sae(), LatentSet("far", (D_SAE,)))


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_fault_61_a_strength_outside_zero_to_one_is_refused(strength):
    with pytest.raises(ConfigError, match="strength"):
        Suppressor(random_sae(), some_set()).set_strength(strength)
