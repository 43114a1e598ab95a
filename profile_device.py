"""Latency of blocks and nets, in milliseconds: this machine, or the paper's published table.

A latency table is a dict that goes into JSON as it is:
  sites {site: [ms of option 0, 1, ..]}, rest_ms (the net without those blocks), base_ms (the whole
  base net, measured at once), options (class names), frame [H, W], and what it was measured on.
Batch 1; pass `deploy` so that latency is that of deployed modules. torch only: this file can be copied by itself.
"""
import argparse
import copy
import datetime
import platform
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

# Table 2 of the paper: Alt-0 (the NAF block) to Alt-6 on a Samsung Galaxy S24 Ultra; table 3: 177 ms.
PAPER_BLOCK_MS = (53.0, 15.0, 13.0, 19.0, 11.0, 9.0, 28.0)
PAPER_BASE_MS = 177.0


def time_local(module, shape, device="cpu", rounds=20, warmup=3):
    """Median milliseconds of module(x), x random of `shape`, channels_last, batch 1 unless shape says so.

    The module is used as it is (mode and format); to compare several, use `time_together`.
    """
    return statistics.median(time_together({0: (module, shape)}, device, rounds, warmup)[0])


def time_together(entries, device="cpu", rounds=20, warmup=3):
    """{name: (module, shape)} -> {name: [ms, one per round]}.

    Every round visits each module, so that a machine that drifts does so under all of them alike; a
    visit is one call that counts for nothing (its caches are cold) and the best of three that follow.
    """
    keep_memory()
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.rand(shape, generator=generator).to(device).contiguous(
        memory_format=torch.channels_last) for name, (_, shape) in entries.items()}
    times = {name: [] for name in entries}
    with torch.inference_mode():
        for turn in range(-warmup, rounds):
            for name, (module, _) in entries.items():
                module(inputs[name])
                calls = [call_ms(module, inputs[name]) for _ in range(3)]
                if turn >= 0:
                    times[name].append(min(calls))
    return times


def keep_memory():
    """Make the C library keep freed memory: a freed block of 31 MiB raises glibc's dynamic threshold.

    Below it, whether an activation is page-faulted anew in every call depends on what ran before, and a
    block took up to three times as long inside one process as inside another. Harmless elsewhere.
    """
    torch.empty(31 * 2 ** 20, dtype=torch.uint8)


def call_ms(function, x):
    """Milliseconds of one call: CUDA events where x lives on a GPU, the wall clock elsewhere."""
    if x.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function(x)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    started = time.perf_counter()
    function(x)
    return (time.perf_counter() - started) * 1e3


def latency_table(net, surrogates, sites, frame, target, deploy=None, device="cpu", rounds=20):
    """Latency of every option at every site, of the rest of the net, and of the whole base net.

    net: a blocks.NAFNet; surrogates {site: {option: module}} (trained or not: time does not depend on
    it); frame: (H, W) or one side, in pixels; target "local" (this machine) or "paper" (its table 2).
    deploy: makes a module ready for inference (blocks.deploy); default, a copy in eval mode.
    Nothing passed in is altered. Raises ValueError for another target or option count.
    """
    frame = (frame, frame) if isinstance(frame, int) else tuple(frame)
    blocks = {site: [net.blocks()[site], *(surrogates[site][k] for k in sorted(surrogates[site]))] for site in sites}
    options = [type(block).__name__ for block in next(iter(blocks.values()), [])]
    if target == "paper":
        timing = paper_timing(sites, len(options))
    elif target == "local":
        timing = local_timing(net, blocks, frame, deploy or in_eval_mode, device, rounds)
    else:
        raise ValueError(f"latency_table: target {target!r} is neither 'local' nor 'paper'")
    return {"target": target, "frame": list(frame), "options": options, **timing}


def in_eval_mode(module):
    return copy.deepcopy(module).eval()


def paper_timing(sites, n_options):
    """Table 2 at every site. It gives no time for the rest of the net, so that counts as 0."""
    if n_options != len(PAPER_BLOCK_MS):
        raise ValueError(f"the paper's table has {len(PAPER_BLOCK_MS)} options, this search {n_options}: "
                         "use target local")
    return {"device": "Samsung Galaxy S24 Ultra (published, not measured here)",
            "sites": {site: list(PAPER_BLOCK_MS) for site in sites},
            "rest_ms": 0.0, "base_ms": PAPER_BASE_MS}


def local_timing(net, blocks, frame, deploy, device, rounds):
    """Times on `device`; equal (block type, shape) once; the whole net in the same rounds."""
    net = deploy(net).to(device)
    shapes = input_shapes(net, list(blocks), (1, 3, *frame))
    entries = {"net": (net, (1, 3, *frame))}
    for site, options in blocks.items():
        for block in options:
            key = (type(block).__name__, shapes[site])
            if key not in entries:
                entries[key] = (deploy(block).to(device), shapes[site])
    times = time_together(entries, device, rounds)
    ms = {name: statistics.median(samples) for name, samples in times.items()}
    sites = {site: [ms[type(block).__name__, shapes[site]] for block in options]
             for site, options in blocks.items()}
    return {**machine(device), "sites": sites, "base_ms": ms["net"],
            "rest_ms": ms["net"] - sum(row[0] for row in sites.values()),
            "spread": max(relative_spread(samples) for samples in times.values()), "rounds": rounds}


def input_shapes(net, sites, shape):
    """{site: shape of what goes into its block} for a net input of `shape`, by one forward pass."""
    shapes, handles = {}, []
    for site in sites:
        def record(module, inputs, site=site):
            shapes[site] = tuple(inputs[0].shape)
        handles.append(net.blocks()[site].register_forward_pre_hook(record))
    try:
        with torch.inference_mode():
            net(torch.zeros(shape, device=next(net.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def relative_spread(samples):
    """Interquartile range over median."""
    quarters = statistics.quantiles(samples, n=4)
    return (quarters[2] - quarters[0]) / quarters[1]


def machine(device):
    """What a local table was measured on."""
    on_gpu = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}"
    return {"device": name, "runtime": f"torch {torch.__version__}", "precision": "float32",
            "threads": torch.get_num_threads(), "date": datetime.date.today().isoformat()}


def network_ms(table, choice):
    """Predicted latency of a whole net: the rest plus one block per site; sites not in choice keep 0."""
    return table["rest_ms"] + sum(row[choice.get(site, 0)] for site, row in table["sites"].items())


# ------------------------------------------------------------- the operators blocks are made of

class Operator(nn.Module):
    """A function of x as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def channel_layer_norm(x):
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)


def operators(channels):
    """{name: module} of what NAF blocks and their alternatives consist of, at `channels`."""
    return {"1x1 convolution": nn.Conv2d(channels, channels, 1),
            "3x3 convolution": nn.Conv2d(channels, channels, 3, padding=1),
            "3x3 depthwise": nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            "channel layer norm": Operator(channel_layer_norm),
            "batch norm": nn.BatchNorm2d(channels),
            "pool, broadcast product": Operator(lambda x: x * x.mean((2, 3), keepdim=True)),
            "gate (half channels)": Operator(lambda x: torch.mul(*x.chunk(2, dim=1))),
            "ReLU": nn.ReLU()}


def main(argv=None):
    """Print this machine's operator latencies at the shapes of a NAFNet."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--target", choices=["local"], default="local")
    parser.add_argument("--width", type=int, default=32, help="channels at full resolution")
    parser.add_argument("--frame", type=int, default=256, help="side of the net's input, pixels")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.width < 2 or args.width % 2 or args.frame < 16:
        parser.error("--width must be even and --frame at least 16")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} is not to be had here: {str(error).splitlines()[0]}")
    shapes = [(1, args.width * 2 ** level, args.frame // 2 ** level, args.frame // 2 ** level)
              for level in range(5)]
    entries = {(name, shape): (module.eval().to(args.device, memory_format=torch.channels_last), shape)
               for shape in shapes for name, module in operators(shape[1]).items()}
    times = time_together(entries, args.device)
    print(f"milliseconds on {machine(args.device)['device']}, {torch.get_num_threads()} threads")
    print(f"{'':<26}" + "".join(f"{'x'.join(map(str, shape[1:])):>14}" for shape in shapes))
    for name in operators(2):
        print(f"{name:<26}" + "".join(f"{statistics.median(times[name, s]):14.3f}" for s in shapes))


if __name__ == "__main__":
    main()
