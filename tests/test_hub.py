"""The user's own command against an emulated hub: downloads, faults, and what is said about them.

The hub is a server of the standard library on the loopback address. It speaks what huggingface_hub
and Minari ask for: model info, `resolve` with ETag and commit headers (small files by 307, large
ones by 302 to a file server), and Minari's listings.
"""

import hashlib
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
import torch
import transformers
from conftest import ASSETS, assert_one_sentence, without_progress_bars
from launcher import TRAIN, Launcher

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


@pytest.fixture(scope="module")
def shared_hub(repositories, tmp_path_factory):
    """A running hub, and scripts that know no other."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    caches = tmp_path_factory.mktemp("caches")
    environment = {name: value for name, value in os.environ.items() if "HF_" not in name}
    environment |= {
        "HF_ENDPOINT": server.address,
        "HF_HOME": str(caches / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MINARI_DATASETS_PATH": str(caches / "minari"),
        "no_proxy": "127.0.0.1",
    }
    models = ("auto.modeling_auto", "gpt2.modeling_gpt2", "imagegpt.modeling_imagegpt")
    modules = [f"transformers.models.{name}" for name in models]
    launcher = Launcher(*modules, environment=environment)
    yield SimpleNamespace(server=server, launcher=launcher, caches=caches)
    server.shutdown()
    server.server_close()


# The libraries try again after some seconds, several times.
IMPATIENT = "import time; time.sleep = lambda seconds: None\n" + TRAIN


@pytest.fixture
def hub(shared_hub, repositories, tmp_path):
    """The hub with all files and no faults, and `train` to start a script with empty caches."""
    shutil.rmtree(shared_hub.caches)
    shared_hub.caches.mkdir()
    server = shared_hub.server
    server.files = dict(repositories)
    server.faults = {}
    server.requests = []

    def train(*arguments, program=IMPATIENT):
        server.requests.clear()
        return shared_hub.launcher.run(tmp_path, program, *arguments, *SIZE)

    return SimpleNamespace(server=server, train=train, minari=shared_hub.caches / "minari")


def fetched(server):
    """The large files that were asked for, in order."""
    return [path for path in server.requests if path.startswith("file-server")]


def assert_last_line(result, *words):
    """Ended with one sentence, after what the libraries said of their attempts to fetch a file."""
    *others, sentence = without_progress_bars(result.err)
    assert result.status == 1 and all(word in sentence for word in words), result.err
    assert all("download" in line or "etries" in line for line in others), result.err


def test_the_users_command_from_an_empty_cache(hub):
    """`python dt_pretrained.py --backbone gpt2 --env Hopper-v4`, and again without fetching."""
    command = ["--backbone", "gpt2", "--env", "Hopper-v4"]
    result = hub.train(*command, program="dt_pretrained.py")
    assert result.status == 0, result.err
    assert "epoch 1: return" in result.out and "learning_curve.png" in result.out
    assert "%|" in result.err  # the libraries' bars for what takes minutes at real size
    order = fetched(hub.server)
    assert "gpt2" in order[0] and "hdf5" in order[-1]  # a wrong name should not cost the data
    assert hub.train(*command).status == 0
    assert fetched(hub.server) == []


def test_imagegpt_has_only_a_bin_file(hub):
    result = hub.train("--backbone", "igpt", "--env", "Walker2d-v4")
    assert result.status == 0, result.err
    assert "pytorch_model.bin" in fetched(hub.server)[0]
    assert not any("commits" in path for path in hub.server.requests)  # asks to convert it


def test_a_wrong_name_is_said_before_the_data_are_fetched(hub):
    result = hub.train("--backbone", "openai-community/gpt3")
    assert_one_sentence(result, "openai-community/gpt3", "--sample")
    assert not any("hopper" in path for path in hub.server.requests)


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_another_architecture_is_refused_before_its_weights_are_fetched(hub, model_type):
    config = json.dumps({"model_type": model_type}).encode()
    hub.server.files["a/model"] = {"config.json": config, "model.safetensors": b"14 GB"}
    assert_one_sentence(hub.train("--backbone", "a/model"), f"is a {model_type}")
    assert "api/resolve-cache/models/a/model" in " ".join(hub.server.requests)
    assert not any("safetensors" in path for path in hub.server.requests)


FAULTS = {
    "openai-community/gpt2": {"config.json": "cut"},
    "openai/imagegpt-small": {"pytorch_model.bin": "cut"},
    "a/gpt2": {"model.safetensors": 401},
}


@pytest.mark.parametrize("backbone", FAULTS)
def test_a_broken_download_of_a_backbone_is_said_and_the_next_run_works(hub, backbone):
    hub.server.files["a/gpt2"] = hub.server.files["openai-community/gpt2"]
    hub.server.faults = FAULTS[backbone]
    assert_last_line(hub.train("--backbone", backbone), backbone)
    hub.server.faults = {}
    assert hub.train("--backbone", backbone).status == 0


def test_a_broken_download_of_data_is_said_with_what_to_delete(hub):
    """What Minari leaves behind, it takes for the data ever after."""
    advice = f"delete its folder under {hub.minari}"
    command = ["--backbone", "random-gpt2", "--sample", "--dataset", "mujoco/hopper/medium-v0"]
    hub.server.faults = {"hopper/medium-v0/data/main_data.hdf5": "cut"}
    assert_last_line(hub.train(*command), "mujoco/hopper/medium-v0", advice)
    hub.server.faults = {}
    assert_last_line(hub.train(*command), "mujoco/hopper/medium-v0", advice)
    shutil.rmtree(hub.minari / "mujoco" / "hopper" / "medium-v0")
    assert hub.train(*command).status == 0
