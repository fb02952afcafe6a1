"""Open up the gradients: how large, do they agree, what does clipping do, how far do weights move?

    python analyze_grads.py --sample                                    # two CPU cores
    python analyze_grads.py --backbones random gpt2 igpt-as-gpt2        # one epoch, as in the paper
    python analyze_grads.py --runs runs/ONE runs/ANOTHER --epochs 1 40  # finished runs

If ANOTHER was trained with --max-grad-norm inf, this shows what clipping does (App. G.3).

Paper: S. Takagi, "On the Effect of Pre-training for Transformer in Different Modality on Offline
Reinforcement Learning", NeurIPS 2022, https://arxiv.org/abs/2211.09817 (sections 5.3, 5.4, App. G).

A comment like [experiment.py#L321] points to a line of the paper's released code, under
https://github.com/t46/pre-training-different-modality-offline-rl/blob/200abbe/can-wikipedia-help-offline-rl

SPDX-License-Identifier: MIT
"""

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
from matplotlib.colors import LogNorm, Normalize
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
    """finished runs of any script to analyze instead of training; the arguments of training are
    theirs then, all but --seed and --device"""
    epochs: tuple[NonNegativeInt, ...] = (1,)
    """epochs whose models are analyzed; finished runs must have kept these and 0 (--save-epochs)"""
    norm_windows: int = Field(100, ge=2)
    """windows whose gradients are taken one by one, and as one batch"""
    confusion_windows: int = Field(50, ge=2)
    """how many of them are compared with each other, pair by pair"""


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
# Gradients of single windows (section 5.4)
# ==================================================================================================
def gradients_of_windows(model, windows, parameters):
    """The gradient of the loss of each window alone, as a vector: [windows, number of weights]."""
    num_windows = len(windows.valid)
    num_weights = sum(weight.numel() for weight in parameters)
    # Filled row by row: a list of rows, stacked in the end, would take twice the memory.
    gradients = torch.empty(num_windows, num_weights, device=windows.states.device)
    for i in range(num_windows):
        window = Windows(*(column[i : i + 1] for column in windows))
        loss, _ = training_loss(model, window)
        gradient = torch.autograd.grad(loss, parameters)
        gradients[i] = torch.cat([part.flatten() for part in gradient])
    return gradients


def gradient_statistics(model, windows):
    """Norms and cosines of the gradients of single windows, in evaluation mode.

    Returns the norms over all parameters and over those of the blocks, both [windows], and the
    cosines of all pairs of the latter, [windows, windows], on the CPU.

    All gradients of GPT-2 small would take 34 GB for 100 windows. But a squared norm and an inner
    product are sums over the parameters, so that one block after the other is enough: 2.8 GB, at
    the price of one pass of each window per block. All but the sum over blocks is float32.
    The released code leaves dropout on for the random model alone, since only from_pretrained
    returns a model in evaluation mode. [analysis/signal_propagation.py#L144]
    """
    num_windows = len(windows.valid)
    inner_products = torch.zeros(num_windows, num_windows, dtype=torch.float64)
    for block in tqdm(model.transformer.h, desc="gradients", unit="block", leave=False):
        gradients = gradients_of_windows(model, windows, list(block.parameters()))
        inner_products += (gradients @ gradients.T).cpu().double()  # Apple's mps has no float64
        del gradients  # before the next block's are computed
    outside_blocks = [
        weight for name, weight in model.named_parameters() if not name.startswith("transformer.h.")
    ]
    gradients = gradients_of_windows(model, windows, outside_blocks)
    squared_norms = inner_products.diagonal() + gradients.square().sum(dim=1).cpu()

    norms_in_blocks = inner_products.diagonal().sqrt()
    # Where all predicted actions are exactly -1 or 1 there is no gradient: cosines are nan.
    cosines = inner_products / torch.outer(norms_in_blocks, norms_in_blocks)
    return squared_norms.sqrt(), norms_in_blocks, cosines


# ==================================================================================================
# Parameter sets: gradient of one batch, and change since epoch 0 (sections 5.3 and 5.4)
# ==================================================================================================
def parameter_sets(model, before, windows, max_grad_norm):
    """A row for each set, a weight or bias of the blocks: its clipped gradient, and its change.

    The gradient is that of all windows as one batch. [analysis/signal_propagation.py#L330]
    The cosine of a set that starts at zero is nan; it is 0 in the released code, which adds 1e-6 to
    the denominator.
    [analysis/section-53-parameter-similarity/parameter_similarity_analysis.py#L113]
    """
    loss, _ = training_loss(model, windows)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    weights_before = before.transformer.h.state_dict()
    rows = []
    for name, weight in model.transformer.h.named_parameters():
        old = weights_before[name].double().flatten()
        new = weight.detach().cpu().double().flatten()
        block, name_in_block = name.split(".", 1)
        rows.append(
            {
                "block": int(block),
                "set": name_in_block,
                "grad_norm": weight.grad.norm().item(),
                "distance": (new - old).norm().item(),
                "relative_distance": ((new - old).norm() / old.norm()).item(),
                "cosine": (new @ old / (new.norm() * old.norm())).item(),
            }
        )
    # The relative distance of what starts at zero is infinite.
    sets = pd.DataFrame(rows).replace(math.inf, math.nan)
    return sets.assign(share=sets.grad_norm / sets.grad_norm.sum())


# ==================================================================================================
# Analysis of one model
# ==================================================================================================
def analyze(folder, epoch, analysis, args):
    """Tables of single windows, of pairs of them and of parameter sets, of a run after `epoch`.

    Models with the same data set, K and return_scale are shown the same windows, which depend on
    --seed; the released code draws new ones for each. There and here, some are padded.
    """
    before, _ = load_model(folder / "epoch_0.pt", "cpu")
    model, run_args = load_model(folder / f"epoch_{epoch}.pt", args.device)
    max_grad_norm = run_args.max_grad_norm
    data = OfflineData(load_episodes(run_args, make_env(run_args, 1)), run_args)
    rng = np.random.default_rng(args.seed)
    starts = rng.integers(len(data.states), size=analysis.norm_windows)
    windows = data.windows(torch.as_tensor(starts, device=args.device), run_args.context_length)

    norms, norms_in_blocks, cosines = gradient_statistics(model, windows)
    # What the paper plots: the norm of the blocks' part, once the whole gradient is clipped.
    # [analysis/signal_propagation.py#L231]
    clipped_norms = norms_in_blocks * (max_grad_norm / norms).clamp(max=1)
    norm_columns = {
        "norm": norms,
        "clipped_block_norm": clipped_norms,
        "max_grad_norm": max_grad_norm,
    }
    compared = cosines[: analysis.confusion_windows, : analysis.confusion_windows]
    first, second = torch.triu_indices(*compared.shape, offset=1)  # each pair once
    pair_columns = {"window": first, "other_window": second, "cosine": compared[first, second]}
    return (
        pd.DataFrame(norm_columns).rename_axis("window").reset_index(),
        pd.DataFrame(pair_columns),
        parameter_sets(model, before, windows, max_grad_norm),
    )


# ==================================================================================================
# Figures
# ==================================================================================================
sns.set_palette("colorblind")


def plot_windows(windows, pairs, title):
    """Norms of single windows' gradients, of the blocks' part after clipping, and their cosines.

    The norm is over all parameters, the rest over those of the blocks. The lowest cosine, if
    negative, is the gradient confusion of Sankararaman et al. 2020, bars in Fig. 5. Whiskers reach
    1.5 interquartile ranges, as in the paper, which plots clipped norms, at most 0.25.
    [analysis/section-54-gradient-analysis/compute_grad_norm.py#L107]
    """
    figure = Figure(figsize=(16, 2.5 + 0.4 * windows.label.nunique()), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    style = {"y": "label", "hue": "run", "saturation": 1, "legend": False}
    sns.boxplot(windows, x="norm", ax=panels[0], **style)
    sns.boxplot(windows, x="clipped_block_norm", ax=panels[1], **style)
    if pairs.cosine.notna().any():  # seaborn cannot draw boxes of nothing
        sns.boxplot(pairs, x="cosine", ax=panels[2], **style)
        sns.barplot(pairs, x="cosine", estimator="min", errorbar=None, ax=panels[3], **style)
    # Only now: seaborn would take logarithms before it computes quartiles and whiskers.
    panels[0].set_xscale("log")
    panels[0].tick_params("x", which="both", rotation=90)
    for threshold in windows.max_grad_norm.unique():
        panels[0].axvline(threshold, color="black", linestyle="--")
        panels[1].axvline(threshold, color="black", linestyle="--")
    num_compared = pairs.other_window.max() + 1
    panels[0].set(ylabel="", xlabel="gradient norm (dashed: clipping threshold)")
    panels[1].set(xlabel="norm of the blocks' gradient after clipping")
    panels[2].set(xlabel=f"cosine of two gradients, {num_compared} windows")
    panels[3].set(xlabel="lowest cosine (gradient confusion)")
    panels[3].locator_params("x", nbins=5)
    figure.suptitle(f"Gradients of {windows.window.nunique()} single windows\n{title}")
    return figure


def plot_shares(sets, title):
    """Share of each kind of weights in the sum of all gradient norms (Fig. 7).

    [analysis/section-54-gradient-analysis/compute_grad_norm.py#L134]
    """
    names = {"ln_1": "other LayerNorms", "ln_2": "other LayerNorms", "attn": "attention"}
    kinds = sets["set"].str.split(".").str[0].replace(names)
    # The first block's ln_1, which dominates in the paper, is shown by itself.
    is_first = (sets.block == 0) & sets["set"].str.startswith("ln_1")
    kinds = kinds.mask(is_first, "0." + sets["set"])
    shares = sets.assign(kind=kinds).pivot_table(
        values="share", index="label", columns="kind", aggfunc="sum", sort=False
    )
    axes = shares.reindex(
        columns=["0.ln_1.weight", "0.ln_1.bias", "other LayerNorms", "attention", "mlp"]
    ).plot.barh(
        stacked=True,
        figsize=(10, 1.5 + 0.4 * len(shares)),
        xlabel="norm of the set / sum of the norms of all sets",
        ylabel="",
        xlim=(0, 1),
        title=title,
    )
    axes.invert_yaxis()
    sns.move_legend(axes, "upper left", bbox_to_anchor=(1, 1), title="", frameon=False)
    return axes.figure


def plot_sets(sets, columns, title):
    """Heat maps of parameter sets (down) and blocks (across); `columns` is {name: what it is}.

    Each of these makes a row of heat maps, one per model, on one color scale. Sets are in the order
    of the network, those that block 0 lacks at the end; each heat map has labels of its own, as
    ImageGPT's blocks have fewer sets.
    """
    labels = sets.label.unique()
    figure = Figure(figsize=(5 * len(labels), 3.2 * len(columns) + 0.8), layout="constrained")
    rows = figure.subplots(len(columns), len(labels), squeeze=False)
    for row, (column, description) in zip(rows, columns.items()):
        positive = sets[column][sets[column] > 0]
        if column == "cosine" or positive.empty:
            scale = Normalize(sets[column].min(), sets[column].max())
        else:
            scale = LogNorm(positive.min(), positive.max())
        for axes, label in zip(row, labels):
            of_model = sets[sets.label == label]
            cells = of_model.pivot(index="set", columns="block", values=column)
            cells = cells.loc[of_model["set"].unique()]  # pivot has sorted them by name
            image = axes.imshow(cells, norm=scale, aspect="auto")
            axes.set_yticks(range(len(cells)), cells.index)
            axes.set(xticks=cells.columns, xlabel="block", facecolor="lightgrey")
            axes.set_title(textwrap.fill(label, 40))
        figure.colorbar(image, ax=row, label=description)
    figure.suptitle(title)
    return figure


def plot_learning_curves(log, title):
    """Loss, return and gradient norm over the training steps (App. G.3: with clipping or not)."""
    labels = {
        "loss": "mean squared action error",
        "return": "return (band: 95 % interval)",
        "grad_norm": "gradient norm before clipping",
    }
    grid = sns.relplot(
        log.melt(["label", "step"], list(labels)).dropna(),
        x="step",
        y="value",
        hue="label",
        col="variable",
        kind="line",
        height=3.5,
        facet_kws={"sharey": False},
        seed=0,  # of the bootstrap over the episodes of an evaluation
    )
    for name, axes in grid.axes_dict.items():
        axes.set(title="", xlabel="training step", ylabel=labels[name])
    grid.legend.set_title("")
    grid.tight_layout()
    grid.figure.suptitle(title, y=1, va="bottom")
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
    # The paper analyzes epoch 1.
    defaults = replace(SAMPLE if "--sample" in sys.argv else Args(), num_epochs=1)
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[Config],
        default=Config(Analysis(), defaults),
        description=__doc__,
    )
    analysis = config.analysis
    args = config.training
    folder = complete_arguments(args, subject="study")
    folders = list(dict.fromkeys(analysis.runs))  # each once
    if not folders:
        args.num_epochs = max(args.num_epochs, *analysis.epochs)
        args.save_epochs = (0, *analysis.epochs, *args.save_epochs)
        # All that cannot be loaded is refused before any training.
        backbones = {}
        for name in analysis.backbones:
            backbones[name] = load_backbone(replace(args, backbone=name))
        for name, backbone in backbones.items():
            folders.append(folder / name.replace("/", "_"))
            train(replace(args, backbone=name), folders[-1], backbone)
    if RANK > 0:
        sys.exit()  # under torchrun the first process does the rest

    log = read_logs(folders)
    of_models = []
    runs = zip(folders, log.run.unique(), log.label.unique(), strict=True)
    for run_folder, run, label in runs:
        for epoch in dict.fromkeys(analysis.epochs):  # each once
            columns = {"run": run, "label": f"{label}, epoch {epoch}", "epoch": epoch}
            tables = analyze(run_folder, epoch, analysis, args)
            of_models.append([table.assign(**columns) for table in tables])
    windows, pairs, sets = (pd.concat(tables, ignore_index=True) for tables in zip(*of_models))
    folder.mkdir(parents=True, exist_ok=True)
    windows.to_csv(folder / "windows.csv", index=False)
    pairs.to_csv(folder / "pairs.csv", index=False)
    sets.to_csv(folder / "sets.csv", index=False)

    title = describe(log)
    batch_title = f"Clipped gradient of one batch of {analysis.norm_windows} windows\n{title}"
    change_title = f"Change since epoch 0 (grey: zero, undefined or absent)\n{title}"
    change = {
        "distance": "l2 distance",
        "relative_distance": "l2 distance / norm before",
        "cosine": "cosine",
    }
    figures = {
        "gradient_windows": plot_windows(windows, pairs, title),
        "gradient_shares": plot_shares(sets, batch_title),
        "gradient_per_set": plot_sets(sets, {"grad_norm": "norm, clipped"}, batch_title),
        "parameter_change": plot_sets(sets, change, change_title),
        "learning_curves": plot_learning_curves(log, title),
    }
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png")

    summary = windows.groupby("label", sort=False)[["norm", "clipped_block_norm"]].median()
    summary = summary.add_prefix("median_")
    summary["without_gradient"] = (windows["norm"] == 0).groupby(windows.label).mean()
    summary["mean_cosine"] = pairs.groupby("label").cosine.mean()
    summary["lowest_cosine"] = pairs.groupby("label").cosine.min()
    weights = sets[sets["set"].str.endswith(".weight")]  # biases may start at zero
    summary["median_relative_distance"] = weights.groupby("label").relative_distance.median()
    print(summary.round(4).to_string())
    print(f"{folder}: tables and figures; or: tensorboard --logdir runs")
