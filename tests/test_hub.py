"""The user's own command against an emulated hub: downloads, faults, and what is said about them.

The hub is a server of the standard library on the loopback address. It speaks what huggingface_hub
and Minari ask for: model info, `resolve` with ETag and commit headers (small files by 307, large
ones by 302 to a file server), and Minari's listings.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
import torch
import transformers
from conftest import ASSETS, ROOT, assert_one_sentence, without_progress_bars

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIZE = ["--num-epochs", "1", "--steps-per-epoch", "2", "--num-eval-episodes", "1"]
SIZE += ["--batch-size", "4", "--device", "cpu"]


class Hub(BaseHTTPRequestHandler):
    """Serves server.files: {repository: {path: bytes}}; "datasets/..." are repositories too."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(path)
        files = self.server.files
        if path == "api/datasets":  # Minari asks for those of farama-minari
            names = [name.removeprefix("datasets/") for name in files if "datasets/" in name]
            return self.answer_json([{"id": name, "_id": name} for name in names])
        for repository, contents in files.items():
            plain = repository if repository.startswith("datasets/") else f"models/{repository}"
            if path.startswith(f"api/{plain}/tree/"):
                return self.answer_json(
                    [
                        {"type": "file", "path": name, "oid": etag(data), "size": len(data)}
                        for name, data in contents.items()
                    ]
                )
            if path in (f"api/{plain}", f"api/{plain}/revision/main"):
                siblings = [{"rfilename": name} for name in contents]
                name = repository.removeprefix("datasets/")
                return self.answer_json({"id": name, "sha": COMMIT, "siblings": siblings})
            for prefix, step in (
                (f"{repository}/resolve/main/", "first"),
                (f"{repository}/resolve/{COMMIT}/", "first"),
                (f"api/resolve-cache/{plain}/{COMMIT}/", "small"),
                (f"file-server/{repository}/", "large"),
            ):
                if path.startswith(prefix):
                    return self.answer_file(repository, plain, path.removeprefix(prefix), step)
        self.answer(404, {"X-Error-Code": "RepoNotFound"}, b"no such repository")

    def answer_file(self, repository, plain, name, step):
        data = self.server.files[repository].get(name)
        if data is None:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"}, b"no such file")
        fault = self.server.faults.get(name)
        if isinstance(fault, int):
            return self.answer(fault, {}, b"a fault")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(data)}"'}
        is_large = name.endswith((".safetensors", ".bin", ".hdf5"))
        if step == "first" and is_large:
            headers["X-Linked-Etag"] = headers["ETag"]
            headers["X-Linked-Size"] = str(len(data))
            headers["Location"] = f"{self.server.address}/file-server/{repository}/{name}"
            return self.answer(302, headers, b"")
        if step == "first":
            headers["Location"] = f"/api/resolve-cache/{plain}/{COMMIT}/{name}"
            return self.answer(307, headers, b"")
        self.answer(200, headers, data, cut=fault == "cut")

    def answer_json(self, content):
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def answer(self, status, headers, body, cut=False):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


def etag(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """GPT-2 as safetensors, ImageGPT as pytorch_model.bin, and Minari's Hopper and Walker2d."""
    gpt2 = {}
    for name in ("config.json", "model.safetensors"):
        gpt2[name] = (ASSETS / "text-gpt2" / name).read_bytes()
    folder = tmp_path_factory.mktemp("imagegpt")
    whole = transformers.ImageGPTForCausalImageModeling.from_pretrained(ASSETS / "image-gpt")
    torch.save(whole.state_dict(), folder / "pytorch_model.bin")
    igpt = {
        "config.json": (ASSETS / "image-gpt" / "config.json").read_bytes(),
        "pytorch_model.bin": (folder / "pytorch_model.bin").read_bytes(),
    }
    mujoco = {}
    datasets = []
    for name in ("hopper", "walker2d"):
        source = ASSETS / "minari" / "sample" / name / "medium-v0" / "data"
        metadata = json.loads((source / "metadata.json").read_text())
        metadata["dataset_id"] = f"mujoco/{name}/medium-v0"
        datasets.append(f"mujoco/{name}/medium-v0")
        mujoco[f"{name}/medium-v0/data/metadata.json"] = json.dumps(metadata).encode()
        data = (source / "main_data.hdf5").read_bytes()
        mujoco[f"{name}/medium-v0/data/main_data.hdf5"] = data
        mujoco[f"{name}/namespace_metadata.json"] = b"{}"
    namespaces = {"namespaces": ["mujoco/hopper", "mujoco/walker2d"], "datasets": datasets}
    mujoco["namespace_metadata.json"] = json.dumps(namespaces).encode()
    return {
        "openai-community/gpt2": gpt2,
        "openai/imagegpt-small": igpt,
        "datasets/farama-minari/mujoco": mujoco,
    }


@pytest.fixture
def hub(repositories, tmp_path):
    """A running hub, and `command` to run a script against it with empty caches."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.files = dict(repositories)
    server.faults = {}
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()

    environment = {name: value for name, value in os.environ.items() if "HF_" not in name}
    environment |= {
        "HF_ENDPOINT": server.address,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MINARI_DATASETS_PATH": str(tmp_path / "minari"),
        "no_proxy": "127.0.0.1",
    }

    def command(script, *arguments):
        result = subprocess.run(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        return SimpleNamespace(status=result.returncode, out=result.stdout, err=result.stderr)

    yield SimpleNamespace(server=server, command=command, environment=environment, folder=tmp_path)
    server.shutdown()
    server.server_close()


def test_the_users_command_from_an_empty_cache(hub):
    """`python dt_pretrained.py --backbone gpt2 --env Hopper-v4`, and again without asking for files."""
    command = ("dt_pretrained.py", "--backbone", "gpt2", "--env", "Hopper-v4", *SIZE)
    result = hub.command(*command)
    assert result.status == 0, result.err
    assert "weights from openai-community/gpt2, 20,012 steps" in result.out
    assert "normalized_score" in result.out
    assert "%|" in result.err  # the libraries' bars for what takes minutes at real size
    order = [path for path in hub.server.requests if path.endswith((".safetensors", ".hdf5"))]
    assert "gpt2" in order[0] and "hdf5" in order[-1]  # a wrong name should not cost the data
    hub.server.requests.clear()
    assert hub.command(*command).status == 0
    assert not any("file-server" in path for path in hub.server.requests)


def test_imagegpt_has_only_a_bin_file(hub):
    result = hub.command("dt_pretrained.py", "--backbone", "igpt", "--env", "Walker2d-v4", *SIZE)
    assert result.status == 0, result.err
    assert "weights from openai/imagegpt-small, 20,227 steps" in result.out


def test_a_wrong_name_is_said_before_the_data_are_fetched(hub):
    result = hub.command("dt_pretrained.py", "--backbone", "openai-community/gpt3", *SIZE)
    assert_one_sentence(result, "openai-community/gpt3", "--sample")
    assert not any("hopper" in path for path in hub.server.requests)


ATTEMPTS = """
import sys
sys.path.insert(0, sys.argv[1])
import dt_pretrained as dt

def attempt(name):
    args = dt.Args(backbone=name, dataset=name, device="cpu", target_return=1.0)
    try:
        if name.startswith("mujoco/"):
            dt.load_episodes(args, dt.make_env(args, 1))
        else:
            dt.load_backbone(args)
        print("ok", flush=True)
    except SystemExit as end:
        print("stopped with", end.code, flush=True)

for name in sys.stdin:
    print(f"\\n@ {name.strip()}", file=sys.stderr, flush=True)
    attempt(name.strip())
"""


class Attempts:
    """A process that loads what it is told to by name, as the scripts would, again and again."""

    def __init__(self, environment, folder):
        self.process = subprocess.Popen(
            [sys.executable, "-c", ATTEMPTS, str(ROOT)],
            cwd=folder,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def load(self, name):
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(("ok", "stopped with")):
                return line.strip()
        raise AssertionError(self.process.stderr.read())

    def sentences(self):
        """End it; returns what it has said at each attempt."""
        _, err = self.process.communicate()
        assert "Traceback" not in err, err
        parts = [without_progress_bars(part) for part in err.split("\n@ ")[1:]]
        return [part[-1] for part in parts]


def folder_to_delete(sentence):
    return sentence.partition("delete ")[2].partition(" and start")[0]


def test_a_broken_download_is_said_and_the_next_run_can_work(hub):
    """One sentence each; where it names a folder to delete, all is well without it."""
    faults = {
        "openai-community/gpt2": {"config.json": "cut"},
        "openai/imagegpt-small": {"pytorch_model.bin": "cut"},
        "a/gpt2": {"model.safetensors": 401},
        "mujoco/hopper/medium-v0": {"hopper/medium-v0/data/main_data.hdf5": "cut"},
    }
    hub.server.files["a/gpt2"] = hub.server.files["openai-community/gpt2"]
    attempts = Attempts(hub.environment, hub.folder)
    for name, fault in faults.items():
        hub.server.faults = fault
        assert attempts.load(name) == "stopped with 2", name
    hub.server.faults = {}
    again = [attempts.load(name) for name in faults]
    sentences = attempts.sentences()
    for sentence, name in zip(sentences, faults):
        assert name in sentence
    for sentence, outcome in zip(sentences[len(faults) :], again):
        if outcome != "ok":
            assert folder_to_delete(sentence).startswith(str(hub.folder)), sentence
            shutil.rmtree(folder_to_delete(sentence))
    attempts = Attempts(hub.environment, hub.folder)
    assert [attempts.load(name) for name in faults] == ["ok"] * len(faults)


def test_damaged_files_in_the_caches_name_what_to_delete(hub):
    hub.server.files["a/gpt2"] = hub.server.files["openai-community/gpt2"]
    names = ["openai-community/gpt2", "a/gpt2", "mujoco/hopper/medium-v0"]
    names += ["mujoco/walker2d/medium-v0"]
    attempts = Attempts(hub.environment, hub.folder)
    assert [attempts.load(name) for name in names[:3]] == ["ok"] * 3
    damaged = {
        "hf/hub/models--openai-community--gpt2": "snapshots/*/config.json",
        "hf/hub/models--a--gpt2": "snapshots/*/model.safetensors",
        "minari/mujoco/hopper/medium-v0": "data/main_data.hdf5",
    }
    for folder, pattern in damaged.items():
        (path,) = (hub.folder / folder).glob(pattern)
        path.resolve().write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    stalled = hub.folder / "minari/mujoco/walker2d/medium-v0"  # a download that left a folder only
    stalled.mkdir(parents=True)
    assert [attempts.load(name) for name in names] == ["stopped with 2"] * 4
    folders = [folder_to_delete(sentence) for sentence in attempts.sentences()[3:]]
    assert folders == [str(hub.folder / folder) for folder in damaged] + [str(stalled)]
