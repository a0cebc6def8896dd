"""Sources of pictures: what is found, in which order, and what is refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defense.data import images
from defense.data.sources import HELD_OUT_EVERY, START, Picture, Pictures, Position, Slice, open_pictures
from defense.errors import ConfigError

N = 120


def png(i: int) -> bytes:
    """A picture whose every pixel says which one it is."""
    stream = io.BytesIO()
    Image.new("RGB", (18, 20), (i, 2 * i % 256, 7)).save(stream, "PNG")
    return stream.getvalue()


def which(picture: Picture) -> int:
    return images.decode(picture.open()).image.getpixel((3, 3))[0]


def write_tar(path: Path, numbers: range, *, labeled: bool = True) -> Path:
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            for name, data in ((f"{i:04d}.png", png(i)), (f"{i:04d}.cls", str(i % 3).encode())):
                if name.endswith(".png") or labeled:
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path: Path, numbers: range, *, group: int = 17) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"label": [i % 3 for i in numbers], "image": [png(i) for i in numbers]})
    parquet.write_table(table, path, row_group_size=group)
    return path


@pytest.fixture(params=["folder", "tar", "parquet"])
def source(request, tmp_path) -> Pictures:
    """The same pictures, 0 to N - 1, in each of the three forms."""
    folder = tmp_path / "pictures"
    for name in ("0", "1", "2"):
        (folder / name).mkdir(parents=True)
    if request.param == "folder":
        for i in range(N):
            (folder / str(i % 3) / f"{i:04d}.png").write_bytes(png(i))
    else:
        write = {"tar": write_tar, "parquet": write_parquet}[request.param]
        write(folder / f"a.{request.param}", range(70))
        write(folder / f"b.{request.param}", range(70, N))
    return open_pictures([folder])


def test_every_picture_is_either_trained_on_once_an_epoch_or_held_out(source):
    trained = [which(picture) for picture, _ in source.epoch(0)]
    held_out = [which(picture) for picture in source.held_out(N)]
    assert sorted(trained + held_out) == list(range(N))
    assert N / HELD_OUT_EVERY <= len(held_out) <= N / HELD_OUT_EVERY + 2


def test_an_epoch_goes_on_from_any_position(source):
    whole = list(source.epoch(3, Position(1)))
    for n_done in (0, 1, 40, 41, 111):
        position = whole[n_done - 1][1] if n_done else Position(1)
        rest = [picture.name for picture, _ in source.epoch(3, position)]
        assert rest == [picture.name for picture, _ in whole[n_done:]]


def test_the_order_follows_seed_and_epoch(source):
    def names(seed: int, epoch: int) -> list[str]:
        return [picture.name for picture, _ in source.epoch(seed, Position(epoch))]

    assert names(0, 0) == names(0, 0)
    orders = {tuple(names(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) > 1
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_names_are_unique_and_labels_belong_to_their_picture(source):
    pictures = [picture for picture, _ in source.epoch(0)]
    assert len({picture.name for picture in pictures}) == len(pictures)
    assert [source.class_of(picture, ("0", "1", "2")) for picture in pictures] == [which(p) % 3 for p in pictures]


def test_labels_may_be_indices_into_names(source):
    if source.folders:
        pytest.skip("the sub-folders of a folder are names")
    pictures = [picture for picture, _ in source.epoch(0)][:7]
    assert [source.class_of(p, ("dog", "cat", "fox")) for p in pictures] == [which(p) % 3 for p in pictures]
    third = next(picture for picture in pictures if which(picture) % 3 == 2)
    with pytest.raises(ConfigError, match="none of the 2 class names"):
        source.class_of(third, ("dog", "cat"))


def test_held_out_pictures_are_spread_over_the_shards(tmp_path):
    for i in range(300):
        (tmp_path / f"{i:04d}.png").write_bytes(png(i % 256))
    ordinals = [picture.ordinal for picture in open_pictures([tmp_path]).held_out(2)]
    assert ordinals == [0, 150]


def test_sub_folders_of_other_names_stand_for_the_classes_in_order(tmp_path):
    for wnid in ("n02", "n01"):
        (tmp_path / wnid).mkdir()
        (tmp_path / wnid / "x.png").write_bytes(png(1))
    source = open_pictures([tmp_path])
    picture = Picture("n02/x.png", 1, b"", "n02")
    assert source.folders == ("n01", "n02")
    assert source.class_of(picture, ("dog", "cat")) == 1
    assert source.class_of(picture, ("n02", "n01")) == 0
    with pytest.raises(ConfigError, match="label 'n02'"):
        source.class_of(picture, ("dog", "cat", "fox"))


def test_a_picture_without_a_label_has_no_class(tmp_path):
    (tmp_path / "x.png").write_bytes(png(1))
    source = open_pictures([tmp_path])
    (picture,) = source.held_out(5)
    assert source.class_of(picture, ("dog",)) is None


def test_hidden_files_and_other_files_are_ignored(tmp_path):
    for name in ("a.png", "._a.png", ".DS_Store", "notes.txt", ".cache/b.png", "upper.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(1))
    assert sorted(shard.picture.name for shard in open_pictures([tmp_path]).shards) == ["a.png", "upper.PNG"]


def test_members_of_a_tar_that_are_no_pictures_are_ignored(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (("a.json", b"{}"), ("a.png", png(5)), ("a.seg.png", png(6)), ("._b.png", png(7))):
            member = tarfile.TarInfo(f"some/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("some/c.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert [which(picture) for picture in open_pictures([tmp_path / "x.tar"]).held_out(9)] == [5]


def test_a_tar_is_read_without_its_pictures_in_memory(tmp_path):
    path = write_tar(tmp_path / "x.tar", range(60))
    picture, _ = next(open_pictures([path]).epoch(0))
    assert isinstance(picture.source, Slice)
    assert picture.source.read() == png(which(picture))


def test_parquet_cells_may_be_structs(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"bytes": png(i), "path": f"{i}.png"} for i in range(3)]
    parquet.write_table(pyarrow.table({"image": rows}), tmp_path / "x.parquet")
    assert [which(picture) for picture, _ in open_pictures([tmp_path]).epoch(0)] == [1, 2]


def test_the_fingerprint_follows_names_and_sizes(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    first = open_pictures([tmp_path]).fingerprint
    assert open_pictures([tmp_path]).fingerprint == first
    (tmp_path / "a.png").write_bytes(png(1) + b"\0")
    second = open_pictures([tmp_path]).fingerprint
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert len({first, second, open_pictures([tmp_path]).fingerprint}) == 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no pictures"),
        ({"notes.txt": b"x"}, "holds no pictures"),
        ({"a.png": b"x", "b.tar": b"x"}, "pictures and tar"),
    ],
    ids=["empty", "no pictures", "mixed"],
)
def test_a_folder_that_is_no_source_is_refused(tmp_path, files, message):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        open_pictures([tmp_path])


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not there"):
        open_pictures([tmp_path / "missing"])
    with pytest.raises(ConfigError, match="no pictures were given"):
        open_pictures([])


def test_a_damaged_tar_is_refused(tmp_path):
    whole = write_tar(tmp_path / "x.tar", range(5)).read_bytes()
    for data in (whole[:3000], b"no tar at all" * 100, b"\x1f\x8b" + whole):
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(ConfigError, match=r"x\.tar cannot be read as a tar file"):
            list(open_pictures([tmp_path]).epoch(0))


def test_a_damaged_parquet_file_is_refused(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", range(50))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"x\.parquet cannot be read as Parquet"):
        open_pictures([tmp_path])
    path.write_bytes(whole[:4] + bytes(2000) + whole[2004:])
    with pytest.raises(ConfigError, match=r"x\.parquet cannot be read as Parquet"):
        list(open_pictures([tmp_path]).epoch(0))


def test_parquet_without_pictures_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"columns \['text'\]"):
        open_pictures([tmp_path])


def test_real_photographs_in_parquet(shared_data):
    pytest.importorskip("pyarrow")
    source = open_pictures([shared_data / "photos100" / "val-000.parquet"])
    names = (shared_data / "photos100" / "classnames.txt").read_text().split()
    picture, position = next(source.epoch(0, START))
    assert images.decode(picture.open()).image.size == (64, 64)
    assert 0 <= source.class_of(picture, names) < 100
    assert position.picture == 2, "the first of a file is held out"
    assert len(list(source.held_out(1000))) == 100


def test_a_real_folder(shared_data):
    source = open_pictures([shared_data / "rta100"])
    assert len(source.shards) >= 100
    assert np.all([picture.open().is_file() for picture, _ in source.epoch(0)])
