"""A local server with the part of the Hugging Face hub's protocol that the tests use."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import constants
from huggingface_hub import utils as hub_utils

TOKEN = "hf_nobodys"
PAGE = 3  # entries of a listing in one answer
LARGE = (".safetensors", ".npz", ".pt", ".parquet")  # files that are uploaded through LFS


@dataclass
class Repo:
    """A repository: its commits, oldest first, and who may read it."""

    commits: list[dict[str, bytes]] = field(default_factory=list)
    private: bool = False
    gated: bool = False

    @property
    def files(self) -> dict[str, bytes]:
        """Path -> content in the newest commit."""
        return self.commits[-1] if self.commits else {}

    def name_commit(self, number: int) -> str:
        return hashlib.sha1(f"commit {number}".encode()).hexdigest()

    def find(self, revision: str) -> dict[str, bytes] | None:
        """The files at a revision: main, v1 (the first commit) or the name of a commit."""
        names = {self.name_commit(i): files for i, files in enumerate(self.commits)}
        return (names | {"main": self.files, "v1": (self.commits or [{}])[0]}).get(revision)


@dataclass
class Fault:
    """What goes wrong with the next requests whose method and path match."""

    pattern: str
    kind: int | str
    """An HTTP status; or of a file, `drop` (the connection breaks halfway), `empty` (at once) or
    `shorten` (half of it is sent as if it were all), or `html` (a page for people)."""
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class HubServer:
    """Serves repositories, records requests, and fails where it is told to."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget everything, so that the next test can use the same server and connection."""
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # sha256 -> content uploaded through LFS
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # as `GET /path`
        self.tokens: set[str | None] = set()  # that came with them
        self.slept: list[float] = []  # seconds that a client has waited, where a test records it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def add(self, name: str, files: dict[str, bytes] | Path, **settings) -> Repo:
        """Add a commit to a repository, from a dict or a folder."""
        if isinstance(files, Path):
            paths = [path for path in files.rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        repo = self.repos.setdefault(name, Repo(**settings))
        repo.commits.append(files)
        return repo

    def fail(self, pattern: str, kind: int | str, times: int = 1, **headers: str) -> None:
        """Make the next `times` requests fail in whose `METHOD /path` the pattern is found."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(pattern, kind, times, named))

    def count(self, pattern: str) -> int:
        """Number of requests so far in whose `METHOD /path` the pattern is found."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def take_fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, request):
                fault.times -= 1
                return fault
        return None

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        hub_utils.close_session()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def connect(monkeypatch, url: str, cache: Path, token: str | None = None) -> None:
    """Make huggingface_hub in this process use the hub at `url`, and its own cache."""
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    values = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
    values |= {"HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": True}
    values |= {"HF_TOKEN_PATH": str(cache / "no-token")}
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        url = urlsplit(self.path)
        path, request = unquote(url.path), f"{self.command} {unquote(url.path)}"
        self.hub.requests.append(request)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.tokens.add(self.token)
        self.fault = self.hub.take_fault(request)
        if self.fault and isinstance(self.fault.kind, int):
            self._send(self.fault.kind, {"error": "no"}, self.fault.headers)
        elif self.fault and self.fault.kind == "html":
            self._send(200, "<html>")
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/lfs/(\w+)", path):
            self.hub.stored[match[1]] = body
            self._send(200, {})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", path):
            self._call(match[1], match[2] or "", parse_qs(url.query), body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        else:
            self._send(404, {"error": path})

    def _find_repo(self, name: str) -> Repo | None:
        """The repository, if this token may see it; else the refusal is sent."""
        repo, known = self.hub.repos.get(name), self.token == TOKEN
        if self.token and not known:
            headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self._send(401, {"error": "Invalid credentials"}, headers)
            return None
        if repo is None or repo.private and not known:
            self._send(404 if known else 401, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def _call(self, name: str, call: str, query: dict, body: bytes) -> None:
        """Answer a call of the API on one repository."""
        if (repo := self._find_repo(name)) is None:
            return
        call, _, rest = call.partition("/")
        revision, _, path = rest.partition("/")
        files = repo.find(revision or "main")
        if files is None:
            self._send(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        elif call in ("", "revision"):
            number = next(i for i, each in enumerate(repo.commits) if each is files)
            sha = repo.name_commit(number)
            self._send(200, {"id": name, "sha": sha, "private": repo.private})
        elif call == "tree":
            self._list(_make_entries(files), path, query)
        elif call == "paths-info":
            wanted = parse_qs(body.decode())["paths"]
            self._send(200, [e for e in _make_entries(files) if e["path"] in wanted])
        elif call == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
            listed = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]
            self._send(200, {"files": listed})
        elif call == "commit":
            self._commit(name, repo, [json.loads(line) for line in body.splitlines()])

    def _list(self, entries: list[dict], folder: str, query: dict) -> None:
        """Send one page of a listing, with a link to the next one."""
        below = [e for e in entries if not folder or e["path"].startswith(f"{folder}/")]
        if query.get("recursive") != ["true"]:
            depth = folder.count("/") + bool(folder)
            below = [e for e in below if e["path"].count("/") == depth]
        if not below:
            self._send(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
            return
        start = int(query.get("cursor", ["0"])[0])
        link, place = {}, urlsplit(self.path)
        if start + PAGE < len(below):
            address = f"{self.hub.url}{place.path}?recursive=true&cursor={start + PAGE}"
            link = {"Link": f'<{address}>; rel="next"'}
        self._send(200, below[start : start + PAGE], link)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        """Send a file, or a part of it."""
        if (repo := self._find_repo(name)) is None:
            return
        if repo.gated and self.token != TOKEN:
            self._send(401, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
            return
        content = (repo.find(revision) or {}).get(path)
        if content is None:
            self._send(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
            return
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        part, kind = content[int(start[1]) if start else 0 :], self.fault and self.fault.kind
        told = len(part) // 2 if kind == "shorten" else len(part)
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", revision)
        self.send_header("Content-Length", str(told))
        self.end_headers()
        if self.command == "GET":
            halves = {"empty": 0, "drop": len(part) // 2, "shorten": len(part) // 2}
            self.wfile.write(part[: halves.get(kind, len(part))])
            self.close_connection = kind in ("empty", "drop")

    def _create(self, request: dict) -> None:
        name = f"{request['organization']}/{request['name']}"
        if self.token != TOKEN:
            self._send(401, {"error": "no"}, {"X-Error-Message": "Invalid credentials"})
        elif name in self.hub.repos:
            self._send(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        else:
            self.hub.repos[name] = Repo([{}], private=request.get("visibility") == "private")
            self._send(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def _batch(self, request: dict) -> None:
        """Answer where to send the content of large files."""
        objects = []
        for each in request["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
            objects.append(each | {"actions": upload})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repo: Repo, lines: list[dict]) -> None:
        files = dict(repo.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        repo.commits.append(files)
        oid = repo.name_commit(len(repo.commits) - 1)
        self._send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def _send(self, status: int, content, headers: dict[str, str] | None = None) -> None:
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _make_entries(files: dict[str, bytes]) -> list[dict]:
    """The files and folders of a commit, as the hub lists them."""
    parents = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    entries = [{"type": "directory", "path": path, "oid": "0" * 40} for path in parents]
    for path, content in files.items():
        oid = hashlib.sha1(content).hexdigest()
        entries.append({"type": "file", "path": path, "size": len(content), "oid": oid})
    return sorted(entries, key=lambda entry: entry["path"])
