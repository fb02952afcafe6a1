"""Make the bundled sample in tests/assets again: three data sets, and backbones of text, of images, of Markov chains.

    python tests/tools/build_assets.py --what data      # a minute, needs only requirements.txt
    python tests/tools/build_assets.py --what text      # apt-get install bible-kjv bible-kjv-text wordnet-base
    python tests/tools/build_assets.py --what images    # apt-get install dataset-fashion-mnist
    python tests/tools/build_assets.py --what markov    # needs only requirements.txt

Data of the size of D4RL's, for --dataset local/hopper/medium-v0 with MINARI_DATASETS_PATH=my-data
(half a minute):

    python tests/tools/build_assets.py --what data --min-steps 200000 --output my-data

A Markov backbone of GPT-2 small's size, for --backbone my-markov (wants a GPU), and a language model of a middle
size:

    python tests/tools/build_assets.py --what markov --n-layer 12 --n-head 12 --n-embd 768 --steps 80000 --output my-markov
    python tests/tools/build_assets.py --what text --n-layer 6 --n-head 6 --n-embd 384 --steps 20000 --output my-text

The models are pre-trained with transformers' own classes and losses, so that nothing in this file can share a
mistake with the scripts. Every command prints what it reached; tests/assets/README.md quotes those lines.
"""

import gzip
import itertools
import math
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

ASSETS = Path(__file__).resolve().parent.parent / "assets"


@dataclass
class Args:
    what: tuple[Literal["data", "text", "images", "markov"], ...] = (
        "data",
        "text",
        "images",
        "markov",
    )
    """which parts to make again"""
    min_steps: int = 20_000
    """environment steps per data set; the last episode is always finished"""
    steps: int = 2_400
    """pre-training steps of each model"""
    seed: int = 666
    """seed of the pre-training"""

    n_layer: int = 4
    """blocks of a backbone of text or of Markov chains"""
    n_head: int = 4
    """its heads"""
    n_embd: int = 128
    """its width"""
    temperature: float = 1.0
    """of its chain: the lower, the more there is to predict"""
    output: Path | None = None
    """folder of other data or of another backbone; by default the bundled ones are made"""


# ---------------------------------------------------------------------------------------------------------------
# Data: whole episodes of three stochastic medium-level SAC actors
# ---------------------------------------------------------------------------------------------------------------
class Actor:
    """A tanh-Gaussian SAC actor: three linear layers, ReLU, float32 observation in, action in (-1, 1) out."""

    def __init__(self, path):
        weights = np.load(path)
        self.layers = [(weights[f"{i}.weight"], weights[f"{i}.bias"]) for i in (0, 2, 4)]

    def __call__(self, observation, noise):
        h = observation
        for weight, bias in self.layers[:-1]:
            h = np.maximum(weight @ h + bias, 0)
        mean, raw = np.split(self.layers[-1][0] @ h + self.layers[-1][1], 2)
        log_std = -5 + 3.5 * (np.tanh(raw) + 1)
        return np.tanh(mean + np.exp(log_std) * noise.standard_normal(len(mean))).astype(np.float32)


def build_data(env_name, first_seed, min_steps, root, namespace):
    """Collect `min_steps` or a few more in {env_name}-v5 as a Minari data set under `root`."""
    import gymnasium as gym
    import minari
    from minari.data_collector import EpisodeBuffer

    env = gym.wrappers.DtypeObservation(
        gym.make(f"{env_name}-v5"), "float32"
    )  # a string: np.float32 breaks the spec
    actor = Actor(ASSETS / "policies" / f"{env_name}-v5-medium.npz")
    episodes, total_steps = [], 0
    progress = tqdm(total=min_steps, desc=f"{env_name}-v5", unit="step")
    while total_steps < min_steps:
        seed = first_seed + len(episodes)
        noise = np.random.default_rng([first_seed, len(episodes)])
        observation, _ = env.reset(seed=seed)
        episode = EpisodeBuffer(id=len(episodes), seed=seed, observations=[observation], actions=[])
        terminated = truncated = False
        while not (terminated or truncated):
            action = actor(observation, noise)
            observation, reward, terminated, truncated, _ = env.step(action)
            episode.observations.append(observation)
            episode.actions.append(action)
            episode.rewards.append(reward)
            episode.terminations.append(terminated)
            episode.truncations.append(truncated)
        episodes.append(episode)
        total_steps += len(episode.rewards)
        progress.update(len(episode.rewards))
    progress.close()

    name = f"{namespace}/{env_name.lower()}/medium-v0"
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["MINARI_DATASETS_PATH"] = temporary
        minari.create_dataset_from_buffers(
            name,
            buffer=episodes,
            env=env,
            data_format="hdf5",
            algorithm_name="SAC, stopped at medium level, stochastic policy",
            description=f"{env_name}-v5, actor policies/{env_name}-v5-medium.npz, "
            f"environment seeds from {first_seed}",
            requirements=[f"gymnasium=={gym.__version__}"],
        )
        shutil.copytree(Path(temporary) / name, folder)
    compress(folder / "data" / "main_data.hdf5")
    returns = [sum(episode.rewards) for episode in episodes]
    mean_and_deviation = f"{np.mean(returns):.0f} ± {np.std(returns):.0f}"
    print(f"{env_name}: {len(episodes)} episodes, {total_steps} steps, return {mean_and_deviation}")


def compress(path):
    """Write the HDF5 file anew with gzip and the compact group format: a third smaller, the same to every reader."""
    import h5py

    packed = path.with_suffix(".packed")
    with h5py.File(path) as old, h5py.File(packed, "w", libver="latest", track_order=True) as new:
        for name, episode in old.items():
            group = new.create_group(name)
            group.attrs.update(episode.attrs)
            for key, column in episode.items():
                group.create_dataset(key, data=column[()], compression="gzip", shuffle=True)
    packed.replace(path)


# ---------------------------------------------------------------------------------------------------------------
# Text: a GPT-2 on the King James Bible and the glosses of WordNet
# ---------------------------------------------------------------------------------------------------------------
def read_text():
    """Return a list of documents: chapters of the Bible, and WordNet's synsets as 'word, word: gloss' lines."""
    verses = subprocess.run(
        ["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True
    ).stdout
    chapters = {}
    for line in verses.splitlines():
        reference, _, verse = line.partition(" ")
        chapters.setdefault(reference.split(":")[0], []).append(verse)
    documents = [" ".join(verses) for verses in chapters.values()]
    for part in ("noun", "verb", "adj", "adv"):
        lines = Path(f"/usr/share/wordnet/data.{part}").read_text(encoding="latin-1").splitlines()
        glosses = []
        for line in lines:
            if re.match(r"\d{8} ", line):  # the licence at the top of the file has no such number
                fields, _, gloss = line.partition(" | ")
                fields = fields.split()
                words = [
                    re.sub(r"\(.*\)", "", word).replace("_", " ")
                    for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]
                ]
                glosses.append(f"{', '.join(words)}: {gloss.strip()}")
        documents += ["\n".join(glosses[i : i + 50]) for i in range(0, len(glosses), 50)]
    return documents


def build_text(args, folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    documents = read_text()
    np.random.default_rng(args.seed).shuffle(documents)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=[end], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(documents, trainer)
    encoded = [encoding.ids + [0] for encoding in tokenizer.encode_batch(documents)]
    held_out = len(encoded) // 20
    test, train = (
        torch.tensor([*itertools.chain(*part)]) for part in (encoded[:held_out], encoded[held_out:])
    )
    print(
        f"text: {sum(map(len, documents)) / 1e6:.1f} M characters, {len(train) / 1e6:.2f} M training tokens"
    )

    torch.manual_seed(args.seed)
    config = GPT2Config(
        vocab_size=2048, n_positions=256, n_embd=args.n_embd, n_layer=args.n_layer, n_head=args.n_head,
        bos_token_id=0, eos_token_id=0, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    length = 128

    def batch(tokens, size):
        starts = torch.randint(len(tokens) - length, (size, 1))
        return tokens[starts + torch.arange(length)]

    pretrain(model, lambda: batch(train, 32), args.steps)
    windows = test[: len(test) // length * length].view(-1, length)
    loss = evaluate(model, windows, causal_loss)
    counts = torch.bincount(test, minlength=2048).double()
    save(model, folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end
    ).save_pretrained(folder)
    print(
        f"{folder.name}: held out {loss / math.log(2):.3f} bits a token, unigram entropy {entropy(counts):.3f}"
    )


# ---------------------------------------------------------------------------------------------------------------
# Images: an ImageGPT on Fashion-MNIST, 14 x 14 pixels in 16 greys
# ---------------------------------------------------------------------------------------------------------------
def read_images(part):
    """Return [images, 196] grey levels 0..15 in raster order."""
    with gzip.open(f"/usr/share/datasets/fashion-mnist/{part}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 14, 2, 14, 2)
    return torch.from_numpy((pixels.mean((2, 4)) / 16).astype(np.int64)).view(-1, 196)


def build_images(train_steps, seed):
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    train, test = (with_start(read_images(part)) for part in ("train", "t10k"))
    torch.manual_seed(seed)
    config = ImageGPTConfig(
        vocab_size=17, n_positions=197, n_embd=128, n_layer=4, n_head=4,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    config.is_decoder = True  # without it transformers 5 asks for a bidirectional mask
    model = ImageGPTForCausalImageModeling(config)
    pretrain(model, lambda: train[torch.randint(len(train), (32,))], train_steps)
    loss = evaluate(model, test[:2000], causal_loss)
    counts = torch.bincount(test[:2000, 1:].flatten(), minlength=16).double()
    save(model, ASSETS / "image-gpt")
    print(
        f"image-gpt: held out {loss / math.log(2):.3f} bits a pixel, unigram entropy {entropy(counts):.3f}"
    )


def with_start(images):
    """Put ImageGPT's start-of-sequence token (16) before each image: [images, 197]."""
    return torch.cat([torch.full((len(images), 1), 16), images], dim=1)


# ---------------------------------------------------------------------------------------------------------------
# Markov chains: a GPT-2 that predicts the next of 100 states (Wang et al., ICLR 2024)
# ---------------------------------------------------------------------------------------------------------------
NUM_STATES = 100


def transition_matrix(temperature, seed):
    """Rows are softmaxes of logits from U(0, 1), as in Victor-wang-902/synthetic-pretrain-rl, ngram_generator.py."""
    logits = torch.rand(
        NUM_STATES, NUM_STATES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return (logits / temperature).softmax(-1)


def stationary_distribution(transitions):
    """The pi [states] with pi P = pi and sum 1."""
    equations = torch.cat(
        [transitions.T - torch.eye(len(transitions)), torch.ones(1, len(transitions))]
    )
    right = torch.zeros(len(transitions) + 1, 1, dtype=transitions.dtype)
    right[-1] = 1
    return torch.linalg.lstsq(equations, right).solution[:, 0]


def entropy_rate(transitions):
    """Entropy in nats of the next state given the present one: what no prediction can go below."""
    return -(
        stationary_distribution(transitions) @ torch.special.xlogy(transitions, transitions).sum(1)
    ).item()


def walk(transitions, start, length, size):
    """Draw `size` sequences of the chain, the first states from `start`: [size, length]."""
    states = [torch.multinomial(start, size, replacement=True)]
    for _ in range(length - 1):
        states.append(torch.multinomial(transitions[states[-1]], 1)[:, 0])
    return torch.stack(states, dim=1)


def build_markov(args, folder, temperature):
    from transformers import GPT2Config, GPT2LMHeadModel

    transitions = transition_matrix(temperature, args.seed)
    start, length = stationary_distribution(transitions), 64
    torch.manual_seed(args.seed)
    sizes = dict(n_positions=length, n_embd=args.n_embd, n_layer=args.n_layer, n_head=args.n_head)
    no_dropout = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    config = GPT2Config(
        vocab_size=NUM_STATES, **sizes, **no_dropout, bos_token_id=None, eos_token_id=None
    )
    model = GPT2LMHeadModel(config)
    recipe = dict(learning_rate=3e-4, weight_decay=1e-2, betas=(0.9, 0.999), linear=True)
    pretrain(model, lambda: walk(transitions, start, length, 32), args.steps, **recipe)
    loss = evaluate(model, walk(transitions, start, length, 500), causal_loss)
    save(model, folder)
    rate = f"entropy rate {entropy_rate(transitions):.3f}, uniform {math.log(NUM_STATES):.3f}"
    print(
        f"{folder.name}: temperature {temperature:g}, cross-entropy {loss:.3f} nats a state, {rate}"
    )


# ---------------------------------------------------------------------------------------------------------------
# Pre-training, the same for all
# ---------------------------------------------------------------------------------------------------------------
def causal_loss(model, tokens):
    """Mean cross-entropy, in nats, of each token given those before it."""
    logits = model(tokens, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def pretrain(
    model,
    sample_batch,
    steps,
    learning_rate=2e-3,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    linear=False,
):
    """AdamW with warm-up for a twelfth of the steps, cosine or linear decay, bf16 autocast, gradients clipped to 1."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    optimizer = torch.optim.AdamW(
        model.to(device).parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay
    )
    progress = tqdm(range(steps), desc=type(model).__name__, unit="step")
    for step in progress:
        decay = (
            1 - step / steps if linear else max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))
        )
        optimizer.param_groups[0]["lr"] = learning_rate * min((step + 1) / (steps // 12), decay)
        with torch.autocast(device, torch.bfloat16):
            loss = causal_loss(model, sample_batch().to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def evaluate(model, windows, loss):
    """Mean loss over `windows` [windows, tokens], after rounding the weights to float16 as they will be stored."""
    model.cpu().half().float().eval()
    batches = windows.split(50)
    return sum(loss(model, batch).item() * len(batch) for batch in batches) / len(windows)


def entropy(counts):
    """Entropy in bits of the distribution with these counts."""
    p = counts[counts > 0] / counts.sum()
    return -(p * p.log2()).sum().item()


def save(model, folder):
    """Write a Hugging Face folder with float16 safetensors in place of the old one."""
    shutil.rmtree(folder, ignore_errors=True)
    if hasattr(model.config, "is_decoder"):
        del model.config.is_decoder  # the checkpoints on the hub do not have it either
    model.half().save_pretrained(folder)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.steps < 12:
        raise SystemExit("--steps must be at least 12: a twelfth of them is warm-up.")
    if "data" in args.what:
        root, namespace = args.output or ASSETS / "minari", "local" if args.output else "sample"
        first_seed = 100_000 if args.output else 400_000  # no episode is in both
        for i, env_name in enumerate(("Hopper", "HalfCheetah", "Walker2d")):
            seed = first_seed + i * 100_000
            build_data(env_name, seed, args.min_steps, root, namespace)
    if "text" in args.what:
        build_text(args, args.output or ASSETS / "text-gpt2")
    if "images" in args.what:
        build_images(args.steps, args.seed)
    if "markov" in args.what and args.output:
        build_markov(args, args.output, args.temperature)
    elif "markov" in args.what:
        build_markov(args, ASSETS / "markov", 1.0)
        build_markov(args, ASSETS / "markov-sharp", 0.026)
