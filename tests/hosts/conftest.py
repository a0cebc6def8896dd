"""A CLIP in two libraries, and a processor of transformers for it; all of them are imported where they are used."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def clips():
    from . import twins

    return twins.open_clip_pair()


@pytest.fixture(scope="module")
def tokenizer():
    """CLIP's own, as transformers has it."""
    import transformers

    from defense.data.tokenizer import _bpe

    bpe = json.loads(_bpe().to_str())["model"]
    vocabulary = bpe["vocab"] | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    merges = [tuple(merge) for merge in bpe["merges"]]
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)


@pytest.fixture
def processor(tokenizer):
    import transformers

    from .twins import FRAME, HALF

    image_processor = transformers.CLIPImageProcessor(**FRAME, **HALF)
    return transformers.CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
