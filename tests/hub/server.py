"""A small Hugging Face Hub for tests: on loopback, in memory, and out of order on request.

It knows what huggingface_hub 2.4 asks without xet when it creates, looks at, changes and downloads model repositories,
and what datasets 5.2 asks when it loads a data set (whose name here begins with `datasets/`).
Status codes and error codes follow the client, which is all that it was checked against.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


LARGE = (".safetensors", ".bin", ".model", ".png")
REPOSITORY = r"(?P<repo>[^/]+/[^/]+)"
DATASET = r"(?P<repo>datasets/[^/]+/[^/]+)"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def oid(path: str, data: bytes) -> str:
    return sha256(data) if path.endswith(LARGE) else blob(data)


class Refusal(Exception):
    """An answer that is no success, with the error code and message that the Hub gives in headers."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass
class Repository:
    owner: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{branch} {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name

    def resolve(self, revision: str) -> tuple[str, dict[str, bytes]]:
        name = self.branches.get(revision, revision)
        if name not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return name, self.commits[name]


@dataclass
class Fault:
    """What happens to the next `times` requests after `skip` of them: a status, or

    `"drop"`: the connection breaks; `"lose"`: it breaks when the work is done; `"hold"`: nothing, until `release`.
    """

    method: str
    path: str
    what: int | str
    times: int = 1
    skip: int = 0
    message: str = "injected"
    retry_after: int | None = None
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def strikes(self, method: str, path: str) -> bool:
        if self.method != method or not re.search(self.path, path) or not self.times:
            return False
        self.skip, now = self.skip - 1, self.skip <= 0
        self.times -= now
        return now


@dataclass
class Request:
    method: str
    path: str
    body: bytes


class HubServer:
    """`with HubServer({token: user}) as hub`: `hub.url`, `hub.requests`, `hub.repositories`, `hub.faults`."""

    def __init__(self, tokens: dict[str, str], readers: tuple[str, ...] = ()) -> None:
        self.tokens, self.readers = tokens, readers
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        for fault in self.faults:
            fault.release.set()
        self.http.shutdown()
        self.http.server_close()

    def fail(self, method: str, path: str, what: int | str, **settings: Any) -> Fault:
        self.faults.append(Fault(method, path, what, **settings))
        return self.faults[-1]

    def counted(self, method: str, path: str) -> int:
        return sum(request.method == method and bool(re.search(path, request.path)) for request in self.requests)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[repo].resolve(revision)[1]

    def environment(self, home: Any, token: str) -> dict[str, str]:
        """For a process that is to use this Hub: huggingface_hub reads it when it is imported."""
        return {
            "HF_ENDPOINT": self.url, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer takes 40 ms
    wbufsize = -1

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        body = self._body()
        path = urlsplit(self.path).path
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self.path, body))
            fault = next((one for one in self.hub.faults if one.strikes(self.command, path)), None)
        if fault is not None:
            fault.reached.set()
        what = None if fault is None else fault.what
        if what == "hold":
            fault.release.wait(120)
        try:
            if isinstance(what, int):
                refusal = Refusal(what, fault.message)
                if fault.retry_after is not None:
                    refusal.headers["Retry-After"] = str(fault.retry_after)
                raise refusal
            if what == "drop":
                self._hang_up()
                return
            with self.hub.lock:
                self._route(path, body)
            if what == "lose":
                self._hang_up()
                return
            status, headers, content = self._result
        except Refusal as refusal:
            status, headers = refusal.status, refusal.headers
            content = json.dumps({"error": str(refusal)}).encode()
        self._send(status, headers, content)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), "X-Request-Id": "test", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client is gone

    def _say(self, value: Any, status: int = 200) -> None:
        self._result = status, {"Content-Type": "application/json"}, json.dumps(value).encode()

    # who may do what

    def _user(self, needed: bool = False) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if token and token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if needed and not token:
            raise Refusal(401, "Invalid username or password.")
        return self.hub.tokens.get(token)

    def _may_write(self, owner: str) -> None:
        user = self._user(needed=True)
        if user != owner or user in self.hub.readers:
            raise Refusal(403, f"You don't have the rights to write to {owner}")

    def _repository(self, name: str, write: bool = False) -> Repository:
        user, found = self._user(needed=write), self.hub.repositories.get(name)
        if found is None or (found.private and user != found.owner):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if found.gated and user != found.owner:
            raise Refusal(401 if user is None else 403, f"Access to {name} is restricted.", "GatedRepo")
        if write:
            self._may_write(found.owner)
        return found

    # what can be asked

    def _route(self, path: str, body: bytes) -> None:
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, path):
                answer(self, body, **{name: unquote(value) for name, value in match.groupdict().items() if value})
                return
        raise Refusal(404, f"not known to the test server: {self.command} {path}")

    def _whoami(self, body: bytes) -> None:
        self._say({"type": "user", "name": self._user(needed=True), "orgs": []})

    def _validate(self, body: bytes) -> None:
        head = re.match(r"---\n.*?\n---", json.loads(body)["content"], re.S)
        bad = head is not None and "base_model: /" in head[0]
        message = '"base_model[0]" is not valid. If possible, use a model id from https://hf.co/models.'
        self._say({"errors": [{"message": message}] if bad else [], "warnings": []}, 400 if bad else 200)

    def _create(self, body: bytes) -> None:
        asked, user = json.loads(body), self._user(needed=True)
        owner = asked.get("organization") or user
        self._may_write(owner)
        name = f"{owner}/{asked['name']}"
        taken = name in self.hub.repositories
        if not taken:
            self.hub.repositories[name] = made = Repository(owner, asked.get("visibility") == "private")
            made.commit("main", {".gitattributes": b""})
        self._say(
            {"url": f"{self.hub.url}/{name}", "error": "You already created this model repo"}, 409 if taken else 200
        )

    def _batch(self, body: bytes, repo: str) -> None:
        self._repository(repo, write=True)
        objects = [{"oid": one["oid"], "size": one["size"]} for one in json.loads(body)["objects"]]
        for one in objects:
            if one["oid"] not in self.hub.large:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/large/{one['oid']}"}}
        self._say({"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, name: str) -> None:
        if sha256(body) != name:
            raise Refusal(400, "The content is not what its name says")
        self.hub.large[name] = body
        self._say({})

    def _info(self, body: bytes, repo: str, revision: str = "main") -> None:
        found = self._repository(repo)
        name, files = found.resolve(revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._say(
            {
                "id": repo.removeprefix("datasets/"),
                "sha": name,
                "private": found.private,
                "siblings": siblings,
                "tags": [],
            }
        )

    def _tree(self, body: bytes, repo: str, revision: str, folder: str = "") -> None:
        files = self._repository(repo).resolve(revision)[1]
        inside = {path: data for path, data in files.items() if not folder or path.startswith(f"{folder}/")}
        if not inside:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        self._say([{"type": "file", "path": p, "size": len(d), "oid": blob(d)} for p, d in sorted(inside.items())])

    def _paths(self, body: bytes, repo: str, revision: str) -> None:
        files = self._repository(repo).resolve(revision)[1]
        asked = parse_qs(body.decode())["paths"] if not body.startswith(b"{") else json.loads(body)["paths"]
        found = [(path, files[path]) for path in asked if path in files]
        self._say([{"type": "file", "path": path, "size": len(data), "oid": blob(data)} for path, data in found])

    def _branch(self, body: bytes, repo: str, revision: str) -> None:
        found = self._repository(repo, write=True)
        if revision in found.branches:
            raise Refusal(409, f"Reference {revision} already exists")
        found.branches[revision] = found.resolve(json.loads(body).get("startingPoint") or "main")[0]
        self._say({})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = self._repository(repo, write=True).resolve(revision)[1]
        answers = []
        for one in json.loads(body)["files"]:
            path = one["path"]
            known = {"oid": oid(path, files[path])} if path in files else {}
            mode = "lfs" if path.endswith(LARGE) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | known)
        self._say({"files": answers})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        found = self._repository(repo, write=True)
        head, files = found.resolve(revision)
        if revision not in found.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = dict(files)
        for line in body.splitlines():
            kind, value = (entry := json.loads(line))["key"], entry["value"]
            if kind == "header" and value.get("parentCommit", head) != head:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = self.hub.large[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        name = found.commit(revision, files)
        self._say({"commitOid": name, "commitUrl": f"{self.hub.url}/{repo}/commit/{name}"})

    def _download(self, body: bytes, repo: str, revision: str, path: str) -> None:
        commit, files = self._repository(repo).resolve(revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data = files[path]
        headers = {"ETag": f'"{oid(path, data)}"', "X-Repo-Commit": commit, "Content-Type": "application/octet-stream"}
        if path.endswith(LARGE):
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(data))}
        self._result = 200, headers, data


API = rf"/api/models/{REPOSITORY}"
ROUTES = [
    (r"/api/whoami-v2", Handler._whoami),
    (r"/api/validate-yaml", Handler._validate),
    (r"/api/repos/create", Handler._create),
    (r"/large/(?P<name>[0-9a-f]{64})", Handler._put),
    (rf"/{REPOSITORY}\.git/info/lfs/objects/batch", Handler._batch),
    (rf"{API}(/revision/(?P<revision>[^/]+))?", Handler._info),
    (rf"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", Handler._tree),
    (rf"/api/{DATASET}(/revision/(?P<revision>[^/]+))?", Handler._info),
    (rf"/api/{DATASET}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", Handler._tree),
    (rf"/api/{DATASET}/paths-info/(?P<revision>[^/]+)", Handler._paths),
    (rf"/{DATASET}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler._download),
    (rf"{API}/branch/(?P<revision>[^/]+)", Handler._branch),
    (rf"{API}/preupload/(?P<revision>[^/]+)", Handler._preupload),
    (rf"{API}/commit/(?P<revision>[^/]+)", Handler._commit),
    (rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler._download),
]
