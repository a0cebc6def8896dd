"""All of these files, by format."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")


from .published_text import (
    dictionary_backup,
    dictionary_batchtopk,
    dictionary_jumprelu,
    dictionary_never_set_threshold,
    dictionary_topk,
    openai,
    openai_relu,
    openai_tied_identity,
    overcomplete_topk,
    saelens_before_6,
    saelens_finetuned,
    sparsify,
)
from .published_vision import (
    clipscope,
    clipscope_relu,
    conceptscope,
    msae,
    msae_tied,
    patchsae,
    prisma,
    prisma_constant_norm,
    prisma_gated,
    prisma_json,
    prisma_oldest,
    prisma_pkl_gz,
    prisma_topk,
    sae_for_vlm,
    saev_batchtopk,
    saev_legacy,
    saev_schema_1,
    saev_topk,
)

CASES = {
    "prisma": [
        prisma, prisma_topk, prisma_constant_norm, prisma_json, prisma_gated, prisma_pkl_gz, prisma_oldest
    ],
    "saelens": [saelens_before_6, saelens_finetuned],
    "sparsify": [sparsify],
    "dictionary_learning": [
        dictionary_topk, dictionary_batchtopk, dictionary_backup, dictionary_never_set_threshold, dictionary_jumprelu
    ],
    "patchsae": [patchsae, conceptscope],
    "sae-for-vlm": [sae_for_vlm],
    "overcomplete": [overcomplete_topk],
    "saev": [saev_legacy, saev_schema_1, saev_topk, saev_batchtopk],
    "clipscope": [clipscope, clipscope_relu],
    "msae": [msae, msae_tied],
    "openai": [openai, openai_relu, openai_tied_identity],
}  # fmt: skip
ALL = [pytest.param(name, make, id=make.__name__) for name, makers in CASES.items() for make in makers]
