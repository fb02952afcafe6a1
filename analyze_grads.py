"""Who owns the gradient, what clipping does to it, and how far the parameters move.

    python analyze_grads.py --sample                                              # three backbones, two minutes on two cores
    python analyze_grads.py --backbones random gpt2 igpt --env Hopper-v4          # fine-tunes each for one epoch, as the paper
    python analyze_grads.py --runs runs/EARLIER_RUN runs/ANOTHER --epochs 1 40    # analyses checkpoints instead

Paper: S. Takagi, "On the Effect of Pre-training for Transformer in Different Modality on Offline Reinforcement
Learning", NeurIPS 2022, https://arxiv.org/abs/2211.09817 (sections 5.3 and 5.4, App. G.3, Figs. 3 and 4). The sections
from Defaults to Run are those of dt_pretrained.py; Study trains several backbones, and what is particular to this question is
Gradients of single windows, Analysis, Figures and Experiment.
"""

import contextlib
import errno
import itertools
import json
import math
import os
import signal
import sys
import time
import warnings
from collections import defaultdict, namedtuple
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
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
    """starting points to fine-tune and analyse: gpt2, igpt, igpt-as-gpt2, random, random-gpt2, hub ids or local folders"""
    runs: tuple[str, ...] = ()
    """run folders of dt_pretrained.py or dt_no_context.py whose checkpoints are analysed instead of training"""
    epochs: tuple[int, ...] = ()
    """epochs whose checkpoints are analysed; if not given, the last"""
    norm_windows: int = 100
    """windows whose single gradients give norms"""
    confusion_windows: int = 50
    """windows whose single gradients are compared with each other, pair by pair"""
    max_grad_norms: tuple[float, ...] = (0.25,)
    """clipping thresholds; training is repeated for each, 0 switches clipping off (App. G.3)"""
    dropout_in_analysis: bool = False
    """leave dropout on while gradients are analysed, as the released code does"""
    chunk_size: int = 10
    """windows whose gradients are computed at the same time; changes memory, not results"""

    env: str = "Hopper-v4"
    """gymnasium environment: Hopper, HalfCheetah or Walker2d, -v4 or -v5; another one needs --dataset and --target-return"""
    dataset: str | None = None
    """Minari id, folder of a Minari data set, or D4RL .hdf5 file; if not given, mujoco/{hopper,halfcheetah,walker2d}/medium-v0"""
    sample: bool = False
    """run on the small bundled data and backbones, every size that is not set chosen for two minutes on two CPU cores"""

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
    """dropout on the residual branches"""
    attention_dropout: float = 0.1
    """dropout on the attention weights"""
    embedding_dropout: float = 0.1
    """dropout on the backbone's input"""
    num_epochs: int = 1
    """epochs, each followed by an evaluation"""
    steps_per_epoch: int = 2500
    """training steps per epoch"""

    num_eval_episodes: int = 100
    """episodes per evaluation"""
    target_return: float | None = None
    """return the model is asked for; if not given, Hopper 3600, HalfCheetah 6000, Walker2d 5000"""

    n_layer: int | None = None
    """blocks of a random backbone; if not given, 12"""
    n_head: int | None = None
    """attention heads of a random backbone; if not given, random 1, random-gpt2 12"""
    n_embd: int | None = None
    """width of a random backbone; if not given, 768"""
    activation: Literal["relu", "gelu", "gelu_new", "quick_gelu"] | None = None
    """activation of a random backbone; if not given, random relu, random-gpt2 gelu_new"""

    seed: int = 666
    """fixes initial weights, windows, dropout and evaluation episodes"""
    device: str = "auto"
    """auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, mps"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """of matrix products, weights are always float32; auto is bf16 where the device computes with it"""
    save_epochs: tuple[int, ...] = (0, 1)
    """epochs after which a checkpoint is kept, 0 being before training; the last is always kept"""
    run_name: str | None = None
    """folder under runs/; if not given, {env}__{script}__{seed}__{time}"""
    resume: str | None = None
    """folder of the run to go on with, the others follow; arguments hold, but for --num-epochs, --save-epochs and --device"""

    backbone: tyro.conf.Suppress[str] = "random"
    """which of the backbones is being trained; set by the script"""
    max_grad_norm: tyro.conf.Suppress[float] = 0.25
    """which of the thresholds is in force; set by the script"""
    study: tyro.conf.Suppress[str] = ""
    """all arguments as they were given, in a run that is one of several; set by the script"""


# What --sample changes where the user did not say otherwise.
SAMPLE = Args(
    sample=True, batch_size=32, learning_rate=2e-3, warmup_steps=400, num_epochs=1, steps_per_epoch=300, num_eval_episodes=8,
)  # fmt: skip


# ======================================================================================================================
# Defaults: what depends on the environment, the device and the other arguments
# ======================================================================================================================
# What the study fixes per environment; D4RL's returns of a random policy and of an expert give the normalized score.
Task = namedtuple("Task", "dataset target_return random_return expert_return")
TASKS = {
    "Hopper": Task("mujoco/hopper/medium-v0", 3600, -20.272305, 3234.3),
    "HalfCheetah": Task("mujoco/halfcheetah/medium-v0", 6000, -280.178953, 12135.0),
    "Walker2d": Task("mujoco/walker2d/medium-v0", 5000, 1.629008, 4592.3),
}
RETURN_SCALE = 1000  # returns-to-go are divided by this before they enter the model


def stop(message):
    """End the program with one sentence on stderr and exit status 2: the user can put this right."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, also beside a progress bar
    raise SystemExit(2)


def resolve(args):
    """Fill in what depends on other arguments and refuse what cannot work."""
    env_name = args.env.rsplit("-v", 1)[0]
    task, bundled = TASKS.get(env_name), ASSETS / f"{env_name.lower()}-medium"
    if task is None and None in (args.dataset, args.target_return):
        stop(f"{args.env} is not one of the study's environments ({', '.join(TASKS)}): give --dataset and --target-return.")
    least = dict(context_length=1, batch_size=1, num_epochs=1, steps_per_epoch=1, num_eval_episodes=1)
    least |= dict(learning_rate=0, weight_decay=0, warmup_steps=0, max_grad_norm=0)
    least |= dict(dropout=0, attention_dropout=0, embedding_dropout=0)
    for name, bound in least.items():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if not bound <= value < (1 if "dropout" in name else math.inf):
            stop(f"{flag} must be at least {bound}{' and below 1' if 'dropout' in name else ''}, but is {value}.")
    if args.batch_size % WORLD_SIZE or args.num_eval_episodes < WORLD_SIZE:
        stop(f"--batch-size must be a multiple of the {WORLD_SIZE} processes, and --num-eval-episodes not below it.")

    args.dataset = args.dataset or (str(bundled) if args.sample else task.dataset)
    args.dataset = str(Path(args.dataset).resolve()) if Path(args.dataset).exists() else args.dataset
    args.target_return = task.target_return if args.target_return is None else args.target_return
    if args.device == "cuda" or args.device == "auto" and torch.cuda.is_available():
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    args.device = "cpu" if args.device == "auto" else args.device
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        stop(f"--device {args.device} cannot be used here ({first_line(error)}); try --device cpu.")
    if args.precision == "auto":
        on_cpu = torch.cpu.get_capabilities()  # without these instructions bf16 is slower than float32
        has_bf16 = on_cpu.get("avx512_bf16") or on_cpu.get("amx_bf16") if args.device == "cpu" else args.device != "mps"
        args.precision = "bf16" if has_bf16 else "fp32"

    architecture = ("n_layer", "n_head", "n_embd", "activation")
    if args.backbone in ("random", "random-gpt2"):
        n_layer, n_head, n_embd = (4, 4, 128) if args.sample else (12, 12, 768)
        defaults = (n_layer, 1, n_embd, "relu") if args.backbone == "random" else (n_layer, n_head, n_embd, "gelu_new")
        for name, default in zip(architecture, defaults):
            setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
        if min(args.n_layer, args.n_head, args.n_embd) < 1 or args.n_embd % args.n_head:
            stop(f"--n-embd {args.n_embd} must be a positive multiple of --n-head {args.n_head}, and --n-layer positive.")
    elif any(getattr(args, name) is not None for name in architecture) and not getattr(args, "replace_blocks", None):
        stop("--n-layer, --n-head, --n-embd and --activation are for the random backbones; a checkpoint brings its own.")
    elif Path(args.backbone).is_dir():
        args.backbone = str(Path(args.backbone).resolve())
    if args.run_name is None:
        parts = (args.env, SCRIPT, backbone_name(args.backbone), args.seed, int(time.time()))
        args.run_name = "__".join(map(str, parts)).replace("/", "--")
    return args


def backbone_name(backbone):
    return Path(backbone).name if os.path.isabs(backbone) else backbone


def first_line(error):
    """Class and first line of an exception's text, without a closing full stop."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.') if lines else 'no details'}"


# ======================================================================================================================
# Model: a GPT that can be a GPT-2 and an ImageGPT, and the Decision Transformer around it
# ======================================================================================================================
@dataclass(frozen=True)
class GPTConfig:
    """Architecture of a backbone. `layer_norm` is "gpt2" or "imagegpt"."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int = 3072
    activation: str = "gelu_new"
    layer_norm: str = "gpt2"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    resid_dropout: float = 0.2
    attn_dropout: float = 0.1
    embd_dropout: float = 0.1


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


LAYER_NORMS = {"gpt2": nn.LayerNorm, "imagegpt": nn.RMSNorm}  # ImageGPT subtracts no mean and has no bias
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "gelu_new": lambda: nn.GELU(approximate="tanh"), "quick_gelu": QuickGELU}


class Conv1D(nn.Module):
    """A linear layer with its weight stored [in, out], as in the checkpoints. Starts at N(0, 0.02), bias 0."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class Attention(nn.Module):
    """Causal multi-head self-attention; [batch, tokens, width] to the same."""

    def __init__(self, config, block_index):
        super().__init__()
        self.n_head = config.n_head
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= block_index + 1
        self.attn_dropout = config.attn_dropout
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x):
        # each [batch, heads, tokens, width / heads]
        query, key, value = (y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in self.c_attn(x).chunk(3, dim=-1))
        dropout = self.attn_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=self.scale)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.n_inner)
        self.act = ACTIVATIONS[config.activation]()
        self.c_proj = Conv1D(config.n_inner, config.n_embd)
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config, block_index):
        super().__init__()
        layer_norm = LAYER_NORMS[config.layer_norm]
        self.ln_1 = layer_norm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, block_index)
        self.ln_2 = layer_norm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Blocks and final normalization, named as in the checkpoints. No word and no position embedding."""

    def __init__(self, config):
        super().__init__()
        self.drop = nn.Dropout(config.embd_dropout)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = LAYER_NORMS[config.layer_norm](config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, x):  # [batch, tokens, width]
        x = self.drop(x)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class DecisionTransformer(nn.Module):
    """Predict each step's action from the returns-to-go, states and actions up to it (Chen et al. 2021).

    As in the study, the time embedding is added after the LayerNorm of the token embeddings and the action head is the
    transposed action embedding (can-wikipedia-help-offline-rl, decision_transformer/models/decision_transformer.py).
    Attention is causal and there is no position embedding, so windows are padded on the right and need no mask.
    """

    def __init__(self, config, state_dim, act_dim, max_timestep):
        super().__init__()
        self.embed_timestep = nn.Embedding(max_timestep, config.n_embd)
        self.embed_return = nn.Linear(1, config.n_embd)
        self.embed_state = nn.Linear(state_dim, config.n_embd)
        self.embed_action = nn.Linear(act_dim, config.n_embd)
        self.embed_ln = nn.LayerNorm(config.n_embd)
        self.transformer = GPT(config)

    def embed(self, returns_to_go, states, actions, timesteps):
        """Return the tokens R_1 s_1 a_1 R_2 s_2 a_2 ... of the backbone, [batch, 3K, width]."""
        tokens = (self.embed_return(returns_to_go), self.embed_state(states), self.embed_action(actions))
        tokens = self.embed_ln(torch.stack(tokens, dim=2))  # [batch, K, 3, width]
        return (tokens + self.embed_timestep(timesteps).unsqueeze(2)).flatten(1, 2)

    def forward(self, returns_to_go, states, actions, timesteps):
        """[batch, K, 1], [batch, K, state_dim], [batch, K, act_dim], [batch, K] to actions in (-1, 1): [batch, K, act_dim]."""
        hidden = self.transformer(self.embed(returns_to_go, states, actions, timesteps)).unflatten(1, (-1, 3))
        return torch.tanh(F.linear(hidden[:, :, 1], self.embed_action.weight.T))


def rebuild_model(checkpoint, device):
    """Return the model of a checkpoint that any of the scripts has written, in evaluation mode."""
    architecture = dict(checkpoint["architecture"])
    config, blocks = GPTConfig(**architecture.pop("config")), architecture.pop("blocks", {})
    model = DecisionTransformer(config, **architecture)
    for index, block_config in blocks.items():  # those that replace the random model's (section 5.6.1)
        model.transformer.h[index] = Block(GPTConfig(**block_config), index)
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval()


# ======================================================================================================================
# Backbones: where the Transformer starts
# ======================================================================================================================
HUB_IDS = {"gpt2": "openai-community/gpt2", "igpt": "openai/imagegpt-small", "igpt-as-gpt2": "openai/imagegpt-small"}
SAMPLE_FOLDERS = {"gpt2": "text-gpt2", "igpt": "image-gpt", "igpt-as-gpt2": "image-gpt"}


def load_backbone(args):
    """Return the backbone's GPTConfig, its weights by name (None for random ones) and where they came from."""
    dropouts = dict(resid_dropout=args.dropout, attn_dropout=args.attention_dropout, embd_dropout=args.embedding_dropout)
    if args.backbone in ("random", "random-gpt2"):
        config = GPTConfig(args.n_layer, args.n_head, args.n_embd, 4 * args.n_embd, args.activation, **dropouts)
        return config, None, f"fresh weights, seed {args.seed}"

    source = HUB_IDS.get(args.backbone, args.backbone)
    if args.sample and args.backbone in SAMPLE_FOLDERS:
        source = str(ASSETS / SAMPLE_FOLDERS[args.backbone])
    checkpoint, report = read_pretrained(source)
    missing = [*report["missing_keys"], *report["mismatched_keys"]]
    left_over = [key for key in report["unexpected_keys"] if key != "lm_head.weight"]
    if missing or left_over:
        stop(f"{source} is not a complete GPT-2 or ImageGPT: missing or misshapen {missing[:3]}, left over {left_over[:3]}.")
    theirs = checkpoint.config
    if theirs.activation_function not in ACTIVATIONS:
        stop(f"{source} uses the activation {theirs.activation_function}; known here are {', '.join(ACTIVATIONS)}.")
    same = ("n_layer", "n_head", "n_embd", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx")
    config = GPTConfig(
        **{name: getattr(theirs, name) for name in same},
        n_inner=theirs.n_inner or 4 * theirs.n_embd,
        activation=theirs.activation_function,
        layer_norm=theirs.model_type,
        **dropouts,
    )
    # A Decision Transformer brings its own embeddings.
    weights = {name: value for name, value in checkpoint.state_dict().items() if not name.startswith(("wte.", "wpe."))}
    if args.backbone == "igpt-as-gpt2":
        config = replace(config, layer_norm="gpt2")  # which subtracts the mean and has a bias that ImageGPT does not know
        norms = [name for name in weights if name.split(".")[-2].startswith("ln_")]
        weights |= {name.replace("weight", "bias"): torch.zeros_like(weights[name]) for name in norms}
    return config, weights, source


def read_pretrained(source):
    """Load a transformers GPT2Model or ImageGPTModel in float32 from a folder, the hub's cache or the hub.

    Returns the model and transformers' report of missing, unexpected and mismatched keys.
    """
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # no background request to convert .bin files
    from huggingface_hub import HfApi, constants
    from transformers import AutoConfig, GPT2Model, ImageGPTModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def read(**options):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        if config.model_type not in ("gpt2", "imagegpt"):
            stop(f"{source} is a {config.model_type} model; --backbone takes GPT-2 and ImageGPT checkpoints.")
        model_class = GPT2Model if config.model_type == "gpt2" else ImageGPTModel
        options |= dict(config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
        return model_class.from_pretrained(source, **options)

    try:
        return read(local_files_only=True)
    except Exception as error:
        if Path(source).is_dir():
            stop(f"the folder {source} holds no readable GPT-2 or ImageGPT checkpoint: {first_line(error)}.")
    try:
        HfApi().model_info(source, timeout=10)  # one request: loading would retry for half a minute before it fails
        return read()
    except Exception as error:
        stop(
            f"the backbone {source} is neither a local folder nor in the hub's cache ({constants.HF_HUB_CACHE}), and the hub "
            f"does not have it or cannot be reached ({first_line(error)}); known names are {', '.join(HUB_IDS)}, random and "
            "random-gpt2; go online, give a local folder, or try --sample."
        )


# ======================================================================================================================
# Starting point: the model before training
# ======================================================================================================================
def make_model(args, shape):
    """Return the model that training starts from, its architecture [dict], where its weights came from, and AdamW's eps."""
    config, weights, source = load_backbone(args)
    model = DecisionTransformer(config, **shape)
    if weights is not None:
        model.transformer.load_state_dict(weights)  # strict: every name and shape must be there
    return model, dict(config=asdict(config), **shape), source, 1e-8 if weights is None else 1e-6


# ======================================================================================================================
# Data: the whole data set as flat tensors on the device
# ======================================================================================================================
@dataclass
class OfflineData:
    """N transitions, one episode after the other. A batch of windows is an index lookup."""

    states: torch.Tensor  # [N, state_dim], normalized
    actions: torch.Tensor  # [N, act_dim], in [-1, 1]
    returns_to_go: torch.Tensor  # [N, 1], undiscounted, divided by RETURN_SCALE
    timesteps: torch.Tensor  # [N], steps since the episode's start
    episode_ends: torch.Tensor  # [N], index one past the last transition of the same episode
    state_mean: torch.Tensor  # [state_dim]
    state_std: torch.Tensor  # [state_dim], with 1e-6 added
    num_episodes: int
    dataset_id: str

    def windows(self, starts, context_length):
        """Cut one window of K steps from each start [batch].

        Returns returns_to_go [batch, K, 1], states, actions, timesteps [batch, K] and the mask of valid steps
        [batch, K]; steps past the end of the episode are zeros.
        """
        index = starts.unsqueeze(1) + torch.arange(context_length, device=starts.device)
        valid = index < self.episode_ends[starts].unsqueeze(1)
        index = torch.where(valid, index, 0)
        mask = valid.unsqueeze(-1)
        parts = [x[index] * mask for x in (self.returns_to_go, self.states, self.actions)]
        return *parts, self.timesteps[index] * valid, valid


def load_data(args, env):
    """Load `args.dataset` to `args.device` as OfflineData that fits `env`, a gymnasium vector environment."""
    path = Path(args.dataset)
    if path.suffix in (".hdf5", ".h5"):
        episodes, dataset_id, recorded_in = read_d4rl(path), path.name, None
    else:
        episodes, dataset_id, recorded_in = read_minari(args.dataset)
    lengths = np.array([[len(column) for column in episode] for episode in episodes]).reshape(-1, 3)
    if (lengths != lengths[:, :1]).any():
        stop(f"the data set {args.dataset} has an episode whose observations, actions and rewards differ in number.")
    if lengths.size == 0 or lengths.min() == 0:
        stop(f"the data set {args.dataset} has {'episodes without a step' if episodes else 'no episode'}.")
    lengths = lengths[:, 0]
    states, actions, rewards = (np.concatenate(part, dtype=np.float32) for part in zip(*episodes))
    for name, values in (("observations", states), ("actions", actions), ("rewards", rewards)):
        if not np.isfinite(values).all():
            stop(f"the data set {args.dataset} has non-finite {name}.")
    theirs = (states.shape[1:], actions.shape[1:])
    ours = (env.single_observation_space.shape, env.single_action_space.shape)
    if theirs != ours:
        stop(
            f"the data set {args.dataset} has observations {theirs[0]} and actions {theirs[1]}, "
            f"but {args.env} has {ours[0]} and {ours[1]}; choose a --dataset of the same environment."
        )
    if recorded_in not in (None, args.env) and RANK == 0:
        print(f"warning: {dataset_id} was recorded in {recorded_in} and is used for {args.env}.", file=sys.stderr)

    returns_to_go = [np.cumsum(r[::-1], dtype=np.float64)[::-1] / RETURN_SCALE for _, _, r in episodes]
    mean, std = states.mean(0, dtype=np.float64), states.std(0, dtype=np.float64) + 1e-6
    center, half_range = action_range(env)

    def tensor(x, dtype=torch.float32):
        return torch.as_tensor(np.ascontiguousarray(x)).to(args.device, dtype)

    return OfflineData(
        states=tensor((states - mean) / std),
        actions=tensor((actions - center) / half_range),
        returns_to_go=tensor(np.concatenate(returns_to_go)[:, None]),
        timesteps=tensor(np.concatenate([np.arange(n) for n in lengths]), torch.int64),
        episode_ends=tensor(np.repeat(np.cumsum(lengths), lengths), torch.int64),
        state_mean=tensor(mean),
        state_std=tensor(std),
        num_episodes=len(episodes),
        dataset_id=dataset_id,
    )


def read_d4rl(path):
    """Return a list of (observations [T, ...], actions [T, ...], rewards [T]) from a D4RL file; T is an episode's length.

    An episode ends where `terminals` or `timeouts` is set. The steps after the last end belong to an episode that was
    never finished and are left out, as in the reference (can-wikipedia-help-offline-rl, data/download_d4rl_datasets.py).
    """
    import h5py

    if not path.is_file():
        stop(f"there is no data set file {path}.")
    try:
        with h5py.File(path) as file:
            names = ("observations", "actions", "rewards", "terminals", "timeouts")
            observations, actions, rewards, terminals, timeouts = (file[name][()] for name in names)
    except (OSError, KeyError, RuntimeError) as error:
        stop(f"{path} cannot be read as a D4RL file, it is damaged or no such file: {first_line(error)}")
    ends = np.flatnonzero(terminals.astype(bool) | timeouts.astype(bool)) + 1
    return list(zip(*(np.split(x, ends)[:-1] for x in (observations, actions, rewards))))


def read_minari(dataset):
    """Return the episodes as `read_d4rl` does, the data set's id and the environment that it was recorded in.

    `dataset` is a folder, or an id that is looked up in the local Minari folder and downloaded if it is not there.
    """
    import minari
    from huggingface_hub import HfApi
    from minari.storage.datasets_root_dir import get_dataset_path

    folder = Path(dataset) if Path(dataset).is_dir() else get_dataset_path(dataset)
    if not folder.is_dir():
        try:
            if "MINARI_REMOTE" not in os.environ:  # one request: a download would retry for half a minute before it fails
                HfApi().dataset_info(f"farama-minari/{dataset.split('/')[0]}", timeout=10)
            minari.download_dataset(dataset)
        except Exception as error:
            stop(
                f"the data set {dataset} is neither a folder nor in the local Minari folder ({get_dataset_path()}), and "
                f"Minari's hub does not have it or cannot be reached ({first_line(error)}); go online, give a folder or a D4RL "
                ".hdf5 file as --dataset, or try --sample."
            )
    data_folder = folder / "data" if (folder / "data").is_dir() else folder
    try:
        data = minari.MinariDataset(data_folder)
        episodes = [(e.observations[: len(e.actions)], e.actions, e.rewards) for e in data.iterate_episodes()]
    except Exception as error:
        stop(f"{folder} cannot be read as a Minari data set, it is damaged or no such folder: {first_line(error)}")
    if any(isinstance(x, (dict, tuple)) for episode in episodes[:1] for x in episode):
        stop(f"the data set {dataset} has dictionary or tuple observations or actions; only flat Box spaces can be used.")
    return episodes, data.spec.dataset_id, data.spec.env_spec.id if data.spec.env_spec else None


# ======================================================================================================================
# Evaluation: all episodes at once
# ======================================================================================================================
def make_env(args, num_copies, render_mode=None):
    """Return a gymnasium vector environment with `num_copies` of `args.env`."""
    import gymnasium as gym

    warnings.filterwarnings("ignore", message=".*is out of date.*")  # -v4 is what the paper used
    with contextlib.suppress(Exception):  # what is wrong with mujoco, making the environment will say
        import mujoco

        # HalfCheetah's model file sets off a deprecation warning for every copy; anything else should be seen.
        mujoco.set_mju_user_warning(lambda text: "deprecated" in text or print(f"mujoco: {text}", file=sys.stderr))
    try:
        env = gym.make_vec(args.env, num_copies, vectorization_mode="sync", render_mode=render_mode)
    except Exception as error:
        renderer = f"; MUJOCO_GL={os.environ['MUJOCO_GL']} may be why" if "MUJOCO_GL" in os.environ else ""
        stop(f"the environment {args.env} cannot be made ({first_line(error)}{renderer}).")
    for space in (env.single_observation_space, env.single_action_space):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            stop(f"{args.env} has the space {space}; only environments with flat Box spaces can be used.")
    return env


def action_range(env):
    """Center and half range of the action space, which map it to [-1, 1]; 0 and 1 where it is unbounded."""
    low, high = env.single_action_space.low, env.single_action_space.high
    bounded = np.isfinite(low) & np.isfinite(high)
    low, high = np.where(bounded, low, -1), np.where(bounded, high, 1)
    return (high + low) / 2, (high - low) / 2


@torch.no_grad()
def evaluate(model, env, data, args, seeds, after_step=None):
    """Play one episode in each copy of `env`, started with these seeds and asking for `args.target_return`.

    Returns the episodes' undiscounted returns and lengths in steps, both [episodes]. As in the Decision Transformer's
    evaluation, the return-to-go falls by each reward and the model sees the last K steps. A signal cuts it short.
    `after_step`, if given, is called with the number of each step that has been made.
    """
    model.eval()
    num_episodes, K = env.num_envs, args.context_length
    horizon = env.spec.max_episode_steps or 1000
    center, half_range = action_range(env)
    states = torch.zeros(num_episodes, horizon + K, len(data.state_mean), device=args.device)
    actions = torch.zeros(num_episodes, horizon + K, len(center), device=args.device)
    returns_to_go = torch.zeros(num_episodes, horizon + K, 1, device=args.device)
    timesteps = torch.arange(horizon + K, device=args.device).clamp(max=model.embed_timestep.num_embeddings - 1)
    returns, lengths = np.zeros(num_episodes), np.zeros(num_episodes, dtype=int)
    running = np.ones(num_episodes, dtype=bool)

    returns_to_go[:, 0] = args.target_return / RETURN_SCALE
    observations, _ = env.reset(seed=seeds)
    bar = tqdm(total=horizon, desc="evaluation", unit="step", leave=False, disable=RANK > 0)
    for t in range(horizon):
        observations = torch.as_tensor(observations, dtype=torch.float32, device=args.device)
        states[:, t] = (observations - data.state_mean) / data.state_std
        rows = torch.as_tensor(np.flatnonzero(running), device=args.device)
        first = max(0, t - K + 1)
        window = slice(first, first + K)  # in the first K steps the future is zeros, which causal attention cannot see
        predicted = model(
            returns_to_go[rows, window], states[rows, window], actions[rows, window], timesteps[window].expand(len(rows), K)
        )
        actions[rows, t] = predicted[:, t - first].float()
        # Copies that are done go on until all are; what they still do is not counted.
        observations, rewards, terminated, truncated, _ = env.step(center + half_range * actions[:, t].cpu().numpy())
        returns += rewards * running
        lengths += running
        returns_to_go[:, t + 1, 0] = returns_to_go[:, t, 0] - torch.as_tensor(rewards / RETURN_SCALE, device=args.device)
        running &= ~(terminated | truncated)
        bar.update()
        if after_step:
            after_step(t)
        if SIGNALS or not running.any():
            break
    bar.close()
    return returns, lengths


def normalized_score(env_id, episode_return):
    """D4RL's score: 0 for a random policy, 100 for an expert; None for environments without reference returns."""
    task = TASKS.get(env_id.rsplit("-v", 1)[0])
    return task and 100 * (episode_return - task.random_return) / (task.expert_return - task.random_return)


# ======================================================================================================================
# Training
# ======================================================================================================================
METRICS = ("loss", "saturated_fraction", "grad_norm", "clipped_fraction")  # of one training step


def autocast(args):
    """Matrix products in bf16 where `args.precision` says so; weights, gradients and optimizer stay float32."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16")


def training_loss(model, batch, num_valid):
    """Mean squared action error, and the share of predictions beyond ±0.99 (a saturated tanh), both over valid steps.

    `num_valid` is the number of valid steps in the batch; where processes share a batch, their results add up.
    """
    returns_to_go, states, actions, timesteps, valid = batch
    predicted = model(returns_to_go, states, actions, timesteps).float()
    weight = valid.unsqueeze(-1) / (num_valid * actions.shape[-1])
    loss = ((predicted - actions).square() * weight).sum()
    saturated = ((predicted.detach().abs() > 0.99) * weight).sum()
    return loss, saturated


class TrainingStep:
    """Make one training step from the starts of its windows [batch]; returns its METRICS [4] without waiting for the device.

    On a single GPU the loss is compiled and, once warm, the whole step is recorded in a CUDA graph and replayed: a small
    model at K = 1 would otherwise wait for Python. Dropout stays random in a graph, its seed advances with each replay.
    """

    def __init__(self, model, optimizer, data, args):
        self.model, self.optimizer, self.data, self.args = model, optimizer, data, args
        on_gpu = args.device.startswith("cuda")
        self.loss = torch.compile(training_loss) if on_gpu else training_loss
        self.eager_steps = 5 if on_gpu and WORLD_SIZE == 1 else math.inf
        self.graph = None

    def run(self, starts):
        args, data = self.args, self.data
        num_valid = (data.episode_ends[starts] - starts).clamp(max=args.context_length).sum()
        windows = data.windows(starts.chunk(WORLD_SIZE)[RANK], args.context_length)
        with autocast(args):
            loss, saturated = self.loss(self.model, windows, num_valid)
        self.optimizer.zero_grad()
        (loss * WORLD_SIZE).backward()  # DistributedDataParallel takes the mean over processes, the loss is a sum
        max_grad_norm = args.max_grad_norm or math.inf
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        self.optimizer.step()
        sums = torch.stack([loss.detach(), saturated])
        if WORLD_SIZE > 1:  # as the gradient, which is everyone's already
            torch.distributed.all_reduce(sums)
        return torch.stack([*sums, grad_norm, (grad_norm > max_grad_norm).float()])

    def __call__(self, starts):
        if self.eager_steps == math.inf:
            return self.run(starts)
        if self.eager_steps > 0:  # on a side stream, as a capture wants it
            self.eager_steps -= 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                metrics = self.run(starts)
            torch.cuda.current_stream().wait_stream(side)
            return metrics
        if self.graph is None:
            self.graph, self.starts = torch.cuda.CUDAGraph(), starts.clone()
            with torch.cuda.graph(self.graph):
                self.metrics = self.run(self.starts)
        self.starts.copy_(starts)
        self.graph.replay()
        return self.metrics


@contextlib.contextmanager
def process_group():
    """Join the processes that torchrun has started, if it has; one of them speaks."""
    if WORLD_SIZE > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group()
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    yield
    if WORLD_SIZE > 1:
        torch.distributed.destroy_process_group()


def all_gather(value):
    """Return every process's `value`, in the order of their ranks."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        torch.distributed.all_gather_object(values, value)
    return values


# ======================================================================================================================
# Interruptions: whole files, known failures, checkpoints to go on from
# ======================================================================================================================
SIGNALS = []  # SIGINT or SIGTERM, once one has come; the training step under way is finished first
COST_MEMORY = ("batch_size", "context_length", "num_eval_episodes", "chunk_size", "mine_windows", "mine_group")
MAY_CHANGE = ("num_epochs", "save_epochs", "capture_video", "device", "resume")  # what a resumed run may be given anew


def remember_signal(number, frame):
    SIGNALS.append(number)
    signal.signal(number, signal.SIG_DFL)  # a second one ends the program at once


def save(path, write):
    """Call write(file) on a temporary file and move it to `path`: it appears whole or not at all. Only rank 0 writes."""
    if RANK > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        stop(
            f"{path} could not be written ({first_line(error)}), the last good checkpoint is untouched; is the disk full? "
            "Make room and go on with --resume."
        )


def save_json(path, content):
    """Write numbers, texts, arrays, and lists and dicts of them; JSON has no NaN, so that it becomes null."""
    content = json.loads(json.dumps(content, default=lambda array: array.tolist()), parse_constant=lambda name: None)
    save(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


@contextlib.contextmanager
def explained(args):
    """Turn the failures of a run that a user can do something about into one sentence."""
    try:
        yield
    except KeyboardInterrupt:
        tqdm.write("interrupted; finished runs and checkpoints are kept.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT)
    except (RuntimeError, MemoryError, OSError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, MemoryError) or "memory" in str(error):
            costly = [name for name in COST_MEMORY if hasattr(args, name)]
            sizes = ", ".join(f"--{name.replace('_', '-')} (now {getattr(args, name)})" for name in costly)
            stop(f"{args.device} ran out of memory; lower one of {sizes}.")
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            stop(f"the disk is full ({first_line(error)}); make room and go on with --resume, the last checkpoint is good.")
        raise


def changed(args, others):
    """Names of the arguments [dict] that differ although a resumed run has to keep them."""
    args, others = json.loads(json.dumps([args, others]))
    return [name for name in args if name not in MAY_CHANGE and args[name] != others.get(name)]


def read_latest(folder):
    """Return the checkpoint that the run in `folder` can go on from."""
    path = Path(folder) / "checkpoints" / "latest.pt"
    if not path.is_file():
        stop(f"{folder} cannot be resumed, it has no checkpoints/latest.pt.")
    try:
        latest = torch.load(path, map_location="cpu", weights_only=True)
        differing = changed(latest["args"], json.loads((path.parent.parent / "args.json").read_text()))
        script, _ = latest["script"], latest["optimizer"]
    except Exception as error:
        stop(f"{folder} cannot be resumed, checkpoints/latest.pt or args.json is damaged or no such file: {first_line(error)}.")
    if script != SCRIPT or differing:
        stop(f"{path} is of another run: from {script}.py, and not with args.json's {', '.join(differing) or 'script'}.")
    return latest


# ======================================================================================================================
# Run: from the arguments to a folder of results
# ======================================================================================================================
def show(value, form):
    return "-" if value is None else format(value, form)


def print_table(records, summary):
    """Print one line per epoch, and best, last and the mean over the last quarter of the epochs."""
    columns = {"epoch": "d", "loss": ".4f", "grad_norm": ".3f", "clipped_fraction": ".0%", "saturated_fraction": ".0%"}
    columns |= {"return_mean": ".1f", "return_std": ".1f", "length_mean": ".1f", "normalized_score": ".1f"}
    print("\n" + "  ".join(columns))
    for record in records:
        print("  ".join(show(record[name], form).rjust(len(name)) for name, form in columns.items()))
    best, last, mean = (show(summary[f"{name}_normalized_score"], ".1f") for name in ("best", "final", "mean_last_quarter"))
    print(
        f"normalized score: best {best} (epoch {summary['best_epoch']}; the paper reports the best epoch), last {last}, "
        f"mean over the last quarter of the epochs {mean}"
    )


def train(args, run_folder):
    """Train and evaluate as `args` say; a run that is resumed goes on from its latest checkpoint, if it has one.

    Leaves checkpoints, TensorBoard events, args.json and summary.json in `run_folder`; returns the summary and the history
    of METRICS, one entry per logging interval.
    """
    if run_folder.exists() and not args.resume:
        stop(f"{run_folder} already exists; choose another --run-name, or go on with it by --resume {run_folder}.")
    latest = read_latest(run_folder) if (run_folder / "checkpoints" / "latest.pt").exists() else None
    if args.sample:
        print("This is the bundled sample: small backbones, small data, few steps. It is not the paper's experiment.")

    # Environment, data, model
    torch.manual_seed(args.seed)
    seeds = np.array_split(np.arange(args.seed, args.seed + args.num_eval_episodes), WORLD_SIZE)[RANK].tolist()
    env = make_env(args, len(seeds))
    if RANK > 0:
        torch.distributed.barrier()  # what has to be downloaded, the first process does
    data = load_data(args, env)
    max_timestep = max(1000, env.spec.max_episode_steps or 0, int(data.timesteps.max()) + 1)
    shape = dict(state_dim=len(data.state_mean), act_dim=data.actions.shape[1], max_timestep=max_timestep)
    model, architecture, backbone_source, eps = make_model(args, shape)
    if WORLD_SIZE > 1 and RANK == 0:
        torch.distributed.barrier()
    model.to(args.device)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{backbone_name(args.backbone)}: {num_parameters / 1e6:.1f} M parameters, from {backbone_source}")
    print(f"{args.env}: {len(data.states):,} steps in {data.num_episodes} episodes of {data.dataset_id}")
    print(f"{run_folder}: on {args.device} in {args.precision}, {WORLD_SIZE} process{'es' * (WORLD_SIZE > 1)}")

    # Optimizer, and all that changes during training
    on_gpu = args.device.startswith("cuda")
    learning_rate = torch.tensor(args.learning_rate, device=args.device)  # a tensor, so that a CUDA graph reads it anew
    optimizer = torch.optim.AdamW(
        model.parameters(), learning_rate, weight_decay=args.weight_decay, eps=eps, fused=True, capturable=on_gpu
    )
    window_generator = torch.Generator().manual_seed(args.seed)  # the same windows on every device and in every process
    torch.manual_seed(args.seed + RANK)  # but dropout of its own in each process
    metrics = torch.zeros(args.steps_per_epoch, len(METRICS), device=args.device)  # of the epoch under way
    records, history = [], []  # one entry per epoch, one per logging interval
    step, train_seconds, eval_seconds = 0, 0.0, 0.0
    if latest is not None:
        if not torch.equal(latest["state_mean"], data.state_mean.cpu()) or len(latest["random_states"]) != WORLD_SIZE:
            stop(f"{run_folder} had other data or {len(latest['random_states'])} processes; resume it as it was started.")
        model.load_state_dict(latest["model"])
        optimizer.load_state_dict(latest["optimizer"])
        optimizer.param_groups[0]["lr"] = learning_rate  # still the tensor that the loop fills
        metrics.copy_(latest["metrics"])
        step, records, history = latest["step"], latest["records"], latest["history"]
        train_seconds, eval_seconds = latest["train_seconds"], latest["eval_seconds"]
        cpu_state, gpu_state, window_state = latest["random_states"][RANK]
        torch.set_rng_state(cpu_state)
        if on_gpu and gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state, args.device)
        window_generator.set_state(window_state)
        print(f"going on after step {step}, with {len(records)} of {args.num_epochs + 1} evaluations done")

    # What the run leaves behind
    if RANK == 0:
        from torch.utils.tensorboard import SummaryWriter

        (run_folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        writer = SummaryWriter(run_folder, purge_step=step + 1 if latest else None)
        rows = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|argument|value|\n|-|-|\n{rows}")
    save_json(run_folder / "args.json", asdict(replace(args, resume=None)))

    def log(group, values):
        for name, value in values.items():
            if RANK == 0 and value is not None:
                writer.add_scalar(f"{group}/{name}", value, step)

    def save_checkpoint(name, **more):
        checkpoint = dict(
            script=SCRIPT, epoch=len(records) - 1, step=step, args=asdict(replace(args, resume=None)),
            architecture=architecture, model=model.state_dict(), state_mean=data.state_mean, state_std=data.state_std, **more,
        )  # fmt: skip
        save(run_folder / "checkpoints" / f"{name}.pt", lambda file: torch.save(checkpoint, file))

    def save_latest():
        gpu_state = torch.cuda.get_rng_state(args.device) if on_gpu else None
        states = [torch.get_rng_state(), gpu_state, window_generator.get_state()]
        save_checkpoint(
            "latest", optimizer=optimizer.state_dict(), metrics=metrics, records=records, history=history,
            random_states=all_gather(states), train_seconds=train_seconds, eval_seconds=eval_seconds,
        )  # fmt: skip

    def end_if_interrupted():
        numbers = sum(all_gather(SIGNALS), [])
        if numbers:
            save_latest()
            if RANK == 0:
                how = f"python {SCRIPT}.py --resume {run_folder}"
                tqdm.write(f"interrupted after step {step}; go on with: {how}", file=sys.stderr)
            raise SystemExit(128 + numbers[0])

    # Training
    handlers = {number: signal.signal(number, remember_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    trained = nn.parallel.DistributedDataParallel(model) if WORLD_SIZE > 1 else model
    training_step = TrainingStep(trained, optimizer, data, args)
    log_interval = max(1, args.steps_per_epoch // 25)

    for epoch in range(len(records), args.num_epochs + 1):  # epoch 0 only evaluates: the model before fine-tuning
        model.train()
        last_step = epoch * args.steps_per_epoch
        started = logged_at = time.perf_counter()
        steps = tqdm(
            range(step + 1, last_step + 1), desc=f"epoch {epoch}/{args.num_epochs}", unit="step", total=args.steps_per_epoch,
            initial=args.steps_per_epoch - last_step + step, disable=RANK > 0 or epoch == 0,
        )  # fmt: skip
        for step in steps:
            starts = torch.randint(len(data.states), (args.batch_size,), generator=window_generator).to(args.device)
            learning_rate.fill_(args.learning_rate * min(step / max(args.warmup_steps, 1), 1))
            row = (step - 1) % args.steps_per_epoch
            metrics[row] = training_step(starts)

            logging = (row + 1) % log_interval == 0 or step == last_step
            if logging:  # the one place in the loop that waits for the device
                values = metrics[row // log_interval * log_interval : row + 1].double().cpu().numpy()
                finite = np.isfinite(values).all(axis=1)
                if not finite.all():
                    stop(
                        f"loss or gradient is not finite in step {step + 1 - len(finite) + finite.argmin()}; the checkpoints in "
                        f"{run_folder} are from before. Try a lower --learning-rate, --max-grad-norm 0.25 or --precision fp32."
                    )
                means = dict(zip(METRICS, values.mean(axis=0).tolist()))
                history.append({"step": step, **means})
                steps.set_postfix(loss=f"{means['loss']:.4f}", grad_norm=f"{means['grad_norm']:.3f}", refresh=False)
                speed = len(values) / (time.perf_counter() - logged_at)
                log("train", {**means, "learning_rate": learning_rate.item(), "steps_per_second": speed})
                logged_at = time.perf_counter()
            if SIGNALS and WORLD_SIZE == 1 or logging and any(all_gather(bool(SIGNALS))):
                break
        train_seconds += time.perf_counter() - started
        end_if_interrupted()

        # Evaluation
        started = time.perf_counter()
        with autocast(args):
            results = all_gather(evaluate(model, env, data, args, seeds))
        end_if_interrupted()
        eval_seconds += time.perf_counter() - started
        returns, lengths = (np.concatenate(part) for part in zip(*results))
        evaluation = dict(return_mean=float(returns.mean()), return_std=float(returns.std()), length_mean=float(lengths.mean()))
        evaluation["normalized_score"] = normalized_score(args.env, evaluation["return_mean"])
        training = dict(zip(METRICS, metrics.double().mean(0).tolist() if epoch else [None] * len(METRICS)))
        records.append(dict(epoch=epoch, step=step, **training, **evaluation))
        log("eval", evaluation)
        score = show(evaluation["normalized_score"], ".1f")
        tqdm.write(f"epoch {epoch}: return {returns.mean():.1f} ± {returns.std():.1f}, normalized score {score}")
        if epoch in args.save_epochs or epoch == args.num_epochs:
            save_checkpoint(f"epoch_{epoch}")
        best = max(records[1:], key=lambda record: record["return_mean"], default=None)
        if best is records[-1]:
            save_checkpoint("best")
        save_latest()
    for number, handler in handlers.items():
        signal.signal(number, handler)

    best = max(records[1:], key=lambda record: record["return_mean"])
    last_quarter = [record["normalized_score"] for record in records[-max(1, args.num_epochs // 4) :]]
    summary = dict(
        script=SCRIPT, backbone=args.backbone, env=args.env, context_length=args.context_length, seed=args.seed,
        sample=args.sample, device=args.device, precision=args.precision, backbone_source=backbone_source,
        dataset=data.dataset_id, dataset_steps=len(data.states), dataset_episodes=data.num_episodes, processes=WORLD_SIZE,
        parameters=num_parameters, steps=step, epochs=records, best_epoch=best["epoch"],
        best_normalized_score=best["normalized_score"], final_normalized_score=records[-1]["normalized_score"],
        mean_last_quarter_normalized_score=None if None in last_quarter else float(np.mean(last_quarter)),
        steps_per_second=step / train_seconds, train_seconds=train_seconds, eval_seconds=eval_seconds,
    )  # fmt: skip
    save_json(run_folder / "summary.json", summary)
    if RANK == 0:
        writer.close()
        print_table(records, summary)
    return summary, history


# Okabe and Ito's palette, also for the colour-blind; whatever is not named has the first colour.
COLORS = defaultdict(lambda: "#CC79A7")
COLORS |= {"gpt2": "#0072B2", "igpt": "#D55E00", "igpt-as-gpt2": "#E69F00", "random": "#555555", "random-gpt2": "#009E73"}


def new_figure(title, width, height):
    """An empty matplotlib figure, width and height in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def save_figure(figure, run_folder, name, step):
    """Write a matplotlib figure as a PNG and as a TensorBoard image."""
    from torch.utils.tensorboard import SummaryWriter

    save(run_folder / f"{name}.png", lambda file: figure.savefig(file, format="png", dpi=120))
    with SummaryWriter(run_folder) as writer:
        writer.add_figure(name, figure, step)


def parse_arguments():
    """Return the arguments as given; what is not given comes from the run to resume, or from the sample."""
    args = tyro.cli(Args, description=__doc__)
    if args.resume:
        before = read_latest(args.resume)["args"]
        args = tyro.cli(Args, default=Args(**before))
        names = changed(asdict(args), before)
        if names:
            stop(f"--{', --'.join(names).replace('_', '-')} cannot change when a run is resumed; leave out or start a new run.")
    elif args.sample:
        args = tyro.cli(Args, default=SAMPLE)
    return args


# ======================================================================================================================
# Study: several runs, trained here or earlier, and what is kept of them
# ======================================================================================================================
def open_study(args):
    """Return the arguments of all runs together, and the folder of the study; one is resumed by any of its runs."""
    if args.resume:  # this run's arguments are resolved for its backbone; those of the study stand in one of them
        may_change = {name: getattr(args, name) for name in MAY_CHANGE if hasattr(args, name)}
        given = {name: tuple(x) if isinstance(x, list) else x for name, x in json.loads(args.study).items()}
        args = Args(**{**given, **may_change})
    args.run_name = args.run_name or f"{args.env}__{SCRIPT}__{args.seed}__{int(time.time())}".replace("/", "--")
    args.save_epochs = tuple(sorted({0, *args.save_epochs, *args.epochs}))
    study = Path(args.resume).parent if args.resume else Path("runs") / args.run_name
    if study.exists() and not args.resume:
        stop(f"{study} already exists; choose another --run-name.")
    return args, study


def run_args(args, backbone, **changes):
    """Return the arguments of the study's run that starts from `backbone`."""
    if backbone not in ("random", "random-gpt2"):
        changes |= dict(n_layer=None, n_head=None, n_embd=None, activation=None)
    return resolve(replace(args, backbone=backbone, study=json.dumps(asdict(args)), **changes))


def read_records(folder, epochs):
    """Return the records per epoch of the finished run in `folder`, which must have checkpoints of these epochs."""
    try:
        records = json.loads((folder / "summary.json").read_text())["epochs"]
    except (OSError, ValueError, KeyError) as error:
        stop(f"{folder} cannot be analysed, it is no folder of a finished run: {first_line(error)}.")
    for epoch in epochs:
        if not (folder / "checkpoints" / f"epoch_{epoch}.pt").exists():
            stop(f"{folder} cannot be analysed, it has no checkpoint of epoch {epoch}; train it with --save-epochs 0 {epoch}.")
    return records


def load_checkpoint(folder, epoch):
    return torch.load(folder / "checkpoints" / f"epoch_{epoch}.pt", map_location="cpu", weights_only=True, mmap=True)


def check_epochs(args):
    """Refuse epochs that will not be trained, or were not."""
    beyond = [] if args.runs else [epoch for epoch in args.epochs if not 0 <= epoch <= args.num_epochs]
    if beyond:
        stop(f"--epochs {beyond[0]} is not between 0 and --num-epochs {args.num_epochs}.")
    for folder in args.runs:
        read_records(Path(folder), args.epochs or (0,))


# ======================================================================================================================
# Gradients of single windows
# ======================================================================================================================
def parameter_groups(model):
    """Names of the parameters of each block, and of all that is outside the blocks: {"0": [...], ..., "rest": [...]}."""
    groups = {
        str(i): [f"transformer.h.{i}.{name}" for name, _ in block.named_parameters()]
        for i, block in enumerate(model.transformer.h)
    }
    in_blocks = {name for names in groups.values() for name in names}
    return groups | {"rest": [name for name, _ in model.named_parameters() if name not in in_blocks]}


def window_gradients(model, windows, names, chunk_size):
    """Gradient of each single window's loss for the parameters `names`: {name: [windows, numel]}.

    `windows` is what OfflineData.windows returns. The other parameters are constants, so that only these gradients are held.
    """
    parameters = dict(model.named_parameters())
    wanted = {name: parameters[name].detach() for name in names}
    constant = {name: value.detach() for name, value in parameters.items() if name not in wanted}

    def loss(wanted, *window):
        call = lambda *inputs: torch.func.functional_call(model, wanted | constant, inputs)  # noqa: E731
        window = [x.unsqueeze(0) for x in window]
        return training_loss(call, window, window[-1].sum())[0]

    per_window = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0, 0, 0), randomness="different")
    chunks = []
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        for chunk in zip(*(x.split(chunk_size) for x in windows)):
            chunks.append({name: g.flatten(1) for name, g in per_window(wanted, *chunk).items()})
    return {name: torch.cat([chunk.pop(name) for chunk in chunks]) for name in names}


def gradient_statistics(model, windows, num_confusion, chunk_size, progress=""):
    """Norms and pairwise cosines of single windows' gradients, exactly and in bounded memory.

    Returns per-set norms {name: [windows]} for the parameter sets of the blocks, the norm over all parameters [windows],
    which clipping acts on, and the cosines over the block parameters of the first `num_confusion` windows [n, n].
    Gradients are held for one block at a time: its part of every inner product is added up, and the next block follows.
    That takes windows x parameters of a block, 2.8 GB for 100 windows of GPT-2 small, instead of 17 GB for 50.
    """
    norms, squares = {}, torch.zeros(len(windows[0]), device=windows[0].device, dtype=torch.float64)
    inner_products = torch.zeros(num_confusion, num_confusion, device=windows[0].device, dtype=torch.float64)
    for group, names in tqdm(parameter_groups(model).items(), desc=f"gradients {progress}", unit="block", leave=False):
        torch.manual_seed(0)  # where dropout is left on, it is the same for every block
        gradients = window_gradients(model, windows, names, chunk_size)
        for name in names:
            gradient = gradients.pop(name)
            norm = torch.linalg.vector_norm(gradient, dim=1)
            squares += norm.double() ** 2
            if group != "rest":
                norms[name.removeprefix("transformer.h.")] = norm.cpu().numpy()
                inner_products += (gradient[:num_confusion] @ gradient[:num_confusion].T).double()
    length = inner_products.diagonal().sqrt()
    cosines = inner_products / (length[:, None] * length).clamp(min=1e-30)
    return norms, squares.sqrt().cpu().numpy(), cosines.cpu().numpy()


def clipped_norm(norm, max_grad_norm):
    """What clip_grad_norm_ makes of a gradient of this norm; a threshold of 0 leaves it alone."""
    return np.minimum(norm, max_grad_norm) if max_grad_norm else norm


def change(before, after):
    """l2 distance, relative distance and cosine of two vectors; nan where a bias starts at zero and has no direction."""
    distance, length = torch.linalg.vector_norm(after - before).item(), torch.linalg.vector_norm(before).item()
    if distance == 0:
        return dict(distance=0.0, relative=0.0, cosine=1.0)
    lengths = length * torch.linalg.vector_norm(after).item()
    cosine = (before @ after).item() / lengths if lengths else math.nan
    return dict(distance=distance, relative=distance / length if length else math.nan, cosine=cosine)


def parameter_change(before, after):
    """Change between two state dicts (section 5.3): of each parameter set of the blocks, and of all of them as one vector."""
    sets = [name for name in before if name.startswith("transformer.h.")]
    pairs = [(before[name].double().flatten(), after[name].double().flatten()) for name in sets]
    whole = change(*(torch.cat(vectors) for vectors in zip(*pairs)))
    return {name.removeprefix("transformer.h."): change(*pair) for name, pair in zip(sets, pairs)}, whole


# ======================================================================================================================
# Analysis: one checkpoint
# ======================================================================================================================
def analyse(run_folder, epoch, args):
    """Analyse the checkpoint of `epoch` in `run_folder` in float32; returns everything that the figures show."""
    start, checkpoint = (load_checkpoint(run_folder, e) for e in (0, epoch))
    records, trained_with = read_records(run_folder, (0, epoch)), checkpoint["args"]
    own = {name: trained_with[name] for name in ("env", "dataset", "context_length", "max_grad_norm", "backbone", "seed")}
    label = trained_with.get("member") or backbone_name(own["backbone"])
    data_args = replace(args, env=own["env"], dataset=own["dataset"])
    data = load_data(data_args, make_env(data_args, 1))
    generator = torch.Generator().manual_seed(args.seed)  # the same windows for every backbone
    count = max(args.norm_windows, args.confusion_windows)
    starts = torch.randint(len(data.states), (count,), generator=generator).to(args.device)
    windows = data.windows(starts, own["context_length"])
    model = rebuild_model(checkpoint, args.device).train(args.dropout_in_analysis)
    norms, total, cosines = gradient_statistics(model, windows, args.confusion_windows, args.chunk_size, label)
    norms, total = {name: x[: args.norm_windows] for name, x in norms.items()}, total[: args.norm_windows]
    squares = {name: np.mean(x.astype(float) ** 2) for name, x in norms.items()}
    pairs = cosines[np.triu_indices(len(cosines), 1)]
    sets, whole = parameter_change(start["model"], checkpoint["model"])
    clip = own["max_grad_norm"]
    return dict(
        label=label, folder=str(run_folder), epoch=epoch, **own,
        norm_before=total, norm_after=clipped_norm(total, clip), median_norm=np.median(total),
        clipped_windows=np.mean(total > clip) if clip else 0.0, clipped_steps=records[epoch]["clipped_fraction"],
        cosines=pairs, mean_cosine=pairs.mean(), confusion=pairs.min(),
        set_norms={name: x.mean() for name, x in norms.items()},
        set_shares={name: value / sum(squares.values()) for name, value in squares.items()},
        change=sets, distance=whole["distance"], relative_distance=whole["relative"], cosine=whole["cosine"], records=records,
    )  # fmt: skip


# ======================================================================================================================
# Figures
# ======================================================================================================================
def name_of(result):
    clip = f", clip {result['max_grad_norm']:g}" if result["max_grad_norm"] else ", no clipping"
    return f"{result['label']}{clip}, epoch {result['epoch']}"


def title(results, args, what):
    """What a figure shows, of which environments, K and seeds, and whether it is the sample."""
    envs, contexts, seeds = (", ".join(sorted({str(r[name]) for r in results})) for name in ("env", "context_length", "seed"))
    return f"{envs}: {what}; K = {contexts}, seed {seeds}{', bundled sample' * args.sample}"


def boxes(axes, results, values):
    """One box per result in its colour."""
    drawn = axes.boxplot(values, tick_labels=[name_of(r).replace(", ", "\n") for r in results], patch_artist=True, widths=0.6)
    for box, median, result in zip(drawn["boxes"], drawn["medians"], results):
        box.set(facecolor=COLORS[result["label"]], alpha=0.6)
        median.set(color="black")
    axes.tick_params(axis="x", labelsize="small")


def plot_norms(results, args):
    """Gradient norm of single windows before and after clipping, with the threshold (section 5.4)."""
    figure = new_figure(title(results, args, f"gradient norm of {args.norm_windows} single windows"), 4 + 2 * len(results), 4)
    before, after = figure.subplots(1, 2, sharey=True)
    boxes(before, results, [r["norm_before"] for r in results])
    boxes(after, results, [r["norm_after"] for r in results])
    for threshold in {r["max_grad_norm"] for r in results} - {0}:
        for axes in (before, after):
            axes.axhline(threshold, color="black", linestyle="--", linewidth=1)
    before.set(title="before clipping", ylabel="norm over all parameters", yscale="log")
    after.set(title="after clipping (dashed: threshold)")
    return figure


def plot_confusion(results, args):
    """Distribution and minimum of the cosines between the gradients of two windows (Sankararaman et al. 2020)."""
    what = f"gradients of {args.confusion_windows} windows, pair by pair"
    figure = new_figure(title(results, args, what), 4 + 2 * len(results), 4)
    left, right = figure.subplots(1, 2)
    boxes(left, results, [r["cosines"] for r in results])
    left.set(ylabel="cosine similarity", title="all pairs")
    left.axhline(0, color="black", linewidth=0.5)
    right.bar(range(len(results)), [r["confusion"] for r in results], color=[COLORS[r["label"]] for r in results])
    right.set_xticks(range(len(results)), [name_of(r).replace(", ", "\n") for r in results], fontsize="small")
    right.set(ylabel="minimum cosine similarity", title="gradient confusion")
    right.axhline(0, color="black", linewidth=0.5)
    return figure


def plot_sets(results, args, what, panels):
    """Bars for each parameter set in network order; `panels` are (y label, title, [(result, {set: value})]) from top to bottom.

    Backbones without some of the sets, such as ImageGPT's LayerNorm biases, leave their places empty.
    """
    figure = new_figure(title(results, args, what), 15, 3 * len(panels) + 0.8)
    by_size = sorted((r["set_norms"] for r in results), key=len, reverse=True)  # the fullest model gives the order
    names = sorted(dict.fromkeys(name for norms in by_size for name in norms), key=lambda name: int(name.split(".")[0]))
    place = {name: i for i, name in enumerate(names)}
    for axes, (label, panel_title, bars) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels):
        width = 0.8 / len(bars)
        for i, (result, values) in enumerate(bars):
            x = [place[name] + (i - (len(bars) - 1) / 2) * width for name in values]
            axes.bar(x, list(values.values()), width, color=COLORS[result["label"]], label=name_of(result))
        if label == "cosine similarity":
            lowest = np.nanmin([value for _, values in bars for value in values.values()])
            axes.set_ylim(lowest - 0.1 * (1 - lowest), 1)
        ticks = place if len(place) <= 60 else {name: i for name, i in place.items() if name.endswith("ln_1.weight")}
        axes.set_xticks(list(ticks.values()), list(ticks), rotation=90, fontsize="x-small")
        axes.set(ylabel=label, xlim=(-1, len(place)), title=panel_title)
        axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_clipping(results, args):
    """Action error, return and gradient norm per epoch with and without clipping (App. G.3)."""
    figure = new_figure(title(results, args, "clipping at work"), 13, 3.8)
    panels = {"loss": "mean squared action error", "return_mean": "return", "grad_norm": "gradient norm before clipping"}
    for axes, (key, label) in zip(figure.subplots(1, 3), panels.items()):
        for result in results:
            epochs, values = zip(*[(record["epoch"], record[key]) for record in result["records"] if record[key] is not None])
            style, name = "-" if result["max_grad_norm"] else ":", name_of(result).rsplit(",", 1)[0]
            axes.plot(epochs, values, style, marker="o", markersize=3, color=COLORS[result["label"]], label=name)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    return figure


def largest_sets(result, count=4):
    """The parameter sets with the largest shares of the squared gradient over the blocks, as text."""
    largest = sorted(result["set_shares"].items(), key=lambda item: -item[1])[:count]
    rest = 1 - sum(share for _, share in largest)
    return ", ".join(f"{name} {share:.0%}" for name, share in largest) + f", all others {rest:.0%}"


def figures(results, args):
    """All figures by name."""
    norms = [("mean gradient norm", f"share of the square: {largest_sets(r)}", [(r, r["set_norms"])]) for r in results]
    labels = {"distance": "l2 distance", "relative": "relative distance", "cosine": "cosine similarity"}
    changes = [
        (label, "", [(r, {name: change[key] for name, change in r["change"].items()}) for r in results])
        for key, label in labels.items()
    ]
    return {
        "gradient_norm": plot_norms(results, args),
        "gradient_confusion": plot_confusion(results, args),
        "gradient_per_set": plot_sets(results, args, f"gradient per parameter set, mean of {args.norm_windows} windows", norms),
        "clipping": plot_clipping(results, args),
        "parameter_change": plot_sets(results, args, "change of each parameter set since epoch 0", changes),
    }


def print_findings(results):
    """Print the findings in numbers: one line per analysed checkpoint, and the parameter sets that own its gradient."""
    columns = {"median_norm": ".3f", "clipped_windows": ".0%", "clipped_steps": ".0%", "confusion": ".3f", "mean_cosine": ".3f"}
    columns |= {"distance": ".2f", "relative_distance": ".4f", "cosine": ".5f"}
    width = max(len(name_of(r)) for r in results)
    print("\n" + " " * width + "".join(f"  {name}" for name in columns))
    for r in results:
        print(name_of(r).ljust(width) + "".join(show(r[name], form).rjust(len(name) + 2) for name, form in columns.items()))
    print("\nlargest shares of the squared gradient over the blocks:")
    for r in results:
        print(name_of(r).ljust(width), largest_sets(r))


# ======================================================================================================================
# Experiment
# ======================================================================================================================
def members(args):
    """Arguments of each run to train, by the name of its folder: every backbone with every threshold."""
    runs = {}
    for backbone, clip in itertools.product(args.backbones, args.max_grad_norms):
        name = Path(backbone).name + f"_clip_{clip:g}" * (len(args.max_grad_norms) > 1)
        runs[name] = run_args(args, backbone, max_grad_norm=clip)
    return runs


def check(args):
    """Refuse what only this script has and cannot work, before anything is trained."""
    if min(args.norm_windows, args.chunk_size, args.num_epochs) < 1 or args.confusion_windows < 2:
        stop("--norm-windows, --chunk-size and --num-epochs must be at least 1, and --confusion-windows at least 2.")
    check_epochs(args)


if __name__ == "__main__":
    args, study = open_study(parse_arguments())
    check(args)
    runs = {} if args.runs else members(args)
    analysis_args = resolve(replace(args, precision="fp32"))
    with process_group(), explained(analysis_args):
        for name, arguments in runs.items():
            train(arguments, study / name)
        if RANK == 0:
            folders = [study / name for name in runs] or [Path(folder) for folder in args.runs]
            print(f"\nthe analysis follows; by itself: python {SCRIPT}.py --runs {' '.join(map(str, folders))}")
            last = {folder: len(read_records(folder, (0, *args.epochs))) - 1 for folder in folders}
            checkpoints = [(folder, epoch) for folder in folders for epoch in args.epochs or (last[folder],)]
            bar = tqdm(checkpoints, desc="analysis", unit="checkpoint")
            results = [analyse(folder, epoch, analysis_args) for folder, epoch in bar]
            study.mkdir(parents=True, exist_ok=True)
            raw = {f"{i}_{key}": r[key] for i, r in enumerate(results) for key in ("norm_before", "norm_after", "cosines")}
            save(study / "gradients.npz", lambda file: np.savez(file, **raw))
            save_json(study / "results.json", results)
            for name, figure in figures(results, args).items():
                save_figure(figure, study, name, max(epoch for _, epoch in checkpoints))
            print_findings(results)
            print(f"\n{study}: results.json, gradients.npz and five figures; or: tensorboard --logdir runs")
