"""NAFNet with swappable blocks: the net, its blocks, saliency, training, distillation, assembly, deployment.

Letters in every docstring: B batch, C channels, H W pixels, S sites, K options per site.
A *site* is a block that may be replaced ("dec0.0"), an *option* its number in BLOCKS (0 = the
original), or NO_BLOCK, a *surrogate* a trained alternative for one site, a *choice* a dict {site: option}.
Images are float32 RGB in [0, 1]; nets and images stay in channels_last.
"""
import argparse
import contextlib
import copy
import functools
import itertools
import math
import statistics
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker


# ------------------------------------------------------------------------------- operators

def layer_norm(x, weight, bias, eps=1e-6):
    """Layer norm over the channels of x (B, C, H, W), at each pixel (Chen et al. 2022, section 3.2).

    On a channels_last tensor both permutes are views, so this is one call of the fused kernel.
    """
    y = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps)        # (B, H, W, C)
    return y.permute(0, 3, 1, 2)


def sliding_mean(x, size, dim):
    """Mean of x over every full window of `size` along `dim`; that axis shrinks by size - 1.

    Running sums in float64: differences of float32 ones lose digits over large maps. In an exported program
    it is an average pool, slower here, but known to every device.
    """
    if torch.compiler.is_exporting():
        return F.avg_pool2d(x, (size, 1) if dim == 2 else (1, size), stride=1)
    zero = torch.zeros_like(x.narrow(dim, 0, 1), dtype=torch.float64)
    total = torch.cat([zero, x.cumsum(dim, dtype=torch.float64)], dim)
    count = x.shape[dim] + 1 - size
    return ((total.narrow(dim, size, count) - total.narrow(dim, 0, count)) / size).to(x.dtype)


def local_mean(x, window=None):
    """Mean of x (B, C, H, W) over all pixels, (B, C, 1, 1), or over a window, (B, C, H, W).

    `window` is a side or (height, width) in pixels of x; edges repeat the nearest full window; a
    window that covers the whole map is the global mean. Test-time local converter, Chu et al. 2021.
    """
    height, width = x.shape[-2:]
    rows, cols = (window, window) if isinstance(window, int) else window or (height, width)
    if rows < 1 or cols < 1:
        raise ValueError(f"local_mean: window {window} must be at least 1")
    if rows >= height and cols >= width:
        return x.mean((2, 3), keepdim=True)
    y = sliding_mean(sliding_mean(x, min(rows, height), 2), min(cols, width), 3)
    down, right = height - y.shape[2], width - y.shape[3]
    return F.pad(y, (right // 2, right - right // 2, down // 2, down - down // 2), mode="replicate")


def gate(x):
    """SimpleGate: the product of the two halves of the channels, (B, 2C, H, W) -> (B, C, H, W)."""
    a, b = x.chunk(2, dim=1)
    return a * b


def residual(x, branch, scale):
    """x + scale * branch in one pass over memory; scale (1, C, 1, 1) starts at zero: the identity."""
    return torch.addcmul(x, branch, scale)


def zero_scale(channels):
    """The zero-initialised scale (1, C, 1, 1) of a residual branch."""
    return nn.Parameter(torch.zeros(1, channels, 1, 1))


def depthwise(channels):
    """3x3 depthwise convolution, (B, C, H, W) -> (B, C, H, W)."""
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)


def conv_bn(conv):
    """A convolution and the batch norm after it: the pair that `deploy` folds into one convolution."""
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))


# ------------------------------------------------------------------- option 0: the NAF block

class LayerNorm2d(nn.Module):
    """`layer_norm` with its weights."""

    def __init__(self, channels, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps, self.divisor = eps, 1           # see `deploy`

    def extra_repr(self):
        return f"divisor={self.divisor}" if self.divisor != 1 else ""

    def forward(self, x):
        x = x / self.divisor if self.divisor != 1 else x
        return layer_norm(x, self.weight, self.bias, self.eps / self.divisor ** 2)


class NAFBlock(nn.Module):
    """Option 0, the original (Chen et al. 2022, figure 3c), from x to z, as they have it.

    y = x + beta * conv3(a * sca(mean a)), a = gate(dw(conv1(norm1 x)));
    z = y + gamma * conv5(gate(conv4(norm2 y))). NPUs dislike three of its operators: the norm over
    channels, the global mean with its broadcast product, and the split of channels in the gate.
    """

    def __init__(self, channels, window=None):
        super().__init__()
        self.window = window
        self.conv1 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv2 = depthwise(2 * channels)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        # Position 1 in a Sequential: the released checkpoints call these weights "sca.1".
        self.sca = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels, 1))
        self.conv4 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv5 = nn.Conv2d(channels, channels, 1)
        self.norm1 = LayerNorm2d(channels)
        self.norm2 = LayerNorm2d(channels)
        self.beta = zero_scale(channels)
        self.gamma = zero_scale(channels)

    def extra_repr(self):
        return f"window={self.window}" if self.window else ""

    def forward(self, x):
        a = gate(self.conv2(self.conv1(self.norm1(x))))                             # (B, C, H, W)
        a = a * self.sca(local_mean(a, self.window))
        y = residual(x, self.conv3(a), self.beta)
        return residual(y, self.conv5(gate(self.conv4(self.norm2(y)))), self.gamma)


# ------------------------------------------------ options 1-6: channels in = channels out, stride 1

class GatedBN(nn.Module):
    """Option 1: the NAF block without layer norm and without attention; batch norm instead.

    Gone: the norm over channels and the global mean. Batch norm after a convolution costs nothing
    once folded (Ioffe & Szegedy 2015); the rest is Chen et al. 2022.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv1 = conv_bn(nn.Conv2d(channels, 2 * channels, 1))
        self.conv2 = depthwise(2 * channels)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.conv4 = conv_bn(nn.Conv2d(channels, 2 * channels, 1))
        self.conv5 = nn.Conv2d(channels, channels, 1)
        self.beta = zero_scale(channels)
        self.gamma = zero_scale(channels)

    def attend(self, a):
        return a

    def forward(self, x):
        a = self.attend(gate(self.conv2(self.conv1(x))))                            # (B, C, H, W)
        y = residual(x, self.conv3(a), self.beta)
        return residual(y, self.conv5(gate(self.conv4(y))), self.gamma)


class Gated(GatedBN):
    """Option 2: option 1 without its batch norms, so nothing normalises at all.

    Gone: the norm over channels and the global mean. Norm-free residual branches whose scale starts
    at zero train well (Zhang et al. 2019, Fixup; Bachlechner et al. 2021, ReZero).
    """

    def __init__(self, channels):
        super().__init__(channels)
        self.conv1, self.conv4 = self.conv1[0], self.conv4[0]


class InvertedResidual(nn.Module):
    """Option 3: 1x1 expand, 3x3 depthwise, 1x1 project, batch norm, ReLU6 (Sandler et al. 2018).

    Gone: the norm over channels, the global mean and the split of channels. Expansion 3: as many
    multiplications in the 1x1 convolutions, 6 C^2 per pixel, as option 1 has.
    """

    def __init__(self, channels, expansion=3):
        super().__init__()
        wide = expansion * channels
        self.expand = conv_bn(nn.Conv2d(channels, wide, 1))
        self.depthwise = conv_bn(depthwise(wide))
        self.project = conv_bn(nn.Conv2d(wide, channels, 1))
        self.scale = zero_scale(channels)

    def forward(self, x):
        a = F.relu6(self.depthwise(F.relu6(self.expand(x))))                        # (B, 3C, H, W)
        return residual(x, self.project(a), self.scale)


class ReluBN(nn.Module):
    """Option 4: the NAF block with batch norm, ReLU in place of the gate, no attention.

    Gone: the norm over channels, the global mean and the split of channels. ReLU keeps the number
    of channels that a gate halves, so the branches stay C wide (the plain block of Chen et al. 2022).
    """

    def __init__(self, channels):
        super().__init__()
        self.conv1 = conv_bn(nn.Conv2d(channels, channels, 1))
        self.conv2 = conv_bn(depthwise(channels))
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.conv4 = conv_bn(nn.Conv2d(channels, channels, 1))
        self.conv5 = nn.Conv2d(channels, channels, 1)
        self.beta = zero_scale(channels)
        self.gamma = zero_scale(channels)

    def forward(self, x):
        y = residual(x, self.conv3(F.relu(self.conv2(self.conv1(x)))), self.beta)   # (B, C, H, W)
        return residual(y, self.conv5(F.relu(self.conv4(y))), self.gamma)


class RepBranches(nn.Module):
    """3x3 + 1x1 + identity, summed; `merged` is the one 3x3 convolution they equal (Ding et al. 2021)."""

    def __init__(self, channels):
        super().__init__()
        self.out_channels = channels
        self.conv3x3 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv1x1 = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return self.conv3x3(x) + self.conv1x1(x) + x

    def merged(self):
        """The equal nn.Conv2d, freshly made; this module is left as it is."""
        conv = copy.deepcopy(self.conv3x3)
        with torch.no_grad():
            identity = torch.eye(self.out_channels).to(conv.weight)                 # (C, C)
            conv.weight[:, :, 1, 1] += self.conv1x1.weight[:, :, 0, 0] + identity
            conv.bias += self.conv1x1.bias
        return conv


class RepConv(nn.Module):
    """Option 5: 3x3 + 1x1 + identity branches that merge into one 3x3, ReLU, 1x1 (Ding et al. 2021).

    Gone: the norm over channels, the global mean, the split of channels and the depthwise
    convolution. Most multiplications of all, in the one shape that every accelerator is built for.
    """

    def __init__(self, channels):
        super().__init__()
        self.rep = conv_bn(RepBranches(channels))
        self.project = nn.Conv2d(channels, channels, 1)
        self.scale = zero_scale(channels)

    def forward(self, x):
        return residual(x, self.project(F.relu(self.rep(x))), self.scale)


class GatedBNAttention(GatedBN):
    """Option 6: option 1 with the channel attention kept.

    Gone: the norm over channels only. What it costs against option 1 is the price of attention.
    """

    def __init__(self, channels, window=None):
        super().__init__(channels)
        self.window = window
        self.sca = nn.Conv2d(channels, channels, 1)

    extra_repr = NAFBlock.extra_repr

    def attend(self, a):
        return a * self.sca(local_mean(a, self.window))


# ---------------------------------------------------------------------------- the option without a block

class NoBlock(nn.Identity):
    """No block at all: what comes in goes out. The paper has no such option.

    LANA (Molchanov et al. 2022) offers it for classifiers, Puzzle (Bercovich et al. 2024) for language
    models. Nothing is trained and nothing timed, and `deploy` leaves nothing of it.
    """


# Position = option number. A further alternative is one class (channels in = channels out) and one
# entry here; nothing else counts to seven. The number of no block is the one after theirs.
BLOCKS = (NAFBlock, GatedBN, Gated, InvertedResidual, ReluBN, RepConv, GatedBNAttention)
NO_BLOCK = len(BLOCKS)


# ---------------------------------------------------------------------------------- the net

def _stage(channels, blocks):
    return nn.Sequential(*(NAFBlock(channels) for _ in range(blocks)))


def _stages(net):
    """[(name, nn.Sequential, stride), ...] in forward order; dec0 is the shallowest decoder."""
    levels = len(net.encoders)
    encoders = [(f"enc{i}", stage, 2 ** i) for i, stage in enumerate(net.encoders)]
    decoders = [(f"dec{levels - 1 - i}", stage, 2 ** (levels - 1 - i))
                for i, stage in enumerate(net.decoders)]
    return encoders + [("mid", net.middle_blks, 2 ** levels)] + decoders


def set_window(net, window):
    """Set, in place, the attention window of every block of `net`, in input pixels (None: global)."""
    for _, stage, stride in _stages(net):
        for module in stage.modules():
            if hasattr(module, "window"):
                module.window = None if window is None else max(1, window // stride)


def keep_window(block, replaced):
    """The block, in place, with the attention window of the one that it replaces, if it has attention."""
    if hasattr(block, "window"):
        block.window = getattr(replaced, "window", None)
    return block


def _slots(net):
    """{site: (its stage, its position there)} in forward order."""
    return {f"{name}.{i}": (stage, i) for name, stage, _ in _stages(net) for i in range(len(stage))}


class NAFNet(nn.Module):
    """U-Net of NAF blocks (Chen et al. 2022); keys are those of the authors' released checkpoints.

    `width` channels at full resolution, doubled at each of len(enc) levels; `window` in input pixels
    switches every attention to local means, each level using it divided by its stride.
    """

    def __init__(self, width=32, enc=(1, 1, 1, 28), middle=1, dec=(1, 1, 1, 1), window=None):
        super().__init__()
        if len(enc) != len(dec):
            raise ValueError(f"NAFNet: {len(enc)} encoder stages but {len(dec)} decoder stages")
        channels = [width * 2 ** level for level in range(len(enc) + 1)]
        deepest = channels[-1]
        self.intro = nn.Conv2d(3, width, 3, padding=1)
        self.encoders = nn.ModuleList(_stage(c, n) for c, n in zip(channels, enc))
        self.downs = nn.ModuleList(nn.Conv2d(c, 2 * c, 2, stride=2) for c in channels[:-1])
        self.middle_blks = _stage(deepest, middle)
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2 * c, 4 * c, 1, bias=False), nn.PixelShuffle(2))
            for c in channels[-2::-1])
        self.decoders = nn.ModuleList(_stage(c, n) for c, n in zip(channels[-2::-1], dec))
        self.ending = nn.Conv2d(width, 3, 3, padding=1)
        set_window(self, window)
        self.to(memory_format=torch.channels_last)

    def blocks(self):
        """{site: block} in forward order."""
        return {site: stage[i] for site, (stage, i) in _slots(self).items()}

    def forward(self, image):
        """Blurred (B, 3, H, W) -> restored (B, 3, H, W), any H and W."""
        height, width = image.shape[-2:]
        stride = 2 ** len(self.encoders)
        image = F.pad(image, (0, -width % stride, 0, -height % stride))
        image = image.contiguous(memory_format=torch.channels_last)
        x = self.intro(image)
        skips = []
        for encoder, down in zip(self.encoders, self.downs):
            skips.append(encoder(x))
            x = down(skips[-1])
        x = self.middle_blks(x)
        for up, decoder in zip(self.ups, self.decoders):
            x = decoder(up(x) + skips.pop())
        return (self.ending(x) + image)[:, :, :height, :width]


def site_names(net):
    """Every block in forward order: enc0.0 .. enc3.27 mid.0 dec3.0 .. dec0.0 (dec3 the deepest)."""
    return list(_slots(net))


def architecture(params):
    """{width, enc, middle, dec} of an authors' state dict, read off its keys and shapes; or ValueError."""
    def count(prefix):
        found = [int(key[len(prefix):].split(".")[0]) for key in params if key.startswith(prefix)]
        if max(found, default=0) >= len(params):
            raise ValueError(f"there are not {max(found)} parts named {prefix}")
        return 1 + max(found, default=-1)

    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if "intro.weight" not in params or not all(
            torch.is_tensor(v) and v.layout == torch.strided and not v.is_meta and v.dtype in kinds
            for v in params.values()):
        raise ValueError("it needs dense real tensors, such as intro.weight")
    levels = count("encoders.")
    return {"width": params["intro.weight"].shape[0], "middle": count("middle_blks."),
            "enc": [count(f"encoders.{i}.") for i in range(levels)],
            "dec": [count(f"decoders.{i}.") for i in range(count("decoders."))]}


def load_authors(params):
    """A released state dict ("params" in the authors' files) -> NAFNet in eval mode, float32.

    ValueError, with torch's own names of what is missing, unknown or of another shape, or not finite.
    """
    try:
        arch = architecture(params)
        with torch.device("meta"):                # shapes only: a damaged key may ask for a huge net
            net = NAFNet(arch["width"], tuple(arch["enc"]), arch["middle"], tuple(arch["dec"]))
        net.load_state_dict(params, strict=True, assign=True)
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    net = copy.deepcopy(net).float().eval().to(memory_format=torch.channels_last)
    bad = [name for name, p in net.named_parameters() if not p.isfinite().all()]
    if bad:
        raise ValueError(f"{', '.join(bad[:3])} not finite")
    return net


def block_at(net, site):
    """The block at `site`; KeyError with the known names if there is none."""
    blocks = net.blocks()
    if site not in blocks:
        raise KeyError(f"no site {site!r}; this net has {', '.join(blocks)}")
    return blocks[site]


def block_io(net, x, sites):
    """{site: (input, output)} of the blocks at `sites` in one forward pass of x (B, 3, H, W).

    No gradients; the net keeps its mode; the hooks are gone afterwards, also after an error.
    """
    seen = {}
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for site in sites:
            def record(module, inputs, output, site=site):
                seen[site] = (inputs[0], output)
            hooks.callback(block_at(net, site).register_forward_hook(record).remove)
        net(x)
    return seen


# --------------------------------------------------------------------- size and cost

def count_params(module):
    """Number of parameters (17,111,907 for the default NAFNet)."""
    return sum(p.numel() for p in module.parameters())


def count_macs(module, shape):
    """Multiply-accumulates of one forward pass on an input of `shape`, by torch's own counter.

    15,956,027,392 for the default NAFNet at (1, 3, 256, 256). Runs on the meta device: no arithmetic.
    """
    weight = next(module.parameters())
    ghost = copy.deepcopy(module).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ghost(torch.empty(shape, device="meta", dtype=weight.dtype))
    return counter.get_total_flops() // 2


# ----------------------------------------------------------------- saliency (section II-A, table 1)

AT_ONCE = 2 ** 17       # pixels whose graph is held at a time: two crops of 256x256


def few_at_once(blur, sharp):
    """[(blurred, sharp), ...] of AT_ONCE pixels or one image each, from two (B, 3, H, W)."""
    few = max(1, AT_ONCE // blur[0, 0].numel())
    return list(zip(blur.split(few), sharp.split(few)))


def _shares(net, blur, sharp, loss):
    """What a few images at a time add to the mean loss of all, so that one small graph is held at a time."""
    for x, y in few_at_once(blur, sharp):
        yield loss(net(x), y) * (len(x) / len(blur))


def _added_up(rows):
    return [sum(values) for values in zip(*rows)]


def _hessian_product(shares, w, g):
    """H g for the convolution weights w, by differentiating g'(w) . g (Pearlmutter 1994)."""
    def product(share):
        live = torch.autograd.grad(share, w, create_graph=True)
        return torch.autograd.grad(sum((gi * li).sum() for gi, li in zip(g, live)), w)

    return _added_up(map(product, shares))


def _fisher(shares, convs, count):
    """Fisher pruning score of each convolution on `count` images (Theis et al. 2018; Turner et al. 2020)."""
    acts = {}

    def scores(share):
        kept = [acts[conv] for conv in convs]
        return [0.5 / count * (a * d).sum((2, 3)).square().sum()
                for a, d in zip(kept, torch.autograd.grad(share, kept))]

    with contextlib.ExitStack() as hooks:
        for conv in convs:
            def keep(module, inputs, output):
                acts[module] = output
            hooks.callback(conv.register_forward_hook(keep).remove)
        return _added_up(map(scores, shares))


def _synflow(net, shape):
    """|w dR/dw| of each convolution (Tanaka et al. 2020); larger means more conserved flow."""
    net = copy.deepcopy(net).double()
    with torch.no_grad():
        for p in net.parameters():
            p.abs_()
    w = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
    ones = torch.ones(1, *shape, dtype=torch.float64, device=w[0].device)
    return [(wi * gi).abs().sum() for wi, gi in zip(w, torch.autograd.grad(net(ones).sum(), w))]


def saliency(net, blur, sharp, loss):
    """Six zero-cost saliency measures of every block on one minibatch -> {measure: {site: float}}.

    blur, sharp (B, 3, H, W); loss(output, target) -> scalar, a mean over images: some at a time, it is added
    up. Abdelfattah et al. 2021, summed over the convolution weights w of a block; g = dL/dw of all images:
    grad_norm sum |g|_2 per layer; snip sum |w g|; grasp -sum w (H g), H and g over all convolutions of
    the net; plain sum w g; synflow sum |w dR/dw|, R the summed output of the float64 net with |params|
    on ones; fisher sum over output channels of 1/2 mean_B (sum_HW a dL/da)^2, each channel once
    (their pruning code repeats it for every weight of the channel). `net` is left untouched.
    """
    net = copy.deepcopy(net).requires_grad_(True)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    w = [m.weight for m in convs]
    shares = lambda: _shares(net, blur, sharp, loss)
    g = _added_up(torch.autograd.grad(share, w) for share in shares())
    per_layer = {
        "grad_norm": [gi.norm() for gi in g],
        "snip": [(wi * gi).abs().sum() for wi, gi in zip(w, g)],
        "grasp": [-(wi * hi).sum() for wi, hi in zip(w, _hessian_product(shares(), w, g))],
        "fisher": _fisher(shares(), convs, len(blur)),
        "plain": [(wi * gi).sum() for wi, gi in zip(w, g)],
        "synflow": _synflow(net, blur.shape[1:])}
    position = {m: i for i, m in enumerate(convs)}
    return {measure: {site: sum(values[position[m]].item() for m in block_at(net, site).modules()
                                if m in position) for site in site_names(net)}
            for measure, values in per_layer.items()}


def stage_totals(scores):
    """{measure: {site: value}} -> {measure: {stage: sum over its blocks}}, in the order of the sites."""
    totals = {}
    for measure, by_site in scores.items():
        total = totals[measure] = {}
        for site, value in by_site.items():
            stage = site.split(".")[0]
            total[stage] = total.get(stage, 0.0) + value
    return totals


def mean_ranks(scores):
    """{stage: mean rank}, 1 the most salient: stages ranked by |sum over their blocks| per measure."""
    ranks = {}
    for total in stage_totals(scores).values():
        for rank, stage in enumerate(sorted(total, key=lambda s: -abs(total[s])), start=1):
            ranks.setdefault(stage, []).append(rank)
    return {stage: sum(r) / len(r) for stage, r in ranks.items()}


def critical_stages(scores, keep=1):
    """The `keep` stages with the best mean rank, best first; ['enc3'] on the paper's table 1.

    `scores` as `saliency` returns them (a key without a dot is a stage of one block).
    """
    ranks = mean_ranks(scores)
    return sorted(ranks, key=ranks.get)[:keep]


# ----------------------------------- training, surrogates (section II-B) and their assembly

def new_surrogate(net, site, option, seed):
    """An untrained block of option `option`: channels, window, device and dtype of the block it may replace.

    Weights depend on (seed, site, option) alone; the global random state is left as it was.
    """
    replaced, like = block_at(net, site), net.intro.weight
    channels = next(len(like) * stride for name, _, stride in _stages(net) if site.startswith(f"{name}."))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(f"{seed} {site} {option}".encode()))
        block = keep_window((*BLOCKS, NoBlock)[option](channels), replaced)
    return block.to(device=like.device, dtype=like.dtype, memory_format=torch.channels_last)


def psnr_loss(x, y, cap_db=80.0):
    """What training minimises: minus the PSNR in dB of each image, averaged (Chen et al. 2022) -> scalar.

    x, y (B, 3, H, W). No image counts for more than cap_db, towards which it flattens out: minus the PSNR
    alone weights an image by 1 / MSE, and of crops that are blurred by very different amounts the nearly
    sharp ones would decide.
    """
    return (10 * ((x - y).square().mean((-3, -2, -1)) + 10 ** (-cap_db / 10)).log10()).mean()


def cosine(step, steps, first, last):
    """The learning rate of a step, falling from `first` to `last` along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2


def loop_state(model, optimizer, losses, step):
    """{step, model, optimizer, losses}, on the CPU, the last three by name, so that parts can be joined."""
    return {"step": step, "model": {name: value.cpu() for name, value in model.state_dict().items()},
            "optimizer": {name: {key: value.cpu() for key, value in optimizer.state[p].items()}
                          for name, p in model.named_parameters() if p in optimizer.state},
            "losses": {name: curve[:step].cpu() for name, curve in losses.items()}}


def resume_loop(model, optimizer, losses, state):
    """Model, optimiser and losses, in place, as they were in a `loop_state` -> its step. It may hold more."""
    state = copy.deepcopy(state)
    model.load_state_dict({name: state["model"][name] for name in model.state_dict()})
    moments = [state["optimizer"].get(name) for name, _ in model.named_parameters()]
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {i: m for i, m in enumerate(moments) if m}})
    for name, curve in losses.items():
        curve[:state["step"]] = state["losses"][name]
    return state["step"]


def autocast(device, amp):
    """bfloat16 autocast if `amp`, without its cache of cast weights: all threads would share that."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp, cache_enabled=False)


def side_by_side(device):
    """How many losses `minimise` works on at a time: on a CPU of several threads two, elsewhere one."""
    return 2 if torch.device(device).type == "cpu" and torch.get_num_threads() > 1 else 1


@contextlib.contextmanager
def mapping(count):
    """A `map` that works on `count` items at a time, each on its share of torch's CPU threads.

    The operators of a small net are too short to be split well among threads; whole passes are not.
    """
    if count == 1:
        yield map
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(threads // count)       # here too: a second team of threads would be in the way
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)


def minimise(model, optimizer, names, losses_at, steps, rate, state=None, each=None, clip=0.0, count=1):
    """The one loop of training: minimise the sum of what losses_at(step) yields -> {name: (steps,) losses}.

    losses_at yields (name of `names`, weight, function () -> scalar); of one name, the weighted mean is kept.
    `count` (1 or 2) are computed and differentiated at a time (`mapping`), so no more than `count` graphs are
    held; two may share parameters: torch locks each gradient while it adds to it, and a sum of two knows no
    order. rate(step): learning rate. state: a `loop_state` to go on from, bit for bit. each(step, losses,
    make): called before every step and after the last; make() is the state so far: copy or save it at once.
    clip: the most that the norm of the whole gradient may be, if not 0. Losses stay on the device, since
    fetching one waits for it.
    """
    def differentiated(part):
        name, weight, loss_of = part
        loss = loss_of()
        (weight * loss).backward()
        return name, weight, loss.detach()

    device = next(model.parameters()).device
    losses = {name: torch.full((steps,), math.nan, device=device) for name in names}
    begun = resume_loop(model, optimizer, losses, state) if state else 0
    with mapping(count) as run:
        for step in range(begun, steps + 1):
            if each:
                each(step, losses, lambda: loop_state(model, optimizer, losses, step))
            if step == steps:
                break
            optimizer.param_groups[0]["lr"] = rate(step)
            optimizer.zero_grad()
            found = run(differentiated, losses_at(step))
            for name, parts in itertools.groupby(found, lambda part: part[0]):
                _, weights, values = zip(*parts)
                losses[name][step] = sum(w * v for w, v in zip(weights, values)) / sum(weights)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return losses


def keep_averages(optimizer, power):
    """Let `optimizer` keep in its state the "average" of each parameter, step t weighted by about t^power.

    Polynomial-decay averaging (Shamir & Zhang 2013), for whole powers by t (t + 1) .. (t + power - 1): no
    length to choose, as the window grows with the run.
    """
    @torch.no_grad()
    def after(optimizer, args, kwargs):
        # Once for all, as every parameter has taken as many steps; on the device, as fetching would wait.
        share = (power + 1) / (power + next(iter(optimizer.state.values()))["step"])
        for p, state in optimizer.state.items():
            if "average" not in state:
                state["average"] = p.clone()
            state["average"].lerp_(p, share)

    optimizer.register_step_post_hook(after)


def train(net, batch_at, steps, lr, amp=False, state=None, each=None, wrap=None, clip=0.0, cap_db=80.0,
          average=0.0):
    """A trained copy of `net`, by NAFNet's recipe: AdamW (.9, .9), decay 1e-3, cosine to 1e-7, PSNR loss.

    batch_at(step) -> blurred, sharp (B, 3, H, W) and, where ranks share a batch out unevenly, the weight of
    this share. In eval mode throughout: NAF blocks do not mind, and batch norms keep the statistics of
    distillation, which whole images share and small crops do not. amp: the net runs under bfloat16 autocast;
    weights, loss and optimiser stay float32. state, each, clip: see `minimise`; cap_db: see `psnr_loss`; the
    loss is called "psnr". wrap(net) -> the module to call in its place, say DistributedDataParallel.
    average: if not 0, the rate falls only to lr / 4 and the copy has averaged weights (`keep_averages` with
    this power); `state` must then come from such a training.
    """
    net = copy.deepcopy(net).eval().requires_grad_(True)
    model = wrap(net) if wrap else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.9), weight_decay=1e-3, fused=True)
    count = 1 if wrap else side_by_side(net.intro.weight.device)

    def loss_of(blur, sharp):
        with autocast(blur.device, amp):
            output = model(blur)
        return psnr_loss(output.to(sharp.dtype), sharp, cap_db)

    def losses_at(step):
        blur, sharp, *weight = batch_at(step)
        for part in zip(blur.chunk(count), sharp.chunk(count)):
            share = len(part[0]) / len(blur)
            yield "psnr", share * weight[0] if weight else share, functools.partial(loss_of, *part)

    if average:
        keep_averages(optimizer, average)
    rate = lambda step: cosine(step, steps, lr, lr / 4 if average else 1e-7)
    minimise(net, optimizer, ["psnr"], losses_at, steps, rate, state, each, clip, count)
    net.requires_grad_(False)
    if average:
        for p, kept in optimizer.state.items():
            p.copy_(kept["average"])
    return net


def distill(net, sites, batch_at, steps, lr, seed, only=None, amp=False, state=None, each=None):
    """Train a surrogate for every site and option, each on its own (feature-wise distillation).

    Minimises |s(x) - b(x)|^2 / |b(x) - x|^2 where x goes into the block b in the frozen base net: the
    share of the block's work that s misses, 1 at the start. ONE teacher forward per batch feeds all
    S x (K-1) students. batch_at(step) -> blurred (B, 3, H, W), or a tuple whose first is that; AdamW,
    cosine from `lr` to 0. `only`: the (site, option) pairs to train; a subset gets the same bits. `amp`:
    teacher and students run under bfloat16 autocast; weights, losses and optimiser stay float32. state, each:
    see `minimise`; a state of at least these pairs goes on from there bit for bit.
    Returns (surrogates {site: {option: module in eval mode}}, losses {site: {option: one per step}}).
    """
    pairs = [(site, k) for site in sites for k in range(1, len(BLOCKS))]
    if only is not None:
        wanted = set(map(tuple, only))
        pairs = [pair for pair in pairs if pair in wanted]
    if not pairs:
        return {}, {}
    names = {f"{site} {k}".replace(".", "-"): (site, k) for site, k in pairs}      # modules take no dots
    students = nn.ModuleDict({name: new_surrogate(net, *pair, seed) for name, pair in names.items()})
    optimizer = torch.optim.AdamW(students.train().parameters(), lr=lr, fused=True)

    def losses_at(step):
        batch = batch_at(step)
        blur = batch if torch.is_tensor(batch) else batch[0]
        with autocast(blur.device, amp):
            features = block_io(net, blur, {site for site, _ in pairs})

        def loss_of(name):
            x, y = (feature.to(net.intro.weight.dtype) for feature in features[names[name][0]])
            with autocast(blur.device, amp):
                output = students[name](x)
            return F.mse_loss(output.to(y.dtype), y) / F.mse_loss(y, x).clamp_min(1e-12)          # y may be x

        for name in names:
            yield name, 1.0, functools.partial(loss_of, name)

    rate = lambda step: cosine(step, steps, lr, 0.0)
    count = side_by_side(net.intro.weight.device)                      # of one pair too: a subset's bits
    losses = minimise(students, optimizer, names, losses_at, steps, rate, state, each, count=count)
    surrogates, curves = {}, {}
    for name, (site, k) in names.items():
        surrogates.setdefault(site, {})[k] = students[name].eval()
        curves.setdefault(site, {})[k] = losses[name].tolist()
    return surrogates, curves


def assemble(net, surrogates, choice):
    """A new NAFNet: `net` with the chosen surrogate at each site of `choice` {site: option}.

    Shares its parameters with its sources (a copy of the module tree only) and copies their buffers,
    so nothing done to its mode or statistics reaches them. surrogates as `distill` returns them.
    """
    def share(module):
        return copy.deepcopy(module, {id(p): p for p in module.parameters()})

    new = share(net)
    slots = _slots(new)
    for site, option in choice.items():
        if option:
            stage, i = slots[site]
            stage[i] = (NoBlock() if option == len(BLOCKS) else
                        keep_window(share(surrogates[site][option]), stage[i]))
    return new


def refit(net, batches, cap_db=80.0, ridge=0.1, stride=3):
    """`net` in eval mode, its last convolution fitted to (blurred, sharp) batches in closed form.

    Swaps shift the features that it adds up, which costs much at first and little once trained, and hides
    what swaps are worth. Hence, with no training, a ridge regression (Hoerl & Kennard 1970) of sharp -
    blurred, (B, 3, H, W), on the features around every `stride`-th pixel of every `stride`-th row; an odd
    stride, as pixels come from 2x2 shuffles. An image weighs as in `psnr_loss`, 1 / (MSE + 10^(-cap_db / 10))
    of what `net` makes of it. ridge: the pull to the weights as they are, a share of each feature's power.
    All else is shared with `net`, as by `assemble`.
    """
    new, seen, gram, moment = assemble(net, {}, {}).eval(), [], 0.0, 0.0
    conv = new.ending
    hook = conv.register_forward_pre_hook(lambda conv, inputs: seen.append(inputs[0]))
    for blur, sharp in batches:
        with torch.no_grad():
            mse = (new(blur) - sharp).square().mean((1, 2, 3), keepdim=True)
        weight, y = 1 / (mse + 10 ** (-cap_db / 10)), (sharp - blur)[..., ::stride, ::stride]
        x = F.unfold(seen[-1], conv.kernel_size, padding=conv.padding, stride=stride)
        x = x.unflatten(2, [-(-side // stride) for side in seen.pop().shape[-2:]])
        x = torch.cat([x[..., :y.shape[-2], :y.shape[-1]], torch.ones_like(y[:, :1])], 1)
        x, wx, y = (each.movedim(1, 0).flatten(1) for each in (x, weight * x, y))
        gram, moment = gram + (wx @ x.T).double(), moment + (wx @ y.T).double()
    hook.remove()
    old = torch.cat([conv.weight.flatten(1), conv.bias[:, None]], 1).detach().double().T
    pull = (ridge * gram.diagonal()).clamp_min(1e-12)
    fitted, _ = torch.linalg.solve_ex(gram + pull.diag(), moment + pull[:, None] * old)
    fitted = fitted.T.to(conv.weight.dtype)
    weight = fitted[:, :-1].reshape(conv.weight.shape).contiguous(memory_format=torch.channels_last)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    conv.bias = nn.Parameter(fitted[:, -1].contiguous(), requires_grad=False)
    return new


def deploy(module, divisor=1):
    """A new module for inference: eval mode, RepConv merged, batch norms folded, NoBlock gone; equal to 1e-5.

    NAF blocks have nothing to fold: the deployed base is the base. divisor: a power of two by which layer
    norms divide first, and their eps by its square, which is exactly equal and keeps the sums in them, of
    squares above all, within the range of float16.
    """
    whole = nn.ModuleList([copy.deepcopy(module)]).eval().requires_grad_(False)    # it may be replaced itself
    for norm in (each for each in whole.modules() if isinstance(each, LayerNorm2d)):
        norm.divisor = divisor
    for parent in list(whole.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RepBranches):
                setattr(parent, name, child.merged())
    for parent in list(whole.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Sequential) and [type(m) for m in child] == [nn.Conv2d, nn.BatchNorm2d]:
                setattr(parent, name, fuse_conv_bn_eval(*child))
            elif isinstance(child, nn.Sequential) and any(isinstance(m, NoBlock) for m in child):
                setattr(parent, name, nn.Sequential(*(m for m in child if not isinstance(m, NoBlock))))
    return whole[0].requires_grad_(False).to(memory_format=torch.channels_last)


class Magnitudes(TorchDispatchMode):
    """While it is entered, notes the largest |value| of what each operator in each module returns."""

    def __init__(self):
        super().__init__()
        self.tracker, self.largest = ModuleTracker(), {}

    def note(self, operator, value):
        name = f"{max(self.tracker.parents, key=len)}: {operator}"
        size = value.abs().max().nan_to_num(math.inf, math.inf).item()
        self.largest[name] = max(self.largest.get(name, 0.0), size)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs, operator = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if operator == "native_layer_norm":       # x is (B, H, W, C)
            x = args[0]
            self.note("sum in layer norm", x.sum(-1))
            self.note("sum of squares in layer norm", (x - x.mean(-1, keepdim=True)).square().sum(-1))
        for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if torch.is_tensor(output) and output.dtype == torch.float32:  # running sums are not exported
                self.note(operator, output)
        return outputs


def magnitudes(net, batches):
    """{"module: operator": largest |value|, inf for NaN} of all intermediates of net(x) for x in batches.

    What is beyond 65504 becomes infinite where a device computes in float16. The sums inside layer norm
    count as well.
    """
    watch = Magnitudes()
    with torch.no_grad():
        for x in batches:
            with watch.tracker, watch:
                net(x)
    return watch.largest


# -------------------------------------------------------- `python blocks.py`: sizes, and speed

class PlainNorm(nn.Module):
    """Layer norm over channels written out in NCHW: what `layer_norm` is measured against."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        centred = x - x.mean(1, keepdim=True)
        y = centred / (centred.square().mean(1, keepdim=True) + self.norm.eps).sqrt()
        return y * self.norm.weight.view(1, -1, 1, 1) + self.norm.bias.view(1, -1, 1, 1)


class ToNCHW(nn.Module):
    def forward(self, x):
        return x.contiguous()


def plain_copy(net):
    """The same net with the same weights, in NCHW and with PlainNorm."""
    net = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    net.intro = nn.Sequential(ToNCHW(), net.intro)
    for block in net.blocks().values():
        block.norm1, block.norm2 = PlainNorm(block.norm1), PlainNorm(block.norm2)
    return net


def bench(rounds=7):
    """Print how much faster the net is than its plain NCHW form: medians, interleaved rounds."""
    net, x = NAFNet(), torch.rand(1, 3, 256, 256)
    pair = (net, plain_copy(net))
    calls = {"inference": torch.no_grad()(lambda m: m(x)), "training": lambda m: m(x).sum().backward()}
    for name, call in calls.items():
        times = ([], [])
        for turn in range(rounds + 1):
            for i, module in enumerate(pair):
                started = time.perf_counter()
                call(module)
                times[i].append(time.perf_counter() - started)
        fast, slow = (statistics.median(t[1:]) for t in times)
        print(f"{name} at 256x256, {torch.get_num_threads()} threads: {slow / fast:.2f}x the speed of plain "
              f"NCHW ({fast * 1e3:.0f} against {slow * 1e3:.0f} ms)")


def main():
    """Print the blocks: parameters and MACs at shapes of the paper's net."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--bench", action="store_true", help="and the net's speed against plain NCHW")
    arguments = parser.parse_args()
    print(f"{'option':<22}{'params, C=32':>14}{'MMACs, 32x256x256':>20}{'MMACs, 512x16x16':>20}")
    for option, block in enumerate(BLOCKS):
        shapes = ((1, 32, 256, 256), (1, 512, 16, 16))
        macs = [count_macs(deploy(block(shape[1])), shape) / 1e6 for shape in shapes]
        size = count_params(deploy(block(32)))
        print(f"{option} {block.__name__:<20}{size:>14,}{macs[0]:>20.1f}{macs[1]:>20.1f}")
    net = NAFNet()
    print(f"NAFNet width 32: {len(site_names(net))} blocks, {count_params(net):,} parameters, "
          f"{count_macs(net, (1, 3, 256, 256)) / 1e9:.2f} GMACs at 256x256")
    if arguments.bench:
        bench()


if __name__ == "__main__":
    main()
