"""What is found below a folder, in a tar and in a table, and what is passed over, by reason."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defense.data import images, shards
from defense.data.cells import Unreadable, label_in, picture_in
from defense.data.listing import PICTURE_SUFFIXES, in_words, list_files
from defense.data.sources import open_pictures
from defense.errors import ConfigError, InvalidImageError


def png(level: int = 5, format: str = "PNG") -> bytes:
    """A flat picture of a gray level."""
    stream = io.BytesIO()
    Image.new("RGB", (18, 20), (level,) * 3).save(stream, format)
    return stream.getvalue()


def level_of(picture: shards.Picture) -> int:
    return images.decode(picture.open()).image.getpixel((3, 3))[0]


def lay(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png())
    return root


def tar_of(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def found_in(*paths: Path) -> dict[str, int]:
    return {picture.name: level_of(picture) for picture in open_pictures(paths)}


# Folders


def test_fault_103_every_usual_suffix_is_a_picture(tmp_path):
    names = [f"a{suffix}" for suffix in (*PICTURE_SUFFIXES, ".JPE", ".Jfif", ".AVIF")]
    listing = list_files(lay(tmp_path, *names))
    assert sorted(file.name for file in listing.files["pictures"]) == sorted(names)


def test_fault_103_files_without_a_suffix_are_told_by_their_bytes(tmp_path):
    lay(tmp_path, "photo", "img.0001", "St. Bernard", "x.jpg_large")
    (tmp_path / "Makefile").write_text("all:")
    (tmp_path / "heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (tmp_path / "empty").touch()
    listing = list_files(tmp_path)
    assert [file.name for file in listing.files["pictures"]] == ["St. Bernard", "img.0001", "photo", "x.jpg_large"]
    assert listing.passed_over == {"no picture by its first bytes": 2, "picture of a format that is not read": 1}


def test_fault_103_what_is_no_picture_is_counted_by_reason(tmp_path):
    lay(tmp_path, "a.png", "._a.png", ".ipynb_checkpoints/a.png", ".cache/b/c.png", "__MACOSX/a.png", "@eaDir/t.jpg")
    lay(tmp_path, "notes.txt", "b.heic", "c.zip", "Thumbs.db")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    listing = list_files(tmp_path)
    assert [file.name for file in listing.files["pictures"]] == ["a.png"]
    assert listing.passed_over == {
        "hidden": 3,
        "left behind by a system": 3,
        "no picture by its name": 1,
        "picture of a format that is not read": 1,
        "compressed archive": 1,
        "broken link, or no file": 1,
    }
    assert in_words({"hidden": 2, "a": 3}) == "3 a, 2 hidden"
    assert open_pictures([tmp_path]).passed_over == listing.passed_over


def test_fault_103_a_hidden_folder_that_was_asked_for_is_read(tmp_path):
    lay(tmp_path, ".store/a.png")
    assert len(open_pictures([tmp_path / ".store"]).shards) == 1


def test_fault_103_linked_class_folders_are_followed_and_loops_are_not(tmp_path):
    lay(tmp_path, "elsewhere/x.png", "root/cat/y.png")
    (tmp_path / "root" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "cat" / "again").symlink_to(tmp_path / "root")
    source = open_pictures([tmp_path / "root"])
    assert [(picture.name, picture.label) for picture in source] == [("cat/y.png", "cat"), ("dog/x.png", "dog")]
    assert source.passed_over == {"link back to a folder above": 1}


def test_fault_121_folders_that_are_linked_to_each_other_are_no_more_than_there_are(tmp_path):
    folders = [tmp_path / f"{i:02}" for i in range(14)]  # 14! ways through them
    for folder in folders:
        lay(folder, "x.png")
    for folder in folders:
        for other in folders:
            if other != folder:
                (folder / f"to {other.name}").symlink_to(other)
    listing = list_files(tmp_path)
    found = [file.relative_to(tmp_path).as_posix() for file in listing.files["pictures"]]
    behind = [f"{folder.name}/to {other.name}/x.png" for folder in folders for other in folders if other != folder]
    assert sorted(found) == sorted([*(f"{folder.name}/x.png" for folder in folders), *behind])
    assert listing.passed_over["link to a folder that is listed elsewhere"] > 0


def test_fault_121_two_classes_that_are_links_to_one_folder_are_both_there(tmp_path):
    lay(tmp_path, "store/deep/x.png", "root/y.png")
    (tmp_path / "root" / "cat").symlink_to(tmp_path / "store")
    (tmp_path / "root" / "feline").symlink_to(tmp_path / "store")
    assert sorted(found_in(tmp_path / "root")) == ["cat/deep/x.png", "feline/deep/x.png", "y.png"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root lists every folder")
def test_fault_103_a_folder_that_cannot_be_listed_is_counted(tmp_path):
    lay(tmp_path, "a.png", "locked/b.png")
    (tmp_path / "locked").chmod(0)
    assert list_files(tmp_path).passed_over == {"folder that cannot be listed": 1}
    (tmp_path / "locked").chmod(0o700)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["train/dog/a.png", "val/dog/b.png", "test/cat/c.png"], ["cat", "dog", "dog"]),
        (["train2017/dog/a.png"], ["dog"]),
        (["train/a.png", "val/b.png"], [None, None]),
        (["train/a.png", "truck/b.png"], ["train", "truck"]),
        (["dog/train/a.png", "cat/b.png"], ["cat", "dog"]),
        (["a.png"], [None]),
    ],
)
def test_fault_104_splits_are_no_classes_unless_they_stand_beside_some(tmp_path, names, classes):
    source = open_pictures([lay(tmp_path, *names)])
    assert sorted((picture.label for picture in source), key=str) == sorted(classes, key=str)
    assert source.folders == tuple(sorted({name for name in classes if name is not None}))


def test_a_table_about_the_pictures_is_passed_over(tmp_path):
    lay(tmp_path, "a.png", "metadata.parquet")
    assert open_pictures([tmp_path]).passed_over == {"table about the pictures": 1}
    lay(tmp_path, "more.parquet")
    with pytest.raises(ConfigError, match="parquet and pictures"):
        open_pictures([tmp_path])


def test_an_empty_answer_says_what_was_passed_over(tmp_path):
    with pytest.raises(ConfigError, match=r"passed over: 2 picture of a format that is not read"):
        open_pictures([lay(tmp_path, "a.heic", "b.heic")])


# Tars


def test_fault_105_dots_in_names_of_members_are_parts_of_names(tmp_path):
    names = [f"img.{i:04d}.png" for i in range(20)] + [f"v1.{i}.photo.png" for i in range(20)]
    names += [f"st.saint{i}.jpeg" for i in range(20)]
    path = tar_of(tmp_path / "x.tar", **{name: png(i) for i, name in enumerate(names)})
    found = found_in(path)
    assert len(found) == 60
    assert [found[f"x.tar:{name}"] for name in names] == list(range(60))


def test_fault_105_labels_follow_their_picture_through_dots(tmp_path):
    members = {
        "a.1.png": png(1),
        "a.1.cls": b"1",
        "b.x.png": png(2),
        "b.x.cls": b"2",
        "b.y.png": png(3),
        "b.y.cls": b"3",
    }
    members |= {"c.png": png(4), "c.cls": b"4", "d.rgb.png": png(5), "d.cls": b"5"}
    source = open_pictures([tar_of(tmp_path / "x.tar", **members)])
    assert [(level_of(p), int(p.read_label())) for p in source] == [(i, i) for i in range(1, 6)]


@pytest.mark.parametrize(
    "members",
    [
        {"a.jpg": png(7), "a.png": png(0)},
        {"a.png": png(0), "a.jpg": png(7)},
        {"a.png": png(7), "a.seg.png": png(0)},
        {"a.mask.png": png(0), "a.png": png(7)},
        {"a.image.png": png(7), "a.mask.png": png(0), "a.depth.tiff": png(0)},
        {"a.seg.png": png(0), "a.color.png": png(7)},
        {"img.0001.png": png(7), "img.0001.seg.png": png(0)},
    ],
)
def test_fault_105_a_mask_does_not_replace_the_picture(tmp_path, members):
    source = open_pictures([tar_of(tmp_path / "x.tar", **members)])
    assert [level_of(picture) for picture in source] == [7]
    assert source.passed_over == {"further picture of a sample": len(members) - 1}


def test_fault_105_members_are_ignored_and_told_like_files(tmp_path):
    members = {"./d/a.png": png(1), "d/._a.png": png(2), ".git/b.png": png(3), "__MACOSX/c.png": png(4)}
    members |= {"e/photo": png(6), "f/readme": b"text", "g.json": b"{}"}
    path = tar_of(tmp_path / "x.tar", **members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("d/z.png")
        link.type, link.linkname = tarfile.LNKTYPE, "d/a.png"
        tar.addfile(link)
    source = open_pictures([path])
    for _ in range(2):  # counted anew each time
        assert [level_of(picture) for picture in source] == [1, 6]
    assert source.passed_over == {
        "hidden": 2,
        "left behind by a system": 1,
        "link or other special member of a tar": 1,
    }


def test_fault_106_a_large_member_is_refused_before_it_is_read_whole(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = 2**20
        tar.addfile(member, io.BytesIO(png() + bytes(2**20)))
    (picture,) = open_pictures([path], limits=images.Limits(max_bytes=1000))
    assert len(picture.open()) == 1001
    with pytest.raises(InvalidImageError) as caught:
        images.decode(picture.open(), limits=images.Limits(max_bytes=1000))
    assert caught.value.code == "too_large"


# Tables


def parquet_of(path: Path, **columns) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def code_of(picture: shards.Picture) -> str:
    with pytest.raises(InvalidImageError) as caught:
        images.decode(picture.open())
    return caught.value.code


def test_fault_107_pictures_as_datasets_writes_them(tmp_path):
    lay(tmp_path, "sub/b.png")
    (tmp_path / "sub" / "b.png").write_bytes(png(2))
    cells = [
        {"bytes": png(1), "path": "gone.png"},
        {"bytes": None, "path": "b.png"},
        {"bytes": None, "path": None},
        None,
        {"bytes": None, "path": "../x.png"},
        {"bytes": None, "path": "/etc/hostname"},
        {"bytes": b"", "path": "b.png"},
    ]
    labels = [0, 1, -1, None, 1, 1, 1]
    source = open_pictures([parquet_of(tmp_path / "sub" / "x.parquet", photo=cells, label=labels)])
    pictures = list(source)
    assert [level_of(picture) for picture in pictures[:2]] == [1, 2]
    assert [code_of(picture) for picture in pictures[2:]] == ["empty", "empty", "not_found", "not_found", "empty"]
    assert [source.class_of(picture, ("dog", "cat")) for picture in pictures] == [0, 1, None, None, 1, 1, 1]


def test_fault_107_a_column_of_paths_is_relative_to_the_table(tmp_path):
    lay(tmp_path, "a.png")
    source = open_pictures([parquet_of(tmp_path / "x.parquet", image=["a.png", "data:,", "http://a.b/c.png"])])
    assert [level_of(picture) for picture in list(source)[:1]] == [5]
    assert [code_of(picture) for picture in list(source)[1:]] == ["empty", "url_not_supported"]


def test_fault_107_labels_with_nulls_keep_their_classes(tmp_path):
    cells = [png(1)] * 4
    path = parquet_of(tmp_path / "x.parquet", image=cells, label=np.array([1.0, np.nan, -1.0, 0.0]))
    source = open_pictures([path])
    assert [source.class_of(picture, ("dog", "cat")) for picture in source] == [1, None, None, 0]


def datasets_table(path: Path, names: object, **columns: list) -> Path:
    """A table with the metadata that the package `datasets` writes."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"image": [{"bytes": png(1), "path": None}] * len(next(iter(columns.values()))), **columns})
    features = {"image": {"_type": "Image"}}
    features |= {column: {"names": names, "_type": "ClassLabel"} for column in columns}
    return written(table, json.dumps({"info": {"features": features}}), path)


def written(table, metadata: bytes | str, path: Path) -> Path:
    from pyarrow import parquet

    parquet.write_table(table.replace_schema_metadata({"huggingface": metadata}), path)
    return path


@pytest.mark.parametrize("column", ["label", "animal"])
def test_fault_114_numbers_have_the_names_that_datasets_wrote(tmp_path, column):
    path = datasets_table(tmp_path / "x.parquet", ["cat", "dog", "fish"], **{column: [2, 0, -1, None, 1, 7]})
    source = open_pictures([path])
    assert [label_in(picture.label) for picture in source] == ["fish", "cat", None, None, "dog", 7]
    kept = list(source)[:5]
    assert [source.class_of(picture, ("dog", "fish", "cat", "bird")) for picture in kept] == [1, 2, None, None, 0]
    assert [source.class_of(picture, ("Katze", "Hund", "Fisch")) for picture in kept] == [2, 0, None, None, 1]
    with pytest.raises(ConfigError, match="has the label 'fish', which is none of the 2 class names"):
        source.class_of(kept[0], ("Katze", "Hund"))


@pytest.mark.parametrize(
    "metadata",
    [
        *(
            b"",
            b"{",
            b"[]",
            b"null",
            b"\xff",
            b"[" * 10000,
            b'{"info": []}',
            b'{"info": {"features": {"label": null}}}',
        ),
        *(b'{"info": {"features": {"label": {"names": %s}}}}' % names for names in (b"3", b"[1, 2]", b"[]", b'"ab"')),
    ],
)
def test_fault_114_metadata_of_somebody_else_are_passed_over(tmp_path, metadata):
    pyarrow = pytest.importorskip("pyarrow")
    path = written(pyarrow.table({"image": [png(1)], "label": [1]}), metadata, tmp_path / "x.parquet")
    assert [picture.label for picture in open_pictures([path])] == [1]


@pytest.mark.parametrize(
    ("cell", "label"),
    [
        *((nothing, None) for nothing in (None, float("nan"), -1, "-1", b"-1\n", " ", "")),
        *((0, 0), (2.0, 2), ("cat", "cat"), (b"3\n", "3"), (1.5, "1.5"), (-2, -2)),
    ],
)
def test_fault_107_what_says_that_there_is_no_label(cell, label):
    assert label_in(cell) == label


def test_cells_that_are_pictures_pass_as_they_are():
    array = np.zeros((4, 4, 3), np.uint8)
    assert picture_in(array) is array
    assert picture_in("a/../b.png") == "a/../b.png"
    assert picture_in({"path": "a.png"}) == "a.png"
    assert isinstance(picture_in(None), Unreadable)
    assert isinstance(picture_in(float("nan")), Unreadable)
    again = picture_in(picture_in(None))
    assert isinstance(again, Unreadable)


# Names that are no UTF-8, and tables in which a name stands twice


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8 are Linux's")
def test_fault_122_names_that_are_no_utf8_become_escapes_in_folders_tars_and_tables(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xff"))
    lay(folder / "pictures", os.fsdecode(b"a\xfe.png"))
    tar_of(folder / os.fsdecode(b"t\xfd.tar"), **{os.fsdecode(b"b\xfc.png"): png(7)})
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pytest.importorskip("pyarrow").table({"image": [png(9)]}), tmp_path / "x.parquet")
    (tmp_path / "x.parquet").rename(folder / os.fsdecode(b"p\xfb.parquet"))
    assert found_in(folder / "pictures") == {"a\\xfe.png": 5}
    assert found_in(folder / os.fsdecode(b"t\xfd.tar")) == {"t\\xfd.tar:b\\xfc.png": 7}
    assert found_in(folder / os.fsdecode(b"p\xfb.parquet")) == {"p\\xfb.parquet#0": 9}


@pytest.mark.parametrize("name", ["image", "label"])
def test_fault_124_a_column_that_stands_twice_is_refused(tmp_path, name):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"image": pa.array([png()]), "label": pa.array(["cat"])}
    arrays, names = [*columns.values(), columns[name]], [*columns, name]
    pq.write_table(pa.Table.from_arrays(arrays, names=names), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=f"2 columns '{name}'"):
        open_pictures([tmp_path / "x.parquet"])
