"""A small hub on 127.0.0.1 that speaks the parts of the Hugging Face protocol a download uses, and can misbehave."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
LARGE = 1000
"""Files of at least this size are LFS files, known by their SHA-256."""


@dataclass
class FakeHub:
    """One repository. Misbehaviour: ``cut_after`` bytes of a path once or always, other bytes than listed, and more."""

    repo: str
    files: dict[str, bytes]
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    vanished: set[str] = field(default_factory=set)
    gated: bool = False
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    endpoint: str = ""

    def served_bytes(self, path: str) -> bytes:
        content = self.files[path]
        return bytes([content[0] ^ 1]) + content[1:] if path in self.corrupt else content

    def gets_of(self, path: str) -> list[str | None]:
        """The Range headers of all downloads of one path, in order."""
        return [ranges for method, name, ranges in self.requests if method == "GET" and name.endswith(f"/{path}")]


def etag_of(content: bytes) -> str:
    if len(content) >= LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve on a free port; sets ``hub.endpoint``."""

    class Handler(_Handler):
        fake = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.fake.requests.append((self.command, path, self.headers.get("Range")))
        api, resolve = f"/api/models/{self.fake.repo}", f"/{self.fake.repo}/resolve/"
        if path.startswith(f"{api}/revision/"):
            if path.rsplit("/", 1)[1] not in ("main", COMMIT):
                self._refuse(404, "RevisionNotFound")
            elif self.fake.gated:
                self._refuse(403, "GatedRepo")
            else:
                self._json({"id": self.fake.repo, "sha": COMMIT, "siblings": []})
        elif path.startswith(f"{api}/tree/"):
            self._json([_entry(name, content) for name, content in self.fake.files.items()])
        elif path.startswith(resolve):
            name = path.removeprefix(resolve).partition("/")[2]
            if name not in self.fake.files or name in self.fake.vanished:
                self._refuse(404, "EntryNotFound")
            else:
                self._file(name, with_body=with_body)
        else:
            self._refuse(404, "RepoNotFound")

    def _file(self, name: str, *, with_body: bool) -> None:
        content = self.fake.served_bytes(name)
        start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0]) if self.headers["Range"] else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{etag_of(self.fake.files[name])}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if not with_body:
            return
        cuts = self.fake.cut_after.get(name)
        end = start + cuts.pop(0) if cuts else len(content)
        self.wfile.write(content[start:end])
        self.wfile.flush()
        if end < len(content):
            self.close_connection = True
            self.connection.close()

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _entry(name: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
    if len(content) >= LARGE:
        entry["lfs"] = {"oid": etag_of(content), "size": len(content), "pointerSize": 130}
    else:
        entry["oid"] = etag_of(content)
    return entry
