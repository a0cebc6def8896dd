"""Residuals as a stream and in shards: which rows, in which order, and the same again after an interruption."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch
from PIL import Image

from defense.data import images
from defense.data.sources import START, open_pictures
from defense.errors import CheckpointError, ConfigError, HookPointError, IntegrityError, NonFiniteError
from defense.hosts.clip import load_clip
from defense.hosts.families import tower_of
from defense.hosts.tower import VisionTower
from defense.train.residuals import MANIFEST, Batches, Shards, Stream, write_shards

N = 102
N_TRAINED = 99  # the first of every 50 is held out
POINT = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """N pictures of noise."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(N):
        Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def pictures(folder):
    return open_pictures([folder])


@pytest.fixture
def clip(tiny_folder):
    return load_clip(f"local-dir:{tiny_folder}")


def resid_of(clip, paths, block: int) -> torch.Tensor:
    """The residual behind a block as a whole forward pass shows it."""
    seen = []
    handle = tower_of(clip.model).blocks[block].register_forward_hook(lambda _m, _i, out: seen.append(out))
    pixel_values = np.stack([clip.preprocess(images.decode(path).image) for path in paths])
    with torch.no_grad():
        clip.model.encode_image(torch.from_numpy(pixel_values))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("block", "scope", "tokens", "positions"),
    [(1, "all", "all", slice(None)), (1, "cls", "cls", slice(0, 1)), (0, "patch", "patch", slice(1, None)),
     (2, "all", "cls", slice(0, 1))],
    ids=["all", "cls", "patch", "last block"],
)  # fmt: skip
def test_the_residual_is_that_of_the_tokens_of_a_scope(clip, folder, block, scope, tokens, positions):
    paths = sorted(folder.iterdir())[:3]
    hook_point = f"blocks.{block}.hook_resid_post"
    want = resid_of(clip, paths, block)[:, positions]
    pixel_values = np.stack([clip.preprocess(images.decode(path).image) for path in paths])
    assert torch.equal(clip.tower.resid(pixel_values, hook_point, scope), want)
    assert torch.equal(clip.tower.resid(pixel_values, hook_point), resid_of(clip, paths, block))
    assert clip.tower.effective_scope(hook_point, scope) == tokens
    assert clip.tower.n_tokens(hook_point, scope) == want.shape[1]


def test_the_blocks_behind_a_hook_point_do_not_run(clip):
    tower = tower_of(clip.model)
    ran = []
    for index, block in enumerate(tower.blocks):
        block.register_forward_hook(lambda *_args, index=index: ran.append(index))
    clip.tower.resid(np.zeros((1, 3, 32, 32), np.float32), POINT)
    assert ran == [0, 1]


def test_tokens_that_mean_nothing_at_a_block_are_refused(clip, pictures):
    with pytest.raises(HookPointError, match="editing patches changes nothing"):
        Stream(clip, "blocks.2.hook_resid_post", pictures, tokens="patch")
    with pytest.raises(HookPointError, match="blocks 0 to 2"):
        Stream(clip, "blocks.3.hook_resid_post", pictures)


def test_a_chunk_holds_the_residuals_of_the_next_pictures_in_order(clip, pictures):
    stream = Stream(clip, POINT, pictures, buffer=10 * 17, batch=4)
    chunk = stream.chunk(START)
    taken = [picture for picture, _ in pictures.epoch(0)][:10]
    want = resid_of(clip, [picture.source for picture in taken], 1).flatten(0, 1)
    torch.testing.assert_close(chunk.resid, want, atol=1e-5, rtol=0)
    assert chunk.n == len(want)
    assert chunk.numbers.tolist() == list(range(chunk.n))
    again = stream.chunk(chunk.next)
    assert not torch.isclose(again.resid[0], want, atol=1e-3).all(1).any()


def test_pictures_that_cannot_be_read_are_left_out_and_named(clip, folder, tmp_path, caplog):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "007.png").write_bytes(b"")
    (broken / "008.png").write_bytes((folder / "008.png").read_bytes()[:200])
    damaged, whole = (Stream(clip, POINT, open_pictures([path]), batch=8) for path in (broken, folder))
    chunk = damaged.chunk(START)
    assert chunk.n == (N_TRAINED - 2) * 17
    assert damaged.unreadable == {"007.png", "008.png"}
    assert "007.png" in caplog.text
    names = [picture.name for picture, _ in damaged.pictures.epoch(0)]
    kept = [i for i, name in enumerate(names) if name not in damaged.unreadable]
    want = whole.chunk(START).resid.view(N_TRAINED, -1)[kept]
    torch.testing.assert_close(chunk.resid.view(len(kept), -1), want, atol=1e-5, rtol=0)


def test_a_source_without_a_readable_picture_is_refused(clip, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="none of 2 pictures in a row can be read"):
        Stream(clip, POINT, open_pictures([tmp_path])).chunk(START)


def test_a_source_with_held_out_pictures_only_is_refused(clip, folder, tmp_path):
    shutil.copy(folder / "000.png", tmp_path)
    with pytest.raises(ConfigError, match="no picture to train on"):
        Stream(clip, POINT, open_pictures([tmp_path])).chunk(START)


def test_infinite_residuals_are_refused(clip, pictures):
    with torch.no_grad():
        tower_of(clip.model).blocks[0].mlp.c_proj.bias[0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"blocks\.1"):
        Stream(clip, POINT, pictures).chunk(START)


@pytest.mark.parametrize(("field", "value"), [("text_rate", 1.5), ("buffer", 0), ("batch", 0)])
def test_numbers_out_of_range_are_refused(clip, pictures, field, value):
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        Stream(clip, POINT, pictures, **{field: value})


def test_words_are_written_at_the_rate_asked_for(clip, folder):
    plain, half, half_again, written = (
        Stream(clip, POINT, open_pictures([folder]), text_rate=rate).chunk(START).resid.view(N_TRAINED, -1)
        for rate in (0, 0.5, 0.5, 1)
    )
    assert torch.equal(half, half_again)
    assert (plain != written).any(1).all()
    n_written = int((plain != half).any(1).sum())
    assert 30 <= n_written <= 70
    assert ((half == plain).all(1) | (half == written).all(1)).all()


def test_what_is_written_does_not_depend_on_the_buffer(clip, folder):
    streams = [Stream(clip, POINT, open_pictures([folder]), text_rate=1, buffer=size) for size in (2**17, 510)]
    whole, part = (stream.chunk(START).resid for stream in streams)
    torch.testing.assert_close(part, whole[: len(part)], atol=1e-5, rtol=0)


def test_a_source_that_fits_into_the_buffer_is_encoded_once(clip, pictures, monkeypatch):
    n_encoded = 0
    resid = VisionTower.resid

    def counted(self, pixel_values, *where):
        nonlocal n_encoded
        n_encoded += len(pixel_values)
        return resid(self, pixel_values, *where)

    monkeypatch.setattr(VisionTower, "resid", counted)
    batches = Batches(Stream(clip, POINT, pictures), 500)
    rows = [batches.next() for _ in range(10)]
    assert n_encoded == N_TRAINED
    assert batches.state()["chunk"] == 3
    assert not torch.equal(rows[0], rows[3]), "each round has its own order"


def test_a_chunk_gives_each_row_at_most_once(clip, pictures):
    stream = Stream(clip, POINT, pictures)
    batches = Batches(stream, 100)
    rows = torch.cat([batches.next() for _ in range(16)])
    assert len(rows.unique(dim=0)) == 1600
    everything = {tuple(row) for row in stream.chunk(START).resid.tolist()}
    assert {tuple(row) for row in rows.tolist()} <= everything


@pytest.mark.parametrize("n_done", [1, 5, 12, 23])
def test_batches_go_on_bit_for_bit_where_they_were(clip, pictures, n_done):
    def new_batches(state=None) -> Batches:
        return Batches(Stream(clip, POINT, pictures, buffer=40 * 17, text_rate=0.3), 200, state=state)

    batches = new_batches()
    for _ in range(n_done):
        batches.next()
    resumed = new_batches(batches.state())
    for _ in range(4):
        assert torch.equal(resumed.next(), batches.next())


def test_a_sample_is_the_start_of_the_first_batches(clip, pictures):
    batches = Batches(Stream(clip, POINT, pictures), 100)
    sample = batches.sample(150)
    assert torch.equal(sample[:100], batches.next())
    assert len(batches.sample(10**6)) == N_TRAINED * 17


def test_less_than_a_batch_is_refused(clip, pictures):
    with pytest.raises(ConfigError, match=f"together give {N_TRAINED * 17} tokens, less than a batch of 5000"):
        Batches(Stream(clip, POINT, pictures), 5000)
    with pytest.raises(ConfigError, match="larger buffer"):
        Batches(Stream(clip, POINT, pictures, buffer=170), 300).next()


def test_training_from_shards_sees_the_batches_of_the_stream(clip, pictures, tmp_path):
    stream = Stream(clip, POINT, pictures, buffer=40 * 17, text_rate=0.3)
    write_shards(stream, tmp_path / "shards", 10**9)
    shards = Shards(tmp_path / "shards", stream.describe())
    assert len(shards.files) == 3
    from_stream, from_shards = Batches(stream, 200), Batches(shards, 200)
    for _ in range(6):
        assert torch.equal(from_shards.next(), from_stream.next())
    for _ in range(5):  # into the second round
        assert from_shards.next().shape == (200, 64)


def test_shards_stop_at_the_tokens_asked_for(clip, pictures, tmp_path):
    stream = Stream(clip, POINT, pictures, buffer=20 * 17)
    write_shards(stream, tmp_path / "shards", 30 * 17)
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [
        MANIFEST, "resid-00000.safetensors", "resid-00001.safetensors",
    ]  # fmt: skip


def test_shards_of_other_residuals_are_refused(clip, pictures, tmp_path):
    stream = Stream(clip, POINT, pictures)
    write_shards(stream, tmp_path / "shards", 1)
    other = Stream(clip, "blocks.0.hook_resid_post", pictures, tokens="cls", seed=1)
    with pytest.raises(ConfigError, match="hook_point, tokens, pictures_per_chunk, seed differ"):
        Shards(tmp_path / "shards", other.describe())
    with pytest.raises(ConfigError, match="not there yet"):
        write_shards(stream, tmp_path / "shards", 1)


def test_damaged_shards_are_refused(clip, pictures, tmp_path):
    stream = Stream(clip, POINT, pictures)
    folder = write_shards(stream, tmp_path / "shards", 1)
    path = folder / "resid-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        Shards(folder, stream.describe()).chunk(START)
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="write the shards anew"):
        Shards(folder, stream.describe())
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        Shards(folder, stream.describe())


def test_shards_that_fail_leave_nothing_behind(clip, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.png").write_bytes(b"")
    with pytest.raises(ConfigError):
        write_shards(Stream(clip, POINT, open_pictures([tmp_path / "in"])), tmp_path / "shards", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
