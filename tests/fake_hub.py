"""A Hub of one's own on the standard library: enough of the HTTP interface to push a folder and load it back.

Every file is committed inline ("regular"), so neither LFS nor xet is needed. One branch, `main`; each commit gets a
number as its hash.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class FakeHub(BaseHTTPRequestHandler):
    repositories: dict[str, dict[str, bytes]] = {}
    commits: dict[str, list[str]] = {}  # repository → messages
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        """Keeps the test's output clean."""

    def reply(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(payload)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def missing(self, code: str) -> None:
        self.reply(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def sha(self, repository: str) -> str:
        return f"{len(self.commits.get(repository, ())):040x}"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            spec = json.loads(body)
            repository = f"{spec['organization']}/{spec['name']}" if spec.get("organization") else spec["name"]
            self.repositories.setdefault(repository, {})
            return self.reply(200, {"url": f"http://{self.headers['Host']}/{repository}", "name": repository})
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        repository, _, action = path.removeprefix("/api/models/").partition("/preupload/")
        if action:
            files = json.loads(body)["files"]
            return self.reply(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        repository = path.removeprefix("/api/models/").partition("/commit/")[0]
        if repository not in self.repositories:
            return self.missing("RepoNotFound")
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.commits.setdefault(repository, []).append(line["value"]["summary"])
            elif line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.repositories[repository][line["value"]["path"]] = content
        url = f"http://{self.headers['Host']}/{repository}/commit/{self.sha(repository)}"
        self.reply(200, {"success": True, "commitOid": self.sha(repository), "commitUrl": url})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if "/resolve/" in path:
            repository, _, rest = path[1:].partition("/resolve/")
            content = self.repositories.get(repository, {}).get(rest.partition("/")[2])
            if content is None:
                return self.missing("EntryNotFound" if repository in self.repositories else "RepoNotFound")
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.reply(200, content, ETag=etag, X_Repo_Commit=self.sha(repository), Accept_Ranges="bytes")
        repository, _, rest = path.removeprefix("/api/models/").partition("/tree/")
        repository = repository.partition("/revision/")[0]
        files = self.repositories.get(repository)
        if files is None:
            return self.missing("RepoNotFound")
        if rest:
            prefix = rest.partition("/")[2]
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
                if name.startswith(prefix)
            ]
            return self.reply(200, entries) if entries or not prefix else self.missing("EntryNotFound")
        siblings = [{"rfilename": name} for name in files]
        self.reply(200, {"id": repository, "sha": self.sha(repository), "siblings": siblings, "private": False})

    do_HEAD = do_GET


def serve() -> tuple[ThreadingHTTPServer, str]:
    """Starts an empty Hub on a free port of this machine; returns the server and its address."""
    handler = type("Hub", (FakeHub,), {"repositories": {}, "commits": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}"
