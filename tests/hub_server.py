"""A hub on this machine: the few endpoints of huggingface.co that its library asks for, over HTTP, in memory.

It answers as the real one does where the library looks: status, `X-Error-Code`, `ETag`, `X-Repo-Commit`; a large file
goes by the LFS batch and is fetched through a redirect. It speaks no Xet, so the library must have that turned off.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

WRITER, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"  # tokens; the reader may not write
USERS = {WRITER: "me", READER: "me"}


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)  # commit by name
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # files by commit
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        text = f"{len(self.commits)} {branch} {message} {sorted(files)}"
        identity = hashlib.sha1(text.encode()).hexdigest()
        self.commits[identity], self.branches[branch] = files, identity
        self.messages.append(message)
        return identity

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class Hub:
    """The state of the hub, and what its visitors asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.requests: list[str] = []
        self.url = ""
        self.big = 100  # bytes from which a safetensors file is a large one
        self.xet = False  # whether it says that files can be had by Xet, which they cannot
        self.disturb: Callable[[str], str | None] = lambda request: None  # what to do instead, to "GET /path"

    def holding(self, name: str, files: dict[str, bytes], **settings: Any) -> Repository:
        """Put a repository on the hub, and return it."""
        made = self.repositories[name] = Repository(**settings)
        made.commit("main", files, "made by a test")
        return made

    @contextmanager
    def running(self) -> Iterator["Hub"]:
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            huggingface_hub.close_session()
            server.server_close()


@contextmanager
def connected(hub: Hub, home: Path) -> Iterator[pytest.MonkeyPatch]:
    """Have the library of the hub talk to this one, with a cache of its own; it reads its environment but once."""
    from huggingface_hub import constants, hf_api

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", WRITER)
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(hf_api.api, "endpoint", hub.url)  # whose methods are the library's functions
        huggingface_hub.close_session()
        yield patch


def environment(hub: Hub, home: Path, token: str = WRITER) -> dict[str, str]:
    """Return the variables that do the same for another process."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}


class _Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        body = self._body()
        path = urlsplit(self.path).path
        request = f"{self.command} {unquote(path)}"
        self.hub.requests.append(request)
        self._disturbed = self.hub.disturb(request)
        try:
            if self._disturbed == "cut":
                self._hang_up()
            elif self._disturbed == "503":
                raise _Refused(503, "the hub is being repaired")
            else:
                self._route(path, body)
        except _Refused as refused:
            headers = {"X-Error-Message": refused.message, **({"X-Error-Code": refused.code} if refused.code else {})}
            self._send(refused.status, json.dumps({"error": refused.message}).encode(), headers)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _route(self, path: str, body: bytes) -> None:
        routes: list[tuple[str, str, Callable[..., None]]] = [
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("GET", r"/api/models/([^/]+/[^/]+)", self._info),
            ("GET", r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", self._info),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self._preupload),
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", self._branch),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/large/([0-9a-f]{64})", self._put_large),
            ("POST", r"/large/([0-9a-f]{64})/verify", self._verify),
            ("GET|HEAD", r"/large/([0-9a-f]{64})", self._get_large),
            ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ]
        for method, pattern, handler in routes:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split("|"):
                return handler(*map(unquote, found.groups()), body=body)
        raise _Refused(404, f"this hub has no {self.command} {path}")

    @property
    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _user(self) -> str | None:
        if self._token is not None and self._token not in (*USERS, STRANGER):
            raise _Refused(401, "Invalid credentials in Authorization header")
        return USERS.get(self._token or "", "stranger" if self._token else None)

    def _repository(self, name: str, *, write: bool = False) -> Repository:
        """Return a repository that the visitor may see, as the real hub hides those that he may not."""
        user, found = self._user(), self.hub.repositories.get(name)
        owns = user == name.partition("/")[0]
        if found is None or (found.private and not owns):
            raise _Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not user:
            raise _Refused(401, "Invalid username or password.")
        if write and (not owns or self._token == READER):
            raise _Refused(403, "You don't have the required permissions to write this")
        return found

    def _create(self, body: bytes) -> None:
        asked, user = json.loads(body), self._user()
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repositories and owner == user:
            text = json.dumps({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return self._send(409, text.encode())
        if owner != user or self._token == READER:
            raise _Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        self.hub.holding(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        private = asked.get("private") is True or asked.get("visibility") == "private"  # before and since version 2
        self.hub.repositories[name].private = private
        return self._answer({"url": f"{self.hub.url}/{name}"})

    def _validate(self, body: bytes) -> None:
        import yaml

        text = json.loads(body)["content"]
        front = re.match(r"---\n(.*?)^---$", text, re.DOTALL | re.MULTILINE)
        try:
            settings = yaml.safe_load(front[1]) if front else {}
        except yaml.YAMLError as error:
            return self._send(400, json.dumps({"errors": [{"message": str(error)}], "warnings": []}).encode())
        wrong = [] if isinstance(settings, dict) else [{"message": "metadata is no mapping"}]
        return self._send(400 if wrong else 200, json.dumps({"errors": wrong, "warnings": []}).encode())

    def _info(self, name: str, revision: str = "main", body: bytes = b"") -> None:
        found = self._repository(name)
        if revision not in found.branches and revision not in found.commits:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        siblings = [{"rfilename": path} for path in found.files(revision)]
        sha = found.branches.get(revision, revision)
        self._answer({"id": name, "modelId": name, "sha": sha, "private": found.private, "siblings": siblings})

    def _preupload(self, name: str, revision: str, body: bytes) -> None:
        found = self._repository(name, write=True)
        there, answers = found.files(revision), []
        for asked in json.loads(body)["files"]:
            content = there.get(asked["path"])
            large = asked["path"].endswith(".safetensors") and asked["size"] >= self.hub.big
            oid = None if content is None else _sha256(content) if large else _git_hash(content)
            mode = "lfs" if large else "regular"
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer({"files": answers})

    def _branch(self, name: str, branch: str, body: bytes) -> None:
        found = self._repository(name, write=True)
        if branch in found.branches:
            raise _Refused(409, "Reference already exists")
        found.branches[branch] = found.branches["main"]
        self._answer({})

    def _batch(self, name: str, body: bytes) -> None:
        self._repository(name, write=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            address = f"{self.hub.url}/large/{asked['oid']}"
            actions = {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}
            objects.append({**asked, **({} if asked["oid"] in self.hub.large else {"actions": actions})})
        self._answer({"transfer": "basic", "objects": objects})

    def _put_large(self, oid: str, body: bytes) -> None:
        if _sha256(body) != oid:
            raise _Refused(400, "the content is not what was announced")
        self.hub.large[oid] = body
        self._answer({})

    def _verify(self, oid: str, body: bytes) -> None:
        if len(self.hub.large[oid]) != json.loads(body)["size"]:
            raise _Refused(400, "the content is not what was announced")
        self._answer({})

    def _commit(self, name: str, revision: str, body: bytes) -> None:
        found = self._repository(name, write=True)
        files, message = dict(found.files(revision)), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                raise _Refused(400, f"this hub knows no {line['key']}")
        identity = found.commit(revision, files, message)
        self._answer({"commitUrl": f"{self.hub.url}/{name}/commit/{identity}", "commitOid": identity})

    def _resolve(self, name: str, revision: str, path: str, body: bytes) -> None:
        found = self._repository(name)
        if found.gated and self._user() != name.partition("/")[0]:
            raise _Refused(403, f"Access to model {name} is restricted", "GatedRepo")
        identity = found.branches.get(revision, revision)
        if identity not in found.commits:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        content = found.commits[identity].get(path)
        if content is None:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": identity}
        if not path.endswith(".safetensors") or len(content) < self.hub.big:
            return self._content(content, headers | {"ETag": f'"{_git_hash(content)}"'})
        oid = _sha256(content)
        self.hub.large[oid] = content
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        if self.hub.xet:
            headers |= {"X-Xet-Hash": oid, "Link": f'<{self.hub.url}/api/xet-token>; rel="xet-auth"'}
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")  # large files come from another host
        return self._send(302, b"", headers | {"Location": f"{elsewhere}/large/{oid}"})

    def _get_large(self, oid: str, body: bytes) -> None:
        self._content(self.hub.large[oid], {"ETag": f'"{oid}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        """Send a file, or the rest of one."""
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not wanted:
            return self._send(200, content, headers)
        start = int(wanted[1])
        headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        return self._send(206, content[start:], headers)

    def _answer(self, answer: Any) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        announced = len(content)
        if self._disturbed == "shorten":
            content = content[: announced // 2]
            announced = len(content)
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._disturbed == "break":
            content = content[: announced // 2]
        self.wfile.write(content)
        if self._disturbed == "break":
            self._hang_up()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
