"""Fine-tune without context: how well does a Decision Transformer do that sees only the current step?

    python dt_no_context.py --sample                                                # bundled inputs, two CPU cores
    python dt_no_context.py --backbone gpt2 --env Hopper-v4 --compare runs/EARLIER  # K = 20 beside K = 1 (Fig. 8)
    python dt_no_context.py --backbone gpt2 --env Hopper-v4 --num-epochs 10 --replace-blocks all    # section 5.6.1

Paper: S. Takagi, "On the Effect of Pre-training for Transformer in Different Modality on Offline Reinforcement
Learning", NeurIPS 2022, https://arxiv.org/abs/2211.09817 (sections 5.5 and 5.6, Table 2).
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
from matplotlib import colormaps
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
    backbone: str = "gpt2"
    """gpt2, igpt, igpt-as-gpt2 (the released code's way of loading ImageGPT), random (1 head, ReLU, as in the paper),
    random-gpt2 (GPT-2's architecture), markov, markov-sharp, any hub id or folder of a GPT-2 or ImageGPT checkpoint"""
    env: str = "Hopper-v4"
    """gymnasium environment: Hopper, HalfCheetah or Walker2d, -v4 or -v5; others need --dataset and --target-return"""
    dataset: str | None = None
    """Minari id, or D4RL .hdf5 file; if not given, mujoco/{hopper,halfcheetah,walker2d}/medium-v0"""
    sample: bool = False
    """run on the small bundled data and backbones, settings that are not given chosen for two CPU cores"""

    context_length: int = 1
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
    max_grad_norm: float = 0.25
    """gradients longer than this are shortened to it; 0 switches clipping off (App. G.3)"""
    num_epochs: int = 40
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
    save_epochs: tuple[int, ...] = (0, 1, 4)
    """epochs after which a checkpoint is kept, 0 being before training; the last is always kept"""
    run_name: str | None = None
    """folder under runs/; if not given, {env}__{script}__{backbone}__{seed}__{time}"""
    resume: str | None = None
    """run folder to go on with; its arguments hold, only --num-epochs may be given anew"""

    compare: tuple[str, ...] = ()
    """folders of runs of this script or of dt_pretrained.py to draw and list beside this one"""
    replace_blocks: tuple[int | Literal["all"], ...] = ()
    """train a random model with this block of --backbone in it; several or all: one run each (section 5.6.1)"""
    attention_epochs: tuple[int, ...] = (0, 4)
    """epochs after which attention distances are measured, the first being what the others are compared with"""
    attention_windows: int = 100
    """windows of 20 steps on which attention distances are measured; 0 for none"""


# What --sample changes where the user did not say otherwise; models that small need no dropout.
SAMPLE = dict(learning_rate=1e-3, warmup_steps=1000, dropout=0.0, num_epochs=3, steps_per_epoch=1000)
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
# Block replacement: one pre-trained block in a random model
# ======================================================================================================================
def load_mixture(args, block):
    """Return what `load_backbone` does, for the study's random model in the depth and width of `args.backbone`.

    If `block` is not None, that one is the backbone's, with its own heads, activation and LayerNorm.
    """
    pretrained, _, weights, source = load_backbone(args)
    width = pretrained[0].n_embd
    blocks = [BlockConfig(width, 1, 4 * width, "relu", dropout=args.dropout)] * len(pretrained)
    if block is None:
        return blocks, "gpt2", {}, f"seed {args.seed}"
    blocks[block] = pretrained[block]
    weights = {name: value for name, value in weights.items() if name.startswith(f"h.{block}.")}
    return blocks, "gpt2", weights, f"seed {args.seed}, block {block} from {source}"


def runs_to_train(args):
    """Return {run: how to load its model}: a single one, or the random, the pre-trained and one per replaced block."""
    if not args.replace_blocks:
        return {"": load_backbone}
    num_blocks = len(load_backbone(args)[0])
    replaced = range(num_blocks) if "all" in args.replace_blocks else args.replace_blocks
    if args.backbone.startswith("random") or not set(replaced) <= set(range(num_blocks)):
        stop(f"--replace-blocks takes blocks 0 to {num_blocks - 1} of a pre-trained --backbone, such as gpt2 or igpt.")
    runs = {"random": partial(load_mixture, block=None), Path(args.backbone).name: load_backbone}
    return runs | {f"block_{block}": partial(load_mixture, block=block) for block in replaced}


# ======================================================================================================================
# Attention distance: how many tokens back a block looks
# ======================================================================================================================
ATTENTION_CONTEXT = 20  # steps of the windows, also for models trained with K = 1


def attention_weights(attention, x):
    """The weights that `attention` uses for its input x [batch, tokens, width]: [batch, heads, tokens, tokens]."""
    query, key, _ = attention.c_attn(x).unflatten(-1, (3, attention.n_head, -1)).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)


def mean_distance(weights):
    """Mean over queries i of sum_j weights(i, j) |i - j| in tokens (Dosovitskiy et al. 2020), [..., tokens, tokens]."""
    position = torch.arange(weights.shape[-1], device=weights.device)
    distance = (position[:, None] - position).abs()
    return (weights * distance).sum(-1).mean(-1)


@torch.no_grad()
def attention_distances(model, windows):
    """Attention distance in tokens of every head: [windows, blocks, heads], nan where a block has fewer heads."""
    returns_to_go, states, actions, timesteps, _ = windows
    x = model.embed(returns_to_go, states, actions, timesteps)
    most_heads = max(block.attn.n_head for block in model.transformer.h)
    distances = []
    for block in model.transformer.h:
        heads = mean_distance(attention_weights(block.attn, block.ln_1(x)))
        distances.append(F.pad(heads, (0, most_heads - block.attn.n_head), value=math.nan))
        x = block(x)
    return torch.stack(distances, dim=1).cpu().numpy()


def measure_attention(folder, args):
    """Return the attention distances after each of args.attention_epochs: {epoch: [windows, blocks, heads]}."""
    device = find_device(args)
    data = OfflineData(args, make_env(args, 1), device)
    remaining = data.episode_ends.cpu() - torch.arange(len(data.states))
    whole = (remaining >= ATTENTION_CONTEXT).nonzero()[:, 0]
    if len(whole) == 0:
        stop(f"{args.dataset} has no episode of {ATTENTION_CONTEXT} steps; --attention-windows 0 goes without.")
    starts = np.random.default_rng(args.seed).choice(whole, args.attention_windows)
    windows = data.windows(torch.as_tensor(starts, device=device), ATTENTION_CONTEXT)
    checkpoints = {epoch: folder / f"epoch_{epoch}.pt" for epoch in args.attention_epochs}
    return {e: attention_distances(load_model(path, device)[0], windows) for e, path in checkpoints.items()}


def gap(distances, epoch):
    """Change of each window's attention distance, mean over heads, since the first epoch: [windows, blocks]."""
    first = next(iter(distances))
    return np.abs(np.nanmean(distances[epoch], axis=2) - np.nanmean(distances[first], axis=2))


# ======================================================================================================================
# Figures
# ======================================================================================================================
def plot_runs(runs, args):
    """Draw return, action error and saturation per epoch of `runs` [(name, arguments, records)].

    K = 1 is solid, longer contexts are dashed (Fig. 8). Where blocks are replaced, curves are smoothed as in section
    5.6.1, by a moving average that keeps 0.8 of the past, and the deeper the block, the lighter its colour.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    what = "fine-tuning without context"
    if args.replace_blocks:
        what = f"one block of {args.backbone} in a random model, moving averages"
    figure.suptitle(f"{args.env}: {what}{', bundled sample' * args.sample}")
    panels = dict(return_mean="return", loss="mean squared action error", saturated_fraction="share of |action| > 0.99")
    for axes, (key, label) in zip(figure.subplots(1, 3), panels.items()):
        for name, run_args, records in runs:
            values = [record[key] for record in records if record[key] == record[key]]  # no training before epoch 1
            color = COLORS[name]
            if args.replace_blocks:
                values = list(itertools.accumulate(values, lambda mean, value: 0.8 * mean + 0.2 * value))
            if name.startswith("block_"):
                color = colormaps["viridis"](int(name.removeprefix("block_")) / len(runs))
            style = "-o" if run_args.context_length == 1 else "--o"
            text = f"{name}, K = {run_args.context_length}, seed {run_args.seed}"
            epochs = range(len(records) - len(values), len(records))
            axes.plot(epochs, values, style, markersize=3, color=color, label=text)
            if key == "return_mean" and not args.replace_blocks:  # 95 % bootstrap interval over episodes
                low, high = ([record[end] for record in records] for end in ("return_low", "return_high"))
                axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="epoch", ylabel=label)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    return figure


def plot_attention(distances, name, args):
    """Draw the gap |d(epoch) - d(first)| per window and block as boxes, and the mean distance of each head."""
    first, *others = distances
    figure = Figure(figsize=(4 * (len(others) + len(distances)), 4), layout="constrained")
    what = f"attention distance of {name or args.backbone} on {args.attention_windows} windows"
    figure.suptitle(
        f"{args.env}, {what}, K = {args.context_length}, seed {args.seed}{', bundled sample' * args.sample}"
    )
    axes = figure.subplots(1, len(others) + len(distances), squeeze=False)[0]
    for panel, epoch in zip(axes, others):
        panel.boxplot(
            gap(distances, epoch), tick_labels=range(distances[first].shape[1]), flierprops=dict(markersize=2)
        )
        panel.set(xlabel="block", ylabel="gap in tokens", title=f"|d(epoch {epoch}) - d(epoch {first})| per window")
    means = {epoch: values.mean(axis=0) for epoch, values in distances.items()}  # [blocks, heads] each
    color_range = dict(vmin=min(map(np.nanmin, means.values())), vmax=max(map(np.nanmax, means.values())))
    for panel, (epoch, mean) in zip(axes[len(others) :], means.items()):
        image = panel.imshow(mean, aspect="auto", cmap="viridis", **color_range)
        panel.set(xlabel="head", ylabel="block", title=f"mean distance, epoch {epoch}")
        panel.set(xticks=range(mean.shape[1]), yticks=range(len(mean)))
    figure.colorbar(image, ax=list(axes[len(others) :]), label="tokens")
    return figure


# ======================================================================================================================
# Experiment
# ======================================================================================================================
if __name__ == "__main__":
    args, folder = parse_arguments()
    args.attention_epochs = tuple(sorted({min(epoch, args.num_epochs) for epoch in args.attention_epochs}))
    args.save_epochs = (*args.save_epochs, *args.attention_epochs)
    compared = [read_run(other) for other in args.compare]
    names = runs_to_train(args)
    try:
        for name, load in names.items():
            train(args, folder / name, load)
    except KeyboardInterrupt:
        stop(f"Interrupted; go on with: python {SCRIPT}.py --resume {folder}", status=130)
    if RANK > 0:
        sys.exit()

    attention = []
    for name in names if args.attention_windows > 0 else ():
        distances = measure_attention(folder / name, args)
        save_figure(plot_attention(distances, name, args), folder / name / "attention_distance.png", args.num_epochs)
        for epoch, values in distances.items():
            for block, heads in enumerate(values.mean(axis=0)):
                median_gap = np.median(gap(distances, epoch)[:, block])
                attention.append(
                    dict(run=name, epoch=epoch, block=block, distance_per_head=heads, median_gap=median_gap)
                )

    runs = [(name or args.backbone, *read_run(folder / name)[:2]) for name in names]
    runs += [(Path(run_args.backbone).name, run_args, records) for run_args, records, _ in compared]
    figure_name = "block_replacement.png" if args.replace_blocks else "no_context.png"
    save_figure(plot_runs(runs, args), folder / figure_name, args.num_epochs)
    rows = []
    for name, run_args, records in runs:
        scores = [record["normalized_score"] for record in records]
        low, high = (normalized_score(run_args.env, records[-1][end]) for end in ("return_low", "return_high"))
        row = dict(run=name, K=run_args.context_length, seed=run_args.seed, best_score=max(scores[1:]))
        row |= dict(last_score=scores[-1], last_low=low, last_high=high)  # with the 95 % interval over episodes
        rows.append(row | dict(last_loss=records[-1]["loss"], last_saturated=records[-1]["saturated_fraction"]))
    save_json(folder / "results.json", dict(runs=rows, attention_distance=attention))
    formats = dict(run="", K="d", seed="d", best_score=".1f", last_score=".1f", last_low=".1f", last_high=".1f")
    print_table(rows, formats | dict(last_loss=".4f", last_saturated=".0%"))
    print(f"{folder}: results.json, {figure_name}, attention_distance.png; or: tensorboard --logdir runs")
