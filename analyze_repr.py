"""Open up the representations: what does fine-tuning leave of them, and what do they know about the data?

    python analyze_repr.py --sample                                          # bundled inputs, two CPU cores
    python analyze_repr.py --backbones random gpt2 igpt --env Hopper-v4      # fine-tunes each for 40 epochs
    python analyze_repr.py --runs runs/ONE runs/ANOTHER --epochs 0 40        # checkpoints of the other scripts
    python analyze_repr.py --runs runs/ONE --mine-paper-settings             # MINE as the paper ran it

Paper: S. Takagi, "On the Effect of Pre-training for Transformer in Different Modality on Offline Reinforcement
Learning", NeurIPS 2022, https://arxiv.org/abs/2211.09817 (sections 5.1 and 5.2, App. D, E and H.2).
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
    runs: tuple[str, ...] = ()
    """run folders of dt_pretrained.py or dt_no_context.py whose checkpoints are analysed instead of training"""
    epochs: tuple[int, ...] = ()
    """the two epochs to compare, before and after fine-tuning; if not given, 0 and the last"""
    cka_windows: int = 100
    """windows on which activations are compared; 0 leaves CKA out"""
    cka_threshold: float = 0.23
    """layers whose CKA before and after fine-tuning is above this are counted"""
    mine_windows: int = 5000
    """windows to train the estimators of mutual information on, and as many held-out ones; 0 leaves MINE out"""
    mine_batch_size: int = 500
    """windows per training step of an estimator"""
    mine_passes: int = 20
    """passes over the training windows"""
    mine_repeats: int = 3
    """seeds with which every estimate is repeated"""
    mine_steps: int | None = None
    """time steps of the window at which information is estimated, evenly spaced; if not given, all K"""
    mine_group: int = 100
    """estimators trained side by side; changes memory, not results"""
    mine_paper_settings: bool = False
    """100 windows, batches of 50, 1,000 passes, raw inputs, read off the training windows: memorization counts too"""

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
    save_epochs: tuple[int, ...] = (0,)
    """epochs after which a checkpoint is kept, 0 being before training; the last is always kept"""
    run_name: str | None = None
    """folder under runs/; if not given, {env}__{script}__study__{seed}__{time}"""
    resume: str | None = None
    """folder to go on with, what is trained stays; its arguments hold, only --num-epochs may be given anew"""


# What --sample changes where the user did not say otherwise; models that small need no dropout.
SAMPLE = dict(batch_size=8, learning_rate=1e-3, warmup_steps=700, dropout=0.0, num_epochs=2, steps_per_epoch=700)
SAMPLE |= dict(
    num_eval_episodes=8, cka_threshold=0.8, mine_windows=1500, mine_batch_size=150, mine_repeats=1, mine_steps=2
)


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
# Activations: what every layer says about a window
# ======================================================================================================================
TOKENS = ("return", "state", "action")  # the three tokens of a time step, in their order
LAYERS = ("ln_1", "attn.c_attn", "attn.c_proj", "attn.resid_dropout")
LAYERS += ("ln_2", "mlp.c_fc", "mlp.act", "mlp.c_proj", "mlp.dropout")
BLOCK_OUTPUT = "mlp.dropout"  # what the paper calls a block's output: before it is added to the residual stream


def layer_names(num_blocks):
    """All layers in the order of computation: ["0.ln_1", "0.attn.c_attn", ...], nine per block."""
    return [f"{block}.{layer}" for block, layer in itertools.product(range(num_blocks), LAYERS)]


@torch.no_grad()
def activations(model, windows, wanted, chunk_size=250):
    """Outputs of layers for windows, on the CPU: {layer: [tokens, windows, width]}.

    `windows` is what OfflineData.windows returns; `wanted` is {layer: [positions of its tokens among the 3K]}.
    """
    parts = {layer: [] for layer in wanted}

    def keep(layer):
        return lambda module, inputs, output: parts[layer].append(output[:, wanted[layer]].transpose(0, 1).cpu())

    hooks = [model.transformer.h.get_submodule(layer).register_forward_hook(keep(layer)) for layer in wanted]
    for returns_to_go, states, actions, timesteps, _ in zip(*(x.split(chunk_size) for x in windows)):
        model(returns_to_go, states, actions, timesteps)
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(parts.pop(layer), dim=1) for layer in wanted}


# ======================================================================================================================
# CKA: how similar two layers represent the same windows (section 5.1)
# ======================================================================================================================
def gram_matrices(layers):
    """U-centred Gram matrices of layers, each of length 1: a list of [windows, width] to [layers, windows * windows].

    U-centring (Székely and Rizzo 2014) makes inner products of Gram matrices unbiased estimates of HSIC, up to a factor
    that CKA does not see: the debiased estimator of Kornblith et al. 2019. A constant layer has no direction: nan.
    """
    rows = []
    for x in layers:
        x = x.double()
        x = x - x[0]  # changes no distance between windows, keeps the digits, and makes a constant zero
        n, gram = len(x), (x @ x.T).fill_diagonal_(0)
        sums = gram.sum(0)
        gram = gram - (sums[:, None] + sums) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
        gram = gram.fill_diagonal_(0).flatten()
        rows.append(gram / torch.linalg.vector_norm(gram))
    return torch.stack(rows)


def cka(grams_a, grams_b):
    """Linear CKA of all layers of one model with all of another: [layers a, layers b], between about 0 and 1."""
    return grams_a @ grams_b.T


def align(values, num_blocks):
    """Bring values per layer, nine per block, to another number of blocks: [9 * blocks] to [9 * num_blocks].

    A layer is averaged with its namesakes in the neighbouring blocks, each weighed by how much of the target block it
    overlaps, so that a LayerNorm stays one. The released code averages neighbouring layers of different kinds.
    """
    values = np.asarray(values).reshape(-1, len(LAYERS))
    edges, targets = np.linspace(0, 1, len(values) + 1), np.linspace(0, 1, num_blocks + 1)
    overlap = np.minimum(edges[1:], targets[1:, None]) - np.maximum(edges[:-1], targets[:-1, None])
    return (overlap.clip(min=0) * num_blocks @ values).flatten()


# ======================================================================================================================
# Mutual information: many small estimators side by side (section 5.2)
# ======================================================================================================================
class StatisticsNetworks(nn.Module):
    """The statistics networks of many estimators: [estimators, batch, features] to [estimators, batch].

    Each is features -> 400 -> 400 -> 400 -> 1 with ReLU; all start from the same weights, drawn as nn.Linear does. They
    share nothing afterwards: batched matrix products only train them at the same time.
    """

    def __init__(self, num_estimators, num_features, generator):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        sizes = (num_features, 400, 400, 400, 1)
        for n_in, n_out in itertools.pairwise(sizes):
            layer = (2 * torch.rand(1, n_in + 1, n_out, generator=generator) - 1) / n_in**0.5
            self.weights.append(nn.Parameter(layer[:, :-1].repeat(num_estimators, 1, 1)))
            self.biases.append(nn.Parameter(layer[:, -1:].repeat(num_estimators, 1, 1)))

    def forward(self, x):
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, F.relu(x) if i else x, weight)
        return x.squeeze(-1)


def donsker_varadhan(joint, marginal):
    """The bound E_joint[T] - log E_marginal[exp T] in nats: [estimators, samples] twice to [estimators]."""
    return joint.mean(1) - (torch.logsumexp(marginal, 1) - math.log(marginal.shape[1]))


def train_estimators(x, t, seed, args):
    """Estimate the mutual information of each x[i] with t[i] by MINE (Belghazi et al. 2018).

    `x` is [estimators, windows, features] and `t` [estimators, windows, width]: the first half of the windows trains
    them, the second half is held out. Returns held-out and training estimates in nats [2, estimators], nan where
    one has diverged. All see the windows in the same order, so that they differ by their data only.
    """
    device, half, batch_size = x.device, x.shape[1] // 2, args.mine_batch_size
    generator = torch.Generator().manual_seed(seed)
    if not args.mine_paper_settings:  # no information is gained or lost by units, but a network learns better in these
        x, t = ((v - v[:, :half].mean(1, keepdim=True)) / (v[:, :half].std(1, keepdim=True) + 1e-6) for v in (x, t))
    networks = StatisticsNetworks(len(x), x.shape[-1] + t.shape[-1], generator).to(device)
    optimizer = torch.optim.Adam(networks.parameters(), 1e-4, fused=True)

    def statistics(windows, partners):
        """T on pairs that belong together, and with x from the partners on pairs that do not."""
        joint, marginal = (torch.cat([x[:, chosen], t[:, windows]], dim=-1) for chosen in (windows, partners))
        return networks(torch.cat([joint, marginal], dim=1)).chunk(2, dim=1)

    average = None
    for _ in tqdm(range(args.mine_passes), desc=f"MINE of {len(x)} pairs", unit="pass", leave=False):
        order = torch.randperm(half, generator=generator)[: half // batch_size * batch_size]
        for windows in order.split(batch_size):
            partners = windows[torch.randperm(batch_size, generator=generator)]
            joint, marginal = statistics(windows.to(device), partners.to(device))
            mean_exp = marginal.exp().mean(1)
            average = mean_exp.detach() if average is None else torch.lerp(average, mean_exp.detach(), 0.01)
            loss = mean_exp / average - joint.mean(1)  # its gradient is the bound's, less biased in small batches
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()

    estimates = []
    for first in (half, 0):
        windows, partners = torch.arange(half) + first, torch.randperm(half, generator=generator) + first
        with torch.no_grad():
            pairs = zip(windows.to(device).split(batch_size), partners.to(device).split(batch_size))
            parts = [statistics(*pair) for pair in pairs]
        bound = donsker_varadhan(*(torch.cat(columns, dim=1) for columns in zip(*parts)))
        estimates.append(torch.where(bound.isfinite(), bound, math.nan))
    return torch.stack(estimates).cpu()


def mutual_information(pairs, args, device):
    """Estimate the mutual information of each pair of variables ([windows, features], [windows, width]).

    The pairs have equal shapes. Returns held-out and training estimates in nats, [2, pairs, args.mine_repeats].
    """
    repeats = []
    for seed in range(args.seed, args.seed + args.mine_repeats):
        groups = []
        for first in range(0, len(pairs), args.mine_group):
            x, t = (torch.stack(variable).to(device) for variable in zip(*pairs[first : first + args.mine_group]))
            groups.append(train_estimators(x, t, seed, args))
        repeats.append(torch.cat(groups, dim=1))
    return torch.stack(repeats, dim=-1).double().numpy()


# ======================================================================================================================
# Questions: whose information (Fig. 2, App. E and H.2)
# ======================================================================================================================
def question(analysis, quantity, block, variable, representation):
    """A question, without its answer: the information of a (token, step) of the data and one of a representation.

    Figures show it at the token and step that it is about, which is not the label in Fig. 2.
    """
    token, step = representation if (analysis, quantity) == ("context", "I(Y;T)") else variable
    where = dict(analysis=analysis, quantity=quantity, block=block, token=token, step=step, control=False)
    return where | dict(variable=variable, representation=representation)


def questions_about_model(num_blocks, context_length, steps):
    """What the paper asks of one model at some time steps.

    "context" (Fig. 2) is I(x_t; T(s_K)), which is I(X;T), and I(a_K; T(x_t)), which is I(Y;T), for every token x_t but
    a_K in a shallow, a middle and a deep block. "no context" (App. E) is I(s_t; T(s_t)) and I(a_t; T(s_t)) in all.
    """
    questions, last = [], context_length - 1
    for block, step in itertools.product(range(num_blocks), steps):
        questions.append(question("no context", "I(X;T)", block, ("state", step), ("state", step)))
        questions.append(question("no context", "I(Y;T)", block, ("action", step), ("state", step)))
    for block, step in itertools.product(sorted({0, num_blocks // 2, num_blocks - 1}), steps):
        for token in TOKENS if step < last else TOKENS[:2]:
            questions.append(question("context", "I(X;T)", block, (token, step), ("state", last)))
            questions.append(question("context", "I(Y;T)", block, ("action", last), (token, step)))
    return questions


def questions_about_data(steps):
    """What the paper asks of the data alone (App. H.2): I(s_t; a_t) and I(R_t; a_t)."""
    questions = [question("data", "I(s;a)", None, ("state", step), ("action", step)) for step in steps]
    return questions + [question("data", "I(R;a)", None, ("return", step), ("action", step)) for step in steps]


def answer(questions, windows, representations, args, run):
    """Answer `questions` by MINE; adds "held_out" and "training" estimates in nats [repeats] and the name of the run.

    `windows` is what OfflineData.windows returns, `representations` {(block, token, step): [windows, width]}. The last
    question of each kind and block is asked once more as a control, with the windows of the data shuffled.
    """
    controls = {(q["analysis"], q["quantity"], q["block"]): q | dict(control=True) for q in questions}
    rng, half = np.random.default_rng(args.seed), len(windows[0]) // 2
    shuffled = torch.as_tensor(np.concatenate([rng.permutation(half), rng.permutation(half) + half]))
    answers = []
    for token, values in zip(TOKENS, windows):
        about_token = [q for q in [*questions, *controls.values()] if q["variable"][0] == token]
        pairs = []
        for q in about_token:
            x = values[:, q["variable"][1]].cpu()
            pairs.append((x[shuffled] if q["control"] else x, representations[q["block"], *q["representation"]]))
        if pairs:
            estimates = mutual_information(pairs, args, values.device)
            answers += [q | dict(run=run, held_out=a, training=b) for q, a, b in zip(about_token, *estimates)]
    return answers


# ======================================================================================================================
# Analysis: the models before and after fine-tuning
# ======================================================================================================================
def choose_windows(data, context_length, args):
    """Choose whole windows at random: for CKA, and for MINE as many again from other episodes to be held out."""
    starts, ends = torch.arange(len(data.states)), data.episode_ends.cpu()
    whole = starts + context_length <= ends
    odd = torch.unique(ends, return_inverse=True)[1] % 2 == 1
    rng, chosen = np.random.default_rng(args.seed), []
    for pool, count in ((whole, args.cka_windows), (whole & ~odd, args.mine_windows), (whole & odd, args.mine_windows)):
        if pool.sum() < count:
            stop(f"The data set has {pool.sum()} whole windows, not {count}: lower --cka-windows or --mine-windows.")
        chosen.append(torch.as_tensor(rng.choice(starts[pool], count, replace=False)).to(data.states.device))
    return data.windows(chosen[0], context_length), data.windows(torch.cat(chosen[1:]), context_length)


def compare_layers(before, after, windows):
    """Gram matrices of all layers at the last step: {("before" or "after", token): [layers, windows * windows]}."""
    last_step = [3 * windows[0].shape[1] + i for i in (-3, -2, -1)]
    grams = {}
    for when, model in (("before", before), ("after", after)):
        outputs = activations(model, windows, dict.fromkeys(layer_names(len(model.transformer.h)), last_step))
        for i, token in enumerate(TOKENS):
            grams[when, token] = gram_matrices([output[i] for output in outputs.values()])
    return grams


def measure_information(model, windows, args, steps, run):
    """Answer the paper's questions about one model."""
    questions = questions_about_model(len(model.transformer.h), windows[0].shape[1], steps)
    needed = sorted({(q["block"], *q["representation"]) for q in questions})
    wanted = {}
    for block, token, step in needed:
        wanted.setdefault(f"{block}.{BLOCK_OUTPUT}", []).append(3 * step + TOKENS.index(token))
    outputs = itertools.chain(*activations(model, windows, wanted).values())
    return answer(questions, windows, dict(zip(needed, outputs)), args, run)


def analyse(folders, args):
    """Analyse finished runs in float32, all on the same windows.

    Returns one result per run, and the answers about mutual information in all of them and in the data.
    """
    runs = [read_run(folder) for folder in folders]
    env, dataset, K = (getattr(runs[0][0], name) for name in ("env", "dataset", "context_length"))
    if any((run_args.env, run_args.dataset, run_args.context_length) != (env, dataset, K) for run_args, _, _ in runs):
        stop("The runs cannot be shown the same windows: --env, --dataset and --context-length must be equal.")
    device = find_device(args)
    data = OfflineData(runs[0][0], make_env(runs[0][0], 1), device)
    cka_windows, mine_windows = choose_windows(data, K, args)
    steps = sorted({round(step) for step in np.linspace(K - 1, 0, min(args.mine_steps or K, K))})
    information = []
    if args.mine_windows:
        representations = {(None, "action", step): mine_windows[2][:, step].cpu() for step in steps}
        information = answer(questions_about_data(steps), mine_windows, representations, args, "data")
    results = []
    for folder, (run_args, records, _) in zip(folders, tqdm(runs, desc="analysis", unit="model")):
        epochs = args.epochs or (0, records[-1]["epoch"])
        before, after = (load_model(folder / f"epoch_{epoch}.pt", device)[0] for epoch in epochs)
        backbone, num_blocks = Path(run_args.backbone).name, len(after.transformer.h)
        result = dict(run=folder.name, backbone=backbone, env=env, K=K, seed=run_args.seed, num_blocks=num_blocks)
        result["sample"] = run_args.sample
        result["grams"] = compare_layers(before, after, cka_windows) if args.cka_windows else None
        if args.mine_windows:
            information += measure_information(after, mine_windows, args, steps, folder.name)
        results.append(result)
    return results, information


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


def similarity(result, token):
    """CKA of each layer before and after fine-tuning [layers]."""
    return (result["grams"]["before", token] * result["grams"]["after", token]).sum(1).numpy()


def plot_cka(results, args):
    """CKA of every layer before and after fine-tuning over depth, LayerNorms marked (section 5.1)."""
    figure = new_figure(
        results, f"CKA before and after fine-tuning, {args.cka_windows} windows; diamonds: LayerNorms", 15, 4.5
    )
    num_blocks = min(result["num_blocks"] for result in results)
    names = layer_names(num_blocks)
    depth = (np.arange(len(names)) + 0.5) / len(names)
    norms = [i for i, name in enumerate(names) if ".ln_" in name]
    for axes, token in zip(figure.subplots(1, 3, sharey=True), TOKENS):
        for result in results:
            values, color = align(similarity(result, token), num_blocks), COLORS[result["backbone"]]
            axes.plot(depth, values, ".-", color=color, label=result["run"], linewidth=1)
            axes.plot(depth[norms], values[norms], "D", color=color, markersize=5)
        axes.axhline(args.cka_threshold, color="black", linestyle="--", linewidth=0.8)
        axes.set(title=f"{token} token of the last step", xlabel="depth, 0 first layer, 1 last")
    figure.axes[0].set_ylabel("linear CKA, debiased")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_heat_maps(results, token):
    """CKA of all layers with all layers: of each model before and after, and between the fine-tuned ones (App. D)."""
    panels = [(a, a, when) for when in ("before", "after") for a in results]
    panels += [(a, b, "after") for a, b in itertools.combinations(results, 2)]
    columns = max(len(results), 2)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(results, f"CKA of all layers at the last {token} token", 4 * columns + 1, 3.8 * rows + 0.8)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (a, b, when) in zip(grid, panels):
        values = cka(a["grams"][when, token], b["grams"][when, token]).numpy()
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", origin="lower")
        axes.set(title=f"{when} fine-tuning", xlabel=f"layer of {b['run']}", ylabel=f"layer of {a['run']}")
    for unused in grid[len(panels) :]:
        unused.set_axis_off()
    figure.colorbar(image, ax=list(grid), label="linear CKA, debiased", shrink=0.5)
    return figure


def select(answers, **properties):
    """The answers to questions with these properties, in the order in which they were asked."""
    return [a for a in answers if all(a[name] == value for name, value in properties.items())]


def plot_mutual_information(results, information, estimate, settings):
    """Information over the position of the token, in a shallow, a middle and a deep block (Fig. 2)."""
    figure = new_figure(results, f"information about input X and label Y\n{settings}", 14, 8)
    grid, last = figure.subplots(2, 3, sharex=True, sharey="row"), results[0]["K"] - 1
    for panels, quantity in zip(grid, ("I(X;T)", "I(Y;T)")):
        panels[0].set_ylabel(f"{quantity}, nats")
        for result in results:
            answers = select(information, run=result["run"], analysis="context", quantity=quantity)
            color = COLORS[result["backbone"]]
            for axes, block in zip(panels, sorted({a["block"] for a in answers})):
                for token, marker in dict(zip(TOKENS, "^ox")).items():
                    points = select(answers, control=False, block=block, token=token)
                    steps = [a["step"] - last for a in points]
                    mean, std = ([over_repeats(a[estimate]) for a in points] for over_repeats in (np.mean, np.std))
                    style = dict(color=color, marker=marker, linewidth=0.6, label=f"{result['run']}, {token}")
                    axes.errorbar(steps, mean, std, **style)
                (control,) = select(answers, control=True, block=block)
                axes.axhline(np.mean(control[estimate]), color=color, linestyle="--", linewidth=1)
    for top, bottom, depth in zip(*grid, ("shallow", "middle", "deep")):
        top.set_title(f"{depth} block")
        bottom.set_xlabel("time step of the token, 0 the last")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_information_per_block(results, information, estimate, settings):
    """Information about the same step's state and action in every block, mean and spread over the steps (App. E)."""
    figure = new_figure(results, f"information about the same step\n{settings}", 12, 4.5)
    formulas = {"I(X;T)": "I(s_t; T(s_t))", "I(Y;T)": "I(a_t; T(s_t))"}
    for axes, (quantity, formula) in zip(figure.subplots(1, 2), formulas.items()):
        for result in results:
            answers = select(information, run=result["run"], analysis="no context", quantity=quantity)
            color, num_blocks = COLORS[result["backbone"]], result["num_blocks"]
            depth = (np.arange(num_blocks) + 0.5) / num_blocks
            values = np.mean([a[estimate] for a in select(answers, control=False)], axis=1).reshape(num_blocks, -1)
            axes.errorbar(depth, values.mean(1), values.std(1), color=color, marker="o", capsize=3, label=result["run"])
            controls = np.mean([a[estimate] for a in select(answers, control=True)], axis=1)
            axes.plot(depth, controls, "--", color=color, linewidth=1)
        axes.set(ylabel=f"{formula}, nats", xlabel="depth, 0 first block, 1 last")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_information_in_data(results, information, estimate, settings):
    """Information between action and state or return-to-go of the same step, one point per step (App. H.2)."""
    figure = new_figure(results, f"information in the data\n{settings}", 7, 4.5)
    axes = figure.subplots()
    for place, quantity in enumerate(("I(s;a)", "I(R;a)")):
        values = [
            np.mean(a[estimate]) for a in select(information, analysis="data", control=False, quantity=quantity)
        ]  # [steps]
        (control,) = select(information, analysis="data", control=True, quantity=quantity)
        axes.boxplot([values], positions=[place], widths=0.3, tick_labels=[quantity])
        axes.plot(np.full(len(values), place), values, ".", color=COLORS["other"])
        axes.hlines(np.mean(control[estimate]), place - 0.3, place + 0.3, color="black", linestyle="--", linewidth=1)
    axes.set_ylabel("nats")
    return figure


# ======================================================================================================================
# Experiment
# ======================================================================================================================
@dataclass
class Run(Args):  # the arguments of one training run of the study
    backbone: str = "gpt2"


if __name__ == "__main__":
    args, folder = parse_arguments()
    if args.mine_paper_settings:
        args = replace(args, mine_windows=100, mine_batch_size=50, mine_passes=1000)
    if len(args.epochs) not in (0, 2) or (not args.runs and max(args.epochs, default=0) > args.num_epochs):
        stop(f"--epochs takes the two epochs to compare, none beyond the last, but is {args.epochs}.")
    if args.cka_windows in (1, 2, 3) or min(args.cka_windows, args.mine_windows) < 0:
        stop("--cka-windows must be at least 4, which the debiased estimator needs; it and --mine-windows may be 0.")
    if (
        min(args.mine_batch_size, args.mine_repeats, args.mine_group) < 1
        or 0 < args.mine_windows < args.mine_batch_size
    ):
        stop("--mine-batch-size, --mine-repeats and --mine-group start at 1, --mine-windows at --mine-batch-size.")
    args.save_epochs = (0, *args.save_epochs, *args.epochs)
    folders = [Path(run) for run in args.runs]
    try:
        for backbone in args.backbones if not args.runs else ():
            folders.append(folder / Path(backbone).name)
            train(Run(**asdict(args), backbone=backbone), folders[-1])
    except KeyboardInterrupt:
        stop(f"Interrupted; go on with: python {SCRIPT}.py --resume {folder}", status=130)
    if RANK > 0:
        sys.exit()

    results, information = analyse(folders, args)
    figures, cka_rows, mine_rows = {}, [], []
    if args.cka_windows:
        figures["cka_before_after"] = plot_cka(results, args)
        figures |= {f"cka_heat_maps_{token}": plot_heat_maps(results, token) for token in TOKENS}
        for result, token in itertools.product(results, TOKENS):
            layers = dict(zip(layer_names(result["num_blocks"]), similarity(result, token)))
            above = [name for name, value in layers.items() if value > args.cka_threshold]
            row = dict(run=result["run"], token=token, mean_cka=np.nanmean(list(layers.values())), layers=layers)
            row |= dict(layers_above=len(above), layer_norms_above=sum(".ln_" in name for name in above))
            cka_rows.append(row)
        print(f"\nCKA before and after fine-tuning; layers above {args.cka_threshold:g}, LayerNorms among them")
        print_table(cka_rows, dict(run="", token="", mean_cka=".3f", layers_above="d", layer_norms_above="d"))
    if args.mine_windows:
        estimate, read_off = ("training", "training") if args.mine_paper_settings else ("held_out", "held-out")
        settings = f"MINE, {args.mine_windows} windows, {args.mine_passes} passes, {read_off}; dashed: data shuffled"
        for plot in (plot_mutual_information, plot_information_per_block, plot_information_in_data):
            figures[plot.__name__.removeprefix("plot_")] = plot(results, information, estimate, settings)
        for run, analysis, quantity in dict.fromkeys((a["run"], a["analysis"], a["quantity"]) for a in information):
            key = dict(run=run, analysis=analysis, quantity=quantity)
            answers, controls = (select(information, **key, control=control) for control in (False, True))
            means = {name: np.nanmean([a[name] for a in answers]) for name in ("held_out", "training")}
            mine_rows.append(key | means | dict(shuffled=np.nanmean([a[estimate] for a in controls])))
        print("\nMutual information in nats, mean over blocks and steps")
        print_table(mine_rows, dict(run="", analysis="", quantity="", held_out=".3f", training=".3f", shuffled=".3f"))
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png", args.num_epochs)
    save_json(folder / "results.json", dict(cka=cka_rows, mutual_information=information))
    print(f"{folder}: results.json and {len(figures)} figures; or: tensorboard --logdir runs")
