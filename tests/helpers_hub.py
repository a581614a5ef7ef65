"""A Hub on 127.0.0.1, and tiny checkpoints to put on it: what test_hub, test_repack, test_serve, test_bad_input share.

`FakeHub` answers as much of the Hub's HTTP API as huggingface_hub and transformers ask for: repos with commits and
branches, private ones with tokens, uploads inline and through LFS, downloads by revision. Nothing leaves the machine.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_secret"
VOCAB = 64
CAP = "64MiB"
LFS = (".safetensors", ".bin")

CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
PROMPT = torch.tensor([[3, 9, 27, 5, 40]])


# Tiny checkpoints --------------------------------------------------------------------------------------------------


def tiny_llama(act: str = "relu", **settings: Any) -> PreTrainedModel:
    """Three layers; ReLU gives the certified gate, SiLU the gate `all`."""
    settings = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "hidden_act": act,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False, **settings,
    }  # fmt: skip
    return _randomized(LlamaForCausalLM, LlamaConfig(**settings))


def tiny_opt(**settings: Any) -> PreTrainedModel:
    """Inline FFNs with biases, tied embeddings, names that differ between file and model."""
    settings = {
        "vocab_size": VOCAB, "hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "word_embed_proj_dim": 64, "max_position_embeddings": 128, **settings,
    }  # fmt: skip
    return _randomized(OPTForCausalLM, OPTConfig(**settings))


def _randomized(cls: type[PreTrainedModel], config: Any, seed: int = 5) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def make_tokenizer() -> Any:
    """One token per word `w0` to `w63`, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "w0", "bos_token": "w1", "eos_token": "w2", "pad_token": "w0"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_stock(folder: Path, model: PreTrainedModel, tokenizer: bool = True, **kwargs: Any) -> Path:
    """A stock checkpoint with a tokenizer beside it."""
    model.save_pretrained(folder, **kwargs)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


def tokens_of(model: PreTrainedModel, n: int = 12) -> list[int]:
    """Greedy tokens after PROMPT; nothing stops early."""
    mask = torch.ones_like(PROMPT)
    out = model.generate(PROMPT, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=False)
    return out[0].tolist()


def dense_tokens(folder: Path | str, n: int = 12) -> list[int]:
    """The same from stock transformers."""
    return tokens_of(AutoModelForCausalLM.from_pretrained(folder), n)


def run_python(code: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter that sees this repository."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, env=clean_env(**env), check=False
    )


def clean_env(**env: str) -> dict[str, str]:
    """This process's environment without its Hugging Face settings, plus `env`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    defaults = {"PYTHONPATH": path, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    return {**kept, **defaults, **env}


# The Hub -----------------------------------------------------------------------------------------------------------


@dataclass
class Repo:
    """Commits of a repo: each maps paths to contents. `refs` maps branches to commits."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit on top of a branch; returns its hash."""
        parent = self.refs.get(branch, "")
        tree = {**self.commits.get(parent, {}), **files}
        listing = "".join(f"{p}{hashlib.sha1(c).hexdigest()}" for p, c in sorted(tree.items()))
        sha = hashlib.sha1(f"{parent}{len(self.commits)}{listing}".encode()).hexdigest()
        self.commits[sha] = tree
        self.refs[branch] = sha
        return sha


class FakeHub:
    """A Hub in a thread of this process.

    Attributes:
        url: for HF_ENDPOINT.
        repos: by id.
        log: (method, path) of every request, in order.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_id: str, folder: Path, branch: str = "main", private: bool = False, skip: str = "\0") -> str:
        """Commit a folder's files to a repo (made if needed), except those whose name contains `skip`."""
        repo = self.repos.setdefault(repo_id, Repo(private))
        names = [p for p in sorted(folder.rglob("*")) if p.is_file() and skip not in p.name and p.name[0] != "."]
        return repo.commit({p.relative_to(folder).as_posix(): p.read_bytes() for p in names}, branch)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds."""
        repo = self.repos[repo_id]
        sha = repo.resolve(revision)
        assert sha is not None
        return repo.commits[sha]

    def downloads(self) -> list[str]:
        """Names of the files that were fetched (GET) so far."""
        return [path.rsplit("/", 1)[1] for method, path in self.log if method == "GET" and "/resolve/" in path]

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """Environment of a process that uses this Hub and keeps its caches in `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), **more}


@contextlib.contextmanager
def use_hub(hub: FakeHub, home: Path, monkeypatch: Any) -> Iterator[None]:
    """Point huggingface_hub, in this process, at a Hub and a fresh cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_FLASH_CACHE", "HF_FLASH_MEMORY"):
        monkeypatch.delenv(name, raising=False)
    import transformers.utils.hub

    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    yield


class _Handler(BaseHTTPRequestHandler):
    """The routes, in the order in which they are tried."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def _route(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path).strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.log.append((self.command, path))
        if path.startswith("api/"):
            self._api(path.removeprefix("api/"), body, parse_qs(url.query))
        elif path.startswith("lfs/"):
            self.hub.lfs[path.removeprefix("lfs/")] = body
            self._reply(200, {})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._lfs_batch(json.loads(body))
        elif "/resolve/" in path:
            repo_id, _, rest = path.partition("/resolve/")
            self._resolve(repo_id, rest)
        else:
            self._error(404, "no such route")

    # api/...

    def _api(self, path: str, body: bytes, query: dict[str, list[str]]) -> None:
        if path == "repos/create":
            self._create(json.loads(body))
        elif path == "validate-yaml":
            self._reply(200, {"errors": [], "warnings": []})
        elif path.startswith("models/"):
            parts = path.split("/")
            repo = self._repo("/".join(parts[1:3]))
            if repo is not None:
                self._model("/".join(parts[1:3]), repo, parts[3:], body)
        else:
            self._error(404, f"no route api/{path}")

    def _create(self, wanted: dict[str, Any]) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(401, "Invalid credentials in Authorization header")
        repo_id = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        reply = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos:
            return self._reply(409, {**reply, "error": "You already created this model repo"})
        self.hub.repos[repo_id] = Repo(private=wanted.get("visibility") == "private")
        self.hub.repos[repo_id].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._reply(200, reply)

    def _model(self, repo_id: str, repo: Repo, rest: list[str], body: bytes) -> None:
        what, revision = rest[0] if rest else "", "/".join(rest[1:]) or "main"
        if what == "tree":
            revision, _, below = revision.partition("/")
        if what == "branch":
            repo.refs.setdefault(revision, repo.refs["main"])
            return self._reply(200, {})
        sha = repo.resolve(revision)
        if sha is None:
            return self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        tree = repo.commits[sha]
        if what in ("", "revision"):
            siblings = [{"rfilename": name} for name in sorted(tree)]
            return self._reply(200, {"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings})
        if what == "tree":
            found = [_entry(name, content) for name, content in sorted(tree.items()) if name.startswith(below)]
            return self._reply(200, found) if found else self._error(404, "no such folder", "EntryNotFound")
        if what == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(LFS) else "regular" for path in paths}
            files = [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]
            return self._reply(200, {"files": files})
        if what == "commit":
            return self._commit(repo_id, repo, revision, body)
        return self._error(404, f"no route api/models/{repo_id}/{what}")

    def _commit(self, repo_id: str, repo: Repo, branch: str, body: bytes) -> None:
        files = {}
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                files[item["value"]["path"]] = self.hub.lfs[item["value"]["oid"]]
        sha = repo.commit(files, branch)
        self._reply(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha, "success": True})

    def _lfs_batch(self, wanted: dict[str, Any]) -> None:
        objects = wanted["objects"]
        for item in objects:
            if item["oid"] not in self.hub.lfs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        self._reply(200, {"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")

    # <repo>/resolve/<revision>/<file>

    def _resolve(self, repo_id: str, rest: str) -> None:
        repo = self._repo(repo_id)
        if repo is None:
            return None
        revision, _, name = rest.partition("/")
        sha = repo.resolve(revision)
        if sha is None:
            return self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        content = repo.commits[sha].get(name)
        if content is None:
            return self._error(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": sha})
        entry = _entry(name, content)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(206, content[first : last + 1], "application/octet-stream", headers)
        return self._send(200, content, "application/octet-stream", headers)

    def _repo(self, repo_id: str) -> Repo | None:
        """The repo, unless it does not exist or may not be seen: then a reply was sent."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self._error(401 if repo else 404, "Repository not found", "RepoNotFound")
            return None
        return repo

    def _error(self, status: int, text: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        more = {"X-Error-Message": text, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self._send(status, json.dumps({"error": text}).encode(), "application/json", more)

    def _reply(self, status: int, value: Any, kind: str = "application/json") -> None:
        self._send(status, json.dumps(value).encode(), kind, {})

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    """A file as the tree API lists it."""
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob}
    if name.endswith(LFS):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry
