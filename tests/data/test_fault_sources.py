"""Where pictures come from: files, paths, addresses, texts, streams."""

from __future__ import annotations

import base64
import gzip
import http.client
import io
import os
import sys
import urllib.parse
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from defense.data import images
from defense.data.images import Limits, decode

from .pictures import encoded, photograph, picture, pixels, refusal

# Files and paths


def test_fault_30_large_file_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.touch()
    os.truncate(path, 50_000_001)
    monkeypatch.setattr(images, "open", None, raising=False)
    assert refusal(path).code == "too_large"


def test_fault_30_bytes_over_the_limit_are_too_large():
    data = encoded(picture())
    assert refusal(data, limits=Limits(max_bytes=len(data) - 1)).code == "too_large"
    assert decode(data, limits=Limits(max_bytes=len(data))).warnings == ()


def test_fault_31_folder_is_refused(tmp_path):
    error = refusal(tmp_path)
    assert error.code == "not_an_image"
    assert "give the file of one picture" in str(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with FIFOs and /dev")
def test_fault_31_fifo_and_device_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert refusal(tmp_path / "fifo").code == "not_an_image"
    assert refusal("/dev/zero").code == "not_an_image"


@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
def test_fault_31_dangling_link_is_not_found(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    assert refusal(tmp_path / "link.png").code == "not_found"


def test_fault_31_unreadable_file_gives_the_text_of_the_system(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture()))

    def deny(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(images, "open", deny, raising=False)
    error = refusal(path)
    assert error.code == "not_found"
    assert "Permission denied" in str(error)
    assert isinstance(error.__cause__, PermissionError)


@pytest.mark.parametrize("path", ["a\0b.png", "x" * 5000, "a.png/b.png"])
def test_fault_31_impossible_path_is_not_found(path):
    error = refusal(path)
    assert error.code == "not_found"
    assert len(str(error)) < 6000


def test_fault_32_label_taken_for_a_path_gets_a_hint():
    error = refusal("dog")
    assert error.code == "not_found"
    assert "no such file; did you mean candidate_labels?" in str(error)
    assert "candidate_labels" not in str(refusal("photos/dog.jpg"))
    assert "candidate_labels" not in str(refusal(Path("dog")))


@pytest.mark.parametrize(
    "url", ["http://a.b/c.png", "HTTPS://a.b/c.png", "file:///etc/passwd", "s3://a/b", "ftp://a.b/data:,"]
)
def test_fault_33_urls_are_refused(url):
    assert refusal(url).code == "url_not_supported"


# data: URLs and texts


@pytest.mark.parametrize("quote", [str, urllib.parse.quote], ids=["plain", "percent-encoded"])
def test_data_urls_are_read(quote):
    data = encoded(photograph(), "PNG")
    text = base64.b64encode(data).decode()
    for url in (f"data:image/png;base64,{quote(text)}", f"DATA:;base64,{quote(text)}"):
        np.testing.assert_array_equal(np.asarray(decode(url).image), np.asarray(photograph()))
    np.testing.assert_array_equal(
        np.asarray(decode("data:image/png," + urllib.parse.quote(data)).image), np.asarray(photograph())
    )


def test_broken_data_urls_are_refused():
    assert refusal("data:image/png;base64").code == "corrupt"
    assert refusal("data:image/png;base64,@@@").code == "corrupt"
    assert refusal("data:image/png;base64,").code == "empty"
    assert refusal("data:,hello").code == "not_an_image"
    long = "data:image/png;base64," + "A" * 5000
    assert refusal(long, limits=Limits(max_bytes=1000)).code == "too_large"
    assert len(str(refusal(long))) < 400


def test_fault_101_a_base64_text_gets_a_short_message_that_says_what_to_do():
    text = base64.b64encode(np.random.default_rng(0).bytes(200_000)).decode()
    error = refusal(text)
    assert "data:image/png;base64," in str(error)
    assert len(str(error)) < 500


# Streams


def test_fault_30_endless_stream_is_read_with_a_cap():
    class Endless:
        served = 0

        def read(self, size):
            assert 0 < size <= 1001
            self.served += 300  # more than asked for in the end
            return bytes(300)

    stream = Endless()
    assert refusal(stream, limits=Limits(max_bytes=1000)).code == "too_large"
    assert stream.served == 1200


def test_fault_30_stream_of_short_reads_is_read_to_its_end():
    class Trickle(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 7))

    np.testing.assert_array_equal(pixels(Trickle(encoded(picture()))), np.asarray(picture()))


def test_fault_31_closed_and_text_streams_are_refused(tmp_path):
    stream = io.BytesIO(encoded(picture()))
    stream.close()
    assert refusal(stream).code == "not_found"
    error = refusal(io.StringIO("text"))
    assert error.code == "not_an_image"
    assert '"rb"' in str(error)


class Breaking(io.RawIOBase):
    """Gives a part of a file, then raises."""

    def __init__(self, data, error):
        self._data, self._error = data, error

    def read(self, size=-1):
        if not self._data:
            raise self._error
        part, self._data = self._data[:10], self._data[10:]
        return part


class OddError(Exception):
    """Of a library that has exceptions of its own."""


@pytest.mark.parametrize(
    "error",
    [EOFError("cut"), OddError("strange"), RuntimeError(), KeyError("k"), OSError(5, "I/O"), zipfile.BadZipFile("b")],
)
def test_fault_102_whatever_a_stream_raises_is_one_invalid_image_error(error):
    found = refusal(Breaking(encoded(photograph(), "PNG")[:500], error))
    assert found.__cause__ is error
    assert found.code in ("not_found", "truncated", "corrupt")


def test_fault_102_cut_gzip_bad_zip_member_and_incomplete_body():
    data = encoded(photograph(), "PNG")
    assert refusal(gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(data)[:-2000]))).code == "truncated"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.png", data)
    damaged = bytearray(archive.getvalue())
    damaged[1000] ^= 1
    with zipfile.ZipFile(io.BytesIO(damaged)) as file:
        assert refusal(file.open("a.png")).code == "corrupt"
    assert refusal(Breaking(data[:100], http.client.IncompleteRead(b"", 100))).code == "truncated"


def test_fault_102_async_and_other_reads_are_refused_without_a_python_warning():
    class Upload:
        async def read(self, size=-1):
            return b""

    class Numbers:
        def read(self, size=-1):
            return 7

    class Waiting:
        def read(self, size=-1):
            return None

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "await" in str(refusal(Upload()))
    for stream in (Numbers(), Waiting()):
        assert refusal(stream).code == "not_an_image"
