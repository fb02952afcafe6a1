"""What the representations keep through fine-tuning, and how much they know of the data.

    python analyze_repr.py --sample                                              # three backbones, four minutes on two cores
    python analyze_repr.py --backbones random gpt2 igpt --env Hopper-v4          # fine-tunes each for 40 epochs, as the paper
    python analyze_repr.py --runs runs/EARLIER_RUN runs/ANOTHER --epochs 0 40    # analyses checkpoints instead

Paper: S. Takagi, "On the Effect of Pre-training for Transformer in Different Modality on Offline Reinforcement
Learning", NeurIPS 2022, https://arxiv.org/abs/2211.09817 (sections 5.1 and 5.2, Apps. D, E and H.2, Fig. 2). The sections
from Defaults to Run are those of dt_pretrained.py, Study is that of analyze_grads.py; what is particular to this question is
Activations, CKA, Mutual information, Analysis, Figures and Experiment.
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
    """the two epochs to compare, before and after fine-tuning; if not given, 0 and the last"""
    cka_windows: int = 100
    """windows on which activations are compared; 0 leaves CKA out"""
    cka_threshold: float = 0.23
    """layers whose CKA before and after fine-tuning is above this are listed"""
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
    mine_group: int = 400
    """estimators trained side by side; changes memory, not results"""
    mine_paper_settings: bool = False
    """100 windows, batches of 50, 1,000 passes, raw inputs, read off the training windows: memorization counts as well"""

    env: str = "Hopper-v4"
    """gymnasium environment: Hopper, HalfCheetah or Walker2d, -v4 or -v5; another one needs --dataset and --target-return"""
    dataset: str | None = None
    """Minari id, folder of a Minari data set, or D4RL .hdf5 file; if not given, mujoco/{hopper,halfcheetah,walker2d}/medium-v0"""
    sample: bool = False
    """run on the small bundled data and backbones, every size that is not set chosen for four minutes on two CPU cores"""

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
    save_epochs: tuple[int, ...] = (0,)
    """epochs after which a checkpoint is kept, 0 being before training; the last is always kept"""
    run_name: str | None = None
    """folder under runs/; if not given, {env}__{script}__{seed}__{time}"""
    resume: str | None = None
    """folder of the run to go on with, the others follow; arguments hold, but for --num-epochs, --save-epochs and --device"""

    backbone: tyro.conf.Suppress[str] = "random"
    """which of the backbones is being trained; set by the script"""
    study: tyro.conf.Suppress[str] = ""
    """all arguments as they were given, in a run that is one of several; set by the script"""


# What --sample changes where the user did not say otherwise.
SAMPLE = Args(
    sample=True, batch_size=32, learning_rate=2e-3, warmup_steps=400, num_epochs=2, steps_per_epoch=200, num_eval_episodes=8,
    cka_threshold=0.8, mine_windows=1500, mine_batch_size=150, mine_repeats=1, mine_steps=2,
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
# Activations: what every layer says about a window
# ======================================================================================================================
TOKENS = ("return", "state", "action")  # the three tokens of a time step, in their order
LAYERS = "ln_1 attn.c_attn attn.c_proj attn.resid_dropout ln_2 mlp.c_fc mlp.act mlp.c_proj mlp.dropout".split()
BLOCK_OUTPUT = "mlp.dropout"  # what the paper calls a block's output: before it is added to the residual stream


def layer_names(num_blocks):
    """All layers in the order of computation: ["0.ln_1", "0.attn.c_attn", ...], nine per block."""
    return [f"{block}.{layer}" for block in range(num_blocks) for layer in LAYERS]


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


def whole_windows(data, context_length):
    """Starts of all windows that end before their episode does, and whether they are in an odd one of the episodes."""
    starts = torch.arange(len(data.episode_ends), device=data.episode_ends.device)
    whole = starts + context_length <= data.episode_ends
    _, episode = torch.unique(data.episode_ends, return_inverse=True)
    return starts[whole], episode[whole] % 2 == 1


def choose(starts, count, generator, what):
    """Return `count` different ones of `starts` in random order."""
    if len(starts) < count:
        stop(f"the data set has {len(starts)} whole windows for {what}, not {count}; lower --cka-windows or --mine-windows.")
    return starts[torch.randperm(len(starts), generator=generator)[:count].to(starts.device)]


# ======================================================================================================================
# CKA: how similar two layers represent the same windows (section 5.1)
# ======================================================================================================================
def gram_matrices(activations_of_layers):
    """U-centred Gram matrices of layers, each of length 1: a list of [windows, width] to [layers, windows * windows].

    U-centring (Székely and Rizzo 2014) makes inner products of Gram matrices unbiased estimates of HSIC up to a constant
    that CKA does not see, which is the debiased estimator of Kornblith et al. 2019. A layer that is constant has no direction: nan.
    """
    rows = []
    for x in activations_of_layers:
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

    Each is features -> 400 -> 400 -> 400 -> 1 with ReLU and starts as nn.Linear does, from a seed of its own. They share
    nothing; batched matrix products only train them at the same time.
    """

    def __init__(self, num_features, seeds):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        generators = {seed: torch.Generator().manual_seed(seed) for seed in seeds}
        sizes = (num_features, 400, 400, 400, 1)
        for n_in, n_out in zip(sizes, sizes[1:]):
            drawn = {seed: (2 * torch.rand(n_in + 1, n_out, generator=g) - 1) / n_in**0.5 for seed, g in generators.items()}
            layer = torch.stack([drawn[seed] for seed in seeds])
            self.weights.append(nn.Parameter(layer[:, :-1].contiguous()))
            self.biases.append(nn.Parameter(layer[:, -1:].contiguous()))

    def forward(self, x):
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, F.relu(x) if i else x, weight)
        return x.squeeze(-1)


def donsker_varadhan(joint, marginal):
    """The bound E_joint[T] - log E_marginal[exp T] in nats: [estimators, samples] twice to [estimators]."""
    return joint.mean(1) - (torch.logsumexp(marginal, 1) - math.log(marginal.shape[1]))


def mutual_information(x, t, pairs, args, description=""):
    """Estimate the mutual information of x[i] and t[j] for each (i, j) of `pairs` by MINE (Belghazi et al. 2018).

    `x` and `t` are lists of variables, [windows, features] and [windows, width]: the first half of the windows trains the
    estimators, the second half is held out. Returns the held-out and the training estimates in nats, both
    [args.mine_repeats, pairs]; nan where an estimator has diverged. All estimators of a repeat start from the same
    weights and see the windows in the same order, so that they differ by their data only.
    """
    seeds = [args.seed + repeat for repeat in range(args.mine_repeats)]
    jobs = [(seed, i, j) for seed in seeds for i, j in pairs]
    groups = [jobs[first : first + args.mine_group] for first in range(0, len(jobs), args.mine_group)]
    steps = args.mine_passes * (args.mine_windows // args.mine_batch_size)
    with tqdm(total=len(groups) * steps, desc=f"MINE {description}", unit="step", leave=False) as bar:
        estimates = [estimate_group(x, t, group, args, bar) for group in groups]
    held_out, training = torch.cat(estimates, dim=1).unflatten(1, (len(seeds), -1)).cpu().double().numpy()
    return held_out, training


def estimate_group(x, t, jobs, args, bar):
    """Train the estimators of some (seed, i, j) side by side; returns their held-out and training estimates [2, jobs]."""
    seeds, of_x, of_t = zip(*jobs)
    used, of_t = torch.unique(torch.tensor(of_t), return_inverse=True)  # of all representations only those of this group
    x, t = torch.stack(x).to(args.device), torch.stack([t[i] for i in used]).to(args.device)
    half = args.mine_windows
    if not args.mine_paper_settings:  # no information is gained or lost by units, but a network learns better in these
        x, t = ((v - v[:, :half].mean(1, keepdim=True)) / (v[:, :half].std(1, keepdim=True) + 1e-6) for v in (x, t))
    networks = StatisticsNetworks(x.shape[-1] + t.shape[-1], seeds).to(args.device)
    optimizer = torch.optim.Adam(networks.parameters(), 1e-4, fused=True)
    rows_x, rows_t = torch.tensor(of_x)[:, None].to(args.device), of_t[:, None].to(args.device)

    def statistics(windows, partners):
        """T on pairs that belong together, and with x from the partners [jobs, windows] on pairs that do not."""
        batch_t = t[rows_t, windows]
        joint, marginal = (torch.cat([x[rows_x, of], batch_t], dim=-1) for of in (windows, partners))
        return networks(torch.cat([joint, marginal], dim=1)).chunk(2, dim=1)

    generators, average = {seed: torch.Generator().manual_seed(seed) for seed in seeds}, None

    def shuffled(count):
        """A random order of `count` windows for each job, the same for all of a seed: [jobs, count]."""
        orders = {seed: torch.randperm(count, generator=generator) for seed, generator in generators.items()}
        return torch.stack([orders[seed] for seed in seeds]).to(args.device)

    batch_size = args.mine_batch_size
    for _ in range(args.mine_passes):
        order = shuffled(half)[:, : half // batch_size * batch_size]
        for windows in order.split(batch_size, dim=1):
            joint, marginal = statistics(windows, windows.gather(1, shuffled(batch_size)))
            mean_exp = marginal.exp().mean(1)
            average = mean_exp.detach() if average is None else torch.lerp(average, mean_exp.detach(), 0.01)
            loss = mean_exp / average - joint.mean(1)  # its gradient is the bound's, less biased in small batches
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            bar.update()

    @torch.no_grad()
    def estimate(first):
        windows, partners = torch.arange(half, device=args.device).expand(len(jobs), -1) + first, shuffled(half) + first
        parts = [statistics(*part) for part in zip(windows.split(batch_size, dim=1), partners.split(batch_size, dim=1))]
        bound = donsker_varadhan(*(torch.cat(columns, dim=1) for columns in zip(*parts)))
        return torch.where(bound.isfinite(), bound, math.nan)

    return torch.stack([estimate(half), estimate(0)])


def ask(analysis, quantity, block, variable, representation):
    """A question, without its answer: the information of a (token, step) of the data and of one of the representations.

    Figures show it at the `token` and `step` that the question is about, which is not the label in Fig. 2.
    """
    token, step = representation if (analysis, quantity) == ("context", "I(Y;T)") else variable
    question = dict(analysis=analysis, quantity=quantity, block=block, token=token, step=step)
    return question | dict(variable=variable, representation=representation, control=False)


def with_controls(asked):
    """Add a control to each panel of a figure: its last question, with the windows of the data shuffled."""
    panels = {(q["analysis"], q["quantity"], q["block"] if q["analysis"] == "context" else None): q for q in asked}
    return asked + [q | dict(control=True) for q in panels.values()]


def questions(num_blocks, context_length, steps):
    """What the paper asks of one model.

    "context" (Fig. 2) is I(x_t; T(s_K)), which is I(X;T), and I(a_K; T(x_t)), which is I(Y;T), for every token x_t but a_K in
    a shallow, a middle and a deep block; "no context" (App. E) is I(s_t; T(s_t)) and I(a_t; T(s_t)) in every block.
    """
    last, asked = context_length - 1, []
    for block, step in itertools.product(range(num_blocks), steps):
        asked.append(ask("no context", "I(X;T)", block, ("state", step), ("state", step)))
        asked.append(ask("no context", "I(Y;T)", block, ("action", step), ("state", step)))
    for block, step in itertools.product(dict.fromkeys((0, num_blocks // 2, num_blocks - 1)), steps):
        for token in TOKENS if step < last else TOKENS[:2]:
            asked.append(ask("context", "I(X;T)", block, (token, step), ("state", last)))
            asked.append(ask("context", "I(Y;T)", block, ("action", last), (token, step)))
    return with_controls(asked)


def questions_of_data(steps):
    """What the paper asks of the data alone (App. H.2): I(s_t; a_t) and I(R_t; a_t)."""
    variables = itertools.product({"state": "I(s;a)", "return": "I(R;a)"}.items(), steps)
    return with_controls(
        [ask("data", quantity, None, (token, step), ("action", step)) for (token, quantity), step in variables]
    )


def answer(asked, windows, representations, args, description):
    """Answer `questions` by MINE; returns them with "held_out" and "training" estimates in nats, one per repeat.

    `representations` is {(block, token, step): [windows, width]}.
    """
    generator = torch.Generator().manual_seed(args.seed)
    halves = [torch.randperm(args.mine_windows, generator=generator) + offset for offset in (0, args.mine_windows)]
    shuffled = torch.cat(halves).to(windows[0].device)
    keys, answers = list(representations), []
    for token, x in zip(TOKENS, windows):
        of_token = [q for q in asked if q["variable"][0] == token]
        if not of_token:
            continue
        columns = [*x.transpose(0, 1), *x[shuffled].transpose(0, 1)]  # K steps, and K shuffled ones
        places = [q["variable"][1] + q["control"] * x.shape[1] for q in of_token]
        pairs = list(zip(places, [keys.index((q["block"], *q["representation"])) for q in of_token]))
        estimates = mutual_information(columns, list(representations.values()), pairs, args, f"{description}, {token}")
        answers += [q | dict(held_out=a, training=b) for q, a, b in zip(of_token, *np.swapaxes(estimates, 1, 2))]
    return answers


# ======================================================================================================================
# Analysis: the models before and after fine-tuning
# ======================================================================================================================
def chosen_steps(args, context_length):
    """The time steps of a window at which information is estimated; the last is always one of them."""
    count = min(args.mine_steps or context_length, context_length)
    return sorted({round(step) for step in np.linspace(context_length - 1, 0, count)})


def same_question(checkpoints):
    """Refuse models that cannot be shown the same windows; returns what they share."""
    shared = {name: checkpoints[0]["args"][name] for name in ("env", "dataset", "context_length")}
    for checkpoint in checkpoints[1:]:
        for name, value in shared.items():
            if checkpoint["args"][name] != value:
                stop(f"the runs cannot be compared, their {name} differs: {value} and {checkpoint['args'][name]}.")
    return shared


def compare_layers(before, after, windows, args):
    """Gram matrices of all layers at the last step's tokens: {("before" or "after", token): [layers, windows * windows]}."""
    last_step = [3 * windows[0].shape[1] + i for i in (-3, -2, -1)]
    grams = {}
    for when, checkpoint in (("before", before), ("after", after)):
        model = rebuild_model(checkpoint, args.device)
        outputs = activations(model, windows, dict.fromkeys(layer_names(len(model.transformer.h)), last_step))
        for i, token in enumerate(TOKENS):
            grams[when, token] = gram_matrices([output[i] for output in outputs.values()])
    return grams


def measure_information(checkpoint, windows, args, label):
    """Answer the paper's questions about one model."""
    model, K = rebuild_model(checkpoint, args.device), windows[0].shape[1]
    asked = questions(len(model.transformer.h), K, chosen_steps(args, K))
    needed = {}
    for block, (token, step) in sorted({(q["block"], q["representation"]) for q in asked}):
        needed.setdefault(block, []).append((token, step))
    wanted = {f"{b}.{BLOCK_OUTPUT}": [3 * step + TOKENS.index(token) for token, step in needed[b]] for b in needed}
    outputs = activations(model, windows, wanted)
    representations = {(b, *key): x for b, layer in zip(needed, wanted) for key, x in zip(needed[b], outputs.pop(layer))}
    return answer(asked, windows, representations, args, label)


def measure_information_in_data(windows, args):
    """Answer the paper's questions about the data."""
    K = windows[0].shape[1]
    representations = {(None, "action", step): windows[2][:, step] for step in range(K)}
    return answer(questions_of_data(chosen_steps(args, K)), windows, representations, args, "data")


def analyse(folders, args):
    """Analyse finished runs in float32, all on the same windows; returns one result per run and the answers about the data."""
    pairs = []
    for folder in folders:
        last = len(read_records(folder, args.epochs or (0,))) - 1
        pairs.append([load_checkpoint(folder, epoch) for epoch in args.epochs or (0, last)])
    shared = same_question([after for _, after in pairs])
    data_args = replace(args, env=shared["env"], dataset=shared["dataset"])
    data = load_data(data_args, make_env(data_args, 1))
    generator = torch.Generator().manual_seed(args.seed)
    starts, odd = whole_windows(data, shared["context_length"])
    cka_starts = choose(starts, args.cka_windows, generator, "CKA")
    halves = [choose(starts[half], args.mine_windows, generator, "MINE") for half in (~odd, odd)]
    cka_windows, mine_windows = (data.windows(s, shared["context_length"]) for s in (cka_starts, torch.cat(halves)))
    in_data = measure_information_in_data(mine_windows, args) if args.mine_windows else []
    results = []
    for folder, (before, after) in zip(folders, tqdm(pairs, desc="analysis", unit="model")):
        trained_with = after["args"]
        label = trained_with.get("member") or backbone_name(trained_with["backbone"])
        result = dict(label=label, folder=str(folder), epochs=(before["epoch"], after["epoch"]), seed=trained_with["seed"])
        result |= dict(shared, num_blocks=after["architecture"]["config"]["n_layer"])
        result["grams"] = compare_layers(before, after, cka_windows, args) if args.cka_windows else None
        result["information"] = measure_information(after, mine_windows, args, label) if args.mine_windows else []
        results.append(result)
    labels = [r["label"] for r in results]
    for r in results:
        r["name"] = r["label"] if labels.count(r["label"]) == 1 else Path(r["folder"]).name
    return results, in_data


# ======================================================================================================================
# Figures
# ======================================================================================================================
MARKERS = {"return": "^", "state": "o", "action": "x"}
DEPTHS = ("shallow", "middle", "deep")


def title(results, args, what):
    """What a figure shows, of which environment, K, seeds and epochs, and whether it is the sample."""
    seeds = ", ".join(sorted({str(r["seed"]) for r in results}))
    epochs = ", ".join(sorted({f"{before} and {after}" for before, after in (r["epochs"] for r in results)}))
    of = f"{results[0]['env']}, K = {results[0]['context_length']}, seed {seeds}, epochs {epochs}{', bundled sample' * args.sample}"
    return f"{what}\n{of}"


def similarity(result, token):
    """CKA of each layer before and after fine-tuning [layers]."""
    return (result["grams"]["before", token] * result["grams"]["after", token]).sum(1).numpy()


def plot_cka(results, args):
    """CKA of every layer before and after fine-tuning over depth, LayerNorms marked (section 5.1)."""
    figure = new_figure(title(results, args, f"CKA before and after fine-tuning, {args.cka_windows} windows"), 15, 4.5)
    num_blocks = min(r["num_blocks"] for r in results)
    depth = (np.arange(num_blocks * len(LAYERS)) + 0.5) / (num_blocks * len(LAYERS))
    norms = [i for i, name in enumerate(layer_names(num_blocks)) if ".ln_" in name]
    for axes, token in zip(figure.subplots(1, 3, sharey=True), TOKENS):
        for r in results:
            values = align(similarity(r, token), num_blocks)
            axes.plot(depth, values, color=COLORS[r["label"]], label=r["name"], marker=".", markersize=3, linewidth=1)
            axes.plot(depth[norms], values[norms], "D", color=COLORS[r["label"]], markersize=5)
        axes.axhline(args.cka_threshold, color="black", linestyle="--", linewidth=0.8)
        axes.set(title=f"{token} token of the last step", xlabel="depth, 0 first layer, 1 last")
        axes.set_ylim(min(0, axes.get_ylim()[0]), 1.03)
    figure.axes[0].set_ylabel("linear CKA, debiased")
    figure.axes[0].plot([], [], "D", color="black", markersize=5, label="LayerNorm")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def heat_maps(results, token):
    """CKA matrices (title, model in rows, model in columns, values): each before and after, the fine-tuned ones in pairs."""
    panels = [(f"{r['name']}, {when}", r, r, when) for when in ("before", "after") for r in results]
    panels += [(f"{a['name']} and {b['name']}, after", a, b, "after") for a, b in itertools.combinations(results, 2)]
    return [
        (heading, a["name"], b["name"], cka(a["grams"][when, token], b["grams"][when, token]).numpy())
        for heading, a, b, when in panels
    ]


def plot_heat_maps(results, args, token):
    """Draw `heat_maps`: rows and columns are layers in the order of computation (App. D)."""
    maps, columns = heat_maps(results, token), max(len(results), 2)
    rows = math.ceil(len(maps) / columns)
    what = f"CKA of all layers with all layers, {token} token of the last step, {args.cka_windows} windows"
    figure = new_figure(title(results, args, what), 4 * columns + 1, 3.8 * rows + 0.8)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in axes[len(maps) :]:
        unused.set_axis_off()
    for panel, (heading, in_rows, in_columns, values) in zip(axes, maps):
        image = panel.imshow(values, vmin=0, vmax=1, cmap="viridis", origin="lower")
        panel.set(title=heading, xlabel=f"layer of {in_columns}", ylabel=f"layer of {in_rows}")
    figure.colorbar(image, ax=list(axes), label="linear CKA, debiased", shrink=0.5)
    return figure


def estimate_names(args):
    """The two estimates by the name of their place in the answers, the one that the settings rely on first."""
    names = {"held_out": "held-out windows", "training": "its own training windows"}
    return dict(reversed(names.items())) if args.mine_paper_settings else names


def with_settings(args, what):
    settings = "the paper's settings" if args.mine_paper_settings else "MINE"
    repeats = f"{args.mine_repeats} repeat{'s' * (args.mine_repeats > 1)}"
    return f"{what}: {settings}, {args.mine_windows:,} windows, {args.mine_passes:,} passes, {repeats}"


def select(answers, **properties):
    """The answers to questions with these properties, in the order in which they were asked."""
    return [a for a in answers if all(a[name] == value for name, value in properties.items())]


def plot_information(results, args):
    """Information over the position of the token, in three blocks: triangles return, circles state, crosses action (Fig. 2)."""
    what = with_settings(args, "information of the representation about input X and label Y")
    figure = new_figure(title(results, args, what), 14, 14)
    grid = figure.subplots(4, 3, sharex=True, sharey="row")
    last = results[0]["context_length"] - 1
    rows = [(quantity, estimate) for quantity in ("I(X;T)", "I(Y;T)") for estimate in estimate_names(args)]
    for panels, (quantity, estimate) in zip(grid, rows):
        for r in results:
            context = select(r["information"], analysis="context", quantity=quantity)
            blocks, color = sorted({a["block"] for a in context}), COLORS[r["label"]]
            for axes, block, depth in zip(panels, blocks, DEPTHS):
                for token, marker in MARKERS.items():
                    points = select(context, control=False, block=block, token=token)
                    if not points:  # without context there is no action before the last one
                        continue
                    values = np.array([a[estimate] for a in points])  # [steps, repeats]
                    style = dict(color=color, marker=marker, markersize=5, linewidth=0.6, elinewidth=0.8, capsize=2)
                    axes.errorbar([a["step"] - last for a in points], values.mean(1), values.std(1), **style)
                control = np.nanmean([a[estimate] for a in select(context, control=True, block=block)])
                axes.axhline(control, color=color, linestyle="--", linewidth=1)
                axes.set_title(f"{depth} block, read off {estimate_names(args)[estimate]}", fontsize="medium")
        panels[0].set_ylabel(f"{quantity}, nats")
    for axes in grid[-1]:
        axes.set_xlabel("time step of the token, 0 the last")
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles = [axes.plot([], [], color=COLORS[r["label"]], label=r["name"])[0] for r in results]
    handles += [axes.plot([], [], marker, color="black", label=token)[0] for token, marker in MARKERS.items()]
    handles += axes.plot([], [], "--", color="black", label="control: data shuffled")
    figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False)
    return figure


def plot_no_context(results, args):
    """Information about the same step's state and action in every block, mean and spread over the steps (App. E)."""
    what = with_settings(args, "information of T(s_t) about the same step's state and action")
    figure = new_figure(title(results, args, what), 12, 8)
    grid = figure.subplots(2, 2, sharex=True, sharey="col")
    for panels, (estimate, description) in zip(grid, estimate_names(args).items()):
        for axes, (quantity, formula) in zip(panels, {"I(X;T)": "I(s_t; T(s_t))", "I(Y;T)": "I(a_t; T(s_t))"}.items()):
            for r in results:
                answers, color = select(r["information"], analysis="no context", quantity=quantity), COLORS[r["label"]]
                depth = (np.arange(r["num_blocks"]) + 0.5) / r["num_blocks"]
                values = np.mean([a[estimate] for a in select(answers, control=False)], axis=1)
                values = values.reshape(r["num_blocks"], -1)  # [blocks, steps]
                mean, spread = np.nanmean(values, axis=1), np.nanstd(values, axis=1)
                axes.plot(depth, mean, color=color, marker="o", markersize=4, label=r["name"])
                axes.fill_between(depth, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
                control = np.nanmean([a[estimate] for a in select(answers, control=True)])
                axes.axhline(control, color=color, linestyle="--", linewidth=1)
            axes.set(ylabel=f"{formula}, nats", title=f"read off {description}")
    for axes in grid[-1]:
        axes.set_xlabel("depth, 0 first block, 1 last")
    axes.plot([], [], "--", color="black", label="control: data shuffled")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def plot_data_information(results, in_data, args):
    """Information between action and state or return-to-go of the same step, one point per step (App. H.2)."""
    figure = new_figure(title(results, args, with_settings(args, "information in the data itself")), 9, 4.5)
    for axes, (estimate, description) in zip(figure.subplots(1, 2, sharey=True), estimate_names(args).items()):
        for place, (quantity, formula) in enumerate({"I(s;a)": "I(s_t; a_t)", "I(R;a)": "I(R_t; a_t)"}.items(), start=1):
            values = np.mean([a[estimate] for a in select(in_data, control=False, quantity=quantity)], axis=1)  # [steps]
            axes.boxplot([values[np.isfinite(values)]], positions=[place], widths=0.3, tick_labels=[formula])
            axes.plot(np.full(len(values), place), values, ".", color=COLORS["data"], markersize=4)
            (control,) = select(in_data, control=True, quantity=quantity)
            axes.hlines(np.mean(control[estimate]), place - 0.3, place + 0.3, color="black", linestyle="--", linewidth=1)
        axes.set_title(f"read off {description}", fontsize="medium")
    figure.axes[0].set_ylabel("nats (dashed: data shuffled)")
    return figure


def figures(results, in_data, args):
    """All figures by name."""
    found = {}
    if args.cka_windows:
        found["cka_before_after"] = plot_cka(results, args)
        found |= {f"cka_heat_maps_{token}": plot_heat_maps(results, args, token) for token in TOKENS}
    if args.mine_windows:
        found["mutual_information"] = plot_information(results, args)
        found["mutual_information_no_context"] = plot_no_context(results, args)
        found["mutual_information_data"] = plot_data_information(results, in_data, args)
    return found


def above_threshold(result, token, threshold):
    """Names of the layers that fine-tuning has changed least."""
    return [name for name, value in zip(layer_names(result["num_blocks"]), similarity(result, token)) if value > threshold]


def print_similarity(results, args):
    """Print mean CKA before and after fine-tuning, and which layers are above the threshold."""
    width = max(len(r["name"]) for r in results) + 2
    what = f"layers above {args.cka_threshold:g}, LayerNorms among them"
    print(f"\nCKA before and after fine-tuning, mean over layers ({what})")
    print(" " * width + "".join(f"{token:>22}" for token in TOKENS))
    for r in results:
        above = {token: above_threshold(r, token, args.cka_threshold) for token in TOKENS}
        counts = {token: f"({len(names)}, {sum('.ln_' in name for name in names)})" for token, names in above.items()}
        cells = [f"{np.nanmean(similarity(r, token)):.3f} {counts[token]:>9}" for token in TOKENS]
        print(r["name"].ljust(width) + "".join(f"{cell:>22}" for cell in cells))
    for r in results:
        kinds = [name.split(".", 1)[1] for name in above_threshold(r, "state", args.cka_threshold)]
        counts = ", ".join(f"{kind} in {kinds.count(kind)}" for kind in LAYERS if kind in kinds)
        print(f"{r['name']}, state token, of {r['num_blocks']} blocks above {args.cka_threshold:g}: {counts or 'none'}")


def print_information(results, in_data, args):
    """Print both estimates per model and block beside those of shuffled data, and how many estimators diverged."""

    def cell(answers):
        return " / ".join(f"{np.nanmean([a[estimate] for a in answers]):.2f}" for estimate in estimate_names(args))

    width = max(len(r["name"]) for r in results) + 2
    print("\n" + with_settings(args, "Information in nats") + "; read off " + " / ".join(estimate_names(args).values()))
    print(" " * (width + 8) + "".join(f"{name:>16}" for name in (*DEPTHS, "data shuffled")))
    for r in results:
        for quantity in ("I(X;T)", "I(Y;T)"):
            context = select(r["information"], analysis="context", quantity=quantity)
            cells = [cell(select(context, control=False, block=block)) for block in sorted({a["block"] for a in context})]
            cells.append(cell(select(context, control=True)))
            print(r["name"].ljust(width) + quantity.ljust(8) + "".join(f"{text:>16}" for text in cells))
    for quantity in ("I(s;a)", "I(R;a)"):
        value, control = (cell(select(in_data, control=control, quantity=quantity)) for control in (False, True))
        print(f"in the data, {quantity}: {value}, data shuffled {control}")
    answers = [a for r in results for a in r["information"]] + in_data
    missing = sum(int(np.isnan([a["held_out"], a["training"]]).any(axis=0).sum()) for a in answers)
    print(f"{missing} of {len(answers) * args.mine_repeats} estimators diverged and are missing.")


# ======================================================================================================================
# Experiment
# ======================================================================================================================
def check(args):
    """Refuse what only this script has and cannot work, before anything is trained; returns the arguments resolved."""
    if args.mine_paper_settings:
        args = replace(args, mine_windows=100, mine_batch_size=50, mine_passes=1000)
    if args.epochs and len(args.epochs) != 2:
        stop(f"--epochs takes the two epochs to compare, such as 0 40, but has {len(args.epochs)}.")
    if 0 < args.cka_windows < 4 or args.cka_windows < 0:
        stop("--cka-windows must be at least 4, which the debiased estimator needs, or 0 to leave CKA out.")
    if args.mine_windows < 0 or min(args.mine_batch_size, args.mine_passes, args.mine_repeats, args.mine_group) < 1:
        stop("--mine-batch-size, --mine-passes, --mine-repeats and --mine-group must be at least 1, --mine-windows at least 0.")
    if 0 < args.mine_windows < args.mine_batch_size or args.mine_steps is not None and args.mine_steps < 1:
        stop("--mine-windows must not be below --mine-batch-size (0 leaves MINE out), and --mine-steps must be at least 1.")
    if not args.cka_windows and not args.mine_windows:
        stop("with --cka-windows 0 and --mine-windows 0 nothing is left to analyse.")
    check_epochs(args)
    if args.runs:
        same_question([load_checkpoint(Path(folder), (args.epochs or (0,))[-1]) for folder in args.runs])
    return args


def numbers(results, in_data, args):
    """Every number that a figure shows, but for the heat maps."""
    runs = []
    for r in results:
        run = {name: value for name, value in r.items() if name != "grams"}
        if args.cka_windows:
            run["layers"] = layer_names(r["num_blocks"])
            run["cka"] = {token: similarity(r, token) for token in TOKENS}
            run["above_threshold"] = {token: above_threshold(r, token, args.cka_threshold) for token in TOKENS}
        runs.append(run)
    return dict(args=asdict(args), runs=runs, data=in_data)


if __name__ == "__main__":
    args, study = open_study(parse_arguments())
    args = check(args)
    runs = {} if args.runs else {Path(backbone).name: run_args(args, backbone) for backbone in args.backbones}
    analysis_args = resolve(replace(args, precision="fp32"))
    with process_group(), explained(analysis_args):
        for name, arguments in runs.items():
            train(arguments, study / name)
        if RANK == 0:
            folders = [study / name for name in runs] or [Path(folder) for folder in args.runs]
            print(f"\nthe analysis follows; by itself: python {SCRIPT}.py --runs {' '.join(map(str, folders))}")
            warnings.filterwarnings("ignore", "Mean of empty slice|Degrees of freedom")  # where every estimate is missing
            results, in_data = analyse(folders, analysis_args)
            study.mkdir(parents=True, exist_ok=True)
            save_json(study / "results.json", numbers(results, in_data, args))
            for name, figure in figures(results, in_data, args).items():
                save_figure(figure, study, name, max(r["epochs"][1] for r in results))
            if args.cka_windows:
                matrices = {f"{token}: {m[0]}": m[-1] for token in TOKENS for m in heat_maps(results, token)}
                save(study / "cka.npz", lambda file: np.savez(file, **matrices))
                print_similarity(results, args)
            if args.mine_windows:
                print_information(results, in_data, args)
            print(
                f"\n{study}: results.json, {'cka.npz ' * bool(args.cka_windows)}and the figures; or: tensorboard --logdir runs"
            )
