"""Towards Efficient Image Deblurring for Edge Deployment: data, metrics, training, stages, command line.

    pairs -> saliency -> sites -> distill -> surrogates --+
                           \\--> profile -> latency table --+--> search -> front -> knee -> finetune -> ...

Images are float32 RGB in [0, 1], (B, 3, H, W) or (3, H, W); stored pairs are uint8 (3, H, W). A stage is
a function of (config, pairs, earlier artefacts) to one artefact; only `run`, `main` and what an unfinished
stage keeps touch the disk. The sections of this file, in order:

    configuration                                every value that decides the result, with its unit; presets
    ranks: processes that share a stage          what torchrun's processes tell one another; errors reach all
    made pairs: dead leaves and camera shake     training data where --data gives none
    pairs on disk                                folders and lists, splits, crops, batches
    metrics                                      PSNR, SSIM, scores of nets over whole images
    training                                     the one loop of base training and fine-tuning
    what an unfinished stage keeps               so that a run that was cut off goes on where it was
    nets in and out of artefacts                 state dicts, checked, to nets
    the stages                                   section II, a function each: base to evaluate
    the report                                   report.md, pareto.png, samples.png
    one photograph                               --stage deblur, in tiles where it is large
    artefacts                                    the table of stages; files written whole, read and checked
    progress                                     one live line on a terminal, few lines in a log
    command line                                 run, export, the flags, main
"""
import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import io
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy.stats import kendalltau
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import blocks
import profile_device
import search


class InputError(Exception):
    """Something the user can put right: one line that names the thing and the remedy; exit status 2."""


# ----------------------------------------------------------------------------- configuration

def knob(default, help, unit=""):
    """A configuration entry: its demo value, one line with the section of the paper, the unit of the value."""
    return dataclasses.field(default=default, metadata={"help": help, "unit": unit})


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides the result. Defaults are the demo preset, sized for two CPU cores."""
    seed: int = knob(0, "seed of every random choice")
    data: str = knob("", "folder with train and test pairs: sibling folders or lists; none: made pairs")
    from_: str = knob("", "a finetuned.pt to adapt to --data, without a search (III-C)")
    test: tuple = knob((), "a further test set, folder or list; may be given several times")
    workers: int = knob(0, "processes that decode training images; batches are the same for any number")
    made_train: int = knob(256, "made pairs for training and distillation")
    made_test: int = knob(32, "made pairs for validation, and as many for testing")
    made_size: int = knob(128, "side of a made image", "pixels")
    few: int = knob(64, "own training pairs below which as many made ones take half of all crops")
    val_pairs: int = knob(16, "most pairs carved from train to score the search and pick (II-C)")
    weights: str = knob("", "pre-trained NAFNet checkpoint (authors' format); none: train one")
    width: int = knob(16, "channels of the net at full resolution")
    enc: tuple = knob((1, 1, 4, 1), "blocks per encoder stage (small crops need theirs earlier)")
    middle: int = knob(1, "blocks in the middle stage")
    dec: tuple = knob((1, 1, 1, 1), "blocks per decoder stage")
    crop: int = knob(96, "side of a training crop", "pixels")
    batch: int = knob(4, "crops per training step")
    amp: bool = knob(False, "train in bfloat16 where that is safe (autocast): base, distill, finetune")
    base_steps: int = knob(2400, "length of base training", "steps")
    base_lr: float = knob(2e-3, "first learning rate of base training, cosine to 1e-7")
    frame: tuple = knob((256, 256), "input of the profiled net (III-A), H or HxW", "pixels")
    target: str = knob("local", "latency table: local (this machine), qai-hub (a phone) or paper (its table 2)")
    hub_device: str = knob(profile_device.HUB_DEVICE, "device of Qualcomm AI Hub, for --target qai-hub (III-A)")
    hub_runtime: str = knob("tflite", "runtime on that device: tflite, qnn_context_binary or onnx")
    distill_share: float = knob(0.25, "share of the training pairs used for distillation (III-A)")
    distill_steps: int = knob(150, "length of distillation, all surrogates in one pass (II-B)", "steps")
    distill_lr: float = knob(4e-3, "first learning rate of distillation, cosine to 0")
    evaluations: int = knob(100, "configurations that the search scores (II-C)")
    candidates: int = knob(3, "architectures of the knee region that are fine-tuned (II-D)")
    finetune_steps: int = knob(240, "length of fine-tuning of each candidate", "steps")
    finetune_lr: float = knob(5e-4, "first learning rate of fine-tuning, cosine to 1e-7")
    pick: str = knob("best", "of the fine-tuned candidates: best (PSNR) or fastest (III-A)")
    tlc: bool = knob(False, "score with attention over a local window of 1.5 x --crop (Chu et al. 2021)")


# Training in the paper preset is NAFNet's: crop, batch, learning rate.
PRESETS = {
    "demo": {},
    "paper": dict(width=32, enc=(1, 1, 1, 28), crop=256, batch=64, base_steps=200_000, base_lr=1e-3,
                  frame=(512, 512), distill_steps=20_000, distill_lr=1e-3, evaluations=200,
                  finetune_steps=100_000, finetune_lr=1e-4, made_train=2000, made_size=384),
}
CHOICES = {"target": ("local", "qai-hub", "paper"), "hub_runtime": profile_device.HUB_RUNTIMES,
           "pick": ("best", "fastest")}


def check(config):
    """Refuse, by name, values that no stage can use."""
    if config.seed >= 2 ** 32:
        raise InputError(f"--seed {config.seed} must be below 2^32")
    if config.made_size < 11:
        raise InputError(f"--made-size {config.made_size} must be at least 11")
    free = ("seed", "workers", "few", "base_steps", "distill_steps", "finetune_steps")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values = value if isinstance(value, tuple) else (value,)
        if field.name in free and value < 0:
            raise InputError(f"{flag(field.name)} {value} is negative: give 0 or more")
        if field.name not in free and not all(isinstance(v, (str, bool)) or v > 0 for v in values):
            raise InputError(f"{flag(field.name)} {value} must be positive")
    if len(config.enc) != len(config.dec):
        raise InputError(f"--enc has {len(config.enc)} stages, --dec {len(config.dec)}: give as many of each")
    if not config.data and config.crop > config.made_size:
        raise InputError(f"--crop {config.crop} is larger than --made-size {config.made_size}")
    if config.distill_share > 1:
        raise InputError(f"--distill-share {config.distill_share} must be at most 1")
    test_sets(config)


def flag(name):
    return "--" + name.strip("_").replace("_", "-")


def test_sets(config):
    """{NAME: path} of --test."""
    sets = {}
    for text in config.test:
        name, _, path = text.partition("=")
        if not name or not path or name in sets or name in ("validation", "test"):
            raise InputError(f"--test {text}: give NAME=PATH, each NAME once, and not validation or test")
        sets[name] = path
    return sets


# -------------------------------------------------------------- ranks: processes that share a stage

def rank():
    """This process's number among those that torchrun started, 0 if it is the only one."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world():
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value):
    """[value of rank 0, of rank 1, ...], on every rank."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


class Told(InputError):
    """An error that every rank raises, whichever met it."""


def agreed(call):
    """call() on every rank; where it fails on one, all raise the first one's line, so that none waits for ever.

    Calls nest: a rank that fails between two inner ones is in the outer one's `gather` when the others come to
    the next inner one's, and what they learn there they raise as it is.
    """
    value, line = None, None
    try:
        value = call()
    except Told:
        raise
    except (InputError, profile_device.HubError, OSError) as error:
        if world() == 1:
            raise
        line = one_line(error)
    lines = [line for line in gather(line) if line]
    if lines:
        raise Told(lines[0])
    return value


def first(call):
    """call() on rank 0 alone -> what it returned, on every rank."""
    value = [agreed(lambda: call() if rank() == 0 else None)]
    if world() > 1:
        dist.broadcast_object_list(value)
    return value[0]


@contextlib.contextmanager
def joined(device):
    """With the other ranks, if torchrun started any -> this one's device. Rank 0 alone prints.

    gloo on CPU, nccl besides on GPUs. The limit of a day is for ranks that wait while rank 0 profiles a phone.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    on_gpu = device.startswith("cuda")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=datetime.timedelta(days=1))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the other ranks are not to be reached ({first_line(error)}): start with torchrun") from None
    try:
        with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as quiet:
            if rank():
                quiet.enter_context(contextlib.redirect_stdout(nowhere))
                quiet.enter_context(contextlib.redirect_stderr(nowhere))
            yield device
    finally:
        dist.destroy_process_group()


# --------------------------------------------------- made pairs: dead leaves and camera shake

def power_noise(size, rng):
    """(size, size) float32 noise with a power-law spectrum, unit variance: the texture of a leaf."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    f[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) / f ** rng.uniform(0.8, 1.6)
    noise = np.fft.irfft2(spectrum, (size, size))
    return (noise / noise.std()).astype(np.float32)


def leaf_mask(radius, rng):
    """A random disc, bar, rectangle or polygon that fits a circle of `radius` pixels (PIL, 8-bit)."""
    mask = Image.new("L", (2 * radius + 1, 2 * radius + 1))
    draw = ImageDraw.Draw(mask)
    kind = rng.integers(4)
    if kind == 0:
        draw.ellipse((0, 0, 2 * radius, 2 * radius), fill=255)
        return mask
    if kind == 1:
        corners = rng.integers(3, 9)
        angles, reach = np.sort(rng.uniform(0, 2 * np.pi, corners)), rng.uniform(0.5, 1, corners) * radius
    else:
        half = math.atan(rng.uniform(0.03, 1.0))                       # from a thin bar to a square
        angles = rng.uniform(0, np.pi) + np.array([half, np.pi - half, np.pi + half, -half])
        reach = np.full(4, radius)
    draw.polygon([(radius + r * math.cos(a), radius + r * math.sin(a)) for a, r in zip(angles, reach)],
                 fill=255)
    return mask


def leaf_colour(palette, rng):
    """One of the palette's colours, a little varied: (3,) in [0, 1]."""
    return np.clip(palette[rng.integers(len(palette))] + rng.normal(0, 0.06, 3), 0, 1)


def leaf_fill(height, width, palette, textures, contrast, rng):
    """A patch (height, width, 3) of 8 bits: one colour, a linear ramp of light, a crop of a texture.

    The ramp changes by about a quarter across the patch and is zero at half the scene's side from its
    corner, so that many small patches saturate: the deep shadows and highlights that photographs have.
    """
    colour = leaf_colour(palette, rng)
    texture = textures[rng.integers(len(textures))]
    top, left = rng.integers(0, texture.shape[0] - height + 1), rng.integers(0, texture.shape[1] - width + 1)
    texture = texture[top:top + height, left:left + width] * rng.exponential(contrast)
    slope, middle = rng.normal(0, 0.25, 2) / (height, width), textures[0].shape[0] / 2
    ramp = np.add.outer(slope[0] * (np.arange(height) - middle), slope[1] * (np.arange(width) - middle))
    shade = np.clip(colour * (1 + ramp + texture)[..., None], 0, 1)
    return Image.fromarray((shade * 255 + 0.5).astype(np.uint8))


def dead_leaves(size, rng):
    """A scene (size, size, 3) uint8 of shapes that hide one another (Lee, Mumford & Huang 2001).

    Radii follow a power law, as in photographs; such images train restoration nets almost as well
    (Achddou et al. 2021). A palette per image; the count decides between open sky and clutter.
    """
    shades = rng.integers(4, 10)
    palette = np.clip(rng.beta(0.9, 1.2, (shades, 1)) + rng.normal(0, 0.1, (1, 3))
                      + rng.normal(0, rng.uniform(0.02, 0.25), (shades, 3)), 0.01, 1)
    textures = [power_noise(size, rng) for _ in range(3)]
    canvas = leaf_fill(size, size, palette, textures, 0.05, rng)
    count = int(10 ** rng.uniform(2.4, 3.2) * (size / 320) ** 2)
    alpha, smallest, largest = rng.uniform(1, 2), 3.0, size / 3
    radii = (smallest ** -alpha + rng.random(count) * (largest ** -alpha - smallest ** -alpha)) ** (-1 / alpha)
    for radius in radii.astype(int):
        mask = leaf_mask(int(radius), rng)
        if radius > 5:
            patch = leaf_fill(mask.height, mask.width, palette, textures, 0.2, rng)
        else:
            patch = tuple(int(255 * v) for v in leaf_colour(palette, rng))
        canvas.paste(patch, tuple(int(v) for v in rng.integers(-radius, size, 2)), mask)
    return np.array(canvas)


def camera_path(frames, rng):
    """(frames, 4) of x, y (pixels), rotation (rad), zoom around their mean: a shaking hand.

    A random walk of the velocity with inertia and rare jerks, after Boracchi & Foi 2012.
    """
    inertia, velocity, path = rng.uniform(0.7, 0.98), rng.standard_normal(4), []
    for _ in range(frames):
        velocity = inertia * velocity + math.sqrt(1 - inertia ** 2) * rng.standard_normal(4)
        if rng.random() < 0.03:
            velocity = rng.standard_normal(4) - velocity
        path.append(velocity)
    path = np.cumsum(path, 0)
    path -= path.mean(0)
    length = np.linalg.norm(np.ptp(path[:, :2], axis=0))
    path[:, :2] *= rng.uniform(2, 13) / length
    return path * np.array([1, 1, *(rng.uniform(0, (math.radians(1.5), 0.015)) / np.abs(path[:, 2:]).max(0))])


def made_pair(size, rng, frames=24, margin=16):
    """A (sharp, blur) pair, uint8 (3, size, size): frames of a scene averaged in linear light.

    As GoPro's own pairs were made, gamma 2.2. Rendered at twice the size, through a lens that is
    slightly soft as real ones are, and averaged down.
    """
    scene = torch.from_numpy(dead_leaves(2 * (size + 2 * margin), rng)).permute(2, 0, 1)
    linear = soft_lens((scene / 255) ** 2.2, 2 * rng.uniform(0.2, 1.0))[None]
    side = linear.shape[-1]
    x, y, turn, zoom = camera_path(frames, rng).T
    c, s = (1 + zoom) * np.cos(turn), (1 + zoom) * np.sin(turn)
    theta = np.stack([c, -s, 4 * x / side, s, c, 4 * y / side], 1).reshape(frames, 2, 3)
    grid = F.affine_grid(torch.from_numpy(theta).float(), (frames, 3, side, side), align_corners=False)
    inside = slice(2 * margin, -2 * margin)
    blur = sum(F.grid_sample(linear, g[None], padding_mode="reflection", align_corners=False)
               for g in grid[:, inside, inside]) / frames
    return to_eight_bits(linear[..., inside, inside]), to_eight_bits(blur)


def soft_lens(image, sigma):
    """Gaussian blur of (3, H, W) with `sigma` in pixels."""
    t = torch.arange(-6.0, 7.0)
    kernel = torch.exp(-t ** 2 / (2 * sigma ** 2))
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1)
    image = F.pad(image[None], (6, 6, 6, 6), mode="reflect")
    return F.conv2d(F.conv2d(image, kernel[:, :, :, None], groups=3), kernel[:, :, None], groups=3)[0]


def to_eight_bits(linear):
    """Linear light (1, 3, 2H, 2W) -> gamma-encoded uint8 (3, H, W), each pixel the mean of four."""
    return (F.avg_pool2d(linear, 2).clamp(0, 1) ** (1 / 2.2) * 255 + 0.5).to(torch.uint8)[0]


# --------------------------------------------------------------------------- pairs on disk

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
FOLDERS = (("blur", "sharp"), ("blur", "gt"), ("input", "target"), ("inputC", "target"), ("source", "target"))


def list_pairs(path, split):
    """[(sharp path, blur path), ...] of a split, sorted; pairs match by name.

    `path` is a text file of pairs, or a folder that holds the split: split.txt (such a file), else split/
    or split_c/ (DPDD), see `pairs_below`. Raises InputError naming what is missing.
    """
    path = Path(path)
    root = path if path.is_file() else split_root(path, split)
    if root is None:
        root = path / split
        raise InputError(f"no folder {root}: --data wants {split} pairs there, say {root}/SCENE/blur and /sharp")
    return pairs_below(root)


def split_root(path, split):
    """The file or folder in `path` that holds a split; None if there is none."""
    return next((root for root in (path / f"{split}.txt", path / split, path / f"{split}_c") if root.exists()), None)


def pairs_below(root):
    """The pairs of a text file, or of all sibling folders known by name below a folder, sorted.

    Where a folder holds several layouts (sharp and gt, say), the first of FOLDERS counts.
    """
    if root.is_file():
        return listed_pairs(root)
    pairs, layouts = [], [tuple(name.lower() for name in names) for names in FOLDERS]
    for folder, inner, _ in os.walk(root, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        here = {name.lower(): Path(folder) / name for name in inner}
        whole = [names for names in layouts if here.keys() >= set(names)]
        if whole:
            blur, sharp = whole[0]
            pairs += match_names(here[sharp], here[blur])
            continue
        for name in sorted(set(sum(layouts, ())) & here.keys()):
            if images_in(here[name]):
                raise InputError(f"{here[name]} has images but no folder of partners beside it: add that, or remove it")
    if not pairs:
        raise InputError(f"no pairs below {root}: it needs sibling folders such as blur and sharp")
    return sorted(pairs)


def images_in(folder):
    """The image files of a folder, in any case of extension; hidden files and other files are no images."""
    return [f for f in folder.iterdir() if f.suffix.lower() in IMAGES and not f.name.startswith(".") and f.is_file()]


def listed_pairs(path):
    """The pairs of a text file of `sharp blur` paths, one pair a line, relative to the file's folder."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file: every line must be two paths, sharp and blurred") from None
    pairs = [tuple(path.parent / name for name in line.split()) for line in lines if line.strip()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise InputError(f"{path}: every line must be two paths without spaces, sharp and blurred")
    return pairs


def named_pairs(config):
    """{NAME: pairs} of --test: the test split of a folder that has one, else all pairs below it."""
    sets = {}
    for name, path in test_sets(config).items():
        path = Path(path)
        if not path.exists():
            raise InputError(f"--test {name}={path}: there is no such folder or list")
        root = split_root(path, "test") if path.is_dir() else path
        if root is None and split_root(path, "train"):
            raise InputError(f"--test {name}={path} has a train split but no test split: give the folder or list to score")
        sets[name] = sized_pairs(pairs_below(root or path), 11, "scored")
    return sets


def match_names(sharp, blur):
    """Pairs of two folders by file name without extension (and without RealBlur's folder prefix)."""
    def by_name(folder):
        files = images_in(folder)
        names = {re.sub(f"^{re.escape(folder.name)}_", "", f.stem, flags=re.IGNORECASE): f for f in files}
        if len(names) < len(files):
            twice = next(f for f in files if f not in names.values())
            raise InputError(f"{twice} has the name of another image there but for its extension: remove one")
        return names
    s, b = by_name(sharp), by_name(blur)
    for name in sorted(s.keys() ^ b.keys()):
        raise InputError(f"{s.get(name) or b.get(name)} has no partner in {blur if name in s else sharp}: "
                         "add it, or remove this file")
    return [(s[name], b[name]) for name in s]


def load_image(path):
    """Any image file -> RGB uint8 (3, H, W)."""
    try:
        with open_photo(path) as image:
            return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
    except InputError:
        raise
    except Exception as error:                    # Pillow raises many kinds on damaged files
        raise InputError(f"cannot read image {path} ({first_line(error)}): replace or remove it") from None


def to_rgb(image):
    """A PIL image, upright (EXIF), RGB at 8 bits; 16-bit grey is scaled, not clipped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.clip(np.asarray(image, dtype=float), 0, 65535) / 257 + 0.5).astype(np.uint8))
    return image.convert("RGB")


def load_pair(pair):
    """A pair of tensors as it is, or a pair of paths read from disk -> (sharp, blur) of equal size."""
    if torch.is_tensor(pair[0]):
        return pair
    sharp, blur = map(load_image, pair)
    if sharp.shape != blur.shape:
        raise InputError(f"{pair[1]} is {size_of(blur)} but {pair[0]} is {size_of(sharp)}: pairs must be of one size")
    return sharp, blur


def sized_pairs(pairs, smallest, use):
    """The pairs, once every file's header is read: both of one size, and no side below `smallest` pixels."""
    for sharp, blur in pairs:
        sizes = []
        for path in (sharp, blur):
            with open_photo(path) as image:
                turned = image.getexif().get(0x0112, 1) > 4            # EXIF orientation: on its side
                sizes.append(image.size[::-1] if turned else image.size)
        if sizes[0] != sizes[1]:
            raise InputError("{} is {}x{} but {} is {}x{}: pairs must be of one size".format(blur, *sizes[1], sharp, *sizes[0]))
        if min(sizes[0]) < smallest:
            raise InputError(f"{sharp} is {sizes[0][0]}x{sizes[0][1]}, too small to be {use}: at least {smallest} pixels a side")
    return pairs


def open_photo(path):
    """A PIL image of which only the header is read yet."""
    try:
        return Image.open(path)
    except Exception as error:                    # Pillow raises many kinds on damaged files
        raise InputError(f"cannot read image {path} ({first_line(error)}): replace or remove it") from None


def size_of(image):
    return f"{image.shape[-1]}x{image.shape[-2]}"


def split_pairs(config, split):
    """The pairs of 'train', 'val' or 'test'. Validation is carved from train; test is never train."""
    if not config.data:
        count = config.made_train if split == "train" else config.made_test
        return made_pairs(config.seed, split, count, config.made_size)
    if Path(config.data).is_file():
        raise InputError(f"--data {config.data} is a file: give the folder, with lists named train.txt and test.txt")
    if split == "test":
        return sized_pairs(list_pairs(config.data, "test"), 11, "scored")
    pairs = sized_pairs(list_pairs(config.data, "train"), max(11, config.crop), f"cropped at --crop {config.crop}")
    if len(pairs) < 2:
        raise InputError(f"{config.data}: {len(pairs)} training pair; at least 2, as one is kept for validation")
    order = np.random.default_rng([config.seed, 3]).permutation(len(pairs))
    held = min(config.val_pairs, max(1, len(pairs) // 8))
    return [pairs[i] for i in (order[:held] if split == "val" else order[held:])]


def made_pairs(seed, split, count, size):
    """The first `count` made pairs of a split, `size` pixels a side; each a function of (seed, split, its number)."""
    stream, tick, pairs = ("train", "val", "test").index(split), progress(f"making {split} pairs", count), []
    for i in range(count):
        pairs.append(made_pair(size, np.random.default_rng([seed, stream, i])))
        tick(i + 1)
    return pairs


def training_pairs(config):
    """What a run trains on: train, or, where that is a few photographs, train and made pairs by halves.

    A net that saw three photographs alone fails on the fourth: 400 steps on crops of one scene scored 9 dB
    below the blurred input on another scene, by halves with made pairs above it. Adaptation keeps to train.
    """
    own = split_pairs(config, "train")
    if not config.data or config.from_ or len(own) >= config.few:
        return own
    count = min(max(1, config.few // len(own)) * len(own), config.made_train)
    made = made_pairs(config.seed, "train", count, max(config.made_size, config.crop))
    say(f"{len(own)} training pairs are few (--few {config.few}): {len(made)} made ones take half of all crops")
    mixed = own * max(1, round(len(made) / len(own))) + made
    return [mixed[i] for i in np.random.default_rng([config.seed, 5]).permutation(len(mixed))]


def crops(pairs, seed, crop, batch, device="cpu", workers=0):
    """A function step -> (blur, sharp), each (batch, 3, crop, crop): random places, flips and turns.

    A pure function of (seed, step), so that a loop resumed at any step continues bit for bit, and that
    `workers` processes may decode ahead without changing a bit.
    """
    read = load_pair if workers else keep_recent(load_pair)
    make = functools.partial(random_crops, pairs, seed, crop, batch, read)
    make = made_ahead(make, workers) if workers else make
    return lambda step: [as_batch(images, device) for images in make(step)]


def random_crops(pairs, seed, crop, batch, read, step):
    """The crops of one step: blurred and sharp, each uint8 (batch, 3, crop, crop)."""
    rng = np.random.default_rng([seed, step])
    taken = [crop_pair(read(pairs[int(i)]), crop, rng) for i in rng.integers(0, len(pairs), batch)]
    return [torch.stack(images) for images in zip(*taken)]


def keep_recent(load, limit=256 * 2 ** 20):
    """load(pair) with a memory of the pairs used last, at most `limit` bytes (always the very last one)."""
    held, size = {}, 0

    def read(pair):
        nonlocal size
        known = pair in held
        held[pair] = held.pop(pair) if known else load(pair)           # a dict keeps order: the last used is last
        size += 0 if known else sum(image.nbytes for image in held[pair])
        while size > limit and len(held) > 1:
            size -= sum(image.nbytes for image in held.pop(next(iter(held))))
        return held[pair]

    return read


def made_ahead(make, workers):
    """make(step), computed ahead in DataLoader workers as long as steps are asked for in order."""
    stream, due = None, None

    def at(step):
        nonlocal stream, due
        if step != due:
            stream = iter(DataLoader(range(step, 2 ** 62), batch_size=None, collate_fn=make, num_workers=workers,
                                     generator=torch.Generator()))         # its own: the global one stays as it was
        due = step + 1
        try:
            return next(stream)
        except InputError as error:               # torch puts the worker's traceback before the line
            raise InputError(str(error).strip().splitlines()[-1].split("InputError: ", 1)[-1]) from None

    return at


def crop_pair(pair, crop, rng):
    """(sharp, blur) of any size -> (blur, sharp) uint8 (3, crop, crop), moved and turned together."""
    height, width = pair[0].shape[-2:]
    top, left = rng.integers(0, height - crop + 1), rng.integers(0, width - crop + 1)
    turns, flip = int(rng.integers(4)), rng.integers(2)
    window = [torch.rot90(image[:, top:top + crop, left:left + crop], turns, (1, 2)) for image in pair[::-1]]
    return [image.flip(2) if flip else image for image in window]


def as_batch(images, device="cpu"):
    """uint8 (3, H, W) images -> one float32 (B, 3, H, W) in [0, 1], channels_last."""
    batch = torch.stack(list(images)).to(device).float() / 255
    return batch.contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------- metrics

def psnr(x, y):
    """Peak signal-to-noise ratio in dB, peak 1.0: per image (B, 3, H, W), then averaged -> scalar."""
    return (-10 * (x - y).square().mean((-3, -2, -1)).log10()).mean()


def psnr_loss(x, y):
    """What training minimises: minus the PSNR, kept finite where x = y (Chen et al. 2022)."""
    return (10 * ((x - y).square().mean((-3, -2, -1)) + 1e-8).log10()).mean()


def ssim(x, y):
    """Structural similarity (Wang et al. 2004) of (B, 3, H, W) or (3, H, W), averaged -> scalar.

    11x11 Gaussian window, sigma 1.5, valid region, per channel, population covariance, peak 1.0; float64.
    """
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"ssim: an image of {size_of(x)} is smaller than the 11x11 window")
    kernel = np.exp(-(np.arange(11) - 5) ** 2 / (2 * 1.5 ** 2))

    def smooth(z):                                                     # (..., H, W) -> (..., H-10, W-10)
        for dim in (-1, -2):                      # shifted sums: float64 convolutions are far slower on a CPU
            total = torch.zeros_like(z.narrow(dim, 10, z.shape[dim] - 10))
            for i, weight in enumerate(kernel / kernel.sum()):
                total.add_(z.narrow(dim, i, total.shape[dim]), alpha=weight)
            z = total
        return z

    x, y = x.double(), y.double()
    mx, my = smooth(x), smooth(y)
    vx, vy, cov = smooth(x * x) - mx * mx, smooth(y * y) - my * my, smooth(x * y) - mx * my
    score = (2 * mx * my + 0.01 ** 2) * (2 * cov + 0.03 ** 2)
    return (score / ((mx * mx + my * my + 0.01 ** 2) * (vx + vy + 0.03 ** 2))).mean()


def quantize(x):
    """Clamp to [0, 1] and round to 8 bits, as published scores are."""
    return (x.clamp(0, 1) * 255).round() / 255


def restore(net, blur, device="cpu"):
    """One uint8 (3, H, W) through the net -> quantized float (1, 3, H, W)."""
    with torch.inference_mode():
        return quantize(net(as_batch([blur], device)))


def evaluate(net, pairs, device="cpu", with_ssim=True, label=""):
    """Mean PSNR (dB) and SSIM over whole images of any size; net None scores the blurred input itself.

    One pair is in memory at a time. Progress is shown under `label`, if there is one.
    """
    rows, tick = [], progress(label, len(pairs)) if label else None
    for pair in pairs:
        sharp, blur = load_pair(pair)
        output = as_batch([blur], device) if net is None else restore(net, blur, device)
        target = as_batch([sharp], device)
        rows.append((psnr(output, target).item(), ssim(output, target).item() if with_ssim else math.nan))
        if tick:
            tick(len(rows))
    return {"psnr_db": statistics.fmean(r[0] for r in rows), "ssim": statistics.fmean(r[1] for r in rows)}


def score_nets(nets, pairs, device="cpu", label=""):
    """{"pairs": how many, "blurred": score of the input, name: score of each of nets {name: net}}."""
    return {"pairs": len(pairs), "blurred": evaluate(None, pairs, device),
            **{name: evaluate(net, pairs, device, label=f"{label}: {name}") for name, net in nets.items()}}


def protocol(config):
    """How images are scored, in words."""
    window = 3 * config.crop // 2
    reach = f"a local window of {window} pixels, 1.5 x the training crop (--tlc)" if config.tlc else "the whole image"
    return ("Protocol: whole RGB images, outputs clamped and rounded to 8 bits, no border crop, no alignment; "
            f"channel attention averages over {reach}.")


def as_scored(net, config):
    """`net`, in place, with the attention window of the protocol."""
    if config.tlc:
        blocks.set_window(net, 3 * config.crop // 2)
    return net


# ------------------------------------------------------------------------------ training

def train(net, batch_at, steps, lr, label="training", amp=False, part=None):
    """A trained copy of `net`: AdamW (.9, .9), decay 1e-3, cosine from lr to 1e-7, PSNR loss.

    NAFNet's recipe. In eval mode throughout: NAF blocks do not mind, and batch norms keep the
    statistics of distillation, which whole images share and small crops do not. amp: the net runs under
    bfloat16 autocast; weights, loss and optimiser stay float32. Several ranks take a share of every batch
    each, and their gradients are averaged. part: goes on from what it holds, and keeps it up to date.
    """
    net = copy.deepcopy(net).eval().requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.9), weight_decay=1e-3)
    found, keep = resumed(part), keeper(part)
    begun = kept = restored(net, optimizer, found, part) if found else 0
    model = DistributedDataParallel(net) if world() > 1 else net
    tick, step, value = progress(label, steps, begun), begun, None
    for step in range(begun, steps):
        optimizer.param_groups[0]["lr"] = 1e-7 + (lr - 1e-7) * (1 + math.cos(math.pi * step / steps)) / 2
        blur, sharp, weight = agreed(lambda: own_share(*batch_at(step)))
        with torch.autocast(blur.device.type, torch.bfloat16, enabled=amp):
            output = model(blur)
        loss = weight * psnr_loss(output.to(sharp.dtype), sharp)
        value = statistics.fmean(gather(loss.item()))
        if not math.isfinite(value):
            break
        kept = step if keep(lambda: train_state(net, optimizer, step)) else kept    # its loss is finite: good
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tick(step + 1, f"{-value:.2f} dB")
    if not finite(net.state_dict()) or value is not None and not math.isfinite(value):
        good = f"; the last good checkpoint is {part.path}, of step {kept}: delete it to start over" if part else ""
        raise InputError(f"{label} diverged, the loss of step {step} is {value}: lower the learning rate{good}")
    keep(lambda: train_state(net, optimizer, steps), now=True)
    return net.requires_grad_(False)


def own_share(blur, sharp):
    """This rank's part of a batch, and the weight of its mean loss in the average over ranks."""
    size, ranks = len(blur), world()
    if size < ranks:
        raise InputError(f"--batch {size} is too small for {ranks} ranks: give at least as many crops")
    blur, sharp = blur[rank()::ranks], sharp[rank()::ranks]
    return blur, sharp, len(blur) * ranks / size


def train_state(net, optimizer, step):
    """What training goes on from. `params` is in the authors' format, so that --weights takes such a file."""
    return {"params": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}


def restored(net, optimizer, state, part):
    """Net and optimiser, in place, as they were in a `train_state` -> its step."""
    with_params(net, state["params"], part.path)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def finite(state):
    """Whether all parameters and statistics of a state dict are finite."""
    return all(v.isfinite().all().item() for v in state.values())


# ------------------------------------------------------------------ what an unfinished stage keeps

class Part(NamedTuple):
    """The file of an unfinished stage: what it belongs to, and the most seconds of work that may be lost."""
    path: Path
    stage: str
    config: Config
    inputs: dict          # {stage: checksum of the artefact that is read}
    every_s: float = 120.0


def resumed(part):
    """What an unfinished stage left, on every rank; None where there is nothing from the same inputs."""
    return first(lambda: read_part(part)) if part else None


def read_part(part):
    """What is in the part's file; InputError where flags differ or it is damaged."""
    if not part.path.exists():
        return None
    found = load_artefact(part.path, part.stage, part.config)
    if found.get("inputs") != part.inputs:
        say(f"{part.stage}: {part.path} belongs to other artefacts and counts for nothing")
        return None
    say(f"{part.stage}: goes on from {part.path}, {found['step']} done")
    return found


def keeper(part):
    """A function (make, now) that saves make() in the part's file when it is time -> whether it was.

    Every part.every_s seconds, and sooner where that takes no more than a fiftieth of the time. Rank 0's
    clock decides; make() is called on every rank.
    """
    last, wait = time.monotonic(), 0.0

    def keep(make, now=False):
        nonlocal last, wait
        started = time.monotonic()
        if not part or not first(lambda: now or started - last >= wait):
            return False
        state = make()
        first(lambda: save_artefact(part.path, described(part.config, part.stage, {"inputs": part.inputs, **state})))
        last = time.monotonic()
        wait = min(part.every_s, 50 * (last - started))
        return True

    return keep


# ------------------------------------------------------------------ nets in and out of artefacts

def new_net(arch, seed):
    """An untrained NAFNet; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return blocks.NAFNet(arch["width"], tuple(arch["enc"]), arch["middle"], tuple(arch["dec"])).eval()


def arch_of(params):
    """The architecture of an authors' state dict, read off its keys and shapes."""
    def count(prefix):
        number = 1 + max((int(k[len(prefix):].split(".")[0]) for k in params if k.startswith(prefix)), default=-1)
        if number > len(params):
            raise ValueError(f"{number} parts named {prefix} in {len(params)} tensors")
        return number
    levels = count("encoders.")
    return {"width": params["intro.weight"].shape[0], "middle": count("middle_blks."),
            "enc": [count(f"encoders.{i}.") for i in range(levels)],
            "dec": [count(f"decoders.{i}.") for i in range(count("decoders."))]}


def load_weights(path):
    """A checkpoint in the authors' format ({'params': state dict} or the dict itself) -> NAFNet."""
    params = load_torch(path, "give a NAFNet state dict")
    params = params.get("params", params) if isinstance(params, dict) else params
    tensors = isinstance(params, dict) and all(torch.is_tensor(v) for v in params.values())
    if not tensors or "intro.weight" not in params:
        raise InputError(f"{path} holds no NAFNet state dict: it needs tensors such as intro.weight")
    try:
        arch = arch_of(params)
        with torch.device("meta"):                # shapes only: a damaged key may ask for a huge net
            shapes = blocks.NAFNet(arch["width"], tuple(arch["enc"]), arch["middle"], tuple(arch["dec"]))
    except (ValueError, RuntimeError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its keys describe no NAFNet ({first_line(error)})") from None
    must_fit(shapes, params, path)
    return with_params(new_net(arch, 0), params, path)


def with_params(net, params, path):
    """`net` with its parameters loaded, in place; InputError naming the first keys that do not fit."""
    must_fit(net, params, path)
    try:
        net.load_state_dict(params)
    except RuntimeError as error:                 # a tensor of the right shape and a strange kind
        raise InputError(f"{path}: weights that cannot be used ({first_line(error)}): give others") from None
    return net.eval()


def must_fit(net, params, path):
    """InputError naming the first keys of `params` that do not fit the net."""
    own = net.state_dict()
    wrong = [k for k in sorted(own.keys() | params.keys(), key=str)
             if k not in own or k not in params or own[k].shape != getattr(params[k], "shape", None)]
    if wrong:
        raise InputError(f"{path}: {len(wrong)} weights are missing, unknown or of another shape, "
                         f"first {', '.join(map(str, wrong[:3]))}: give weights of this architecture")


def base_net(art, device="cpu"):
    """The base net of artefact `base`."""
    return with_params(new_net(art["base"]["arch"], 0), art["base"]["params"], "base.pt").to(device)


def restored_surrogates(art, net, seed):
    """{site: {option: module}} of artefact `distill`."""
    return {site: {option: with_params(blocks.new_surrogate(net, site, option, seed), params, "surrogates.pt")
                   for option, params in options.items()} for site, options in art["distill"]["params"].items()}


def chosen_net(art, device="cpu"):
    """The net of artefact `finetune`."""
    tuned = art["finetune"]
    net = new_net(tuned["arch"], 0)
    surrogates = {site: {option: blocks.new_surrogate(net, site, option, 0)}
                  for site, option in tuned["choice"].items() if option}
    net = copy.deepcopy(blocks.assemble(net, surrogates, tuned["choice"]))
    return with_params(net, tuned["params"], "finetuned.pt").to(device)


def load_tuned(path):
    """A finetuned.pt, whatever its configuration."""
    tuned = load_torch(path, "give one that --stage finetune wrote")
    if not isinstance(tuned, dict) or not {"params", "arch", "choice", "config"} <= tuned.keys():
        raise InputError(f"{path} is not an artefact of stage finetune: give one, or run --stage finetune")
    return tuned


def choice_of(sites, options):
    return dict(zip(sites, map(int, options)))


# -------------------------------------------------------------------------------- the stages

def stage_base(config, pairs, art, device):
    """Section II: the base net, trained here or read from --weights."""
    if config.weights:
        net = load_weights(config.weights).to(device)
    else:
        net = new_net(dataclasses.asdict(config), config.seed).to(device)
        batch_at = crops(pairs("train"), config.seed, config.crop, config.batch, device, config.workers)
        net = train(net, batch_at, config.base_steps, config.base_lr, "base", config.amp, art.get("part"))
    score = evaluate(net, pairs("val"), device)
    if not finite(net.state_dict()) or not math.isfinite(score["psnr_db"]):
        raise InputError(f"base: the net is not finite (validation {score['psnr_db']} dB): lower --base-lr or check --weights")
    params = {k: v.cpu() for k, v in net.state_dict().items()}
    return {"params": params, "arch": arch_of(params), "val": score}


def stage_saliency(config, pairs, art, device):
    """Section II-A, table 1: six measures on one minibatch, and the stage that stays."""
    net = base_net(art, device)
    # The Hessian product holds 2.4 GiB for each 256x256 crop at width 32: 16 of them fit one GPU, 64 do not.
    blur, sharp = crops(pairs("train"), config.seed + 1, config.crop, min(config.batch, 16), device)(0)
    scores = blocks.saliency(net, blur, sharp, psnr_loss)
    kept = blocks.critical_stages(scores)
    return {"scores": scores, "mean_ranks": blocks.mean_ranks(scores), "critical": kept,
            "sites": [site for site in blocks.site_names(net) if site.split(".")[0] not in kept]}


def stage_profile(config, pairs, art, device):
    """Section II-A, table 2: the latency of every option at every site."""
    net, sites = base_net(art), art["saliency"]["sites"]
    surrogates = {site: {k: blocks.new_surrogate(net, site, k, config.seed) for k in range(1, len(blocks.BLOCKS))}
                  for site in sites}
    measure = profile_device.latency_table
    if config.target == "local":
        say(f"profile: timing {len(blocks.BLOCKS)} options at {len(sites)} sites, inside the whole net ...")
        measure = functools.partial(profile_device.alone, measure)
    try:
        table = measure(net, surrogates, sites, config.frame, config.target, blocks.deploy, device, hub=art.get("hub"))
    except ValueError as error:
        raise InputError(str(error)) from None
    for line in profile_device.remarks(table):
        say(line)
    return table


def stage_distill(config, pairs, art, device):
    """Section II-B: every surrogate imitates its block, on its own; the ranks share them out."""
    train_pairs, sites, part = pairs("train"), art["saliency"]["sites"], art.get("part")
    share = train_pairs[:max(1, round(config.distill_share * len(train_pairs)))]
    batch_at = crops(share, config.seed + 2, config.crop, config.batch, device, config.workers)
    students = [(site, k) for k in range(1, len(blocks.BLOCKS)) for site in sites]      # so dealt, ranks have equal work
    found, keep = resumed(part), keeper(part)
    tick = progress("distill", config.distill_steps, found["step"] if found else 0)
    surrogates, losses = blocks.distill(
        base_net(art, device), sites, lambda step: tick(step + 1) or agreed(lambda: batch_at(step)),
        config.distill_steps, config.distill_lr, config.seed, students[rank()::world()] or students[:1], config.amp,
        found, lambda make: keep(lambda: joint(make)))
    mine = {(site, k): ({name: p.cpu() for name, p in student.state_dict().items()}, losses[site][k])
            for site, row in surrogates.items() for k, student in row.items()}
    everything = merged(gather(mine))
    bad = [pair for pair in students if not all_finite(*everything[pair])]
    for site, k in bad:
        say(f"distill: option {k} at {site} diverged and is left out of the search; a lower --distill-lr than "
            f"{config.distill_lr} may help")
    params, last = {site: {} for site in sites}, {site: {} for site in sites}
    for site, k in students:
        state, curve = everything[site, k]
        last[site][k] = statistics.fmean(curve[-10:]) if curve and (site, k) not in bad else None
        if (site, k) not in bad:                  # interned: a name is one object, whichever rank it came from
            params[site][k] = {sys.intern(name): p for name, p in state.items()}
    return {"params": params, "losses": last, "diverged": [list(pair) for pair in bad]}


def joint(make):
    """One state of distillation from those of all ranks."""
    states = gather(make())
    return {"step": states[0]["step"], "students": merged([state["students"] for state in states])}


def merged(dicts):
    """One dict of several."""
    return {key: value for each in dicts for key, value in each.items()}


def all_finite(state, curve):
    """Whether a student's losses and parameters are finite."""
    return all(map(math.isfinite, curve)) and finite(state)


def penalties(table, sites, diverged=()):
    """One array per site: its options' ms over the base blocks' total, so that the base has penalty 1.

    That is the order of magnitude of the loss in dB (II-C); no result depends on the factor. An option that
    the device cannot run (None in the table), or in `diverged` [[site, option], ...], has an infinite penalty.
    """
    total = sum(table["sites"][site][0] for site in sites)
    return [np.array([math.inf if ms is None or [site, k] in diverged else ms / total
                      for k, ms in enumerate(table["sites"][site])]) for site in sites]


def stage_search(config, pairs, art, device):
    """Section II-C: Bayesian search over all configurations; scored by plug-and-play passes."""
    net, sites, table, part = base_net(art, device), art["saliency"]["sites"], art["profile"], art.get("part")
    surrogates = restored_surrogates(art, net, config.seed)
    penalty = penalties(table, sites, art["distill"].get("diverged", []))
    val = [load_pair(p) for p in pairs("val")]
    base_db = evaluate(net, val, device, with_ssim=False)["psnr_db"]

    def score(options):
        candidate = blocks.assemble(net, surrogates, choice_of(sites, options)).eval()
        db = evaluate(candidate, val, device, with_ssim=False)["psnr_db"]
        return base_db - (db if math.isfinite(db) else 0.0)            # an output that is not finite: 0 dB

    found = resumed(part) or {"scored": []}
    known = {tuple(options): loss_db for options, loss_db in found["scored"]}
    history = [search.evaluated(*scored, penalty) for scored in list(known.items())[:config.evaluations]]
    losses_of = functools.partial(scored_once, score, known, watched(penalty, config.evaluations), keeper(part))
    with warnings.catch_warnings(record=True) as ended:
        found = search.search(score, penalty, config.evaluations, np.random.default_rng(config.seed), history=history,
                              batch=world(), map=lambda _, proposals: losses_of(proposals))
    for warning in ended:
        say(str(warning.message))
    Y = np.array([(e.loss_db, e.penalty) for e in found])
    front = front_of(Y)
    ranked = [front[i] for i in search.knee(Y[front], len(front))]
    knee = [i for i in ranked if any(found[i].options)][:config.candidates] or ranked[:1]     # the base is no candidate
    rows = [{"options": list(map(int, e.options)), "loss_db": e.loss_db, "penalty": e.penalty,
             "latency_ms": profile_device.network_ms(table, choice_of(sites, e.options))} for e in found]
    return {"sites": sites, "evaluations": rows, "front": front, "knee": knee, "base_val_db": base_db,
            "taken_back": [taken_back(found[i], sites, table, losses_of) for i in knee]}


def scored_once(score, known, show, keep, proposals):
    """Losses in dB of proposed configurations, in order, one per rank at a time; none is scored twice.

    known {options: loss} is added to, shown and kept as each loss arrives, on every rank alike.
    """
    new = [options for options in dict.fromkeys(proposals) if options not in known]
    for i in range(0, len(new), world()):
        chunk = new[i:i + world()]
        losses = gather(agreed(lambda: score(chunk[rank()]) if rank() < len(chunk) else None))
        known.update(zip(chunk, losses))
        show(known)
        keep(lambda: {"step": len(known), "scored": [[list(map(int, o)), loss_db] for o, loss_db in known.items()]}, now=True)
    return [known[options] for options in proposals]


def watched(penalty, total):
    """A function (known) with a line of progress: front size and hypervolume, with the search's own reference."""
    tick = None

    def show(known):
        nonlocal tick
        done = [search.evaluated(*scored, penalty) for scored in known.items()]
        if len(done) > total:                     # swaps that are taken back afterwards
            return
        tick = tick or progress("search", total, len(done) - 1)
        Y = np.array([(e.loss_db, e.penalty) for e in done])
        volume = search.hypervolume(Y, search.default_ref(done, penalty))
        tick(len(done), f"front {search.pareto_mask(Y).sum()}, hypervolume {volume:.3f}")

    return show


def front_of(Y):
    """Indices of the Pareto front of Y (n, 2), ascending in objective 2."""
    front = np.flatnonzero(search.pareto_mask(Y))
    return front[np.argsort(Y[front, 1], kind="stable")].tolist()


def taken_back(evaluation, sites, table, losses_of):
    """What each swap of a configuration costs in dB and saves in ms, measured by taking it back alone."""
    swapped = {site: option for site, option in zip(sites, evaluation.options) if option}
    losses = losses_of([tuple(0 if s == site else o for s, o in zip(sites, evaluation.options)) for site in swapped])
    cost = {site: evaluation.loss_db - loss_db for site, loss_db in zip(swapped, losses)}
    return {"cost_db": cost, "saved_ms": {site: table["sites"][site][0] - table["sites"][site][option]
                                          for site, option in swapped.items()}}


def stage_finetune(config, pairs, art, device):
    """Section II-D: candidates of the knee region, trained on all pairs; one is picked."""
    net, sites, found = base_net(art, device), art["search"]["sites"], art["search"]
    surrogates = restored_surrogates(art, net, config.seed)
    batch_at = crops(pairs("train"), config.seed + 4, config.crop, config.batch, device, config.workers)
    tuned, rows, part = [], [], art.get("part")
    for n, i in enumerate(found["knee"]):
        row, own = found["evaluations"][i], part and part._replace(path=part.path.with_suffix(f".{n + 1}.part"))
        start = blocks.assemble(net, surrogates, choice_of(sites, row["options"]))
        tuned.append(train(start, batch_at, config.finetune_steps, config.finetune_lr,
                           f"finetune {n + 1} of {len(found['knee'])}", config.amp, own))
        after = evaluate(tuned[-1], pairs("val"), device)["psnr_db"]
        if math.isnan(after):
            raise InputError(f"finetune: candidate {n + 1} diverged: lower --finetune-lr {config.finetune_lr}")
        rows.append({**row, "val_before_db": found["base_val_db"] - row["loss_db"], "val_after_db": after})
    best = max(range(len(rows)), key=lambda n: rows[n]["val_after_db"] if config.pick == "best" else -rows[n]["latency_ms"])
    return {"params": {k: v.cpu() for k, v in tuned[best].state_dict().items()}, "arch": art["base"]["arch"],
            "choice": choice_of(sites, rows[best]["options"]), "candidates": rows, "picked": best}


def stage_adapt(config, pairs, art, device):
    """Section III-C: a net found on other data is fine-tuned on --data, without a search; before and after."""
    found = load_tuned(config.from_)
    sets = {"validation": pairs("val"), "test": pairs("test"), **named_pairs(config)}
    batch_at = crops(pairs("train"), config.seed + 4, config.crop, config.batch, device, config.workers)
    before = chosen_net({"finetune": found}, device)
    after = train(before, batch_at, config.finetune_steps, config.finetune_lr, "finetune", config.amp, art.get("part"))
    gmacs = blocks.count_macs(blocks.deploy(after), (1, 3, *config.frame)) / 1e9
    params = {k: v.cpu() for k, v in after.state_dict().items()}
    nets = {"before": as_scored(before, config), "after": as_scored(after, config)}
    return {"params": params, "arch": found["arch"], "choice": found["choice"], "gmacs": gmacs,
            "scores": {name: score_nets(nets, pairs, device, name) for name, pairs in sets.items()}}


WHERE = ("device", "runtime", "precision", "threads", "statistic", "date")      # what a latency was measured on


def measure_nets(config, table, entries, choices, device, hub, count=30):
    """Latency of whole nets, {name: (deployed net, shape)} and {name: choice} -> ({name: ms or None}, sums).

    Locally `count` random configurations are timed in the same rounds, so that `sums` (`do_the_sums_hold`) says
    how well the profiled blocks predict nets in general, whatever the machine's speed is by now.
    """
    where = {key: table[key] for key in (*WHERE, "frame") if key in table}
    drift, repeat_tau = 1.0, None
    if config.target == "local":
        where.update(profile_device.machine(device))
        more = random_nets(table, *entries["base"], count, np.random.default_rng([config.seed, 5]))
        choices = {**choices, **{name: choice for name, (choice, _) in more.items()}}
        entries = {**entries, **{name: entry for name, (_, entry) in more.items()}}
        say(f"evaluate: timing {len(entries)} whole nets ...")
        measured, repeat_tau = local_net_ms(entries, device)
        drift = measured["base"] / table["base_ms"]
    else:
        measured = hub_net_ms(entries, hub) if config.target == "qai-hub" else dict.fromkeys(entries)
    return measured, {**do_the_sums_hold(table, choices, measured, where, drift), "repeat_tau": repeat_tau}


def random_nets(table, base, shape, count, rng):
    """{name: (choice, (net, shape))} of `count` random configurations on the deployed base net.

    Put together from blocks that are deployed once, untrained: no time depends on the weights.
    """
    surrogates = {site: {k: blocks.deploy(blocks.new_surrogate(base, site, k, 0))
                         for k in range(1, len(blocks.BLOCKS))} for site in table["sites"]}
    sites, nets = list(table["sites"]), {}
    for _ in range(count):
        choice = choice_of(sites, rng.integers(0, len(blocks.BLOCKS), len(sites)))
        nets[" ".join(map(str, choice.values()))] = choice, (blocks.assemble(base, surrogates, choice), shape)
    return nets


def hub_net_ms(entries, hub):
    """{name: (deployed net, shape)} -> {name: ms on a device of AI Hub, None where its job failed}."""
    found = profile_device.profile_hub({name: (net.cpu(), shape) for name, (net, shape) in entries.items()}, **(hub or {}))
    for line in profile_device.remarks({"modules": found}):
        say(line)
    return {name: result["ms"] for name, result in found.items()}


def local_net_ms(entries, device, rounds=12, most=72, enough=0.9):
    """{name: (deployed net, shape)} -> ({name: ms}, repeat tau: Kendall's, between two halves, without the base net).

    Each half is measured in a process of its own. What does not repeat itself, no prediction can tell: below
    `enough`, two processes more take another `rounds` each, up to `most` in all.
    """
    halves, repeat_tau = [{name: [] for name in entries} for _ in range(2)], -math.inf
    while repeat_tau < enough and 2 * len(halves[0]["base"]) < most:
        for half in halves:
            more = profile_device.alone(profile_device.time_together, entries, device, rounds, warmup=1, calls=1)
            half.update({name: half[name] + more[name] for name in entries})
        pair = [profile_device.settled({name: ms for name, ms in half.items() if name != "base"}) for half in halves]
        repeat_tau = float(kendalltau(*(list(ms.values()) for ms in pair)).statistic)
    return profile_device.settled({name: halves[0][name] + halves[1][name] for name in entries}), repeat_tau


def do_the_sums_hold(table, choices, measured, where, drift=1.0):
    """Predicted against measured ms of the nets that were measured, on `where`.

    drift: how much slower the machine runs than when the table was made; predictions are multiplied by it.
    {rows, drift, tau: Kendall's (None below three nets), mean_relative_error (None without a measurement), measured_on};
    the base net, on which the table's sum is right by construction, has a row but no part in tau and error.
    """
    rows = [{"net": name, "predicted_ms": drift * profile_device.network_ms(table, choice), "measured_ms": measured[name]}
            for name, choice in choices.items() if measured[name] is not None]
    pairs = [(row["predicted_ms"], row["measured_ms"]) for row in rows if row["net"] != "base"]
    return {"rows": rows, "drift": drift, "measured_on": where if rows else None,
            "tau": float(kendalltau(*zip(*pairs)).statistic) if len(pairs) > 2 else None,
            "mean_relative_error": statistics.fmean(abs(p / m - 1) for p, m in pairs) if pairs else None}


def stage_evaluate(config, pairs, art, device):
    """Section III: blurred input, base and chosen net on test pairs; sizes; whole-net latency."""
    nets, sets = {"base": base_net(art, device), "chosen": chosen_net(art, device)}, named_pairs(config)
    shape, table = (1, 3, *config.frame), art["profile"]
    deployed = {name: blocks.deploy(net) for name, net in nets.items()}
    choices = {"base": {}, "chosen": art["finetune"]["choice"]}
    entries = {name: (net, shape) for name, net in deployed.items()}
    measured, sums = measure_nets(config, table, entries, choices, device, art.get("hub"))
    nets = {name: as_scored(net, config) for name, net in nets.items()}
    own = score_nets(nets, pairs("test"), device, "test")
    rows = {name: {**own[name], "params": blocks.count_params(deployed[name]),
                   "mb": sum(p.numel() * p.element_size() for p in deployed[name].parameters()) / 1e6,
                   "gmacs": blocks.count_macs(deployed[name], shape) / 1e9, "latency_ms": measured[name],
                   "predicted_ms": profile_device.network_ms(table, choices[name])} for name in nets}
    tests = {name: score_nets(nets, test, device, name) for name, test in sets.items()}
    return {"test_pairs": own["pairs"], "blurred": own["blurred"], **rows, "tests": tests, "sums": sums,
            "protocol": protocol(config)}


# -------------------------------------------------------------------------------- the report

def gain_table(metrics):
    """The answer to 'what did I gain', as a Markdown table."""
    head = ["", "params", "MB", "GMACs", "measured ms", "predicted ms", "PSNR dB", "SSIM"]
    rows = [["blurred input", "", "", "", "", "", f"{metrics['blurred']['psnr_db']:.2f}", f"{metrics['blurred']['ssim']:.4f}"]]
    for name in ("base", "chosen"):
        m = metrics[name]
        rows.append([name, f"{m['params']:,}", f"{m['mb']:.2f}", f"{m['gmacs']:.2f}",
                     measured_ms(m), f"{m['predicted_ms']:.1f}", f"{m['psnr_db']:.2f}", f"{m['ssim']:.4f}"])
    return markdown(head, rows)


def measured_ms(m):
    """Latency of one net of `stage_evaluate`, if it was measured."""
    return "not measured" if m["latency_ms"] is None else f"{m['latency_ms']:.1f}"


def markdown(head, rows):
    """Rows of strings as an aligned Markdown table."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    lines = ["| " + " | ".join(str(cell).ljust(w) for cell, w in zip(row, widths)) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


# Table 1 as printed; fisher in 1e-6, plain in 1e-3, enc2's plain printed "2.24e".
PAPER_TABLE_1 = {
    "columns": ("grad_norm", "snip", "grasp", "fisher (1e-6)", "plain (1e-3)", "synflow"),
    "enc0": (.0118, .04, .0005, 1.96, -6.95, 2.0e18), "enc1": (.0050, .03, -.0001, 2.58, -3.72, 2.3e16),
    "enc2": (.0037, .05, .0006, 5.19, 2.24, 1.6e15), "enc3": (.0644, 1.6, -.0017, 6.23, 21.8, 2.2e17),
    "mid": (.0008, .04, .0002, .99, .52, 2.6e12), "dec3": (.0040, .09, -.0008, 2.88, 9.48, 1.1e12),
    "dec2": (.0086, .11, -.0019, 4.58, 7.52, 8.3e9), "dec1": (.0193, .12, .0010, 3.09, -17.01, 4.3e7),
    "dec0": (.0195, .07, -.0002, 2.13, 8.37, 1.2e12)}


# Tables 4 and 5 as printed: PSNR in dB / SSIM, and GMACs (65 is NAFNet at 512x512).
PAPER_TABLE_4 = {
    "columns": ("GoPro", "RealBlur-J", "RealBlur-R", "HIDE"),
    "SRN": "30.26/.934 28.56/.867 35.66/.947 28.36/.915",
    "DPDNet": "29.08/.914 27.87/.827 32.51/.841 25.73/.874",
    "DMPHN": "31.20/.940 28.42/.860 35.70/.948 29.09/.924",
    "DBGAN": "31.10/.942 24.93/.745 33.78/.909 28.94/.915",
    "MPRNet": "32.66/.959 28.70/.873 35.99/.952 30.96/.939",
    "MT-RNN": "31.15/.945 28.44/.862 35.79/.951 29.15/.918",
    "Restormer": "32.92/.961 28.96/.879 36.19/.957 31.22/.942",
    "NAFNet": "35.80/.980 26.48/.823 33.78/.943 30.45/.913",
    "Ours": "33.76/.942 26.51/.824 33.82/.943 30.36/.912"}
PAPER_TABLE_5 = {
    "columns": ("DPDD-indoor", "DPDD-outdoor", "GMACs"),
    "DPDNet": "26.54/.816 22.25/.682 991", "KPAC": "27.97/.852 22.62/.701 -", "IFAN": "28.11/.861 22.76/.720 363",
    "DMENet": "25.50/.788 21.43/.644 1173", "EBDB": "25.77/.772 21.25/.599 -", "JNB": "26.73/.828 21.10/.608 -",
    "Restormer": "28.87/.882 23.24/.743 141", "KBNet": "28.89/.883 23.32/.749 108",
    "NAFNet": "24.44/.766 18.83/.574 65", "Ours": "19.93/.686 18.89/.567 63",
    "Ours (fine-tuned)": "26.87/.818 21.89/.656 63"}


def test_tables(tests, gmacs, frame):
    """Tables 4 and 5: the paper's rows and ours for each --test set -> Markdown parts, none without sets.

    tests {NAME: score_nets}; gmacs {net: GMACs at frame}. Table 5 is for the names of its columns, Table 4
    for all others.
    """
    defocus = [name for name in tests if name in PAPER_TABLE_5["columns"]]
    motion = [name for name in tests if name not in defocus]
    parts = []
    for title, paper, names in (("4", PAPER_TABLE_4, motion), ("5 (defocus)", PAPER_TABLE_5, defocus)):
        if names:
            columns = [*paper["columns"], *(name for name in names if name not in paper["columns"])]
            rows = [[f"{method}, published", *row.split(), *[""] * (len(columns) - len(row.split()))]
                    for method, row in paper.items() if method != "columns"]
            rows += [[f"{net}, here", *(test_cell(column, net, tests, gmacs) for column in columns)]
                     for net in tests[names[0]] if net != "pairs"]
            sizes = ", ".join(f"{name} {tests[name]['pairs']} pairs" for name in names)
            macs = f"; GMACs at {'x'.join(map(str, frame))}" if "GMACs" in columns else ""
            parts += [f"## Table {title}: PSNR dB/SSIM on further test sets", markdown(["", *columns], rows),
                      f"Rows marked published are the paper's own figures. Here: {sizes}{macs}."]
    return parts


def test_cell(column, net, tests, gmacs):
    """Our figure for one net in one column of Table 4 or 5; empty if there is none."""
    if column == "GMACs":
        return f"{gmacs[net]:.1f}" if net in gmacs else ""
    return score_cell(tests[column][net]) if column in tests else ""


def score_cell(score):
    return f"{score['psnr_db']:.2f}/{score['ssim']:.3f}".replace("/0.", "/.")


def adapted_text(config, tuned):
    """report.md of a net that was adapted: every set before and after."""
    rows = [[name, score["pairs"], *(score_cell(score[net]) for net in ("blurred", "before", "after"))]
            for name, score in tuned["scores"].items()]
    gmacs = {net: tuned["gmacs"] for net in ("before", "after")}
    tests = {name: score for name, score in tuned["scores"].items() if name in test_sets(config)}
    parts = [f"# {config.from_} adapted to {config.data or 'made pairs'}",
             markdown(["PSNR dB/SSIM", "pairs", "blurred input", "before", "after"], rows),
             f"{config.finetune_steps} steps of fine-tuning from {config.finetune_lr}, no new search. "
             + protocol(config),
             *test_tables(tests, gmacs, config.frame)]
    return "\n\n".join(parts) + "\n"


def site_section(art, names):
    """The chosen net site by site, in words and as a table -> Markdown parts.

    Changes by a swap: the candidate as it was scored, before fine-tuning, against it with this one swap taken back.
    """
    scores, table, tuned = art["saliency"]["scores"], art["profile"]["sites"], art["finetune"]
    back, choice, lines, rows = art["search"]["taken_back"][tuned["picked"]], tuned["choice"], [], []
    for site, option in choice.items():
        rank = statistics.fmean(1 + sum(abs(row[s]) > abs(row[site]) for s in choice) for row in scores.values())
        saved, cost = (back[key].get(site, 0.0) for key in ("saved_ms", "cost_db"))
        lines.append(f"- {site}: {names[option]} in place of {names[0]}, {-saved:+z.2f} ms, {-cost:+z.2f} dB" if option
                     else f"- {site}: {names[0]} stays")
        rows.append([site, f"{rank:.2f}", f"{table[site][0]:.2f}", f"{option} {names[option]}", f"{table[site][option]:.2f}"]
                    + ([f"{-saved:+z.2f}", f"{-cost:+z.2f}"] if option else ["", ""]))
    return ["## The chosen net, site by site", "\n".join(lines),
            markdown(["site", "saliency rank", "base ms", "choice", "its ms", "net, ms", "net, dB"], rows),
            "What each swap alone changes in predicted latency of the net and in PSNR on validation, before fine-tuning: "
            "measured by taking it back. Saliency rank: among the sites, mean over the six measures; 1 is the most salient."]


def gain_words(metrics):
    """Speed and quality of the chosen net in one line."""
    base, chosen = metrics["base"], metrics["chosen"]
    key, how = "latency_ms", "measured, interleaved"
    if None in (base["latency_ms"], chosen["latency_ms"]):
        key, how = "predicted_ms", "predicted from the latency table, not measured"
    elif metrics["config"]["target"] != "local":
        how = f"measured on {metrics['sums']['measured_on']['device']}"
    return (f"The chosen net runs {base[key] / chosen[key]:.2f}x as fast as the base ({how}) "
            f"at {chosen['psnr_db'] - base['psnr_db']:+.2f} dB; the base has "
            f"{base['psnr_db'] - metrics['blurred']['psnr_db']:+.2f} dB over the blurred input.")


def left_out(diverged):
    """A paragraph on options that no configuration could take, if there are any."""
    options = ", ".join(f"{k} at {site}" for site, k in diverged)
    return [f"Left out of the search, as their surrogates diverged: option {options}."] if diverged else []


def report_text(config, art):
    """report.md: the run as a results section, its tables beside the paper's rows."""
    metrics, names = art["evaluate"], [block.__name__ for block in blocks.BLOCKS]
    parts = [
        "# What did I gain", gain_words(metrics), gain_table(metrics),
        f"{metrics['test_pairs']} test pairs ({config.data or 'made'}); frame {config.frame[0]}x{config.frame[1]}. "
        f"{metrics['protocol']} Test images took no part in training, search or selection.",
        "![samples](samples.png)",
        *saliency_section(art["saliency"]), *latency_section(art["profile"], names), *front_section(config, art),
        *nets_section(config, art),
        *test_tables(metrics["tests"], {n: metrics[n]["gmacs"] for n in ("base", "chosen")}, config.frame),
        *site_section(art, names), "## Do the sums hold?", *sums_text(metrics), *made_section(config, art)]
    return "\n\n".join(parts) + "\n"


def saliency_section(saliency):
    """Table 1: this run's saliency per stage, then the published one."""
    ranks, kept, scores = saliency["mean_ranks"], saliency["critical"], saliency["scores"]
    first, second = sorted(ranks, key=ranks.get)[:2]
    columns, *paper = PAPER_TABLE_1.items()
    published = {measure: {stage: row[i] for stage, row in paper} for i, measure in enumerate(columns[1])}
    return ["## Table 1: saliency per stage",
            f"{first} has the best mean rank over the six measures, {ranks[first]:.2f}; next is {second}, {ranks[second]:.2f}. "
            f"So {' '.join(kept)} stays as it is, and the other {len(saliency['sites'])} blocks are the sites of the search. "
            "In the paper: enc3, 1.33; next is dec1, 3.83.",
            stage_table("stage", scores, kept), stage_table("published", published, blocks.critical_stages(published))]


def stage_table(title, scores, critical):
    """Scores {measure: {site or stage: value}} summed over each stage's blocks, with the mean ranks -> Markdown."""
    totals, ranks = blocks.stage_totals(scores).values(), blocks.mean_ranks(scores)
    rows = [[stage + (" (critical)" if stage in critical else ""), *(f"{total[stage]:.4g}" for total in totals),
             f"{ranks[stage]:.2f}"] for stage in next(iter(totals))]       # in forward order, which ranks is not
    return markdown([title, *scores, "mean rank"], rows)


def latency_section(table, names):
    """Table 2: milliseconds of every option at every site, then the published row."""
    sites, published = table["sites"], [f"{ms:.0f}" for ms in profile_device.PAPER_BLOCK_MS]
    fastest = [min((k for k, ms in enumerate(row) if ms is not None), key=row.__getitem__) for row in sites.values()]
    best = statistics.mode(fastest)
    rows = [[site, *("unavailable" if ms is None else f"{ms:.2f}" for ms in row)] for site, row in sites.items()]
    return ["## Table 2: latency of each option, ms",
            f"{names[best]} is the fastest option at {fastest.count(best)} of {len(sites)} sites. {measured_on(table)}",
            markdown(["site", *(f"{i} {n}" for i, n in enumerate(names))],
                     [*rows, ["published, every site", *published, *[""] * len(names)][:len(names) + 1]])]


def front_section(config, art):
    """How the front came about, and why these candidates."""
    found, table, diverged = art["search"], art["profile"], art["distill"]["diverged"]
    penalty, rows = penalties(table, found["sites"], diverged), found["evaluations"]
    scored = [search.evaluated(row["options"], row["loss_db"], penalty) for row in rows]
    Y, ref = np.array([e[1:] for e in scored]), search.default_ref(scored, penalty)
    below = dict(zip(found["front"], search.below_chord(Y[found["front"]])))
    space, volume = math.prod(map(len, search.available(penalty))), search.hypervolume(Y, ref)
    return ["## The front",
            f"{len(rows)} of {space:,} configurations were scored; {len(found['front'])} are on the front. Hypervolume "
            f"{volume:.3f}; its reference point: {ref[0]:.2f} dB, and {ref[1]:.2f} times the latency of the base net's blocks.",
            *left_out(diverged), "![front](pareto.png)",
            "The candidates are, of the front without the base, the configurations furthest below the chord between its ends, "
            f"both axes scaled to 1; distances of candidate 1 and on: {', '.join(f'{below[i]:.2f}' for i in found['knee'])}. "
            f"Picked after fine-tuning: the {config.pick}." if any(rows[found["knee"][0]]["options"]) else
            "The base is alone on the front, so it is the one candidate: no configuration that was scored gains speed."]


def nets_section(config, art):
    """Table 3: base and every candidate before and after fine-tuning; figures on test for base and chosen; published rows."""
    metrics, tuned, found = art["evaluate"], art["finetune"], art["search"]
    rows = [["base", " ".join("0" for _ in found["sites"]), *test_cells(metrics["base"]),
             f"{metrics['base']['predicted_ms']:.1f}", f"{found['base_val_db']:.2f}", ""]]
    for n, candidate in enumerate(tuned["candidates"]):
        chosen = n == tuned["picked"]
        rows.append([f"candidate {n + 1}" + (" (chosen)" if chosen else ""), " ".join(map(str, candidate["options"])),
                     *(test_cells(metrics["chosen"]) if chosen else [""] * 5), f"{candidate['latency_ms']:.1f}",
                     f"{candidate['val_before_db']:.2f}", f"{candidate['val_after_db']:.2f}"])
    published = [["NAFNet, published (GoPro, S24 Ultra)", "", "17.112", "107", "177", "35.80", "0.980", "", "", ""],
                 ["Ours, published (GoPro, S24 Ultra)", "", "17.110", "106", "147", "33.76", "0.942", "", "", ""]]
    gains = [row["val_after_db"] - row["val_before_db"] for row in tuned["candidates"]]
    rest = ("Predicted are the blocks at the sites alone: there is no figure for the rest of the net."
            if art["profile"]["rest_ms"] == 0 else
            f"Predicted are the blocks at the sites plus {art['profile']['rest_ms']:.1f} ms for the rest of the net.")
    return ["## Table 3: base, candidates and chosen net",
            f"{config.finetune_steps} steps of fine-tuning change the candidates by {min(gains):+.2f} to {max(gains):+.2f} dB on "
            "validation.",
            markdown(["", "options", "params, M", "MB", "ms", "PSNR dB", "SSIM", "predicted ms", "validation dB", "fine-tuned"],
                     [*rows, *published]),
            f"Options in the order of the sites: {', '.join(found['sites'])}. PSNR and SSIM on test. {rest}"]


def test_cells(m):
    """Parameters, MB, measured ms, PSNR and SSIM of one net of `stage_evaluate`."""
    return [f"{m['params'] / 1e6:.3f}", f"{m['mb']:.2f}", measured_ms(m), f"{m['psnr_db']:.2f}", f"{m['ssim']:.4f}"]


def made_section(config, art):
    """Base net, seed, and the versions in the artefacts; wall time of the stages as `note_seconds` wrote it, and the machine."""
    made = {}
    for name in STAGES.keys() & art.keys():
        made.setdefault(", ".join(f"{k} {v}" for k, v in art[name]["versions"].items()), set()).add(name)
    versions = [text if len(made) == 1 else f"{', '.join(n for n in STAGES if n in names)}: {text}"
                for text, names in sorted(made.items())]
    base = f"are those of {config.weights}" if config.weights else f"were trained in {config.base_steps} steps"
    parts = ["## How this was made", f"The base net's weights {base}. Seed {config.seed}; {'; '.join(versions)}."]
    if config.target == "paper":
        return [*parts, "Wall times are left out: nothing that is measured enters a run with --target paper."]
    rows = [[name, f"{note['seconds']:.1f}", note["device"], note.get("threads", ""), note["ranks"], note["date"]]
            for name, note in art.get("seconds", {}).items() if name != "report"]
    return [*parts, "Wall time of each stage before this report; one that was cut off and went on counts its last process alone.",
            markdown(["stage", "seconds", "device", "threads", "ranks", "date"], rows)]


def measured_on(table):
    """What a latency table was measured on, and what the device had trouble with, as Markdown."""
    where = ", ".join([f"{k} {table[k]}" for k in WHERE if k in table] + ["frame {}x{}".format(*table["frame"])])
    return "\n".join([f"Latency from: {where}.", *(f"- {line}." for line in profile_device.remarks(table))])


def sums_text(metrics):
    """Predicted (the sum of the profiled blocks) against measured latency of whole nets, as paragraphs."""
    sums = metrics["sums"]
    if not sums["rows"]:
        return ["No whole net was measured: the published table knows blocks only."]
    tau = "" if sums["tau"] is None else f"Kendall's tau {sums['tau']:.2f}, "
    drift = "" if sums["drift"] == 1 else (f" The base net took {sums['drift']:.2f} times what it took when its blocks were "
                                           "profiled, in this machine's drift; predictions here are scaled by that.")
    error = sums["mean_relative_error"]
    error = "the base net alone was measured" if error is None else f"mean relative error {error:.1%}"
    repeat = "" if sums.get("repeat_tau") is None else (
        f" Two halves of the measurement itself agree to a tau of {sums['repeat_tau']:.2f}.")
    return [f"{len(sums['rows'])} nets, of which the base is right by construction and does not count: {tau}{error}."
            f"{repeat}{drift}",
            measured_on(sums["measured_on"]),
            markdown(["net", "predicted ms" + (" x drift" if sums["drift"] != 1 else ""), "measured ms", "error"],
                     [[row["net"], f"{row['predicted_ms']:.1f}", f"{row['measured_ms']:.1f}",
                       f"{row['predicted_ms'] / row['measured_ms'] - 1:+.1%}"] for row in sums["rows"]])]


# Okabe & Ito's colours, apart for every kind of colour vision; shapes, dashes and lightness differ as well, for print.
INK, GREY, SKY, BLUE, ORANGE = "#222222", "#b0b0b0", "#56b4e9", "#0072b2", "#d55e00"
ZOOM = 4                                          # pictures are drawn four times as large as laid out, then halved


class Plot(NamedTuple):
    """A plot area: its pixel box (left, top, right, bottom) and the ranges of x and y that it shows."""
    box: tuple
    x: tuple
    y: tuple

    def at(self, row):
        """Pixels of a configuration's (latency_ms, loss_db); y grows upwards."""
        left, top, right, bottom = self.box
        x, y = ((value - low) / (high - low) for value, (low, high) in
                ((row["latency_ms"], self.x), (row["loss_db"], self.y)))
        return left + x * (right - left), bottom - y * (bottom - top)


def marker(draw, kind, x, y, size, colour):
    """A dot, ring, square (hollow) or diamond of radius `size`, hollow in white, or a line in dashes of `size`."""
    if kind == "line":
        dashes(draw, [(x - 22 * ZOOM, y), (x + 22 * ZOOM, y)], size, colour)
    elif kind in ("diamond", "hollow"):
        fill, outline = (colour, "white") if kind == "diamond" else ("white", colour)
        draw.regular_polygon((x, y, size), 4, 45, fill=fill, outline=outline, width=2 * ZOOM)
    elif kind == "square":
        draw.rectangle((x - size, y - size, x + size, y + size), "white", colour, 2 * ZOOM)
    else:
        draw.circle((x, y), size, None if kind == "ring" else colour, colour, 2 * ZOOM)


def dashes(draw, points, dash, colour):
    """A line through points, each right of, above or below the one before; dash: lengths on and off, width."""
    on, off, width = (ZOOM * value for value in dash)
    xy = np.array(points)
    length = np.concatenate([[0], np.abs(np.diff(xy, axis=0)).sum(1).cumsum()])          # up to each point
    for start in np.arange(0, length[-1], on + off):
        end = min(start + on, length[-1])
        stops = [start, *length[(length > start) & (length < end)], end]
        draw.line([tuple(np.interp(stop, length, column) for column in xy.T) for stop in stops], colour, int(width), "curve")


def ticks(low, high, most=6):
    """Round numbers in [low, high], at most about `most`."""
    raw = (high - low) / most
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def draw_axes(draw, plot, x_label, y_label):
    """Grid, numbers, frame and labels."""
    left, top, right, bottom = plot.box
    font, small = ImageFont.load_default(18 * ZOOM), ImageFont.load_default(15 * ZOOM)
    for value in ticks(*plot.x):
        x = plot.at({"latency_ms": value, "loss_db": 0})[0]
        draw.line((x, top, x, bottom), fill="#eeeeee", width=ZOOM)
        draw.text((x, bottom + 8 * ZOOM), f"{value:.7g}", INK, small, anchor="ma")
    for value in ticks(*plot.y):
        y = plot.at({"latency_ms": 0, "loss_db": value})[1]
        draw.line((left, y, right, y), fill="#eeeeee", width=ZOOM)
        draw.text((left - 8 * ZOOM, y), f"{value:.7g}", INK, small, anchor="rm")
    draw.rectangle(plot.box, outline=INK, width=ZOOM)
    draw.text(((left + right) / 2, bottom + 44 * ZOOM), x_label, INK, font, anchor="mm")
    draw.text((left, top - 22 * ZOOM), y_label, INK, font, anchor="lm")


def staircase(plot, members):
    """Corner points of what a front (ascending in latency) dominates, from the top of the plot to its right side."""
    corners, previous = [], plot.y[1]
    for row in members:
        corners += [{**row, "loss_db": previous}, row]
        previous = row["loss_db"]
    corners.append({"latency_ms": plot.x[1], "loss_db": previous})
    return [plot.at(corner) for corner in corners]


def plot_of(rows, losses):
    """The Plot of all latencies of rows and the losses_db that must be seen, by whatever they are apart."""
    xs = [row["latency_ms"] for row in rows]
    low, high = min(0.0, *losses), max(1.5 * max(losses), 0.1)
    x_margin, y_margin = 0.06 * max(np.ptp(xs), 0.1 * max(xs)), 0.08 * (high - low)
    return Plot((80 * ZOOM, 45 * ZOOM, 868 * ZOOM, 500 * ZOOM), (min(xs) - x_margin, max(xs) + x_margin),
                (low - y_margin, high))


def pareto_picture(found, tuned):
    """The search as a PIL image: PSNR loss over predicted latency; how its front grew, base, candidates, chosen."""
    rows, picked = found["evaluations"], tuned["candidates"][tuned["picked"]]
    after = {**picked, "loss_db": found["base_val_db"] - picked["val_after_db"]}
    Y = np.array([(row["loss_db"], row["penalty"]) for row in rows])
    design = min(len(rows), search.INITIAL + 2)
    counts = sorted({design, (design + len(rows)) // 2, len(rows)})
    fronts = [[rows[i] for i in front_of(Y[:n])] for n in counts]
    plot = plot_of(rows, [row["loss_db"] for row in (*fronts[-1], after)])
    below = [row for row in rows if row["loss_db"] <= plot.y[1]]
    image = Image.new("RGB", (900 * ZOOM, 650 * ZOOM), "white")
    draw, r = ImageDraw.Draw(image), 4 * ZOOM
    draw_axes(draw, plot, "predicted latency of the whole net, ms", "PSNR loss on validation, dB, "
              f"against the base net's {found['base_val_db']:.2f} dB (lower left is better)")
    styles = list(zip(((2, 4, 2), (9, 5, 2.5), (1e6, 0, 2.5)), (SKY, BLUE, INK)))[-len(counts):]
    groups = [("dot", GREY, 0.8 * r, f"scored ({len(rows) - len(below)} of {len(rows)} are above)", below),
              *(("line", colour, dash, f"front after {n} scored", front)
                for (dash, colour), n, front in zip(styles, counts, fronts)),
              ("dot", INK, r, "final front", fronts[-1]), ("ring", INK, 3.4 * r, "knee candidates", tuned["candidates"]),
              ("square", INK, 1.6 * r, "base net", rows[:1]),
              ("diamond", ORANGE, 2.4 * r, "chosen, before fine-tuning", [picked]),
              ("hollow", ORANGE, 2.4 * r, "chosen, after fine-tuning", [after])]
    for kind, colour, size, _, members in groups:
        if kind == "line":
            dashes(draw, staircase(plot, [row for row in members if row["loss_db"] <= plot.y[1]]), size, colour)
        for row in members if kind != "line" else ():
            marker(draw, kind, *plot.at(row), size, colour)
    draw_legend(draw, plot, groups)
    draw_label(image, plot, picked, f"chosen\n{picked['latency_ms']:.1f} ms, {picked['loss_db']:.2f} dB\n"
               f"fine-tuned: {after['loss_db']:.2f} dB")
    draw_label(image, plot, rows[0], f"base\n{rows[0]['latency_ms']:.1f} ms, {rows[0]['loss_db']:.2f} dB")
    return image.reduce(2)


def draw_legend(draw, plot, groups):
    """(kind, colour, size, label, members) groups below the axis, in three columns."""
    (left, _, right, bottom), font = plot.box, ImageFont.load_default(15 * ZOOM)
    for i, (kind, colour, size, label, _) in enumerate(groups):
        x, y = left + (22 * ZOOM + i // 3 * (right - left) / 3), bottom + (84 + i % 3 * 26) * ZOOM
        marker(draw, kind, x, y, size, colour)
        draw.text((x + 30 * ZOOM, y), label, INK, font, anchor="lm")


def draw_label(image, plot, row, text):
    """Text beside a configuration, inside the plot, where it covers the least of what is drawn."""
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15 * ZOOM)
    (x, y), (left, top, right, bottom) = plot.at(row), plot.box
    pad = 6 * ZOOM
    width, height = (side + 2 * pad for side in draw.textbbox((0, 0), text, font)[2:])
    boxes = []
    for gap in (8 * ZOOM, 18 * ZOOM, 34 * ZOOM, 58 * ZOOM):
        for i, j in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)):
            x0 = np.clip(x + i * (width / 2 + gap) - width / 2, left + ZOOM, right - ZOOM - width)
            y0 = np.clip(y + j * (height / 2 + gap) - height / 2, top + ZOOM, bottom - ZOOM - height)
            boxes.append((int(x0), int(y0), int(x0 + width), int(y0 + height)))
    best = min(boxes, key=lambda box: (np.asarray(image.crop(box).convert("L")) < 200).sum())
    draw.text((best[0] + pad, best[1] + pad), text, INK, font, stroke_width=2 * ZOOM, stroke_fill="white")


def samples_picture(pairs, base, chosen, device, count=4, side=224):
    """A row per test pair: the blurred picture, and blurred, base, chosen and sharp crops of it, `side` pixels large."""
    titles = ("whole picture, blurred", "blurred", "base net", "chosen net", "sharp")
    picks = [load_pair(pairs[i]) for i in np.linspace(0, len(pairs) - 1, min(count, len(pairs))).round().astype(int)]
    gap, row_side = 12, side + 38
    canvas = Image.new("RGB", (gap + 5 * (side + gap), 38 + len(picks) * row_side), "white")
    draw, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(18), ImageFont.load_default(15)
    for column, title in enumerate(titles):
        draw.text((gap + column * (side + gap) + side / 2, 20), title, INK, font, anchor="mm")
    for line, (sharp, blur) in enumerate(picks):
        target = as_batch([sharp], device)
        images = [as_batch([blur], device), restore(base, blur, device), restore(chosen, blur, device), target]
        window = worst_window(torch.cat(images).var(0).mean(0), min(128, (min(sharp.shape[-2:]) + 1) // 2))
        parts = [image[..., window[0]:window[0] + window[2], window[1]:window[1] + window[2]] for image in images]
        cells = [framed(images[0], window, side), *(enlarged(crop, side) for crop in parts)]
        labels = ["PSNR, dB: whole (crop)", *(f"{psnr(image, target):.2f} ({psnr(crop, parts[3]):.2f})"
                                               for image, crop in zip(images[:3], parts)), "reference"]
        for column, (cell, label) in enumerate(zip(cells, labels)):
            x, y = gap + column * (side + gap), 38 + line * row_side
            canvas.paste(cell, (x + (side - cell.width) // 2, y + (side - cell.height) // 2))
            draw.text((x + side / 2, y + side + 17), label, INK, small, anchor="mm")
    return canvas


def enlarged(image, side):
    """(1, 3, H, W) in [0, 1] -> a PIL image whose longer side has `side` pixels."""
    pixels = image[0].permute(1, 2, 0).mul(255).round().byte().cpu().numpy()
    return ImageOps.contain(Image.fromarray(pixels), (side, side), Image.BICUBIC)


def framed(image, window, side):
    """`enlarged`, with a frame around window (top, left, size)."""
    picture = enlarged(image, side)
    scale = side / max(image.shape[-2:])
    top, left, size = (round(scale * value) for value in window)
    size = max(size, 4)                           # of a very long picture
    draw = ImageDraw.Draw(picture)
    for out, colour in ((2, "white"), (0, INK)):
        draw.rectangle((left - out, top - out, left + size - 1 + out, top + size - 1 + out), outline=colour, width=2)
    return picture


def worst_window(error, crop):
    """(top, left, side) of the window of (H, W) with the largest error, its middle counting most."""
    size = min(crop, *error.shape)
    half = (size + 1) // 2                        # two means in a row weigh like a pyramid
    mean = F.avg_pool2d(F.avg_pool2d(error[None, None], half, stride=1), size + 1 - half, stride=1)[0, 0]
    top, left = divmod(int(mean.argmax()), mean.shape[1])
    return top, left, size


def stage_report(config, pairs, art, device):
    """Section III: report.md with all tables, pareto.png, samples.png.

    Returns {file name: bytes}.
    """
    nets = [as_scored(net, config) for net in (base_net(art, device), chosen_net(art, device))]
    samples = samples_picture(pairs("test"), *nets, device)
    return {"pareto.png": png(pareto_picture(art["search"], art["finetune"])), "samples.png": png(samples),
            "report.md": report_text(config, art).encode()}


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG", dpi=(300, 300))
    return stream.getvalue()


# -------------------------------------------------------------------------- one photograph

def deblur(net, image, device="cpu", tile=512, overlap=64):
    """uint8 (3, H, W) of any size -> the same, restored; large images in overlapping tiles.

    Tiles fade into one another over `overlap` pixels, so that nothing shows where they meet.
    """
    height, width = image.shape[-2:]
    if height <= tile and width <= tile:
        return (restore(net, image, device)[0] * 255).round().byte().cpu()
    total, weight = torch.zeros(3, height, width), torch.zeros(height, width)
    rows, cols = (tile_starts(side, tile, overlap) for side in (height, width))
    fade = torch.minimum(torch.arange(1, tile + 1), torch.arange(tile, 0, -1)).clamp(max=overlap) / overlap
    tick = progress("deblur", len(rows) * len(cols))
    for i, top in enumerate(rows):
        for j, left in enumerate(cols):
            window = image[:, top:top + tile, left:left + tile]
            share = fade[:window.shape[1], None] * fade[None, :window.shape[2]]
            with torch.inference_mode():
                total[:, top:top + tile, left:left + tile] += net(as_batch([window], device))[0].cpu() * share
            weight[top:top + tile, left:left + tile] += share
            tick(i * len(cols) + j + 1)
    return (quantize(total / weight) * 255).round().byte()


def tile_starts(side, tile, overlap):
    """Where tiles begin along one axis; the last ends at the border."""
    if side <= tile:
        return [0]
    return [*range(0, side - tile, tile - overlap), side - tile]


def deblur_file(net, source, target, device):
    """Read a photograph, restore it, write it whole or not at all; PNG keeps an alpha channel."""
    suffix = Path(target).suffix.lower()
    if suffix not in IMAGES:
        raise InputError(f"--output {target}: unknown kind of image; end it in .png or .jpg")
    writable(Path(target).parent)
    rgb = load_image(source)
    with open_photo(source) as photo:
        profile = photo.info.get("icc_profile") if photo.mode in ("RGB", "RGBA") else None
        alpha = ImageOps.exif_transpose(photo).convert("RGBA").getchannel("A") if photo.has_transparency_data else None
    image = Image.fromarray(deblur(net, rgb, device).permute(1, 2, 0).numpy())
    if alpha is not None and suffix == ".png":
        image.putalpha(alpha)
    stream = io.BytesIO()
    image.save(stream, Image.registered_extensions()[suffix], quality=95, icc_profile=profile)
    write_file(Path(target), stream.getvalue())


# -------------------------------------------------------------------------------- artefacts

class Stage(NamedTuple):
    """One stage: its function, artefact, the stages whose artefacts it reads, the flags it depends on."""
    function: object
    artefact: str
    needs: tuple
    knobs: tuple


DATA = ("seed", "data", "few", "made_train", "made_test", "made_size", "val_pairs")
STAGES = {
    "base": Stage(stage_base, "base.pt", (), DATA + ("weights", "width", "enc", "middle", "dec", "crop", "batch",
                                                     "base_steps", "base_lr", "amp")),
    "saliency": Stage(stage_saliency, "saliency.json", ("base",), ()),
    "profile": Stage(stage_profile, "profile.json", ("base", "saliency"),
                     ("frame", "target", "hub_device", "hub_runtime")),
    "distill": Stage(stage_distill, "surrogates.pt", ("base", "saliency"),
                     ("distill_share", "distill_steps", "distill_lr", "amp")),
    "search": Stage(stage_search, "search.json", ("base", "saliency", "profile", "distill"), ("evaluations", "candidates")),
    "finetune": Stage(stage_finetune, "finetuned.pt", ("base", "distill", "search"),
                      ("from_", "finetune_steps", "finetune_lr", "pick", "amp")),
    "evaluate": Stage(stage_evaluate, "metrics.json", ("base", "profile", "finetune"), ("test", "tlc")),
    "report": Stage(stage_report, "report.md",
                    ("base", "saliency", "profile", "distill", "search", "finetune", "evaluate"), ()),
}
SHARED = ("base", "distill", "search", "finetune")      # the stages that all ranks work on; rank 0 does the others
ADAPT = Stage(stage_adapt, "finetuned.pt", (), DATA + ("from_", "test", "tlc", "crop", "batch", "frame",
                                                       "finetune_steps", "finetune_lr", "amp"))


def stage_of(config, name):
    """The stage of that name; finetune has another form with --from."""
    return ADAPT if config.from_ and name == "finetune" else STAGES[name]


def relevant(config, name):
    """{flag name: value} of everything that the artefact of stage `name` depends on."""
    stage = stage_of(config, name)
    knobs = set(stage.knobs).union(*(relevant(config, need) for need in stage.needs))
    if config.target != "qai-hub":
        knobs -= {"hub_device", "hub_runtime"}
    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)
            if field.name in knobs}


def plain(value):
    return list(value) if isinstance(value, tuple) else value


def described(config, name, payload):
    """An artefact: what it holds, and the configuration and versions that made it."""
    return {"stage": name, "config": relevant(config, name), "seed": config.seed, "versions": {
        "torch": str(torch.__version__), "numpy": np.__version__, "python": platform.python_version()}, **payload}


def save_artefact(path, content):
    """Write one artefact, JSON or torch by its extension, whole or not at all."""
    if path.suffix == ".json":
        return write_file(path, (json.dumps(content, indent=1) + "\n").encode())
    stream = io.BytesIO()
    torch.save(content, stream)
    write_file(path, stream.getvalue())


def write_file(path, content):
    """Bytes to a temporary name, then renamed: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_torch(path, remedy):
    """Tensors and plain values from a file, never code; InputError if it is not such a file or is damaged."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():             # torch itself looks at no checksum
                    raise ValueError("checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no file {path}: {remedy}") from None
    except Exception as error:                    # torch raises many kinds on bytes that are not its own
        raise InputError(f"{path} is damaged or no checkpoint of tensors ({type(error).__name__}): {remedy}") from None


def load_json(path, remedy):
    """What a JSON file holds; InputError if it is none."""
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise InputError(f"{path} is damaged or no JSON: {remedy}") from None


def checksum(content):
    """Of a JSON artefact: what is in it besides its own "crc32"."""
    return zlib.crc32(json.dumps({k: v for k, v in content.items() if k != "crc32"}).encode())


def load_artefact(path, name, config):
    """The artefact of stage `name`, checked to be ours and of this configuration."""
    remedy = f"delete it and run --stage {name}"
    content = load_json(path, remedy) if path.suffix == ".json" else load_torch(path, remedy)
    if not isinstance(content, dict) or content.get("stage") != name or not isinstance(content.get("config"), dict):
        raise InputError(f"{path} is not an artefact of stage {name}: {remedy}")
    for key, value in relevant(config, name).items():
        if content["config"].get(key) != value:
            raise InputError(f"{path} was made with {flag(key)} {shown(content['config'].get(key))}, not {shown(value)}: "
                             "give that, another --out, or delete it")
    if path.suffix == ".json" and content.get("crc32") != checksum(content):
        say(f"{name}: {path} was changed after it was written; it is used as it is")
    return content


def shown(value):
    return " ".join(map(str, value)) if isinstance(value, list) else repr(value) if value == "" else str(value)


# -------------------------------------------------------------------------------- progress

def progress(label, total, begun=0):
    """A function (done, note) that keeps one live line of at most 79 columns on a terminal, and at most five lines in a log.

    begun: how many were done before, in another process.
    """
    started, live, said = time.perf_counter(), sys.stderr.isatty(), [0.0]

    def tick(done, note=""):
        now = time.perf_counter()
        if done < total and (now - said[0] < 0.2 if live else done % -(-total // 5)):
            return
        said[0] = now
        spent = max(now - started, 1e-9) / (done - begun)                # seconds apiece
        line = f"{label}: {done}/{total}, {1 / spent:.1f}/s, {spent * (total - done):.0f} s left {note}".rstrip()
        print(f"{line[:79]:<79}" if live else line, end="\r" if live and done < total else "\n", file=sys.stderr, flush=True)

    return tick


def say(line):
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------- command line

def run(config, stage, out, device="cpu", force=False):
    """Run one stage, or "all" in order, in folder `out`; what is there and matches is reused.

    force: latencies are measured anew, with new AI Hub jobs, and what depends on them in "all" is redone.
    Of several ranks all work on the stages in SHARED; rank 0 alone does the others, reads, writes and prints.
    """
    out, redone = Path(out), set()
    hub = {"device": config.hub_device, "runtime": config.hub_runtime, "jobs": out / "profile_jobs.json"}
    pairs = functools.cache(lambda split: training_pairs(config) if split == "train" else split_pairs(config, split))
    wanted = list(STAGES) if stage == "all" else [stage]
    if config.from_ and stage != "finetune":
        raise InputError(f"--from {config.from_} goes with --stage finetune, not {stage}")
    if stage == "all":                                    # what is wrong with data is better known at once
        agreed(lambda: (config.data and [pairs(split) for split in ("train", "test")], named_pairs(config)))
    first(lambda: clean(out))
    for name in wanted:
        path = out / STAGES[name].artefact
        anew = force and name == ("evaluate" if stage == "evaluate" else "profile")
        stale = anew or not redone.isdisjoint(STAGES[name].needs)
        art = first(lambda: prepared(config, name, out, device, stale))
        if art is None:
            continue
        redone.update([name] if stale else [])
        started, function = time.perf_counter(), stage_of(config, name).function
        whole = {**art, "part": unfinished(config, name, path, art), "hub": {**hub, "force": anew},
                 "seconds": first(lambda: noted_seconds(out))}
        payload = agreed(lambda: unless_altered(lambda: function(config, pairs, whole, device), art)
                         if name in SHARED or rank() == 0 else None)
        first(lambda: finish(config, name, out, payload))
        spent = time.perf_counter() - started
        first(lambda: note_seconds(config, name, out, device, spent))
        say(f"{name}: {path} written, {spent:.1f} s")
    first(lambda: conclude(config, wanted[-1], out))


def prepared(config, name, out, device, stale):
    """What stage `name` reads, {stage: artefact}; None if its own artefact is there and matches."""
    path = out / STAGES[name].artefact
    if name != "report" and path.exists() and not stale:
        same_machine(name, load_artefact(path, name, config), path, config, device)
        discard(path)
        say(f"{name}: {path} matches and is reused")
        return None
    art = {need: earlier(out, need, config, name) for need in stage_of(config, name).needs}
    if name == "evaluate":
        same_machine("profile", art["profile"], out / STAGES["profile"].artefact, config, device)
    return art


def unfinished(config, name, path, art):
    """The Part of the stage whose artefact is `path`; on the ranks that read no files, a name alone."""
    inputs = {need: zlib.crc32((path.parent / STAGES[need].artefact).read_bytes()) for need in art if rank() == 0}
    return Part(path.with_suffix(".part"), name, config, inputs)


def unless_altered(call, art):
    """call(); InputError if that fails and one of {stage: artefact} that it reads is not as it was written."""
    try:
        return call()
    except (InputError, profile_device.HubError, OSError):
        raise
    except Exception:
        for name, content in art.items():
            if STAGES[name].artefact.endswith(".json") and content.get("crc32") != checksum(content):
                raise InputError(f"{STAGES[name].artefact} was changed after it was written and cannot be used: "
                                 f"delete it and run --stage {name}") from None
        raise


def finish(config, name, out, payload):
    """Write what a stage made, and remove what it kept on the way."""
    path = out / STAGES[name].artefact
    if name == "report":
        for file, content in payload.items():
            write_file(out / file, content)
        return
    content = described(config, name, payload)
    if path.suffix == ".json":
        content = json.loads(json.dumps(content))
        content["crc32"] = checksum(content)
    save_artefact(path, content)
    discard(path)


def note_seconds(config, name, out, device, seconds):
    """Add a stage's wall time to seconds.json, apart from the artefacts: these are the same from run to run."""
    if config.target != "paper":
        note = {"seconds": seconds, **profile_device.machine(device), "ranks": world()}
        save_artefact(out / "seconds.json", {**noted_seconds(out), name: note})


def noted_seconds(out):
    """What `note_seconds` wrote, {stage: note} in the order of the stages; {} where that is missing or damaged."""
    try:
        notes = json.loads((out / "seconds.json").read_text())
        return {name: {**notes[name], "seconds": float(notes[name]["seconds"])} for name in STAGES
                if notes.get(name, {}).keys() >= {"seconds", "device", "ranks", "date"}}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def discard(path):
    """Remove what the stage of artefact `path` kept while it was unfinished."""
    for part in path.parent.glob(f"{path.stem}*.part"):
        part.unlink()


def clean(out):
    """Remove what a run that was killed while it wrote a file left of it."""
    for path in out.iterdir() if out.exists() else ():
        if re.fullmatch(r"(\.[\w.]+\.(pt|pt2|json|md|png|part)|profile_jobs\.json)\.\d+", path.name):
            path.unlink(missing_ok=True)


def conclude(config, last, out):
    """Print what was gained, where everything is, and what to try next."""
    if last in ("evaluate", "report"):
        metrics = earlier(out, "evaluate", config, "report")
        parts = unless_altered(lambda: [
            gain_table(metrics), gain_words(metrics),
            *test_tables(metrics["tests"], {n: metrics[n]["gmacs"] for n in ("base", "chosen")}, config.frame)],
            {"evaluate": metrics})
    elif last == "finetune" and config.from_:
        text = adapted_text(config, earlier(out, "finetune", config, "finetune"))
        write_file(out / "report.md", text.encode())
        parts = [text.strip()]
    else:
        return
    print("\n\n".join(parts) + f"\n\nEverything is in {out}, the tables in report.md. Then try:\n"
          f"  python hwdeblur.py --stage deblur --out {out} --input photo.jpg --output sharp.png")


def same_machine(name, table, path, config, device):
    """Refuse a local latency table that was measured with another device or number of threads."""
    if name != "profile" or config.target != "local":
        return
    here = profile_device.machine(device)
    for key, remedy in (("device", "that machine and --device"), ("threads", f"--threads {table.get('threads')}")):
        if table.get(key) != here.get(key):
            raise InputError(f"{path} was measured with {key} {table.get(key)}, not {here.get(key)}: give {remedy}, "
                             "or --stage all --force to measure anew")


def earlier(out, name, config, wanted_by):
    """The artefact that a later stage reads, or the command that makes it."""
    path = out / STAGES[name].artefact
    if not path.exists():
        raise InputError(f"stage {wanted_by} needs {path}, which is not there: run --stage {name} --out {out} first")
    return load_artefact(path, name, config)


def run_deblur(source, target, out, device):
    """Restore one photograph with the net that was made in `out`, whatever its configuration."""
    if not source or not target:
        raise InputError("--stage deblur needs --input PHOTO and --output FILE")
    deblur_file(blocks.deploy(chosen_net({"finetune": finetuned(out, "deblur")}, device)), source, target, device)
    say(f"deblur: {target} written")


def finetuned(out, stage):
    """The artefact of stage finetune in `out`, whatever its configuration, for `stage`."""
    path = Path(out) / STAGES["finetune"].artefact
    if not path.exists():
        raise InputError(f"--stage {stage} needs {path}, which is not there: run --stage all --out {out} first")
    return load_tuned(path)


def run_export(out, frame=None):
    """Write the net made in `out` as deblur.pt2, a torch.export program for one frame size, and its card.

    frame: (H, W) in pixels; default, the size that was profiled.
    """
    tuned = finetuned(out, "export")
    frame = frame or tuned["config"].get("frame")
    if frame is None:
        raise InputError(f"--stage export: the run in {out} profiled no frame size: give one, say --frame 256")
    height, width = frame
    net = blocks.deploy(chosen_net({"finetune": tuned}))
    program, stream = profile_device.exported(net, (1, 3, height, width)), io.BytesIO()
    torch.export.save(program, stream)
    card = {"input": program.graph_signature.user_inputs[0], "shape": [1, 3, height, width], "layout": "NCHW",
            "dtype": "float32", "range": [0, 1], "channel_order": "RGB", "output": "as the input; clamp it to [0, 1]",
            "arch": tuned["arch"], "choice": tuned["choice"], **measured_card(out, tuned, [height, width]),
            "licence": "MIT", "seed": tuned["seed"], "versions": {"torch": str(torch.__version__)}}
    write_file(Path(out) / "deblur.pt2", stream.getvalue())
    save_artefact(Path(out) / "deblur.json", card)
    say(f"export: {Path(out) / 'deblur.pt2'} and deblur.json written, for frames of {height}x{width}")


def measured_card(out, tuned, frame):
    """PSNR, and latency at `frame`, of the tuned net as stage evaluate found them; None where it did not."""
    path = Path(out) / STAGES["evaluate"].artefact
    blank = {"psnr_db": None, "protocol": None, "latency_ms": None, "latency_on": None}
    if not path.exists():
        say(f"export: no {path}, so the card holds no PSNR and latency: run --stage evaluate first")
        return blank
    metrics = load_json(path, "delete it and run --stage evaluate")
    if not isinstance(metrics, dict) or not isinstance(metrics.get("config"), dict) or not (
            tuned["config"].items() <= metrics["config"].items()):
        say(f"export: {path} is of another run, so the card holds no PSNR and latency: delete it, run --stage evaluate")
        return blank
    return unless_altered(lambda: {
        "psnr_db": metrics["chosen"]["psnr_db"], "protocol": metrics["protocol"],
        **({"latency_ms": metrics["chosen"]["latency_ms"], "latency_on": metrics["sums"]["measured_on"]}
           if frame == metrics["config"].get("frame") and metrics["chosen"]["latency_ms"] is not None
           else {"latency_ms": None, "latency_on": None})}, {"evaluate": metrics})


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def sides(text):
    """'256' or '720x1280' -> (height, width)."""
    values = tuple(int(v) for v in text.lower().split("x"))
    if len(values) not in (1, 2):
        raise ValueError(text)
    return values * (3 - len(values)) if len(values) == 1 else values


def stage_lines():
    """{what --stage takes: what it does, in one line}, in order."""
    return {**{name: stage.function.__doc__.splitlines()[0] for name, stage in STAGES.items()},
            "all": "These, in order; what is there and matches is reused.",
            "deblur": "Restore the photograph --input into --output with the net in --out.",
            "export": "Write that net as deblur.pt2, a torch.export program, and its card deblur.json."}


def listed_stages():
    return "\n".join(f"  {name:<10}{line}" for name, line in stage_lines().items())


def sections():
    """{configuration entry: its heading in the help}: the first stage that depends on it, if one does."""
    found = {field.name: "any stage" for field in dataclasses.fields(Config)}
    for name, stage in reversed(STAGES.items()):
        found.update(dict.fromkeys(stage.knobs, f"stage {name}"))
    return {**found, **dict.fromkeys(DATA, "data"), "seed": "any stage"}


def help_line(field):
    """What a configuration entry is; in brackets its default and unit, and the paper preset's where that differs."""
    def text(value):
        return "x".join(map(str, value)) if field.name == "frame" else shown(plain(value)).strip("'") or "none"
    default = f"{text(field.default)} {field.metadata['unit']}".strip()
    paper = f"; paper: {text(PRESETS['paper'][field.name])}" if field.name in PRESETS["paper"] else ""
    return f"{field.metadata['help']} [{'off' if field.default is False else default}{paper}]"


def argument(field):
    """argparse's description of a configuration entry."""
    about = dict(dest=field.name, default=argparse.SUPPRESS, help=help_line(field))
    if field.default is False:
        return dict(about, action="store_true")
    if field.name == "test":
        return dict(about, action="append", metavar="NAME=PATH")
    if field.name == "frame":
        return dict(about, type=sides, metavar="HxW")
    if field.name in CHOICES:
        return dict(about, choices=CHOICES[field.name])
    many = isinstance(field.default, tuple)
    kind = int if many else type(field.default)
    return dict(about, type=kind, nargs="+" if many else None, metavar={int: "N", float: "X", str: "TEXT"}[kind])


def parser():
    """The command line, one flag per configuration entry, grouped by stage."""
    p = Parser(allow_abbrev=False, add_help=False, usage="python hwdeblur.py --stage STAGE [--out FOLDER] [flags]",
               formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28),
               description="The stages, in order:\n" + listed_stages(),
               epilog="In brackets: the default and its unit, and that of --preset paper where it differs.")
    groups = {title: p.add_argument_group(title) for title in ("any stage", "data", *(f"stage {name}" for name in stage_lines()))}
    add = groups["any stage"].add_argument
    add("-h", "--help", action="help", help="print this")
    add("--stage", nargs="?", const=True, choices=list(stage_lines()), metavar="STAGE",
        help="one of the above; without a value, list them")
    add("--preset", default="demo", choices=list(PRESETS), help="defaults of all other flags [demo]")
    add("--out", metavar="FOLDER", help="folder of the artefacts [runs/PRESET]")
    add("--device", default="cpu", help="torch device, say cuda [cpu]")
    add("--threads", type=int, metavar="N", help="CPU threads [torch's own choice]")
    add("--force", action="store_true", help="measure latency anew, with new AI Hub jobs [off]")
    groups["stage deblur"].add_argument("--input", metavar="PHOTO", help="a photograph")
    groups["stage deblur"].add_argument("--output", metavar="FILE", help="where the restored one goes, .png or .jpg")
    headings = sections()
    for field in dataclasses.fields(Config):
        groups[headings[field.name]].add_argument(flag(field.name), **argument(field))
    return p


def configuration(args):
    """Parsed flags -> Config: the preset, then what was given."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    config = Config(**{**PRESETS[args.preset], **given})
    check(config)
    return config


def main(argv=None):
    """Exit status 0, or 2 after one line on stderr that names the thing and the remedy."""
    profile_device.keep_memory()                  # a fifth faster in training on CPU as well
    try:
        args = parser().parse_args(argv)
        if args.stage is True:
            print(listed_stages())
            return 0
        if args.stage is None:
            raise InputError("no stage is given: --stage all runs them in order, --stage alone lists them, --help says more")
        config = configuration(args)
        if args.threads is not None:
            if not 1 <= args.threads <= 1024:
                raise InputError(f"--threads {args.threads} must be from 1 to 1024")
            torch.set_num_threads(args.threads)
        with joined(args.device) as device:
            obey(args, config, args.out or f"runs/{args.preset}", device)
    except (InputError, profile_device.HubError, OSError) as error:
        if rank() == 0:
            print(f"hwdeblur: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def obey(args, config, out, device):
    """Do what the command line asks for."""
    agreed(lambda: usable(device))
    if args.stage == "deblur":
        first(lambda: run_deblur(args.input, args.output, out, device))
    elif args.stage == "export":
        first(lambda: run_export(out, getattr(args, "frame", None)))
    else:
        first(lambda: writable(Path(out)))
        run(config, args.stage, out, device, args.force)


def usable(device):
    """Refuse a device that is not to be had."""
    try:
        if torch.device(device).index is not None and torch.device(device).type == "cuda":
            torch.cuda.set_device(device)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {device} is not to be had here ({first_line(error)})") from None


def one_line(error):
    """What the user is told of an error that is no bug."""
    return f"{error.filename or ''}: {error.strerror or error}" if isinstance(error, OSError) else str(error)


def writable(out):
    """Refuse an output folder that cannot be written before any work is done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise InputError(f"folder {out} cannot be written ({error.strerror}): give another") from None


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
