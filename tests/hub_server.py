"""As much of the Hugging Face Hub as publishing and loading a model needs: a real server, on loopback."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_" + "x" * 34
_MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Hub:
    """What the server holds.

    Attributes:
        repos: by name, the files of the newest commit by path.
        commits: by name, the paths that each commit wrote.
        unknown: requests that were not understood; a test that leaves some should fail.
    """

    endpoint: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: dict[str, list[set[str]]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def sha(self, repo):
        return hashlib.sha1(f"{repo} {len(self.commits[repo])}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    routes = (
        ("POST", "/api/repos/create", "create"),
        ("POST", "/api/validate-yaml", "validate"),
        ("POST", "/api/models/{repo}/preupload/{revision}", "preupload"),
        ("POST", "/{repo}.git/info/lfs/objects/batch", "batch"),
        ("PUT", "/lfs/{oid}", "put"),
        ("POST", "/api/models/{repo}/commit/{revision}", "commit"),
        ("GET", "/api/models/{repo}/revision/{revision}", "info"),
        ("GET", "/api/models/{repo}", "info"),
        ("GET", "/api/models/{repo}/tree/{revision}", "tree"),
        ("GET", "/{repo}/resolve/{revision}/{path}", "resolve"),
    )
    patterns = {"repo": "[^/]+/[^/]+", "path": ".+"}

    def answer(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_any(self):
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(length)
        location = unquote(self.path.partition("?")[0])
        for verb, route, name in self.routes:
            pattern = re.sub(r"{(\w+)}", lambda m: f"(?P<{m[1]}>{self.patterns.get(m[1], '[^/]+')})", route)
            found = re.fullmatch(pattern, location)
            if found and verb == self.command.replace("HEAD", "GET"):
                if verb == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer(401, {"error": "Invalid username or password."})
                repo = found.groupdict().get("repo")
                if repo is not None and repo not in self.hub.repos:
                    return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                return getattr(self, name)(**found.groupdict())
        self.hub.unknown.append(f"{self.command} {self.path}")
        return self.answer(404, {"error": "Not found"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *args):
        pass

    def create(self):
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo}
        known = repo in self.hub.repos
        if not known:
            self.hub.repos[repo], self.hub.commits[repo] = {}, []
        self.answer(409 if known else 200, answer)

    def validate(self):
        content = json.loads(self.body)["content"]
        base = re.search(r"^base_model: *(\S+)$", content, re.MULTILINE)
        errors = []
        if base and not _MODEL_ID.fullmatch(base[1]):
            errors = [{"message": f'"base_model" with value "{base[1]}" is not valid.'}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, repo, revision):
        mode = {True: "lfs", False: "regular"}
        files = [
            {"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")], "shouldIgnore": False}
            for f in json.loads(self.body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, repo):
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.objects:
                item["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, oid):
        right = hashlib.sha256(self.body).hexdigest() == oid
        if right:
            self.hub.objects[oid] = self.body
        self.answer(200 if right else 400)

    def commit(self, repo, revision):
        written = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                written[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                written[item["value"]["path"]] = self.hub.objects[item["value"]["oid"]]
        self.hub.repos[repo].update(written)
        self.hub.commits[repo].append(set(written))
        url = f"{self.hub.endpoint}/{repo}/commit/{self.hub.sha(repo)}"
        self.answer(200, {"success": True, "commitUrl": url, "commitOid": self.hub.sha(repo)})

    def info(self, repo, revision="main"):
        siblings = [{"rfilename": path} for path in sorted(self.hub.repos[repo])]
        self.answer(200, {"id": repo, "modelId": repo, "sha": self.hub.sha(repo), "siblings": siblings, "tags": []})

    def tree(self, repo, revision):
        files = self.hub.repos[repo].items()
        entries = [{"type": "file", "path": path, "size": len(data), "oid": "0" * 40} for path, data in files]
        self.answer(200, entries)

    def resolve(self, repo, revision, path):
        commit, content = self.hub.sha(repo), self.hub.repos[repo].get(path)
        if content is None:
            self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        else:
            self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=commit)


@contextmanager
def serve():
    """Run a hub in a thread."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
