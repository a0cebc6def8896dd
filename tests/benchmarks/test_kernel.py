"""The benchmark of the kernels as far as it goes without a GPU; `tests/core/kernel_benchmark.py` runs the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
import torch

from defense.benchmarks import kernel, kernel_sections, kernel_static_tables
from defense.benchmarks.environment import environment_of
from defense.benchmarks.firing import shares_to_time
from defense.benchmarks.kernel_cases import CASES
from defense.benchmarks.kernel_rows import Gpu, Row
from defense.benchmarks.kernel_targets import targets
from defense.core.ops.reference import Encoder


def test_the_timing_loads_nothing_that_a_clip_takes():
    code = (
        "import sys; from defense.benchmarks import kernel; kernel.environment_of(''); "
        "sys.exit(', '.join({'open_clip', 'timm', 'torchvision', 'ftfy', 'tokenizers', 'huggingface_hub', 'PIL', "
        "'safetensors', 'scipy', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_without_open_clip_whole_models_are_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    bench = SimpleNamespace(has_time=lambda _what: True)
    assert list(kernel_sections.model_rows(bench)) == []
    assert "encode_image is left out: open_clip is not installed" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs where there is no GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    out = tmp_path / "kernel.json"
    assert kernel.main(["--out", str(out)]) == 3
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not out.exists()


# --- without a GPU ----------------------------------------------------------------------------------------------------


def encoder_of(acts: list[list[float]], others: list[list[float]], k: int) -> tuple[torch.Tensor, Encoder]:
    """An encoder and tokens, one hot each, at which its latents have just these pre-activations, S first."""
    W_enc = torch.tensor([mine + rest for mine, rest in zip(acts, others, strict=True)])
    n, d_sae = len(acts[0]), W_enc.shape[1]
    b, latents = torch.zeros(d_sae), torch.arange(n)
    b_others = b.index_fill(0, latents, -torch.inf)
    encoder = Encoder(W_enc[:, :n], b[:n], None, None, None, W_enc, b, latents, k, False, b_others)
    return torch.eye(len(acts)), encoder


def test_slots_are_those_that_the_count_kernel_visits():
    pytest.importorskip("triton")
    from defense.benchmarks.kernel_slots import slots_per_tile
    from defense.core.ops.fused import Tile

    # One latent a tile, k = 1. Token 0 has candidates 1 and 3; token 1 none; token 2 one that nothing exceeds.
    acts, others = [[3.0, 1.0], [-1.0, -1.0], [9.0, -1.0]], [[2.0] * 4, [5.0] * 4, [0.0] * 4]
    found = slots_per_tile("drawn", *encoder_of(acts, others, 1), Tile(1, 1, 16, 4, 2))
    assert (found.n_tokens, found.n_firing) == (3, 2)
    # 6 tiles a token, two of them latents of S. Candidate 1 has 3 above it from the start and is never visited.
    assert found.all_slots == 4 / 12
    assert found.slots == 0
    # k = 3: candidate 1 starts with one above it and gets three more; the fourth tile knows that it is out.
    found = slots_per_tile("drawn", *encoder_of(acts, others, 3), Tile(1, 1, 16, 4, 2))
    assert found.slots == 3 / 12


def test_the_static_tables_show_the_count_kernel_everywhere_and_the_others_on_hopper():
    found = {
        "registers": 240, "stack_bytes": 0, "shared_bytes": 147_456, "programs_per_sm": 1, "n_tensor_core": 4,
        "n_instructions": 1151, "per_step": 116, "per_slot": None, "dtype": "bfloat16",
    }  # fmt: skip
    names = [("count", 80), ("count", 90), ("order", 80), ("order", 90)]
    result = {
        "triton": "3.8.0",
        "environment": {"commit": "0123456789abcdef", "is_dirty": False, "timestamp": "then"},
        "kernels": [found | {"kernel": kernel, "capability": each, "model": CASES[0].model} for kernel, each in names],
        "slots": [{"data": "drawn", "n_tokens": 1024, "n_firing": 7, "slots": 2.56, "all_slots": 7.1}],
        "model": [{"model": "ViT-B-32", "share": 0.05, "floor_ms": 0.06, "count_ms": 0.09}],
    }
    text = kernel_static_tables.static_table(result)
    assert [line.split(" | ")[:2] for line in text.splitlines() if "147,456" in line] == [
        ["| count", "sm_80"], ["| count", "sm_90"], ["| order", "sm_90"],
    ]  # fmt: skip
    assert "| drawn | 7 of 1024 | 2.6 | 7.1 |" in text
    assert "| ViT-B-32 | 5 % | 0.060 | 0.090 | 1.50 |" in text
    caption = kernel_static_tables.static_caption(result)
    assert "1,024 tokens" in caption
    assert "0123456789ab, then." in caption


def row(arm: str, share: float | None, latency_ms: float, **fields) -> Row:
    given = {"operation": "suppress", "floor_ms": None, "peak_mib": None, "n_set": 64, "dtype": "bfloat16", **fields}
    return Row(
        arm=arm, share=share, latency_ms=latency_ms, p20_ms=0, p80_ms=0, n_firing=None, unequal=None, case=CASES[0],
        gpu=Gpu(*["-"] * 6), environment=environment_of(""), **given,
    )  # fmt: skip


def test_targets_are_ratios_of_the_rows_that_are_there():
    matrix_mib = CASES[0].n_tokens * CASES[0].d_sae * 2 / 2**20
    rows = [
        row("kernels", 0.05, 1.0),
        row("kernels", 1.0, 6.0, floor_ms=3.0, peak_mib=matrix_mib / 100),
        row("kernels", 1.0, 1.0, floor_ms=9.0, dtype="float16"),
        row("eager dense", 0.05, 20.0),
    ]
    got = {target.name: target for target in targets(rows)}
    assert got["ViT-B-32, 5 % firing, over eager"].got == pytest.approx(0.05)
    assert str(got["ViT-B-32, 5 % firing, over eager"]).startswith("met: ")
    assert str(got["ViT-B-32, 100 % firing, over the floor"]).startswith("MISSED: ")
    assert got["ViT-B-32, extra memory, over the [tokens, d_sae] matrix"].got == pytest.approx(0.01)
    assert str(got["ViT-L-14, encode_image, over plain"]).startswith("not measured: ")


def test_shares_to_time_are_round_ones_and_those_of_the_shipped_defense(tmp_path):
    sites = [{"site": "a", "n_tokens": 1000, "n_firing": n} for n in (998, 628, 50)]
    (tmp_path / "firing.json").write_text(json.dumps({"sites": sites}))
    assert shares_to_time(tmp_path / "firing.json") == (0.0, 0.05, 0.2, 0.63, 1.0)
    assert set(shares_to_time()) >= {0.0, 0.05, 0.2, 1.0}
    assert len(shares_to_time()) > 4


def test_slots_of_the_shipped_defenses_are_those_of_their_topk_rules(monkeypatch):
    pytest.importorskip("triton")
    pytest.importorskip("open_clip")
    from defense.benchmarks import kernel_slots
    from defense.core.ops.fused import Tile

    monkeypatch.setattr(kernel_slots, "_N_PICTURES", 4)
    monkeypatch.setattr(kernel_slots, "N_TOKENS", 256)
    found = kernel_slots.of_defenses(Tile(64, 256, 64, 8, 3))
    assert [each.data for each in found] == [
        "embedded:celeba, blocks.4", "embedded:text, blocks.2", "embedded:text, blocks.3",
        "embedded:waterbirds, blocks.4",
    ]  # fmt: skip
    assert all(0 < each.slots <= each.all_slots and 0 < each.n_firing <= each.n_tokens == 256 for each in found)
