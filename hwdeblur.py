"""Towards Efficient Image Deblurring for Edge Deployment: data, metrics, stages, report, command line.

    pairs -> saliency -> sites -> distill -> surrogates --+
                           \\--> profile -> latency table --+--> search -> front -> knee -> finetune -> ...

Images are float32 RGB in [0, 1], (B, 3, H, W) or (3, H, W); stored pairs are uint8 (3, H, W). A stage is a
function of (job, earlier artefacts by name) to one artefact, which the store keeps on disk. The sections
of this file, in order, each built on those above it:

    errors and progress                          one line for the user; one live line on a terminal
    configuration                                every value that decides the result, with unit and bounds
    ranks: processes that share a stage          what torchrun's processes tell one another; errors reach all
    the store                                    artefacts: written whole, read and checked
    unfinished stages                            what a run that was cut off goes on from
    made pairs: dead leaves and camera shake     training data where --data gives none
    pairs on disk                                folders and lists, splits
    batches                                      crops as a function of (seed, step)
    metrics                                      PSNR, SSIM, scores of nets over whole images
    nets in and out of artefacts                 state dicts to nets
    the stages                                   section II, a function each: base to evaluate
    controls                                     is the search worth it: other nets of the same latency
    the report                                   report.md, pareto.svg, samples.png
    one photograph, one exported program         --stage deblur and --stage export
    running the stages                           reuse, order, one writer at a time
    command line                                 the flags, main
"""
import argparse
import bisect
import contextlib
import copy
import dataclasses
import datetime
import functools
import gc
import io
import itertools
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
    from scipy.ndimage import gaussian_filter
    from scipy.stats import bootstrap, kendalltau
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader
except ImportError as error:                      # an old Python has no such packages
    if __name__ != "__main__":
        raise
    print(f"hwdeblur: {error} (Python {platform.python_version()}): with Python 3.11 or newer, "
          "pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

import blocks
import profile_device
import search

try:
    import fcntl
except ImportError:                               # on Windows runs in one folder are not kept apart
    fcntl = None


# ------------------------------------------------------------------------------ errors and progress

class InputError(Exception):
    """Something the user can put right: one line that names the thing and the remedy; exit status 2."""


class Stale(InputError):
    """An artefact that is whole, but was made from something other than what is there now."""


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error):
    """What the user is told of an error that is no bug."""
    if not isinstance(error, OSError) or not error.filename:
        return str(error)
    return f"{error.filename}: {error.strerror or error}"


def say(*lines):
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def progress(label, total, begun=0):
    """A function (done, note) that shows a line of at most 79 columns: live on a terminal, five in a log.

    begun: how many an earlier process had done. note() -> text, called only when the line is shown.
    """
    started, live, said, fifths = time.perf_counter(), sys.stderr.isatty(), 0.0, 5 * begun // max(total, 1)

    def tick(done, note=lambda: ""):
        nonlocal said, fifths
        now = time.perf_counter()
        if done <= begun or done < total and (now - said < 0.2 if live else 5 * done // total <= fifths):
            return
        said, fifths = now, 5 * done // total
        spent = max(now - started, 1e-9) / (done - begun)              # seconds apiece
        left = f"{1 / spent:.1f}/s, {spent * (total - done):.0f} s left"
        line = f"{label}: {done}/{total}, {left} {note()}".rstrip()
        end = "\r" if live and done < total else "\n"
        print(f"{line[:79]:<79}" if live else line, end=end, file=sys.stderr, flush=True)

    return tick


# ------------------------------------------------------------------------------------ configuration

def knob(default, stages, help, least=None, most=10 ** 9, unit="", choices=None):
    """A configuration entry: all that the flag, its help and its check need.

    stages: those whose artefacts depend on it, the first its heading in the help ("data": base and adapt
    depend on it; "any": none does; "hub": only with --target qai-hub); least, most: bounds of its numbers.
    """
    return dataclasses.field(default=default, metadata=dict(
        stages=stages.split(), help=help, unit=unit, least=least, most=most, choices=choices))


NEAR_DB = 0.05                                    # what two candidates may differ by and count as equals
# What --pick takes, in words.
PICKS = {"near-best": f"the fastest within {NEAR_DB} dB of the best", "best": "the best",
         "fastest": "the fastest"}


@dataclasses.dataclass(frozen=True)
class Config:
    """What decides the result, and --workers. Defaults are the demo preset, sized for two CPU cores."""
    seed: int = knob(0, "any base adapt", "seed of every random choice", 0, 2 ** 32 - 1)
    workers: int = knob(0, "any", "processes that decode training images ahead", 0, 256)
    data: str = knob("", "data", "folder of train and test pairs, as folders or lists; none: made pairs")
    made_train: int = knob(768, "data", "made pairs for training and distillation", 1)
    made_test: int = knob(32, "data", "made pairs for validation, and as many for testing", 1)
    made_size: int = knob(128, "data", "side of a made image", 11, 4096, "pixels")
    few: int = knob(64, "data", "with fewer own training pairs, made ones take the place of those "
                     "missing, in half of all crops at least", 0)
    val_pairs: int = knob(16, "data", "most pairs carved from train, to score and to pick by (II-C)", 1)
    weights: str = knob("", "base", "pre-trained NAFNet checkpoint (authors' format); none: train one")
    width: int = knob(16, "base", "channels of the net at full resolution", 1, 1024)
    enc: tuple = knob((1, 1, 4, 1), "base", "blocks per encoder stage (for small crops, early)", 1, 999)
    middle: int = knob(1, "base", "blocks in the middle stage", 1, 999)
    dec: tuple = knob((1, 1, 1, 1), "base", "blocks per decoder stage", 1, 999)
    crop: int = knob(64, "base adapt", "side of a training crop", 1, 4096, "pixels")
    batch: int = knob(4, "base adapt", "crops per training step", 1)
    amp: bool = knob(False, "base distill finetune adapt", "train and distil in bfloat16 (autocast)")
    grad_clip: float = knob(0.0, "base finetune adapt", "norm that gradients are clipped to, 0: off", 0, 1e9)
    cap_db: float = knob(31.4, "base saliency finetune adapt", "PSNR where the loss levels off", 1, 100, "dB")
    average: float = knob(8.0, "base finetune adapt", "average weights over steps t by t^X, rates "
                          "then falling only to a quarter; 0: off", 0, 1e3)
    tlc: bool = knob(False, "base adapt", "attend over 1.5 x --crop pixels, in every net (Chu et al. 2021)")
    base_steps: int = knob(4000, "base", "length of base training", 0, 10 ** 7, "steps")
    base_lr: float = knob(2e-3, "base", "first learning rate, along a cosine", 1e-12, 1e30)
    frame: tuple = knob((256, 256), "profile adapt", "input of the profiled net, H or HxW", 1, 8192, "pixels")
    target: str = knob("local", "profile", "latency table: this machine, a phone, or the paper's table 2",
                       choices=("local", "qai-hub", "paper"))
    hub_device: str = knob(profile_device.HUB_DEVICE, "profile hub", "AI Hub's device, for --target qai-hub")
    hub_runtime: str = knob("tflite", "profile hub", "runtime on it", choices=profile_device.HUB_RUNTIMES)
    hub_precision: str = knob("float", "profile hub", "precision", choices=profile_device.HUB_PRECISIONS)
    hub_options: str = knob("", "profile hub", 'options of its jobs: --hub-options="--x y"')
    hub_blocks: str = knob("alone", "profile hub", "blocks alone or in the net", choices=("alone", "net"))
    calibration: int = knob(64, "profile hub", "training images to quantise with", 1, 10 ** 4)
    distill_share: float = knob(0.25, "distill", "share of the training pairs that it uses (II-B)", 1e-6, 1)
    distill_steps: int = knob(300, "distill", "length, of all surrogates at once (II-B)", 0, 10 ** 7, "steps")
    distill_lr: float = knob(0.012, "distill", "first learning rate, cosine to 0", 1e-12, 1e30)
    space: str = knob("paper", "saliency", "paper: blocks outside the critical stage may be replaced; all: "
                      "every block may be, or be left out", choices=("paper", "all"))
    keep: int = knob(0, "saliency", "how many of the most salient stages stay with --space all", 0, 99)
    evaluations: int = knob(100, "search", "configurations that the search proposes (II-C)", 1)
    candidates: int = knob(2, "search", "nets of the front that are fine-tuned, its knee first (II-C)", 1)
    refit: int = knob(64, "search", "training crops that a net's last convolution is fitted to, in closed "
                      "form, before it is scored or tuned; 0: plug and play alone", 0, 10 ** 4)
    max_ms: float = knob(0.0, "search", "most predicted latency of a candidate, 0: any", 0, 1e9, "ms")
    max_loss_db: float = knob(0.0, "search", "most loss before fine-tuning, 0: any", 0, 1e3, "dB")
    from_: str = knob("", "finetune adapt", "a finetuned.pt to adapt to --data, without a search (III-C)")
    finetune_steps: int = knob(1000, "finetune adapt", "length, for each candidate", 0, 10 ** 7, "steps")
    finetune_lr: float = knob(1e-3, "finetune adapt", "first learning rate, along a cosine", 1e-12, 1e30)
    pick: str = knob("near-best", "finetune", "which candidate: best (PSNR, II-C), fastest (III-A), or "
                     f"near-best, {PICKS['near-best']}", choices=tuple(PICKS))
    test: tuple = knob((), "evaluate adapt control", "a further test set, folder or list; repeatable")
    controls: int = knob(3, "control", "how many of them are random configurations", 0, 999)
    control_scratch: bool = knob(False, "control", "train some from scratch even if --weights gave the base")


# The paper preset trains as the authors' NAFNet-width32 for GoPro did: 8 x 4 crops a step, gradients clipped
# at norm 0.01. Only the weight decay, 1e-3, is that of their width 64: their file for width 32 has 0.
PRESETS = {
    "demo": {},
    "paper": dict(width=32, enc=(1, 1, 1, 28), crop=256, batch=32, base_steps=200_000, base_lr=1e-3,
                  grad_clip=0.01, cap_db=80.0, average=0.0, refit=0, frame=(512, 512), distill_steps=20_000,
                  distill_lr=1e-3, evaluations=200, candidates=3, finetune_steps=100_000, finetune_lr=1e-4,
                  pick="best", made_train=2000, made_size=384),
}


def flag(name):
    return "--" + name.strip("_").replace("_", "-")


def shown(value):
    """A value as it is given on the command line."""
    return (" ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)) or "''"


def test_sets(config):
    """{NAME: path} of --test."""
    sets = {}
    for text in config.test:
        name, _, path = text.partition("=")
        if not name or not path or name in sets or name in ("validation", "test"):
            raise InputError(f"--test {text}: give NAME=PATH, each NAME once, and not validation or test")
        sets[name] = Path(path)
    return sets


def check(config):
    """Refuse, by name, values that no stage can use."""
    for field in dataclasses.fields(config):
        value, least, most = getattr(config, field.name), field.metadata["least"], field.metadata["most"]
        for v in value if isinstance(value, tuple) else [value]:
            if least is not None and not least <= v <= most:
                bound = f"at least {least}" if v < least else f"at most {most}"
                raise InputError(f"{flag(field.name)} {shown(value)} must be {bound}")
    enc, dec = len(config.enc), len(config.dec)
    if enc != dec or enc > 6:                     # each halves the picture
        raise InputError(f"stages: --enc has {enc}, --dec {dec}; give as many of each, at most 6")
    if not config.data and config.crop > config.made_size:
        raise InputError(f"--crop {config.crop} is larger than --made-size {config.made_size}")
    made = 6 * (config.made_train + 2 * config.made_test) * config.made_size ** 2
    step = config.width * config.batch * config.crop ** 2
    for what, size, most in (
            ("--width, doubled at each stage of --enc, comes to", config.width * 2 ** enc, 8192),
            ("--width x --batch x --crop squared is", step, 2 ** 31),
            ("--width x --frame is", config.width * math.prod(config.frame), 2 ** 29),
            ("6 bytes x --made-size squared x (--made-train + 2 --made-test) is", made, 2 ** 34)):
        if size > most:
            raise InputError(f"{what} {size:,}, which no memory holds: at most {most:,}")
    test_sets(config)


def window_of(config):
    """The side, in input pixels, of the window that attention averages over; None: the whole image."""
    return 3 * config.crop // 2 if config.tlc else None


# -------------------------------------------------------------- ranks: processes that share a stage

def rank():
    """This process's number among those that torchrun started, 0 if it is the only one."""
    if dist.is_initialized():
        return dist.get_rank()
    number = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    return int(number) if number.isdigit() else 0


def world():
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def anywhere(condition):
    """Whether `condition` holds on any rank: one scalar reduction."""
    ranks = torch.tensor(int(bool(condition)))
    if world() > 1:
        dist.all_reduce(ranks)
    return ranks.item() > 0


def gather(value):
    """[value of rank 0, of rank 1, ...], on every rank."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def merged(dicts):
    """One dict of several, whose values are merged alike where they are dicts."""
    keys = dict.fromkeys(itertools.chain(*dicts))
    found = {key: [each[key] for each in dicts if key in each] for key in keys}
    return {key: merged(values) if isinstance(values[0], dict) else values[0]
            for key, values in found.items()}


class Told(InputError):
    """An error that every rank raises, whichever met it."""


def agreed(call):
    """call() on every rank; where it fails on one, all raise the first one's line: none waits in vain.

    Calls nest: a rank that fails between two inner calls is already in the outer one's reduction when the
    others come to the next inner one's; what they learn there they raise as it is.
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
    if anywhere(line):
        raise Told(next(line for line in gather(line) if line))
    return value


def first(call):
    """call() on rank 0 alone -> what it returned, on every rank."""
    value = [agreed(lambda: call() if rank() == 0 else None)]
    if world() > 1:
        dist.broadcast_object_list(value)
    return value[0]


def whole_batch(share, batch):
    """uint8 (b, 3, H, W), images rank, rank + ranks, .. of `batch` -> all, in order, on every rank."""
    if world() == 1:
        return share
    most = -(-batch // world())
    own = torch.cat([share, share.new_zeros(most - len(share), *share.shape[1:])])      # all of one length
    parts = [torch.empty_like(own) for _ in range(world())]
    dist.all_gather(parts, own)
    return torch.stack(parts, 1).flatten(0, 1)[:batch]


@contextlib.contextmanager
def joined(device):
    """Connected to the other ranks, if torchrun started any -> this one's device. Rank 0 alone prints."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdigit():
        raise InputError(f"WORLD_SIZE={size} is no number: start with torchrun")
    if int(size) == 1:
        yield device
        return
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:                                          # ranks wait while rank 0 profiles a phone: a day at most
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the other ranks cannot be reached ({first_line(error)}): use torchrun") from None
    try:
        with open(os.devnull, "w") as nowhere:
            out, err = (nowhere, nowhere) if rank() else (sys.stdout, sys.stderr)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                yield device
                dist.barrier()                    # rank 0, the others' meeting place, must not leave first
    except Exception as error:                    # what wraps a net hangs if it outlives the group
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        raise
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------- the store

def digest(value, crc=0):
    """CRC-32 of plain values and tensors, whatever file they come from; a tuple counts as a list."""
    if isinstance(value, dict):
        value = [part for item in value.items() for part in item]
    if isinstance(value, (list, tuple)):
        begun = zlib.crc32(b"[%d" % len(value), crc)
        return functools.reduce(lambda crc, part: digest(part, crc), value, begun)
    if torch.is_tensor(value):
        shape = zlib.crc32(f"{value.dtype} {tuple(value.shape)}".encode(), crc)
        return zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), shape)
    return zlib.crc32(repr(value).encode(), crc)


def write_file(path, content):
    """Bytes to a temporary name, then renamed: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): make room there, or give another "
                         "place") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def writable(out):
    """Refuse, before any work is done, an output folder that cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise InputError(f"folder {out} cannot be written ({error.strerror}): give another") from None


def read_file(path, remedy):
    """What a JSON or torch file holds: tensors and plain values, never code. InputError if damaged."""
    if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):
        raise InputError(f"{path} is not a regular file: {remedy}")    # a pipe, say, would be waited for
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text())
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():             # torch itself looks at no checksum
                    raise ValueError("checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no file {path}: {remedy}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): make it readable") from None
    except Exception as error:                    # of many kinds, on bytes that are not its own
        kind = "JSON" if path.suffix == ".json" else "checkpoint of tensors"
        raise InputError(f"{path} is damaged or no {kind} ({type(error).__name__}): {remedy}") from None


def saved(path, payload, head):
    """Write header, payload and their checksum, whole or not at all, as JSON or torch by the extension."""
    content, stream = {**head, **payload}, io.BytesIO()
    if path.suffix == ".json":
        content["checksum"] = digest(json.loads(json.dumps(content)))
        stream.write((json.dumps(content, indent=1) + "\n").encode())
    else:
        torch.save({**content, "checksum": digest(content)}, stream)
    write_file(path, stream.getvalue())


# A finished search goes on from its history where these have changed; no score depends on them.
GOES_ON = ("evaluations", "candidates", "max_ms", "max_loss_db")


def loaded(path, head, remedy=None):
    """What `saved` wrote to `path`, checked to be whole and to match as much of a header as `head` has.

    InputError where it is damaged, of another stage, or made with other flags; Stale where it was made from
    other inputs or options, or only flags of GOES_ON differ.
    """
    remedy = remedy or f"delete it, and --stage {head['stage']} makes it anew"
    content, whole = read_file(path, remedy), False
    if not isinstance(content, dict) or content.get("stage") != head["stage"]:
        raise InputError(f"{path} is not an artefact of stage {head['stage']}: {remedy}")
    with contextlib.suppress(Exception):          # odd entries have no digest
        whole = content["checksum"] == digest({k: v for k, v in content.items() if k != "checksum"})
    if not whole:
        raise InputError(f"{path} is damaged, edited, or of another version: {remedy}")
    order = lambda item: (item[0] != "from_", item[0] in GOES_ON)
    for key, value in sorted(head.get("config", {}).items(), key=order):
        if key not in content["config"]:
            raise InputError(f"{path} is of a version without {flag(key)}: give another --out, or delete it")
        if content["config"][key] != value:
            why = f"{path} was made with {flag(key)} {shown(content['config'][key])}, not {shown(value)}"
            if key in GOES_ON:
                raise Stale(why)
            raise InputError(f"{why}: give that, another --out, or delete it")
    for name, mark in head.get("inputs", {}).items():
        if content["inputs"].get(name) != mark:
            raise Stale(f"{path} was made from another {name}")
    if content.get("options") != head.get("options", content.get("options")):
        raise Stale(f"{path} was made with other options: {', '.join(content.get('options') or ['none'])}")
    return content


# -------------------------------------------------------------------------------- unfinished stages

class Job(NamedTuple):
    """What a stage is given besides the artefacts that it reads."""
    config: Config
    pairs: object         # pairs("train"), ("val") or ("test")
    device: str
    out: Path             # folder of the run, where unfinished work is kept
    head: dict            # header of the artefact in the making
    anew: bool = False    # measure anew what has been measured before (--force)


def resumed(job, file, done="step"):
    """What an unfinished stage, `done` so far, left in out/FILE, on every rank; None where nothing fits."""
    def read():
        path, stage = job.out / file, job.head["stage"]
        try:
            found = loaded(path, job.head) if path.exists() else None
        except Stale as why:
            return say(f"{stage}: {why}, so it is left aside")
        if found:
            say(f"{stage}: goes on from {path}, {found[done]} done")
        return found

    return first(read)


def finite(state):
    """Whether all parameters and statistics of a state dict are finite."""
    return all(value.isfinite().all().item() for value in state.values())


def refuse_divergence(label, state, hint):
    """InputError, the hint at its end, if the `blocks.loop_state` of a net in training is not finite."""
    losses = enumerate(state["losses"]["psnr"].tolist())
    bad = [f"the loss of step {step} is {loss}" for step, loss in losses if not math.isfinite(loss)]
    if bad or not finite(state["model"]):
        why = bad[0] if bad else "its weights are not finite"
        raise InputError(f"{label} diverged, {why}: lower the learning rate{hint}")


def keeper(job, file, label, steps, state=None, joint=False, every_s=120.0):
    """A function each(step, losses, make) for `blocks.minimise`: shows progress, keeps its state in out/FILE.

    state: what the loop goes on from, if anything. It saves every `every_s` seconds by rank 0's clock, sooner
    where that takes no more than a fiftieth of the time, and after the last step. joint: every rank trains a
    part of its own (distillation), all are kept in one file, and one that diverges ends nothing.
    """
    path, kept = job.out / file, state["step"] if state else 0
    tick, kept_at, wait = progress(label, steps, kept), time.monotonic(), 0.0

    def each(step, losses, make):
        nonlocal kept, kept_at, wait
        tick(step, lambda: "" if joint else f"{-losses['psnr'][step - 1]:.2f} dB")
        started = time.monotonic()
        if not anywhere(rank() == 0 and (step == steps or started - kept_at >= wait)):
            return
        reached = merged(gather(make())) if joint else rank() == 0 and make()
        good = f"; the last good checkpoint is {path}, of step {kept}: delete it to start over"
        first(lambda: joint or refuse_divergence(label, reached, good))
        first(lambda: saved(path, reached, job.head))
        kept, kept_at = step, time.monotonic()
        wait = min(every_s, 50 * (kept_at - started))

    return each


# --------------------------------------------------- made pairs: dead leaves and camera shake

def turned(x, y, angle):
    """Coordinates x, y (broadcast) in axes turned by `angle` (rad) -> two arrays."""
    c, s = math.cos(angle), math.sin(angle)
    return c * x + s * y, c * y - s * x


def power_noise(size, rng):
    """(size, size) noise with a power-law spectrum, mostly drawn out along one direction as fur is."""
    angle, stretch = rng.uniform(0, np.pi), 12 ** max(0, rng.uniform(-0.4, 1))
    along, across = turned(np.fft.rfftfreq(size), np.fft.fftfreq(size)[:, None], angle)
    f = np.hypot(stretch * along, across)
    f[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((size, size)))
    return np.fft.irfft2(spectrum / f ** rng.uniform(0.8, 1.6), (size, size))


def grating(size, rng):
    """(size, size) stripes of 5 to 80 pixels, soft or sharp, thin or wide, at times crossed: cloth, brick."""
    period, angle = 5 * 16 ** rng.random(), rng.uniform(0, np.pi)
    across, along = turned(np.arange(size), np.arange(size)[:, None], angle)
    wave = np.cos(2 * np.pi * across / period + rng.uniform(0, 7))
    if rng.random() < 0.4:
        wave = np.maximum(wave, np.cos(2 * np.pi * along / (period * rng.uniform(0.5, 2))))
    return np.tanh(10 ** rng.uniform(-0.5, 0.8) * (wave - rng.uniform(-0.8, 0.8)))


def leaf_texture(size, rng):
    """(size, size) float32 of mean 0 and variance 1: noise, or in a third of all cases a grating."""
    texture = (grating if rng.random() < 1 / 3 else power_noise)(size, rng)
    return ((texture - texture.mean()) / texture.std()).astype(np.float32)


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
    draw.polygon([(radius + r * math.cos(a), radius + r * math.sin(a)) for a, r in zip(angles, reach)], 255)
    return mask


def leaf_colour(palette, rng):
    """One of the palette's colours, a little varied: (3,) in [0, 1]."""
    return np.clip(palette[rng.integers(len(palette))] + rng.normal(0, 0.06, 3), 0, 1)


def leaf_fill(height, width, palette, textures, contrast, rng):
    """A patch (height, width, 3) of 8 bits: one colour, a linear ramp of light, a crop of a texture."""
    colour = leaf_colour(palette, rng)
    texture = textures[rng.integers(len(textures))]
    top = rng.integers(0, texture.shape[0] - height + 1)
    left = rng.integers(0, texture.shape[1] - width + 1)
    texture = texture[top:top + height, left:left + width] * rng.exponential(contrast)
    # The ramp is zero at half the scene's side, so that many small patches saturate as photographs do.
    slope, middle = rng.normal(0, 0.25, 2) / (height, width), textures[0].shape[0] / 2
    ramp = np.add.outer(slope[0] * (np.arange(height) - middle), slope[1] * (np.arange(width) - middle))
    shade = np.clip(colour * (1 + ramp + texture)[..., None], 0, 1)
    return Image.fromarray((shade * 255 + 0.5).astype(np.uint8))


def dead_leaves(size, rng):
    """A scene (size, size, 3) uint8 of shapes that hide one another (Lee, Mumford & Huang 2001).

    Radii follow a power law, as in photographs; such images train restoration nets almost as well (Achddou
    et al. 2021). The count decides between open sky and clutter; what lies behind may be out of focus.
    """
    shades = rng.integers(4, 10)
    palette = np.clip(rng.beta(0.9, 1.2, (shades, 1)) + rng.normal(0, 0.1, (1, 3))
                      + rng.normal(0, rng.uniform(0.02, 0.25), (shades, 3)), 0.01, 1)
    textures = [leaf_texture(size, rng) for _ in range(3)]
    canvas = leaf_fill(size, size, palette, textures, 0.05, rng)
    calm = rng.random() < 0.4
    count = int(10 ** (rng.uniform(1, 2.4) if calm else rng.uniform(2.4, 3.2)) * (size / 320) ** 2)
    alpha, smallest, largest = rng.uniform(1, 2), 3.0, size / 3
    share = smallest ** -alpha + rng.random(count) * (largest ** -alpha - smallest ** -alpha)
    behind = int(count * rng.uniform(0.4, 1.2))
    for i, radius in enumerate((share ** (-1 / alpha)).astype(int)):
        if i == behind:
            canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0, 7)))
        mask = leaf_mask(int(radius), rng)
        if radius > 5:
            patch = leaf_fill(mask.height, mask.width, palette, textures, 0.2, rng)
        else:
            patch = tuple(int(255 * v) for v in leaf_colour(palette, rng))
        canvas.paste(patch, tuple(int(v) for v in rng.integers(-radius, size, 2)), mask)
    return np.array(canvas)


def camera_path(frames, length, rng):
    """(frames, 4) of x, y (pixels), rotation (rad), zoom around their mean: a shaking hand.

    The velocity walks at random, with inertia and rare jerks (after Boracchi & Foi 2012). The path spans
    `length` pixels, turns by at most 1.5 degrees and zooms by at most 1.5 %.
    """
    inertia, velocity, path = rng.uniform(0.7, 0.98), rng.standard_normal(4), []
    for _ in range(frames):
        velocity = inertia * velocity + math.sqrt(1 - inertia ** 2) * rng.standard_normal(4)
        if rng.random() < 0.03:
            velocity = rng.standard_normal(4) - velocity
        path.append(velocity)
    path = np.cumsum(path, 0)
    path -= path.mean(0)
    path[:, :2] *= length / np.linalg.norm(np.ptp(path[:, :2], axis=0))
    path[:, 2:] *= rng.uniform(0, (math.radians(1.5), 0.015)) / np.abs(path[:, 2:]).max(0)
    return path


def to_eight_bits(linear):
    """Linear light (1, 3, 2H, 2W) -> gamma-encoded uint8 (3, H, W), each pixel the mean of four."""
    return (F.avg_pool2d(linear, 2).clamp(0, 1) ** (1 / 2.2) * 255 + 0.5).to(torch.uint8)[0]


def made_pair(size, rng, length=8.0, softness=1.0, margin=12):
    """A (sharp, blur) pair, uint8 (3, size, size): frames of a scene averaged in linear light, as GoPro's.

    Rendered at twice the size. length: of the camera's path, 0 for no blur, and softness: sigma of the lens,
    in pixels. Half the scenes have grain, as sharp frames of films have and blurred ones have not.
    """
    scene = dead_leaves(2 * (size + 2 * margin), rng).transpose(2, 0, 1) / np.float32(255)
    scene = gaussian_filter(scene, 2 * softness, mode="mirror", truncate=3, axes=(1, 2))
    scene += max(0, rng.uniform(-0.06, 0.06)) * rng.standard_normal(scene.shape, np.float32)
    linear = torch.from_numpy(scene)[None].clamp(0, 1) ** 2.2          # gamma 2.2
    side, inside, frames = linear.shape[-1], slice(2 * margin, -2 * margin), 1 + math.ceil(2 * length)
    sharp = to_eight_bits(linear[..., inside, inside])
    if not length:
        return sharp, sharp
    x, y, turn, zoom = camera_path(frames, length, rng).T
    c, s = (1 + zoom) * np.cos(turn), (1 + zoom) * np.sin(turn)
    theta = np.stack([c, -s, 4 * x / side, s, c, 4 * y / side], 1).reshape(frames, 2, 3)
    at = ((torch.arange(side) * 2 + 1) / side - 1)[inside]             # grid_sample's coordinates of pixels
    grid = [torch.stack([a * at + b * at[:, None] + d for a, b, d in rows], -1)[None]
            for rows in torch.from_numpy(theta).float()]
    blur = sum(F.grid_sample(linear, g, padding_mode="reflection", align_corners=False)
               for g in grid) / frames
    return sharp, to_eight_bits(blur)


def made_ahead(make, workers):
    """make(step), computed ahead in DataLoader workers as long as steps are asked for in order."""
    stream, due = None, None

    def at(step):
        nonlocal stream, due
        if step != due:                           # a generator of its own leaves the global one alone
            stream = iter(DataLoader(range(step, 2 ** 62), batch_size=None, collate_fn=make,
                                     num_workers=workers, generator=torch.Generator()))
        due = step + 1
        try:
            return next(stream)
        except InputError as error:               # torch puts the worker's traceback before the line
            raise InputError(str(error).strip().splitlines()[-1].split("InputError: ", 1)[-1]) from None

    return at


def numbered_pair(seed, stream, size, number):
    """Pair `number` of stream 0 (train), 1 (validation) or 2 (test).

    Training pairs have blur from none to more than the net can mend, through lenses from sharp to soft, so
    that it learns what not to touch; and their sharp images keep .15 of the blurred ones. Scored pairs are
    all blurred, and soft as photographs are.
    Gain on six photographs, mean and worst, dB (seeds differ by .15): leaves blurred by 2 to 13 pixels -.03,
    -3.0; blur from none, soft lenses, stripes, calm scenes, thrice the pairs, --cap-db 30 .55, -.66; streaks,
    grain, depth of field .57, -.23; crops of 64 pixels, not 96, and twice the steps in the time .74, -.42;
    --cap-db 32 .75, -.15 (34: .63, -.19); averaged weights, with rates down to a quarter .80, -.15 (a tenth:
    .72, -.29); with those, --cap-db 30 .87, -.24 (3,200 steps .76, -.09); crops recoloured .99, -.08 (their
    channels in another order alone .84, -.10). What is learnt of made pairs overshoots on photographs: .85 of
    what nets of seven trainings changed gave .02 less in the mean, but -.07 to .11 in the worst scene, not
    -.37 to .09. So .15 of the blurred image stays in what is learnt; --cap-db 31.4 is 30 for errors so
    scaled. No gain from soft edges, L1 loss, other --batch, a quarter without blur, crops that grow from 48
    to 96, half or twice the rate.
    """
    rng = np.random.default_rng([seed, stream, number])
    if stream:
        return made_pair(size, rng, rng.uniform(5, 12), rng.uniform(1, 1.5))
    blurred = rng.random() > 0.15
    sharp, blur = made_pair(size, rng, blurred * rng.uniform(0, 14), 0.2 + 1.3 * rng.random() ** 2)
    return torch.lerp(sharp.float(), blur.float(), 0.15).round().byte(), blur


def made_pairs(seed, split, count, size):
    """The first `count` made pairs of a split, `size` pixels a side; each by (seed, split, its number)."""
    make = functools.partial(numbered_pair, seed, ("train", "val", "test").index(split), size)
    make = made_ahead(make, min(8, os.cpu_count() or 1)) if count > 16 else make
    tick, pairs = progress(f"making {split} pairs", count), []
    for i in range(count):
        pairs.append(tuple(image.clone() for image in make(i)))        # another process's holds a file open
        tick(i + 1)
    return pairs


# ------------------------------------------------------------------------------------ pairs on disk

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
FOLDERS = (("blur", "sharp"), ("blur", "gt"), ("input", "target"), ("inputC", "target"), ("source", "target"))


def photo(path, use):
    """use(PIL image of the file at `path`); InputError naming the file where it cannot be read."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("not a regular file")        # a pipe, say, would be waited for
        Image.MAX_IMAGE_PIXELS = 2 ** 28          # Pillow refuses twice as many, by default 179 megapixels
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            return use(image)
    except Exception as error:                    # Pillow raises many kinds on damaged files
        raise InputError(f"cannot read image {path} ({first_line(error)}): replace or remove it") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def eight_bits(image):
    """A PIL image of 16 or 32 bits or of floats -> 8-bit grey.

    White is 65535 where pixels have 16 bits, else the first of 1, 255 and 65535 that all but a fiftieth of
    the pixels stay below: highlights may exceed it by far, and sharpened edges a little.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    level = np.quantile(values, 0.98)
    tops = (65535,) if image.mode.startswith("I;16") or image.format in ("PNG", "PPM") else (1, 255, 65535)
    top = next((top for top in tops if level <= 1.01 * top), level)
    return Image.fromarray((values.clip(0, top) * (255 / top) + 0.5).astype(np.uint8))


def load_image(path):
    """Any image file -> RGB uint8 (3, H, W), upright (EXIF); what is deeper is scaled, not clipped."""
    def pixels(image):                            # a copy of a large photograph would cost much
        ImageOps.exif_transpose(image, in_place=True)
        image = eight_bits(image) if image.mode[0] in "IF" else image
        image = image if image.mode == "RGB" else image.convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    return photo(path, pixels)


def size_of(image):
    return f"{image.shape[-1]}x{image.shape[-2]}"


def load_pair(pair):
    """A pair of tensors as it is, or a pair of paths read from disk -> (sharp, blur) of equal size."""
    if torch.is_tensor(pair[0]):
        return pair
    sharp = load_image(pair[0])
    blur = sharp if pair[1] == pair[0] else load_image(pair[1])
    if sharp.shape != blur.shape:
        raise InputError(f"{pair[1]} is {size_of(blur)}, {pair[0]} {size_of(sharp)}: sizes must agree")
    return sharp, blur


def sized_pairs(pairs, smallest, use):
    """The pairs, by their headers found to be of one size each, with no side below `smallest` pixels."""
    upright = lambda image: image.size[::-1] if image.getexif().get(0x0112) in (5, 6, 7, 8) else image.size
    for sharp, blur in pairs:
        (width, height), other = photo(sharp, upright), photo(blur, upright)
        if (width, height) != other:
            raise InputError(f"{blur} is {other[0]}x{other[1]}, {sharp} {width}x{height}: sizes must agree")
        if min(width, height) < smallest:
            raise InputError(f"{sharp} is {width}x{height}, too small to be {use}: {smallest} is the least")
    return pairs


def images_in(folder):
    """The image files of a folder, whatever the case of their extensions; hidden files do not count."""
    return [f for f in folder.iterdir() if f.suffix.lower() in IMAGES and f.name[0] != "." and f.is_file()]


def by_name(folder):
    """{name: image file} of a folder; names lose extension and RealBlur's prefix, the folder's name."""
    files, prefix = images_in(folder), f"^{re.escape(folder.name)}_"
    names = {re.sub(prefix, "", f.stem, flags=re.IGNORECASE): f for f in files}
    if len(names) < len(files):
        twice = next(f for f in files if f not in names.values())
        raise InputError(f"{twice} differs from another image there by its extension only: remove one")
    return names


def match_names(sharp, blur):
    """Pairs of two folders by file name, never by position."""
    s, b = by_name(sharp), by_name(blur)
    for name in sorted(s.keys() ^ b.keys()):
        orphan, other = (s[name], blur) if name in s else (b[name], sharp)
        raise InputError(f"{orphan} has no partner in {other}: add it, or remove this file")
    return [(s[name], b[name]) for name in s]


def listed_pairs(path):
    """The pairs of a text file: `sharp blur` paths, relative to its folder, a pair a line, or # a comment."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text file: every line must be two paths, sharp and blurred") from None
    names = [line.split() for line in lines]
    pairs = [tuple(path.parent / name for name in line) for line in names if line and line[0][0] != "#"]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise InputError(f"{path}: every line must be two paths without spaces, sharp and blurred")
    return pairs


def pairs_below(root):
    """The pairs of a text file, or of the sibling folders below a folder (of FOLDERS the first), sorted."""
    if root.is_file():
        return listed_pairs(root)
    pairs, layouts = [], [tuple(name.lower() for name in names) for names in FOLDERS]
    for folder, inner, _ in os.walk(root, followlinks=True):
        real = Path(folder).resolve()             # links to folders that they are in would never end
        inner[:] = [name for name in inner
                    if name[0] != "." and not real.is_relative_to((real / name).resolve())]
        here = {name.lower(): Path(folder) / name for name in inner}
        layout = next((names for names in layouts if here.keys() >= set(names)), None)
        if layout:
            pairs += match_names(here[layout[1]], here[layout[0]])
            continue
        for name in sorted(set(sum(layouts, ())) & here.keys()):
            if images_in(here[name]):
                raise InputError(f"{here[name]} has images but no folder of partners: add that, or remove it")
    if not pairs:
        raise InputError(f"no pairs below {root}: it needs sibling folders such as blur and sharp")
    return sorted(pairs)


def split_root(path, split):
    """The file or folder in `path` that holds a split (SPLIT_c: DPDD's); None if there is none."""
    names = (f"{split}.txt", split, f"{split}_c")
    return next((path / name for name in names if (path / name).exists()), None)


def list_pairs(path, split):
    """Sorted [(sharp path, blur path), ...] of a split; `path`: a text file of pairs, or see `split_root`."""
    path = Path(path)
    root = path if path.is_file() else split_root(path, split)
    if root is None:
        raise InputError(f"no folder {path / split}: put {split} pairs there, say SCENE/blur and SCENE/sharp")
    return pairs_below(root)


def named_pairs(config):
    """{NAME: pairs} of --test: the test split of a folder that has one, else all pairs below it."""
    sets = {}
    for name, path in test_sets(config).items():
        if not path.exists():
            raise InputError(f"--test {name}={path}: there is no such folder or list")
        root = split_root(path, "test") if path.is_dir() else path
        if root is None and split_root(path, "train"):
            raise InputError(f"--test {name}={path} has a train split but no test split: give the set itself")
        sets[name] = sized_pairs(pairs_below(root or path), 11, "scored")
    return sets


def spread(items, most):
    """`most` of the items, or all where they are fewer, at equal distances from first to last."""
    picks = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[i] for i in picks]


def scenes_of(pairs):
    """{scene: its pairs}; a scene is the folder of the sharp file or, where all share one, that file."""
    folders, scenes = {sharp.parent.resolve() for sharp, _ in pairs}, {}
    for sharp, blur in pairs:
        scene = sharp.parent if len(folders) > 1 else sharp
        scenes.setdefault(scene.resolve(), []).append((sharp, blur))
    return scenes


def carved(pairs, most, seed):
    """Pairs of train -> (train, validation, words on how it was carved); no scene is on both sides.

    An eighth of the scenes is held back, at least one, at most `most`, never the largest. Of their pairs,
    `most` at equal distances become validation; the rest, frames of the same films, are in neither.
    """
    scenes = scenes_of(pairs)
    if len(scenes) < 2:
        raise InputError(f"{pairs[0][0]}: training pairs show one scene; at least 2 are needed, to validate")
    largest = max(scenes, key=lambda scene: len(scenes[scene]))
    others = [scene for scene in scenes if scene != largest]
    order = np.random.default_rng([seed, 3]).permutation(len(others))
    held_back = {others[i] for i in order[:min(most, max(1, len(scenes) // 8))]}
    back = [pair for scene in scenes if scene in held_back for pair in scenes[scene]]
    train = [pair for scene in scenes if scene not in held_back for pair in scenes[scene]]
    val = spread(back, most)
    words = (f"Validation: {len(val)} of the {len(back)} pairs of {len(held_back)} of {len(scenes)} scenes, "
             "none of which is in train.")
    if all(scene.is_file() for scene in scenes):
        words = (f"Validation: {len(val)} of {len(pairs)} pairs. All share one folder, so they were carved "
                 "by image: what they show may be on both sides.")
    return train, val, words


def split_pairs(config, split):
    """The pairs of 'train', 'val' or 'test'. Validation is carved from train; test is never train."""
    if not config.data:
        count = config.made_train if split == "train" else config.made_test
        return made_pairs(config.seed, split, count, config.made_size)
    if Path(config.data).is_file():
        raise InputError(f"--data {config.data} is a file: give a folder with lists train.txt and test.txt")
    if split == "test":
        return sized_pairs(list_pairs(config.data, "test"), 11, "scored")
    pairs = list_pairs(config.data, "train")
    pairs = sized_pairs(pairs, max(11, config.crop), f"cropped at --crop {config.crop}")
    train, val, _ = carved(pairs, config.val_pairs, config.seed)
    order = np.random.default_rng([config.seed, 4]).permutation(len(train))
    return val if split == "val" else [train[i] for i in order]


def missing_pairs(config, count):
    """What `count` own training pairs lack: those missing from --few, `count` at least; 0 if not few."""
    few = config.data and not config.from_ and count < config.few
    return max(config.few - count, count) if few else 0


def few_words(config, count):
    """That `count` own training pairs are few, and what share of all crops made ones take; "" if not few."""
    missing = missing_pairs(config, count)
    words = (f"{count} training pairs are few (--few): {config.made_train} made ones take "
             f"{missing / (missing + count):.0%} of all crops.")
    return words * bool(missing)


def splits_words(config):
    """How validation was carved, and what joined few training pairs, for the report."""
    if not config.data:
        return ("Train, validation and test are made pairs of different random streams; those that are "
                "scored are all blurred, by 5 to 12 pixels.")
    train, _, words = carved(list_pairs(config.data, "train"), config.val_pairs, config.seed)
    return f"{words} {few_words(config, len(train))}".rstrip()


def training_pairs(config, split="train"):
    """Train or, where that is a few photographs, train and made pairs; adaptation keeps to train.

    Crops are shared as own pairs are to `missing_pairs`: 400 steps on one scene alone scored 9 dB below the
    blurred input on another. Six scenes, each left out in turn, two or four crops of the others (10 or 12
    pairs) to train on, base over blurred input: by halves .64 dB in the mean and -.03 in the worst, so .79
    and .12.
    """
    own = split_pairs(config, split)
    missing = missing_pairs(config, len(own))
    if not missing:
        return own
    say(few_words(config, len(own)))
    made = made_pairs(config.seed, "train", config.made_train, max(config.made_size, config.crop))
    mixed = own * max(1, round(len(made) / missing)) + made * max(1, round(missing / len(made)))
    return [mixed[i] for i in np.random.default_rng([config.seed, 5]).permutation(len(mixed))]


# ------------------------------------------------------------------------------------------ batches

def as_batch(images, device="cpu"):
    """uint8 (B, 3, H, W), or as many (3, H, W) -> float32 (B, 3, H, W) in [0, 1], channels_last."""
    batch = torch.stack(list(images)).to(device).float() / 255
    return batch.contiguous(memory_format=torch.channels_last)


def crop_pair(pair, crop, draw):
    """(sharp, blur) -> (blur, sharp) uint8 (3, crop, crop); draw: of place, turns, flip, in [0, 1)^4."""
    height, width = pair[0].shape[-2:]
    top, left = int(draw[0] * (height - crop + 1)), int(draw[1] * (width - crop + 1))
    window = [torch.rot90(image[:, top:top + crop, left:left + crop], int(4 * draw[2]), (1, 2))
              for image in pair[::-1]]
    return [image.flip(2) if draw[3] < 0.5 else image for image in window]


def recoloured(images, draw):
    """Images uint8 (3, H, W), channels shuffled, in half of all cases each times a factor of 0.4 to 1.

    As under another light: to scale a channel of gamma 2.2 is to scale its linear light, so blur stays true.
    draw: of order, factors and which half, in [0, 1)^7.
    """
    order, factors = np.argsort(draw[:3]), np.where(draw[6] < 0.5, 1, 0.4 + 0.6 * draw[3:6])
    factors = torch.from_numpy(factors).float().reshape(3, 1, 1)
    return [(image[order] * factors + 0.5).to(torch.uint8) for image in images]


def random_crops(pairs, seed, crop, batch, share, read, recolour, step):
    """This rank's crops of one step, share (rank, ranks): blurred and sharp, uint8 (b, 3, crop, crop).

    At random places, flipped and turned and, where asked for, `recoloured`.
    """
    draws, taken = np.random.default_rng([seed, step]).random((batch, 12))[share[0]::share[1]], []
    for draw in draws:
        pair = pairs[int(draw[0] * len(pairs))]
        images = crop_pair(read(pair), crop, draw[1:5])
        taken.append(recoloured(images, draw[5:]) if recolour else images)
    return [torch.stack(images) for images in zip(*taken)]


def crops(pairs, seed, crop, batch, workers=0, share=(0, 1)):
    """A function step -> (blur, sharp), each uint8 (batch, 3, crop, crop): see `random_crops`.

    A pure function of (seed, step), so a loop resumed at any step continues bit for bit. workers: processes
    that decode ahead. share (rank, ranks): which images of the batch it is to be, rank, rank + ranks, ..
    Made pairs, which are tensors, are recoloured, and so are the few photographs that they join; photographs
    alone keep their colours, as in NAFNet's recipe.
    """
    if batch < share[1]:
        raise InputError(f"--batch {batch} is too small for {share[1]} ranks: give at least as many crops")
    read = load_pair if workers else functools.lru_cache(8)(load_pair)
    recolour = any(torch.is_tensor(sharp) for sharp, _ in pairs)
    make = functools.partial(random_crops, pairs, seed, crop, batch, share, read, recolour)
    return made_ahead(make, workers) if workers else make


# ------------------------------------------------------------------------------------------ metrics

def image_psnr(x, y):
    """Peak signal-to-noise ratio in dB, peak 1.0, of each image of (B, 3, H, W), or of one (3, H, W)."""
    return -10 * (x - y).square().mean((-3, -2, -1)).log10()


def psnr(x, y):
    """Peak signal-to-noise ratio in dB, peak 1.0: per image (B, 3, H, W), then averaged -> scalar."""
    return image_psnr(x, y).mean()


def ssim(x, y):
    """Structural similarity (Wang et al. 2004) of (B, 3, H, W) or (3, H, W), averaged -> scalar.

    11x11 Gaussian window, sigma 1.5, valid region, per channel, population covariance, peak 1.0; float64.
    """
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"ssim: an image of {size_of(x)} is smaller than the 11x11 window")
    smooth = lambda z: gaussian_filter(z, 1.5, radius=5, axes=(-1, -2))[..., 5:-5, 5:-5]   # to H-10, W-10
    x, y = (image.double().cpu().numpy() for image in (x, y))
    mx, my = smooth(x), smooth(y)
    vx, vy, cov = smooth(x * x) - mx * mx, smooth(y * y) - my * my, smooth(x * y) - mx * my
    score = (2 * mx * my + 0.01 ** 2) * (2 * cov + 0.03 ** 2)
    return torch.tensor((score / ((mx * mx + my * my + 0.01 ** 2) * (vx + vy + 0.03 ** 2))).mean())


def quantize(x):
    """Clamp to [0, 1] and round to 8 bits, as published scores are."""
    return (x.clamp(0, 1) * 255).round() / 255


def restore(net, blur, device="cpu"):
    """uint8 images (B, 3, H, W) through the net -> quantized float (B, 3, H, W)."""
    with torch.inference_mode():
        return quantize(net(as_batch(blur, device)))


def alike(pairs, pixels=2 ** 16):
    """Loaded pairs in order, in groups of one size and about `pixels` in all: twice as fast as one by one."""
    for size, of_size in itertools.groupby(map(load_pair, pairs), lambda pair: pair[0].shape):
        count = math.ceil(pixels / math.prod(size[1:]))
        while group := list(itertools.islice(of_size, count)):
            yield group


def image_scores(net, pairs, device="cpu", with_ssim=True, label=""):
    """PSNR (dB, at most 100) and SSIM of every image; net None: of the blurred input; label: of progress."""
    db, structure, tick = [], [], progress(label, len(pairs)) if label else lambda done: None
    for group in alike(pairs):
        sharp, blur = zip(*group)
        output = as_batch(blur, device) if net is None else restore(net, blur, device)
        target = as_batch(sharp, device)
        db += image_psnr(output, target).clamp(max=100).tolist()       # an exact one's is infinite
        structure += [ssim(*pair).item() if with_ssim else math.nan for pair in zip(output, target)]
        tick(len(db))
    return {"psnr_db": db, "ssim": structure}


def means(scores):
    return {key: statistics.fmean(values) for key, values in scores.items()}


def evaluate(net, pairs, device="cpu", with_ssim=True, label=""):
    """The means of `image_scores`."""
    return means(image_scores(net, pairs, device, with_ssim, label))


def score_nets(nets, pairs, device="cpu", label=""):
    """{"pairs": how many, "blurred": score of the input, name: score of each of nets {name: net}}."""
    return {"pairs": len(pairs), "blurred": evaluate(None, pairs, device),
            **{name: evaluate(net, pairs, device, label=f"{label}: {name}") for name, net in nets.items()}}


def protocol(window):
    """How images are scored by nets with this attention window, in words."""
    reach = f"a local window of {window} pixels (--tlc)" if window else "the whole image"
    return ("Protocol: whole RGB images, outputs clamped and rounded to 8 bits, no border crop, "
            f"no alignment; channel attention averages over {reach}.")


# ------------------------------------------------------------------------- nets in and out of artefacts

def new_net(width, enc, middle, dec, seed, window=None):
    """An untrained NAFNet; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return blocks.NAFNet(width, tuple(enc), middle, tuple(dec), window).eval()


def state_of(net):
    """A net's parameters and statistics, on the CPU."""
    return {name: value.cpu() for name, value in net.state_dict().items()}


def load_weights(path):
    """A checkpoint of the authors ({"params": state dict} or that dict), base.pt or base.part -> NAFNet.

    Of a base.part: the weights of its last step, not their average so far.
    """
    params = read_file(Path(path), "give a NAFNet state dict")
    for key in ("params", "model"):
        params = params.get(key, params) if isinstance(params, dict) else {}
    try:
        return blocks.load_authors(params)
    except ValueError as error:
        raise InputError(f"{path} holds no NAFNet state dict ({str(error)[:300]}): give one") from None


def filled(module, params, file):
    """The module, in place, with the parameters of an artefact, in eval mode."""
    try:
        module.load_state_dict(params)
    except RuntimeError as error:
        why = f"{file} does not fit the blocks of this program ({' '.join(str(error).split())[:300]})"
        raise InputError(f"{why}: delete it, and it is made anew") from None
    return module.eval()


def base_net(base, device="cpu"):
    """The net of artefact `base`, with the attention window of every stage."""
    net = blocks.load_authors(base["params"])
    blocks.set_window(net, base["arch"]["window"])
    return net.to(device)


def option_names(no_block):
    """The names of all options, in order; no_block: whether no block at all is one of them."""
    return [block.__name__ for block in blocks.BLOCKS + (blocks.NoBlock,) * bool(no_block)]


def choice_of(sites, options):
    return dict(zip(sites, map(int, options)))


def without(gone):
    """The choice that leaves out these blocks."""
    return dict.fromkeys(gone, len(blocks.BLOCKS))


def chosen_net(finetune, device="cpu"):
    """The net of artefact `finetune`; its options are known by their names."""
    names, choice = option_names(no_block=True), {}
    for site, k in finetune["choice"].items():
        name = finetune["options"][k]
        if name not in names:
            raise InputError(f"finetuned.pt has {name} at {site}, no such block here: use the program that "
                             "made it, or make it anew")
        choice[site] = names.index(name)
    net = new_net(**finetune["arch"], seed=0)
    surrogates = {site: {k: blocks.new_surrogate(net, site, k, 0)} for site, k in choice.items() if k}
    return filled(blocks.assemble(net, surrogates, choice), finetune["params"], "finetuned.pt").to(device)


# --------------------------------------------------------------------------------------- the stages

def trained(job, net, steps, lr, label, file, seed):
    """`blocks.train` on crops of the training pairs; ranks take a share of every batch; kept in out/FILE."""
    config, ranks = job.config, world()
    own = crops(job.pairs("train"), seed, config.crop, config.batch, config.workers, (rank(), ranks))

    def batch_at(step):
        blur, sharp = (as_batch(images, job.device) for images in agreed(lambda: own(step)))
        return (blur, sharp, len(blur) * ranks / config.batch) if ranks > 1 else (blur, sharp)

    state = resumed(job, file)
    wrap = functools.partial(DistributedDataParallel, forward_sync_buffers=False) if ranks > 1 else None
    with warnings.catch_warnings():               # of DDP: strides differ, but only along axes of length 1
        warnings.filterwarnings("ignore", "Grad strides")
        return blocks.train(net, batch_at, steps, lr, config.amp, state,
                            keeper(job, file, label, steps, state), wrap, config.grad_clip, config.cap_db,
                            config.average)


def stage_base(job):
    """Section II: the base net, trained here or read from --weights."""
    config, window = job.config, window_of(job.config)
    if config.weights:
        net = load_weights(config.weights).to(job.device)
    else:
        net = new_net(config.width, config.enc, config.middle, config.dec, config.seed).to(job.device)
        net = trained(job, net, config.base_steps, config.base_lr, "base", "base.part", config.seed)
    blocks.set_window(net, window)
    score = evaluate(net, job.pairs("val"), job.device)
    if not math.isfinite(score["psnr_db"]):
        remedy = f"give other weights than {config.weights}" if config.weights else "lower --base-lr"
        raise InputError(f"base: validation gives {score['psnr_db']} dB: {remedy}")
    params = state_of(net)
    return {"params": params, "arch": {**blocks.architecture(params), "window": window}, "val": score}


def stage_saliency(job, base):
    """Section II-A, table 1: six measures on one minibatch, and the stage that stays."""
    config, net = job.config, base_net(base, job.device)
    # A minibatch of 32 of the demo's crops, 64x64, misjudged the critical stage.
    count = max(16, min(128, 2 ** 19 // config.crop ** 2))
    batch = crops(job.pairs("train"), config.seed + 1, config.crop, count)(0)
    loss = functools.partial(blocks.psnr_loss, cap_db=config.cap_db)
    scores = blocks.saliency(net, *(as_batch(images, job.device) for images in batch), loss)
    kept = blocks.critical_stages(scores, config.keep if config.space == "all" else 1)
    sites = [site for site in blocks.site_names(net) if site.split(".")[0] not in kept]
    if not sites:
        raise InputError(f"--keep {config.keep} leaves no block to change: give less")
    return {"scores": scores, "mean_ranks": blocks.mean_ranks(scores), "sites": sites,
            "critical": kept or blocks.critical_stages(scores)}


def hub(job):
    """Arguments of `profile_device.profile_hub`."""
    config = job.config
    return {"device": config.hub_device, "runtime": config.hub_runtime, "precision": config.hub_precision,
            "options": config.hub_options, "force": job.anew, "jobs": job.out / "profile_jobs.json"}


def at_frame(image, frame):
    """uint8 (3, H, W) -> float32 (1, 3, *frame) in [0, 1]: its middle, or mirrored beyond its borders."""
    more = [(0, 0), *((0, max(0, side - have)) for side, have in zip(frame, image.shape[1:]))]
    image = np.pad(image.numpy(), more, mode="symmetric")
    top, left = ((have - side) // 2 for side, have in zip(frame, image.shape[1:]))
    return image[None, :, top:top + frame[0], left:left + frame[1]].astype(np.float32) / 255


def calibration(job):
    """A function () -> blurred training images at the profiled size, to quantise with; read if asked for."""
    return functools.cache(lambda: [at_frame(load_pair(pair)[1], job.config.frame)
                                    for pair in spread(job.pairs("train"), job.config.calibration)])


def judged(job, net, images, count=4):
    """`profile_device.Data` that runs a few validation images on the device: PSNR in dB there and here.

    images () -> what to calibrate with; agreement_db: PSNR of the device's output against ours.
    """
    pairs = [[at_frame(image, job.config.frame) for image in load_pair(pair)]
             for pair in spread(job.pairs("val"), count)]
    sharp, blur = (torch.from_numpy(np.concatenate(images)) for images in zip(*pairs))
    with torch.inference_mode():
        here = torch.cat([quantize(net(x.to(job.device)).cpu()) for x in blur.split(1)])

    def judge(outputs):
        there = torch.from_numpy(np.concatenate(outputs).astype(np.float32))
        there = quantize(there.movedim(-1, 1) if there.shape[1:] == (*job.config.frame, 3) else there)
        if there.shape != here.shape:
            there = torch.full_like(here, math.nan)
        return {"pairs": len(pairs), "device_db": psnr(there, sharp).item(),
                "here_db": psnr(here, sharp).item(), "agreement_db": min(psnr(there, here).item(), 100.0)}

    return profile_device.Data(images, tuple(x.numpy() for x in blur.split(1)), judge)


def stage_profile(job, base, saliency):
    """Section II-A, table 2: the latency of every option at every site."""
    config, net, sites = job.config, base_net(base), saliency["sites"]
    count = len(option_names(config.space == "all"))
    surrogates = {site: {k: blocks.new_surrogate(net, site, k, config.seed) for k in range(1, count)}
                  for site in sites}
    measure = profile_device.latency_table
    if config.target == "local":
        say(f"profile: timing {count} options at {len(sites)} sites, inside the whole net ...")
        measure = functools.partial(profile_device.afresh, measure)
    if config.target == "qai-hub":
        how = {**hub(job), "inside": config.hub_blocks == "net", "calibration": calibration(job)}
        measure = functools.partial(measure, hub=how)
    try:
        table = measure(net, surrogates, sites, config.frame, config.target, blocks.deploy, job.device)
    except ValueError as error:
        raise InputError(str(error)) from None
    say(*profile_device.remarks(table))
    return table


def stage_distill(job, base, saliency):
    """Section II-B: every surrogate imitates its block, on its own; the ranks share them out.

    What one option at all sites loses as it is scored, mean of the six, seeds 0 and 1, dB: 150 steps at a
    first rate of 4e-3 .68 .63, of 8e-3 .41 .51, of 1.6e-2 .36 .47; 300 at 1.2e-2 .26 .39. No gain from batch
    norms of a third or a tenth of the momentum.
    """
    config, sites, pairs = job.config, saliency["sites"], job.pairs("train")
    blurred = [(blur, blur) for _, blur in pairs[:max(1, round(config.distill_share * len(pairs)))]]
    own = crops(blurred, config.seed + 2, config.crop, config.batch, config.workers, (rank(), world()))
    students = [(site, k) for k in range(1, len(blocks.BLOCKS)) for site in sites]   # ranks get like work
    state = resumed(job, "surrogates.part")
    surrogates, losses = blocks.distill(
        base_net(base, job.device), sites,
        lambda step: as_batch(whole_batch(agreed(lambda: own(step))[0], config.batch), job.device),
        config.distill_steps, config.distill_lr, config.seed, students[rank()::world()] or students[:1],
        config.amp, state, keeper(job, "surrogates.part", "distill", config.distill_steps, state, joint=True))
    everything = merged(gather({(site, k): (state_of(student), losses[site][k])
                                for site, row in surrogates.items() for k, student in row.items()}))
    params, last, diverged = {site: {} for site in sites}, {site: {} for site in sites}, []
    for site, k in students:
        student, curve = everything[site, k]
        if finite(student) and all(map(math.isfinite, curve)):
            params[site][k] = {sys.intern(name): p for name, p in student.items()}  # names of one rank or two
            last[site][k] = statistics.fmean(curve[-10:]) if curve else None
        else:
            diverged.append([site, k])
            say(f"distill: option {k} at {site} diverged and is left out; a lower --distill-lr may help")
    return {"params": params, "losses": last, "diverged": diverged}


def assembler(job, net, distill):
    """A function {site: option} -> the net with these options, as it is scored and as fine-tuning finds it.

    Plug and play (II-C), and where there is a swap, the last convolution fitted to --refit training crops.
    """
    config, batches = job.config, []
    surrogates = {site: {k: filled(blocks.new_surrogate(net, site, k, config.seed), params, "surrogates.pt")
                         for k, params in row.items()} for site, row in distill["params"].items()}
    if config.refit:
        own = crops(job.pairs("train"), config.seed + 3, config.crop, config.refit)
        batches = blocks.few_at_once(*(as_batch(images, job.device) for images in agreed(lambda: own(0))))

    def assembled(choice):
        new = blocks.assemble(net, surrogates, choice).eval()
        return blocks.refit(new, batches, config.cap_db) if batches and any(choice.values()) else new

    return assembled


def scorer(assembled, sites, val, device):
    """The base net's validation PSNR in dB, and score(options) -> dB lost against it; see `assembler`."""
    def val_db(choice):
        db = evaluate(assembled(choice), val, device, with_ssim=False)["psnr_db"]
        return db if math.isfinite(db) else 0.0   # an output that is not finite: 0 dB

    base_db = val_db({})
    return base_db, lambda options: base_db - val_db(choice_of(sites, options))


def taken_back(options):
    """{position: the configuration with that one swap taken back}."""
    return {i: options[:i] + (0,) + options[i + 1:] for i, option in enumerate(options) if option}


def swap_effects(evaluation, scored, sites, profile):
    """What each swap of a configuration costs in dB and saves in predicted ms, by taking it back alone."""
    back = taken_back(evaluation.options)
    ms = lambda options: profile_device.network_ms(profile, choice_of(sites, options))
    return {"cost_db": {sites[i]: evaluation.loss_db - scored[options] for i, options in back.items()},
            "saved_ms": {sites[i]: ms(options) - ms(evaluation.options) for i, options in back.items()}}


def score_new(score, scored, keep, proposals):
    """[dB lost by each proposal]; what is not in `scored` is added, each scored by one rank, and kept."""
    if any(each != proposals for each in gather(proposals)):           # scores would be mixed up
        raise InputError("the ranks propose different nets, as their machines round differently: "
                         "run --stage search and --stage control on machines of one kind")
    new = [options for options in proposals if options not in scored]
    for i in range(0, len(new), world()):
        chunk = new[i:i + world()]
        own = agreed(lambda: score(chunk[rank()]) if rank() < len(chunk) else None)
        scored.update(zip(chunk, gather(own)))
        keep()
    return [scored[options] for options in proposals]


def useful(front, losses, gain_db, limits=(math.inf, math.inf)):
    """The positions in `front` of what loses less dB than the base gains over its input.

    What loses more is worse than no net at all, which takes no time. All, where the base gains nothing, or
    where limits (see `wished`) say what is wanted.
    """
    return [i for i in front if losses[i] < gain_db or gain_db <= 0 or any(map(math.isfinite, limits))]


def without_base(history, positions):
    """`positions` in history without the base net's, unless that is the only one."""
    return [i for i in positions if any(history[i].options)] or positions


WON_BACK_DB = 0.2       # lost before fine-tuning, which usually wins that back, or nearly


def best_compromises(history, count, limits=(math.inf, math.inf), gain_db=math.inf):
    """(the front, at most `count` candidates from it, in order), as positions in history.

    limits: the most loss in dB and the most penalty of a candidate. First is what lies furthest below the
    chord of the `useful` front or, where only one objective is limited, what is best in the other. Second is
    the fastest that loses at most WON_BACK_DB, as the first may lie far out in wide spaces; then the others,
    by the first rule. What is too near an earlier one, be it the second, comes last (`search.apart`). The
    base is a candidate only where it is alone on the `useful` front.
    """
    Y, limited = np.array([e[1:] for e in history]), np.isfinite(limits)
    whole = search.front_of(Y)
    front = useful(whole, Y[:, 0], gain_db, limits)
    order = [front[i] for i in search.knee(Y[front], len(front))]
    if limited.sum() == 1:
        order.sort(key=lambda i: Y[i, limited.argmin()])
    order = [i for i in without_base(history, order) if (Y[i] <= limits).all()]
    second = min((i for i in order if Y[i, 0] <= WON_BACK_DB), key=lambda i: Y[i, 1], default=None)
    order = sorted(order, key=lambda i: (i != order[0], i != second))
    taken = search.apart(Y[front], [front.index(i) for i in order], count)
    return whole, [front[i] for i in taken]


def wished(config, profile):
    """Most loss in dB and most penalty that --max-loss-db and --max-ms leave a candidate; infinite: any."""
    total = sum(row[0] for row in profile["sites"].values()) * profile["scale"]
    penalty = (config.max_ms - profile["rest_ms"]) / total + 1e-9
    return config.max_loss_db or math.inf, penalty if config.max_ms else math.inf


def refuse_wish(config, rows):
    """InputError naming what comes nearest: nothing of the front, [(loss_db, ms), ...], meets the flags."""
    limits = {"--max-loss-db": config.max_loss_db, "--max-ms": config.max_ms}
    excess = lambda row: max(value / limit for value, limit in zip(row, limits.values()) if limit)
    loss_db, ms = min(rows, key=excess)
    given = " and ".join(f"{name} {limit:g}" for name, limit in limits.items() if limit)
    raise InputError(f"no net that was found meets {given}; the nearest is predicted to take {ms:.4g} ms and "
                     f"to lose {loss_db:.3g} dB: allow as much, or search on with more --evaluations")


def with_swaps_back(history, candidates, score_all, penalty):
    """The history, with each candidate's swaps taken back one by one and scored -> (all, front, candidates).

    candidates(history) -> (front, candidates), as positions in it. What is scored so may become a candidate
    itself, and so on.
    """
    while True:
        front, knee = candidates(history)
        known = {e.options for e in history}
        back = dict.fromkeys(itertools.chain(*(taken_back(history[i].options).values() for i in knee)))
        new = [options for options in back if options not in known]
        if not new:
            return history, front, knee
        history = history + [search.evaluated(o, db, penalty) for o, db in zip(new, score_all(new))]


def searched(job, score, penalty):
    """The search, from where it was left -> (history, {options: loss_db} of all scored so far, score_all)."""
    config = job.config
    fixed = {k: v for k, v in job.head["config"].items() if k not in GOES_ON}
    before = job._replace(head={**job.head, "config": fixed})          # with fewer evaluations, say
    found = resumed(before, "search.part", "proposed") or resumed(before, "search.json", "proposed") or {}
    scored = {tuple(row["options"]): row["loss_db"] for row in found.get("evaluations", [])}
    proposed = list(scored)[:min(found.get("proposed", 0), config.evaluations)]
    history = [search.evaluated(options, scored[options], penalty) for options in proposed]
    tick = progress("search", config.evaluations, len(history))

    def keep():                                   # proposals first; what else is known is not scored twice
        rows = [{"options": list(o), "loss_db": scored[o]} for o in dict.fromkeys([*proposed, *scored])]
        part = {"evaluations": rows, "proposed": len(proposed)}
        first(lambda: saved(job.out / "search.part", part, job.head))

    def each(history):
        proposed[:] = [e.options for e in history]
        volume = search.hypervolume([e[1:] for e in history], search.default_ref(history, penalty))
        tick(len(history), lambda: f"hypervolume {volume:.3f}")

    score_all = functools.partial(score_new, score, scored, keep)
    with warnings.catch_warnings(record=True) as ended:
        history = search.search(score, penalty, config.evaluations, np.random.default_rng(config.seed),
                                history=history, batch=world(), map=lambda _, new: score_all(new), each=each)
    say(*(str(warning.message) for warning in ended))
    return history, scored, score_all


def stage_search(job, base, saliency, profile, distill):
    """Section II-C: Bayesian search over all configurations; scored without training."""
    config, sites, net = job.config, saliency["sites"], base_net(base, job.device)
    penalty = search.penalties(profile, sites, distill["diverged"])
    val = [load_pair(pair) for pair in job.pairs("val")]
    base_db, score = scorer(assembler(job, net, distill), sites, val, job.device)
    history, scored, score_all = searched(job, score, penalty)
    proposed, limits = len(history), wished(config, profile)
    gain_db = first(lambda: base_db - evaluate(None, val, job.device, with_ssim=False)["psnr_db"])
    candidates = functools.partial(best_compromises, count=config.candidates, limits=limits, gain_db=gain_db)
    history, front, knee = with_swaps_back(history, candidates, score_all, penalty)
    ms = [profile_device.network_ms(profile, choice_of(sites, e.options)) for e in history]
    if not knee:
        refuse_wish(config, [(history[i].loss_db, ms[i]) for i in without_base(history, front)])
    Y, ref = np.array([e[1:] for e in history]), search.default_ref(history, penalty)
    part = useful(front, Y[:, 0], gain_db, limits)
    below = dict(zip(part, search.below_chord(Y[part]).tolist()))
    return {"sites": sites, "evaluations": [{**e._asdict(), "latency_ms": t} for e, t in zip(history, ms)],
            "proposed": proposed, "front": front, "knee": knee,
            "base_val_db": base_db, "gain_db": gain_db, "below_chord": [below[i] for i in knee],
            "space": math.prod(map(len, search.available(penalty))), "ref": ref.tolist(),
            "hypervolume": search.hypervolume(Y, ref),
            "taken_back": [swap_effects(history[i], scored, sites, profile) for i in knee]}


def picked(candidates, pick):
    """Position of the best (PSNR on validation), the fastest or the near-best candidate: see PICKS."""
    best = max(row["val_after_db"] for row in candidates)
    least = {"best": best, "near-best": best - NEAR_DB, "fastest": -math.inf}[pick]
    return min((n for n, row in enumerate(candidates) if row["val_after_db"] >= least),
               key=lambda n: candidates[n]["latency_ms"])


def stage_finetune(job, base, distill, search):
    """Section II-C: nets of the front, its knee first, trained on all pairs; one is picked.

    With crops of 96, eight ReluBN blocks (1.3x) end .17 dB below the base after 200 steps at a first rate of
    5e-4, .05 after 400, .03 at 1e-3. Averaged weights gain .05, 1,000 steps end .1 to .2 above 600 (so they
    do for the base). No gain from twice the batch, betas of .9 .99, twice the rate, new batch norm
    statistics, the base's output as half of the target or all of it.
    """
    config, sites, tuned, rows = job.config, search["sites"], [], []
    assembled = assembler(job, base_net(base, job.device), distill)
    for n, i in enumerate(search["knee"], start=1):
        row = search["evaluations"][i]
        start = assembled(choice_of(sites, row["options"]))
        label, part = f"finetune {n} of {len(search['knee'])}", f"finetuned.{n}.part"
        tuned.append(trained(job, start, config.finetune_steps, config.finetune_lr, label, part,
                             config.seed + 4))
        after = evaluate(tuned[-1], job.pairs("val"), job.device)["psnr_db"]
        if math.isnan(after):
            raise InputError(f"finetune: candidate {n} diverged: lower --finetune-lr {config.finetune_lr}")
        rows.append({**row, "val_before_db": search["base_val_db"] - row["loss_db"], "val_after_db": after})
    best = picked(rows, config.pick)
    return {"params": state_of(tuned[best]), "arch": base["arch"], "picked": best, "candidates": rows,
            "choice": choice_of(sites, rows[best]["options"])}


def stage_adapt(job):
    """Section III-C: a net found on other data, fine-tuned on --data without a search; before and after."""
    config = job.config
    found = loaded(Path(config.from_), {"stage": "finetune"}, "give a finetuned.pt")
    sets = {"validation": job.pairs("val"), "test": job.pairs("test"), **named_pairs(config)}
    before = chosen_net(found, job.device)
    window = window_of(config) or found["arch"]["window"]              # the net that was found keeps its own
    blocks.set_window(before, window)
    after = trained(job, before, config.finetune_steps, config.finetune_lr, "finetune", "finetuned.part",
                    config.seed + 4)
    nets = {"before": before, "after": after}
    return {"params": state_of(after), "arch": {**found["arch"], "window": window}, "choice": found["choice"],
            "gmacs": blocks.count_macs(blocks.deploy(after), (1, 3, *config.frame)) / 1e9,
            "protocol": protocol(window),
            "scores": {name: score_nets(nets, pairs, job.device, name) for name, pairs in sets.items()}}


def random_nets(sites, base, count, rng):
    """{options as text: (choice, net)} of `count` random configurations, untrained, on the deployed base."""
    surrogates = {site: {k: blocks.deploy(blocks.new_surrogate(base, site, k, 0))
                         for k in range(1, len(row))} for site, row in sites.items()}
    choices = [choice_of(sites, rng.integers(0, [len(row) for row in sites.values()])) for _ in range(count)]
    return {" ".join(map(str, c.values())): (c, blocks.assemble(base, surrogates, c)) for c in choices}


def time_nets(entries, device="cpu", rounds=30):
    """Whole nets {name: (deployed net, shape)} -> ({name: ms}, Kendall's tau of two halves of the rounds).

    Each half has a process of its own. Their tau, without the net "base", tells how well timing repeats.
    """
    halves = [profile_device.afresh(profile_device.time_together, entries, device, rounds // 2, warmup=1,
                                    calls=1) for _ in range(2)]
    pair = [profile_device.settled({name: ms for name, ms in half.items() if name != "base"})
            for half in halves]
    repeat_tau = float(kendalltau(*(list(ms.values()) for ms in pair)).statistic)
    return profile_device.settled({name: halves[0][name] + halves[1][name] for name in entries}), repeat_tau


def sums(table, choices, measured, where):
    """Predicted against measured ms of the nets {name: choice} that were measured, {name: ms or None}.

    drift: how much slower the base net was than when the table was made; predicted_ms is the table's sum
    times it, error_as_profiled the error without it. The base net, right by construction, has a row, but no
    part in the errors and in Kendall's tau.
    """
    known = {name: measured[name] for name in choices if measured[name] is not None}
    drift = known["base"] / table["base_ms"] if "base" in known and table["base_ms"] else 1.0
    rows = [{"net": name, "predicted_ms": drift * profile_device.network_ms(table, choices[name]),
             "measured_ms": ms} for name, ms in known.items()]
    pairs = [(row["predicted_ms"], row["measured_ms"]) for row in rows if row["net"] != "base"]
    error = lambda pace: statistics.fmean(abs(p / pace / m - 1) for p, m in pairs) if pairs else None
    return {"rows": rows, "drift": drift, "measured_on": where if rows else None,
            "tau": float(kendalltau(*zip(*pairs)).statistic) if len(pairs) > 2 else None,
            "mean_relative_error": error(1.0), "error_as_profiled": error(drift)}


WHERE = ("device", "runtime", "precision", "hub options", "threads", "statistic", "date")      # of latency


def time_whole(job, table, nets):
    """Latency of whole nets {name: deployed net}, where `table` is from -> ({name: ms or None}, where, more).

    more: repeat_tau as `time_nets` has it; on a phone also hub, {name: result of
    `profile_device.profile_hub`}, where base and chosen net restore pictures as well.
    """
    config, shape = job.config, (1, 3, *job.config.frame)
    where = {key: table[key] for key in (*WHERE, "frame") if key in table}
    if config.target == "paper":
        return dict.fromkeys(nets), where, {"repeat_tau": None}
    if config.target == "local":
        say(f"timing {len(nets)} whole nets ...")
        measured, repeat_tau = time_nets({name: (net, shape) for name, net in nets.items()}, job.device)
        return measured, {**where, **profile_device.machine(job.device)}, {"repeat_tau": repeat_tau}
    images = calibration(job)
    entries = {name: (copy.deepcopy(net).cpu(), shape, judged(job, net, images)
                      if name in ("base", "chosen") else profile_device.Data(images))
               for name, net in nets.items()}
    found = profile_device.profile_hub(entries, **hub(job))
    say(*profile_device.remarks({"modules": found}))
    return {name: result["ms"] for name, result in found.items()}, where, {"repeat_tau": None, "hub": found}


FLOAT16 = 65504                                   # its largest number


def within_float16(net, pairs, device):
    """(the deployed net, [what float16 cannot hold of what it computes, in words]), by running it here."""
    images = [as_batch([load_pair(pair)[1]], device) for pair in pairs]
    beyond = lambda net: {name: size for name, size in blocks.magnitudes(net, images).items()
                          if size > FLOAT16}
    deployed, lines = blocks.deploy(net), []
    large = beyond(deployed)
    norms = {name: size for name, size in large.items() if "in layer norm" in name and math.isfinite(size)}
    if norms:                                     # all layer norms divide first, which changes no result
        ratios = [(size / FLOAT16) ** (0.5 if "squares" in name else 1) for name, size in norms.items()]
        divisor = 2 ** min(16, math.ceil(math.log2(max(ratios))))      # beyond, what goes in does not fit
        deployed, name = blocks.deploy(net, divisor), max(norms, key=norms.get)
        lines = [f"layer norms divide by {divisor} first: {name}, would reach {norms[name]:.3g} in float16"]
        large = beyond(deployed)
    return deployed, lines + [f"{name}, reaches {size:.3g}, and float16 ends at {FLOAT16}: expect NaN on a "
                              "device that computes in it" for name, size in large.items()]


def deployed_net(job, name, net):
    """(the deployed net, [remarks on float16, where a phone is to run it])."""
    if job.config.target != "qai-hub":
        return blocks.deploy(net), []
    deployed, lines = within_float16(net, job.pairs("val"), job.device)
    say(*(f"{name}: {line}" for line in lines))
    return deployed, lines


def measure_nets(job, table, nets, choices, count=30):
    """`time_whole` of {name: deployed net} -> ({name: ms or None}, `sums` of those of known {name: choice}).

    Locally `count` random configurations are timed as well: do the sums hold for nets in general?
    """
    if job.config.target == "local":
        rng = np.random.default_rng([job.config.seed, 5])
        for name, (choice, net) in random_nets(table["sites"], nets["base"], count, rng).items():
            choices, nets = {**choices, name: choice}, {**nets, name: net}
    measured, where, more = time_whole(job, table, nets)
    return measured, {**sums(table, choices, measured, where), **more}


def sizes(net, frame):
    """Parameters, their megabytes, and GMACs at an input of frame (H, W)."""
    return {"params": blocks.count_params(net),
            "mb": sum(p.numel() * p.element_size() for p in net.parameters()) / 1e6,
            "gmacs": blocks.count_macs(net, (1, 3, *frame)) / 1e9}


def stage_evaluate(job, base, profile, finetune):
    """Section III: blurred input, base and chosen net on test pairs; sizes; whole-net latency."""
    config, window = job.config, base["arch"]["window"]
    sets = {"test": job.pairs("test"), **named_pairs(config)}
    nets = {"base": base_net(base, job.device), "chosen": chosen_net(finetune, job.device)}
    deployed = {name: deployed_net(job, name, net) for name, net in nets.items()}
    nets = {name: net for name, (net, _) in deployed.items()}
    choices, timed = {"base": {}, "chosen": finetune["choice"]}, dict(nets)
    if window:                                    # the report tells what the local window costs
        timed["global attention"] = copy.deepcopy(nets["base"])
        blocks.set_window(timed["global attention"], None)
    measured, predicted = measure_nets(job, profile, timed, choices)
    scores = {name: score_nets(nets, pairs, job.device, name) for name, pairs in sets.items()}
    own = scores.pop("test")
    rows = {name: {**own[name], **sizes(net, config.frame), "latency_ms": measured[name],
                   "predicted_ms": predicted["drift"] * profile_device.network_ms(profile, choices[name]),
                   "float16": deployed[name][1]} for name, net in nets.items()}
    return {"test_pairs": own["pairs"], "blurred": own["blurred"], **rows, "tests": scores, "sums": predicted,
            "protocol": protocol(window), "window": window, "global_ms": measured.get("global attention")}


# ---------------------------------------------------------------------------------------- controls

def least_salient(saliency):
    """All blocks, the least salient first, by their mean rank over {measure: {block: saliency}}."""
    single = {measure: {block.replace(".", "-"): value for block, value in by_block.items()}
              for measure, by_block in saliency.items()}               # to `mean_ranks`, stages of one block
    ranks = blocks.mean_ranks(single)
    return [block.replace("-", ".") for block in sorted(ranks, key=ranks.get, reverse=True)]


def as_fast(job, profile, arch, net, chosen, order):
    """The width, and the blocks of `order` to leave out, that bring the base net to the latency of `chosen`.

    chosen {"chosen": deployed net}. Measured: locally all in one go; on a phone by bisection, as every net is
    a job there. GMACs where the target measures no nets; None where none is as fast.
    """
    widths = {f"width {width}": width for width in range(2, arch["width"] + 1, 2)}
    fewer = {f"without {n} blocks": order[:n] for n in range(len(order), -1, -1)}
    nets = {name: new_net(**{**arch, "width": n}, seed=0).to(job.device) for name, n in widths.items()}
    for name, gone in fewer.items():
        nets[name] = blocks.assemble(net, {}, without(gone))
    nets = {name: blocks.deploy(net) for name, net in nets.items()}
    timed = lambda names: time_whole(job, profile, {**chosen, **{name: nets[name] for name in names}})[0]
    cost = timed([] if job.config.target == "qai-hub" else nets)
    if cost["chosen"] is None:
        cost = {name: sizes(net, job.config.frame)["gmacs"] for name, net in {**chosen, **nets}.items()}

    def slowest(names):                           # no slower than the chosen net; names: the fastest first
        if len(cost) > 1:
            return max((n for n in names if cost[n] <= cost["chosen"]), key=cost.get, default=None)
        ms = lambda name: math.inf if (found := timed([name])[name]) is None else found
        return [None, *names][bisect.bisect_right(list(names), cost["chosen"], key=ms)]

    return widths.get(slowest(widths)), fewer.get(slowest(fewer))


def configurations(config, penalty, chosen, score_all):
    """{name: options, None where there are none} of the controls of the chosen options' predicted latency.

    score_all([options, ...]) -> dB lost by each, before fine-tuning.
    """
    limit, base = search.total_penalty(penalty, chosen) + 1e-9, (0,) * len(penalty)
    swaps = list(dict.fromkeys(search.neighbours([base], search.available(penalty))))
    lost = dict(zip(swaps, score_all(swaps)))
    losses = [[lost.get(base[:i] + (k,) + base[i + 1:], math.inf) for k in range(len(p))]
              for i, p in enumerate(penalty)]
    uniform = [(k,) * len(penalty) for k in range(1, len(penalty[0]))]
    uniform = [options for options in uniform if search.total_penalty(penalty, options) <= limit]
    drawn = search.random_at(penalty, limit, config.controls + 1, np.random.default_rng([config.seed, 6]))
    drawn = [options for options in drawn if options != chosen] + [None] * config.controls
    return {"one option everywhere": min(zip(score_all(uniform), uniform), default=(0, None))[1],
            "budgeted sum": search.budgeted(losses, penalty, limit),
            **{f"random {n + 1}": drawn[n] for n in range(config.controls)}}


def control_plan(job, base, saliency, profile, distill, found, finetune):
    """{"controls": [...], "single_swaps": how many were scored for one of them, "planned": a word}.

    A control: {name; choice; width or None; scratch: whether trained from scratch; missing: why, or ""}.
    """
    config, sites, net = job.config, saliency["sites"], base_net(base, job.device)
    penalty = search.penalties(profile, sites, distill["diverged"])
    val = [load_pair(pair) for pair in job.pairs("val")]
    scored = {tuple(row["options"]): row["loss_db"] for row in found["evaluations"]}
    _, score = scorer(assembler(job, net, distill), sites, val, job.device)
    score_all = functools.partial(score_new, score, scored, lambda: None)
    chosen, _ = deployed_net(job, "chosen", chosen_net(finetune, job.device))
    width, gone = first(lambda: as_fast(job, profile, base["arch"], net, {"chosen": chosen},
                                        least_salient(saliency["scores"])))
    choice, slow = finetune["choice"], "none is as fast"
    equal = configurations(config, penalty, tuple(choice[site] for site in sites), score_all)
    untrained = "not trained: --control-scratch" if config.weights and not config.control_scratch else ""
    row = lambda name, choice=None, missing="", width=None, scratch=False: dict(
        name=name, choice=choice or {}, missing=missing, width=width, scratch=scratch)
    rows = [row("base"), row("base, more steps"), row("chosen", choice),
            row("narrower", {}, untrained or slow * (width is None), width, True),
            row("shallower", without(gone or []), slow * (gone is None)),
            row("shallower, one block more", without((gone or [])[:-1]),
                slow if gone is None else "none is slower" * (not gone)),
            *(row(name, choice_of(sites, options or []), "no other of this latency" * (options is None))
              for name, options in equal.items()),
            row("chosen, from scratch", choice, untrained, None, True)]
    return {"controls": rows, "planned": "planning",
            "single_swaps": sum(map(len, search.available(penalty))) - len(sites)}


def seconds_per_step(job, net, count=4):
    """Median of a few steps of the base net's training, on one batch."""
    config, times = job.config, []
    own = crops(job.pairs("train"), 0, config.crop, max(1, config.batch // world()))(0)
    batch = [as_batch(images, job.device) for images in own]

    def each(step, losses, make):
        losses["psnr"].sum().item()               # waits for a GPU
        times.append(time.perf_counter())

    blocks.train(net, lambda step: batch, count, 1e-9, config.amp, each=each, average=config.average)
    return statistics.median(np.diff(times))


def trained_control(job, assembled, arch, control):
    """Train a control as base and candidates were -> (net, its validation dB [before, after] fine-tuning).

    From scratch, batch norms do nothing, as no distillation gave them statistics.
    """
    config, name, choice = job.config, control["name"], control["choice"]
    file = "control." + re.sub(r"\W+", "-", name)
    if control["scratch"]:
        own = {**arch, "width": control["width"] or arch["width"], "window": None}
        net = new_net(**own, seed=config.seed).to(job.device)
        new = {site: {k: blocks.new_surrogate(net, site, k, config.seed)} for site, k in choice.items()}
        start = trained(job, blocks.assemble(net, new, choice), config.base_steps, config.base_lr,
                        f"control: {name}", f"{file}-base.part", config.seed)
        blocks.set_window(start, arch["window"])  # after training, as the base's is
    else:
        start = assembled(choice)
    tuned = trained(job, start, config.finetune_steps, config.finetune_lr, f"control: {name}", f"{file}.part",
                    config.seed + 4)
    db = [evaluate(each, job.pairs("val"), job.device, with_ssim=False)["psnr_db"] for each in (start, tuned)]
    if math.isnan(db[1]):
        raise InputError(f"control: {name} diverged")
    return tuned, db


def swaps_of(choice):
    """((site, option), ...) of the swaps of a choice alone: what tells one net from another."""
    return tuple(sorted((site, k) for site, k in choice.items() if k))


def control_nets(job, controls, base, distill, finetune):
    """{name: (net, [its validation dB before, after])}: equal ones trained once, diverged ones left out."""
    config, best, base_db = job.config, finetune["candidates"][finetune["picked"]], base["val"]["psnr_db"]
    chosen = chosen_net(finetune, job.device), [best["val_before_db"], best["val_after_db"]]
    net = base_net(base, job.device)
    assembled = assembler(job, net, distill)
    made = {"base": (net, [base_db, base_db]), "chosen": chosen}
    todo = [control for control in controls if control["name"] not in made and not control["missing"]]
    scratch, known = sum(control["scratch"] for control in todo), {swaps_of(finetune["choice"]): chosen}
    steps = len(todo) * config.finetune_steps + scratch * config.base_steps
    minutes = first(lambda: steps * seconds_per_step(job, net)) / 60
    say(f"control: {len(todo)} nets to train, {scratch} of them from scratch, {steps:,} steps in all: about "
        f"{minutes:.0f} minutes at the base net's pace, less what is done already")
    for control in todo:
        name = control["name"]
        key = name if control["scratch"] else swaps_of(control["choice"])
        try:
            if key not in known:
                known[key] = trained_control(job, assembled, base["arch"], control)
            made[name] = known[key]
        except InputError as error:
            if "diverged" not in str(error):
                raise
            say(f"{error}; so this control is left out")
    return made


def interval(values, seed):
    """95 % interval of the mean, by the bootstrap (Efron 1979); None of less than two values."""
    if len(values) < 2:
        return None
    found = bootstrap([values], np.mean, method="percentile", rng=np.random.default_rng(seed), batch=100)
    return [float(end) for end in found.confidence_interval]


def control_row(config, control, net, ms, val_db, scores, chosen):
    """What is told of one control; scores, chosen: its `image_scores` by test set, and the chosen net's."""
    ahead = np.subtract(scores["test"]["psnr_db"], chosen["test"]["psnr_db"])
    tests = {key: {"pairs": len(v["psnr_db"]), **means(v)} for key, v in scores.items() if key != "test"}
    return {**control, **sizes(net, config.frame), "latency_ms": ms, "val_before_db": val_db[0],
            "val_after_db": val_db[1], **means(scores["test"]), "ahead_db": float(ahead.mean()),
            "interval_db": interval(ahead, config.seed), "tests": tests}


def score_tau(sites, candidates, rows):
    """(Kendall's tau of validation PSNR before and after fine-tuning, of how many configurations)."""
    tuned = {swaps_of(choice_of(sites, row["options"])): row for row in candidates}
    tuned.update((swaps_of(row["choice"]), row) for row in rows
                 if not (row["missing"] or row["scratch"] or row["name"] == "base"))
    pairs = [(row["val_before_db"], row["val_after_db"]) for row in tuned.values()]
    return float(kendalltau(*zip(*pairs)).statistic), len(pairs)


def stage_control(job, base, saliency, profile, distill, search, finetune):
    """Is the search worth it? Other nets of the chosen net's latency, trained alike."""
    plan = resumed(job, "control.plan.part", "planned")
    if not plan:                                  # rank 0's counts: machines may round differently
        own = control_plan(job, base, saliency, profile, distill, search, finetune)
        plan = first(lambda: saved(job.out / "control.plan.part", own, job.head) or own)
    inputs = {**job.head["inputs"], "plan of controls": digest(plan["controls"])}
    own_job = job._replace(head={**job.head, "inputs": inputs})
    made = control_nets(own_job, plan["controls"], base, distill, finetune)
    nets = {name: deployed_net(job, name, net)[0] for name, (net, _) in made.items()}
    ms, where, _ = first(lambda: time_whole(job, profile, nets))
    sets = {"test": job.pairs("test"), **named_pairs(job.config)}
    own = agreed(lambda: {name: {key: image_scores(nets[name], pairs, job.device, label=f"{key}: {name}")
                                 for key, pairs in sets.items()} for name in list(nets)[rank()::world()]})
    scores = merged(gather(own))                  # each rank scored some of the nets
    rows = [control_row(job.config, control, nets[name], ms[name], made[name][1], scores[name],
                        scores["chosen"]) if (name := control["name"]) in nets else
            {**control, "missing": control["missing"] or "diverged"} for control in plan["controls"]]
    tau, count = score_tau(saliency["sites"], finetune["candidates"], rows)
    return {"rows": rows, "single_swaps": plan["single_swaps"], "tau": tau, "tuned": count,
            "measured_on": where, "protocol": protocol(base["arch"]["window"])}


# --------------------------------------------------------------------------------------- the report

# The paper's tables as printed. Table 1: fisher in 1e-6, plain in 1e-3, enc2's plain printed "2.24e"; the
# mean ranks are ours. Tables 4 and 5: PSNR in dB/SSIM, GMACs (65 is NAFNet at 512x512).
PAPER_TABLE_1 = """\
| published       | grad_norm | snip | grasp   | fisher | plain  | synflow | mean rank |
|-----------------|-----------|------|---------|--------|--------|---------|-----------|
| enc0            | 0.0118    | 0.04 | 0.0005  | 1.96   | -6.95  | 2.0e18  | 5.33      |
| enc1            | 0.0050    | 0.03 | -0.0001 | 2.58   | -3.72  | 2.3e16  | 6.67      |
| enc2            | 0.0037    | 0.05 | 0.0006  | 5.19   | 2.24   | 1.6e15  | 5.50      |
| enc3 (critical) | 0.0644    | 1.6  | -0.0017 | 6.23   | 21.8   | 2.2e17  | 1.33      |
| mid             | 0.0008    | 0.04 | 0.0002  | 0.99   | 0.52   | 2.6e12  | 7.83      |
| dec3            | 0.0040    | 0.09 | -0.0008 | 2.88   | 9.48   | 1.1e12  | 5.00      |
| dec2            | 0.0086    | 0.11 | -0.0019 | 4.58   | 7.52   | 8.3e9   | 4.17      |
| dec1            | 0.0193    | 0.12 | 0.0010  | 3.09   | -17.01 | 4.3e7   | 3.83      |
| dec0            | 0.0195    | 0.07 | -0.0002 | 2.13   | 8.37   | 1.2e12  | 5.33      |"""
PAPER_TABLE_3 = """\
| published, on GoPro and an S24 Ultra | params, M | MB  | ms  | PSNR dB | SSIM  |
|--------------------------------------|-----------|-----|-----|---------|-------|
| NAFNet, published                    | 17.112    | 107 | 177 | 35.80   | 0.980 |
| Ours, published                      | 17.110    | 106 | 147 | 33.76   | 0.942 |"""
PAPER_TABLE_4 = """\
|                      | GoPro      | RealBlur-J | RealBlur-R | HIDE       |
|----------------------|------------|------------|------------|------------|
| SRN, published       | 30.26/.934 | 28.56/.867 | 35.66/.947 | 28.36/.915 |
| DPDNet, published    | 29.08/.914 | 27.87/.827 | 32.51/.841 | 25.73/.874 |
| DMPHN, published     | 31.20/.940 | 28.42/.860 | 35.70/.948 | 29.09/.924 |
| DBGAN, published     | 31.10/.942 | 24.93/.745 | 33.78/.909 | 28.94/.915 |
| MPRNet, published    | 32.66/.959 | 28.70/.873 | 35.99/.952 | 30.96/.939 |
| MT-RNN, published    | 31.15/.945 | 28.44/.862 | 35.79/.951 | 29.15/.918 |
| Restormer, published | 32.92/.961 | 28.96/.879 | 36.19/.957 | 31.22/.942 |
| NAFNet, published    | 35.80/.980 | 26.48/.823 | 33.78/.943 | 30.45/.913 |
| Ours, published      | 33.76/.942 | 26.51/.824 | 33.82/.943 | 30.36/.912 |"""
PAPER_TABLE_5 = """\
|                              | DPDD-indoor | DPDD-outdoor | GMACs |
|------------------------------|-------------|--------------|-------|
| DPDNet, published            | 26.54/.816  | 22.25/.682   | 991   |
| KPAC, published              | 27.97/.852  | 22.62/.701   | -     |
| IFAN, published              | 28.11/.861  | 22.76/.720   | 363   |
| DMENet, published            | 25.50/.788  | 21.43/.644   | 1173  |
| EBDB, published              | 25.77/.772  | 21.25/.599   | -     |
| JNB, published               | 26.73/.828  | 21.10/.608   | -     |
| Restormer, published         | 28.87/.882  | 23.24/.743   | 141   |
| KBNet, published             | 28.89/.883  | 23.32/.749   | 108   |
| NAFNet, published            | 24.44/.766  | 18.83/.574   | 65    |
| Ours, published              | 19.93/.686  | 18.89/.567   | 63    |
| Ours (fine-tuned), published | 26.87/.818  | 21.89/.656   | 63    |"""


def markdown(head, rows):
    """Rows of strings, the short ones filled up, as an aligned Markdown table."""
    columns = [[*map(str, column)] for column in itertools.zip_longest(head, *rows, fillvalue="")]
    widths = [max(map(len, column)) for column in columns]
    top, *rest = (f"| {' | '.join(map(str.ljust, row, widths))} |" for row in zip(*columns))
    return "\n".join([top, f"|-{'-|-'.join('-' * width for width in widths)}-|", *rest])


def formatted(value, form, none=""):
    """A number as text; none: the text for None."""
    return none if value is None else f"{value:{form}}"


def figures(m, unknown="not measured"):
    """What is known of size, latency and quality of a net, as text by name; unknown: the text for None."""
    m = {**m, "millions": m.get("params", 0) / 1e6}
    forms = dict(params=",", millions=".3f", mb=".2f", gmacs=".2f", latency_ms=".1f", predicted_ms=".1f",
                 psnr_db=".2f", ssim=".4f")
    return {key: formatted(m[key], form, unknown) for key, form in forms.items() if key in m}


def gain_table(metrics):
    """The answer to 'what did I gain', as a Markdown table."""
    columns = dict(params="params", mb="MB", gmacs="GMACs", latency_ms="measured ms",
                   predicted_ms="predicted ms", psnr_db="PSNR dB", ssim="SSIM")
    return markdown(["", *columns.values()],
                    [[name, *(figures(metrics[name.split()[0]]).get(key, "") for key in columns)]
                     for name in ("blurred input", "base", "chosen")])


def gain_words(metrics):
    """Speed and quality of the chosen net in one line."""
    base, chosen, key, how = metrics["base"], metrics["chosen"], "latency_ms", "measured, interleaved"
    if None in (base[key], chosen[key]):
        key, how = "predicted_ms", "predicted from the latency table, not measured"
    elif metrics["config"]["target"] != "local":
        how = f"measured on {metrics['sums']['measured_on']['device']}"
    pace = base[key] / chosen[key] if chosen[key] else math.inf        # table 2 may have nothing left
    blurred_db, base_db, chosen_db = (metrics[name]["psnr_db"] for name in ("blurred", "base", "chosen"))
    return (f"The chosen net runs {pace:.2f}x as fast as the base ({how}) at {chosen_db - base_db:+.2f} dB; "
            f"against the blurred input the base has {base_db - blurred_db:+.2f} dB, the chosen net "
            f"{chosen_db - blurred_db:+.2f}.")


def pace_words(metrics):
    """What the predicted figures are, and what they are to be compared with, in one line."""
    ms, drift = metrics["base"]["latency_ms"], metrics["sums"]["drift"]
    if ms is None:
        return "Predicted: sums of the latency table; no net was measured."
    words = ("Predicted: sums of profiled blocks, at the pace of this measurement (with the drift): times "
             f"{drift:.2f}, since the base net took {ms:.1f} ms in it and {ms / drift:.1f} ms when its "
             "blocks were profiled.")
    predicted, taken = (metrics["chosen"][key] for key in ("predicted_ms", "latency_ms"))
    if metrics["sums"]["repeat_tau"] is not None and max(predicted, taken) > 1.2 * min(predicted, taken):
        words += (f" The chosen net took {taken:.1f} ms, not {predicted:.1f}: if something disturbed the "
                  "measurement, --stage evaluate --force repeats it.")
    if (whole := metrics["global_ms"]) is not None:
        words += (f" All is timed with the local window of {metrics['window']} pixels that it is scored "
                  f"with: with attention over the whole image the base net takes {whole:.1f} ms, so the "
                  f"window makes it {ms / whole:.2f} times as slow.")
    return words


def psnr_ssim(m):
    return "{psnr_db:.2f}/{ssim:.3f}".format(**m).replace("/0.", "/.")


def test_tables(tests, known, frame):
    """Tables 4 and 5 (DPDD), the paper's and ours, of {NAME: score_nets}, {net: sizes} -> Markdown parts."""
    nets, parts = [net for net in next(iter(tests.values()), {}) if net != "pairs"], []
    for title, paper, defocus in (("4", PAPER_TABLE_4, False), ("5 (defocus)", PAPER_TABLE_5, True)):
        own = {name: test for name, test in tests.items()
               if (name in ("DPDD-indoor", "DPDD-outdoor")) == defocus}
        rows = [[f"{net}, here", *(psnr_ssim(test[net]) for test in own.values()),
                 f"{known[net]['gmacs']:.1f}" if "gmacs" in known.get(net, {}) else ""] for net in nets]
        heads = [f"{name} ({test['pairs']} pairs)" for name, test in own.items()]
        parts += [f"## Table {title}: PSNR dB/SSIM on further test sets", paper,
                  markdown(["", *heads, "GMACs at {}x{}".format(*frame)], rows)] * bool(own)
    return parts


def saliency_section(saliency):
    """Table 1: this run's saliency per stage, then the published one."""
    ranks, kept = saliency["mean_ranks"], saliency["critical"]
    totals = blocks.stage_totals(saliency["scores"])
    best, second = sorted(ranks, key=ranks.get)[:2]
    stays = f"So {' '.join(kept)} stays as it is, and all other blocks are sites"
    if any(site.split(".")[0] in kept for site in saliency["sites"]):
        stays = f"The paper would keep {' '.join(kept)} as it is; with --space all its blocks are sites too"
    rows = [[stage + " (critical)" * (stage in kept), *(f"{total[stage]:.4g}" for total in totals.values()),
             f"{ranks[stage]:.2f}"] for stage in totals["snip"]]       # in forward order, unlike `ranks`
    return ["## Table 1: saliency per stage",
            f"{best} has the best mean rank, {ranks[best]:.2f}; next is {second}, {ranks[second]:.2f}. "
            f"{stays}, {len(saliency['sites'])} in all.",
            markdown(["stage", *totals, "mean rank"], rows), PAPER_TABLE_1]


def measured_on(table):
    """What a latency table was measured on, and what the device had trouble with, as Markdown."""
    where = [*(f"{key} {table[key]}" for key in WHERE if key in table), "frame {}x{}".format(*table["frame"])]
    return "\n".join([f"Latency from: {', '.join(where)}.",
                      *(f"- {line}." for line in profile_device.remarks(table))])


def hub_table(found):
    """What was profiled on AI Hub, {name: result}, as Markdown; none -> no part."""
    units = lambda layers: zip(*np.unique([layer["compute_unit"] for layer in layers], return_counts=True))
    rows = [[" ".join([name, *job.get("sites", [])]), formatted(job["ms"], ".3g", "fails"),
             formatted(job["peak_mb"], ".0f"), " ".join(f"{n} {unit}" for unit, n in units(job["layers"])),
             job["version"], job["url"]] for name, job in found.items()]
    return [markdown(["on AI Hub", "ms", "peak MB", "layers", "version", "job"], rows)] * bool(rows)


def device_section(metrics):
    """What the phone did with whole nets and with pictures -> Markdown parts, none for other targets."""
    found = metrics["sums"].get("hub")
    if not found:
        return []
    ran = {name: found[name] for name in ("base", "chosen") if name in found}
    pictures = {name: result["pictures"] for name, result in ran.items() if result.get("pictures")}
    rows = [[name, p["pairs"], *(f"{p[key]:.2f}" for key in ("device_db", "here_db", "agreement_db"))]
            for name, p in pictures.items()]
    lines = [f"- {name}: the device's pictures have {p['agreement_db']:.1f} dB against ours, which is less "
             "than 40: what runs there is not quite the net here." for name, p in pictures.items()
             if not p["agreement_db"] >= 40]      # NaN where it overflows
    lines += [f"- {name}: the device returned no pictures." for name, result in ran.items()
              if name not in pictures and result["ms"] is not None]
    lines += [f"- {name}: {line}." for name in ("base", "chosen") for line in metrics[name]["float16"]]
    heads = ["validation pictures", "count", "PSNR there, dB", "PSNR here, dB", "there against here, dB"]
    return ["## On the device", *hub_table(found), *[markdown(heads, rows)] * bool(rows),
            *["\n".join(lines)] * bool(lines)]


def latency_section(table):
    """Table 2: milliseconds of every option at every site, then the published row."""
    names, sites = table["options"], table["sites"]
    fastest = [min((k for k, ms in enumerate(row[:len(blocks.BLOCKS)]) if ms is not None),
                   key=row.__getitem__) for row in sites.values()]
    best = statistics.mode(fastest)
    rows = [[site, *(formatted(ms, ".2f", "unavailable") for ms in row)] for site, row in sites.items()]
    rows.append(["published, every site", *map("{:.0f}".format, profile_device.PAPER_BLOCK_MS[:len(names)])])
    return ["## Table 2: latency of each option, ms",
            f"{names[best]} is the fastest option at {fastest.count(best)} of {len(sites)} sites. "
            + measured_on(table), markdown(["site", *(f"{i} {n}" for i, n in enumerate(names))], rows),
            *hub_table(table.get("modules", {}))]


def wish_words(config):
    """How the first candidate was chosen, and those after the second."""
    within = {name: f"{flag(name)} {config[name]:g}" for name in ("max_loss_db", "max_ms") if config[name]}
    how = {(): "what lies furthest below the chord of the part that gains on the blurred input",
           ("max_loss_db",): "the fastest", ("max_ms",): "what loses least",
           ("max_loss_db", "max_ms"): "what lies furthest below the chord between its ends"}
    return how[tuple(within)] + f" within {' and '.join(within.values())}" * bool(within)


def wish_list(found):
    """What other wishes would have given: the knee of the front, and the fastest within 0.1 and 0.3 dB."""
    every = found["evaluations"]
    losses = {i: every[i]["loss_db"] for i in found["front"]}
    rows = [every[i] for i in useful(found["front"], losses, found["gain_db"])]
    wishes = {"the knee": rows[search.knee([(row["loss_db"], row["penalty"]) for row in rows], 1)[0]]}
    for limit in (0.1, 0.3):
        within = [row for row in rows if row["loss_db"] <= limit and any(row["options"])]
        wishes[f"`--max-loss-db {limit}`"] = min(within, key=lambda row: row["latency_ms"], default=None)
    words = lambda row: "{latency_ms:.3g} ms, {loss_db:.2f} dB lost".format(**row) if row else "nothing"
    return "\n".join(["Other wishes, and what their first candidate would be, before fine-tuning; the base "
                      f"takes {every[0]['latency_ms']:.3g} ms:\n",
                      *(f"- {wish}: {words(row)}" for wish, row in wishes.items())])


def front_section(found, diverged, pick):
    """How the front came about, and why these candidates."""
    rows, proposed, ref = found["evaluations"], found["proposed"], found["ref"]
    refit = found["config"]["refit"]
    left_out = ", ".join(f"{k} at {site}" for site, k in diverged)
    why = "Nothing faster that was scored keeps any of the base net's gain, so the base is the one candidate."
    if any(rows[found["knee"][0]]["options"]):
        distances = ", ".join(f"{distance:.2f}" for distance in found["below_chord"])
        why = ("Candidates from the front, without the base and within any wish: first "
               f"{wish_words(found['config'])}; then, if it lies apart, the fastest that loses at most "
               f"{WON_BACK_DB} dB, which fine-tuning usually wins back, or nearly; then the others, by the "
               "first rule. Where there are enough, they are at least a tenth of the span in latency apart, "
               "as near-copies teach little. Their distances "
               f"below the chord, both axes scaled to 1: {distances}. Picked after fine-tuning: "
               f"{PICKS[pick]}.")
    return ["## The front",
            f"{len(rows)} of {found['space']:,} configurations were scored"
            f"{f', their last convolution fitted to {refit} training crops first' * bool(refit)}: "
            f"{proposed} that the search proposed, and {len(rows) - proposed} that take one swap of a "
            f"candidate back; {len(found['front'])} are on the front. Hypervolume "
            f"{found['hypervolume']:.3f}; its reference point: {ref[0]:.2f} dB, and {ref[1]:.2f} times the "
            "latency of the base net's sites.",
            *[f"Left out of the search, as their surrogates diverged: option {left_out}."] * bool(diverged),
            "![front](pareto.svg)", wish_list(found), why]


def nets_section(metrics, finetune, found, profile, steps):
    """Table 3: base and every candidate before and after fine-tuning; base and chosen on test; published."""
    candidates, drift, rows = finetune["candidates"], metrics["sums"]["drift"], []
    measured = {0: "base", finetune["picked"] + 1: "chosen"}
    base = {**found["evaluations"][0], "val_before_db": found["base_val_db"]}
    jobs = metrics["sums"].get("hub", {})         # what was found on a phone
    for n, net in enumerate([base, *candidates]):
        known = figures(metrics[measured[n]]) if n in measured else {}
        peak_mb = jobs.get(measured.get(n), {}).get("peak_mb")
        name = f"candidate {n}" + " (chosen)" * (n in measured) if n else "base"
        rows.append([name, " ".join(map(str, net["options"])),
                     *(known.get(key, "") for key in ("millions", "mb", "latency_ms", "psnr_db", "ssim")),
                     f"{drift * net['latency_ms']:.1f}", f"{net['val_before_db']:.2f}",
                     f"{net['val_after_db']:.2f}" if n else "",
                     *[formatted(peak_mb, ".0f")] * bool(jobs)])
    gains = [candidate["val_after_db"] - candidate["val_before_db"] for candidate in candidates]
    ends = dict.fromkeys(f"{gain:+.2f}" for gain in (min(gains), max(gains)))
    rest = "alone: there is no figure for the rest of the net"
    if profile["rest_ms"]:
        rest = f"plus {profile['rest_ms']:.1f} ms for the rest of the net"
    elif profile["scale"] != 1:
        rest = f"times {profile['scale']:.2f}, since together they take longer alone than the whole net"
    return ["## Table 3: base, candidates and chosen net",
            f"{steps} steps of fine-tuning change candidates by {' to '.join(ends)} dB on validation.",
            markdown(["", "options", "params, M", "MB", "ms", "PSNR dB", "SSIM", "predicted ms",
                      "validation dB", "fine-tuned", *["peak MB"] * bool(jobs)], rows), PAPER_TABLE_3,
            f"Options in the order of the sites: {', '.join(found['sites'])}. PSNR and SSIM on test. "
            f"Predicted are the blocks at the sites {rest}{f', all times {drift:.2f}' * (drift != 1)}."]


def site_section(saliency, profile, found, finetune):
    """The chosen net site by site, with what each swap alone changes as it was scored -> Markdown parts."""
    names, choice, lines, rows = profile["options"], finetune["choice"], [], []
    back = found["taken_back"][finetune["picked"]]
    for site, k in choice.items():
        ranks = [1 + sum(abs(row[s]) > abs(row[site]) for s in choice) for row in saliency["scores"].values()]
        change = [f"{-back[key][site]:+z.2f}" for key in ("saved_ms", "cost_db")] if k else ["", ""]
        lines.append(f"- {site}: {names[k]} in place of {names[0]}, {change[0]} ms, {change[1]} dB" if k
                     else f"- {site}: {names[0]} stays")
        ms = profile["sites"][site]
        rows.append([site, f"{statistics.fmean(ranks):.2f}", f"{ms[0]:.2f}", f"{k} {names[k]}",
                     f"{ms[k]:.2f}", *change])
    return ["## The chosen net, site by site", "\n".join(lines),
            markdown(["site", "saliency rank", "base ms", "option", "its ms", "net, ms", "net, dB"], rows),
            "What each swap alone changes in predicted latency of the net and in PSNR on validation, before "
            "fine-tuning: found by taking it back. All ms are at the pace of table 2. Saliency rank: among "
            "the sites, mean over the measures of table 1; 1 is the most salient."]


def sums_section(found):
    """Predicted (the sum of the profiled blocks) against measured latency of whole nets -> Markdown parts."""
    rows, drift, error = found["rows"], found["drift"], found["mean_relative_error"]
    if not rows:
        return ["## Do the sums hold?", "No whole net was measured: the published table knows blocks only."]
    words = f"{len(rows)} nets, of which the base is right by construction and does not count: "
    words += "" if found["tau"] is None else f"Kendall's tau {found['tau']:.2f}, "
    words += ("the base net alone was measured." if error is None else
              f"mean relative error {error:.1%}; without the drift, {found['error_as_profiled']:.1%}.")
    if found["repeat_tau"] is not None:
        words += f" Two halves of the measurement itself agree to a tau of {found['repeat_tau']:.2f}."
    forms = "{:.1f} {:.1f} {:.1f} {:+.1%}".format
    cells = [[row["net"], *forms(ms / drift, ms, row["measured_ms"], ms / row["measured_ms"] - 1).split()]
             for row in rows for ms in [row["predicted_ms"]]]
    return ["## Do the sums hold?", words, measured_on(found["measured_on"]),
            markdown(["net", "as profiled, ms", "predicted ms: x drift", "measured ms", "error"], cells)]


def control_kind(row):
    """What a control is, in a few words."""
    if row["width"]:
        return f"width {row['width']}"
    if row["name"].startswith("shallower"):
        return f"without {' '.join(row['choice']) or 'nothing'}"
    return " ".join(map(str, row["choice"].values())) or "no swap"


def ahead_words(row):
    """How far ahead of the chosen net a control is, with its 95 % interval."""
    ends = " [{:+.2f}, {:+.2f}]".format(*row["interval_db"]) if row["interval_db"] else ""
    return f"{row['ahead_db']:+.2f} dB{ends}"


def control_words(control):
    """Which controls of the chosen net's latency are better than it, or which comes nearest, in one line."""
    rows = {row["name"]: row for row in control["rows"] if not row["missing"]}
    _, more, chosen = (rows.pop(name, None) for name in ("base", "base, more steps", "chosen"))
    key, like = "latency_ms", "as fast as the chosen net (3 % allowed)"
    if chosen[key] is None:
        key, like = "gmacs", "of no more GMACs than the chosen net (3 % allowed)"
    rivals = [row for row in rows.values() if row[key] is not None and row[key] <= 1.03 * chosen[key]]
    rivals.sort(key=lambda row: -row["ahead_db"])
    better = [row for row in rivals if row["ahead_db"] > 0]
    told = [f"{row['name']} ({control_kind(row)}) {ahead_words(row)}" for row in better or rivals[:1]]
    words = f"Controls {like} are better: " if better else f"No control {like} is better; best: "
    last = f" The base net with as many steps more: {more['ahead_db']:+.2f} dB." if more else ""
    return f"{words}{', '.join(told) or 'none'}.{last}"


def control_table(control):
    """The controls, a row each, and the mean of the random ones, as Markdown."""
    rows, table, random = control["rows"], [], []
    base_ms = rows[0]["latency_ms"]
    for row in rows:
        table.append([row["name"], row["missing"] or control_kind(row)])
        if not row["missing"]:
            known, ms = figures(row, unknown=""), row["latency_ms"]
            table[-1] += [known["millions"], known["gmacs"], known["latency_ms"],
                          f"{base_ms / ms:.2f}" if base_ms and ms else "",
                          "" if row["scratch"] else f"{row['val_before_db']:.2f}", known["psnr_db"],
                          known["ssim"], ahead_words(row).replace(" dB", ""),
                          *map(psnr_ssim, row["tests"].values())]
            random += [row] * row["name"].startswith("random")
    if len(random) > 1:
        db, ahead = ([row[key] for row in random] for key in ("psnr_db", "ahead_db"))
        table.append([f"random, mean of {len(random)}", *[""] * 6, f"{statistics.fmean(db):.2f} +- "
                      f"{statistics.stdev(db):.2f}", "", f"{statistics.fmean(ahead):+.2f}"])
    heads = [f"{name} ({test['pairs']} pairs)" for name, test in rows[0]["tests"].items()]
    return markdown(["", "what", "params, M", "GMACs", "ms", "x base", "validation dB, before", "PSNR dB",
                     "SSIM", "against chosen, dB [95 %]", *heads], table)


def control_section(config, control):
    """Is the search worth it: the controls, and how they were made -> Markdown parts."""
    base, count = control["rows"][0], control["tuned"]
    tau = f"Kendall's tau {control['tau']:.2f}" if count >= 8 else "too few to say"
    between = " (95 %: {:+.2f} to {:+.2f})".format(*base["interval_db"]) if base["interval_db"] else ""
    return ["## Is the search worth it?", control_table(control),
            f"All but the base had {config.finetune_steps} steps of fine-tuning, the chosen net as a "
            f"candidate: narrower and from scratch after {config.base_steps} steps of a base's training, "
            "with batch norms that do nothing, since no distillation gave them statistics; all others from "
            "what was scored. Narrower: the largest width that is no slower than the chosen net. Shallower: "
            "without the least salient blocks, as few as bring that latency; with one block more it is "
            "slower. One option everywhere: the one that scores best of those predicted to be no slower. "
            "Budgeted sum: what loses least at the chosen net's predicted latency if the losses of single "
            f"swaps ({control['single_swaps']} were scored) add up. Random: of that predicted latency within "
            "3 %.",
            f"Does the score of the search tell what fine-tuning gives? {count} configurations were scored "
            f"and fine-tuned: {tau}. On test the base as it was is {base['ahead_db']:+.2f} dB{between} from "
            "the chosen net; intervals by the bootstrap over images.",
            *([measured_on(control["measured_on"])] if base["latency_ms"] is not None else [])]


def made_section(config, art):
    """Splits, base net, seed, and the versions in the artefacts."""
    made = {}
    for name, content in art.items():
        made.setdefault(", ".join(f"{k} {v}" for k, v in content["versions"].items()), []).append(name)
    versions = [f"{', '.join(names)}: " * (len(made) > 1) + text for text, names in made.items()]
    base = (f"are those of {config.weights}, which may have been trained on any of these pairs"
            if config.weights else f"were trained in {config.base_steps} steps"
            + " and averaged over them" * bool(config.average))
    return ["## How this was made", splits_words(config),
            f"The base net's weights {base}. Seed {config.seed}; {'; '.join(versions)}."]


def adapted_text(config, tuned):
    """report.md of a net that was adapted: every set before and after."""
    rows = [[name, found["pairs"], *(psnr_ssim(found[net]) for net in ("blurred", "before", "after"))]
            for name, found in tuned["scores"].items()]
    tests = {name: tuned["scores"][name] for name in test_sets(config)}
    return "\n\n".join([
        f"# {config.from_} adapted to {config.data or 'made pairs'}",
        markdown(["PSNR dB/SSIM", "pairs", "blurred input", "before", "after"], rows),
        f"{config.finetune_steps} steps of fine-tuning from {config.finetune_lr}"
        + ", weights averaged" * bool(config.average) + ", no new search. "
        + tuned["protocol"], splits_words(config),
        *test_tables(tests, dict.fromkeys(("before", "after"), tuned), config.frame)]) + "\n"


def front_picture(found, finetune, drift):
    """The search as SVG text: loss over predicted latency, times drift; how the front grew, and its nets."""
    rows, best = found["evaluations"], finetune["candidates"][finetune["picked"]]
    at = lambda row: (drift * row["latency_ms"], row["loss_db"])
    after_db = found["base_val_db"] - best["val_after_db"]
    told = "{}\n{:.1f} ms, {:.2f} dB".format
    design, Mark = min(len(rows), search.INITIAL + 2), search.Mark
    return search.front_svg(
        [at(row) for row in rows], sorted({design, (design + len(rows)) // 2, len(rows)}),
        [Mark("ring", 13, search.INK, "candidates", [at(row) for row in finetune["candidates"]]),
         Mark("square", 6, search.INK, "base net", [at(rows[0])], told("base", *at(rows[0]))),
         Mark("diamond", 9, search.ORANGE, "chosen, before fine-tuning", [at(best)],
              f"{told('chosen', *at(best))}\nfine-tuned: {after_db:.2f} dB"),
         Mark("hollow", 9, search.ORANGE, "chosen, after fine-tuning", [(at(best)[0], after_db)])],
        "predicted latency of the whole net, ms", "PSNR loss on validation, dB, against the base net's "
        f"{found['base_val_db']:.2f} dB (lower left is better)")


def enlarged(image, side, window=None):
    """(3, H, W) in [0, 1] -> a PIL image, its longer side `side`; a frame around window (top, left, size)."""
    pixels = image.permute(1, 2, 0).mul(255).round().byte().cpu().numpy()
    picture = ImageOps.contain(Image.fromarray(pixels), (side, side), Image.BICUBIC)
    if window:
        top, left, size = (round(side / max(image.shape[-2:]) * value) for value in window)
        size = max(size, 4)                       # of a very long picture
        for out, colour in ((2, "white"), (0, search.INK)):
            box = (left - out, top - out, left + size - 1 + out, top + size - 1 + out)
            ImageDraw.Draw(picture).rectangle(box, outline=colour, width=2)
    return picture


def worst_window(error, crop):
    """(top, left, side) of the window of (H, W) with the largest error, its middle counting most."""
    size = min(crop, *error.shape)
    half = (size + 1) // 2                        # two means in a row weigh like a pyramid
    mean = F.avg_pool2d(F.avg_pool2d(error[None, None], half, stride=1), size + 1 - half, stride=1)[0, 0]
    top, left = divmod(int(mean.argmax()), mean.shape[1])
    return top, left, size


def sample_pairs(sets, count=4):
    """[(name, pair), ...] of {name: pairs}: `count`, from one end to the other; of several sets two each."""
    each = max(2, count // len(sets))
    return [(name, pair) for name, pairs in sets.items() for pair in spread(pairs, each)]


def samples_picture(pairs, base, chosen, device, side=224):
    """A row per (name, pair): the blurred picture; blurred, base, chosen, sharp crops, `side` pixels each."""
    titles = ("whole picture, blurred", "blurred", "base net", "chosen net", "sharp")
    columns = range(12, 12 + 5 * (side + 12), side + 12)
    rows = range(38, 38 + len(pairs) * (side + 38), side + 38)
    canvas = Image.new("RGB", (columns.stop, rows.stop), "white")
    draw, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(18), ImageFont.load_default(15)
    for x, title in zip(columns, titles):
        draw.text((x + side / 2, 20), title, search.INK, font, anchor="mm")
    for y, (name, pair) in zip(rows, pairs):
        sharp, blur = load_pair(pair)
        nets = [restore(net, [blur], device) for net in (base, chosen)]
        images = [image[0] for image in (as_batch([blur], device), *nets, as_batch([sharp], device))]
        crop = min(128, (min(sharp.shape[-2:]) + 1) // 2)
        top, left, size = window = worst_window(torch.stack(images).var(0).mean(0), crop)
        parts = [image[:, top:top + size, left:left + size] for image in images]
        cells = [enlarged(images[0], side, window), *(enlarged(part, side) for part in parts)]
        scores = [f"{psnr(image, images[3]):.2f} ({psnr(part, parts[3]):.2f})"
                  for image, part in zip(images[:3], parts)]
        labels = [f"{name[:14]}: dB, whole (crop)", *scores, "reference"]
        for x, cell, label in zip(columns, cells, labels):
            canvas.paste(cell, (x + (side - cell.width) // 2, y + (side - cell.height) // 2))
            draw.text((x + side / 2, y + side + 17), label, search.INK, small, anchor="mm")
    return canvas


def stage_report(job, base, saliency, profile, distill, search, finetune, evaluate, *, control):
    """Section III: report.md with all tables, pareto.svg and samples.png.

    Returns {file name: bytes}; control: that artefact, or None.
    """
    config, stream = job.config, io.BytesIO()
    nets = [blocks.deploy(net) for net in (base_net(base, job.device), chosen_net(finetune, job.device))]
    samples = sample_pairs({"test": job.pairs("test"), **named_pairs(config)})
    samples_picture(samples, *nets, job.device).save(stream, "PNG", dpi=(300, 300))
    art = dict(base=base, saliency=saliency, profile=profile, distill=distill, search=search,
               finetune=finetune, evaluate=evaluate)
    worth = [control_words(control), control_section(config, control)] if control else ["", []]
    text = "\n\n".join([
        "# What did I gain", f"{gain_words(evaluate)} {worth[0]}".rstrip(), gain_table(evaluate),
        pace_words(evaluate), f"{evaluate['test_pairs']} test pairs ({config.data or 'made'}); frame "
        f"{config.frame[0]}x{config.frame[1]}. {evaluate['protocol']} Test images took no part in training, "
        "search or selection.", "![samples](samples.png)",
        *saliency_section(saliency), *latency_section(profile),
        *front_section(search, distill["diverged"], config.pick),
        *nets_section(evaluate, finetune, search, profile, config.finetune_steps),
        *test_tables(evaluate["tests"], evaluate, config.frame), *worth[1],
        *site_section(saliency, profile, search, finetune),
        *sums_section(evaluate["sums"]), *device_section(evaluate), *made_section(config, art)]) + "\n"
    picture = front_picture(search, finetune, evaluate["sums"]["drift"])
    return {"pareto.svg": picture.encode(), "samples.png": stream.getvalue(), "report.md": text.encode()}


# ------------------------------------------------------- one photograph, one exported program

TILE = 512                                        # pixels a side; a larger photograph is done in tiles


def deblur(net, image, device="cpu", tile=TILE, overlap=64):
    """uint8 (3, H, W) of any size -> the same, restored; large images in overlapping tiles.

    Tiles fade into one another over `overlap` pixels; memory holds both images and one row of tiles.
    """
    height, width = image.shape[-2:]
    if height <= tile and width <= tile:
        return (restore(net, [image], device)[0] * 255).round().byte().cpu()
    rows, cols = ([*range(0, side - tile, tile - overlap), max(0, side - tile)] for side in (height, width))
    fade = torch.minimum(torch.arange(1, tile + 1), torch.arange(tile, 0, -1)).clamp(max=overlap) / overlap
    out, total = torch.empty_like(image), torch.zeros(4, tile, width)  # RGB and what it is to be divided by
    tick, done = progress("deblur", len(rows) * len(cols)), itertools.count(1)
    for top, following in zip(rows, [*rows[1:], height]):
        for left in cols:
            window = image[:, top:top + tile, left:left + tile]
            share = fade[None, :window.shape[1], None] * fade[:window.shape[2]]
            with torch.inference_mode():
                seen = torch.cat([net(as_batch([window], device))[0].cpu() * share, share])
                total[:, :window.shape[1], left:left + tile] += seen
            tick(next(done))
        ready = following - top                   # rows that no further tile covers
        out[:, top:following] = (quantize(total[:3, :ready] / total[3, :ready]) * 255).round()
        total = F.pad(total[:, ready:], (0, 0, 0, ready))
    return out


def tiling_db(net, image, restored, device="cpu", side=768, margin=64):
    """PSNR in dB of `restored`, in tiles, against one pass over the middle: side x side, less its margins."""
    at = [max(0, (length - side) // 2) for length in image.shape[-2:]]
    part = (..., *(slice(start, start + side) for start in at))
    inner = (..., *(slice(margin, -margin) if start else slice(None) for start in at))
    whole = restore(net, [image[part]], device)[0].cpu()
    return psnr(whole[inner], restored[part][inner].float() / 255).item()


def deblur_file(net, source, target, device):
    """Read a photograph, restore it, write it whole or not at all; PNG keeps an alpha channel."""
    suffix = target.suffix.lower()
    if target.is_dir():
        raise InputError(f"--output {target} is a folder: give a file in it")
    if suffix not in IMAGES:
        raise InputError(f"--output {target}: unknown kind of image; end it in .png or .jpg")
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"--output {target} is --input itself, which would be lost: give another name")
    writable(target.parent)

    def extras(image):
        profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA") else None
        clear = ImageOps.exif_transpose(image).convert("RGBA") if image.has_transparency_data else None
        return profile, clear and clear.getchannel("A")

    rgb, (profile, alpha), stream = load_image(source), photo(source, extras), io.BytesIO()
    restored = deblur(net, rgb, device)
    if max(rgb.shape) > TILE:
        say("deblur: done in tiles; in the middle of the picture they have "
            f"{tiling_db(net, rgb, restored, device):.1f} dB (PSNR) against a single pass")
    del rgb                                       # of a large photograph, each copy counts
    image = Image.fromarray(restored.permute(1, 2, 0).numpy())
    del restored
    if alpha is not None and suffix == ".png":
        image.putalpha(alpha)
    try:
        image.save(stream, Image.registered_extensions()[suffix], quality=95, icc_profile=profile)
    except Exception as error:                    # too large for the format, say
        raise InputError(f"--output {target} cannot be made ({first_line(error)}): give .png") from None
    write_file(target, stream.getbuffer())


def tuned_in(out, stage):
    """The artefact of stage finetune in `out`, whatever its configuration, for `stage`."""
    path = out / "finetuned.pt"
    if path.exists():
        return loaded(path, {"stage": "finetune"})
    raise InputError(f"--stage {stage} needs {path}, which is not there: run --stage all --out {out} first")


def run_deblur(source, target, out, device):
    """Restore one photograph with the net in `out`."""
    if not source or not target:
        raise InputError("--stage deblur needs --input PHOTO and --output FILE")
    net = blocks.deploy(chosen_net(tuned_in(out, "deblur"), device))
    deblur_file(net, Path(source), Path(target), device)
    say(f"deblur: {target} written")


def measured_card(out, tuned, frame):
    """PSNR, and latency at `frame`, of the tuned net as stage evaluate found them; None where it did not."""
    path, card = out / "metrics.json", dict.fromkeys(("psnr_db", "protocol", "latency_ms", "latency_on"))
    if "scores" in tuned:                         # adapted, without a stage evaluate
        return {**card, "psnr_db": tuned["scores"]["test"]["after"]["psnr_db"], "protocol": tuned["protocol"]}
    metrics = loaded(path, {"stage": "evaluate"}) if path.exists() else {"inputs": {}}
    if metrics["inputs"].get("finetuned.pt") != tuned["checksum"]:
        say(f"export: {path} is missing or of another net, so the card holds no PSNR and latency: "
            "run --stage evaluate first")
        return card
    card.update(psnr_db=metrics["chosen"]["psnr_db"], protocol=metrics["protocol"])
    if frame == metrics["config"]["frame"] and metrics["chosen"]["latency_ms"] is not None:
        card.update(latency_ms=metrics["chosen"]["latency_ms"], latency_on=metrics["sums"]["measured_on"])
    return card


def config_of(values):
    """Config of {name: value}: lists, as of JSON and argparse, become tuples; names that it lacks go."""
    known = {field.name for field in dataclasses.fields(Config)}
    return Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()
                     if name in known})


def run_export(out, frame=None):
    """Write the net in `out` as deblur.pt2 (torch.export), for frames (H, W) or as profiled, and its card."""
    tuned = tuned_in(out, "export")
    config = config_of(tuned["config"])
    height, width = frame or config.frame
    try:
        net, lines = within_float16(chosen_net(tuned), split_pairs(config, "val"), "cpu")
    except InputError as error:                   # the pairs may be on another machine
        net, lines = blocks.deploy(chosen_net(tuned)), [f"not checked for float16, as {error}"]
    say(*(f"export: {line}" for line in lines))
    program, stream = profile_device.exported(net, (1, 3, height, width)), io.BytesIO()
    torch.export.save(program, stream)
    card = {"input": program.graph_signature.user_inputs[0], "shape": [1, 3, height, width], "layout": "NCHW",
            "dtype": "float32", "range": [0, 1], "channel_order": "RGB",
            "output": "as the input; clamp it to [0, 1]", "float16": lines, "arch": tuned["arch"],
            "choice": tuned["choice"], **measured_card(out, tuned, [height, width]), "licence": "MIT",
            "seed": tuned["seed"], "versions": {"torch": str(torch.__version__)}}
    write_file(out / "deblur.pt2", stream.getvalue())
    write_file(out / "deblur.json", (json.dumps(card, indent=1) + "\n").encode())
    say(f"export: {out / 'deblur.pt2'} and deblur.json written, for frames of {height}x{width}")


# -------------------------------------------------------------------------------- running the stages

class Stage(NamedTuple):
    """A stage: its function, which needs its positional parameters after `job`; its file; shared by ranks?"""
    function: object
    file: str
    shared: bool = False

    @property
    def needs(self):
        return self.function.__code__.co_varnames[1:self.function.__code__.co_argcount]


STAGES = {"base": Stage(stage_base, "base.pt", True),
          "saliency": Stage(stage_saliency, "saliency.json"),
          "profile": Stage(stage_profile, "profile.json"),
          "distill": Stage(stage_distill, "surrogates.pt", True),
          "search": Stage(stage_search, "search.json", True),
          "finetune": Stage(stage_finetune, "finetuned.pt", True),
          "evaluate": Stage(stage_evaluate, "metrics.json"),
          "report": Stage(stage_report, "report.md")}      # what --stage all runs, in order
EVERY = {**STAGES, "control": Stage(stage_control, "control.json", True)}
ADAPT = Stage(stage_adapt, "finetuned.pt", True)         # the form that finetune has with --from
TIMED = ("profile", "evaluate")                          # what --force measures anew


def stage_of(config, name):
    return ADAPT if config.from_ and name == "finetune" else EVERY[name]


def relevant(config, name):
    """{configuration entry: value} of everything that the artefact of stage `name` depends on."""
    stage = stage_of(config, name)
    keys = {"adapt", "data"} if stage is ADAPT else {"base", "data"} if name == "base" else {name}
    found = {key: value for need in stage.needs for key, value in relevant(config, need).items()}
    for field in dataclasses.fields(config):
        value, stages = getattr(config, field.name), field.metadata["stages"]
        if keys.intersection(stages) and (config.target == "qai-hub" or "hub" not in stages):
            found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


def header(config, name, art):
    """What an artefact of stage `name` says of itself: what made it, from which artefacts and which file."""
    file = Path(config.weights if name == "base" else config.from_)
    inputs = {EVERY[need].file: content["checksum"] for need, content in art.items() if content}
    if name in ("base", "finetune") and file.is_file():
        inputs[str(file)] = zlib.crc32(file.read_bytes())
    names = {"options": option_names(config.space == "all" or config.from_)}
    return {"stage": name, "config": relevant(config, name), "seed": config.seed, "inputs": inputs,
            **(names if name not in ("base", "saliency") else {}),
            "versions": {"torch": str(torch.__version__), "numpy": np.__version__,
                         "python": platform.python_version()}}


def current(out, config, name, known, asked_by=None):
    """The artefact of stage `name`, fit for this run, and so is what it was made from, where that is there.

    known {name: artefact}: those found so before; added to. asked_by: the stage that cannot do without it;
    where none is named, None stands for what is not there, and Stale tells of what does not fit.
    """
    path, stage = out / EVERY[name].file, stage_of(config, name)
    if asked_by and not path.exists():
        raise InputError(f"stage {asked_by} needs {path}, which is not there: "
                         f"run --stage {name} --out {out} first")
    if name not in known and path.exists():
        art = {need: current(out, config, need, known, name) for need in stage.needs
               if (out / EVERY[need].file).exists()}
        try:
            known[name] = loaded(path, header(config, name, art))
        except Stale as why:
            if not asked_by:
                raise
            raise InputError(f"{why}: --stage {name} makes it anew, --stage all what follows too") from None
    return known.get(name)


def same_machine(path, table, config, device):
    """Refuse a local latency table that was measured with another device or number of threads."""
    here = profile_device.machine(device) if config.target == "local" else table
    remedies = {"device": "that machine and --device", "threads": f"--threads {table.get('threads')}"}
    for key, remedy in remedies.items():
        if table.get(key) != here.get(key):
            raise InputError(f"{path} was measured with {key} {table.get(key)}, not {here.get(key)}: "
                             f"give {remedy}, or --stage all --force to measure anew")


def refuse_other_flags(config, out, force):
    """InputError where any artefact was made with other flags than these: before a first one is replaced."""
    for name, stage in STAGES.items():
        path = out / stage.file
        if name != "report" and path.exists() and not (force and name in TIMED):
            with contextlib.suppress(Stale):
                loaded(path, {"stage": name, "config": relevant(config, name)})


def discard(path):
    """Remove what the stage of artefact `path` kept while it was unfinished."""
    for part in path.parent.glob(f"{path.stem}*.part"):
        part.unlink()


def prepared(config, name, out, device, known, anew):
    """What stage `name` is called with, {need: artefact}; None where its own artefact is there and fits."""
    def there(which, otherwise, passed=Stale):
        try:
            return current(out, config, which, known)
        except passed as why:
            say(f"{name}: {why}, so it is {otherwise}")

    path = out / EVERY[name].file
    art = {need: current(out, config, need, known, name) for need in stage_of(config, name).needs}
    if name == "report":                          # always written; shows the controls where they are there
        return {**art, "control": there("control", "left out", InputError)}
    if not anew and (own := there(name, "made anew")):
        if name == "profile":
            same_machine(path, own, config, device)
        discard(path)
        return say(f"{name}: {path} matches and is reused")
    if name in ("evaluate", "control"):
        same_machine(out / "profile.json", art["profile"], config, device)
    return art


def finish(job, name, payload):
    """Write what a stage made, and remove its unfinished work -> the artefact, read again."""
    path = job.out / EVERY[name].file
    if name != "report":
        saved(path, payload, job.head)
        discard(path)
        return loaded(path, job.head)
    for file, content in payload.items():
        write_file(job.out / file, content)


def clean(out):
    """Remove what a run that was killed while it wrote a file left of it."""
    for path in out.iterdir():
        if re.fullmatch(r"(\.[\w.-]+\.(pt|pt2|json|md|svg|png|part)|profile_jobs\.json)\.\d+", path.name):
            path.unlink(missing_ok=True)


def take_lock(path):
    """The open file `path`, locked for this process until it is closed or the process ends, in any way."""
    while True:
        file = open(path, "a+")
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            with file:
                file.seek(0)
                holder = file.read().strip() or "another process"
            raise InputError(f"{path.parent} is in use by {holder}: "
                             "wait for it, end it, or give another --out") from None
        except OSError as error:                          # some network folders have no locks
            say(f"{path.parent} cannot be locked ({error.strerror}): let nothing else write there meanwhile")
        with contextlib.suppress(FileNotFoundError):      # its holder may have removed it in the meantime
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                with contextlib.suppress(OSError):        # a full disk: locked, if without a name
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {platform.node()}")
                    file.flush()
                return file
        file.close()


@contextlib.contextmanager
def held(out):
    """Folder `out`, written by this run alone."""
    first(lambda: writable(out))
    lock = agreed(lambda: None if rank() else take_lock(out / ".lock"))
    try:
        first(lambda: clean(out))
        yield
    finally:
        if lock:
            with contextlib.suppress(OSError):    # Windows removes no file that is open
                (out / ".lock").unlink()
            lock.close()


def conclude(config, last, out, known):
    """Print what was gained, where everything is, and what to try next."""
    if last in ("evaluate", "report"):
        metrics = current(out, config, "evaluate", known, "report")
        parts = [gain_table(metrics), gain_words(metrics), pace_words(metrics),
                 *test_tables(metrics["tests"], metrics, config.frame)]
        if (out / EVERY["search"].file).exists():
            parts.append(wish_list(current(out, config, "search", known, "report")))
    elif last == "control":
        control = current(out, config, "control", known, "control")
        print(f"{control_table(control)}\n\n{control_words(control)}\n\n"
              "The report shows this as well: the same command with --stage report.")
        return
    elif last == "finetune" and config.from_:
        text = adapted_text(config, current(out, config, "finetune", known, "finetune"))
        write_file(out / "report.md", text.encode())
        parts = [text.strip()]
    else:
        return
    tables = "the tables in report.md" if last != "evaluate" else "--stage report writes the tables there"
    print("\n\n".join(parts) + f"\n\nEverything is in {out}, {tables}. Then try:\n"
          f"  python hwdeblur.py --stage deblur --out {out} --input photo.jpg --output sharp.png")


def asked_hub(config, out, force):
    """Refuse a token or a device that the hub does not know, unless nothing is left to ask of it."""
    if force or not all((out / EVERY[name].file).exists() for name in TIMED):
        profile_device.hub_client(config.hub_device)


def run(config, stage, out, device="cpu", force=False):
    """Run one stage, or "all" in order, in folder `out`; what is there and fits is reused.

    force: latencies are measured anew, with new AI Hub jobs. All ranks work on the stages that are shared;
    rank 0 alone does the others, reads, writes and prints.
    """
    out, known = Path(out), {}
    pairs_of = {"train": training_pairs, "val": split_pairs, "test": split_pairs}
    pairs = functools.cache(lambda split: pairs_of[split](config, split))
    if config.from_ and stage != "finetune":
        raise InputError(f"--from {config.from_} goes with --stage finetune, not {stage}")
    if stage == "all":                                    # better to know at once what is wrong with these
        if config.target == "qai-hub":
            first(lambda: asked_hub(config, out, force))
        agreed(lambda: (config.data and [pairs(split) for split in ("train", "test")], named_pairs(config)))
    with held(out):
        if stage == "all":
            first(lambda: refuse_other_flags(config, out, force))
        for name in STAGES if stage == "all" else [stage]:
            begun, (function, file, shared) = time.monotonic(), stage_of(config, name)
            anew = force and name in TIMED and stage in ("all", name)
            art = first(lambda: prepared(config, name, out, device, known, anew))
            if art is not None:
                job = Job(config, pairs, device, out, header(config, name, art), anew)
                payload = agreed(lambda: function(job, **art) if shared or rank() == 0 else None)
                agreed(lambda: rank() or known.update({name: finish(job, name, payload)}))
                say(f"{name}: {out / file} written, {time.monotonic() - begun:.1f} s")
        agreed(lambda: rank() or conclude(config, name, out, known))


# ------------------------------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def sides(text):
    """'256' or '720x1280' -> (height, width)."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and (width or height).isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give H or HxW, in pixels")
    return int(height), int(width or height)


# What --stage takes, in order, and what it does.
TAKES = {**{name: stage.function.__doc__.splitlines()[0] for name, stage in STAGES.items()},
         "all": "These, in order; what is there and fits is reused.",
         "control": stage_control.__doc__.splitlines()[0],
         "deblur": "Restore the photograph --input into --output with the net in --out.",
         "export": "Write that net as deblur.pt2, a torch.export program, and its card deblur.json."}
LISTED = "\n".join(f"  {name:<10}{line}" for name, line in TAKES.items())


def argument(field):
    """argparse's description of a configuration entry; in brackets its defaults, demo and paper."""
    def text(value):
        return "x".join(map(str, value)) if field.name == "frame" else shown(value).strip("'") or "none"

    about, many = field.metadata, isinstance(field.default, tuple)
    default = "off" if field.default is False else f"{text(field.default)} {about['unit']}".strip()
    paper = f"; paper: {text(PRESETS['paper'][field.name])}" if field.name in PRESETS["paper"] else ""
    common = dict(dest=field.name, default=argparse.SUPPRESS, help=f"{about['help']} [{default}{paper}]")
    if field.default is False:
        return dict(common, action="store_true")
    if field.name == "test":
        return dict(common, action="append", metavar="NAME=PATH")
    if field.name == "frame":
        return dict(common, type=sides, metavar="HxW")
    if about["choices"]:
        return dict(common, choices=about["choices"])
    kind = int if many else type(field.default)
    return dict(common, type=kind, nargs="+" if many else None,
                metavar={int: "N", float: "X", str: "TEXT"}[kind])


def parser():
    """The command line, one flag per configuration entry, grouped by stage."""
    p = Parser(allow_abbrev=False, add_help=False,
               usage="python hwdeblur.py --stage STAGE [--out FOLDER] [flags]",
               formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28),
               description="The stages, in order:\n" + LISTED,
               epilog="In brackets: the default and its unit, and that of --preset paper where it differs.")
    groups = {"any": p.add_argument_group("any stage"), "data": p.add_argument_group("data"),
              **{name: p.add_argument_group(f"stage {name}") for name in TAKES}}
    add = groups["any"].add_argument
    add("-h", "--help", action="help", help="print this")
    add("--stage", nargs="?", const=True, choices=list(TAKES), metavar="STAGE",
        help="one of the above; without a value, list them")
    add("--preset", default="demo", choices=list(PRESETS), help="defaults of all other flags [demo]")
    add("--out", metavar="FOLDER", help="folder of the artefacts [runs/PRESET]")
    add("--device", default="cpu", help="torch device, say cuda [cpu]")
    add("--threads", type=int, metavar="N", help="CPU threads [torch's own choice]")
    add("--force", action="store_true", help="measure latency anew, with new AI Hub jobs [off]")
    groups["deblur"].add_argument("--input", metavar="PHOTO", help="a photograph")
    groups["deblur"].add_argument("--output", metavar="FILE",
                                  help="where the restored one goes, .png or .jpg")
    for field in dataclasses.fields(Config):
        groups[field.metadata["stages"][0]].add_argument(flag(field.name), **argument(field))
    return p


def obey(args, config, out, device):
    """Do what the command line asks for."""
    if args.force and args.stage not in ("all", *TIMED):
        raise InputError(f"--force goes with --stage all, {' or '.join(TIMED)}, not {args.stage}")
    agreed(lambda: profile_device.usable(device))
    if args.stage == "deblur":
        first(lambda: run_deblur(args.input, args.output, out, device))
    elif args.stage == "export":
        agreed(lambda: rank() or out.exists() or tuned_in(out, "export"))
        with held(out):
            first(lambda: run_export(out, getattr(args, "frame", None)))
    else:
        run(config, args.stage, out, device, args.force)


def main(argv=None):
    """Exit status 0, or 2 after one line on stderr that names the thing and the remedy; 130 after Ctrl-C."""
    profile_device.keep_memory()                  # a fifth faster in training on CPU as well
    try:
        args = parser().parse_args(argv)
        if args.stage is True:
            print(LISTED)
            return 0
        if args.stage is None:
            raise InputError("no stage is given: --stage all runs them in order, --stage alone lists them, "
                             "--help says more")
        if args.threads is not None and not 1 <= args.threads <= 1024:
            raise InputError(f"--threads {args.threads} must be from 1 to 1024")
        for name, value in vars(args).items():
            if value == "":
                raise InputError(f"{flag(name)} is empty: leave it out, or give what it names")
        config = config_of({**PRESETS[args.preset], **vars(args)})     # the preset, then what was given
        check(config)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        with joined(args.device) as device:
            obey(args, config, Path(args.out or f"runs/{args.preset}"), device)
    except (InputError, profile_device.HubError, OSError) as error:
        if rank() == 0:
            say(f"hwdeblur: {one_line(error)}".replace("\n", " "))
        else:
            time.sleep(2)                         # torchrun ends all ranks with the first; rank 0 tells why
        return 2
    except KeyboardInterrupt:
        say("hwdeblur: interrupted; the same command goes on from here")
        return 130                                        # as shells have it
    except (MemoryError, RuntimeError) as error:          # torch's own is a RuntimeError; any rank tells it
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        say(f"hwdeblur: out of memory ({first_line(error)}): lower --width, --batch, --crop or --frame, or "
            "give smaller images")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
