r"""Open up the representations: what does fine-tuning leave of them, and what do they know?

    python analyze_repr.py --sample                                    # two CPU cores
    python analyze_repr.py --backbones random gpt2 igpt-as-gpt2        # trains 40 epochs each first
    python analyze_repr.py --runs runs/ONE runs/ANOTHER                # finished runs
    python analyze_repr.py --runs runs/ONE --mine-windows 100 --mine-batch-size 50 \
        --mine-passes 1000 --no-standardize --mine-estimate training   # MINE as the paper ran it

Paper: S. Takagi, "On the Effect of Pre-training for Transformer in Different Modality on Offline
Reinforcement Learning", NeurIPS 2022, https://arxiv.org/abs/2211.09817 (5.1, 5.2, App. D, E, H.2).

A comment like [experiment.py#L321] points to a line of the paper's released code, under
https://github.com/t46/pre-training-different-modality-offline-rl/blob/200abbe/can-wikipedia-help-offline-rl

SPDX-License-Identifier: MIT
"""

import itertools
import json
import math
import os

os.environ["MPLBACKEND"] = "agg"  # to draw to files; Jupyter and Colab set one of their own
import signal
import sys
import textwrap
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import h5py
import imageio.v3 as imageio
import minari
import mujoco
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from minari.storage import get_dataset_path
from pydantic import (
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic.dataclasses import dataclass  # as the standard one, but it checks what it is given
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ASSETS = Path(__file__).resolve().parent / "tests" / "assets"


# ==================================================================================================
# Arguments
# ==================================================================================================
@dataclass
class Args:
    # Starting point and data
    backbone: str = "gpt2"
    """gpt2, igpt, igpt-as-gpt2 (ImageGPT's weights in GPT-2's blocks, as in the paper), random (the
    paper's control: one head, ReLU), random-gpt2 (GPT-2's architecture), a hub id or folder"""
    env: str = "Hopper-v4"
    """Hopper, HalfCheetah or Walker2d, -v4 or -v5; others need --dataset and --target-return"""
    dataset: str | None = None
    """Minari id or folder, or D4RL's .hdf5 file; by default mujoco/{hopper,...}/medium-v0"""
    sample: bool = False
    """bundled data, small backbones and defaults for two CPU cores, as shown by --sample --help"""

    # Model
    context_length: PositiveInt = 20
    """K, the number of time steps that the model sees"""
    dropout: float = Field(0.2, ge=0, lt=1)
    """on the residual branches; on attention weights and the backbone's input it is at most 0.1"""
    head_std: PositiveFloat | None = None
    """standard deviation of the initial weights that action embedding and action head share (try
    0.02); None is nn.Linear's default, as in the paper: the head's tanh starts saturated"""
    return_scale: PositiveFloat = 1000
    """returns-to-go are divided by this: take about the size of a return of your data"""

    # Optimization
    batch_size: PositiveInt = 64
    """windows of K steps per training step of all processes together, a multiple of their number"""
    learning_rate: PositiveFloat = 1e-4
    """of AdamW, after the warm-up"""
    weight_decay: NonNegativeFloat = 1e-4
    """of AdamW, on all parameters"""
    warmup_steps: NonNegativeInt = 5000
    """training steps over which the learning rate rises linearly"""
    max_grad_norm: PositiveFloat = 0.25
    """gradients longer than this are shortened to it; inf switches clipping off (App. G.3)"""
    num_epochs: PositiveInt = 40
    """epochs, each followed by an evaluation"""
    steps_per_epoch: PositiveInt = 2500
    """training steps per epoch"""

    # Evaluation
    num_eval_episodes: PositiveInt = 100
    """episodes per evaluation"""
    target_return: FiniteFloat | None = None
    """return to ask for; by default Hopper 3600, HalfCheetah 6000, Walker2d 5000"""

    # Run
    seed: NonNegativeInt = 666
    """fixes initial weights, windows, dropout and evaluation episodes; the paper has 666 and 42"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu, cuda, cuda:1, mps"""
    precision: Literal["bf16", "fp32"] = (
        "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    )
    """of matrix products; weights are always float32"""
    compile: bool = torch.cuda.is_available()
    """torch.compile the model, for a GPU; where there is one, --device cpu wants --no-compile and
    --precision fp32"""
    save_epochs: tuple[NonNegativeInt, ...] = (0, 1, 4)
    """epochs whose model is kept, 0 being before training; the last is always kept"""
    capture_video: bool = False
    """record an episode of the best model (only in dt_pretrained.py)"""
    run_name: str | None = None
    """folder under runs/, by default a new one; the same command with the same name goes on where
    the run stopped"""


# What --sample changes where nothing else is given. Models this small need no dropout, and with the
# paper's head (--head-std None) their actions would be saturated for most of so short a run.
SAMPLE = Args(
    sample=True,
    dropout=0.0,
    head_std=0.02,
    batch_size=8,
    learning_rate=1e-3,
    warmup_steps=700,
    num_epochs=2,
    steps_per_epoch=700,
    num_eval_episodes=8,
    precision="fp32",
    compile=False,
)


# ==================================================================================================
# Arguments of the analysis
# ==================================================================================================
@dataclass
class Analysis:
    backbones: tuple[str, ...] = ("random", "gpt2", "igpt")
    """starting points to train and compare, by the names of --backbone, which is not taken here"""
    runs: tuple[Path, ...] = ()
    """finished runs of any script to analyze instead of training, alike in env, dataset, K and
    return_scale, with epoch 0 kept; the arguments of training are theirs then, all but --seed and
    --device"""
    cka_windows: int = Field(100, ge=4)
    """windows on which activations are compared"""
    cka_threshold: FiniteFloat = 0.23
    """the share of layers above this is printed; the paper has 0.23, and 0.38 in App. D.3"""
    mine_windows: NonNegativeInt = 5000
    """windows to train MINE on, and as many held-out ones; 0 leaves MINE out, the paper has 100"""
    mine_batch_size: PositiveInt = 500
    """windows per training step of MINE; the paper has 50"""
    mine_passes: PositiveInt = 20
    """passes over the training windows; the paper has 1000"""
    mine_steps: PositiveInt = 20
    """evenly spaced time steps of a window at which information is estimated"""
    mine_estimate: Literal["held_out", "training"] = "held_out"
    """which windows' estimates the figures show; the paper has training"""
    standardize: bool = True
    """show MINE each feature with mean 0 and deviation 1; the paper does not"""


@dataclass
class Config:
    analysis: Analysis
    training: Args


# ==================================================================================================
# Model: blocks that can be GPT-2's or ImageGPT's, and the Decision Transformer around them
# ==================================================================================================
class QuickGELU(nn.Module):
    """The approximation of GELU that ImageGPT was trained with."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
}
# ImageGPT's own LayerNorm subtracts no mean and has no bias, which makes it an RMSNorm.
LAYER_NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


@dataclass(frozen=True)
class BlockConfig:
    """Architecture of one block; the blocks of a model may differ."""

    n_embd: int
    n_head: int
    n_inner: int
    activation: str
    layer_norm: str = "layernorm"
    epsilon: float = 1e-5  # of the LayerNorms
    dropout: float = 0.0


class Conv1D(nn.Module):
    """A linear layer of weight [in, out], as in GPT-2's checkpoints; transformers names it so."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        # The released code always has 0.1; here --dropout 0 switches this off, too.
        # [decision_transformer/models/decision_transformer.py#L44]
        self.attention_dropout = min(0.1, config.dropout)
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def heads(self, x):
        """Queries, keys and values of all heads, [3, batch, heads, tokens, width / heads]."""
        x = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # one product for all three
        return x.permute(2, 0, 3, 1, 4)

    def forward(self, x):  # [batch, tokens, width]
        query, key, value = self.heads(x)
        dropout_p = self.attention_dropout if self.training else 0.0
        # Causal: a token looks at itself and at what came before it, never ahead.
        x = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, is_causal=True)
        x = x.transpose(1, 2).flatten(2)  # [batch, tokens, width], the heads side by side
        return self.resid_dropout(self.c_proj(x))


class MLP(nn.Module):
    """Two linear layers, token by token; the inner one is usually four times as wide."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.n_inner)
        self.act = ACTIVATIONS[config.activation]()
        self.c_proj = Conv1D(config.n_inner, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm; modules are named as in the checkpoints."""

    def __init__(self, config):
        super().__init__()
        layer_norm = LAYER_NORMS[config.layer_norm]
        self.ln_1 = layer_norm(config.n_embd, eps=config.epsilon)
        self.attn = Attention(config)
        self.ln_2 = layer_norm(config.n_embd, eps=config.epsilon)
        self.mlp = MLP(config)

    def forward(self, x):
        # x itself runs through unchanged; each branch reads a normalized copy and adds to it.
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class DecisionTransformer(nn.Module):
    """Predict each step's action from the returns-to-go, states and actions up to it.

    After Chen et al. 2021 and Reid et al. 2022. The backbone's own word and position embeddings are
    not used: a learned embedding of the time step is all that a token knows about its position.
    """

    def __init__(self, configs, final_norm, state_dim, act_dim, max_timestep):
        super().__init__()
        width = configs[0].n_embd
        self.architecture = {  # what load_model needs to build this model again
            "configs": [asdict(config) for config in configs],
            "final_norm": final_norm,
            "state_dim": state_dim,
            "act_dim": act_dim,
            "max_timestep": max_timestep,
        }
        # evaluate normalizes states by these, so that a checkpoint can be played without the data.
        self.register_buffer("state_mean", torch.zeros(state_dim))
        self.register_buffer("state_std", torch.ones(state_dim))
        self.embed_timestep = nn.Embedding(max_timestep, width)
        self.embed_return = nn.Linear(1, width)
        self.embed_state = nn.Linear(state_dim, width)
        self.embed_action = nn.Linear(act_dim, width)  # its weight is the action head too
        self.embed_ln = nn.LayerNorm(width)
        self.transformer = nn.ModuleDict(
            {
                "drop": nn.Dropout(min(0.1, configs[0].dropout)),
                "h": nn.ModuleList([Block(config) for config in configs]),
                "ln_f": LAYER_NORMS[final_norm](width, eps=configs[0].epsilon),
            }
        )
        # The last weights of each branch start smaller where there are more blocks, as in GPT-2.
        # [decision_transformer/models/trajectory_gpt2.py#L525]
        for name, weight in self.transformer.h.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * len(configs)))

    def embed(self, returns_to_go, states, actions, timesteps):
        """The tokens R_1 s_1 a_1 R_2 s_2 a_2 ... that enter the first block, [batch, 3K, width]."""
        # In float32: in bf16 returns of 3.600 and 3.601 are the same number.
        with torch.autocast(states.device.type, enabled=False):
            tokens = [
                self.embed_return(returns_to_go),
                self.embed_state(states),
                self.embed_action(actions),
            ]
        # After the LayerNorm, each of the three tokens gets the embedding of the step's time.
        # [decision_transformer/models/decision_transformer.py#L165]
        times = self.embed_timestep(timesteps)[:, :, None]  # [batch, K, 1, width]
        tokens = self.embed_ln(torch.stack(tokens, dim=2)) + times  # [batch, K, 3, width]
        return self.transformer.drop(tokens.flatten(1, 2))

    def forward(self, returns_to_go, states, actions, timesteps):
        """Predicted actions [batch, K, act_dim], from inputs shaped as in Windows.

        The K steps may be padded on the right and need no mask: attention is causal, so nothing
        looks at the padding. The released code pads on the left and masks. [experiment.py#L223]
        """
        x = self.embed(returns_to_go, states, actions, timesteps)  # [batch, 3K, width]
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        # The token of s_t predicts a_t: it has seen R_t and s_t, but not a_t itself.
        at_states = x[:, 1::3]  # [batch, K, width]
        # In float32: in bf16 tanh(3.6) is rounded to 1, and its gradient 1 - tanh² to 0.
        with torch.autocast(states.device.type, enabled=False):
            # The action head is the embedding's matrix [width, act_dim] again, without a bias:
            # --share_input_output_proj of the released commands.
            # [decision_transformer/models/decision_transformer.py#L110]
            return torch.tanh(at_states @ self.embed_action.weight)


# ==================================================================================================
# Backbones: where the Transformer starts
# ==================================================================================================
HUB_IDS = {
    "gpt2": "openai-community/gpt2",
    "igpt": "openai/imagegpt-small",
    "igpt-as-gpt2": "openai/imagegpt-small",
}
BUNDLED = {  # what --sample takes instead, under tests/assets
    "gpt2": "text-gpt2",
    "igpt": "image-gpt",
    "igpt-as-gpt2": "image-gpt",
}


class Backbone(NamedTuple):
    configs: list[BlockConfig]  # of its blocks
    final_norm: str  # kind of ln_f; not a config's, since dt_no_context.py mixes kinds of blocks
    weights: dict[str, torch.Tensor]  # by their names in transformers' model; none if random


def load_backbone(args):
    """The Backbone that `args.backbone` names, downloaded if it is a hub id that is not cached."""
    if args.backbone in ("random", "random-gpt2"):
        # GPT-2 small's size, or that of the bundled GPT-2.
        num_blocks, width, num_heads = (4, 128, 4) if args.sample else (12, 768, 12)
        config = BlockConfig(
            n_embd=width,
            n_head=num_heads,
            n_inner=4 * width,
            activation="gelu_new",
            dropout=args.dropout,
        )
        if args.backbone == "random":
            # The paper's control is not GPT-2's architecture. [experiment.py#L469]
            config = replace(config, n_head=1, activation="relu")
        return Backbone([config] * num_blocks, "layernorm", weights={})

    source = HUB_IDS.get(args.backbone, args.backbone)
    if args.sample and args.backbone in BUNDLED:
        source = str(ASSETS / BUNDLED[args.backbone])
    model, config = read_pretrained(source, args.dropout)
    if args.backbone == "igpt-as-gpt2":
        # The released code puts ImageGPT's weights into GPT-2's blocks, whose LayerNorm subtracts
        # the mean and adds a bias, new and zero.
        # [decision_transformer/models/decision_transformer.py#L46]
        config = replace(config, layer_norm="layernorm")
    return Backbone([config] * len(model.h), config.layer_norm, model.state_dict())


def read_pretrained(source, dropout):
    """transformers' own model of a GPT-2 or ImageGPT (a folder or hub id), and its BlockConfig.

    Everything about the architecture comes from the checkpoint, but for the dropout.
    """
    # transformers would ask the hub to convert a checkpoint that is kept as .bin.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    import transformers  # here, because it takes seconds and random weights do not need it

    transformers.logging.set_verbosity_error()
    with exit_on_error(
        f"--backbone {source} cannot be used; it takes {', '.join(HUB_IDS)}, random, random-gpt2 "
        "or the hub id or folder of a GPT-2 or ImageGPT; --sample needs no network"
    ):
        # The configuration first: a Llama is refused before its 14 GB are fetched.
        their_config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        if their_config.model_type not in ("gpt2", "imagegpt"):
            raise ValueError(f"it is a {their_config.model_type}")
        model, report = transformers.AutoModel.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:  # transformers has drawn them at random
            raise ValueError(f"weights are missing: {sorted(report['missing_keys'])}")
        config = BlockConfig(
            n_embd=their_config.n_embd,
            n_head=their_config.n_head,
            n_inner=their_config.n_inner or 4 * their_config.n_embd,
            activation=their_config.activation_function,
            layer_norm="rmsnorm" if their_config.model_type == "imagegpt" else "layernorm",
            epsilon=their_config.layer_norm_epsilon,
            dropout=dropout,
        )
        check_outputs(model, config)
    return model, config


@torch.no_grad()
def check_outputs(theirs, config):
    """Raise if transformers' model and our blocks with its weights differ in what they compute.

    This runs on every start from a checkpoint: whatever another GPT-2 does that our blocks do not
    (cross-attention, other scaling, ...) shows here, and so would an error of ours.
    """
    ours = nn.Sequential(*[Block(config) for _ in theirs.h]).eval()
    ours.load_state_dict(theirs.h.state_dict())
    theirs.config.is_decoder = True  # without it transformers 5 gives ImageGPT no causal mask
    x = torch.randn(1, 16, config.n_embd)  # [batch, tokens, width]
    expected = theirs(inputs_embeds=x, use_cache=False).last_hidden_state
    x = x + theirs.wpe.weight[:16]  # the position embedding, which ours does not have
    torch.testing.assert_close(
        theirs.ln_f(ours(x)),
        expected,
        rtol=1e-3,
        atol=1e-3,
        msg="our blocks compute something else",
    )


# ==================================================================================================
# Data: episodes from Minari or D4RL, and windows of K steps
# ==================================================================================================
class Task(NamedTuple):
    target_return: float  # [experiment.py#L101]; the released code also asks for half of it
    random_return: float  # D4RL's reference returns, between which scores are normalized
    expert_return: float


TASKS = {
    "Hopper": Task(3600, -20.272305, 3234.3),
    "HalfCheetah": Task(6000, -280.178953, 12135.0),
    "Walker2d": Task(5000, 1.629008, 4592.3),
}


class Episode(NamedTuple):
    observations: np.ndarray  # [T, state_dim]
    actions: np.ndarray  # [T, act_dim]
    rewards: np.ndarray  # [T]


class Windows(NamedTuple):
    """K consecutive steps each; what lies beyond the end of an episode is not valid."""

    returns_to_go: torch.Tensor  # [batch, K, 1]
    states: torch.Tensor  # [batch, K, state_dim], normalized
    actions: torch.Tensor  # [batch, K, act_dim]
    timesteps: torch.Tensor  # [batch, K], counted from the beginning of the episode
    valid: torch.Tensor  # [batch, K], bool


def read_d4rl(path):
    """The episodes of a D4RL file. What follows the last end of an episode is left out.

    [data/download_d4rl_datasets.py#L41]
    """
    with h5py.File(path) as file:
        # An episode ends where the policy failed, or where the time was up.
        is_last = np.logical_or(file["terminals"], file["timeouts"])
        ends = np.flatnonzero(is_last) + 1
        columns = [np.split(file[name], ends)[:-1] for name in Episode._fields]
    return [Episode(*column) for column in zip(*columns)]


def read_minari(dataset, env_id):
    """The episodes of a Minari data set that was recorded in `env_id`, in any version of it.

    `dataset` is a folder, or an id: bundled with --sample, kept by Minari, or else downloaded.
    """
    root = ASSETS / "minari" if dataset.startswith("sample/") else get_dataset_path()
    folder = Path(dataset) if Path(dataset).is_dir() else root / dataset
    if not folder.is_dir():
        minari.download_dataset(dataset)
    folder = folder / "data"
    metadata = json.loads((folder / "metadata.json").read_text())
    # Without these Minari would make the environment that the file names: it would run code.
    if not metadata.get("observation_space") or not metadata.get("action_space"):
        sys.exit(f"{folder} does not say what its observations and actions are: it is not opened.")
    spec = json.loads(metadata.get("env_spec") or "{}")  # not all data sets have one
    recorded_in = spec.get("id", env_id)
    if recorded_in.split("-v")[0] != env_id.split("-v")[0]:
        sys.exit(f"{folder} was recorded in {recorded_in}, not in {env_id}.")
    if recorded_in != env_id:  # Walker2d's physics differs between -v4 and -v5
        print(f"The data were recorded in {recorded_in}, the model is evaluated in {env_id}.")
    # Minari also keeps the observation after the last action.
    return [
        Episode(episode.observations[:-1], episode.actions, episode.rewards)
        for episode in minari.MinariDataset(folder).iterate_episodes()
    ]


def load_episodes(args, env):
    """The episodes of `args.dataset`, which must fit the environment.

    All are kept. The released code loses the one of lowest return, by a `<` where a `<=` should be.
    [experiment.py#L172]
    """
    name = f"--dataset {args.dataset}"
    with exit_on_error(
        f"{name} is no D4RL file and no folder or id of Minari that can be read; if a download was "
        f"cut, delete its folder under {get_dataset_path()}; --sample needs no network"
    ):
        if Path(args.dataset).is_file():
            episodes = read_d4rl(args.dataset)
        else:
            episodes = read_minari(args.dataset, env.spec.id)
    shapes = (episodes[0].observations.shape[1:], episodes[0].actions.shape[1:])
    expected = (env.single_observation_space.shape, env.single_action_space.shape)
    if shapes != expected:
        sys.exit(f"{name} has observations and actions of shapes {shapes}, {args.env} {expected}.")
    if max(np.abs(episode.actions).max() for episode in episodes) > 1.001:  # 1 may be rounded
        sys.exit(f"{name} has actions beyond -1 to 1, which the model cannot predict.")
    return episodes


class OfflineData:
    """The N transitions of all episodes, one after the other, as tensors on the device."""

    def __init__(self, episodes, args):
        lengths = [len(episode.rewards) for episode in episodes]
        observations = np.concatenate([episode.observations for episode in episodes])
        actions = np.concatenate([episode.actions for episode in episodes])
        mean = observations.mean(axis=0, dtype=np.float64)
        std = observations.std(axis=0, dtype=np.float64)
        # What is constant in the data need not be so in the environment: divided by 1e-6, as the
        # released code does, it would be huge. Hopper, HalfCheetah and Walker2d have no such state.
        std = np.where(std < 1e-6, 1, std + 1e-6)  # [experiment.py#L151]
        # The return-to-go of a step is the undiscounted sum of its reward and of all later ones.
        returns_to_go = np.concatenate(
            [episode.rewards[::-1].cumsum(dtype=np.float64)[::-1] for episode in episodes]
        )
        timesteps = np.concatenate([np.arange(length) for length in lengths])
        # For each transition, where the next episode begins.
        episode_ends = np.repeat(np.cumsum(lengths), lengths)

        def float_tensor(values):
            return torch.as_tensor(np.float32(values), device=args.device)

        self.state_mean = float_tensor(mean)  # [state_dim]
        self.state_std = float_tensor(std)  # [state_dim]
        self.states = float_tensor((observations - mean) / std)  # [N, state_dim]
        self.actions = float_tensor(actions)  # [N, act_dim]
        self.returns_to_go = float_tensor(returns_to_go[:, None] / args.return_scale)  # [N, 1]
        self.timesteps = torch.as_tensor(timesteps, device=args.device)  # [N]
        self.episode_ends = torch.as_tensor(episode_ends, device=args.device)  # [N]

    def windows(self, starts, context_length):
        """The Windows of K steps from the transitions `starts` [batch] on, by an index lookup.

        The released code cuts window after window and sums each return-to-go anew.
        [experiment.py#L199]
        """
        index = starts[:, None] + torch.arange(context_length, device=starts.device)  # [batch, K]
        valid = index < self.episode_ends[starts][:, None]
        index = torch.where(valid, index, 0)  # any transition will do: nothing looks at it
        return Windows(
            returns_to_go=self.returns_to_go[index],
            states=self.states[index],
            actions=self.actions[index],
            timesteps=self.timesteps[index],
            valid=valid,
        )


# ==================================================================================================
# Evaluation
# ==================================================================================================
# The paper used -v3. gymnasium has its successor, -v4, and warns that -v4 is out of date.
# [experiment.py#L99]
warnings.filterwarnings("ignore", message=".*is out of date.*")


# HalfCheetah's model file sets off a deprecation warning for every copy; all else should be seen.
def warn_of_mujoco(text):
    if "deprecated" not in text:
        print(f"mujoco: {text}", file=sys.stderr)


mujoco.set_mju_user_warning(warn_of_mujoco)


def make_env(args, num_copies, **options):
    """A gymnasium vector environment of `num_copies` copies of `args.env`."""
    with exit_on_error(f"--env {args.env} cannot be made"):
        # In one process: a step of MuJoCo takes less time than a message to another process.
        env = gym.make_vec(args.env, num_copies, vectorization_mode="sync", **options)
    actions = env.single_action_space
    if actions != gym.spaces.Box(-1, 1, actions.shape, actions.dtype):
        sys.exit(f"{args.env} has actions {actions}; the model's are vectors from -1 to 1.")
    return env


def autocast(args):
    """Matrix products in bf16 if `args.precision` says so; all else stays in float32."""
    device_type = torch.device(args.device).type
    return torch.autocast(device_type, torch.bfloat16, enabled=args.precision == "bf16")


@torch.no_grad()
def evaluate(model, env, args):
    """Play one episode in each copy of `env`, all at once, seeded args.seed, args.seed + 1, ...

    Returns the undiscounted returns and the lengths of the episodes, both [episodes]. The model is
    asked for `args.target_return`, which then falls by each reward, and sees the last K steps.
    The released code plays one episode at a time, and different ones in each evaluation.
    [decision_transformer/evaluation/evaluate_episodes.py#L112]
    """
    model.eval()
    num_episodes = env.num_envs
    horizon = env.spec.max_episode_steps or 1000

    def zeros(*shape):
        return torch.zeros(num_episodes, horizon, *shape, device=args.device)

    # What the model has seen and done, filled in step by step; a_t is 0 until it is predicted.
    returns_to_go = zeros(1)
    states = zeros(*env.single_observation_space.shape)
    actions = zeros(*env.single_action_space.shape)
    timesteps = torch.arange(horizon, device=args.device).expand(num_episodes, -1)
    episode_returns = np.zeros(num_episodes)
    episode_lengths = np.zeros(num_episodes, dtype=int)
    running = np.ones(num_episodes, dtype=bool)

    observations, _ = env.reset(seed=args.seed)
    for t in tqdm(range(horizon), desc="evaluation", unit="step", leave=False):
        observations = torch.as_tensor(np.float32(observations), device=args.device)
        states[:, t] = (observations - model.state_mean) / model.state_std
        # What is left of the return that was asked for.
        to_go = (args.target_return - episode_returns) / args.return_scale
        returns_to_go[:, t, 0] = torch.as_tensor(to_go)
        # Actions are predicted only for episodes that go on, which saves time.
        context = slice(max(0, t - args.context_length + 1), t + 1)
        with autocast(args):
            predicted = model(
                returns_to_go[running, context],
                states[running, context],
                actions[running, context],
                timesteps[running, context],
            )
        actions[running, t] = predicted[:, -1]

        # Copies that are done are stepped until all are, but their rewards no longer count.
        observations, rewards, terminated, truncated, _ = env.step(actions[:, t].cpu().numpy())
        episode_returns += rewards * running
        episode_lengths += running
        running &= ~(terminated | truncated)
        if not running.any():
            break
    return episode_returns, episode_lengths


def normalized_score(env_id, episode_return):
    """D4RL's score: 0 for a random policy, 100 for an expert; nan where these are not known.

    The paper normalizes by the mean returns of D4RL's random and expert data sets instead, so that
    its scores are on another scale.
    [analysis/section-4-sanity-check/compute_normalized_score.py#L48]
    """
    task = TASKS.get(env_id.split("-v")[0])
    if task is None:
        return math.nan * episode_return
    return 100 * (episode_return - task.random_return) / (task.expert_return - task.random_return)


# ==================================================================================================
# Training
# ==================================================================================================
# What train logs of its steps, in the order in which it collects them.
METRICS = ("loss", "saturated_fraction", "grad_norm", "clipped_fraction")
# Set by torchrun, whose processes each train on windows and on a GPU of their own. The first one
# also evaluates and writes.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def training_loss(model, windows):
    """Mean squared error of the actions, and the share of predicted ones beyond ±0.99.

    Both are means over the valid steps and the action dimensions. Through a tanh beyond ±0.99
    hardly any gradient passes.
    """
    predicted = model(windows.returns_to_go, windows.states, windows.actions, windows.timesteps)
    valid = windows.valid[..., None].expand_as(predicted)  # [batch, K, act_dim]
    squared_error = (predicted - windows.actions).square()
    loss = (squared_error * valid).sum() / valid.sum()
    is_saturated = predicted.detach().abs() > 0.99
    saturated_fraction = (is_saturated & valid).sum() / valid.sum()
    return loss, saturated_fraction


def make_model(args, backbone, data, max_timestep):
    """The Decision Transformer before fine-tuning: `backbone`, and the rest drawn from the seed."""
    torch.manual_seed(args.seed)
    model = DecisionTransformer(
        backbone.configs,
        backbone.final_norm,
        state_dim=data.states.shape[1],
        act_dim=data.actions.shape[1],
        max_timestep=max_timestep,
    )
    model.state_mean.copy_(data.state_mean)
    model.state_std.copy_(data.state_std)
    # Not strict: word and position embeddings are not used, and what `backbone` lacks stays as it
    # was drawn. A random one lacks everything, igpt-as-gpt2 the LayerNorms' biases, and a mixed one
    # (dt_no_context.py) all but one block.
    model.transformer.load_state_dict(backbone.weights, strict=False)
    if args.head_std is not None:
        # nn.Linear draws this weight for act_dim inputs, with a deviation of 1 / sqrt(3 act_dim),
        # 1 / 3 on Hopper. As the action head it has `width` inputs, of variance 1 if ln_f's weights
        # are 1. At a width of 768 the tanh then sees a deviation of sqrt(768) / 3 = 9, and most
        # actions start saturated.
        nn.init.normal_(model.embed_action.weight, std=args.head_std)
    return model.to(args.device)


def train(args, folder, backbone):
    """Fine-tune `backbone` as `args` say, or go on where the run in `folder` stopped.

    Leaves checkpoints, TensorBoard events and log.csv in `folder`: about 25 rows for each
    epoch (the means of METRICS), and one for each episode of an evaluation (return, length, score).
    """
    env = make_env(args, args.num_eval_episodes)
    data = OfflineData(load_episodes(args, env), args)
    longest_episode = int(data.timesteps.max()) + 1
    max_timestep = max(1000, longest_episode, env.spec.max_episode_steps or 0)  # 1000 as released
    model = make_model(args, backbone, data, max_timestep)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        # As released: torch's AdamW (1e-8) for random weights, transformers' (1e-6) for pre-trained
        # ones. [utils.py#L60]
        eps=1e-8 if args.backbone.startswith("random") else 1e-6,
        fused=True,
    )

    # Go on where the run stopped.
    first_epoch = 0
    step = 0
    log = []
    if (folder / "latest.pt").exists():
        checkpoint = read_checkpoint(folder / "latest.pt", args.device)
        check_arguments(args, Args(**checkpoint["args"]), folder)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first_epoch = checkpoint["epoch"] + 1
        step = checkpoint["step"]
        log = checkpoint["log"]
        print(f"{folder} goes on after epoch {checkpoint['epoch']}.")

    # The same model, with the same parameters, compiled for a GPU and shared by processes.
    training_model = model
    if args.compile:
        torch.compiler.reset()  # after eight models torch would stop compiling (dt_no_context.py)
        training_model = torch.compile(training_model, mode="reduce-overhead")  # CUDA graphs
    if WORLD_SIZE > 1:
        # Gradients are averaged. As each process divides its loss by its own number of valid steps,
        # this differs slightly from one mean over all steps.
        training_model = nn.parallel.DistributedDataParallel(training_model)

    if RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard shall not show what a killed run has logged after its last checkpoint.
        writer = SummaryWriter(folder, purge_step=step + 1 if log else 0, flush_secs=10)
        writer.add_text("hyperparameters", pd.Series(asdict(args)).to_frame("value").to_html())

    for epoch in range(first_epoch, args.num_epochs + 1):  # epoch 0 is the model before training
        num_steps = args.steps_per_epoch if epoch > 0 else 0  # none, it is only evaluated
        # All chance in an epoch follows from the seed, the epoch and the processes alone, so that a
        # run that was interrupted gives the numbers of one that was not.
        rng = np.random.default_rng([args.seed, epoch, RANK])
        torch.manual_seed(rng.integers(2**60))  # for dropout
        # Starts are drawn from all transitions, which is what the released code does in two steps:
        # an episode in proportion to its length, then a start in it. [experiment.py#L191]
        size = (num_steps, args.batch_size // WORLD_SIZE)
        epoch_starts = torch.as_tensor(
            rng.integers(len(data.states), size=size), device=args.device
        )
        log_interval = max(1, num_steps // 25)
        metrics = []

        model.train()
        progress = tqdm(
            epoch_starts,
            desc=f"epoch {epoch}/{args.num_epochs}",
            unit="step",
            disable=RANK > 0 or epoch == 0,
        )
        for i, window_starts in enumerate(progress, start=1):
            # The learning rate rises linearly, then stays. [experiment.py#L400]
            learning_rate = args.learning_rate * min((step + 1) / max(1, args.warmup_steps), 1)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            windows = data.windows(window_starts, args.context_length)
            with autocast(args):
                loss, saturated_fraction = training_loss(training_model, windows)
            loss.backward()
            # Here the gradient is clipped: as one vector over all parameters, it is shortened to
            # max_grad_norm if it is longer; its direction stays. The norm returned is the one
            # before that. [decision_transformer/training/seq_trainer.py#L84]
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1

            if RANK > 0:
                continue  # the first process reports, of its own windows
            # Metrics stay on the device; to read them here would wait for it in every step.
            clipped = (grad_norm > args.max_grad_norm).float()
            metrics.append(torch.stack([loss.detach(), saturated_fraction, grad_norm, clipped]))
            if i % log_interval == 0 or i == num_steps:
                values = torch.stack(metrics).mean(dim=0).tolist()
                means = dict(zip(METRICS, values, strict=True))
                metrics = []
                if not math.isfinite(means["grad_norm"]):  # nor is it if the loss is not
                    sys.exit(
                        f"The gradient is not finite at step {step}: look for NaN in the data, or "
                        f"go on with --run-name {args.run_name} and a lower --learning-rate."
                    )
                progress.set_postfix(means, refresh=False)
                log.append({"epoch": epoch, "step": step, **means})
                for name, value in means.items():
                    writer.add_scalar(f"train/{name}", value, step)
        if RANK > 0:
            continue  # the first process evaluates and writes

        returns, lengths = evaluate(model, env, args)
        scores = normalized_score(args.env, returns)
        episodes = pd.DataFrame({"return": returns, "length": lengths, "score": scores})
        log += episodes.assign(epoch=epoch, step=step).to_dict("records")
        frame = pd.DataFrame(log).assign(
            env=args.env,
            dataset=args.dataset,
            backbone=args.backbone,
            K=args.context_length,
            return_scale=args.return_scale,
            head_std=args.head_std,
            max_grad_norm=args.max_grad_norm,
            seed=args.seed,
        )
        for name, value in episodes.mean().items():
            writer.add_scalar(f"eval/{name}", value, step)
        tqdm.write(f"epoch {epoch}: return {returns.mean():.1f}, score {scores.mean():.1f}")

        # latest.pt has all that is needed to go on. It is replaced last, and in one step: a run
        # that is killed anywhere repeats at most an epoch.
        frame.to_csv(folder / "log.csv", index=False)
        checkpoint = {
            "args": asdict(args),
            "architecture": model.architecture,
            "model": model.state_dict(),
            "epoch": epoch,
            "step": step,
        }
        if epoch in args.save_epochs or epoch == args.num_epochs:
            torch.save(checkpoint, folder / f"epoch_{epoch}.pt")
        # The best of 40 noisy evaluations is biased upwards, but it is what the paper reports.
        mean_returns = frame.groupby("epoch")["return"].mean()
        if epoch > 0 and mean_returns.loc[1:].idxmax() == epoch:
            torch.save(checkpoint, folder / "best.pt")
        latest = {**checkpoint, "optimizer": optimizer.state_dict(), "log": log}
        torch.save(latest, folder / "latest.tmp")
        (folder / "latest.tmp").replace(folder / "latest.pt")
    if RANK == 0:
        writer.close()


# ==================================================================================================
# Windows that all models are shown, and what their layers make of them
# ==================================================================================================
TOKENS = ("return", "state", "action")  # the three tokens of a time step, in their order
# In evaluation mode a dropout repeats the layer before it; the paper counts both.
LAYERS = (
    "ln_1",
    "attn.c_attn",
    "attn.c_proj",
    "attn.resid_dropout",
    "ln_2",
    "mlp.c_fc",
    "mlp.act",
    "mlp.c_proj",
    "mlp.dropout",  # what the paper calls a block's output, before the residual is added
)


def choose_windows(run_args, analysis, seed):
    """Whole windows at random from the data of a run: Windows for CKA, and Windows for MINE.

    The latter are `mine_windows` to train on, from even episodes, and then as many held-out ones,
    from odd episodes, since windows of one episode overlap.
    """
    data = OfflineData(load_episodes(run_args, make_env(run_args, 1)), run_args)
    ends = data.episode_ends.cpu().numpy()
    _, episode = np.unique(ends, return_inverse=True)  # the number of each transition's episode
    starts = np.flatnonzero(np.arange(len(ends)) + run_args.context_length <= ends)
    even = starts[episode[starts] % 2 == 0]
    odd = starts[episode[starts] % 2 == 1]
    rng = np.random.default_rng(seed)
    with exit_on_error(
        f"{run_args.dataset} has {len(starts)} whole windows of {run_args.context_length} steps: "
        f"--cka-windows can be at most {len(starts)}, --mine-windows {min(len(even), len(odd))}"
    ):
        for_cka = rng.choice(starts, analysis.cka_windows, replace=False)
        training = rng.choice(even, analysis.mine_windows, replace=False)
        held_out = rng.choice(odd, analysis.mine_windows, replace=False)
    for_mine = np.concatenate([training, held_out])
    return [
        data.windows(torch.as_tensor(chosen, device=run_args.device), run_args.context_length)
        for chosen in (for_cka, for_mine)
    ]


@torch.no_grad()
def activations(model, windows, layers, steps):
    """Outputs of some layers at some of the K steps: {layer: [windows, steps, 3 tokens, width]}.

    Layers are named below transformer.h, as "0.mlp.act".
    """
    chunks = {model.transformer.h.get_submodule(layer): [] for layer in layers}

    def keep_output(module, inputs, output):  # [chunk, 3K, width]
        chunks[module].append(output.unflatten(1, (-1, 3))[:, steps])

    # PyTorch calls a forward hook each time that its module has computed something.
    hooks = [module.register_forward_hook(keep_output) for module in chunks]
    columns = [column.split(250) for column in windows]  # not all at once
    for returns_to_go, states, actions, timesteps, _ in zip(*columns):
        model(returns_to_go, states, actions, timesteps)
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(outputs) for layer, outputs in zip(layers, chunks.values())}


# ==================================================================================================
# CKA: how alike two layers represent the same windows (section 5.1)
# ==================================================================================================
def gram_matrix(activation):
    """Gram matrix of [windows, width], U-centered, of norm 1, flattened to [windows²].

    After U-centering (Székely and Rizzo 2014) the inner product of two Gram matrices is an unbiased
    estimate of HSIC, up to a factor that CKA does not see: the debiased estimator of Kornblith et
    al. 2019. A constant layer has no direction, and so a CKA of nan.
    """
    x = activation.cpu().double()  # Apple's mps has no float64
    x = x - x[0]  # exactly 0 for a constant layer; CKA does not see an offset
    num_windows = len(x)
    gram = x @ x.T
    # U-centering: off the diagonal, every row and every column then sums to zero.
    gram.fill_diagonal_(0)
    sums = gram.sum(dim=0)
    gram -= (sums[:, None] + sums) / (num_windows - 2)
    gram += sums.sum() / ((num_windows - 1) * (num_windows - 2))
    gram.fill_diagonal_(0)
    return gram.flatten() / gram.norm()


def gram_matrices(model, windows):
    """Gram matrices of all layers at the last step's tokens: {token: [layers, windows²]}.

    The CKA of all layers of one model with all of another is then `a @ b.T`, [layers a, layers b].
    The paper compares all units of one token; the released code takes one unit of all tokens.
    [analysis/section-51-activation-similarity/compute_cka.py#L45]
    """
    names = [f"{block}.{layer}" for block in range(len(model.transformer.h)) for layer in LAYERS]
    outputs = activations(model, windows, names, steps=[-1])
    grams = {}
    for i, token in enumerate(TOKENS):
        grams[token] = torch.stack([gram_matrix(outputs[name][:, 0, i]) for name in names])
    return grams


def cka_table(before, after):
    """CKA of each layer before fine-tuning with itself after, from the two models' gram_matrices.

    There is a row for each layer and token. Depth is between 0 and 1, so that models of 12 and of
    24 blocks are drawn side by side. The released code averages neighboring layers of the deeper
    model, even a LayerNorm with a projection.
    [analysis/section-51-activation-similarity/plot_cka.py#L26]
    """
    # The diagonals of before @ after.T, a column for each token.
    table = pd.DataFrame({token: (before[token] * after[token]).sum(dim=1) for token in TOKENS})
    table["block"] = table.index // len(LAYERS)
    table["layer"] = LAYERS * (len(table) // len(LAYERS))
    table["kind"] = np.where(table.layer.str.startswith("ln_"), "LayerNorm", "other")
    table["depth"] = (table.index + 0.5) / len(table)
    return table.melt(["block", "layer", "kind", "depth"], var_name="token", value_name="cka")


# ==================================================================================================
# MINE: mutual information by neural networks (section 5.2)
# ==================================================================================================
class StatisticsNetworks(nn.Module):
    """The networks f of many estimators: [estimators, batch, features] to [estimators, batch].

    There is one for each time step and one for the shuffled control; a batched product computes a
    layer of all at once. Each is features -> 400 -> 400 -> 400 -> 1 with ReLU, as in the released
    code; the text of the paper has one layer fewer. [../mine-pytorch/util_mi_calculation.py#L25]
    All start from the same weights, drawn as nn.Linear does, and share nothing afterwards.
    """

    def __init__(self, num_estimators, num_features):
        super().__init__()
        self.layers = nn.ParameterList()
        for n_in, n_out in itertools.pairwise((num_features, 400, 400, 400, 1)):
            uniform = torch.empty(1, n_in + 1, n_out).uniform_(-1, 1) / math.sqrt(n_in)
            self.layers.append(uniform.repeat(num_estimators, 1, 1))  # the last row is the bias

    def forward(self, x):
        for layer in self.layers:
            x = torch.baddbmm(layer[:, -1:], x, layer[:, :-1])
            if layer is not self.layers[-1]:
                x = F.relu(x)
        return x.squeeze(-1)


def mine(x, y, analysis, seed):
    """Estimate the mutual information of each x[i] with y[i] by MINE (Belghazi et al. 2018).

    `x` and `y` are [estimators, 2 * windows, features], each with features of its own; the training
    windows come first, then as many held-out ones. Returns the estimates on the held-out and on the
    training windows, in nats, both [estimators]; not finite where a network has diverged.
    """
    torch.manual_seed(seed)
    num_windows = x.shape[1] // 2
    if analysis.standardize:
        # Mutual information does not depend on the scale of features, but training a network does.
        x = standardize(x, num_windows)
        y = standardize(y, num_windows)
    networks = StatisticsNetworks(len(x), x.shape[2] + y.shape[2]).to(x.device)
    optimizer = torch.optim.Adam(networks.parameters(), lr=1e-4, fused=True)

    def statistics(batch, partners):
        """f of the windows `batch`: with their own x, and with the x of their `partners`."""
        joint = torch.cat([x[:, batch], y[:, batch]], dim=2)
        marginal = torch.cat([x[:, partners], y[:, batch]], dim=2)
        return networks(torch.cat([joint, marginal], dim=1)).chunk(2, dim=1)

    average = None
    for _ in range(analysis.mine_passes):
        for batch in torch.randperm(num_windows).split(analysis.mine_batch_size):
            joint, marginal = statistics(batch, batch[torch.randperm(len(batch))])
            # The bound E_joint[f] - log E_marginal[exp f] is to grow. The gradient of its log is
            # that of E_marginal[exp f], divided by E_marginal[exp f]; in small batches it is less
            # biased if this denominator is a moving average (section 3.2 of Belghazi et al.).
            mean_exp = marginal.exp().mean(dim=1)
            if average is None:
                average = mean_exp.detach()
            else:
                average = torch.lerp(average, mean_exp.detach(), 0.01)
            loss = mean_exp / average - joint.mean(dim=1)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()

    # The released code reads the estimate off the windows that the network was trained on, which
    # tells how well it memorizes. [../mine-pytorch/mine/models/mine.py#L125]
    estimates = []
    for offset in (num_windows, 0):  # held out, training
        windows = offset + torch.arange(num_windows)
        with torch.no_grad():
            joint, marginal = statistics(windows, offset + torch.randperm(num_windows))
        # The same bound (Donsker and Varadhan), over all windows.
        log_mean_exp = torch.logsumexp(marginal, dim=1) - math.log(num_windows)
        estimates.append((joint.mean(dim=1) - log_mean_exp).cpu().numpy())
    return estimates


def standardize(values, num_windows):
    """Mean 0 and deviation 1 of each feature over the training windows."""
    training = values[:, :num_windows]
    mean = training.mean(dim=1, keepdim=True)
    return (values - mean) / (training.std(dim=1, keepdim=True) + 1e-6)


# ==================================================================================================
# Questions to MINE: what do outputs know of data? (section 5.2, App. E and H.2)
# ==================================================================================================
# A question is (columns, x, y): MINE is to estimate I(x[i]; y[i]) for each step i. `columns` is
# what information.csv says of all these estimates; x and y are [steps, windows, features].
# A quantity is named as in the paper: x_t is a token of step t (R_t, s_t or a_t), K is the last
# step, and T(x_t) is a block's output at that token.
def data_tokens(windows, steps):
    """The tokens of the data at some steps: {token: [steps, windows, features]}."""
    values = (windows.returns_to_go, windows.states, windows.actions)
    return {token: value[:, steps].transpose(0, 1) for token, value in zip(TOKENS, values)}


def questions_about_data(windows, steps):
    """What states and returns say about actions, without any model (App. H.2)."""
    data = data_tokens(windows, steps)
    for token, quantity in (("state", "I(s_t; a_t)"), ("return", "I(R_t; a_t)")):
        columns = {"part": "data", "token": token, "quantity": quantity}
        yield columns, data[token], data["action"]


def questions_about_model(model, windows, steps):
    """What blocks know of the data, the paper's I(X;T), and of the action to predict, I(Y;T)."""
    data = data_tokens(windows, steps)
    num_blocks = len(model.transformer.h)
    of_figure_2 = {0: "shallow", num_blocks // 2: "middle", num_blocks - 1: "deep"}
    for block in range(num_blocks):
        # Block by block: the outputs of one take 1.8 GB for GPT-2, those of all would take 22.
        layer = f"{block}.mlp.dropout"
        outputs = activations(model, windows, [layer], steps)[layer]
        known = dict(zip(TOKENS, outputs.permute(2, 1, 0, 3)))  # each [steps, windows, width]

        # In the same step, in every block (App. E).
        depth = (block + 0.5) / num_blocks
        columns = {"part": "same step", "block": block, "depth": depth, "token": "state"}
        yield {**columns, "quantity": "I(s_t; T(s_t))"}, data["state"], known["state"]
        yield {**columns, "quantity": "I(a_t; T(s_t))"}, data["action"], known["state"]

        # With context, in three blocks (Fig. 2).
        if block not in of_figure_2:
            continue
        for token in TOKENS:
            # Like the released code, without x_t = a_K: s_K cannot see it, T(a_K) contains it.
            count = len(steps) - 1 if token == "action" else len(steps)
            if count == 0:
                continue  # there is no other step
            at_last_state = known["state"][-1:].expand(count, -1, -1)
            last_action = data["action"][-1:].expand(count, -1, -1)
            place = of_figure_2[block]
            columns = {"part": "context", "block": block, "place": place, "token": token}
            yield {**columns, "quantity": "I(x_t; T(s_K))"}, data[token][:count], at_last_state
            yield {**columns, "quantity": "I(a_K; T(x_t))"}, last_action, known[token][:count]


def answer(questions, steps, analysis, seed):
    """A row for each step of each question, and one for its last step with x shuffled.

    With the windows of x in another order there is nothing to know: what MINE finds is its error.
    """
    tables = []
    for columns, x, y in tqdm(questions, desc="MINE", unit="question"):
        # The windows are in a random order, so that it is enough to move each half by one.
        training, held_out = x[-1:].chunk(2, dim=1)
        shuffled = torch.cat([training.roll(1, dims=1), held_out.roll(1, dims=1)], dim=1)
        times = [step - steps[-1] for step in steps[: len(x)]]  # t - K
        table = pd.DataFrame({**columns, "step": [*times, times[-1]]})
        table["shuffled"] = table.index == len(times)
        x = torch.cat([x, shuffled])
        y = torch.cat([y, y[-1:]])
        table["held_out"], table["training"] = mine(x, y, analysis, seed)
        tables.append(table)
    return pd.concat(tables)


# ==================================================================================================
# Figures
# ==================================================================================================
sns.set_palette("colorblind")


def plot_cka(cka, analysis, title):
    """CKA of every layer before and after fine-tuning, over its depth (Figs. 1, 23 to 27).

    The paper draws the threshold for Hopper and the state token only.
    """
    grid = sns.relplot(
        cka,
        x="depth",
        y="cka",
        hue="label",
        style="kind",
        col="token",
        kind="line",
        estimator=None,
        markers={"LayerNorm": "D", "other": "o"},
        markersize=5,
        dashes=False,
        height=4,
    )
    grid.refline(y=analysis.cka_threshold, color="black", linestyle=":")
    grid.set_titles("{col_name} token of the last step")
    grid.set_axis_labels("depth of the layer", "linear CKA, debiased")
    title = f"Each layer before and after, {analysis.cka_windows} windows\n{title}"
    grid.figure.suptitle(title, y=1, va="bottom")
    return grid.figure


def plot_heat_maps(grams, pairs, token, analysis, title):
    """CKA of all layers of one model with all of another, for each of `pairs` (App. D).

    `grams` holds the gram_matrices of models by their names.
    """
    num_rows = math.ceil(len(pairs) / 3)
    figure = Figure(figsize=(15, 4.5 * num_rows), layout="constrained")
    for i, (a, b) in enumerate(pairs):
        cka = (grams[a][token] @ grams[b][token].T).numpy()
        axes = figure.add_subplot(
            num_rows, 3, i + 1, xlabel=f"layer of {b}", ylabel=f"layer of {a}"
        )
        image = axes.imshow(cka, vmin=0, vmax=1, origin="lower", aspect="auto")
    figure.colorbar(image, ax=figure.axes, label="linear CKA, debiased")
    figure.suptitle(f"All layers, last {token} token, {analysis.cka_windows} windows\n{title}")
    return figure


def plot_information(information, part, x, analysis, title, **panels):
    """What MINE has found, over `x`, beside the shuffled controls (Fig. 2, App. E and H.2).

    Of the estimates of several steps at the same depth: mean and deviation.
    """
    labels = {
        "step": "time step t - K, 0 is the last",
        "depth": "depth of the block (bars: deviation over steps)",
    }
    information = information[information.part == part]
    grid = sns.relplot(
        information.assign(token=information.token.mask(information.shuffled, "shuffled")),
        x=x,
        y=analysis.mine_estimate,
        hue="label",
        style="token",
        kind="line",
        errorbar="sd",
        err_style="bars",
        markers={"return": "o", "state": "s", "action": "^", "shuffled": "X"},
        dashes=False,
        height=3.5,
        facet_kws={"sharey": "row"},
        **panels,
    )
    grid.set_titles(row_template="{row_name}", col_template="{col_name}")
    grid.set_axis_labels(labels[x], "information, nats")
    estimate = analysis.mine_estimate.replace("_", "-")
    settings = f"MINE: {analysis.mine_windows} windows, {analysis.mine_passes} passes, {estimate}"
    grid.figure.suptitle(f"{settings}\n{title}", y=1, va="bottom")
    return grid.figure


# ==================================================================================================
# Runs: finished ones, side by side
# ==================================================================================================
def read_logs(folders):
    """The log.csv of several runs, one below the other.

    Runs keep the order of `folders`. A run is called by its folder less "runs/"; figures call it by
    its `label`: the backbone, those of the settings below that differ (`epochs`: trained so far),
    and the run's name if that is not enough.
    """
    logs = []
    for folder in folders:
        with exit_on_error(f"{folder} is no folder of a run"):
            log = pd.read_csv(folder / "log.csv")
        name = str(folder).removeprefix("runs/")
        logs.append(log.assign(run=name, epochs=log.epoch.max()))
    log = pd.concat(logs, ignore_index=True)
    log["label"] = log.backbone
    keys = ("env", "dataset", "K", "return_scale", "head_std", "max_grad_norm", "seed", "epochs")
    for name in keys:
        values = log[name].map(str).replace("nan", "default")  # a head_std that was not given
        if values.nunique() > 1:
            log["label"] += f", {name} " + values
    if log.label.nunique() < log.run.nunique():
        log["label"] += " (" + log.run + ")"
    return log


def describe(log):
    """What the title of a figure says of the runs in it."""
    parts = []
    for name in ("env", "dataset", "backbone", "K", "seed"):
        parts.append(f"{name} " + ", ".join(log[name].astype(str).unique()))
    return textwrap.fill("; ".join(parts), 110)


# ==================================================================================================
# Utilities: arguments, files, errors
# ==================================================================================================
@contextmanager
def exit_on_error(what):
    """Exit with one sentence, `what` and the error, if the code inside fails."""
    try:
        yield
    except Exception as error:
        sys.exit(f"{what} ({error!r:.300}).")


def complete_arguments(args, subject):
    """Fill in what was not given and depends on others; returns the folder of the run.

    `subject` becomes part of the run's name. From here on Ctrl-C ends in a sentence that says how
    to go on.
    """
    env_name = args.env.split("-v")[0]
    if env_name not in TASKS and None in (args.dataset, args.target_return):
        sys.exit(
            f"--env {args.env} is none of {', '.join(TASKS)}: give --dataset and --target-return."
        )
    if args.sample and not ASSETS.is_dir():
        sys.exit(f"--sample needs {ASSETS}, which comes with the repository.")
    if WORLD_SIZE > 1:
        if args.device == "cuda":  # a GPU for each process
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # 12 hours, since the others wait while the first process evaluates.
        torch.distributed.init_process_group(timeout=timedelta(hours=12))
    with exit_on_error(f"--device {args.device} cannot be used"):
        torch.zeros(1, device=args.device)
    if args.dataset is None:
        # The paper used D4RL's medium data, recorded by other policies than Minari's: to compare
        # with it, give D4RL's file, as --dataset hopper_medium-v2.hdf5.
        source = "sample" if args.sample else "mujoco"
        args.dataset = f"{source}/{env_name.lower()}/medium-v0"
    if args.target_return is None:
        args.target_return = TASKS[env_name].target_return
    if args.run_name is None:
        script = Path(__file__).stem
        args.run_name = f"{args.env}__{script}__{subject}__{args.seed}__{time.time_ns()}"
    message = f"Interrupted; training goes on by the same command with --run-name {args.run_name}."
    signal.signal(signal.SIGINT, lambda *_: sys.exit(message if RANK == 0 else 1))
    return Path("runs") / args.run_name


def check_arguments(args, earlier, folder):
    """The run in `folder` can only go on with the arguments that it was started with, `earlier`."""
    may_differ = {"num_epochs", "save_epochs", "capture_video", "device", "compile", "run_name"}
    if args.learning_rate < earlier.learning_rate:  # the way out of a training that diverges
        may_differ.add("learning_rate")
    for name, value in asdict(earlier).items():
        if name not in may_differ and value != getattr(args, name):
            sys.exit(
                f"{folder} has {name} = {value}, not {getattr(args, name)}: choose another "
                "--run-name, or the arguments that it has."
            )


def read_checkpoint(path, device):
    with exit_on_error(f"{path} is missing or damaged"):
        # weights_only: a checkpoint is data, and must not be able to run code.
        return torch.load(path, map_location=device, weights_only=True)


def load_model(path, device):
    """The model of a checkpoint in evaluation mode, and its run's Args, with this `device`."""
    checkpoint = read_checkpoint(path, device)
    architecture = checkpoint["architecture"]
    configs = [BlockConfig(**config) for config in architecture.pop("configs")]
    model = DecisionTransformer(configs, **architecture).to(device)
    model.load_state_dict(checkpoint["model"])
    args = Args(**checkpoint["args"])
    return model.eval(), replace(args, device=device)


def save_figure(figure, path):
    """Keep a figure as a PNG and as a TensorBoard image."""
    figure.savefig(path, dpi=120, bbox_inches="tight")
    with SummaryWriter(path.parent) as writer:
        writer.add_image(path.stem, imageio.imread(path), dataformats="HWC")


# ==================================================================================================
# Experiment
# ==================================================================================================
if __name__ == "__main__":
    if any(argument.split("=")[0] == "--backbone" for argument in sys.argv):
        sys.exit("This script compares several starting points: it takes --backbones.")
    defaults = Config(Analysis(), Args())
    if "--sample" in sys.argv:
        analysis = Analysis(mine_windows=500, mine_batch_size=25, mine_passes=4, mine_steps=2)
        defaults = Config(analysis, replace(SAMPLE, num_epochs=1))
    config = tyro.cli(tyro.conf.OmitArgPrefixes[Config], default=defaults, description=__doc__)
    analysis = config.analysis
    args = config.training
    folder = complete_arguments(args, subject="study")

    folders = list(dict.fromkeys(analysis.runs))  # each once
    if not folders:
        args.save_epochs = (0, *args.save_epochs)
        # What cannot be trained or analyzed is refused before any training.
        choose_windows(args, analysis, args.seed)
        backbones = {}
        for name in analysis.backbones:
            backbones[name] = load_backbone(replace(args, backbone=name))
        for name, backbone in backbones.items():
            folders.append(folder / name.replace("/", "_"))
            train(replace(args, backbone=name), folders[-1], backbone)
    if RANK > 0:
        sys.exit()  # under torchrun the first process does the rest

    log = read_logs(folders)
    names = ("env", "dataset", "K", "return_scale")
    mixed = [name for name in names if log[name].nunique() > 1]
    if mixed:
        sys.exit(f"The runs differ in {', '.join(mixed)}, but must see the same windows.")
    title = describe(log)
    # The same windows for all models, and some of their steps: evenly spaced, always with the last.
    _, run_args = load_model(folders[0] / "latest.pt", args.device)
    for_cka, for_mine = choose_windows(run_args, analysis, args.seed)
    K = run_args.context_length
    steps = sorted({round(step) for step in np.linspace(K - 1, 0, analysis.mine_steps)})

    models = {}  # after fine-tuning
    grams = {}
    tables = []
    runs = zip(folders, log.run.unique(), log.label.unique(), strict=True)
    for run_folder, run, label in runs:
        model_before, _ = load_model(run_folder / "epoch_0.pt", args.device)
        models[label], _ = load_model(run_folder / "latest.pt", args.device)
        before = gram_matrices(model_before, for_cka)
        after = gram_matrices(models[label], for_cka)
        tables.append(cka_table(before, after).assign(run=run, label=label))
        grams[f"{label}, before"] = before
        grams[f"{label}, after"] = after
    cka = pd.concat(tables, ignore_index=True)
    folder.mkdir(parents=True, exist_ok=True)
    cka.to_csv(folder / "cka.csv", index=False)
    save_figure(plot_cka(cka, analysis, title), folder / "cka_before_after.png")
    # Each model with itself, and the fine-tuned ones with one another.
    pairs = [(name, name) for name in grams]
    pairs += itertools.combinations([f"{label}, after" for label in models], 2)
    for token in TOKENS:
        figure = plot_heat_maps(grams, pairs, token, analysis, title)
        save_figure(figure, folder / f"cka_heat_maps_{token}.png")
    print(f"CKA, mean over layers, and the share of layers above {analysis.cka_threshold}")
    cka["above"] = cka.cka > analysis.cka_threshold
    groups = cka.groupby(["label", "token", "kind"], sort=False)
    print(groups.agg({"cka": "mean", "above": "mean"}).unstack("kind").round(3).to_string())

    if analysis.mine_windows > 0:
        questions = questions_about_data(for_mine, steps)
        tables = [answer(questions, steps, analysis, args.seed).assign(run="data", label="data")]
        for run, (label, model) in zip(log.run.unique(), models.items()):
            questions = questions_about_model(model, for_mine, steps)
            table = answer(questions, steps, analysis, args.seed)
            tables.append(table.assign(run=run, label=label))
        information = pd.concat(tables, ignore_index=True)
        information.to_csv(folder / "information.csv", index=False)
        figure = plot_information(
            information, "context", "step", analysis, title, row="quantity", col="place"
        )
        save_figure(figure, folder / "information_with_context.png")
        figure = plot_information(
            information, "same step", "depth", analysis, title, col="quantity"
        )
        save_figure(figure, folder / "information_of_same_step.png")
        figure = plot_information(information, "data", "step", analysis, title, col="quantity")
        save_figure(figure, folder / "information_in_data.png")
        print("Mutual information in nats, mean over blocks, tokens and steps")
        groups = information.groupby(["label", "part", "quantity", "shuffled"], sort=False)
        print(groups[["held_out", "training"]].mean().unstack("shuffled").round(3).to_string())
    print(f"{folder}: tables and figures; or: tensorboard --logdir runs")
