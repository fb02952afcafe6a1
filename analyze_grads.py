"""Open up the gradients: how large are they, do they agree, what does clipping do, how far do parameters move?

    python analyze_grads.py --sample                                                   # bundled inputs, two CPU cores
    python analyze_grads.py --backbones random gpt2 igpt igpt-as-gpt2 --env Hopper-v4  # one epoch each, as the paper
    python analyze_grads.py --backbones igpt --num-epochs 40 --max-grad-norms 0.25 0   # App. G.3
    python analyze_grads.py --runs runs/ONE runs/ANOTHER --epochs 1 40                 # checkpoints of other scripts

Paper: S. Takagi, "On the Effect of Pre-training for Transformer in Different Modality on Offline Reinforcement
Learning", NeurIPS 2022, https://arxiv.org/abs/2211.09817 (sections 5.3 and 5.4, App. G.3).
"""

import itertools
import json
import math
import os
import sys
import time
import warnings
from collections import OrderedDict, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import h5py
import minari
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
ASSETS = Path(__file__).resolve().parent / "tests" / "assets"
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


# ======================================================================================================================
# Arguments
# ======================================================================================================================
@dataclass
class Args:
    backbones: tuple[str, ...] = ("random", "gpt2", "igpt")
    """starting points: gpt2, igpt, igpt-as-gpt2, random, random-gpt2, markov, markov-sharp, hub ids or local folders"""
    max_grad_norms: tuple[float, ...] = (0.25,)
    """clipping thresholds; training is repeated for each, 0 switches clipping off (App. G.3)"""
    runs: tuple[str, ...] = ()
    """run folders of dt_pretrained.py or dt_no_context.py whose checkpoints are analysed instead of training"""
    epochs: tuple[int, ...] = ()
    """epochs whose checkpoints are analysed; if not given, the last"""
    norm_windows: int = 100
    """windows whose single gradients give norms"""
    confusion_windows: int = 50
    """how many of them are compared with each other, pair by pair"""
    chunk_size: int = 10
    """windows whose gradients are computed at the same time; changes memory, not results"""

    env: str = "Hopper-v4"
    """gymnasium environment: Hopper, HalfCheetah or Walker2d, -v4 or -v5; others need --dataset and --target-return"""
    dataset: str | None = None
    """Minari id, or D4RL .hdf5 file; if not given, mujoco/{hopper,halfcheetah,walker2d}/medium-v0"""
    sample: bool = False
    """run on the small bundled data and backbones, settings that are not given chosen for two CPU cores"""

    context_length: int = 20
    """K, the number of time steps that the model sees"""
    batch_size: int = 64
    """windows per training step"""
    learning_rate: float = 1e-4
    """AdamW's learning rate after the warm-up"""
    weight_decay: float = 1e-4
    """AdamW's weight decay, on all parameters"""
    warmup_steps: int = 5000
    """training steps over which the learning rate rises linearly"""
    dropout: float = 0.2
    """dropout on the residual branches; on attention weights and on the backbone's input it is at most 0.1"""
    num_epochs: int = 1
    """epochs, each followed by an evaluation"""
    steps_per_epoch: int = 2500
    """training steps per epoch"""
    num_eval_episodes: int = 100
    """episodes per evaluation"""
    target_return: float | None = None
    """return the model is asked for; if not given, Hopper 3600, HalfCheetah 6000, Walker2d 5000"""

    seed: int = 666
    """fixes initial weights, windows, dropout and evaluation episodes"""
    device: str = "auto"
    """auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, mps"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """of matrix products, weights are always float32; auto is bf16 where the device computes with it"""
    save_epochs: tuple[int, ...] = (0, 1)
    """epochs after which a checkpoint is kept, 0 being before training; the last is always kept"""
    run_name: str | None = None
    """folder under runs/; if not given, {env}__{script}__study__{seed}__{time}"""
    resume: str | None = None
    """folder to go on with, what is trained stays; its arguments hold, only --num-epochs may be given anew"""


# What --sample changes where the user did not say otherwise; models that small need no dropout.
SAMPLE = dict(batch_size=8, learning_rate=1e-3, warmup_steps=700, dropout=0.0, steps_per_epoch=700)
SAMPLE |= dict(num_eval_episodes=8)


# ======================================================================================================================
# Helpers: what is not given, what goes wrong, what is written
# ======================================================================================================================
# Per environment: data set, the return that is asked for, and D4RL's returns of a random policy and of an expert.
TASKS = {
    "Hopper": ("mujoco/hopper/medium-v0", 3600, -20.272305, 3234.3),
    "HalfCheetah": ("mujoco/halfcheetah/medium-v0", 6000, -280.178953, 12135.0),
    "Walker2d": ("mujoco/walker2d/medium-v0", 5000, 1.629008, 4592.3),
}
COLORS = defaultdict(lambda: "#CC79A7", {"random": "#555555", "random-gpt2": "#009E73", "markov": "#56B4E9"})
COLORS |= {"gpt2": "#0072B2", "igpt": "#D55E00", "igpt-as-gpt2": "#E69F00", "markov-sharp": "#000000"}  # Okabe-Ito


def stop(message, status=2):
    """End the program with one sentence on stderr: this, the user can put right."""
    tqdm.write(message, file=sys.stderr)  # on a line of its own, also beside a progress bar
    raise SystemExit(status)


@contextmanager
def or_stop(message):
    """Whatever the libraries raise in this context ends the program with `message` and the first line of the reason."""
    try:
        yield
    except Exception as error:
        stop(f"{message} ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}).")


def parse_arguments():
    """Return the arguments and the run folder; what is not given is the sample's, or that of the run to resume."""
    args = tyro.cli(Args, description=__doc__)
    if args.resume:
        with or_stop(f"{args.resume} cannot be resumed, it has no args.json of {SCRIPT}.py"):
            before = json.loads(Path(args.resume, "args.json").read_text())
            before = Args(**{name: tuple(x) if isinstance(x, list) else x for name, x in before.items()})
        args = tyro.cli(Args, default=before)
        if replace(args, num_epochs=before.num_epochs, resume=None) != before:
            stop("A run is resumed with the arguments that it was started with, only --num-epochs may be given anew.")
    elif args.sample:
        args = tyro.cli(Args, default=Args(sample=True, **SAMPLE))

    at_least_1 = ("context_length", "batch_size", "num_epochs", "steps_per_epoch", "num_eval_episodes")
    for name, value in vars(args).items():
        if isinstance(value, int | float) and value < (name in at_least_1) and name != "target_return":
            stop(f"--{name.replace('_', '-')} {value} is out of range.")
    env_name = args.env.rsplit("-v", 1)[0]
    if env_name not in TASKS and None in (args.dataset, args.target_return):
        stop(f"{args.env} is not one of {', '.join(TASKS)}: give --dataset and --target-return.")
    args.dataset = args.dataset or (f"sample/{env_name.lower()}/medium-v0" if args.sample else TASKS[env_name][0])
    if args.target_return is None:
        args.target_return = TASKS[env_name][1]
    backbone = Path(getattr(args, "backbone", "study")).name
    args.run_name = args.run_name or f"{args.env}__{SCRIPT}__{backbone}__{args.seed}__{int(time.time())}"
    folder = Path(args.resume or f"runs/{args.run_name}")
    if not args.resume and list(folder.rglob("latest.pt")):
        stop(f"{folder} holds a run already; choose another --run-name, or go on with it by --resume {folder}.")
    args.resume = None
    if RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_json(folder / "args.json", asdict(args))
    return args, folder


def save(path, write):
    """Let `write` fill a temporary file and move it to `path`, which so appears whole or not at all."""
    temporary = path.with_name("." + path.name)
    write(temporary)
    os.replace(temporary, path)


def save_json(path, content):
    save(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1, default=lambda x: x.tolist())))


def read_run(folder):
    """Return the arguments of the run in `folder`, its records per epoch and its history."""
    with or_stop(f"{folder} is no folder of a run"):
        summary = json.loads(Path(folder, "summary.json").read_text())
        return SimpleNamespace(**summary["args"]), summary["epochs"], summary["history"]


def save_figure(figure, path, step):
    """Write a matplotlib figure as a PNG, and as a TensorBoard image into the same folder."""
    save(path, partial(figure.savefig, dpi=120))
    with SummaryWriter(path.parent) as writer:
        writer.add_figure(path.stem, figure, step)


def print_table(rows, formats):
    """Print rows [list of dicts] as a table; `formats` are its columns and how they are printed, nan as -."""
    lines = [list(formats)]
    for row in rows:
        lines.append([format(row[name], form) if row[name] == row[name] else "-" for name, form in formats.items()])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


# ======================================================================================================================
# Environment and data
# ======================================================================================================================
RETURN_SCALE = 1000  # returns-to-go are divided by this before they enter the model
warnings.filterwarnings("ignore", message=".*is out of date.*")  # -v4 is what the paper used
# HalfCheetah's model file sets off a deprecation warning for every copy; anything else should be seen.
mujoco.set_mju_user_warning(lambda text: "deprecated" in text or print(f"mujoco: {text}", file=sys.stderr))


def make_env(args, num_copies, **options):
    """Return a gymnasium vector environment with `num_copies` of `args.env`."""
    with or_stop(f"the environment {args.env} cannot be used"):
        env = gym.make_vec(args.env, num_copies, vectorization_mode="sync", **options)
        space = env.single_action_space
        assert (np.abs([space.low, space.high]) == 1).all(), f"its actions are {space}, the model's are from -1 to 1"
    return env


def read_d4rl(path):
    """Return the episodes of a D4RL file: a list of (observations [T, state_dim], actions [T, act_dim], rewards [T]).

    An episode ends where `terminals` or `timeouts` is set; what follows the last end is left out, as in the reference,
    can-wikipedia-help-offline-rl, data/download_d4rl_datasets.py.
    """
    with h5py.File(path) as file:
        columns = [file[name][()] for name in ("observations", "actions", "rewards", "terminals", "timeouts")]
    assert len({len(column) for column in columns}) == 1, "its columns differ in length"
    ends = np.flatnonzero(columns[3].astype(bool) | columns[4].astype(bool)) + 1
    return list(zip(*(np.split(column, ends)[:-1] for column in columns[:3])))


def read_minari(dataset):
    """Return what `read_d4rl` does from a Minari data set, which is downloaded if it is not there."""
    bundled = ASSETS / "minari" / dataset / "data"
    data = minari.MinariDataset(bundled) if bundled.exists() else minari.load_dataset(dataset, download=True)
    return [(e.observations[: len(e.actions)], e.actions, e.rewards) for e in data.iterate_episodes()]


class OfflineData:
    """The N transitions of `args.dataset`, one episode after the other. A batch of windows is an index lookup."""

    def __init__(self, args, env, device):
        takes = "a D4RL .hdf5 file, or a Minari id that is under MINARI_DATASETS_PATH or on the server; or try --sample"
        with or_stop(f"--dataset {args.dataset} cannot be used, it takes {takes}"):
            episodes = (read_d4rl if args.dataset.endswith(".hdf5") else read_minari)(args.dataset)
            lengths = np.array([len(rewards) for _, _, rewards in episodes])
            assert lengths.min(initial=1) > 0 and len(lengths), "it has no episode, or one without a step"
            for observations, actions, rewards in episodes:
                assert len(observations) == len(actions) == len(rewards), "its columns differ in length"
            columns = [np.concatenate(column, dtype=np.float32, casting="same_kind") for column in zip(*episodes)]
            assert all(np.isfinite(column).all() for column in columns), "it has non-finite numbers"
            states, actions, rewards = columns
            for x, shape in zip(columns, (env.single_observation_space.shape, env.single_action_space.shape, ())):
                assert x.shape[1:] == shape, f"it has dimensions {x.shape[1:]} where {args.env} has {shape}"

        ends = np.cumsum(lengths)
        returns_to_go = [r[::-1].cumsum(dtype=np.float64)[::-1] for r in np.split(rewards, ends[:-1])]  # undiscounted
        mean, std = states.mean(0, dtype=np.float64), states.std(0, dtype=np.float64) + 1e-6
        floats = (mean, std, (states - mean) / std, actions, np.concatenate(returns_to_go)[:, None] / RETURN_SCALE)
        floats = [torch.as_tensor(np.float32(x), device=device) for x in floats]
        self.state_mean, self.state_std = floats[:2]  # [state_dim]
        self.states, self.actions, self.returns_to_go = floats[2:]  # [N, state_dim], [N, act_dim], [N, 1]
        self.timesteps = torch.as_tensor(np.concatenate([np.arange(n) for n in lengths]), device=device)  # [N]
        self.episode_ends = torch.as_tensor(np.repeat(ends, lengths), device=device)  # [N], after its last transition

    def windows(self, starts, context_length):
        """Cut one window of K steps from each start [batch]; steps past the end of the episode are zeros.

        Returns returns_to_go [batch, K, 1], states, actions, timesteps [batch, K] and the mask of valid steps, as long.
        """
        index = starts.unsqueeze(1) + torch.arange(context_length, device=starts.device)
        valid = index < self.episode_ends[starts].unsqueeze(1)
        index = torch.where(valid, index, 0)
        parts = [x[index] * valid.unsqueeze(-1) for x in (self.returns_to_go, self.states, self.actions)]
        return *parts, self.timesteps[index] * valid, valid


# ======================================================================================================================
# Model: a GPT that can be a GPT-2 and an ImageGPT, and the Decision Transformer around it
# ======================================================================================================================
class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "gelu_new": partial(nn.GELU, "tanh"), "quick_gelu": QuickGELU}
LAYER_NORMS = {"gpt2": nn.LayerNorm, "imagegpt": nn.RMSNorm}  # ImageGPT subtracts no mean and has no bias


@dataclass(frozen=True)
class BlockConfig:
    """Architecture of one block; a GPT is a list of these."""

    n_embd: int
    n_head: int
    n_inner: int
    activation: str
    layer_norm: str = "gpt2"
    epsilon: float = 1e-5  # of the LayerNorms
    dropout: float = 0.0


class Conv1D(nn.Module):
    """A linear layer with its weight stored [in, out], as in the checkpoints."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class Attention(nn.Module):
    """Causal multi-head self-attention, [batch, tokens, width] to the same."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.attention_dropout = config.n_head, min(0.1, config.dropout)
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        query, key, value = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        dropout_p = self.attention_dropout * self.training
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and beside a residual connection; named as in the checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LAYER_NORMS[config.layer_norm](config.n_embd, eps=config.epsilon)
        self.attn = Attention(config)
        self.ln_2 = LAYER_NORMS[config.layer_norm](config.n_embd, eps=config.epsilon)
        c_fc, c_proj = Conv1D(config.n_embd, config.n_inner), Conv1D(config.n_inner, config.n_embd)
        act, dropout = ACTIVATIONS[config.activation](), nn.Dropout(config.dropout)
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, act=act, c_proj=c_proj, dropout=dropout))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class DecisionTransformer(nn.Module):
    """Predict each step's action from the returns-to-go, states and actions up to it (Chen et al. 2021).

    As in can-wikipedia-help-offline-rl's decision_transformer.py, the time embedding comes after the LayerNorm of the
    token embeddings, and the action head is the transposed action embedding.
    Attention is causal and knows no position, so that windows are padded on the right and need no mask.
    """

    def __init__(self, blocks, final_norm, state_dim, act_dim, max_timestep):
        super().__init__()
        shape = dict(final_norm=final_norm, state_dim=state_dim, act_dim=act_dim, max_timestep=max_timestep)
        self.architecture = dict(blocks=[asdict(config) for config in blocks], **shape)  # goes into checkpoints
        width = blocks[0].n_embd
        self.embed_timestep = nn.Embedding(max_timestep, width)
        self.embed_return = nn.Linear(1, width)
        self.embed_state = nn.Linear(state_dim, width)
        self.embed_action = nn.Linear(act_dim, width)
        self.embed_ln = nn.LayerNorm(width)
        h, ln_f = nn.ModuleList(Block(block) for block in blocks), LAYER_NORMS[final_norm](width, eps=blocks[0].epsilon)
        self.transformer = nn.ModuleDict(dict(drop=nn.Dropout(min(0.1, blocks[0].dropout)), h=h, ln_f=ln_f))
        for name, weight in h.named_parameters():
            if name.endswith("c_proj.weight"):  # the residual branches start small, as in GPT-2
                nn.init.normal_(weight, std=0.02 / (2 * len(blocks)) ** 0.5)

    def embed(self, returns_to_go, states, actions, timesteps):
        """Return the tokens R_1 s_1 a_1 R_2 s_2 a_2 ... that enter the first block, [batch, 3K, width]."""
        with torch.autocast(states.device.type, enabled=False):  # bf16 has too few digits for a return
            tokens = (self.embed_return(returns_to_go), self.embed_state(states), self.embed_action(actions))
        tokens = self.embed_ln(torch.stack(tokens, dim=2))  # [batch, K, 3, width]
        return self.transformer.drop((tokens + self.embed_timestep(timesteps).unsqueeze(2)).flatten(1, 2))

    def forward(self, returns_to_go, states, actions, timesteps):
        """[batch, K, 1], [batch, K, state_dim], [batch, K, act_dim], [batch, K] to actions [batch, K, act_dim]."""
        x = self.embed(returns_to_go, states, actions, timesteps)
        for block in self.transformer.h:
            x = block(x)
        at_states = self.transformer.ln_f(x)[:, 1::3].float()  # [batch, K, width]
        with torch.autocast(states.device.type, enabled=False):  # in bf16 tanh is flat beyond 3.6
            return torch.tanh(F.linear(at_states, self.embed_action.weight.T))


def load_model(path, device):
    """Return the model of a checkpoint that any of the scripts has written, in evaluation mode, and the checkpoint."""
    with or_stop(f"{path} is no checkpoint of these scripts, or is damaged"):
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        blocks = [BlockConfig(**config) for config in checkpoint["architecture"].pop("blocks")]
        model = DecisionTransformer(blocks, **checkpoint["architecture"]).to(device)
        model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint


# ======================================================================================================================
# Backbones: where the Transformer starts
# ======================================================================================================================
SOURCES = {"gpt2": ("openai-community/gpt2", "text-gpt2"), "igpt": ("openai/imagegpt-small", "image-gpt")}
SOURCES |= {"igpt-as-gpt2": SOURCES["igpt"]} | {name: (None, name) for name in ("markov", "markov-sharp")}


def load_backbone(args):
    """Return block configurations, kind of the final LayerNorm, weights by name (none if random) and their source."""
    if args.backbone in ("random", "random-gpt2"):
        n_layer, n_embd, n_head = (4, 128, 4) if args.sample else (12, 768, 12)
        n_head, activation = (1, "relu") if args.backbone == "random" else (n_head, "gelu_new")
        block = BlockConfig(n_embd, n_head, 4 * n_embd, activation, dropout=args.dropout)
        return [block] * n_layer, "gpt2", {}, f"seed {args.seed}"

    hub_id, bundled = SOURCES.get(args.backbone, (args.backbone, None))
    source = str(ASSETS / bundled) if args.sample and bundled else hub_id
    if source is None:
        stop(f"{args.backbone} is on no hub: make one by tests/build_assets.py --what markov and give its folder.")
    config, weights = read_pretrained(source)
    layer_norm = "gpt2" if args.backbone == "igpt-as-gpt2" else config.model_type  # its new bias starts at zero
    n_inner = config.n_inner or 4 * config.n_embd
    norm = dict(layer_norm=layer_norm, epsilon=config.layer_norm_epsilon)
    block = BlockConfig(config.n_embd, config.n_head, n_inner, config.activation_function, **norm, dropout=args.dropout)
    return [block] * config.n_layer, layer_norm, weights, source


def read_pretrained(source):
    """Return configuration and weights [dict] of a GPT-2 or ImageGPT in a folder, in the hub's cache or on the hub."""
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # no background request to convert .bin files
    from transformers import AutoConfig, GPT2Model, ImageGPTModel, logging  # here, because it takes seconds

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    takes = (
        f"{', '.join(SOURCES)}, random, random-gpt2, or the hub id or folder of a GPT-2 or ImageGPT; or try --sample"
    )
    with or_stop(f"the backbone {source} cannot be loaded, --backbone takes {takes}"):
        config = AutoConfig.from_pretrained(source)
        assert config.model_type in LAYER_NORMS, f"it is a {config.model_type}"
        assert config.activation_function in ACTIVATIONS, f"its activation {config.activation_function} is unknown"
        assert config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx, "it scales attention otherwise"
        model_class = GPT2Model if config.model_type == "gpt2" else ImageGPTModel
        options = dict(config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
        model, report = model_class.from_pretrained(source, **options)
        wrong = [*report["missing_keys"], *report["mismatched_keys"], *report["unexpected_keys"]]
        wrong = [x for x in wrong if not str(x).endswith(("lm_head.weight", ".attn.bias", ".attn.masked_bias"))]
        assert not wrong, f"missing, misshapen or unknown are {wrong[:3]}"  # old checkpoints' masks are no weights
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(("wte.", "wpe."))}
    return config, weights


# ======================================================================================================================
# Evaluation
# ======================================================================================================================
def autocast(args, device):
    """Matrix products in bf16 where `args.precision` says so; weights, gradients and optimizer stay float32."""
    cpu_has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16")  # without it, bf16 is slower than float32
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bf16
    enabled = args.precision == "bf16" or bool(args.precision == "auto" and native)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@torch.no_grad()
def evaluate(model, env, data, args):
    """Play one episode in each copy of `env`, started with `args.seed` and the numbers after it.

    Returns the episodes' undiscounted returns and lengths in steps, both [episodes]. As in the Decision Transformer's
    evaluation, the return-to-go starts at `args.target_return`, falls by each reward, and the model sees K steps.
    """
    model.eval()
    device, n, K = data.state_mean.device, env.num_envs, args.context_length
    horizon = env.spec.max_episode_steps or 1000
    returns_to_go = torch.zeros(n, horizon + 1, 1, device=device)
    states = torch.zeros(n, horizon, *env.single_observation_space.shape, device=device)
    actions = torch.zeros(n, horizon, *env.single_action_space.shape, device=device)  # zero until they are predicted
    timesteps = torch.arange(horizon, device=device).clamp(max=model.embed_timestep.num_embeddings - 1).expand(n, -1)
    returns, lengths, running = np.zeros(n), np.zeros(n, dtype=int), np.ones(n, dtype=bool)

    observations, _ = env.reset(seed=args.seed)
    returns_to_go[:, 0] = args.target_return / RETURN_SCALE
    for t in tqdm(range(horizon), desc="evaluation", unit="step", leave=False):
        observations = torch.as_tensor(observations, dtype=torch.float32, device=device)
        states[:, t] = (observations - data.state_mean) / data.state_std
        rows, window = torch.as_tensor(running.nonzero()[0], device=device), slice(max(0, t - K + 1), t + 1)
        with autocast(args, device):
            predicted = model(*(x[rows, window] for x in (returns_to_go, states, actions, timesteps)))
        actions[rows, t] = predicted[:, -1].float()
        # Copies that are done go on until all are; what they still do is not counted.
        observations, rewards, terminated, truncated, _ = env.step(actions[:, t].cpu().numpy())
        returns += rewards * running
        lengths += running
        rewards = torch.as_tensor(rewards / RETURN_SCALE).float().to(device)
        returns_to_go[:, t + 1, 0] = returns_to_go[:, t, 0] - rewards
        running &= ~(terminated | truncated)
        if not running.any():
            break
    return returns, lengths


def normalized_score(env_id, episode_return):
    """D4RL's score: 0 for a random policy, 100 for an expert; nan where those are not known."""
    *_, random, expert = TASKS.get(env_id.rsplit("-v", 1)[0], (math.nan, math.nan))
    return 100 * (episode_return - random) / (expert - random)


# ======================================================================================================================
# Training
# ======================================================================================================================
METRICS = ("loss", "saturated_fraction", "grad_norm", "clipped_fraction")  # of one training step


def training_loss(model, windows, num_valid):
    """Mean squared error, and share of predictions beyond ±0.99 (saturated tanh), over the `num_valid` valid steps."""
    returns_to_go, states, actions, timesteps, valid = windows
    predicted = model(returns_to_go, states, actions, timesteps).float()
    weight = valid.unsqueeze(-1) / (num_valid * actions.shape[-1])
    loss = ((predicted - actions).square() * weight).sum()
    saturated = ((predicted.detach().abs() > 0.99) * weight).sum()
    return loss, saturated


def training_step(loss_function, model, optimizer, data, args, starts):
    """Make one step on the windows that begin at `starts` [batch]; returns its METRICS [4] without waiting for them."""
    max_grad_norm = args.max_grad_norm or math.inf
    num_valid = (data.episode_ends[starts] - starts).clamp(max=args.context_length).sum()
    windows = data.windows(starts.chunk(WORLD_SIZE)[RANK], args.context_length)
    with autocast(args, starts.device):
        loss, saturated = loss_function(model, windows, num_valid)
    optimizer.zero_grad()
    (loss * WORLD_SIZE).backward()  # DistributedDataParallel takes the mean over processes, the loss is a sum
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    sums = torch.stack([loss.detach(), saturated])
    if WORLD_SIZE > 1:  # as the gradient, which is everyone's already
        torch.distributed.all_reduce(sums)
    return torch.stack([*sums, grad_norm, (grad_norm > max_grad_norm).float()])


class RecordedStep:
    """Record `step`(starts) in a CUDA graph and replay it: no waiting for Python, and new dropout with each replay."""

    def __init__(self, step):
        self.step, self.calls, self.graph = step, 0, torch.cuda.CUDAGraph()

    def __call__(self, starts):
        self.calls += 1
        if self.calls <= 5:  # warm up on a side stream, as a capture wants it
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                metrics = self.step(starts)
            torch.cuda.current_stream().wait_stream(side)
            return metrics
        if self.calls == 6:
            self.starts = starts.clone()
            with torch.cuda.graph(self.graph):
                self.metrics = self.step(self.starts)
        self.starts.copy_(starts)
        self.graph.replay()
        return self.metrics


def find_device(args):
    """Return the device that is asked for; where torchrun has started several processes, join them."""
    if WORLD_SIZE > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(timeout=timedelta(hours=12))  # the first one evaluates, the others wait
    name = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def train(args, folder, load=load_backbone):
    """Train and evaluate as `args` say, going on from `folder`/latest.pt if it is there.

    Leaves TensorBoard events, checkpoints and summary.json in `folder`. The windows and the dropout of an epoch follow
    from the seed and the epoch's number alone: a run that was interrupted gives the numbers of one that was not.
    """
    device = find_device(args)
    env = make_env(args, args.num_eval_episodes)
    data = OfflineData(args, env, device)
    max_timestep = max(1000, env.spec.max_episode_steps or 0, int(data.timesteps.max()) + 1)
    torch.manual_seed(args.seed)
    blocks, final_norm, weights, source = load(args)
    model = DecisionTransformer(blocks, final_norm, data.states.shape[1], data.actions.shape[1], max_timestep)
    model.transformer.load_state_dict(model.transformer.state_dict() | weights)
    start = dict(step=0, records=[], history=[])  # one record per epoch, one line of history per logging interval
    if (folder / "latest.pt").exists():
        model, start = load_model(folder / "latest.pt", device)
    step, records, history = start["step"], start["records"], start["history"]

    model.to(device)
    epsilon = 1e-6 if "ln_f.weight" in weights else 1e-8  # as in the reference, where one replaced block does not count
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, eps=epsilon, fused=True)
    if records:
        optimizer.load_state_dict(start["optimizer"])
    learning_rate = torch.tensor(args.learning_rate, device=device)  # a tensor, so that a CUDA graph reads it anew
    optimizer.param_groups[0].update(lr=learning_rate, capturable=device.type == "cuda")
    trained = nn.parallel.DistributedDataParallel(model) if WORLD_SIZE > 1 else model
    torch._dynamo.reset()  # or the ninth model of a study would run uncompiled
    loss_function = torch.compile(training_loss) if device.type == "cuda" else training_loss
    step_function = partial(training_step, loss_function, trained, optimizer, data, args)
    if device.type == "cuda" and WORLD_SIZE == 1:
        step_function = RecordedStep(step_function)

    if RANK == 0:
        print(f"\n{folder}: weights from {source}, {len(data.states):,} steps of {args.dataset}")
        writer = SummaryWriter(folder, purge_step=step + 1, flush_secs=10)
        rows = [f"|{name}|{value}|" for name, value in asdict(args).items()]
        writer.add_text("hyperparameters", "\n".join(["|argument|value|", "|-|-|", *rows]))
    log_interval = max(1, args.steps_per_epoch // 25)

    for epoch in range(len(records), args.num_epochs + 1):  # epoch 0 only evaluates: the model before fine-tuning
        started = time.perf_counter()
        num_steps = args.steps_per_epoch if epoch else 0
        rng = np.random.default_rng([args.seed, epoch])
        starts = torch.as_tensor(rng.integers(len(data.states), size=(num_steps, args.batch_size)), device=device)
        torch.manual_seed(int(rng.integers(2**60)) + RANK)  # dropout
        metrics = torch.zeros(num_steps, len(METRICS), device=device)
        model.train()
        bar = tqdm(starts, desc=f"epoch {epoch}/{args.num_epochs}", unit="step", disable=RANK > 0 or epoch == 0)
        for i, batch in enumerate(bar):
            step += 1
            learning_rate.fill_(args.learning_rate * min(step / max(args.warmup_steps, 1), 1))
            metrics[i] = step_function(batch)
            if RANK == 0 and ((i + 1) % log_interval == 0 or i + 1 == num_steps):
                means = metrics[i // log_interval * log_interval : i + 1].mean(0).tolist()  # waits for the device
                if not np.isfinite(means).all():
                    stop(f"loss or gradient is not finite at step {step}; try a lower --learning-rate.")
                bar.set_postfix(loss=f"{means[0]:.4f}", refresh=False)
                history.append(dict(zip(METRICS, means), step=step))
                for name, value in zip(METRICS, means):
                    writer.add_scalar(f"train/{name}", value, step)
        if RANK > 0:
            continue  # the first process evaluates and writes

        returns, lengths = evaluate(model, env, data, args)
        mean_return = returns.mean().item()
        low, high = np.percentile(rng.choice(returns, (10_000, len(returns))).mean(axis=1), (2.5, 97.5))  # bootstrap
        record = dict(epoch=epoch, step=step, **dict(zip(METRICS, metrics.mean(0).tolist())))  # nan in epoch 0
        record |= dict(return_mean=mean_return, return_low=low.item(), return_high=high.item())
        record |= dict(length_mean=lengths.mean().item(), normalized_score=normalized_score(args.env, mean_return))
        records.append(record | dict(seconds=time.perf_counter() - started))
        for name in ("return_mean", "length_mean", "normalized_score"):
            writer.add_scalar(f"eval/{name}", record[name], step)
        tqdm.write(f"epoch {epoch}: return {mean_return:.1f}, 95 % interval {low:.1f} to {high:.1f}")

        checkpoint = dict(epoch=epoch, step=step, args=asdict(args), architecture=model.architecture)
        checkpoint |= dict(model=model.state_dict(), state_mean=data.state_mean, state_std=data.state_std)
        if epoch in args.save_epochs or epoch == args.num_epochs:
            save(folder / f"epoch_{epoch}.pt", partial(torch.save, checkpoint))
        if epoch > 0 and mean_return >= max(record["return_mean"] for record in records[1:]):
            save(folder / "best.pt", partial(torch.save, checkpoint))
        checkpoint |= dict(optimizer=optimizer.state_dict(), records=records, history=history)
        save_json(folder / "summary.json", dict(args=asdict(args), source=source, epochs=records, history=history))
        save(folder / "latest.pt", partial(torch.save, checkpoint))


# ======================================================================================================================
# Gradients of single windows
# ======================================================================================================================
def window_gradients(model, windows, names, chunk_size):
    """Gradient of each single window's loss for the parameters `names`: {name: [windows, numel]}.

    `windows` is what OfflineData.windows returns. The other parameters are constants: only these gradients are held.
    """
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    wanted = {name: parameters.pop(name) for name in names}

    def loss(wanted, *window):
        call = partial(torch.func.functional_call, model, wanted | parameters)
        window = [x.unsqueeze(0) for x in window]
        return training_loss(lambda *inputs: call(inputs), window, window[-1].sum())[0]

    per_window = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0, 0, 0))
    chunks = []
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        for chunk in zip(*(x.split(chunk_size) for x in windows)):
            chunks.append({name: gradient.flatten(1) for name, gradient in per_window(wanted, *chunk).items()})
    return {name: torch.cat([chunk.pop(name) for chunk in chunks]) for name in names}


def gradient_statistics(model, windows, num_confusion, chunk_size):
    """Norms and pairwise cosines of single windows' gradients, exactly and in bounded memory.

    Returns the norms over the blocks' parameters and over all parameters, both [windows], and the cosines over those of
    the blocks between the first `num_confusion` windows [n, n]. Gradients are held for one block at a time: its part of
    an inner product is added up. That takes 2.8 GB for 100 windows of GPT-2 small, instead of 17 GB for 50.
    """
    groups = [[f"transformer.h.{i}.{n}" for n, _ in h.named_parameters()] for i, h in enumerate(model.transformer.h)]
    in_blocks = list(itertools.chain(*groups))
    groups.append([name for name, _ in model.named_parameters() if name not in in_blocks])
    squares = torch.zeros(len(groups), len(windows[0]), dtype=torch.float64)  # of the norms
    inner_products = torch.zeros(num_confusion, num_confusion, dtype=torch.float64)
    for i, names in enumerate(tqdm(groups, desc="gradients", unit="block", leave=False)):
        for gradient in window_gradients(model, windows, names, chunk_size).values():
            squares[i] += gradient.square().sum(1).cpu()
            if i < len(model.transformer.h):
                inner_products += (gradient[:num_confusion] @ gradient[:num_confusion].T).cpu()
    length = inner_products.diagonal().sqrt()
    cosines = inner_products / (length[:, None] * length).clamp(min=1e-30)
    return squares[:-1].sum(0).sqrt().numpy(), squares.sum(0).sqrt().numpy(), cosines.numpy()


def clipped_norm(in_blocks, total, max_grad_norm):
    """What is left of the blocks' gradient where clip_grad_norm_ has clipped over all parameters; 0 leaves it alone."""
    return in_blocks * np.minimum(1, max_grad_norm / total) if max_grad_norm else in_blocks


def batch_gradient(model, windows, max_grad_norm):
    """Norm of each parameter set of the blocks in the clipped gradient of all windows as one batch (Fig. 7)."""
    model.zero_grad()
    training_loss(model, windows, windows[-1].sum())[0].backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    return {name: weight.grad.norm().item() for name, weight in model.transformer.h.named_parameters()}


# ======================================================================================================================
# Analysis: how far the parameters have moved, and everything about one checkpoint
# ======================================================================================================================
def change(before, after):
    """l2 distance, relative distance and cosine of two vectors; nan where one starts at zero and has no direction."""
    distance, length = torch.linalg.vector_norm(after - before).item(), torch.linalg.vector_norm(before).item()
    lengths = length * torch.linalg.vector_norm(after).item()
    cosine = (before @ after).item() / lengths if lengths else math.nan
    return dict(distance=distance, relative_distance=distance / length if length else math.nan, cosine=cosine)


def parameter_change(before, after):
    """Change from one state dict to another (section 5.3): of each parameter set of the blocks, and of all together."""
    sets = [name for name in before if name.startswith("transformer.h.")]
    pairs = [(before[name].flatten().cpu().double(), after[name].flatten().cpu().double()) for name in sets]
    whole = change(*(torch.cat(vectors) for vectors in zip(*pairs)))
    return {name.removeprefix("transformer.h."): change(*pair) for name, pair in zip(sets, pairs)}, whole


def analyse(folder, epoch, args):
    """Analyse the checkpoint of `epoch` of the run in `folder` in float32; returns all that table and figures show."""
    run_args, records, _ = read_run(folder)
    epoch = records[-1]["epoch"] if epoch is None else epoch
    device = find_device(args)
    start, model = (load_model(folder / f"epoch_{e}.pt", device)[0] for e in (0, epoch))
    data = OfflineData(run_args, make_env(run_args, 1), device)
    starts = np.random.default_rng(args.seed).integers(
        len(data.states), size=args.norm_windows
    )  # the same in every run
    windows = data.windows(torch.as_tensor(starts, device=device), run_args.context_length)
    in_blocks, total, cosines = gradient_statistics(model, windows, args.confusion_windows, args.chunk_size)
    clip, pairs = run_args.max_grad_norm, cosines[np.triu_indices(len(cosines), 1)]
    sets, whole = parameter_change(start.state_dict(), model.state_dict())
    set_norms = batch_gradient(model, windows, clip)
    for name, values in sets.items():
        values |= dict(norm=set_norms[name], share=set_norms[name] / sum(set_norms.values()))
    result = dict(run=f"{folder.name}, epoch {epoch}", backbone=Path(run_args.backbone).name, epoch=epoch)
    result |= dict(env=run_args.env, K=run_args.context_length, seed=run_args.seed, clip=clip, sample=run_args.sample)
    result |= dict(norm_before=total, norm_after=clipped_norm(in_blocks, total, clip), cosines=pairs)
    result |= dict(median_norm=np.median(total), clipped_windows=np.mean(total > clip) if clip else 0.0)
    result |= dict(clipped_steps=records[epoch]["clipped_fraction"], confusion=pairs.min(), mean_cosine=pairs.mean())
    return result | whole | dict(sets=sets, records=records)


# ======================================================================================================================
# Figures
# ======================================================================================================================
def new_figure(results, what, width, height):
    """An empty figure of `width` x `height` inches with `what` it shows of which environment, K and seeds as title."""
    seeds = ", ".join(sorted({str(result["seed"]) for result in results}))
    sample = ", bundled sample" * results[0]["sample"]
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{results[0]['env']}, K = {results[0]['K']}, seed {seeds}{sample}: {what}")
    return figure


def plot_windows(results, args):
    """Gradient norms of single windows before and after clipping, and the cosines of pairs (section 5.4)."""
    what = f"{args.norm_windows} single windows; lowest cosine among {args.confusion_windows}: gradient confusion"
    figure = new_figure(results, what, max(13, len(results)), 5.5)
    panels = dict(
        norm_before="gradient norm", norm_after="of the blocks after clipping", cosines="cosine of two windows"
    )
    for axes, (key, label) in zip(figure.subplots(1, 3), panels.items()):
        names = [result["run"] for result in results]
        drawn = axes.boxplot([result[key] for result in results], tick_labels=names, patch_artist=True, whis=(0, 100))
        for box, median, result in zip(drawn["boxes"], drawn["medians"], results):
            box.set(facecolor=COLORS[result["backbone"]], alpha=0.6)
            median.set(color="black")
        axes.set(ylabel=label, yscale="log" if key == "norm_before" else "linear")
        axes.tick_params("x", rotation=90)
        for level in {0} if key == "cosines" else {result["clip"] for result in results} - {0}:
            axes.axhline(level, color="black", linestyle="--", linewidth=1)
    return figure


def plot_sets(results, what, panels):
    """Bars for each parameter set in network order; `panels` are [(results, key of the set's value, label)].

    Backbones without some of the sets, such as ImageGPT's LayerNorm biases, leave their places empty.
    """
    figure = new_figure(results, what, 15, 3 * len(panels) + 0.8)
    by_size = sorted((result["sets"] for result in results), key=len, reverse=True)  # the fullest model gives the order
    names = sorted(dict.fromkeys(itertools.chain(*by_size)), key=lambda name: int(name.split(".")[0]))
    place = {name: i for i, name in enumerate(names)}
    for axes, (drawn, key, label) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels):
        width = 0.8 / len(drawn)
        for i, result in enumerate(drawn):
            x = [place[name] + (i - (len(drawn) - 1) / 2) * width for name in result["sets"]]
            values = [values[key] for values in result["sets"].values()]
            axes.bar(x, values, width, color=COLORS[result["backbone"]], label=result["run"])
        if key == "cosine":
            lowest = np.nanmin([values[key] for result in drawn for values in result["sets"].values()])
            axes.set_ylim(lowest - 0.1 * (1 - lowest), 1)
        ticks = place if len(place) <= 60 else {name: i for name, i in place.items() if name.endswith("ln_1.weight")}
        axes.set_xticks(list(ticks.values()), list(ticks), rotation=90, fontsize="x-small")
        axes.set(ylabel=label, xlim=(-1, len(place)), yscale="log" if key == "relative_distance" else "linear")
        axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_clipping(results):
    """Action error, return and gradient norm per epoch, without clipping dotted (App. G.3)."""
    figure = new_figure(results, "clipping at work", 13, 3.8)
    panels = dict(loss="mean squared action error", return_mean="return", grad_norm="gradient norm before clipping")
    for axes, (key, label) in zip(figure.subplots(1, 3), panels.items()):
        for name, result in {result["run"].partition(", epoch")[0]: result for result in results}.items():
            style, color = "-o" if result["clip"] else ":o", COLORS[result["backbone"]]
            values = [record[key] for record in result["records"]]
            axes.plot(values, style, markersize=3, color=color, label=name)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    return figure


# ======================================================================================================================
# Experiment
# ======================================================================================================================
@dataclass
class Run(Args):  # the arguments of one training run of the study
    backbone: str = "gpt2"
    max_grad_norm: float = 0.25


if __name__ == "__main__":
    args, folder = parse_arguments()
    if not 2 <= args.confusion_windows <= args.norm_windows or args.chunk_size < 1 or min(args.max_grad_norms) < 0:
        stop("--confusion-windows must be from 2 to --norm-windows, --chunk-size from 1, --max-grad-norms from 0.")
    if not args.runs and max(args.epochs, default=0) > args.num_epochs:
        stop(f"--epochs {max(args.epochs)} is beyond --num-epochs {args.num_epochs}.")
    args.save_epochs = (0, *args.save_epochs, *args.epochs)
    folders = [Path(run) for run in args.runs]
    try:
        for backbone, clip in itertools.product(args.backbones, args.max_grad_norms) if not args.runs else ():
            folders.append(folder / f"{Path(backbone).name}_clip_{clip:g}")
            train(Run(**asdict(args), backbone=backbone, max_grad_norm=clip), folders[-1])
    except KeyboardInterrupt:
        stop(f"Interrupted; go on with: python {SCRIPT}.py --resume {folder}", status=130)
    if RANK > 0:
        sys.exit()

    checkpoints = list(itertools.product(folders, args.epochs or (None,)))
    results = [analyse(*checkpoint, args) for checkpoint in tqdm(checkpoints, desc="analysis", unit="checkpoint")]
    save_json(folder / "results.json", results)
    changes = [(results, key, key.replace("_", " ")) for key in ("distance", "relative_distance", "cosine")]
    figures = {
        "gradient_windows": plot_windows(results, args),
        "gradient_per_set": plot_sets(
            results,
            f"gradient of {args.norm_windows} windows together",
            [([result], "norm", "clipped norm") for result in results],
        ),
        "parameter_change": plot_sets(results, "change of each parameter set since epoch 0", changes),
        "clipping": plot_clipping(results),
    }
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png", args.num_epochs)
    formats = dict(run="", median_norm=".3f", clipped_windows=".0%", clipped_steps=".0%", confusion=".3f")
    formats |= dict(distance=".2f", relative_distance=".4f", cosine=".5f")
    print_table(results, formats)
    print("\nlargest shares, norm of the set / sum of the norms of all sets of the blocks:")
    for result in results:
        largest = sorted(result["sets"].items(), key=lambda item: -item[1]["share"])[:4]
        print(f"{result['run']}:", ", ".join(f"{name} {values['share']:.0%}" for name, values in largest))
    print(f"{folder}: results.json and {len(figures)} figures; or: tensorboard --logdir runs")
