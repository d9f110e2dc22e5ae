"""As much of the Hub's HTTP interface as uploads and downloads of models need, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_stand_in"


class Hub:
    """Repositories, each with branches of files and whether it is private; and large files by their hash."""

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}

    def commit_of(self, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1()
        for name in sorted(files):
            digest.update(name.encode() + files[name])
        return digest.hexdigest()

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        branches = self.branches.get(repo, {})
        for name, files in branches.items():
            if revision in (name, self.commit_of(files)):
                return self.commit_of(files), files
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if path == "/api/whoami-v2":
            self._json({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._about(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._about(found[1], found[2], tree=True)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[2], found[3])
        else:
            self._error(404, "EntryNotFound", f"nothing at {path}")

    def do_POST(self) -> None:
        path, body = unquote(urlparse(self.path).path), self._body()
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(401, "", "Invalid username or password.")
            return
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/.+", path):
            large = (".safetensors", ".png")
            files = [
                {"path": path, "shouldIgnore": False, "uploadMode": "lfs" if path.endswith(large) else "regular"}
                for path in (each["path"] for each in json.loads(body)["files"])
            ]
            self._json({"files": files})
        elif found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            address = f"http://{self.headers['Host']}"
            objects = [
                {**each, "actions": {"upload": {"href": f"{address}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._json({"objects": objects, "transfer": "basic"})
        elif found := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            branches = self.hub.branches[found[1]]
            if found[2] in branches:
                self._error(409, "", "Reference already exists")
            else:
                branches[found[2]] = dict(branches["main"])
                self._json({})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            self._commit(found[1], found[2], [json.loads(line) for line in body.splitlines()])
        else:
            self._error(404, "", f"nothing at {path}")

    def do_PUT(self) -> None:
        body = self._body()
        assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
        self.hub.large[self.path.rpartition("/")[2]] = body
        self._send(200, b"", {})

    # ------------------------------------------------------------------------------------------ answers

    def _create(self, wanted: dict[str, Any]) -> None:
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if repo in self.hub.branches:
            told = {"error": "You already created this model repo", "url": f"http://{self.headers['Host']}/{repo}"}
            self._send(409, json.dumps(told).encode(), {"Content-Type": "application/json"})
            return
        self.hub.branches[repo] = {"main": {".gitattributes": b""}}
        self.hub.private[repo] = bool(wanted.get("private") or wanted.get("visibility") == "private")
        self._json({"url": f"http://{self.headers['Host']}/{repo}", "name": repo})

    def _about(self, repo: str, revision: str, tree: bool = False) -> None:
        if self._hidden(repo):
            return
        found = self.hub.find(repo, revision)
        if found is None:
            self._error(404, "RevisionNotFound", f"no revision {revision}")
            return
        commit, files = found
        if tree:
            self._json([{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in sorted(files)])
            return
        siblings = [{"rfilename": name} for name in sorted(files)]
        private = self.hub.private[repo]
        self._json({"id": repo, "modelId": repo, "sha": commit, "private": private, "tags": [], "siblings": siblings})

    def _file(self, repo: str, revision: str, name: str) -> None:
        if self._hidden(repo):
            return
        found = self.hub.find(repo, revision)
        if found is None:
            self._error(404, "RevisionNotFound", f"no revision {revision}")
        elif name not in found[1]:
            self._error(404, "EntryNotFound", f"no file {name}", {"X-Repo-Commit": found[0]})
        else:
            content = found[1][name]
            about = {"X-Repo-Commit": found[0], "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            self._send(200, content, {**about, "Content-Type": "application/octet-stream"})

    def _commit(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> None:
        files = self.hub.branches[repo][branch]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = self.hub.commit_of(files)
        address = f"http://{self.headers['Host']}/{repo}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": address, "hookOutput": ""})

    def _hidden(self, repo: str) -> bool:
        """Whether it is not there, or not for whoever asks."""
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo in self.hub.branches and (allowed or not self.hub.private[repo]):
            return False
        self._error(401, "RepoNotFound", "Repository not found")
        return True

    # ------------------------------------------------------------------------------------------ HTTP

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, more: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json", **(more or {})}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[str]:
    """An empty Hub in a thread. Yields its address."""
    handler = type("OwnHandler", (Handler,), {"hub": Hub()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
