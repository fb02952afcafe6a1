"""Fine-tune a Decision Transformer on MuJoCo offline data, starting from language, from images or from nothing.

    python dt_pretrained.py --sample                               # bundled inputs, two minutes on two CPU cores
    python dt_pretrained.py --backbone gpt2 --env Hopper-v4        # the paper's job

Paper: S. Takagi, "On the Effect of Pre-training for Transformer in Different Modality on Offline Reinforcement
Learning", NeurIPS 2022, https://arxiv.org/abs/2211.09817 (section 4, Table 1). The file reads from top to bottom:
arguments, model, backbones, data, evaluation, records, experiment.
"""

import json
import math
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
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


# ======================================================================================================================
# Arguments
# ======================================================================================================================
@dataclass
class Args:
    backbone: str = "gpt2"
    """gpt2, igpt, igpt-as-gpt2 (the released code's way of loading ImageGPT), random (1 head, ReLU, as in the paper),
    random-gpt2 (GPT-2's architecture), any hub id of a GPT-2 or ImageGPT checkpoint, or a local folder of one"""
    env: str = "Hopper-v4"
    """gymnasium environment: Hopper, HalfCheetah or Walker2d, -v4 or -v5; any other one with flat Box spaces needs
    --dataset and --target-return"""
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
    save_epochs: tuple[int, ...] = (0, 1, 4)
    """epochs after which a checkpoint is kept, 0 being before training; the last is always kept"""
    run_name: str | None = None
    """folder under runs/; if not given, {env}__{script}__{backbone}__{seed}__{time}"""


# What --sample changes where the user did not say otherwise.
SAMPLE = Args(
    sample=True, batch_size=32, learning_rate=1e-3, warmup_steps=50, num_epochs=4, steps_per_epoch=200, num_eval_episodes=10,
    save_epochs=(0, 1),
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What the study fixes per environment; D4RL's reference returns give the normalized score."""

    dataset: str
    target_return: float
    random_return: float
    expert_return: float


TASKS = {
    "Hopper": Task("mujoco/hopper/medium-v0", 3600, -20.272305, 3234.3),
    "HalfCheetah": Task("mujoco/halfcheetah/medium-v0", 6000, -280.178953, 12135.0),
    "Walker2d": Task("mujoco/walker2d/medium-v0", 5000, 1.629008, 4592.3),
}
RETURN_SCALE = 1000  # returns-to-go are divided by this before they enter the model


def stop(message):
    """End the program with one sentence on stderr and exit status 2: the user can put this right."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def resolve(args):
    """Fill in the defaults that depend on other arguments and refuse values that cannot work."""
    task = TASKS.get(args.env.rsplit("-v", 1)[0])
    if args.sample and task is None and args.dataset is None:
        stop(f"the sample has no data for {args.env}; use Hopper, HalfCheetah or Walker2d, or give --dataset.")
    if task is None and (args.dataset is None or args.target_return is None):
        stop(f"{args.env} is not one of the study's environments ({', '.join(TASKS)}): give --dataset and --target-return.")
    for name in ("context_length", "batch_size", "num_epochs", "steps_per_epoch", "num_eval_episodes", "learning_rate"):
        if getattr(args, name) <= 0:
            stop(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}.")
    for name in ("dropout", "attention_dropout", "embedding_dropout"):
        if not 0 <= getattr(args, name) < 1:
            stop(f"--{name.replace('_', '-')} must be in [0, 1), not {getattr(args, name)}.")
    for name in ("max_grad_norm", "weight_decay", "warmup_steps"):
        if getattr(args, name) < 0:
            stop(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}.")

    if args.dataset is None:
        bundled = ASSETS / f"{args.env.rsplit('-v', 1)[0].lower()}-medium"
        args = replace(args, dataset=str(bundled) if args.sample else task.dataset)
    if args.target_return is None:
        args = replace(args, target_return=task.target_return)
    if args.device == "auto":
        args = replace(args, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        stop(f"--device {args.device} cannot be used here ({str(error).splitlines()[0]}); try --device cpu.")

    if args.backbone in ("random", "random-gpt2"):
        n_layer, n_head, n_embd = (4, 4, 128) if args.sample else (12, 12, 768)
        n_head, activation = (1, "relu") if args.backbone == "random" else (n_head, "gelu_new")
        args = replace(
            args,
            n_layer=args.n_layer or n_layer,
            n_head=args.n_head or n_head,
            n_embd=args.n_embd or n_embd,
            activation=args.activation or activation,
        )
        if min(args.n_layer, args.n_head, args.n_embd) < 1 or args.n_embd % args.n_head:
            stop(f"--n-embd {args.n_embd} must be a positive multiple of --n-head {args.n_head}, and --n-layer positive.")
    elif any(getattr(args, name) is not None for name in ("n_layer", "n_head", "n_embd", "activation")):
        stop("--n-layer, --n-head, --n-embd and --activation are for the random backbones; a checkpoint brings its own.")
    if args.run_name is None:
        backbone = Path(args.backbone).name if Path(args.backbone).is_dir() else args.backbone.replace("/", "--")
        args = replace(args, run_name=f"{args.env.replace('/', '--')}__{SCRIPT}__{backbone}__{args.seed}__{int(time.time())}")
    return args


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


class ImageGPTLayerNorm(nn.Module):
    """ImageGPT's normalization: no mean subtraction and no bias (transformers: ImageGPTLayerNorm)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


LAYER_NORMS = {"gpt2": nn.LayerNorm, "imagegpt": ImageGPTLayerNorm}
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "gelu_new": lambda: nn.GELU(approximate="tanh"), "quick_gelu": QuickGELU}


class Conv1D(nn.Module):
    """A linear layer with its weight stored [in, out], as in the checkpoints. Starts at N(0, 0.02), bias 0."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return F.linear(x, self.weight.T, self.bias)


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

    def forward(self, returns_to_go, states, actions, timesteps):
        """[batch, K, 1], [batch, K, state_dim], [batch, K, act_dim], [batch, K] to actions in (-1, 1): [batch, K, act_dim]."""
        tokens = (self.embed_return(returns_to_go), self.embed_state(states), self.embed_action(actions))
        tokens = self.embed_ln(torch.stack(tokens, dim=2))  # [batch, K, 3, width]: R_1 s_1 a_1 R_2 s_2 a_2 ...
        tokens = tokens + self.embed_timestep(timesteps).unsqueeze(2)
        hidden = self.transformer(tokens.flatten(1, 2)).unflatten(1, (-1, 3))
        return torch.tanh(F.linear(hidden[:, :, 1], self.embed_action.weight.T))


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
    checkpoint, report = read_checkpoint(source)
    missing = [*report["missing_keys"], *report["mismatched_keys"]]
    left_over = [key for key in report["unexpected_keys"] if key != "lm_head.weight"]
    if missing or left_over:
        stop(f"{source} is not a complete GPT-2 or ImageGPT: missing or misshapen {missing[:3]}, left over {left_over[:3]}.")
    theirs = checkpoint.config
    if theirs.activation_function not in ACTIVATIONS:
        stop(f"{source} uses the activation {theirs.activation_function}; known here are {', '.join(ACTIVATIONS)}.")
    config = GPTConfig(
        n_layer=theirs.n_layer,
        n_head=theirs.n_head,
        n_embd=theirs.n_embd,
        n_inner=theirs.n_inner or 4 * theirs.n_embd,
        activation=theirs.activation_function,
        layer_norm=theirs.model_type,
        layer_norm_epsilon=theirs.layer_norm_epsilon,
        scale_attn_weights=theirs.scale_attn_weights,
        scale_attn_by_inverse_layer_idx=theirs.scale_attn_by_inverse_layer_idx,
        **dropouts,
    )
    # A Decision Transformer brings its own embeddings.
    weights = {name: value for name, value in checkpoint.state_dict().items() if not name.startswith(("wte.", "wpe."))}
    if args.backbone == "igpt-as-gpt2":
        # GPT-2's LayerNorm subtracts the mean and has a bias, which ImageGPT's weights do not know of.
        if config.layer_norm != "imagegpt":
            stop(f"igpt-as-gpt2 needs an ImageGPT, but {source} is a {config.layer_norm}.")
        config = replace(config, layer_norm="gpt2")
        norms = [name for name in weights if name.split(".")[-2].startswith("ln_")]
        weights |= {name.replace("weight", "bias"): torch.zeros_like(weights[name]) for name in norms}
    return config, weights, source


def read_checkpoint(source):
    """Load a transformers GPT2Model or ImageGPTModel in float32 from a folder, the hub's cache or the hub.

    Returns the model and transformers' report of missing, unexpected and mismatched keys.
    """
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # no background request to convert .bin files
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from transformers import AutoConfig, GPT2Model, ImageGPTModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def read(local_files_only):
        config = AutoConfig.from_pretrained(source, local_files_only=local_files_only, trust_remote_code=False)
        if config.model_type not in ("gpt2", "imagegpt"):
            stop(f"{source} is a {config.model_type} model; --backbone takes GPT-2 and ImageGPT checkpoints.")
        model_class = GPT2Model if config.model_type == "gpt2" else ImageGPTModel
        return model_class.from_pretrained(
            source, config=config, dtype=torch.float32, local_files_only=local_files_only, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip

    if Path(source).is_dir():
        try:
            return read(local_files_only=True)
        except Exception as error:
            stop(f"the folder {source} holds no readable GPT-2 or ImageGPT checkpoint: {first_line(error)}")
    try:
        return read(local_files_only=True)
    except (OSError, ValueError):
        pass  # not in the cache
    where = f"neither a local folder nor in the hub's cache ({constants.HF_HUB_CACHE})"
    try:
        HfApi().model_info(source, timeout=10)  # one request: loading would retry for half a minute before it fails
    except (RepositoryNotFoundError, HFValidationError):
        names = ", ".join([*HUB_IDS, "random", "random-gpt2"])
        stop(f"there is no backbone {source}: it is {where}, and the hub has none of that name; known names are {names}.")
    except Exception as error:
        stop(
            f"the backbone {source} is {where}, and the Hugging Face hub cannot be reached ({first_line(error)}); "
            "go online, give a local folder as --backbone, or try --sample."
        )
    try:
        return read(local_files_only=False)
    except Exception as error:
        stop(f"the backbone {source} could not be loaded from the hub: {first_line(error)}")


def first_line(error):
    """Class and first line of an exception's text, without a closing full stop."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.') if lines else 'no details'}"


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
        fields = [x[index] * mask for x in (self.returns_to_go, self.states, self.actions)]
        return *fields, self.timesteps[index] * valid, valid


def load_data(args, env):
    """Load `args.dataset` to `args.device` as OfflineData that fits `env`, a gymnasium vector environment."""
    path = Path(args.dataset)
    if path.suffix in (".hdf5", ".h5"):
        episodes, dataset_id, recorded_in = read_d4rl(path), path.name, None
    else:
        episodes, dataset_id, recorded_in = read_minari(args.dataset)
    lengths = np.array([len(rewards) for _, _, rewards in episodes])
    if not episodes or lengths.min() == 0:
        stop(f"the data set {args.dataset} has {'episodes without a step' if episodes else 'no episode'}.")
    for observations, actions, rewards in episodes:
        if not len(observations) == len(actions) == len(rewards):
            stop(f"the data set {args.dataset} has an episode with more actions than observations or rewards.")
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
    if recorded_in not in (None, args.env):
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
        where = f"neither a folder nor in the local Minari folder ({get_dataset_path()})"
        try:
            if "MINARI_REMOTE" not in os.environ:  # one request: a download would retry for half a minute before it fails
                HfApi().dataset_info(f"farama-minari/{dataset.split('/')[0]}", timeout=10)
        except Exception as error:
            stop(
                f"the data set {dataset} is {where}, and Minari's hub does not have it or cannot be reached "
                f"({first_line(error)}); go online, give a folder or a D4RL .hdf5 file as --dataset, or try --sample."
            )
        try:
            minari.download_dataset(dataset)
        except Exception as error:
            stop(f"the data set {dataset} is {where}, and it could not be downloaded: {first_line(error)}")
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
def make_env(args):
    """Return a gymnasium vector environment with one copy per evaluation episode."""
    import gymnasium as gym

    warnings.filterwarnings("ignore", message=".*is out of date.*")  # -v4 is what the paper used
    try:
        import mujoco

        # HalfCheetah's model file sets off a deprecation warning for every copy; anything else should be seen.
        mujoco.set_mju_user_warning(lambda text: "deprecated" in text or print(f"mujoco: {text}", file=sys.stderr))
    except ImportError:
        pass
    try:
        env = gym.make_vec(args.env, args.num_eval_episodes, vectorization_mode="sync")
    except Exception as error:
        stop(f"the environment {args.env} cannot be made: {first_line(error)}")
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
def evaluate(model, env, data, args, progress=True):
    """Play one episode in each copy of `env`, asking for `args.target_return`; seeds are args.seed, args.seed + 1, ...

    Returns the episodes' undiscounted returns and lengths in steps, both [episodes]. As in the Decision Transformer's
    evaluation, the return-to-go falls by each reward and the model sees the last K steps.
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
    observations, _ = env.reset(seed=[args.seed + i for i in range(num_episodes)])
    bar = tqdm(total=horizon, desc="evaluation", unit="step", leave=False, disable=not progress)
    for t in range(horizon):
        states[:, t] = (torch.as_tensor(observations, dtype=torch.float32, device=args.device) - data.state_mean) / data.state_std
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
        if not running.any():
            break
    bar.close()
    return returns, lengths


def normalized_score(env_id, episode_return):
    """D4RL's score: 0 for a random policy, 100 for an expert; None for environments without reference returns."""
    task = TASKS.get(env_id.rsplit("-v", 1)[0])
    return task and 100 * (episode_return - task.random_return) / (task.expert_return - task.random_return)


# ======================================================================================================================
# Training: one step
# ======================================================================================================================
def training_loss(model, batch):
    """Mean squared action error over valid steps, and the share of valid predictions beyond ±0.99 (a saturated tanh)."""
    returns_to_go, states, actions, timesteps, valid = batch
    predicted = model(returns_to_go, states, actions, timesteps).float()
    weight = valid.unsqueeze(-1) / (valid.sum() * actions.shape[-1])  # sums to 1 over valid steps and dimensions
    loss = ((predicted - actions).square() * weight).sum()
    saturated = ((predicted.detach().abs() > 0.99) * weight).sum()
    return loss, saturated


# ======================================================================================================================
# Records: checkpoints, table, figure
# ======================================================================================================================
def save(path, write):
    """Call write(file) on a temporary file and move it to `path`: the file appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_json(path, content):
    save(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


def print_table(records, summary):
    """Print one line per epoch, and best, last and the mean over the last quarter of the epochs."""

    def show(value, form):
        return "-" if value is None else format(value, form)

    print(f"\n{'epoch':>5} {'loss':>8} {'grad norm':>9} {'clipped':>8} {'saturated':>9} {'return':>8} {'± sd':>7} {'length':>7} {'score':>7}")
    for r in records:
        print(
            f"{r['epoch']:>5} {show(r['loss'], '.4f'):>8} {show(r['grad_norm'], '.3f'):>9} "
            f"{show(r['clipped_fraction'], '.0%'):>8} {show(r['saturated_fraction'], '.0%'):>9} {r['return_mean']:>8.1f} "
            f"{r['return_std']:>7.1f} {r['length_mean']:>7.1f} {show(r['normalized_score'], '.1f'):>7}"
        )
    best, last, mean = (summary[f"{name}_normalized_score"] for name in ("best", "final", "mean_last_quarter"))
    print(
        f"normalized score: best {show(best, '.1f')} (epoch {summary['best_epoch']}, which is what the paper reports), "
        f"last {show(last, '.1f')}, mean over the last quarter of the epochs {show(mean, '.1f')}"
    )


COLORS = {"gpt2": "#0072B2", "igpt": "#D55E00", "igpt-as-gpt2": "#E69F00", "random": "#555555", "random-gpt2": "#009E73"}
OTHER_COLOR = "#CC79A7"  # Okabe and Ito's palette: also for the colour-blind


def plot_learning_curve(records, history, args):
    """Draw return, training loss with saturation, and gradient norm with the clipping threshold; returns the figure."""
    from matplotlib.figure import Figure

    color = COLORS.get(args.backbone, OTHER_COLOR)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    epochs = np.array([r["epoch"] for r in records])
    mean, std = (np.array([r[name] for r in records]) for name in ("return_mean", "return_std"))
    left.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.2, linewidth=0, label="± 1 sd over episodes")
    left.plot(epochs, mean, "o-", color=color, markersize=4, label="mean")
    left.set(xlabel="epoch", ylabel="return", title=f"return of {args.num_eval_episodes} episodes")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(loc="upper left", frameon=False)
    if normalized_score(args.env, 0.0) is not None:
        to_score = lambda x: normalized_score(args.env, x)  # noqa: E731
        zero, slope = to_score(0.0), to_score(1.0) - to_score(0.0)
        scores = left.secondary_yaxis("right", functions=(to_score, lambda y: (y - zero) / slope))
        scores.set_ylabel("normalized score")
    steps = [h["step"] for h in history]
    middle.plot(steps, [h["loss"] for h in history], color=color, label="loss")
    middle.plot(steps, [h["saturated_fraction"] for h in history], color="black", linewidth=1, linestyle=":", label="share of |action| > 0.99")
    middle.set(xlabel="training step", ylabel="mean squared action error / share", title="training loss", ylim=(0, None))
    middle.legend(frameon=False)
    right.plot(steps, [h["grad_norm"] for h in history], color=color, label="before clipping")
    if args.max_grad_norm:
        right.axhline(args.max_grad_norm, color="black", linewidth=1, linestyle="--", label=f"threshold {args.max_grad_norm:g}")
    right.set(xlabel="training step", ylabel="gradient norm", title="gradient norm", yscale="log")
    right.legend(frameon=False)
    sample = ", bundled sample" if args.sample else ""
    figure.suptitle(f"{args.env}, {args.backbone}, K = {args.context_length}, seed {args.seed}{sample}")
    return figure


# ======================================================================================================================
# Experiment
# ======================================================================================================================
if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.sample:
        args = tyro.cli(Args, default=SAMPLE)
    args = resolve(args)
    run_folder = Path("runs") / args.run_name
    if run_folder.exists():
        stop(f"{run_folder} already exists; choose another --run-name.")
    if args.sample:
        print("This is the bundled sample: small backbones, small data, few steps. It is not the paper's experiment.")

    torch.manual_seed(args.seed)
    env = make_env(args)
    data = load_data(args, env)
    config, weights, backbone_source = load_backbone(args)
    max_timestep = max(1000, env.spec.max_episode_steps or 0, int(data.timesteps.max()) + 1)
    shape = dict(state_dim=len(data.state_mean), act_dim=data.actions.shape[1], max_timestep=max_timestep)
    model = DecisionTransformer(config, **shape)
    if weights is not None:
        model.transformer.load_state_dict(weights)  # strict: every name and shape must be there
    model.to(args.device)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.backbone}: {config.n_layer} blocks, {config.n_embd} wide, {num_parameters / 1e6:.1f} M parameters, from {backbone_source}")
    print(f"{data.dataset_id}: {len(data.states):,} steps in {data.num_episodes} episodes; {args.env}; {args.device}")

    (run_folder / "checkpoints").mkdir(parents=True)
    save_json(run_folder / "args.json", asdict(args))
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run_folder)
    rows = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|argument|value|\n|-|-|\n{rows}")

    optimizer = torch.optim.AdamW(
        model.parameters(), args.learning_rate, weight_decay=args.weight_decay, eps=1e-8 if weights is None else 1e-6, fused=True
    )
    windows = torch.Generator(args.device).manual_seed(args.seed)  # draws the starts of the windows
    metric_names = ("loss", "grad_norm", "clipped_fraction", "saturated_fraction")
    log_interval = max(1, args.steps_per_epoch // 25)
    records, history = [], []  # one entry per epoch, one per logging interval
    step, train_seconds, eval_seconds = 0, 0.0, 0.0

    for epoch in range(args.num_epochs + 1):  # epoch 0 only evaluates: the model before fine-tuning
        model.train()
        epoch_start = interval_start = time.perf_counter()
        epoch_sums = np.zeros(len(metric_names))
        sums = torch.zeros(len(metric_names), device=args.device)  # summed on the device, read once per logging interval
        num_steps = args.steps_per_epoch if epoch else 0
        progress = tqdm(range(num_steps), desc=f"epoch {epoch}/{args.num_epochs}", unit="step", disable=not num_steps)
        for step_of_epoch in progress:
            starts = torch.randint(len(data.states), (args.batch_size,), generator=windows, device=args.device)
            loss, saturated = training_loss(model, data.windows(starts, args.context_length))
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
            learning_rate = args.learning_rate * min((step + 1) / max(args.warmup_steps, 1), 1)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            clipped = grad_norm > (args.max_grad_norm or math.inf)
            sums += torch.stack([loss.detach(), grad_norm, clipped.float(), saturated])
            step += 1

            if (step_of_epoch + 1) % log_interval == 0 or step_of_epoch + 1 == num_steps:
                totals = sums.cpu().numpy().astype(float)
                steps_since = step_of_epoch % log_interval + 1
                steps_per_second = steps_since / (time.perf_counter() - interval_start)
                means = {name: total / steps_since for name, total in zip(metric_names, totals)}
                history.append({"step": step, **means})
                for name, value in {**means, "learning_rate": learning_rate, "steps_per_second": steps_per_second}.items():
                    writer.add_scalar(f"train/{name}", value, step)
                progress.set_postfix(loss=f"{means['loss']:.4f}", grad_norm=f"{means['grad_norm']:.3f}")
                epoch_sums += totals
                sums.zero_()
                interval_start = time.perf_counter()
        train_seconds += time.perf_counter() - epoch_start

        eval_start = time.perf_counter()
        returns, lengths = evaluate(model, env, data, args)
        eval_seconds += time.perf_counter() - eval_start
        record = {"epoch": epoch, "step": step}
        record |= {name: total / num_steps if num_steps else None for name, total in zip(metric_names, epoch_sums)}
        record |= {"return_mean": float(returns.mean()), "return_std": float(returns.std())}
        record |= {"length_mean": float(lengths.mean()), "normalized_score": normalized_score(args.env, float(returns.mean()))}
        records.append(record)
        for name in ("return_mean", "return_std", "length_mean", "normalized_score"):
            if record[name] is not None:
                writer.add_scalar(f"eval/{name}", record[name], step)
        score = "" if record["normalized_score"] is None else f", normalized score {record['normalized_score']:.1f}"
        tqdm.write(f"epoch {epoch}: return {returns.mean():.1f} ± {returns.std():.1f}, length {lengths.mean():.0f}{score}")

        if epoch in args.save_epochs or epoch == args.num_epochs:
            checkpoint = dict(
                script=SCRIPT, epoch=epoch, step=step, args=asdict(args), config=asdict(config), shape=shape,
                model=model.state_dict(), state_mean=data.state_mean, state_std=data.state_std,
            )  # fmt: skip
            save(run_folder / "checkpoints" / f"epoch_{epoch}.pt", lambda file: torch.save(checkpoint, file))

    trained = records[1:]
    best = max(trained, key=lambda r: r["return_mean"])
    last_quarter = [r["normalized_score"] for r in trained[-max(1, len(trained) // 4) :]]
    summary = dict(
        script=SCRIPT,
        backbone=args.backbone,
        backbone_source=backbone_source,
        env=args.env,
        dataset=data.dataset_id,
        dataset_steps=len(data.states),
        dataset_episodes=data.num_episodes,
        context_length=args.context_length,
        seed=args.seed,
        sample=args.sample,
        device=args.device,
        parameters=num_parameters,
        steps=step,
        epochs=records,
        best_epoch=best["epoch"],
        best_normalized_score=best["normalized_score"],
        final_normalized_score=trained[-1]["normalized_score"],
        mean_last_quarter_normalized_score=None if None in last_quarter else float(np.mean(last_quarter)),
        steps_per_second=step / train_seconds,
        train_seconds=train_seconds,
        eval_seconds=eval_seconds,
    )
    save_json(run_folder / "summary.json", summary)
    figure = plot_learning_curve(records, history, args)
    save(run_folder / "learning_curve.png", lambda file: figure.savefig(file, format="png", dpi=120))
    writer.add_figure("learning_curve", figure, step)
    writer.close()
    print_table(records, summary)
    print(f"\n{run_folder}: summary.json, learning_curve.png, checkpoints/; or: tensorboard --logdir runs")
