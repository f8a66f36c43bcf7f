"""Test server of the Hub's protocol, for pushing and loading with `huggingface_hub`, `transformers` and `datasets`.

It is not the Hub. It serves the routes that the unmodified clients call (repositories, commits, Git LFS with its
redirects to another host name, tokens, private repositories, branches, tags and commits as revisions), on loopback,
with everything in memory, and it can be told to fail. It has none of the Hub's Xet storage, quotas, gating, licence
checks and widgets.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


USER, TOKEN = "tester", "hf_testtoken"
MAX_BYTES = 64 << 20  # of one request
LIFETIME = 600  # seconds, should a test forget to stop it

LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".arrow", ".png")
REPO = r"(?P<type>models|datasets)/(?P<repo>[^/]+/[^/]+)"


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class Repository:
    """Commits (each a full table of files), and branches and tags that point to them."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, tuple[bytes, bool]]] = {}
        self.messages: list[str] = []
        self.refs: dict[str, str] = {}
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict, message: str) -> str:
        sha = hashlib.sha1(f"{id(self)} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha] = files
        self.messages.append(message)
        self.refs[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        revision = self.refs.get(revision, revision)
        if revision not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return revision


class HubServer:
    """`with HubServer() as hub:` serves at `hub.endpoint`.

    `hub.fail(method, pattern, how, times)` makes requests with a matching path fail: `how` is an HTTP status, `"drop"`
    (the connection closes in the middle of the upload) or `"hang"` (no answer while the server lives). `hub.requests`
    counts `(method, path)`.
    """

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: Counter = Counter()
        self.faults: list[list] = []
        self.lock = threading.RLock()
        self.stopped = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}/cdn"  # the Hub, too, redirects to another host

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True).start()
        self.timer = threading.Timer(LIFETIME, self.stop)
        self.timer.daemon = True
        self.timer.start()
        return self

    def __exit__(self, *_):
        self.timer.cancel()
        self.stop()

    def stop(self):
        if not self.stopped.is_set():
            self.stopped.set()
            self.server.shutdown()
            self.server.server_close()

    def fail(self, method: str, pattern: str, how: int | str, times: int = 10**6):
        with self.lock:
            self.faults.append([method, re.compile(pattern), how, times])

    def heal(self):
        with self.lock:
            self.faults.clear()

    def fault_of(self, method: str, path: str) -> int | str | None:
        with self.lock:
            for fault in self.faults:
                if fault[0] == method and fault[3] > 0 and fault[1].search(path):
                    fault[3] -= 1
                    return fault[2]
        return None

    def files(self, repo: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        repository = self.repositories[kind, repo]
        return {path: data for path, (data, _) in repository.commits[repository.resolve(revision)].items()}

    def count(self, method: str, pattern: str) -> int:
        return sum(n for (verb, path), n in self.requests.items() if verb == method and re.search(pattern, path))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    timeout = 60

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self):
        self.path_only = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests[self.command, self.path_only] += 1
        fault = self.hub.fault_of(self.command, self.path_only)
        if fault == "hang":
            self.hub.stopped.wait(LIFETIME)
        if fault in ("hang", "drop"):
            self.rfile.read(min(int(self.headers.get("Content-Length") or 0), 1000) // 2)
            self.close_connection = True
            self.connection.close()
            return
        try:
            self.body = self._read_body()
            if isinstance(fault, int):
                raise HubError(fault, "Internal Error - the test wants it")
            for method, pattern, respond in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, self.path_only)):
                    with self.hub.lock:
                        return respond(self, **match.groupdict())
            raise HubError(404, f"no such route: {self.command} {self.path_only}")
        except HubError as error:
            headers = {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
            self._send(error.status, json.dumps({"error": str(error)}).encode(), headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks, size = [], 0
            while length := int(self.rfile.readline().split(b";")[0], 16):
                if (size := size + length) > MAX_BYTES:
                    raise HubError(413, "too large for a test")
                chunks.append(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length") or 0)
        if length > MAX_BYTES:
            self.close_connection = True
            raise HubError(413, "too large for a test")
        return self.rfile.read(length)

    def _send(self, status: int, data: bytes = b"", headers: dict | None = None):
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value, status: int = 200):
        self._send(status, json.dumps(value).encode())

    def _logged_in(self) -> bool:
        authorization = self.headers.get("Authorization")
        if authorization not in (None, f"Bearer {TOKEN}"):
            raise HubError(401, "Invalid credentials in Authorization header")
        return authorization is not None

    def _repository(self, type: str | None, repo: str, write: bool = False) -> Repository:
        logged_in = self._logged_in()
        repository = self.hub.repositories.get(((type or "models").rstrip("/"), repo))
        if write and not logged_in:
            raise HubError(401, "Invalid username or password.")
        if repository is None or repository.private and not logged_in:
            # The Hub does not tell strangers which repositories exist.
            raise HubError(404 if logged_in else 401, "Repository not found", "RepoNotFound")
        return repository

    # What follows answers one route each.

    def whoami(self):
        if not self._logged_in():
            raise HubError(401, "Invalid username or password.")
        self._json({"name": USER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self):
        if not self._logged_in():
            raise HubError(401, "Invalid username or password.")
        wanted = json.loads(self.body)
        kind = (wanted.get("type") or "model") + "s"
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{'datasets/' if kind == 'datasets' else ''}{repo}"
        if (kind, repo) in self.hub.repositories:
            return self._json({"error": "You already created this repo", "url": url}, status=409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repositories[kind, repo] = Repository(bool(private))
        self._json({"url": url, "id": repo, "name": repo})

    def validate_yaml(self):
        self._json({"errors": [], "warnings": []})

    def preupload(self, type, repo, revision):
        repository = self._repository(type, repo, write=True)
        repository.resolve(revision)
        modes = []
        for file in json.loads(self.body)["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES)
            modes.append(
                {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": None}
            )
        self._json({"files": modes})

    def lfs_batch(self, type, repo):
        self._repository(type, repo, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.endpoint}/lfs-verify"},
                }
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content is not what its hash says")
        self.hub.lfs[oid] = self.body
        self._send(200)

    def lfs_verify(self):
        wanted = json.loads(self.body)
        if len(self.hub.lfs.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, "No such object")
        self._json({})

    def commit(self, type, repo, revision):
        repository = self._repository(type, repo, write=True)
        files = dict(repository.commits[repository.resolve(revision)])
        message = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"]), False
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise HubError(400, f"{value['path']}: the LFS object was never uploaded")
                files[value["path"]] = self.hub.lfs[value["oid"]], True
            elif key == "deletedFile":
                files.pop(value["path"], None)
            else:
                raise HubError(400, f"unknown operation {key}")
        sha = repository.commit(revision, files, message)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}"})

    def branch(self, type, repo, name):
        repository = self._repository(type, repo, write=True)
        if name in repository.refs:
            return self._json({"error": "Reference already exists"}, status=409)
        repository.refs[name] = repository.resolve(json.loads(self.body or b"{}").get("startingPoint") or "main")
        self._json({})

    def tag(self, type, repo, revision):
        repository = self._repository(type, repo, write=True)
        repository.refs[json.loads(self.body)["tag"]] = repository.resolve(revision)
        self._json({})

    def info(self, type, repo, revision=None):
        repository = self._repository(type, repo)
        sha = repository.resolve(revision or "main")
        files = repository.commits[sha]
        answer = {
            "id": repo,
            "_id": hashlib.md5(repo.encode()).hexdigest()[:24],
            "sha": sha,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "author": repo.split("/")[0],
            "lastModified": "2025-01-01T00:00:00.000Z",
            "createdAt": "2025-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in files],
        }
        card = files.get("README.md", (b"",))[0].decode()
        answer |= dict(re.findall(r"^(pipeline_tag|library_name): (\S+)$", card, re.M))
        self._json(answer)

    def tree(self, type, repo, revision, path=""):
        files = self._files(type, repo, revision)
        below = [name for name in files if not path or name == path or name.startswith(path + "/")]
        if path and not below:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        entries = [self._entry(name, *files[name]) for name in below]
        folders = {name[: match.start()] for name in below for match in re.finditer("/", name)}
        entries += [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        if "recursive=true" not in self.path.lower():
            depth = path.count("/") + 1 if path else 0
            entries = [entry for entry in entries if entry["path"].count("/") == depth]
        self._json(entries)

    def paths_info(self, type, repo, revision):
        files = self._files(type, repo, revision)
        body = self.body.decode()
        if body.startswith("{"):
            wanted = json.loads(body)["paths"]
        else:
            wanted = [unquote(value) for value in re.findall(r"(?:^|&)paths=([^&]*)", body)]
        self._json([self._entry(path, *files[path]) for path in wanted if path in files])

    def refs(self, type, repo):
        repository = self._repository(type, repo)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in repository.refs.items()
        ]
        self._json({"branches": branches, "tags": [], "converts": []})

    def _files(self, type, repo, revision):
        repository = self._repository(type, repo)
        return repository.commits[repository.resolve(revision)]

    def _entry(self, path: str, data: bytes, lfs: bool) -> dict:
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
        if lfs:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def file(self, type, repo, revision, path):
        repository = self._repository(type, repo)
        sha = repository.resolve(revision)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if path not in repository.commits[sha]:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self._send(404, b"Entry not found", headers)
        data, lfs = repository.commits[sha][path]
        if lfs:
            oid = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
            return self._send(302, b"", {**headers, "Location": f"{self.hub.cdn}/{oid}", "ETag": f'"{oid}"'})
        self._send(200, data, {**headers, "ETag": f'"{git_hash(data)}"', "Content-Type": "text/plain; charset=utf-8"})

    def cdn(self, oid):
        data, headers, status = self.hub.lfs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        self._send(status, data, {**headers, "Content-Type": "application/octet-stream"})


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_FILE = r"/(?P<type>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/{REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", r"/(?P<type>datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("POST", "/lfs-verify", _Handler.lfs_verify),
    ("POST", rf"/api/{REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"/api/{REPO}/branch/(?P<name>.+)", _Handler.branch),
    ("POST", rf"/api/{REPO}/tag/(?P<revision>.+)", _Handler.tag),
    ("GET", rf"/api/{REPO}", _Handler.info),
    ("GET", rf"/api/{REPO}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", rf"/api/{REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", rf"/api/{REPO}/tree/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.tree),
    ("POST", rf"/api/{REPO}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    ("GET", rf"/api/{REPO}/refs", _Handler.refs),
    ("GET", _FILE, _Handler.file),
    ("HEAD", _FILE, _Handler.file),
    ("GET", r"/cdn/(?P<oid>[0-9a-f]{64})", _Handler.cdn),
    ("HEAD", r"/cdn/(?P<oid>[0-9a-f]{64})", _Handler.cdn),
]
