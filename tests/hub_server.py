"""An imitation of the Hugging Face hub on loopback, which the real client talks to.

It speaks what the client asks: model info, trees, files by revision with etags and ranges (large ones by a redirect, as
the hub does), and commits. `faults` says what goes wrong.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".pt", ".pth", ".bin")


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """A repository: the files of each commit by its hash, the last one under "main"."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    main: str = ""
    gated: bool = False

    def commit(self, files: dict[str, bytes]) -> str:
        names = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())})
        self.main = hashlib.sha1(names.encode()).hexdigest()
        self.commits[self.main] = dict(files)
        return self.main


@dataclass
class FakeHub:
    """What is on the hub, what was asked, and what goes wrong.

    Attributes:
        repos: By "org/name".
        asked: "METHOD path" of every request, in order.
        status: Answer everything with this error; None for none.
        cut: Bytes of a body after which the connection ends, at most once per entry.
        stated: Change what is said of a file: (size, hash) -> (size, hash).
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: list[int] = field(default_factory=list)
    stated: Callable[[int, str], tuple[int, str]] = lambda size, digest: (size, digest)

    def add(self, repo: str, files: dict[str, bytes]) -> str:
        """Commit files to a repository, in place of what it had, and return the commit."""
        return self.repos.setdefault(repo, Repo()).commit(files)

    def files(self, repo: str) -> dict[str, bytes]:
        """The files that a repository has now."""
        found = self.repos[repo]
        return found.commits[found.main]

    def bodies(self) -> list[str]:
        """The requests that asked for the bytes of a file."""
        return [line for line in self.asked if line.startswith("GET") and "/api/" not in line]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    # --- answers ---

    def send(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str = "", message: str = "no") -> None:
        self.send(status, b"{}", X_Error_Code=code, X_Error_Message=message, **self.hub.headers)

    def answer(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        hub.asked.append(f"{self.command} {url.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.status is not None:
            self.refuse(hub.status)
        elif url.path == "/api/repos/create":
            self.create(json.loads(body))
        elif url.path.startswith("/api/models/"):
            self.api(url.path.removeprefix("/api/models/").split("/"), parse_qs(url.query), body)
        elif url.path == "/api/whoami-v2":
            self.send_json({"name": "org", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        elif url.path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif url.path.startswith("/large/"):
            self.bytes_of(self.find(url.path.removeprefix("/large/")))
        else:
            self.resolve(unquote(url.path).strip("/"))

    def repo(self, name: str) -> Repo | None:
        found = self.hub.repos.get(name)
        if found is None:
            self.refuse(401, "RepoNotFound", "Repository not found")
        elif found.gated and "Authorization" not in self.headers:
            self.refuse(401, "GatedRepo", "Access to this model is restricted")
        else:
            return found
        return None

    def files(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = repo.main if revision == "main" else unquote(revision)
        if commit in repo.commits:
            return commit, repo.commits[commit]
        self.refuse(404, "RevisionNotFound", "Invalid rev id")
        return None

    def stated(self, data: bytes) -> tuple[int, str]:
        return self.hub.stated(len(data), hashlib.sha256(data).hexdigest())

    # --- what can be asked ---

    def api(self, parts: list[str], query: dict[str, list[str]], body: bytes) -> None:
        repo = self.repo("/".join(parts[:2]))
        if repo is None:
            return
        what = parts[2] if len(parts) > 2 else "revision"
        if what in ("preupload", "commit"):
            self.upload("/".join(parts[:2]), what, body)
            return
        found = self.files(repo, parts[3] if len(parts) > 3 else "main")
        if found is None:
            return
        entries = [self.entry(name, data) for name, data in sorted(found[1].items())]
        if what == "tree":
            self.send_json([{"type": "file", "path": name, **fields} for name, fields in entries])
            return
        siblings = [{"rfilename": name, **(fields if "blobs" in query else {})} for name, fields in entries]
        self.send_json({"id": "/".join(parts[:2]), "sha": found[0], "siblings": siblings, "private": False, "tags": []})

    def entry(self, name: str, data: bytes) -> tuple[str, dict[str, object]]:
        size, digest = self.stated(data)
        lfs = {"lfs": {"sha256": digest, "oid": digest, "size": size, "pointerSize": 134}}
        return name, {
            "size": size,
            "blobId": git_hash(data),
            "oid": git_hash(data),
            **(lfs if name.endswith(LARGE) else {}),
        }

    def resolve(self, path: str) -> None:
        name, _, rest = path.partition("/resolve/")
        repo = self.repo(name)
        found = None if repo is None else self.files(repo, rest.partition("/")[0])
        if found is None:
            return
        commit, files = found
        file = rest.partition("/")[2]
        if file not in files:
            self.send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        elif file.endswith(LARGE):
            size, digest = self.stated(files[file])
            place = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/large/{hashlib.sha256(files[file]).hexdigest()}"
            self.send(302, b"", Location=place, X_Repo_Commit=commit, X_Linked_ETag=f'"{digest}"', X_Linked_Size=size)
        else:
            self.bytes_of(files[file], ETag=f'"{git_hash(files[file])}"', X_Repo_Commit=commit)

    def find(self, digest: str) -> bytes:
        files = (data for repo in self.hub.repos.values() for each in repo.commits.values() for data in each.values())
        return next(data for data in files if hashlib.sha256(data).hexdigest() == digest)

    def bytes_of(self, data: bytes, **headers: object) -> None:
        start = 0
        if wanted := self.headers.get("Range"):
            self.hub.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        rest = data[start:]
        sent = rest[: self.hub.cut.pop(0)] if self.hub.cut and self.command == "GET" else rest
        self.send(206 if wanted else 200, sent, Content_Length=len(rest), Accept_Ranges="bytes", **headers)
        if len(sent) < len(rest):
            self.close_connection = True

    # --- uploads ---

    def create(self, fields: dict[str, str]) -> None:
        name = "/".join(filter(None, (fields.get("organization"), fields["name"])))
        if name in self.hub.repos:
            self.send(409, json.dumps({"url": f"{self.hub.url}/{name}", "error": "You already created it"}).encode())
            return
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.send_json({"url": f"{self.hub.url}/{name}"})

    def upload(self, name: str, what: str, body: bytes) -> None:
        repo = self.hub.repos[name]
        if what == "preupload":
            names = [each["path"] for each in json.loads(body)["files"]]
            self.send_json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
            return
        files = dict(repo.commits[repo.main])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                files.pop(line["value"]["path"])
        commit = repo.commit(files)
        self.send_json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})


@contextmanager
def serving() -> Iterator[FakeHub]:
    """Serve an empty hub on loopback for as long as the context lasts."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
