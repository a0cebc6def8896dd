"""Importers against the released packages: files that those write, activations that those compute.

Each test is skipped where its package is not installed. All of them ran with sae-lens 6.54.12, eai-sparsify 1.3.3,
dictionary-learning 0.1.0 and overcomplete 0.3.0, which want an environment of their own: with matplotlib < 3.9, and
dictionary-learning without its dependencies but for nnsight < 0.4.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from defense import importers
from defense.errors import CheckpointError, ConfigError
from defense.store import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # the packages' own, at import and in use

D, M, K, N = 12, 36, 5, 64
BLOCK = "blocks.7.hook_resid_post"
STATED = {"hook_point": BLOCK, "tokens": "all"}


def released(name: str) -> Any:
    try:
        return import_module(name)
    except (ImportError, AttributeError) as error:  # overcomplete 0.3.0 with matplotlib >= 3.9
        pytest.skip(f"{name} cannot be imported ({error}); install the package that has it to run this")


def randomise(module: torch.nn.Module, **positive: float) -> None:
    """Give every parameter values, so that a bias that is left out or a row that is not scaled shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) / max(1, parameter.ndim * 2 - 1)
            parameter.copy_(values.abs() * positive[name] if name in positive else values)


def residuals() -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1)) * 2 + 1


def assert_same(path: Path, folder: Path, want: tuple[torch.Tensor, torch.Tensor], **stated: Any) -> Any:
    """Import a file, save and load the result, and hold its acts and reconstruction against the package's."""
    read = checkpoint.load(checkpoint.save(importers.read(path, **stated), folder / "converted"))
    acts, reconstruction = (tensor.detach() for tensor in want)
    assert (acts != 0).any()
    resid = residuals()
    torch.testing.assert_close(read.sae.encode(resid), acts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read.sae.decode(acts, resid), reconstruction, rtol=1e-4, atol=5e-5)
    return read


# --- SAELens ----------------------------------------------------------------------------------------------------------


def saelens_sae(architecture: str, **fields: Any) -> Any:
    saes = released("sae_lens.saes")
    kind = {"standard": "Standard", "topk": "TopK", "jumprelu": "JumpReLU", "gated": "Gated"}[architecture]
    if architecture == "topk":
        fields["k"] = K
    metadata = released("sae_lens.saes.sae").SAEMetadata(hook_name=BLOCK, model_name="clip")
    config = getattr(saes, f"{kind}SAEConfig")(d_in=D, d_sae=M, metadata=metadata, **fields)
    sae = getattr(saes, f"{kind}SAE")(config)
    randomise(sae, threshold=0.5)
    return sae


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("subtract", [True, False], ids=["minus b_dec", "plain"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_saelens(tmp_path: Path, architecture: str, subtract: bool, norm: str) -> None:
    sae = saelens_sae(architecture, apply_b_dec_to_input=subtract, normalize_activations=norm)
    sae.save_model(tmp_path / "sae")
    acts = sae.encode(residuals())
    read = assert_same(tmp_path / "sae", tmp_path, (acts, sae.decode(acts)), tokens="patch")
    assert (read.hook_point, read.host_model, read.sae.config.tokens) == (BLOCK, "clip", "patch")
    assert read.sae.config.subtract_b_dec is subtract


def test_saelens_topk_rescaled_by_decoder_norms(tmp_path: Path) -> None:
    sae = saelens_sae("topk", rescale_acts_by_decoder_norm=True)
    sae.save_model(tmp_path / "sae")
    acts = sae.encode(residuals())
    assert_same(tmp_path / "sae", tmp_path, (acts, sae.decode(acts)), tokens="all")


@pytest.mark.parametrize("subtract", [True, False], ids=["minus b_dec", "plain"])
@pytest.mark.parametrize("stated", [True, False], ids=["--scaling-factor", "activation_scaler.json"])
@pytest.mark.parametrize("architecture", ["standard", "gated"])
def test_saelens_expected_average(tmp_path: Path, architecture: str, stated: bool, subtract: bool) -> None:
    """The factor is folded as SAELens folds it."""
    norm = {"normalize_activations": "expected_average_only_in", "apply_b_dec_to_input": subtract}
    sae = saelens_sae(architecture, **norm)
    sae.save_model(tmp_path / "sae")
    options = {"scaling_factor": 0.37} if stated else {}
    if not stated:
        scaler = released("sae_lens.training.activation_scaler").ActivationScaler(0.37)
        scaler.save(str(tmp_path / "sae" / "activation_scaler.json"))
    sae.fold_activation_norm_scaling_factor(0.37)
    acts = sae.encode(residuals())
    assert_same(tmp_path / "sae", tmp_path, (acts, sae.decode(acts)), tokens="all", **options)


@pytest.mark.parametrize("subtract", [True, False], ids=["minus b_dec", "plain"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_saelens_covariance_whitening(tmp_path: Path, architecture: str, subtract: bool) -> None:
    sae = saelens_sae(architecture, normalize_activations="covariance_whitening", apply_b_dec_to_input=subtract)
    sae.save_model(tmp_path / "sae")
    scaler = released("sae_lens.training.activation_scaler").ActivationScaler()
    scaler.estimate_whitening(D, iter(residuals().split(8)), n_batches_for_norm_estimate=N // 8)
    scaler.save(str(tmp_path / "sae" / "activation_scaler.json"))
    whitening = scaler.whitening
    sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    acts = sae.encode(residuals())
    assert_same(tmp_path / "sae", tmp_path, (acts, sae.decode(acts)), tokens="all")


def test_saelens_batchtopk_as_it_is_saved_for_inference(tmp_path: Path) -> None:
    saes = released("sae_lens.saes")
    config = saes.BatchTopKTrainingSAEConfig(d_in=D, d_sae=M, k=K)
    training = released("sae_lens.saes.batchtopk_sae").BatchTopKTrainingSAE(config)
    randomise(training)
    training.topk_threshold.fill_(0.8)
    training.save_inference_model(tmp_path / "sae")
    sae = released("sae_lens").SAE.load_from_disk(tmp_path / "sae")
    acts = sae.encode(residuals())
    read = assert_same(tmp_path / "sae", tmp_path, (acts, sae.decode(acts)), **STATED)
    assert read.sae.config.act == "jumprelu"


# --- sparsify ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_latents", [0, M + 1])
def test_sparsify(tmp_path: Path, num_latents: int) -> None:
    sparsify = released("sparsify")
    config = sparsify.SparseCoderConfig(expansion_factor=3, num_latents=num_latents, k=K)
    coder = sparsify.SparseCoder(D, config)
    randomise(coder)
    coder.save_to_disk(tmp_path / "layers.7")
    found = coder.encode(residuals())
    d_sae = num_latents or 3 * D
    acts = torch.zeros(N, d_sae).scatter(1, found.top_indices, found.top_acts)
    decoded = released("sparsify.utils").eager_decode(found.top_indices, found.top_acts, coder.W_dec.mT) + coder.b_dec
    read = assert_same(tmp_path / "layers.7", tmp_path, (acts, decoded), tokens="all")
    assert (read.hook_point, read.sae.config.d_sae, read.sae.config.k) == (BLOCK, d_sae, K)


@pytest.mark.parametrize("fields", [{"transcode": True}, {"skip_connection": True}, {"activation": "groupmax"}])
def test_sparse_coders_of_other_kinds_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    sparsify = released("sparsify")
    coder = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(expansion_factor=3, k=K, **fields))
    coder.save_to_disk(tmp_path / "layers.7")
    with pytest.raises(ConfigError, match="not supported"):
        importers.read(tmp_path / "layers.7", tokens="all")


# --- dictionary_learning ----------------------------------------------------------------------------------------------


def dictionary_of(name: str) -> Any:
    homes = {
        "AutoEncoderTopK": "trainers.top_k",
        "BatchTopKSAE": "trainers.batch_top_k",
        "MatryoshkaBatchTopKSAE": "trainers.matryoshka_batch_top_k",
    }
    sizes: dict[str, tuple[Any, ...]] = {
        "AutoEncoderTopK": (D, M, K),
        "BatchTopKSAE": (D, M, K),
        "MatryoshkaBatchTopKSAE": (D, M, K, [M // 3, M - M // 3]),
    }
    module = released(f"dictionary_learning.{homes.get(name, 'dictionary')}")
    dictionary = getattr(module, name)(*sizes.get(name, (D, M)))
    randomise(dictionary, threshold=0.5)
    return dictionary


DICTIONARIES = [
    "AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "GatedAutoEncoder",
    "JumpReluAutoEncoder",
]  # fmt: skip


def save_run(folder: Path, dictionary: Any, name: str) -> Path:
    folder.mkdir()
    torch.save(dictionary.state_dict(), folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": name}, "buffer": {}}))
    return folder / "ae.pt"


@pytest.mark.parametrize(
    ("name", "threshold"),
    [(name, None) for name in DICTIONARIES] + [(name, 0.9) for name in DICTIONARIES if "TopK" in name],
)
def test_dictionary_learning(tmp_path: Path, name: str, threshold: float | None) -> None:
    dictionary = dictionary_of(name)
    if threshold is not None:
        dictionary.threshold.fill_(threshold)
    path = save_run(tmp_path / "trainer_0", dictionary, name)
    if name == "AutoEncoder":  # its own loader makes the decoder's columns unit length
        dictionary = type(dictionary).from_pretrained(path)
    acts = dictionary.encode(residuals())
    read = assert_same(path, tmp_path, (acts, dictionary.decode(acts)), **STATED)
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        assert read.sae.config.act == ("relu" if threshold is None else "batchtopk")


@pytest.mark.parametrize("name", [name for name in DICTIONARIES if name != "AutoEncoderNew"])
def test_dictionary_learning_backup_of_a_run(tmp_path: Path, name: str) -> None:
    """Biases of a backup are those of scaled residuals; `scale_biases` is what a run does before it saves."""
    dictionary = dictionary_of(name)
    backup = {"step": 7, "ae": dictionary.state_dict(), "optimizer": {}, "config": {"dict_class": name}}
    path = tmp_path / "ae.pt"
    torch.save(backup | {"norm_factor": 2.5}, path)
    dictionary.scale_biases(2.5)
    if name == "AutoEncoder":
        dictionary.normalize_decoder()
    acts = dictionary.encode(residuals())
    assert_same(path, tmp_path, (acts, dictionary.decode(acts)), **STATED)


def test_dictionary_learning_reads_the_configuration_of_a_trainer(tmp_path: Path) -> None:
    trainer = released("dictionary_learning.trainers.batch_top_k").BatchTopKTrainer(
        steps=10, warmup_steps=1, activation_dim=D, dict_size=M, k=K, layer=0, lm_name="", device="cpu"
    )
    randomise(trainer.ae)
    trainer.ae.threshold.fill_(0.7)
    checkpoints = tmp_path / "trainer_0" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(trainer.ae.state_dict(), checkpoints / "ae_9.pt")
    (tmp_path / "trainer_0" / "config.json").write_text(json.dumps({"trainer": trainer.config}))
    acts = trainer.ae.encode(residuals())
    assert_same(checkpoints / "ae_9.pt", tmp_path, (acts, trainer.ae.decode(acts)), **STATED)


# --- Overcomplete -----------------------------------------------------------------------------------------------------


def overcomplete_sae(name: str, tie: str | None = None) -> Any:
    sae = getattr(released("overcomplete.sae"), name)(D, M, **({"top_k": K} if "TopK" in name else {}))
    if tie is not None:
        sae = getattr(sae, tie)(bias=True)
    randomise(sae)
    if name == "BatchTopKSAE":
        sae.running_threshold = torch.tensor(0.6)
    return sae


def saved_and_fused(sae: Any, path: Path) -> Any:
    """Save a state dict as training leaves it, then let `eval` normalize the dictionary in place."""
    torch.save(sae.state_dict(), path)
    return sae.eval()


@pytest.mark.parametrize("tie", [None, "tied", "untied"])
@pytest.mark.parametrize(
    ("name", "stated"),
    [
        ("SAE", {"act": "relu"}),
        ("TopKSAE", {"act": "topk", "k": K}),
        ("JumpSAE", {}),
        ("BatchTopKSAE", {"act": "batchtopk", "threshold": 0.6}),
    ],
)
def test_overcomplete(tmp_path: Path, name: str, stated: dict[str, Any], tie: str | None) -> None:
    sae = saved_and_fused(overcomplete_sae(name, tie), tmp_path / "sae.pt")
    _, acts = sae.encode(residuals())
    assert_same(tmp_path / "sae.pt", tmp_path, (acts, sae.decode(acts)), **STATED, **stated)


def test_overcomplete_multiplier(tmp_path: Path) -> None:
    sae = released("overcomplete.sae").TopKSAE(D, M, top_k=K, dictionary_params={"use_multiplier": True})
    randomise(sae)
    with torch.no_grad():
        sae.dictionary.multiplier.fill_(0.7)
    sae = saved_and_fused(sae, tmp_path / "sae.pt")
    _, acts = sae.encode(residuals())
    assert_same(tmp_path / "sae.pt", tmp_path, (acts, sae.decode(acts)), **STATED, act="topk", k=K)


def test_overcomplete_whole_modules_are_refused(tmp_path: Path) -> None:
    torch.save(overcomplete_sae("TopKSAE"), tmp_path / "sae.pt")
    with pytest.raises(CheckpointError, match=r"TopKSAE .*model\.state_dict\(\)"):
        importers.read(tmp_path, "overcomplete", **STATED, act="topk", k=K)


@pytest.mark.parametrize("encoder", ["mlp_ln_1", "mlp_bn_1", "mlp_ln_3"])
def test_overcomplete_other_encoders_are_refused(tmp_path: Path, encoder: str) -> None:
    sae = released("overcomplete.sae").TopKSAE(D, M, top_k=K, encoder_module=encoder)
    torch.save(sae.state_dict(), tmp_path / "sae.pt")
    with pytest.raises(ConfigError, match="encoder"):
        importers.read(tmp_path, **STATED, act="topk", k=K)
