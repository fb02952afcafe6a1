"""Fine-tune a Decision Transformer on MuJoCo offline data, starting from language, from images or from nothing.

    python dt_pretrained.py --sample                               # bundled inputs, two minutes on two CPU cores
    python dt_pretrained.py --backbone gpt2 --env Hopper-v4        # the paper's job

Paper: S. Takagi, "On the Effect of Pre-training for Transformer in Different Modality on Offline Reinforcement
Learning", NeurIPS 2022, https://arxiv.org/abs/2211.09817 (section 4, Table 1). The file reads from top to bottom:
arguments, model, backbones, data, evaluation, training, experiment; the banners name its sections.
"""

import contextlib
import errno
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
from types import SimpleNamespace
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
    backbone: str = "gpt2"
    """gpt2, igpt, igpt-as-gpt2 (the released code's way of loading ImageGPT), random (1 head, ReLU, as in the paper),
    random-gpt2 (GPT-2's architecture), any hub id of a GPT-2 or ImageGPT checkpoint, or a local folder of one"""
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
    save_epochs: tuple[int, ...] = (0, 1, 4)
    """epochs after which a checkpoint is kept, 0 being before training; the last is always kept"""
    capture_video: bool = False
    """record one evaluation episode of the best and of the last model, best.gif and last.gif in the run folder"""
    run_name: str | None = None
    """folder under runs/; if not given, {env}__{script}__{backbone}__{seed}__{time}"""
    resume: str | None = None
    """run folder to go on with; its arguments hold, but for --num-epochs, --save-epochs, --capture-video and --device"""


# What --sample changes where the user did not say otherwise.
SAMPLE = Args(
    sample=True, batch_size=32, learning_rate=2e-3, warmup_steps=400, num_epochs=4, steps_per_epoch=200, num_eval_episodes=8,
    save_epochs=(0, 1),
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
# Figure
# ======================================================================================================================
def plot_learning_curve(records, history, args):
    """Draw return, training loss with saturation, and gradient norm with the clipping threshold; returns the figure."""
    sample, color = ", bundled sample" * args.sample, COLORS[args.backbone]
    title = f"{args.env}, {backbone_name(args.backbone)}, K = {args.context_length}, seed {args.seed}{sample}"
    figure = new_figure(title, 12, 3.6)
    left, middle, right = figure.subplots(1, 3)
    epochs = np.array([r["epoch"] for r in records])
    mean, std = (np.array([r[name] for r in records]) for name in ("return_mean", "return_std"))
    left.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.2, linewidth=0, label="± 1 sd over episodes")
    left.plot(epochs, mean, "o-", color=color, markersize=4, label="mean")
    left.set(xlabel="epoch", ylabel="return", title=f"return of {args.num_eval_episodes} episodes")
    left.xaxis.get_major_locator().set_params(integer=True)
    if normalized_score(args.env, 0) is not None:
        zero, unit = normalized_score(args.env, 0), normalized_score(args.env, 1) - normalized_score(args.env, 0)
        scores = left.secondary_yaxis("right", functions=(lambda x: zero + unit * x, lambda y: (y - zero) / unit))
        scores.set_ylabel("normalized score")
    curves = {name: [h[name] for h in history] for name in ("step", *METRICS)}
    middle.plot(curves["step"], curves["loss"], color=color, label="loss")
    middle.plot(curves["step"], curves["saturated_fraction"], "k:", linewidth=1, label="share of |action| > 0.99")
    middle.set(xlabel="training step", ylabel="mean squared action error / share", title="training loss", ylim=(0, None))
    right.plot(curves["step"], curves["grad_norm"], color=color, label="before clipping")
    if args.max_grad_norm:
        right.axhline(args.max_grad_norm, color="black", linewidth=1, linestyle="--", label=f"threshold {args.max_grad_norm:g}")
    right.set(xlabel="training step", ylabel="gradient norm", title="gradient norm", yscale="log")
    for axes in (left, middle, right):
        axes.legend(frameon=False)
    return figure


# ======================================================================================================================
# Video: one episode of the best and of the last model
# ======================================================================================================================
def make_camera(args):
    """Return one environment that can be rendered, without a screen too; says what is missing before anything is trained."""
    if sys.platform == "linux" and not {"MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        os.environ["MUJOCO_GL"] = "egl"
    env = make_env(args, 1, render_mode="rgb_array")
    try:
        env.reset(seed=[args.seed])
        env.render()
    except Exception as error:
        stop(
            f"--capture-video cannot render {args.env} here with MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({first_line(error)}); "
            "install EGL (Debian: libegl1), or OSMesa (libosmesa6) and set MUJOCO_GL=osmesa, or leave --capture-video out."
        )
    return env


def capture_videos(run_folder, args):
    """Play the first evaluation episode with the best and the last model; keep it as best.gif, last.gif and in TensorBoard."""
    import imageio.v3 as imageio
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

    env = make_camera(args)
    steps_per_second = env.metadata.get("render_fps", 30)
    every = max(1, round(steps_per_second / 25))  # steps from one frame to the next
    for name, file in (("best", "best"), ("last", f"epoch_{args.num_epochs}")):
        checkpoint = torch.load(run_folder / "checkpoints" / f"{file}.pt", map_location=args.device, weights_only=True)
        normalization = SimpleNamespace(state_mean=checkpoint["state_mean"], state_std=checkpoint["state_std"])
        frames = []

        def film(step):
            if step % every == 0:
                frames.append(env.render()[0][::2, ::2])

        with autocast(args):
            evaluate(rebuild_model(checkpoint, args.device), env, normalization, args, [args.seed], film)
        gif = imageio.imwrite("<bytes>", np.stack(frames), extension=".gif", duration=1000 * every / steps_per_second, loop=0)
        save(run_folder / f"{name}.gif", lambda file: file.write(gif))
        height, width, _ = frames[0].shape
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        with SummaryWriter(run_folder) as writer:
            writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=f"video/{name}", image=image)]), checkpoint["step"])
    env.close()


# ======================================================================================================================
# Experiment
# ======================================================================================================================
if __name__ == "__main__":
    args = resolve(parse_arguments())
    run_folder = Path(args.resume or f"runs/{args.run_name}")
    if args.capture_video and RANK == 0:
        make_camera(args).close()
    with process_group(), explained(args):
        summary, history = train(args, run_folder)
        if RANK == 0:
            save_figure(plot_learning_curve(summary["epochs"], history, args), run_folder, "learning_curve", summary["steps"])
            if args.capture_video:
                capture_videos(run_folder, args)
            print(f"\n{run_folder}: summary.json, learning_curve.png, checkpoints/; or: tensorboard --logdir runs")
