"""What is fetched from the hub: with the real client, against an imitation of the hub on loopback."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from defense.errors import CheckpointError, ConfigError
from defense.store.hub import Hub, HubSource, commit_of, hub_source

from ..hub_server import FakeHub

WEIGHTS = bytes(range(256)) * 2000
FOLDER = {
    "manifest.json": json.dumps({"files": {"site-0.safetensors": {}, "golden.safetensors": {}}}).encode(),
    "site-0.safetensors": WEIGHTS,
    "golden.safetensors": b"golden",
    "README.md": b"# a card",
    "pytorch_model.bin": b"not asked for",
}
PRISMA = {
    "config.json": b'{"d_in": 64}',
    "weights.pt": WEIGHTS,
    "weights_log_feature_sparsity.pt": b"sparsity",
    "README.md": b"",
}


@pytest.fixture
def client(hub: FakeHub, tmp_path: Path) -> Hub:
    """The hub as it is asked by default, with a cache of its own."""
    return Hub(cache_dir=str(tmp_path / "cache"))


def fetch_folder(client: Hub, text: str = "org/repo") -> Path:
    source = hub_source(text)
    assert source is not None
    return client.fetch_folder(source, "manifest.json", "a defense")


def offline(client: Hub) -> Hub:
    return Hub(cache_dir=client.cache_dir, local_files_only=True)


def cached(client: Hub) -> list[Path]:
    """Every file of the cache with bytes in it, halves of downloads included."""
    root = Path(client.cache_dir or "")
    return [path for path in root.rglob("*") if path.is_file() and "blobs" in path.parts]


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/repo", HubSource("org/repo")),
        ("hf://org/repo", HubSource("org/repo")),
        ("hf://org/repo/", HubSource("org/repo")),
        ("hf://org/repo@main", HubSource("org/repo", None, "main")),
        ("hf://org/repo/22_resid/12.pt", HubSource("org/repo", "22_resid/12.pt")),
        ("hf://org/repo-1.5/a/b.pt@refs/pr/3", HubSource("org/repo-1.5", "a/b.pt", "refs/pr/3")),
        ("repo", None),
        ("./org/repo", None),
        ("a/b/c", None),
        ("org/weights.pt", None),
        ("https://huggingface.co/org/repo", None),
    ],
)
def test_a_name_is_told_from_a_path(text: str, expected: HubSource | None, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_source(text) == expected


@pytest.mark.parametrize("made", ["runs", "runs/sae"])
def test_what_could_be_a_path_here_does_not_use_the_network(made: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(made).mkdir(parents=True)
    assert hub_source("runs/sae") is None
    assert hub_source("hf://runs/sae") == HubSource("runs/sae")


@pytest.mark.parametrize("text", ["hf://", "hf://org", "hf://org/repo/../../etc", "hf:///repo", "hf://org/repo@"])
def test_an_address_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"want hf://org/repo\[/file\]\[@revision\]"):
        hub_source(text)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_its_manifest_and_what_that_lists(hub: FakeHub, client: Hub) -> None:
    commit = hub.add("org/repo", FOLDER)
    folder = fetch_folder(client)
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "site-0.safetensors", "golden.safetensors"}
    assert all((folder / path.name).read_bytes() == FOLDER[path.name] for path in folder.iterdir())
    assert commit_of(folder) == commit
    assert not [line for line in hub.asked if "pytorch_model" in line or "README" in line]


def test_a_folder_in_a_repository_is_named_by_its_path(hub: FakeHub, client: Hub) -> None:
    hub.add("org/repo", {f"vit/text/{name}": data for name, data in FOLDER.items()})
    folder = fetch_folder(client, "hf://org/repo/vit/text")
    assert folder.parts[-2:] == ("vit", "text")
    assert (folder / "site-0.safetensors").read_bytes() == WEIGHTS


def test_what_the_cache_has_is_not_asked_for_again(hub: FakeHub, client: Hub) -> None:
    commit = hub.add("org/repo", FOLDER)
    folder = fetch_folder(client)
    hub.add("org/repo", {**FOLDER, "golden.safetensors": b"newer"})
    hub.asked.clear()
    assert fetch_folder(client) == folder
    assert fetch_folder(client, f"hf://org/repo@{commit}") == folder
    assert fetch_folder(offline(client)) == folder
    assert hub.asked == []


def test_a_branch_that_is_named_is_looked_up_anew_and_files_are_of_one_commit(hub: FakeHub, client: Hub) -> None:
    hub.add("org/repo", FOLDER)
    fetch_folder(client)
    commit = hub.add("org/repo", {**FOLDER, "golden.safetensors": b"newer"})
    folder = fetch_folder(client, "hf://org/repo@main")
    assert commit_of(folder) == commit
    assert (folder / "golden.safetensors").read_bytes() == b"newer"
    assert fetch_folder(client) == folder  # what came last is what the cache has of it


def test_a_fetch_that_was_stopped_goes_on_with_what_is_missing(hub: FakeHub, client: Hub, monkeypatch) -> None:
    hub.add("org/repo", FOLDER)
    fetch_folder(client)
    folder = fetch_folder(client)
    (folder / "golden.safetensors").resolve().unlink()
    (folder / "golden.safetensors").unlink()
    hub.asked.clear()
    assert (fetch_folder(client) / "golden.safetensors").read_bytes() == b"golden"
    assert len(hub.bodies()) == 1


def test_what_is_no_defense_says_what_it_holds_and_what_to_do(hub: FakeHub, client: Hub) -> None:
    hub.add("org/repo", PRISMA)
    with pytest.raises(
        CheckpointError, match=r"is not a defense: manifest.json is not there; it holds README.md"
    ) as told:
        fetch_folder(client)
    assert (
        "weights.pt is a pickle, of which nothing is run: if it is an SAE, `defense import hf://org/repo/weights.pt"
        in str(told.value)
    )
    hub.add("org/empty", {"README.md": b""})
    with pytest.raises(CheckpointError, match=r"it holds README.md$"):
        fetch_folder(client, "org/empty")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (b'{"files": {"other.safetensors": {}}}', "lists other.safetensors, which is not there"),
        (b'{"files": {"../../../x": {}, "/etc/passwd": {}}}', None),
        (b"not JSON", None),
        (b'["files"]', None),
    ],
)
def test_a_manifest_of_another_kind_fetches_nothing_else(hub: FakeHub, client: Hub, manifest: bytes, message) -> None:
    hub.add("org/repo", {**FOLDER, "manifest.json": manifest})
    if message is not None:
        with pytest.raises(CheckpointError, match=message):
            fetch_folder(client)
        return
    folder = fetch_folder(client)  # reading it says what is wrong with it
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]


# --- published weights ------------------------------------------------------------------------------------------------


def test_weights_come_with_the_configurations_beside_and_above_them(hub: FakeHub, client: Hub) -> None:
    run = {
        "trainer_0/checkpoints/ae_100000.pt": WEIGHTS,
        "trainer_0/config.json": b"{}",
        "trainer_1/config.json": b"{}",
        "config.json": b"{}",
        "trainer_0/checkpoints/huge.json": bytes(2**20 + 1),
    }
    hub.add("org/repo", run)
    path = client.fetch_weights(HubSource("org/repo"))
    assert path.read_bytes() == WEIGHTS
    assert path.parts[-3:] == ("trainer_0", "checkpoints", "ae_100000.pt")
    found = {each.relative_to(path.parents[2]).as_posix() for each in path.parents[2].rglob("*.*")}
    assert found == {"trainer_0/checkpoints/ae_100000.pt", "trainer_0/config.json", "config.json"}


def test_the_weights_are_told_from_what_lies_beside_them(hub: FakeHub, client: Hub) -> None:
    hub.add("org/repo", PRISMA)
    assert client.fetch_weights(HubSource("org/repo")).name == "weights.pt"


def test_several_weights_are_listed_and_none_is_taken(hub: FakeHub, client: Hub) -> None:
    hub.add("org/repo", {"11_resid/a.pt": WEIGHTS, "22_resid/b.pt": b"b", "README.md": b""})
    with pytest.raises(CheckpointError, match=r"2 files of weights; name one of them:\n  hf://org/repo/11_resid/a\.pt"):
        client.fetch_weights(HubSource("org/repo"))
    assert client.fetch_weights(HubSource("org/repo", "22_resid")).read_bytes() == b"b"
    assert client.fetch_weights(HubSource("org/repo", "11_resid/a.pt")).read_bytes() == WEIGHTS


def test_a_repository_without_weights_is_refused(hub: FakeHub, client: Hub) -> None:
    hub.add("org/repo", {"README.md": b"", "config.json": b"{}"})
    with pytest.raises(CheckpointError, match=r"hf://org/repo has no weights .*; it holds README.md, config.json"):
        client.fetch_weights(HubSource("org/repo"))
    assert cached(client) == []


def test_a_pinned_file_in_the_cache_uses_no_network(hub: FakeHub, client: Hub) -> None:
    commit = hub.add("org/repo", PRISMA)
    source = HubSource("org/repo", "weights.pt", commit)
    client.fetch_weights(source)
    hub.asked.clear()
    client.fetch_weights(source)
    assert hub.asked == []


def test_a_file_with_another_hash_than_was_asked_for_is_refused(hub: FakeHub, client: Hub) -> None:
    hub.add("org/repo", PRISMA)
    for _ in range(2):  # from the hub, and from the cache
        with pytest.raises(CheckpointError, match="and ab12 was asked for: it is another file"):
            client.fetch_file(HubSource("org/repo"), "weights.pt", sha256="ab12")


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"no repository org/repo that everybody may read; check its name, or log in with `hf auth login`"),
        (403, r"may not be read or written with this token"),
        (404, r"answered with an error \(404\)"),
        (429, r"too many requests \(429\); wait some minutes, or log in"),
        (500, r"answered with an error \(500\); try again later"),
    ],
)
def test_an_error_of_the_hub_is_one_sentence(hub: FakeHub, client: Hub, status: int, message: str) -> None:
    hub.add("org/repo", FOLDER)
    hub.status = status
    with pytest.raises(CheckpointError, match=message) as told:
        fetch_folder(client)
    assert "\n" not in str(told.value)
    assert cached(client) == []


def test_an_error_after_the_listing_is_one_sentence_too(hub: FakeHub, client: Hub, monkeypatch) -> None:
    hub.add("org/repo", FOLDER)
    source = HubSource("org/repo")
    listing = client.listing(source)
    monkeypatch.setattr(Hub, "listing", lambda *_: listing)
    hub.status = 429
    with pytest.raises(CheckpointError, match=r"the download of manifest.json broke off: too many requests \(429\)"):
        fetch_folder(client)


def test_a_gated_repository_says_where_its_conditions_are(hub: FakeHub, client: Hub) -> None:
    hub.add("org/repo", FOLDER)
    hub.repos["org/repo"].gated = True
    with pytest.raises(CheckpointError, match=rf"is gated; accept its conditions at {hub.url}/org/repo, then log in"):
        fetch_folder(client)
    assert fetch_folder(Hub(cache_dir=client.cache_dir, token="hf_mine")).is_dir()


def test_a_revision_that_is_not_there_is_named(hub: FakeHub, client: Hub) -> None:
    hub.add("org/repo", FOLDER)
    with pytest.raises(CheckpointError, match="org/repo has no revision 'v9'"):
        fetch_folder(client, "hf://org/repo@v9")


def test_a_repository_or_file_that_is_not_there_is_named(hub: FakeHub, client: Hub) -> None:
    with pytest.raises(CheckpointError, match="there is no repository org/nothing"):
        fetch_folder(client, "org/nothing")
    hub.add("org/repo", PRISMA)
    with pytest.raises(CheckpointError, match=r"org/repo has no file other.pt; it holds README.md"):
        client.fetch_file(HubSource("org/repo"), "other.pt")


def test_a_body_that_was_cut_is_asked_for_from_there_on(hub: FakeHub, client: Hub, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # as if the file were larger
    hub.add("org/repo", PRISMA)
    hub.cut = [12, 100_000]  # config.json has 12 bytes: it is whole
    with suppress(CheckpointError):  # the oldest clients go on when they are called again
        client.fetch_weights(HubSource("org/repo"))
    assert client.fetch_weights(HubSource("org/repo")).read_bytes() == WEIGHTS
    assert hub.ranges == ["bytes=100000-"]


def test_a_body_that_stays_cut_leaves_nothing_behind(hub: FakeHub, client: Hub) -> None:
    hub.add("org/repo", {"weights.pt": WEIGHTS})
    hub.cut = [100_000, *[0] * 20]
    with pytest.raises(CheckpointError, match=r"the download of weights.pt broke off: .*run it again") as told:
        client.fetch_weights(HubSource("org/repo"))
    assert "\n" not in str(told.value)
    assert not list(Path(client.cache_dir or "").rglob("weights.pt"))
    hub.cut = []
    assert client.fetch_weights(HubSource("org/repo")).read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param(lambda size, digest: (size + 1, digest), id="larger"),
        pytest.param(lambda size, digest: (size - 1, digest), id="smaller"),
        pytest.param(lambda size, digest: (size, "ab" * 32), id="hash"),
    ],
)
def test_a_hub_that_lies_about_a_file_is_caught_and_the_file_is_not_kept(hub: FakeHub, client: Hub, lie) -> None:
    hub.add("org/repo", {"weights.pt": WEIGHTS})
    hub.stated = lie
    for _ in range(2):  # also where the first try left something in the cache
        with pytest.raises(CheckpointError, match=r"weights.pt|onsistency"):
            client.fetch_weights(HubSource("org/repo"))
        assert not list(Path(client.cache_dir or "").rglob("weights.pt"))
    hub.stated = lambda size, digest: (size, digest)
    assert client.fetch_weights(HubSource("org/repo")).read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["manifest.json", "site-0.safetensors"])
def test_a_file_that_was_damaged_in_the_cache_is_noticed_and_fetched_again(hub: FakeHub, client: Hub, name) -> None:
    hub.add("org/repo", FOLDER)
    blob = (fetch_folder(client) / name).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b" ")
    with pytest.raises(CheckpointError, match=rf"{name} has the hash .*the hub says .*removed from the cache"):
        fetch_folder(client)
    assert (fetch_folder(client) / name).read_bytes() == FOLDER[name]


def test_offline_without_a_cache_says_so_and_asks_nobody(hub: FakeHub, client: Hub, monkeypatch) -> None:
    hub.add("org/repo", FOLDER)
    with pytest.raises(CheckpointError, match="the cache has nothing of hf://org/repo, and the network was not to be"):
        fetch_folder(offline(client))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="the cache has nothing of hf://org/repo, and HF_HUB_OFFLINE is set"):
        fetch_folder(client)
    assert hub.asked == []


def test_a_hub_that_is_not_there_gives_what_the_cache_has_and_says_so(
    hub: FakeHub, client: Hub, monkeypatch, caplog
) -> None:
    hub.add("org/repo", FOLDER)
    folder = fetch_folder(client)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch_folder(client, "hf://org/repo@main") == folder
    assert "could not be reached" in caplog.text
    assert "taking what the cache has, of commit" in caplog.text
    with pytest.raises(CheckpointError, match="the cache has nothing of hf://org/other, and"):
        fetch_folder(client, "org/other")


def test_what_there_is_no_room_for_is_refused_before_it_is_fetched(hub: FakeHub, client: Hub, monkeypatch) -> None:
    hub.add("org/repo", {"weights.pt": WEIGHTS})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"org/repo/weights.pt takes 512 kB, and .* has 1 kB left; make room"):
        client.fetch_weights(HubSource("org/repo"))
    assert hub.bodies() == []


def test_every_download_is_announced_with_its_size(hub: FakeHub, client: Hub) -> None:
    hub.add("org/repo", PRISMA)
    lines: list[str] = []
    Hub(cache_dir=client.cache_dir, report=lines.append).fetch_weights(HubSource("org/repo"))
    assert lines == ["fetching org/repo/config.json, 12 bytes", "fetching org/repo/weights.pt, 512 kB"]
