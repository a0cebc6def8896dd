"""Wrap and detach: identity with stock CLIP, contexts, threads, copies, compiled code."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from dataclasses import replace

import pytest

pytest.importorskip("open_clip")
import torch

from defense.core.latents import LatentSet
from defense.core.suppress import Suppressor
from defense.errors import ConfigError
from defense.hosts.attach import attached, detach, wrap

from ..conftest import D_MODEL, random_defense, random_sae
from .attaching import TOPK, a_set, pictures


def test_wrap_returns_the_same_object_defended_and_detach_restores_it_bit_for_bit(tiny_clip):
    batch = pictures(tiny_clip)
    keys = list(tiny_clip.state_dict())
    with torch.inference_mode():
        stock = tiny_clip.encode_image(batch)
        assert wrap(tiny_clip, random_defense(tiny_clip, (1, random_sae(**TOPK), a_set()))) is tiny_clip
        defended = tiny_clip.encode_image(batch)
        assert list(tiny_clip.state_dict()) == keys
        assert defended.shape == stock.shape
        assert defended.dtype == stock.dtype
        assert not torch.equal(defended, stock)
        assert detach(tiny_clip) is tiny_clip
        assert torch.equal(tiny_clip.encode_image(batch), stock)
    assert list(tiny_clip.state_dict()) == keys


def test_the_hook_applies_the_suppressor_to_the_output_of_its_block(tiny_clip):
    sae, latent_set = random_sae(**TOPK), a_set()
    outputs = []
    tiny_clip.visual.transformer.resblocks[2].register_forward_pre_hook(lambda _m, inputs: outputs.append(inputs[0]))
    batch = pictures(tiny_clip)
    with torch.inference_mode():
        tiny_clip.encode_image(batch)
        wrap(tiny_clip, random_defense(tiny_clip, (1, sae, latent_set)))
        tiny_clip.encode_image(batch)
    from defense.core.suppress import Suppressor

    torch.testing.assert_close(outputs[1], Suppressor(sae, latent_set)(outputs[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "latent_set",
    [LatentSet("empty", ()), a_set(gains=(1.0,) * 40), a_set(edit="project", gains=(1.0,) * 40)],
    ids=["empty", "gain-one", "project-gain-one"],
)
def test_a_defense_that_keeps_everything_is_bit_equal_to_stock_clip(tiny_clip, latent_set, dtype):
    batch = pictures(tiny_clip, dtype=dtype)
    stock = copy.deepcopy(tiny_clip).to(dtype)
    wrap(tiny_clip, random_defense(tiny_clip, (1, random_sae(**TOPK), latent_set))).to(dtype)
    with torch.inference_mode():
        assert torch.equal(tiny_clip.encode_image(batch), stock.encode_image(batch))


@pytest.mark.parametrize("edit", ["scale", "project"])
def test_what_fires_does_not_depend_on_the_callers_autocast(tiny_clip, edit):
    defense = random_defense(tiny_clip, (1, random_sae(**TOPK), a_set(edit=edit)))
    batch, seen = pictures(tiny_clip), {}
    wrap(tiny_clip, defense)
    tiny_clip.visual.transformer.resblocks[1].register_forward_hook(
        lambda _m, _inputs, output: seen.update(output=output)
    )
    (block,) = attached(tiny_clip).edited_blocks()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), attached(tiny_clip).recording() as told:
        tiny_clip.encode_image(batch)
        before = told[block.hook_point].resid
    (suppressor,) = block.parts()
    with torch.inference_mode():
        want = (before.float() - suppressor.removed(before)).to(before.dtype)
    assert torch.equal(seen["output"], want)
    assert not torch.equal(seen["output"], before)


@pytest.mark.parametrize("edit", ["scale", "project"])
def test_a_float64_host_is_defended_in_float64(tiny_clip, edit):
    batch = pictures(tiny_clip)
    wrap(tiny_clip, random_defense(tiny_clip, (1, random_sae(**TOPK), a_set(edit=edit))))
    with torch.inference_mode():
        single = tiny_clip.encode_image(batch)
        double = tiny_clip.double().encode_image(batch.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, atol=1e-4, rtol=1e-4)


def test_strength_zero_and_bypass_are_bit_equal_to_stock_clip(tiny_clip):
    batch = pictures(tiny_clip)
    with torch.inference_mode():
        stock = tiny_clip.encode_image(batch)
        wrap(tiny_clip, random_defense(tiny_clip, (0, random_sae(), a_set()), (1, random_sae(1), a_set())))
        with attached(tiny_clip).bypassed():
            assert torch.equal(tiny_clip.encode_image(batch), stock)
        assert not torch.equal(tiny_clip.encode_image(batch), stock)
        attached(tiny_clip).set_strength(0)
        assert torch.equal(tiny_clip.encode_image(batch), stock)
    with pytest.raises(ConfigError, match="no set 'nope'"):
        attached(tiny_clip).set_strength(0, "nope")


def test_contexts_nest(tiny_clip):
    batch = pictures(tiny_clip)
    with torch.inference_mode():
        stock = tiny_clip.encode_image(batch)
        wrap(tiny_clip, random_defense(tiny_clip, (1, random_sae(), a_set())))
        defense = attached(tiny_clip)
        (point,) = (block.hook_point for block in defense.edited_blocks())
        with defense.recording() as outer:
            with defense.bypassed():
                with defense.bypassed(), defense.recording():
                    pass
                assert torch.equal(tiny_clip.encode_image(batch), stock)
            assert not outer, "nothing was edited yet"
            tiny_clip.encode_image(batch)
            told = outer[point]
            with defense.recording() as inner:
                tiny_clip.encode_image(batch[:1])
                assert len(inner[point].resid) == 1
            assert outer[point] is told
            tiny_clip.encode_image(batch[:2])
            assert len(outer[point].resid) == 2
        tiny_clip.encode_image(batch)
        assert len(outer[point].resid) == 2, "recording is over"


@pytest.mark.parametrize("kind", ["bypassed", "adjusted", "recording"])
def test_fault_contexts_of_tasks_may_overlap_as_they_like(tiny_clip, kind):
    """Two asyncio tasks whose contexts end in the order in which they began: the defense is on in between and after."""
    batch = pictures(tiny_clip)
    stock = tiny_clip.encode_image(batch)
    wrap(tiny_clip, random_defense(tiny_clip, (1, random_sae(), a_set())))
    defense, arguments = attached(tiny_clip), ({},) if kind == "adjusted" else ()
    defended = tiny_clip.encode_image(batch)
    assert not torch.equal(defended, stock)

    async def inside(start: asyncio.Event, end: asyncio.Event, then: asyncio.Event) -> None:
        await start.wait()
        with getattr(defense, kind)(*arguments):
            then.set()
            await end.wait()
            assert torch.equal(tiny_clip.encode_image(batch), defended if kind == "recording" else stock)
        assert torch.equal(tiny_clip.encode_image(batch), defended)

    async def overlapping() -> None:
        begin, first_in, second_in = asyncio.Event(), asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(inside(begin, second_in, first_in))
        second = asyncio.create_task(inside(first_in, first_in, second_in))
        begin.set()
        await first_in.wait()
        assert torch.equal(tiny_clip.encode_image(batch), defended), "who is outside is defended"
        await asyncio.gather(first, second)

    asyncio.run(overlapping())
    assert torch.equal(tiny_clip.encode_image(batch), defended)


@pytest.mark.parametrize("kind", ["bypassed", "adjusted", "recording"])
@pytest.mark.parametrize("closer", ["caller", "thread", "task"])
def test_fault_118_generators_may_leave_contexts_in_any_order_and_anywhere(tiny_clip, kind, closer):
    """Generators that one caller has begun share its context variables: what is reset for one is reset for all."""
    batch = pictures(tiny_clip)
    stock = tiny_clip.encode_image(batch)
    wrap(tiny_clip, random_defense(tiny_clip, (1, random_sae(), a_set())))
    defense, arguments = attached(tiny_clip), ({},) if kind == "adjusted" else ()
    defended = tiny_clip.encode_image(batch)
    within = defended if kind == "recording" else stock

    def inside():
        with getattr(defense, kind)(*arguments):
            yield

    async def in_a_task(generator) -> None:
        generator.close()

    def close(generator) -> None:
        if closer == "thread":
            thread = threading.Thread(target=generator.close)
            thread.start()
            thread.join()
        elif closer == "task":
            asyncio.run(in_a_task(generator))
        else:
            generator.close()

    first, second = inside(), inside()
    next(first)
    next(second)
    close(first)
    assert torch.equal(tiny_clip.encode_image(batch), within), "the second goes on"
    close(second)
    assert torch.equal(tiny_clip.encode_image(batch), defended)
    with getattr(defense, kind)(*arguments):
        assert torch.equal(tiny_clip.encode_image(batch), within)
    assert torch.equal(tiny_clip.encode_image(batch), defended)


def test_fault_a_thread_inside_a_context_leaves_the_others_defended(tiny_clip):
    batch = pictures(tiny_clip)
    wrap(tiny_clip, random_defense(tiny_clip, (1, random_sae(), a_set())))
    defended = tiny_clip.encode_image(batch)
    inside, seen = threading.Event(), []

    def other() -> None:
        inside.wait(10)
        seen.append(tiny_clip.encode_image(batch))

    thread = threading.Thread(target=other)
    thread.start()
    with attached(tiny_clip).bypassed():
        inside.set()
        thread.join()
        assert not torch.equal(tiny_clip.encode_image(batch), defended)
    assert torch.equal(seen[0], defended)


def test_casts_and_moves_reach_the_suppressors(tiny_clip):
    wrap(tiny_clip, random_defense(tiny_clip, (1, random_sae(**TOPK), a_set())))
    tiny_clip.to(torch.bfloat16)
    (suppressor,) = attached(tiny_clip).suppressors()
    assert suppressor.W_enc.dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.isfinite(tiny_clip.encode_image(pictures(tiny_clip, dtype=torch.bfloat16))).all()


def test_a_copy_of_a_defended_model_is_defended_by_itself(tiny_clip):
    wrap(tiny_clip, random_defense(tiny_clip, (1, random_sae(**TOPK), a_set())))
    batch = pictures(tiny_clip)
    with torch.inference_mode():
        defended = tiny_clip.encode_image(batch)
        for twin in (copy.deepcopy(tiny_clip), pickle.loads(pickle.dumps(tiny_clip))):
            attached(twin).set_strength(0)
            assert not torch.equal(twin.encode_image(batch), defended)
        assert torch.equal(tiny_clip.encode_image(batch), defended)


def test_a_latent_in_two_sets_of_a_site_is_removed_once(tiny_clip):
    sae = random_sae(**TOPK)
    defense = random_defense(tiny_clip, (1, sae, a_set()))
    (site,) = defense.sites
    overlapping = replace(site, sets=(a_set(30), LatentSet("second", tuple(range(10, 40)))))
    batch = pictures(tiny_clip)
    with torch.inference_mode():
        once = wrap(tiny_clip, defense).encode_image(batch)
        detach(tiny_clip)
        twice = wrap(tiny_clip, replace(defense, sites=(overlapping,))).encode_image(batch)
    torch.testing.assert_close(once, twice, atol=1e-6, rtol=0)


def test_at_the_last_block_of_a_cls_pooled_tower_only_the_cls_row_is_computed(tiny_clip):
    batch = pictures(tiny_clip)
    with torch.inference_mode():
        wrap(tiny_clip, random_defense(tiny_clip, (2, random_sae(), a_set(scope="all"))))
        everywhere = tiny_clip.encode_image(batch)
        assert attached(tiny_clip).suppressors()[0].scope == "cls"
        detach(tiny_clip)
        cls_only = wrap(tiny_clip, random_defense(tiny_clip, (2, random_sae(), a_set(scope="cls")))).encode_image(batch)
    assert torch.equal(everywhere, cls_only)


def test_compiled_and_eager_agree(tiny_clip):
    wrap(tiny_clip, random_defense(tiny_clip, (1, random_sae(), a_set())))
    batch = pictures(tiny_clip)
    with torch.inference_mode():
        eager = tiny_clip.encode_image(batch)
        compiled = torch.compile(tiny_clip.visual, backend="eager", fullgraph=True)(batch)
    torch.testing.assert_close(compiled, eager, atol=1e-6, rtol=0)


@pytest.mark.parametrize("is_one_graph", [False, True])
def test_fault_133_code_compiled_around_the_model_heeds_contexts_or_raises(tiny_clip, is_one_graph):
    """Nothing of the model says that somebody has compiled what calls it."""
    torch._dynamo.reset()
    batch = pictures(tiny_clip)
    stock = tiny_clip.encode_image(batch)
    wrap(tiny_clip, random_defense(tiny_clip, (0, random_sae(1), a_set()), (1, random_sae(), a_set())))
    defense, want = attached(tiny_clip), tiny_clip.encode_image(batch)
    compiled = torch.compile(lambda x: tiny_clip.encode_image(x), backend="eager", fullgraph=is_one_graph)
    torch.testing.assert_close(compiled(batch), want, atol=1e-6, rtol=0)
    for make in (defense.bypassed, lambda: defense.adjusted({})):
        with make():
            if is_one_graph:
                with pytest.raises(torch._dynamo.exc.Unsupported, match=r"set_strength\(0\)"):
                    compiled(batch)
                continue
            torch.testing.assert_close(compiled(batch), stock, atol=1e-6, rtol=0)
            seen = []
            other = threading.Thread(target=lambda seen=seen: seen.append(compiled(batch)))
            other.start()
            other.join()
            torch.testing.assert_close(seen[0], want, atol=1e-6, rtol=0)  # who is outside is defended
            inside = copy.deepcopy(tiny_clip)
    torch.testing.assert_close(compiled(batch), want, atol=1e-6, rtol=0)
    if not is_one_graph:
        with defense.recording() as told:
            torch.testing.assert_close(compiled(batch), want, atol=1e-6, rtol=0)
        assert len(told) == 2
        assert not [block for block in attached(inside).edited_blocks() if block._is_changed], "a copy is in no context"


RULES = {
    "relu": {"act": "relu"},
    "jumprelu": {"act": "jumprelu"},
    "gated": {"act": "gated"},
    "topk": TOPK,
    "topk without relu": {**TOPK, "topk_relu": "none"},
}


@pytest.mark.parametrize("edit", ["scale", "project"])
@pytest.mark.parametrize("fields", RULES.values(), ids=RULES)
@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_fault_a_graph_traced_where_nothing_fires_still_defends(tiny_clip, fields, edit):
    """Blank pictures fire less than noise; whatever is traced with must not decide what the graph does."""
    torch._dynamo.reset()  # it compiles one function so many times and no more
    batch = pictures(tiny_clip)
    stock = tiny_clip.encode_image(batch)
    wrap(tiny_clip, random_defense(tiny_clip, (1, random_sae(**fields), a_set(edit=edit))))
    want = tiny_clip.encode_image(batch)
    assert not torch.equal(want, stock)
    visual, blank = tiny_clip.visual, torch.zeros_like(batch[:2])
    traced = torch.jit.trace(visual, blank)
    exported = torch.export.export(visual, (torch.zeros_like(batch),)).module()
    compiled = torch.compile(visual, backend="eager", fullgraph=True)
    for graph in (traced, exported, compiled):
        torch.testing.assert_close(graph(batch), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("edit", ["scale", "project"])
@pytest.mark.parametrize("fields", RULES.values(), ids=RULES)
def test_gradients_through_compiled_code_are_those_of_eager_code(fields, edit):
    torch._dynamo.reset()
    suppressor = Suppressor(random_sae(**fields), a_set(edit=edit))
    resid = torch.randn(2, 17, D_MODEL, generator=torch.Generator().manual_seed(3))

    def gradient(function) -> torch.Tensor:
        leaf = resid.clone().requires_grad_()
        (found,) = torch.autograd.grad(function(leaf).square().sum(), leaf)
        return found

    compiled = torch.compile(suppressor, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(compiled), gradient(suppressor), atol=1e-4, rtol=1e-4)
