"""Tests: `python test_hwdeblur.py`, or one class or test by name: `python test_hwdeblur.py Search`.

Every oracle is independent of what it checks: brute force, a closed form, float64, scipy, another way
to compute the same, or a figure that the papers print. No test asserts a time; each prints how long it took.
"""
import ast
import contextlib
import copy
import dataclasses
import http.server
import io
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.integrate import trapezoid
from scipy.stats import multivariate_normal, norm
from torch import nn

import blocks
import hwdeblur
import profile_device
import search

HERE = Path(__file__).resolve().parent
# An option that blocks.BLOCKS has beyond the published seven gets a time here, so that --target paper, which is
# exact from run to run, serves the tests whatever the number of options.
profile_device.PAPER_BLOCK_MS += (20.0,) * (len(blocks.BLOCKS) - len(profile_device.PAPER_BLOCK_MS))
TABLE_1 = {  # enc0 enc1 enc2 enc3 mid dec3 dec2 dec1 dec0, as printed in the paper
    "grad_norm": (.0118, .0050, .0037, .0644, .0008, .0040, .0086, .0193, .0195),
    "snip": (.04, .03, .05, 1.6, .04, .09, .11, .12, .07),
    "grasp": (.0005, -.0001, .0006, -.0017, .0002, -.0008, -.0019, .0010, -.0002),
    "fisher": (1.96, 2.58, 5.19, 6.23, .99, 2.88, 4.58, 3.09, 2.13),
    "plain": (-6.95, -3.72, 2.24, 21.8, .52, 9.48, 7.52, -17.01, 8.37),
    "synflow": (2.0e18, 2.3e16, 1.6e15, 2.2e17, 2.6e12, 1.1e12, 8.3e9, 4.3e7, 1.2e12)}
STAGES = ("enc0", "enc1", "enc2", "enc3", "mid", "dec3", "dec2", "dec1", "dec0")


def randomized(module, seed=0):
    """The module with every parameter and statistic random: no zero scale hides a path."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=g).mul(0.3).to(p.dtype)
    for name, b in module.named_buffers():
        if b.is_floating_point():
            b.copy_(torch.rand(b.shape, generator=g) + 0.5)
    return module


def small_net(seed=0, **kwargs):
    with torch.random.fork_rng():
        return randomized(blocks.NAFNet(**{"width": 4, "enc": (1, 2), "dec": (1, 1), **kwargs}), seed).eval()


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def free_ports(count):
    """Ports of this machine that nothing listens to."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def damaged(content, count, rng):
    """`count` versions of some bytes: cut, with one to ten bits flipped, or with a stretch of noise."""
    for i in range(count):
        data = bytearray(content)
        at = int(rng.integers(len(data)))
        if i % 3 == 0:
            del data[at:]
        elif i % 3 == 1:
            for j in rng.integers(len(data), size=rng.integers(1, 11)):
                data[j] ^= 1 << int(rng.integers(8))
        else:
            noise = rng.bytes(int(rng.integers(1, 200)))
            data[at:at + len(noise)] = noise
        yield bytes(data)


class Blocks(unittest.TestCase):
    def test_counts_of_the_published_net(self):
        net = blocks.NAFNet()
        self.assertEqual(len(blocks.site_names(net)), 36)
        self.assertEqual(blocks.count_params(net), 17_111_907)
        self.assertEqual(blocks.count_macs(net, (1, 3, 256, 256)), 15_956_027_392)

    def test_net_equals_a_plain_reading_of_the_paper(self):
        net, x = small_net().double(), images(2, 3, 13, 18).double()

        def norm(m, v):
            centred = v - v.mean(1, keepdim=True)
            unit = centred / (v.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
            return unit * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1)

        def block(b, v):
            a = b.conv2(b.conv1(norm(b.norm1, v)))
            a = a[:, :a.shape[1] // 2] * a[:, a.shape[1] // 2:]
            y = v + b.beta * b.conv3(a * b.sca[1](F.adaptive_avg_pool2d(a, 1)))
            f = b.conv4(norm(b.norm2, y))
            return y + b.gamma * b.conv5(f[:, :f.shape[1] // 2] * f[:, f.shape[1] // 2:])

        v = net.intro(F.pad(x, (0, 2, 0, 3)))
        s0 = block(net.encoders[0][0], v)
        s1 = block(net.encoders[1][1], block(net.encoders[1][0], net.downs[0](s0)))
        v = block(net.middle_blks[0], net.downs[1](s1))
        v = block(net.decoders[0][0], net.ups[0](v) + s1)
        v = block(net.decoders[1][0], net.ups[1](v) + s0)
        expected = (net.ending(v) + F.pad(x, (0, 2, 0, 3)))[:, :, :13, :18]
        torch.testing.assert_close(net(x), expected)

    def test_the_plain_form_of_the_bench_is_the_same_net(self):
        net, x = small_net(), images(1, 3, 16, 16)
        torch.testing.assert_close(blocks.plain_copy(net)(x), net(x), rtol=1e-4, atol=1e-4)

    def test_keys_of_the_released_checkpoints(self):
        keys = set(blocks.NAFNet(width=4).state_dict())
        for key in ("intro.weight", "encoders.3.27.sca.1.weight", "middle_blks.0.norm1.weight", "ups.0.0.weight",
                    "downs.3.bias", "decoders.3.0.beta", "decoders.0.0.gamma", "encoders.0.0.conv5.bias", "ending.bias"):
            self.assertIn(key, keys)
        self.assertNotIn("ups.0.0.bias", keys)
        self.assertEqual(len([k for k in keys if k.startswith("encoders.0.0.")]), 18)

    def test_site_names_are_in_forward_order(self):
        self.assertEqual(blocks.site_names(small_net()), ["enc0.0", "enc1.0", "enc1.1", "mid.0", "dec1.0", "dec0.0"])

    def test_local_mean_is_the_nearest_full_window(self):
        x = images(2, 3, 9, 12)
        torch.testing.assert_close(blocks.local_mean(x), F.adaptive_avg_pool2d(x, 1))
        torch.testing.assert_close(blocks.local_mean(x, 12), F.adaptive_avg_pool2d(x, 1))
        for window in (1, 4, 5, (3, 20), (9, 4)):
            rows, cols = (window, window) if isinstance(window, int) else window
            rows, cols = min(rows, 9), min(cols, 12)
            got = blocks.local_mean(x, window)
            for i, j in itertools.product(range(9), range(12)):
                top = min(max(i - (9 - (9 - rows + 1)) // 2, 0), 9 - rows)
                left = min(max(j - (12 - (12 - cols + 1)) // 2, 0), 12 - cols)
                torch.testing.assert_close(got[:, :, i, j], x[:, :, top:top + rows, left:left + cols].mean((2, 3)))

    def test_window_of_the_net_is_divided_by_stride(self):
        net = blocks.NAFNet(width=4, enc=(1, 1), dec=(1, 1), window=12)
        self.assertEqual([b.window for b in net.blocks().values()], [12, 6, 3, 6, 12])

    def test_alternatives_start_as_the_identity(self):
        x = images(2, 8, 6, 5)
        for block in blocks.BLOCKS:
            torch.testing.assert_close(block(8)(x), x, rtol=0, atol=0)

    def test_deploy_folds_everything_and_keeps_the_output(self):
        x = images(2, 8, 7, 9)
        for option, block in enumerate(blocks.BLOCKS):
            module = randomized(block(8), option).eval()
            before = {k: v.clone() for k, v in module.state_dict().items()}
            deployed = blocks.deploy(module)
            torch.testing.assert_close(deployed(x), module(x), rtol=1e-5, atol=1e-5)
            kinds = {type(m) for m in deployed.modules()}
            self.assertFalse(kinds & {nn.BatchNorm2d, blocks.RepBranches})
            for k, v in module.state_dict().items():
                self.assertTrue(torch.equal(v, before[k]))

    def test_deploy_of_whole_nets(self):
        net, x = small_net(), images(1, 3, 13, 18)
        base = blocks.deploy(net)
        self.assertTrue(torch.equal(base(x), net(x)))
        self.assertEqual([(k, type(m)) for k, m in base.named_modules()], [(k, type(m)) for k, m in net.named_modules()])
        self.assertTrue(all(torch.equal(v, net.state_dict()[k]) for k, v in base.state_dict().items()))
        sites = blocks.site_names(net)
        choice = {site: 1 + i % (len(blocks.BLOCKS) - 1) for i, site in enumerate(sites)}
        surrogates = {s: {k: randomized(blocks.new_surrogate(net, s, k, 0), k).eval()} for s, k in choice.items()}
        chosen = blocks.assemble(net, surrogates, choice).eval()
        deployed = blocks.deploy(chosen)
        torch.testing.assert_close(deployed(x), chosen(x), rtol=1e-5, atol=1e-5)
        self.assertFalse({type(m) for m in deployed.modules()} & {nn.BatchNorm2d, blocks.RepBranches})

    def test_block_io_removes_its_hooks_also_on_error(self):
        net, x = small_net(), images(1, 3, 8, 8)
        seen = blocks.block_io(net, x, ["enc0.0", "mid.0"])
        torch.testing.assert_close(net.encoders[0][0](seen["enc0.0"][0]), seen["enc0.0"][1])
        with self.assertRaises(RuntimeError):
            blocks.block_io(net, images(1, 5, 8, 8), ["enc0.0"])
        self.assertTrue(all(not m._forward_hooks for m in net.modules()))

    def test_site_shapes_are_what_blocks_see(self):
        net = small_net()
        seen = blocks.block_io(net, images(1, 3, 13, 18), blocks.site_names(net))
        self.assertEqual(blocks.site_shapes(net, (13, 18)), {s: tuple(i.shape) for s, (i, _) in seen.items()})

    def test_assemble_swaps_shares_and_leaves_its_sources(self):
        net = small_net()
        surrogates = {"dec0.0": {4: randomized(blocks.ReluBN(4)).eval()}}
        new = blocks.assemble(net, surrogates, {"dec0.0": 4, "mid.0": 0}).eval()
        by_hand = copy.deepcopy(net)
        by_hand.decoders[1][0] = surrogates["dec0.0"][4]
        x = images(1, 3, 8, 8)
        torch.testing.assert_close(new(x), by_hand(x), rtol=0, atol=0)
        self.assertIs(new.intro.weight, net.intro.weight)
        self.assertIs(new.decoders[1][0].beta, surrogates["dec0.0"][4].beta)
        statistics = surrogates["dec0.0"][4].conv1[1].running_mean.clone()
        new.train()(x)
        self.assertTrue(torch.equal(surrogates["dec0.0"][4].conv1[1].running_mean, statistics))
        self.assertFalse(surrogates["dec0.0"][4].training)
        self.assertIsInstance(net.decoders[1][0], blocks.NAFBlock)


class Saliency(unittest.TestCase):
    """The net's own 64-bit copy and one layer at a time, by finite differences or explicit loops."""

    def setUp(self):
        self.net = small_net().double()
        self.blur, self.sharp = images(2, 3, 8, 8).double(), images(2, 3, 8, 8, seed=1).double()
        self.scores = blocks.saliency(self.net, self.blur, self.sharp, F.mse_loss)

    def convs(self, site):
        return [m for m in self.net.blocks()[site].modules() if isinstance(m, nn.Conv2d)]

    def gradients(self, net):
        for p in net.parameters():
            p.grad = None
        F.mse_loss(net(self.blur), self.sharp).backward()
        return {n: m.weight.grad.clone() for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}

    def test_first_order_measures(self):
        net = copy.deepcopy(self.net)
        self.gradients(net)
        for site, block in net.blocks().items():
            layers = [m.weight for m in block.modules() if isinstance(m, nn.Conv2d)]
            self.assertEqual(len(layers), 6)
            self.assertAlmostEqual(self.scores["grad_norm"][site], sum(w.grad.norm().item() for w in layers))
            self.assertAlmostEqual(self.scores["snip"][site], sum((w * w.grad).abs().sum().item() for w in layers))
            self.assertAlmostEqual(self.scores["plain"][site], sum((w * w.grad).sum().item() for w in layers))

    def test_grasp_by_finite_differences_along_the_gradient(self):
        net, h = copy.deepcopy(self.net), 1e-4
        g = self.gradients(net)
        sides = []
        for sign in (1, -1):
            moved = copy.deepcopy(self.net)
            for n, m in moved.named_modules():
                if n in g:
                    m.weight.data += sign * h * g[n]
            sides.append(self.gradients(moved))
        names = {m: n for n, m in net.named_modules()}
        for site, block in net.blocks().items():
            expected = -sum(((sides[0][names[m]] - sides[1][names[m]]) / (2 * h) * m.weight).sum().item()
                            for m in block.modules() if isinstance(m, nn.Conv2d))
            self.assertAlmostEqual(self.scores["grasp"][site], expected, delta=1e-4 * abs(expected) + 1e-8)

    def test_fisher_by_bumping_one_channel(self):
        """sum_hw a dL/da of one image and channel is the derivative of L in a factor on that channel."""
        site, expected, h = "dec1.0", 0.0, 1e-5
        for conv in self.convs(site):
            for channel in range(conv.out_channels):
                squares = []
                for n in range(2):
                    values = []
                    for sign in (1, -1):
                        def bump(module, inputs, output):
                            factor = torch.ones(2, conv.out_channels, 1, 1, dtype=torch.float64)
                            factor[n, channel] += sign * h
                            return output * factor
                        handle = conv.register_forward_hook(bump)
                        with torch.no_grad():
                            values.append(F.mse_loss(self.net(self.blur), self.sharp).item())
                        handle.remove()
                    squares.append(((values[0] - values[1]) / (2 * h)) ** 2)
                expected += 0.5 * sum(squares) / 2
        self.assertAlmostEqual(self.scores["fisher"][site] / expected, 1, places=4)

    def test_synflow_by_finite_differences(self):
        net = copy.deepcopy(self.net)
        for p in net.parameters():
            p.data.abs_()
        ones, h, site = torch.ones(1, 3, 8, 8, dtype=torch.float64), 1e-6, "enc0.0"
        expected = 0.0
        for conv in [m for m in net.blocks()[site].modules() if isinstance(m, nn.Conv2d)]:
            for i in range(conv.weight.numel()):
                flat, kept, values = conv.weight.data, conv.weight.data.clone(), []
                for sign in (1, -1):
                    conv.weight.data = kept.clone(memory_format=torch.contiguous_format)
                    conv.weight.data.view(-1)[i] *= 1 + sign * h
                    with torch.no_grad():
                        values.append(net(ones).sum().item())
                conv.weight.data = kept
                expected += abs(values[0] - values[1]) / (2 * h)
        self.assertAlmostEqual(self.scores["synflow"][site] / expected, 1, places=4)

    def test_the_net_comes_back_untouched(self):
        net = small_net().train()
        before = copy.deepcopy(net.state_dict())
        state = torch.get_rng_state()
        blocks.saliency(net, self.blur.float(), self.sharp.float(), F.mse_loss)
        self.assertTrue(net.training and all(p.grad is None for p in net.parameters()))
        self.assertTrue(all(torch.equal(v, before[k]) for k, v in net.state_dict().items()))
        self.assertTrue(torch.equal(state, torch.get_rng_state()))

    def test_critical_stage_of_the_papers_table_1(self):
        scores = {measure: dict(zip(STAGES, row)) for measure, row in TABLE_1.items()}
        ranks = blocks.mean_ranks(scores)
        self.assertEqual(blocks.critical_stages(scores), ["enc3"])
        self.assertAlmostEqual(ranks["enc3"], 4 / 3)
        self.assertAlmostEqual(sorted(ranks.values())[1], 23 / 6)

    def test_a_stage_is_the_signed_sum_of_its_blocks(self):
        self.assertEqual(blocks.critical_stages({"plain": {"enc0.0": 5.0, "enc0.1": -4.9, "mid.0": -1.0}}), ["mid"])


class Distillation(unittest.TestCase):
    def setUp(self):
        self.net = small_net()
        self.calls = []

    def batch_at(self, step):
        self.calls.append(step)
        return images(2, 3, 16, 16, seed=step), None

    def test_losses_start_at_one_and_fall(self):
        surrogates, losses = blocks.distill(self.net, ["enc0.0", "mid.0"], self.batch_at, 60, 3e-2, 0)
        self.assertEqual(self.calls, list(range(60)))
        for site, options in losses.items():
            self.assertEqual(sorted(options), list(range(1, len(blocks.BLOCKS))))
            for curve in options.values():
                self.assertAlmostEqual(curve[0], 1, places=5)
                self.assertLess(curve[-1], 0.9)
        self.assertTrue(all(not m.training for row in surrogates.values() for m in row.values()))

    def test_one_teacher_forward_per_batch(self):
        count = []
        handle = self.net.intro.register_forward_hook(lambda *_: count.append(1))
        blocks.distill(self.net, ["enc0.0", "mid.0"], self.batch_at, 3, 1e-3, 0)
        handle.remove()
        self.assertEqual(len(count), 3)

    def test_any_subset_gets_the_same_bits(self):
        everything, _ = blocks.distill(self.net, ["enc0.0", "mid.0"], self.batch_at, 4, 1e-2, 7)
        some, _ = blocks.distill(self.net, ["enc0.0", "mid.0"], self.batch_at, 4, 1e-2, 7, only=[("mid.0", 3)])
        self.assertEqual({s: list(o) for s, o in some.items()}, {"mid.0": [3]})
        for k, v in some["mid.0"][3].state_dict().items():
            self.assertTrue(torch.equal(v, everything["mid.0"][3].state_dict()[k]))

    def test_a_cut_off_pass_goes_on_bit_for_bit(self):
        states, args = [], (self.net, ["enc0.0", "mid.0"], self.batch_at, 4, 1e-2, 7)
        whole, losses = blocks.distill(*args, keep=lambda make: states.append(copy.deepcopy(make())))
        for state in states:
            before, only = copy.deepcopy(state), [("mid.0", k) for k in range(1, len(blocks.BLOCKS))]
            for more in ({}, {"only": only}):
                again, curves = blocks.distill(*args, state=state, **more)
                for site, row in again.items():
                    self.assertEqual(curves[site], losses[site])
                    for k, module in row.items():
                        same = whole[site][k].state_dict()
                        self.assertTrue(all(torch.equal(v, same[name]) for name, v in module.state_dict().items()))
            self.assertTrue(all(torch.equal(v, before["students"]["mid.0", 3][0][name])
                                for name, v in state["students"]["mid.0", 3][0].items()))
        self.assertEqual([state["step"] for state in states], [0, 1, 2, 3])

    def test_teacher_and_random_state_are_left_alone(self):
        before, state = copy.deepcopy(self.net.state_dict()), torch.get_rng_state()
        blocks.distill(self.net, ["enc0.0"], self.batch_at, 2, 1e-2, 0)
        self.assertTrue(all(torch.equal(v, before[k]) for k, v in self.net.state_dict().items()))
        self.assertTrue(torch.equal(state, torch.get_rng_state()))


class Search(unittest.TestCase):
    def setUp(self):
        self.rng = np.random.default_rng(0)

    def test_encode_and_decode(self):
        n = [2, 7, 3]
        for options in itertools.product(*map(range, n)):
            self.assertEqual(tuple(search.decode(search.encode(options, n), n)), options)
        self.assertEqual(list(search.decode([0, 1, 1 / 3], n)), [0, 6, 1])
        with self.assertRaises(ValueError):
            search.decode([0, 1.1, 0], n)

    def test_pareto_mask_by_brute_force(self):
        for _ in range(200):
            Y = self.rng.integers(0, 6, (self.rng.integers(1, 12), 2)).astype(float)
            brute = [not any((z <= y).all() and (z < y).any() for z in Y) for y in Y]
            self.assertEqual(search.pareto_mask(Y).tolist(), brute)
        self.assertEqual(search.pareto_mask(np.zeros((0, 2))).tolist(), [])
        self.assertEqual(search.pareto_mask([[0, np.inf], [0, np.inf], [1, 2]]).tolist(), [True, True, True])

    def test_hypervolume_by_counting_cells(self):
        for _ in range(100):
            Y, ref = self.rng.integers(0, 12, (self.rng.integers(1, 9), 2)), (9, 10)
            cells = sum(any(y[0] <= i and y[1] <= j for y in Y) for i in range(9) for j in range(10))
            self.assertAlmostEqual(search.hypervolume(Y, ref), cells)

    def test_free_boxes_tile_what_is_not_dominated(self):
        Y, ref = self.rng.random((8, 2)), np.array([0.9, 0.8])
        boxes = search.free_boxes(Y, ref)
        for p in self.rng.uniform(-0.2, 1.1, (2000, 2)):
            free = (p < ref).all() and not any((y <= p).all() for y in Y)
            self.assertEqual(sum((b[0] <= p).all() and (p < b[1]).all() for b in boxes), int(free))

    def test_ehvi_closed_form_sampling_and_hypervolume_differences_agree(self):
        Y, ref = self.rng.random((6, 2)), np.array([1.0, 1.1])
        boxes = search.free_boxes(Y, ref)
        mean, std = self.rng.random((4, 2)), self.rng.uniform(0.05, 0.4, (4, 2))
        std[2, 1] = 0
        draws = self.rng.standard_normal((20_000, 2))
        exact, sampled = search.exact_ehvi(mean, std, boxes), search.mc_ehvi(mean, std, draws, boxes)
        volume = search.hypervolume(Y, ref)
        for i in range(4):
            points = mean[i] + std[i] * draws[:4000]
            gains = [search.hypervolume(np.vstack([Y, p]), ref) - volume for p in points]
            self.assertAlmostEqual(np.mean(gains), search.mc_ehvi(mean, std, draws[:4000], boxes)[i], places=10)
            self.assertLess(abs(exact[i] - sampled[i]), 5 * np.std(gains) / np.sqrt(len(draws)) + 1e-12)

    def test_ehvi_by_quadrature(self):
        Y, ref, mean, std = self.rng.random((4, 2)), (1.0, 1.1), np.array([[0.4, 0.5]]), np.array([[0.2, 0.3]])
        volume, normal = search.hypervolume(Y, ref), multivariate_normal(mean[0], np.diag(std[0] ** 2))
        steps = [np.linspace(m - 8 * s, r, 400) for m, s, r in zip(mean[0], std[0], ref)]
        gain = [[(search.hypervolume(np.vstack([Y, (a, b)]), ref) - volume) * normal.pdf((a, b)) for b in steps[1][::4]]
                for a in steps[0][::4]]
        expected = trapezoid(trapezoid(gain, steps[1][::4]), steps[0][::4])
        self.assertAlmostEqual(search.exact_ehvi(mean, std, search.free_boxes(Y, ref))[0], expected, places=4)

    def test_ehvi_of_a_known_point_is_its_improvement(self):
        Y, ref = np.array([[0.2, 0.8], [0.6, 0.3]]), np.array([1.0, 1.0])
        mean, std = np.array([[0.3, 0.4], [0.7, 0.9]]), np.zeros((2, 2))
        boxes = search.free_boxes(Y, ref)
        expected = [search.hypervolume(np.vstack([Y, m]), ref) - search.hypervolume(Y, ref) for m in mean]
        np.testing.assert_allclose(search.exact_ehvi(mean, std, boxes), expected, atol=1e-12)
        np.testing.assert_allclose(search.mc_ehvi(mean, std, np.zeros((1, 2)), boxes), expected, atol=1e-12)
        self.assertEqual(expected[1], 0)

    def test_gp_evidence_and_prediction_against_scipys_normal(self):
        for kernel, X in (("overlap", self.rng.integers(0, 4, (12, 3))), ("rbf", self.rng.random((12, 3)))):
            y = np.sin(X.sum(1)) + 3
            gp = search.gp_fit(X, y, kernel)

            def cov(A, B):
                return np.array([[gp.signal * np.exp(-sum(
                    r * (float(a != b) if kernel == "overlap" else (a - b) ** 2 / 2)
                    for r, a, b in zip(gp.rates, p, q))) for q in B] for p in A])

            K = cov(X, X) + gp.noise * np.eye(12)
            z = (y - y.mean()) / y.std()
            self.assertAlmostEqual(gp.log_evidence, multivariate_normal(np.zeros(12), K).logpdf(z), places=6)
            Q = self.rng.integers(0, 4, (5, 3)) if kernel == "overlap" else self.rng.random((5, 3))
            mean, std = search.gp_predict(gp, Q)
            C = cov(Q, X) @ np.linalg.inv(K)
            np.testing.assert_allclose(mean, y.mean() + y.std() * C @ z, atol=1e-6)
            variance = np.diag(cov(Q, Q) - C @ cov(X, Q))
            np.testing.assert_allclose(std, y.std() * np.sqrt(np.maximum(variance, 0)), atol=1e-4)

    def test_gradient_by_finite_differences(self):
        X, y, p, h = self.rng.integers(0, 4, (10, 3)), self.rng.standard_normal(10), np.log([.3, .6, 1.1, .9, .05]), 1e-6
        D = np.stack(list(search.distances(X, X, "overlap")))
        numeric = [(search.log_evidence(p + h * e, D, y)[0] - search.log_evidence(p - h * e, D, y)[0]) / (2 * h)
                   for e in np.eye(5)]
        np.testing.assert_allclose(search.log_evidence(p, D, y)[1], numeric, rtol=1e-5, atol=1e-6)

    def test_warp_and_its_derivative(self):
        y = np.linspace(-2, 9, 12)
        for power in (-0.7, -1e-3, 0.0, 0.4, 1.0, 1.5):
            g, slope = search.warp(y, power)
            np.testing.assert_allclose(search.unwarp(g, power), y, atol=1e-9)
            numeric = (search.warp(y, power + 1e-5)[0] - search.warp(y, power - 1e-5)[0]) / 2e-5
            np.testing.assert_allclose(slope, numeric, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(search.warp(y, 1.0)[0], search.UNIT * (10 ** (y / 10) - 1))
        self.assertTrue(np.isfinite(search.unwarp(np.array([-1e9, 1e9]), -0.5)).all())

    def test_warped_evidence_is_a_density_and_has_its_gradient(self):
        X, y = self.rng.integers(0, 4, (10, 3)), self.rng.uniform(0, 6, 10)
        p, h, D = np.array([*np.log([.3, .6, 1.1, .9, .05]), 0.6]), 1e-6, np.stack(list(search.distances(X, X, "overlap")))
        numeric = [(search.warped_evidence(p + h * e, D, y)[0] - search.warped_evidence(p - h * e, D, y)[0]) / (2 * h)
                   for e in np.eye(6)]
        np.testing.assert_allclose(search.warped_evidence(p, D, y)[1], numeric, rtol=1e-5, atol=1e-6)
        g = search.warp(y, 0.6)[0]
        slopes = (search.warp(y + h, 0.6)[0] - search.warp(y - h, 0.6)[0]) / (2 * h) * y.std()      # of y / its deviation
        K = .9 * np.exp(-np.tensordot([.3, .6, 1.1], D, 1)) + .05 * np.eye(10)
        expected = multivariate_normal(np.full(10, g.mean()), g.std() ** 2 * K).logpdf(g) + np.log(slopes).sum()
        self.assertAlmostEqual(search.warped_evidence(p, D, y)[0], expected, places=6)

    def test_the_power_of_the_warp_is_found(self):
        X = self.rng.integers(0, 4, (60, 4))
        error = 0.3 * self.rng.random((4, 4))
        y = 10 * np.log10(1 + sum(error[i, X[:, i]] for i in range(4)))
        stacked = (0.5 * X).sum(1) ** 2 / 4
        self.assertGreater(search.gp_fit(X, y, warped=True).power, 0.5)
        self.assertLess(search.gp_fit(X, stacked, warped=True).power, 0)
        for unit in (1e-6, 1e4):                                        # whatever the unit, nothing overflows
            gp = search.gp_fit(X, unit * stacked, warped=True)
            mean, std = search.gp_predict(gp, X)
            self.assertGreater(np.corrcoef(search.unwarp(mean, gp.power), stacked)[0, 1], 0.98)
            self.assertTrue(np.isfinite(std).all())

    def test_gp_takes_constants_repeats_and_single_points(self):
        for X, y in (([[0, 1]], [2.0]), ([[0, 1], [1, 1], [0, 0]], [3.0] * 3), ([[0, 1]] * 4, [1.0, 1.0, 2.0, 2.0])):
            mean, std = search.gp_predict(search.gp_fit(X, y), [[0, 1], [5, 5]])
            self.assertTrue(np.isfinite(mean).all() and np.isfinite(std).all())
        with self.assertRaises(ValueError):
            search.gp_fit([[0, 1]], [np.nan])

    def problem(self, d=4, k=4):
        return search.landscape(np.random.default_rng(5), d, k)

    def test_search_starts_with_the_ends_repeats_nothing_and_is_resumable(self):
        losses, penalty = self.problem()
        whole = search.search(lambda o: losses[o], penalty, 40, np.random.default_rng(3))
        self.assertEqual(whole[0].options, (0,) * 4)
        self.assertEqual(whole[1].options, tuple(int(p.argmin()) for p in penalty))
        self.assertEqual(len({e.options for e in whole}), 40)
        for cut in (1, 10, 30):
            asked = []
            rest = search.search(lambda o: asked.append(o) or losses[o], penalty, 40, np.random.default_rng(3),
                                 history=whole[:cut])
            self.assertEqual(rest, whole)
            self.assertEqual(len(asked), 40 - cut)

    def test_search_exhausts_a_small_space_and_stops(self):
        losses, penalty = self.problem(2, 3)
        for kernel in ("overlap", "rbf"):
            with self.assertWarnsRegex(UserWarning, "all 9 configurations"):
                found = search.search(lambda o: losses[o], penalty, 50, np.random.default_rng(0), kernel=kernel)
            self.assertEqual(sorted(e.options for e in found), list(itertools.product(range(3), repeat=2)))

    def test_spaces_of_any_shape(self):
        for sizes in ((5,), (2, 2, 2), (1, 6, 3), (1,)):
            losses, penalty = -self.rng.random(sizes), [self.rng.random(k) for k in sizes]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = search.search(lambda o: losses[o], penalty, 99, np.random.default_rng(0))
            self.assertEqual(sorted(e.options for e in found), list(np.ndindex(sizes)))
        flat = search.search(lambda o: 0.0, [np.ones(4)] * 3, 40, np.random.default_rng(0))
        self.assertEqual(len({e.options for e in flat}), 40)

    def test_an_option_of_infinite_penalty_is_never_proposed(self):
        losses, penalty = self.problem()
        penalty[1][2] = penalty[3][0] = np.inf
        found = search.search(lambda o: losses[o], penalty, 60, np.random.default_rng(0))
        self.assertTrue(all(e.options[1] != 2 and e.options[3] != 0 for e in found))
        for bad in (np.full(4, np.inf), [1, np.nan]):
            with self.assertRaisesRegex(ValueError, "finite penalty"):
                search.search(lambda o: 0.0, [bad, np.ones(2)], 5, np.random.default_rng(0))

    def test_reference_point(self):
        penalty = [np.array([1.0, 0.5]), np.array([np.inf, 2.0, 1.0])]
        base, fastest, other = ((0, 1), 0.0, 3.0), ((1, 2), 2.0, 1.5), ((1, 1), 9.0, 2.5)
        rows = [search.Evaluation(*row) for row in (base, fastest, other)]
        np.testing.assert_allclose(search.default_ref(rows, penalty), [2.2, 3.3])
        np.testing.assert_allclose(search.default_ref(rows[1:], penalty), [9.9, 2.75])      # one end is missing: all count
        np.testing.assert_allclose(search.default_ref([rows[0]._replace(loss_db=-1.0)], penalty), [-0.9, 3.3])

    def test_an_uncertain_loss_promises_no_impossible_gain(self):
        X = [(i, j) for i in range(4) for j in range(4)]
        history = [search.Evaluation(o, float(sum(o)) ** 2, 1.0) for o in X[:10]]
        draws = norm.ppf(np.linspace(0.05, 0.95, 9))[:, None].repeat(2, 1)
        gp = search.gp_fit(np.array(X[:10]), [e.loss_db for e in history], warped=True)
        losses, penalties, std = search.outcomes(history, X[10:], [np.ones(4)] * 2, "overlap", draws)
        mean, width = search.gp_predict(gp, np.array(X[10:]))
        self.assertLess(gp.power, 0)                                    # stacked swaps are punished: bounded above
        drawn = np.minimum(mean[:, None] + width[:, None] * draws[:, 0], -search.UNIT / gp.power)
        np.testing.assert_allclose(search.warp(losses, gp.power)[0], drawn, atol=1e-6)
        np.testing.assert_array_equal(penalties, np.full((6, 1), 2.0))
        np.testing.assert_array_equal(std, width)

    def test_batches_are_proposed_at_once_and_survive_a_cut(self):
        losses, penalty = self.problem()
        sizes = []

        def parallel(score, proposals):
            sizes.append(len(proposals))
            return [score(o) for o in proposals]

        def run(**more):
            return search.search(lambda o: losses[o], penalty, 35, np.random.default_rng(3), batch=4, **more)

        whole = run(map=parallel)
        self.assertEqual(sizes, [22, 4, 4, 4, 1])
        self.assertEqual(len({e.options for e in whole}), 35)
        for cut in (7, 22, 25, 26, 33):
            self.assertEqual(run(history=whole[:cut]), whole)
        one = search.search(lambda o: losses[o], penalty, 23, np.random.default_rng(3))
        self.assertEqual(one, whole[:23])

    def test_search_beats_random_on_a_known_front(self):
        losses, penalty = self.problem(5, 5)
        cost = sum(np.ix_(*penalty))
        Y = np.stack([losses.ravel(), np.broadcast_to(cost, losses.shape).ravel()], 1)
        ref = (3.0, 1.05 * cost.max())
        found = search.search(lambda o: losses[o], penalty, 60, np.random.default_rng(0), ref)
        share = search.hypervolume([e[1:] for e in found], ref) / search.hypervolume(Y, ref)
        chance = np.mean([search.hypervolume(Y[self.rng.choice(len(Y), 60, False)], ref) for _ in range(50)])
        self.assertGreater(share, 0.95)
        self.assertGreater(share, chance / search.hypervolume(Y, ref))

    def test_a_score_that_is_not_finite_is_refused(self):
        with self.assertRaisesRegex(ValueError, "not finite"):
            search.search(lambda o: np.nan, [np.ones(3)] * 2, 5, np.random.default_rng(0))

    def test_knee(self):
        front = [[0, 10], [1, 2], [2, 1], [9, 0.5], [10, 0]]
        self.assertEqual(search.knee(front, 2), [1, 2])
        self.assertEqual(search.knee([[0, 1]], 3), [0])
        self.assertEqual(search.knee([[0, 1], [1, 0]], 1), [0])
        with self.assertRaisesRegex(ValueError, "finite"):
            search.knee([[0, 1], [1, -np.inf]], 1)


def tau_by_pairs(x, y):
    """Kendall's tau of two sequences without ties: pairs that agree in order less those that do not."""
    return np.mean([np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in itertools.combinations(range(len(x)), 2)])


class Profile(unittest.TestCase):
    def setUp(self):
        self.net = small_net()
        self.sites = ["enc0.0", "mid.0", "dec0.0"]
        self.surrogates = {s: {k: blocks.new_surrogate(self.net, s, k, 0) for k in range(1, len(blocks.BLOCKS))}
                           for s in self.sites}

    def test_local_table_adds_up_and_measures_equal_blocks_once(self):
        table = profile_device.latency_table(self.net, self.surrogates, self.sites, (32, 48), "local",
                                             blocks.deploy, rounds=3)
        self.assertEqual(table["sites"]["enc0.0"], table["sites"]["dec0.0"])
        self.assertNotEqual(table["sites"]["enc0.0"], table["sites"]["mid.0"])
        self.assertTrue(all(ms > 0 for row in table["sites"].values() for ms in row))
        self.assertAlmostEqual(profile_device.network_ms(table, {}), table["base_ms"])
        swapped = profile_device.network_ms(table, {"mid.0": 5})
        self.assertAlmostEqual(table["base_ms"] - swapped, table["sites"]["mid.0"][0] - table["sites"]["mid.0"][5])
        self.assertEqual(json.loads(json.dumps(table)), table)

    def test_paper_table(self):
        table = profile_device.latency_table(self.net, self.surrogates, self.sites, 32, "paper")
        self.assertEqual(table["sites"]["mid.0"][:7], [53, 15, 13, 19, 11, 9, 28])
        self.assertEqual(profile_device.network_ms(table, {"mid.0": 5, "enc0.0": 1}), 53 + 9 + 15)
        self.assertEqual(table["base_ms"], 177)

    def test_sums_of_random_configurations(self):
        table = profile_device.latency_table(self.net, self.surrogates, self.sites, 32, "local", blocks.deploy, rounds=2)
        choices, config = {"base": {}, "chosen": {"mid.0": 5}}, hwdeblur.Config(frame=(32, 32))
        entries = {name: (blocks.deploy(blocks.assemble(self.net, self.surrogates, choice)), (1, 3, 32, 32))
                   for name, choice in choices.items()}
        measured, sums = hwdeblur.measure_nets(config, table, entries, choices, "cpu", None, count=6)
        self.assertEqual([row["net"] for row in sums["rows"][:2]], ["base", "chosen"])
        self.assertEqual({row["net"]: row["measured_ms"] for row in sums["rows"]}, measured)
        p, m = (np.array([row[key] for row in sums["rows"]]) for key in ("predicted_ms", "measured_ms"))
        self.assertEqual(len(p), 8)
        for row in sums["rows"][2:]:
            blocks_ms = [table["sites"][s][int(o)] for s, o in zip(self.sites, row["net"].split())]
            self.assertAlmostEqual(row["predicted_ms"], sums["drift"] * (table["rest_ms"] + sum(blocks_ms)))
        self.assertAlmostEqual(sums["drift"], measured["base"] / table["base_ms"])
        self.assertAlmostEqual(sums["tau"], tau_by_pairs(p[1:], m[1:]))
        self.assertAlmostEqual(sums["mean_relative_error"], np.mean(np.abs(p / m - 1)[1:]))
        for said in ("Kendall's tau", f"agree to a tau of {sums['repeat_tau']:.2f}"):
            self.assertIn(said, hwdeblur.sums_text({"sums": sums})[0])
        measured, sums = hwdeblur.measure_nets(dataclasses.replace(config, target="paper"), table, entries, choices, "cpu", None)
        self.assertEqual(measured, {"base": None, "chosen": None})
        self.assertEqual(sums, {"rows": [], "drift": 1.0, "measured_on": None, "tau": None, "mean_relative_error": None,
                                "repeat_tau": None})

    def test_random_nets_are_the_configurations_they_are_named_after(self):
        table = {"sites": dict.fromkeys(self.sites)}
        nets = hwdeblur.random_nets(table, blocks.deploy(self.net), (1, 3, 8, 8), 3, np.random.default_rng(0))
        for name, (choice, (net, _)) in nets.items():
            self.assertEqual(" ".join(str(choice[s]) for s in self.sites), name)
            expected = blocks.deploy(blocks.assemble(self.net, self.surrogates, choice))
            torch.testing.assert_close(net(images(1, 3, 8, 8)), expected(images(1, 3, 8, 8)), rtol=1e-5, atol=1e-5)

    def test_unknown_target(self):
        with self.assertRaisesRegex(ValueError, "moon"):
            profile_device.latency_table(self.net, self.surrogates, self.sites, 32, "moon")

    def test_the_pace_of_a_round_tells_nothing_about_a_module(self):
        """Rounds of any pace, and one hiccup in each module: the true times come back, where plain medians miss them."""
        true, rng = {"a": 1.0, "b": 2.0, "c": 5.0, "d": 9.0}, np.random.default_rng(0)
        pace = np.where(np.arange(9) < 4, 1.0, rng.uniform(1.3, 2, 9))
        times = {name: ms * pace for name, ms in true.items()}
        for i, samples in enumerate(times.values()):
            samples[2 * i] *= 3
        found = profile_device.settled({name: samples.tolist() for name, samples in times.items()})
        for name in true:
            self.assertAlmostEqual(found[name] / found["a"], true[name])
        self.assertGreater(max(abs(np.median(times[n]) / np.median(times["a"]) / true[n] - 1) for n in true), 0.01)

    def test_every_round_visits_every_module(self):
        calls = []
        modules = {name: (lambda x, name=name: calls.append((name, tuple(x.shape))), (1, n, 4, 4))
                   for n, name in enumerate("ab", start=1)}
        times = profile_device.time_together(modules, rounds=5, warmup=2)
        self.assertEqual({name: len(ms) for name, ms in times.items()}, {"a": 5, "b": 5})
        visits = calls[::4]                                        # each visit makes four calls
        self.assertEqual(calls, [visit for visit in visits for _ in range(4)])
        rounds = [tuple(visits[i:i + 2]) for i in range(0, 14, 2)]
        self.assertEqual({tuple(sorted(turn)) for turn in rounds}, {(("a", (1, 1, 4, 4)), ("b", (1, 2, 4, 4)))})
        self.assertEqual(len(set(rounds)), 2)                      # in either order

    def test_half_of_all_calls_slowed_down_change_no_time(self):
        true, rng = np.array([3.0, 5.0, 8.0, 9.0, 20.0]), np.random.default_rng(0)
        slow = rng.permuted(np.repeat([1.0, 1.0, 2.5, 4.0], 10)[:, None].repeat(5, 1), axis=0)          # (rounds, names)
        found = profile_device.settled(dict(enumerate((true * slow).T.tolist())))
        np.testing.assert_allclose(list(found.values()), true)
        self.assertGreater(np.abs(np.median(true * slow, 0) / true - 1).max(), 0.2)

    def test_alone_is_another_process_with_as_many_threads(self):
        self.assertNotEqual(profile_device.alone(os.getpid), os.getpid())
        threads = torch.get_num_threads()
        self.addCleanup(torch.set_num_threads, threads)
        torch.set_num_threads(threads + 1)
        self.assertEqual(profile_device.alone(torch.get_num_threads), threads + 1)
        net, state = blocks.deploy(self.net), torch.get_rng_state()
        there = profile_device.alone(blocks.NAFNet.forward, net, images(1, 3, 8, 8))
        self.assertTrue(torch.equal(there, net(images(1, 3, 8, 8))))
        self.assertTrue(torch.equal(torch.get_rng_state(), state))
        with contextlib.redirect_stderr(io.StringIO()) as said:
            self.assertEqual(profile_device.alone(lambda: os.getpid()), os.getpid())   # nothing that others could import
            with self.assertRaisesRegex(ValueError, "invalid literal"):
                profile_device.alone(int, "three")
        self.assertRegex(said.getvalue(), r"(?s)pickle.*timing in this one.*invalid literal.*timing in this one")

    def test_local_times_are_taken_in_another_process(self):
        choices, config = {"base": {}, "chosen": {"mid.0": 5}}, hwdeblur.Config(frame=(16, 16))
        entries = {name: (blocks.deploy(blocks.assemble(self.net, self.surrogates, choice)), (1, 3, 16, 16))
                   for name, choice in choices.items()}
        params = {"arch": hwdeblur.arch_of(self.net.state_dict()), "params": self.net.state_dict()}
        art = {"base": params, "saliency": {"sites": self.sites}}
        with mock.patch.object(profile_device, "stamp", side_effect=AssertionError):       # no time may be taken here
            table = hwdeblur.stage_profile(config, None, art, "cpu")
            measured, _ = hwdeblur.measure_nets(config, table, entries, choices, "cpu", None, count=2)
        self.assertGreater(min(measured.values()), 0)
        self.assertEqual(table["options"], [block.__name__ for block in blocks.BLOCKS])

    def test_one_block_type_may_be_several_options(self):
        twice = {site: {1: row[5], 2: row[1], 3: row[5]} for site, row in self.surrogates.items()}
        table = profile_device.latency_table(self.net, twice, self.sites, 16, "local", blocks.deploy, rounds=3)
        for row in table["sites"].values():
            self.assertEqual(len(row), 4)
            self.assertEqual(row[1], row[3])

    def test_rounds_go_on_until_the_measurement_repeats_itself(self):
        """Nets of 1 to 9 ms; the first two processes tell nothing about them, the next four all."""
        names, asked = ["base", *range(8)], []
        batches = [*np.random.default_rng(0).uniform(1, 9, (2, 12, 9)), *[np.tile(np.arange(1.0, 10), (12, 1))] * 4]

        def next_rounds(call, entries, device, rounds, **_):
            asked.append(rounds)
            return dict(zip(entries, batches[len(asked) - 1].T.tolist()))

        def repeat_tau(count):
            a, b = (list(profile_device.settled(dict(enumerate(np.concatenate(batches[i:count:2])[:, 1:].T.tolist()))).values())
                    for i in (0, 1))
            return tau_by_pairs(a, b)

        with mock.patch.object(profile_device, "alone", next_rounds):
            for enough, count in ((-1, 2), (repeat_tau(4), 4), (1.1, 6)):
                asked.clear()
                measured, found = hwdeblur.local_net_ms(names, "cpu", enough=enough)
                self.assertEqual((asked, list(measured)), ([12] * count, names))
                self.assertAlmostEqual(found, repeat_tau(count))
        self.assertLess(repeat_tau(2), repeat_tau(4))


class Loopback(http.server.BaseHTTPRequestHandler):
    """What AI Hub's client asks for: devices, uploads, jobs. The state is in the server, a `Hub`."""

    def log_message(self, *args):
        pass

    def answer(self, message=None, status=200, headers=()):
        body = b"" if message is None else message.SerializeToString()
        self.send_response(status)
        for name, value in (("Content-Type", "application/x-protobuf"), ("Content-Length", len(body)), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def reply(self):
        from qai_hub import public_api_pb2 as pb
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.removeprefix("/api/v1/").partition("?")
        path = path.strip("/").split("/")
        hub.requests += 1
        if hub.requests <= hub.stumbles:
            self.answer(status=500)
        elif path[0] == "put":
            hub.models[path[1]] = body
            self.answer(headers=[("ETag", "e")])
        elif self.headers["Authorization"] != f"token {hub.token}":
            self.answer(status=401)
        elif path == ["devices"]:
            names = [name for name in hub.devices if f"name={name.replace(' ', '+')}&" in query or "name=&" in query]
            self.answer(pb.DeviceList(devices=[pb.Device(name=n, os="14", attributes=["framework:tflite"]) for n in names]))
        elif path == ["models"]:
            self.answer(pb.CreateUpdateResponse(id=f"m{hub.requests}"))
        elif path[0] == "models" and self.command == "POST":
            self.answer(pb.CreateUpdateResponse(id=path[1]))
        elif path[0] == "models":
            url = f"http://127.0.0.1:{hub.server_port}/api/v1/put/{path[1]}"
            self.answer(pb.FileUploadResponse(multipart_url=pb.FileMultipartUploadURL(urls=[url], max_part_size=2 ** 30)))
        elif path == ["job_summaries"]:
            self.answer(hub.summaries("compile" in query))
        elif self.command == "POST":
            if hub.full_after == len(hub.jobs):
                return self.answer(status=429)
            created = pb.CreateUpdateResponse(id=hub.create(pb.Job.FromString(body)))
            if hub.cut_after == len(hub.jobs):                         # the job exists, its creator never knows
                return self.answer(status=401)
            self.answer(created)
        else:
            job = hub.jobs[int(path[1][1:])]
            self.answer(job if len(path) == 2 else hub.result(job))

    do_GET = do_POST = do_PUT = reply


class Hub(http.server.ThreadingHTTPServer):
    """A hub on the loopback address, in whose jobs time is a known function of the uploaded program."""
    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Loopback)
        self.token, self.devices = "hushhush", ["Samsung Galaxy S24 Ultra", "Samsung Galaxy S24", "Google Pixel 9"]
        self.models, self.jobs, self.requests, self.stumbles = {}, [], 0, 0
        self.cut_after, self.full_after, self.fail = None, None, ()
        self.ini = Path(folder, "client.ini")
        self.configure(self.token)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def configure(self, token):
        url = f"http://127.0.0.1:{self.server_port}"
        self.ini.write_text(f"[api]\napi_token = {token}\napi_url = {url}\nweb_url = {url}\n")

    def create(self, job):
        from qai_hub import public_api_pb2 as pb
        name, part = f"j{len(self.jobs)}", getattr(job, job.WhichOneof("job"))
        if part is job.compile_job:
            failed = part.name.split()[0] in self.fail
            part.compile_job_id = name
            part.target_model.CopyFrom(pb.Model(model_id=name, model_type=pb.MODEL_TYPE_TFLITE))
        else:
            failed = self.compiled(job).job_state == pb.JOB_STATE_FAILED
            part.inference_job_id = name
        part.job_state = pb.JOB_STATE_FAILED if failed else pb.JOB_STATE_DONE
        if failed:
            part.failure_reason = "operator\nunknown"
        self.jobs.append(job)
        return name

    def compiled(self, job):
        return self.jobs[int(job.inference_job.model.model_id[1:])].compile_job

    def summaries(self, compiles):
        from qai_hub import public_api_pb2 as pb
        rows = [pb.JobSummary(compile_job_summary=pb.CompileJobSummary(job_id=j.compile_job.compile_job_id,
                                                                       name=j.compile_job.name))
                if j.HasField("compile_job") else
                pb.JobSummary(inference_job_summary=pb.InferenceJobSummary(job_id=j.inference_job.inference_job_id,
                                                                           name=j.inference_job.name))
                for j in self.jobs if j.HasField("compile_job") == compiles]
        return pb.JobSummaryList(job_summaries=rows)

    def result(self, job):
        from qai_hub import public_api_pb2 as pb
        compiled = self.compiled(job)
        program = torch.export.load(io.BytesIO(self.models[compiled.model.model_id]))
        size = math.prod(compiled.tensor_type_list.types[0].tensor_type.shape)
        kinds = {node.target.__name__.split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
        layers = [pb.LayerDetail(name=kind, layer_type_name=kind, compute_unit=pb.COMPUTE_UNIT_CPU if kind == "layer_norm"
                                 else pb.COMPUTE_UNIT_NPU) for kind in sorted(kinds)]
        time_us = sum(p.numel() for p in program.state_dict.values()) + 10 * size
        return pb.JobResult(inference_job_result=pb.InferenceJobResult(
            detail=pb.ProfileDetail(major_version=1, execution_time=time_us, layer_details=layers)))


class AIHub(unittest.TestCase):
    """The real client against a hub on the loopback address."""

    def setUp(self):
        self.folder = self.enterContext(tempfile.TemporaryDirectory())
        self.jobs = Path(self.folder, "profile_jobs.json")
        self.hub = Hub(self.folder)
        self.addCleanup(self.hub.server_close)
        self.addCleanup(self.hub.shutdown)
        self.enterContext(mock.patch.dict(os.environ, {"QAIHUB_CLIENT_INI": str(self.hub.ini), "NO_PROXY": "127.0.0.1"}))
        self.enterContext(mock.patch("qai_hub.util.session.BACKOFF_FACTOR", 0.001))
        self.said = self.enterContext(contextlib.redirect_stderr(io.StringIO()))
        self.printed = self.enterContext(contextlib.redirect_stdout(io.StringIO()))
        self.convs = {n: (nn.Conv2d(3, n, 1).eval(), (1, 3, 4, 4)) for n in range(1, 5)}

    def profile(self, **kwargs):
        return profile_device.profile_hub(self.convs, jobs=self.jobs, **kwargs)

    def table(self, sites=("enc0.0", "dec0.0")):
        net = small_net(enc=(1,), dec=(1,))
        surrogates = {s: {k: blocks.new_surrogate(net, s, k, 0) for k in range(1, len(blocks.BLOCKS))} for s in sites}
        return profile_device.latency_table(net, surrogates, sites, (16, 8), "qai-hub", blocks.deploy, hub={"jobs": self.jobs})

    def test_table_holds_the_hubs_times_and_equal_blocks_are_submitted_once(self):
        table = self.table()
        expected = [(blocks.count_params(blocks.deploy(block(4))) + 10 * 4 * 16 * 8) / 1000 for block in blocks.BLOCKS]
        self.assertEqual(table["sites"], {"enc0.0": expected, "dec0.0": expected})
        base_ms = (blocks.count_params(small_net(enc=(1,), dec=(1,))) + 10 * 3 * 16 * 8) / 1000
        self.assertEqual((table["base_ms"], len(self.hub.jobs)), (base_ms, 2 * (1 + len(blocks.BLOCKS))))
        self.assertAlmostEqual(profile_device.network_ms(table, {"dec0.0": 5}), base_ms - expected[0] + expected[5])
        self.assertEqual(json.loads(json.dumps(table)), table)
        self.assertEqual([line.split(" in ")[0] for line in profile_device.remarks(table)], [
            "NAFBlock 4x16x8 (enc0.0, dec0.0) falls back to the CPU", "NAFNet 3x16x8 falls back to the CPU"])
        n = 1 + len(blocks.BLOCKS)
        self.assertIn(f"{n} modules, {n} submitted, {n} compiled, {n} profiled, 0 failed", self.said.getvalue())
        self.assertEqual(self.printed.getvalue(), "")                  # where the client warns of deprecated calls
        self.assertEqual({job.compile_job.options for job in self.hub.jobs[::2]}, {"--target_runtime tflite"})

    def test_a_failed_job_makes_its_option_unavailable(self):
        self.hub.fail = ("Gated",)
        table = self.table(["enc0.0"])
        self.assertEqual([k for k, ms in enumerate(table["sites"]["enc0.0"]) if ms is None], [2])
        self.assertIn(f"{len(blocks.BLOCKS)} profiled, 1 failed", self.said.getvalue())
        self.assertRegex(profile_device.remarks(table)[1],
                         r"Gated 4x16x8 \(enc0.0\) is unavailable: operator unknown \(http.*/j4/\)")
        self.assertEqual(profile_device.network_ms(table, {"enc0.0": 2}), math.inf)
        self.assertEqual(np.flatnonzero(np.isinf(hwdeblur.penalties(table, ["enc0.0"])[0])).tolist(), [2])
        self.hub.fail = ("NAFBlock",)
        with self.assertRaisesRegex(profile_device.HubError, "original block at mid.0.*operator unknown.*http"):
            self.table(["mid.0"])

    def test_a_run_that_was_cut_off_submits_nothing_twice(self):
        for self.hub.cut_after in (3, 6):                              # cut at a compile job, then at a profile job
            with self.assertRaisesRegex(profile_device.HubError, "authenticate"):
                self.profile()
        self.hub.cut_after = None
        found = self.profile()
        self.assertEqual([found[n]["ms"] for n in self.convs], [(4 * n + 10 * 48) / 1000 for n in self.convs])
        kinds = [(job.WhichOneof("job"), getattr(job, job.WhichOneof("job")).name) for job in self.hub.jobs]
        self.assertEqual((len(kinds), len(set(kinds))), (8, 8))
        asked = self.hub.requests
        self.assertEqual(self.profile(), found)
        self.assertEqual(self.hub.requests, asked)
        self.profile(force=True)
        self.assertEqual(len(self.hub.jobs), 16)

    def test_the_whole_command_on_a_device(self):
        out = Path(self.folder, "run")
        args = ["--target", "qai-hub", *Whole.TINY, "--enc", "1", "--dec", "1", "--evaluations", "6", "--candidates", "1",
                "--out", str(out), "--stage"]
        self.assertEqual(hwdeblur.main([*args, "all"]), 0, self.said.getvalue())
        table, metrics = (json.loads((out / name).read_text()) for name in ("profile.json", "metrics.json"))
        self.assertEqual([table[k] for k in ("device", "runtime", "frame")], ["Samsung Galaxy S24 Ultra", "tflite", [32, 32]])
        self.assertEqual(metrics["base"]["latency_ms"], (metrics["base"]["params"] + 10 * 3 * 32 * 32) / 1000)
        self.assertEqual(metrics["chosen"]["latency_ms"], (metrics["chosen"]["params"] + 10 * 3 * 32 * 32) / 1000)
        report, seconds = (out / "report.md").read_text(), json.loads((out / "seconds.json").read_text())
        self.assertIn("falls back to the CPU", report)
        self.assertEqual(list(seconds), list(hwdeblur.STAGES))
        for name in list(seconds)[:-1]:                                # the report's own time is not known in it
            self.assertRegex(report, rf"\| {name} +\| {seconds[name]['seconds']:.1f} ")
        self.assertIn(f"plus {table['rest_ms']:.1f} ms for the rest of the net", report)
        for damaged in ("[]", "{", '{"base": 1}', json.dumps({"base": {**seconds["base"], "seconds": None}})):
            (out / "seconds.json").write_text(damaged)
            self.assertEqual(hwdeblur.noted_seconds(out), {})
        (out / "report.md").unlink()
        jobs = len(self.hub.jobs)
        self.assertEqual(hwdeblur.main([*args, "all"]), 0)
        self.assertEqual(hwdeblur.main([*args, "profile", "--hub-runtime", "onnx"]), 2)
        self.assertIn("--hub-runtime tflite, not onnx", self.said.getvalue())
        self.assertEqual(len(self.hub.jobs), jobs)

    def test_the_clients_failures_are_one_line(self):
        def refused(pattern, *args):
            status = profile_device.main(["--target", "qai-hub", "--jobs", str(self.jobs), *args])
            line = self.said.getvalue().splitlines()[-1]
            self.assertEqual(status, 2)
            self.assertRegex(line, pattern)
            self.assertNotIn("hush", self.said.getvalue() + self.printed.getvalue())

        refused("no device 'Galaxy S24'; the nearest names: Samsung Galaxy S24, Samsung Galaxy S24 Ultra",
                "--hub-device", "Galaxy S24")
        self.hub.configure("hush")
        refused("Failed to authenticate")
        self.hub.configure("hush%hush")
        refused("InterpolationSyntaxError.*qai-hub configure")
        self.hub.ini.write_text("api_token = hush")
        refused("MissingSectionHeaderError.*qai-hub configure")
        self.hub.ini.unlink()
        refused("client.ini not found")
        self.hub.configure(self.hub.token)
        for text in ("{", "[]", '{"a": {}}', '{"a": 1}'):
            self.jobs.write_text(text)
            refused("profile_jobs.json is damaged")
        self.assertEqual(self.hub.jobs, [])

    def test_the_examples_of_the_readme(self):
        names = {}
        with contextlib.chdir(self.folder):
            for example in re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL):
                exec(example, names)
        self.assertEqual(names["result"]["ms"], (32 * 32 * 9 + 32 + 10 * 32 * 256 ** 2) / 1000)
        self.assertEqual(sum(isinstance(m, nn.Conv2d) for m in names["fast"].modules()), 2)
        self.assertEqual([type(b) for b in names["small"].blocks().values()],
                         [blocks.RepConv, blocks.NAFBlock, blocks.NAFBlock, blocks.NAFBlock, blocks.GatedBN])
        costs = [sum((4, 2, 1)[o] for o in e.options) for e in names["front"]]
        self.assertEqual((min(costs), max(costs)), (6, 24))

    def test_a_profile_without_a_time_is_refused(self):
        self.assertEqual(profile_device.parse_profile({"execution_summary": {"estimated_inference_time": 1234}}), 1.234)
        for profile in ({}, {"execution_summary": {}}, {"execution_summary": {"estimated_inference_time": 0}}):
            with self.assertRaisesRegex(ValueError, "no inference time"):
                profile_device.parse_profile(profile)

    def test_500s_are_ridden_out_and_what_was_measured_is_kept_at_a_limit(self):
        self.hub.stumbles, self.hub.full_after = 2, 4
        with self.assertRaisesRegex(profile_device.HubError, "429|Too Many|slow down"):
            self.profile()
        self.assertEqual([note["ms"] for note in json.loads(self.jobs.read_text()).values() if "ms" in note], [0.484, 0.488])
        self.hub.full_after = None
        self.profile()
        self.assertEqual(len(self.hub.jobs), 8)


class Metrics(unittest.TestCase):
    def test_psnr_is_averaged_over_images(self):
        x = torch.zeros(2, 3, 4, 4)
        y = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
        self.assertAlmostEqual(hwdeblur.psnr(x, y).item(), 30, places=4)
        self.assertAlmostEqual(hwdeblur.psnr(x[0], y[0]).item(), 20, places=4)
        self.assertAlmostEqual(-hwdeblur.psnr_loss(x, y).item(), 30, places=2)

    def test_ssim_by_explicit_windows(self):
        x, y = images(3, 15, 13).double(), images(3, 15, 13, seed=1).double()
        t = np.arange(11) - 5
        w = np.exp(-(t[:, None] ** 2 + t[None] ** 2) / 4.5)
        w /= w.sum()
        values = []
        for c, i, j in itertools.product(range(3), range(5), range(3)):
            a, b = x[c, i:i + 11, j:j + 11].numpy(), y[c, i:i + 11, j:j + 11].numpy()
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
            values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4)))
        self.assertAlmostEqual(hwdeblur.ssim(x, y).item(), np.mean(values), places=10)
        self.assertAlmostEqual(hwdeblur.ssim(x, x).item(), 1)


class Data(unittest.TestCase):
    def test_made_pairs_depend_on_their_seed_alone(self):
        a, b, c = (hwdeblur.made_pair(32, np.random.default_rng(seed)) for seed in (1, 1, 2))
        self.assertTrue(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]))
        self.assertFalse(torch.equal(a[0], c[0]) or torch.equal(a[0], a[1]))

    def test_a_blurred_pair_keeps_its_light(self):
        for seed in range(4):
            linear = [(v.double() / 255) ** 2.2 for v in hwdeblur.made_pair(96, np.random.default_rng(seed))]
            self.assertLess(abs(linear[0].mean() - linear[1].mean()), 0.03)
            self.assertGreater(linear[0].diff(dim=2).abs().sum(), linear[1].diff(dim=2).abs().sum())

    def test_batches_are_a_function_of_seed_and_step(self):
        pairs = [tuple(images(3, h, w, seed=h).mul(255).byte() for _ in range(2)) for h, w in ((20, 31), (17, 16))]
        batch_at = hwdeblur.crops(pairs, 5, 16, 3)
        again = hwdeblur.crops(pairs, 5, 16, 3)
        again(1)
        blur, sharp = batch_at(4)
        self.assertEqual(blur.shape, (3, 3, 16, 16))
        self.assertTrue(torch.equal(blur, sharp) and torch.equal(blur, again(4)[0]))
        self.assertFalse(torch.equal(blur, batch_at(5)[0]))

    def test_splits_share_nothing(self):
        config = hwdeblur.Config(made_train=3, made_test=2, made_size=32, crop=32)
        with contextlib.redirect_stderr(io.StringIO()):
            everything = [p[0] for s in ("train", "val", "test") for p in hwdeblur.split_pairs(config, s)]
        self.assertFalse(any(torch.equal(a, b) for a, b in itertools.combinations(everything, 2)))

    def folder(self, root, names, kinds=("blur", "sharp"), size=(24, 20)):
        for kind in kinds:
            (root / kind).mkdir(parents=True, exist_ok=True)
            for name in names:
                Image.new("RGB", size, "red").save(root / kind / name)

    def test_pairs_match_by_name_in_every_layout(self):
        for blur, sharp in hwdeblur.FOLDERS:
            with tempfile.TemporaryDirectory() as root:
                scene = Path(root) / "train" / "scene"
                self.folder(scene, ["b.PNG", "a.png"], (blur, sharp))
                (scene / blur / ".DS_Store").write_text("x")
                (scene / sharp / "notes.txt").write_text("x")
                got = [(s.parent.name, s.name, b.parent.name, b.name) for s, b in hwdeblur.list_pairs(root, "train")]
                self.assertEqual(got, [(sharp, "a.png", blur, "a.png"), (sharp, "b.PNG", blur, "b.PNG")])

    def test_only_known_folders_count_in_any_case_and_each_needs_its_partners(self):
        with tempfile.TemporaryDirectory() as root:
            scene = Path(root) / "test_c" / "scene"                    # DPDD calls its splits so
            self.folder(scene, ["a.png"], ("Source", "TARGET"))
            self.folder(Path(root) / "test_l", ["a.png"], ("source",))
            self.folder(Path(root) / "test_c" / "gopro", ["a.png"], ("blur", "blur_gamma", "sharp"))
            self.folder(Path(root) / "test_c" / ".cache", ["a.png"], ("blur",))
            (scene / "Source" / "folder.png").mkdir()
            names = [(s.parent.name, b.parent.name) for s, b in hwdeblur.list_pairs(root, "test")]
            self.assertEqual(names, [("sharp", "blur"), ("TARGET", "Source")])
            self.folder(Path(root) / "test_c" / "lost", ["a.png"], ("gt",))
            with self.assertRaisesRegex(hwdeblur.InputError, "lost/gt has images but no folder of partners"):
                hwdeblur.list_pairs(root, "test")

    def test_further_test_sets(self):
        with tempfile.TemporaryDirectory() as root:
            for folder, names in (("train", ["a.png"]), ("test/GoPro", ["b.png"]), ("test/HIDE", ["c.png", "d.png"])):
                self.folder(Path(root) / folder, names)
            list_file = Path(root, "RealBlur_J_test_list.txt")
            list_file.write_text("train/sharp/a.png train/blur/a.png \r\n")
            config = hwdeblur.Config(test=(f"whole={root}", f"HIDE={root}/test/HIDE", f"R={list_file}"))
            counts = {name: len(pairs) for name, pairs in hwdeblur.named_pairs(config).items()}
            self.assertEqual(counts, {"whole": 3, "HIDE": 2, "R": 1})
            for wrong in (["x"], ["=x"], ["a=x", "a=y"], [f"a={root}/none"], [f"a={root}/test/HIDE/blur"]):
                with self.assertRaises(hwdeblur.InputError):
                    hwdeblur.named_pairs(hwdeblur.Config(test=tuple(wrong)))

    def test_few_photographs_are_joined_by_made_pairs_half_and_half(self):
        with tempfile.TemporaryDirectory() as root:
            self.folder(Path(root) / "train", [f"{i}.png" for i in range(4)])
            config = hwdeblur.Config(data=root, crop=16, made_train=9, made_size=16)
            with contextlib.redirect_stderr(io.StringIO()):
                mixed = hwdeblur.training_pairs(config)
                again = hwdeblur.training_pairs(config)
            own = hwdeblur.split_pairs(config, "train")
            self.assertEqual([mixed.count(pair) for pair in own], [3] * 3)
            self.assertEqual(sum(torch.is_tensor(pair[0]) for pair in mixed), 9)
            for a, b in zip(mixed, again):
                self.assertTrue(torch.equal(a[0], b[0]) if torch.is_tensor(a[0]) else a == b)
            for other in ({"few": 3}, {"few": 0}, {"from_": "x"}):
                self.assertEqual(hwdeblur.training_pairs(hwdeblur.Config(data=root, crop=16, **other)), own)

    def test_decoded_images_are_kept_up_to_a_number_of_bytes(self):
        loads = []
        read = hwdeblur.keep_recent(lambda i: loads.append(i) or (torch.zeros(10, dtype=torch.uint8),) * 2, limit=60)
        for i in (1, 2, 3, 1, 4, 1, 2):                                # 20 bytes a pair: three fit
            read(i)
        self.assertEqual(loads, [1, 2, 3, 4, 2])

    def test_workers_make_the_same_batches(self):
        with tempfile.TemporaryDirectory() as root:
            for i in range(3):
                Image.effect_noise((24, 20), 50).save(Path(root, f"{i}.png"))
            pairs, state = [(Path(root, f"{i}.png"),) * 2 for i in range(3)], torch.get_rng_state()
            alone, helped = (hwdeblur.crops(pairs, 5, 16, 2, workers=n) for n in (0, 1))
            for step in (3, 4, 0):
                for a, b in zip(alone(step), helped(step)):
                    self.assertTrue(torch.equal(a, b))
            self.assertTrue(torch.equal(state, torch.get_rng_state()))
            Path(root, "1.png").write_bytes(b"no image")
            with self.assertRaisesRegex(hwdeblur.InputError, "^cannot read image [^\n]*1.png[^\n]*$"):
                list(map(hwdeblur.crops(pairs, 5, 16, 2, workers=1), range(9)))

    def test_one_layout_per_scene_and_no_name_twice(self):
        with tempfile.TemporaryDirectory() as root:
            scene = Path(root) / "train" / "scene"
            self.folder(scene, ["a.png"], ("blur", "sharp", "gt"))
            self.assertEqual(len(hwdeblur.list_pairs(root, "train")), 1)
            self.folder(scene, ["a.bmp"], ("blur", "sharp"))
            with self.assertRaisesRegex(hwdeblur.InputError, "extension"):
                hwdeblur.list_pairs(root, "train")

    def test_a_folder_is_split_without_overlap(self):
        with tempfile.TemporaryDirectory() as root:
            for split in ("train", "test"):
                self.folder(Path(root) / split / "s", [f"{i}.png" for i in range(9)])
            config = hwdeblur.Config(data=root, crop=16)
            train, val, test = (set(hwdeblur.split_pairs(config, s)) for s in ("train", "val", "test"))
            self.assertEqual((len(train | val), len(val), len(test)), (9, 1, 9))
            self.assertFalse(train & val or (train | val) & test)

    def test_a_list_file(self):
        with tempfile.TemporaryDirectory() as root:
            Path(root, "list.txt").write_text("x/s.png y/b.png\n\n")
            self.assertEqual(hwdeblur.list_pairs(Path(root, "list.txt"), "test"),
                             [(Path(root, "x/s.png"), Path(root, "y/b.png"))])

    def test_orphans_unequal_sizes_and_broken_images_are_named(self):
        with tempfile.TemporaryDirectory() as root:
            scene = Path(root) / "test" / "s"
            self.folder(scene, ["a.png", "b.png"])
            (scene / "sharp" / "b.png").unlink()
            with self.assertRaisesRegex(hwdeblur.InputError, "b.png"):
                hwdeblur.list_pairs(root, "test")
            Image.new("RGB", (9, 9)).save(scene / "sharp" / "b.png")
            pairs = hwdeblur.list_pairs(root, "test")
            with self.assertRaisesRegex(hwdeblur.InputError, "24x20.*9x9"):
                hwdeblur.load_pair(pairs[1])
            (scene / "sharp" / "a.png").write_bytes(b"not an image")
            with self.assertRaisesRegex(hwdeblur.InputError, "a.png"):
                hwdeblur.load_pair(pairs[0])


class Weights(unittest.TestCase):
    def test_authors_format_is_read_and_misfits_are_named(self):
        net = small_net(enc=(1, 2, 1), dec=(2, 1, 1), middle=2)
        with tempfile.TemporaryDirectory() as root:
            path = Path(root) / "w.pth"
            for content in ({"params": net.state_dict()}, dict(net.state_dict())):
                torch.save(content, path)
                got = hwdeblur.load_weights(path)
                torch.testing.assert_close(got(images(1, 3, 9, 9)), net(images(1, 3, 9, 9)), rtol=0, atol=0)
            bad = dict(net.state_dict())
            bad["intro.bias"] = torch.zeros(9)
            del bad["ending.weight"]
            torch.save(bad, path)
            with self.assertRaisesRegex(hwdeblur.InputError, "ending.weight, intro.bias"):
                hwdeblur.load_weights(path)
            for content in ([1, 2], {"a": torch.ones(1)}, torch.ones(3)):
                torch.save(content, path)
                with self.assertRaises(hwdeblur.InputError):
                    hwdeblur.load_weights(path)


class Report(unittest.TestCase):
    def test_the_site_table_says_what_each_swap_costs_and_gains(self):
        measures = {m: {"enc0.0": a, "enc0.1": b, "mid.0": 99.0} for m, a, b in (("one", 2.0, -3.0), ("two", 5.0, 4.0))}
        art = {"saliency": {"scores": measures},
               "profile": {"sites": {"enc0.0": [9.0, 4.0, 3.0], "enc0.1": [8.0, 2.0, 1.0]}},
               "finetune": {"choice": {"enc0.0": 2, "enc0.1": 0}, "candidates": [{}, {}], "picked": 1},
               "search": {"taken_back": [{}, {"cost_db": {"enc0.0": 0.123}, "saved_ms": {"enc0.0": 5.5}}]}}
        _, words, table, _ = hwdeblur.site_section(art, "ABC")
        self.assertEqual(words.splitlines(), ["- enc0.0: C in place of A, -5.50 ms, -0.12 dB", "- enc0.1: A stays"])
        lines = table.splitlines()[2:]
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        self.assertEqual(rows, [["enc0.0", "1.50", "9.00", "2 C", "3.00", "-5.50", "-0.12"],
                                ["enc0.1", "1.50", "8.00", "0 A", "8.00", "", ""]])

    def test_a_base_that_is_alone_on_the_front_is_named(self):
        rows = [{"options": [k], "loss_db": float(k)} for k in (0, 1)]
        art = {"profile": {"sites": {"mid.0": [2.0, 3.0]}}, "distill": {"diverged": []},
               "search": {"sites": ["mid.0"], "evaluations": rows, "front": [0], "knee": [0]}}
        self.assertRegex(hwdeblur.front_section(hwdeblur.Config(), art)[-1], "base is alone")

    def test_versions_are_those_of_the_artefacts(self):
        config, old, new = hwdeblur.Config(target="paper", weights="w.pth"), {"torch": "1"}, {"torch": "2"}
        told = [hwdeblur.made_section(config, {"base": {"versions": old}, "search": {"versions": versions}})[1]
                for versions in (old, new)]
        self.assertIn("weights are those of w.pth. Seed 0; torch 1.", told[0])
        self.assertIn("Seed 0; base: torch 1; search: torch 2.", told[1])


class Pictures(unittest.TestCase):
    def test_any_search_gives_a_picture_with_its_nets_in_it(self):
        """One, two and five evaluations, equal latencies, gains, numbers huge and tiny."""
        for name, points in {"one": [(100, 0)], "two": [(100, 0), (50, 1.5)],
                             "five": [(180, 0), (60, 5), (120, .5), (150, 1), (90, 2)],
                             "equal": [(100, .1 * i) for i in range(30)], "gains": [(180 - 10 * i, -.1 * i) for i in range(8)],
                             "huge": [(2e6 - 1e5 * i, 2.0 * i * i) for i in range(12)],
                             "tiny": [(2e-4 - 1e-5 * i, 1e-6 * i) for i in range(12)]}.items():
            rows = [{"latency_ms": ms, "penalty": ms, "loss_db": db} for ms, db in points]
            tuned = {"candidates": [{**rows[-1], "val_after_db": 30.0}], "picked": 0}
            picture = hwdeblur.pareto_picture({"evaluations": rows, "base_val_db": 30.0}, tuned)
            plot = np.array(picture)[:1000].astype(int)                # above the legend
            reddish = (plot[..., 0] - plot[..., 2] > 150).sum()
            self.assertGreater(reddish, 100, name)
            self.assertLess(len(hwdeblur.png(picture)), 300_000, name)

    def test_fronts_differ_in_grey_print(self):
        grey = [Image.new("RGB", (1, 1), colour).convert("L").getpixel((0, 0))
                for colour in (hwdeblur.SKY, hwdeblur.BLUE, hwdeblur.INK)]
        self.assertGreater(min(a - b for a, b in zip([255, *grey], grey)), 45)
        image = Image.new("L", (800, 400), 255)
        hwdeblur.dashes(hwdeblur.ImageDraw.Draw(image), [(0, 100), (400, 100), (400, 300), (800, 300)], (9, 5, 2.5), 0)
        share = [(np.asarray(image)[:, part] < 128).any(0).mean() for part in (slice(0, 390), slice(410, 800))]
        for each in share:
            self.assertAlmostEqual(each, 9 / 14, delta=0.08)

    def test_a_label_hides_nothing_where_there_is_room(self):
        box, zoom = (0, 0, 2000, 2000), hwdeblur.ZOOM
        plot, image = hwdeblur.Plot(box, (0, 1), (0, 1)), Image.new("RGB", box[2:], "white")
        draw = hwdeblur.ImageDraw.Draw(image)
        draw.rectangle((990, 0, 1999, 1999), fill="black")             # room to the left alone
        draw.rectangle((0, 0, 999, 800), fill="black")
        before = np.array(image)
        hwdeblur.draw_label(image, plot, {"latency_ms": 0.5, "loss_db": 0.5}, "net\n12.3 ms")
        after = np.array(image)
        self.assertTrue((after[before < 200] == before[before < 200]).all())
        inked = np.argwhere((after != before).any(-1))
        self.assertGreater(len(inked), 100 * zoom)
        self.assertLess(abs(inked.mean(0) - 1000).max(), 120 * zoom)

    def test_samples_show_the_pixels_of_the_window_that_differs(self):
        blur = torch.randint(0, 256, (3, 16, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        sharp = blur.clone()
        sharp[:, 9, 15] = 255 - blur[:, 9, 15]
        picture = np.array(hwdeblur.samples_picture([(sharp, blur)], nn.Identity(), nn.Identity(), "cpu", side=8))
        windows = [picture[38:46, x:x + 8] for x in (32, 52, 72, 92)]
        changed = np.argwhere((windows[3] != windows[0]).any(-1))
        self.assertEqual(len(changed), 1)
        self.assertLessEqual(abs(changed[0] - 3.5).max(), 0.5)         # in the middle
        top, left = np.array((9, 15)) - changed[0]
        for got, image in zip(windows, (blur, blur, blur, sharp)):
            np.testing.assert_array_equal(got, image[:, top:top + 8, left:left + 8].permute(1, 2, 0))

    def test_samples_of_any_sizes(self):
        pairs = [(images(3, *size).mul(255).byte(),) * 2 for size in ((11, 11), (11, 900), (300, 90), (48, 48), (64, 65))]
        picture = hwdeblur.samples_picture(pairs, nn.Identity(), nn.Identity(), "cpu")
        self.assertEqual(picture.size, (12 + 5 * 236, 38 + 4 * 262))


class Resume(unittest.TestCase):
    def test_training_cut_off_anywhere_goes_on_bit_for_bit(self):
        def batch_at(step):
            if step == stop:
                raise SystemExit
            return images(2, 3, 16, 16, seed=step), images(2, 3, 16, 16, seed=step + 9)

        def train(part=None):
            return hwdeblur.train(small_net(), batch_at, 5, 1e-3, part=part).state_dict()

        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as said:
            stop, part = None, hwdeblur.Part(Path(folder, "base.part"), "base", hwdeblur.Config(), {"x": 1}, 0.0)
            whole = train()
            for stop in (0, 2, 3, None, None):
                with contextlib.suppress(SystemExit):
                    again = train(part)
            self.assertEqual([line.split()[-2] for line in said.getvalue().splitlines() if "goes on" in line], ["1", "2", "5"])
            self.assertTrue(all(torch.equal(v, whole[k]) for k, v in again.items()))
            for other in (part._replace(inputs={"x": 2}), part._replace(path=Path(folder, "none.part"))):
                self.assertIsNone(hwdeblur.resumed(other))
            with self.assertRaisesRegex(hwdeblur.InputError, "--base-lr 0.002, not 0.5"):
                hwdeblur.resumed(part._replace(config=hwdeblur.Config(base_lr=0.5)))
            torch.save({"step": Path(folder)}, part.path)             # carries code
            with self.assertRaisesRegex(hwdeblur.InputError, "damaged or no checkpoint"):
                hwdeblur.resumed(part)


class Autocast(unittest.TestCase):
    def test_bfloat16_training_stays_close_and_keeps_float32_weights(self):
        net = small_net()
        with torch.no_grad():
            net.ending.weight.mul_(0.1)                                # an output near the image, as after training
        batch_at = lambda step: (images(2, 3, 16, 16, seed=step), images(2, 3, 16, 16, seed=step + 9))
        with contextlib.redirect_stderr(io.StringIO()):
            plain, low = (hwdeblur.train(net, batch_at, 5, 1e-3, amp=amp) for amp in (False, True))
        moved = [abs(a - b).max().item() for a, b in zip(plain.parameters(), low.parameters())]
        self.assertTrue(all(p.dtype == torch.float32 for p in low.parameters()))
        self.assertGreater(max(moved), 0)                              # bfloat16 was used
        self.assertLess(max(moved), 1.1e-2)                            # five steps of at most 1e-3 apiece, both ways
        before, after = (hwdeblur.psnr(n(batch_at(0)[0]), batch_at(0)[1]) for n in (net, low))
        self.assertGreater(after, before)

    def test_bfloat16_distillation_starts_at_one_and_falls(self):
        batch_at = lambda step: images(2, 3, 16, 16, seed=step)
        surrogates, losses = blocks.distill(small_net(), ["mid.0"], batch_at, 30, 3e-2, 0, amp=True)
        exact, _ = blocks.distill(small_net(), ["mid.0"], batch_at, 30, 3e-2, 0)
        for option, curve in losses["mid.0"].items():
            self.assertAlmostEqual(curve[0], 1, places=5)
            self.assertLess(curve[-1], 0.95)
            weights = [s["mid.0"][option].state_dict() for s in (surrogates, exact)]
            self.assertTrue(all(v.dtype == weights[1][k].dtype for k, v in weights[0].items()))
            self.assertFalse(all(torch.equal(v, weights[1][k]) for k, v in weights[0].items()))


class Deblur(unittest.TestCase):
    def test_tiles_cover_and_meet(self):
        identity = lambda x: x
        for height, width in ((1, 1), (70, 33), (64, 65), (150, 64), (131, 200)):
            image = images(3, height, width).mul(255).byte()
            with contextlib.redirect_stderr(io.StringIO()):
                got = hwdeblur.deblur(lambda x: x, image, tile=64, overlap=16)
            self.assertTrue(torch.equal(got, image))

    def test_tiles_leave_no_seam(self):
        """Each tile of another brightness: the picture must still change by small steps only."""
        shades = iter(torch.linspace(0.2, 0.8, 64))
        with contextlib.redirect_stderr(io.StringIO()):
            got = hwdeblur.deblur(lambda x: torch.full_like(x, next(shades).item()),
                                  torch.zeros(3, 200, 200).byte(), tile=64, overlap=32).float()
        self.assertLess(max(got.diff(dim=1).abs().max(), got.diff(dim=2).abs().max()), 12)


class Whole(unittest.TestCase):
    """The real command, tiny, end to end."""
    TINY = ("--made-train 6 --made-test 2 --made-size 48 --crop 32 --batch 2 --width 4 --enc 1 1 --dec 1 1 "
            "--base-steps 3 --distill-steps 2 --evaluations 24 --candidates 2 --finetune-steps 2 --frame 32").split()

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.out = Path(cls.folder.name) / "run"
        cls.status, cls.printed, cls.said = cls.command("--stage", "all", "--target", "paper", *cls.TINY)

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    @classmethod
    def command(cls, *args, out=None):
        """(status, stdout, stderr) of the command line with these flags."""
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            status = hwdeblur.main([*map(str, args), "--out", str(out or cls.out)])
        return status, stdout.getvalue(), stderr.getvalue()

    def refused(self, pattern, *args, out=None):
        status, _, said = self.command(*args, out=out)
        self.assertEqual(status, 2, said)
        self.assertRegex(said.splitlines()[-1], pattern)
        self.assertNotIn("Traceback", said)

    def test_all_artefacts_are_there_and_the_table_is_printed(self):
        self.assertEqual(self.status, 0, self.said)
        self.assertEqual({p.name for p in self.out.iterdir()}, {
            "base.pt", "saliency.json", "profile.json", "surrogates.pt", "search.json", "finetuned.pt",
            "metrics.json", "report.md", "pareto.png", "samples.png"})
        for word in ("blurred input", "base", "chosen", "GMACs", "PSNR"):
            self.assertIn(word, self.printed)
        found = json.loads((self.out / "search.json").read_text())
        self.assertEqual(len(found["evaluations"]), 24)
        self.assertAlmostEqual(found["evaluations"][0]["loss_db"], 0)
        self.assertAlmostEqual(found["evaluations"][0]["penalty"], 1)

    def test_the_report_holds_the_run(self):
        report, found, metrics = (self.out / "report.md").read_text(), *(
            json.loads((self.out / name).read_text()) for name in ("search.json", "metrics.json"))
        tuned = torch.load(self.out / "finetuned.pt", weights_only=True)
        headings = [line for line in report.splitlines() if line.startswith("#")]
        self.assertEqual(headings, [
            "# What did I gain", "## Table 1: saliency per stage", "## Table 2: latency of each option, ms", "## The front",
            "## Table 3: base, candidates and chosen net", "## The chosen net, site by site", "## Do the sums hold?",
            "## How this was made"])
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("| ")]
        row = next(row for row in rows if row[0].endswith("(chosen)"))
        candidate = tuned["candidates"][tuned["picked"]]
        self.assertEqual(row, [row[0], " ".join(map(str, tuned["choice"].values())), f"{metrics['chosen']['params'] / 1e6:.3f}",
                               f"{metrics['chosen']['mb']:.2f}", "not measured", f"{metrics['chosen']['psnr_db']:.2f}",
                               f"{metrics['chosen']['ssim']:.4f}", f"{candidate['latency_ms']:.1f}",
                               f"{candidate['val_before_db']:.2f}", f"{candidate['val_after_db']:.2f}"])
        back = found["taken_back"][tuned["picked"]]
        for site, option in tuned["choice"].items():
            words = (f"{blocks.BLOCKS[option].__name__} in place of NAFBlock, {-back['saved_ms'][site]:+z.2f} ms, "
                     f"{-back['cost_db'][site]:+z.2f} dB") if option else "NAFBlock stays"
            self.assertIn(f"\n- {site}: {words}\n", report)
        self.assertIn(["enc3 (critical)", "0.0644", "1.6", "-0.0017", "6.23", "21.8", "2.2e+17", "1.33"], rows)
        self.assertIn("-17.01", [row[5] for row in rows if row[0] == "dec1"])                   # as printed
        stages = [row[0].removesuffix(" (critical)") for row in rows if row[0].startswith(("enc", "mid", "dec"))]
        self.assertEqual(stages[:5], ["enc0", "enc1", "mid", "dec1", "dec0"])
        self.assertIn("no figure for the rest of the net", report)
        self.assertIn("Wall times are left out", report)
        self.assertNotIn("measured, interleaved", report)

    def test_the_chosen_net_scores_what_metrics_say(self):
        tuned = torch.load(self.out / "finetuned.pt", weights_only=True)
        net = hwdeblur.chosen_net({"finetune": tuned})
        config = hwdeblur.Config(made_test=2, made_size=48)
        with contextlib.redirect_stderr(io.StringIO()):
            pairs = hwdeblur.split_pairs(config, "test")
        values = []
        for sharp, blur in pairs:
            output = blocks.deploy(net)(blur[None].float() / 255).detach().clamp(0, 1).mul(255).round().div(255)
            values.append(-10 * np.log10(((output[0] - sharp / 255) ** 2).mean().item()))
        metrics = json.loads((self.out / "metrics.json").read_text())
        self.assertAlmostEqual(metrics["chosen"]["psnr_db"], np.mean(values), places=2)

    def test_finished_stages_are_reused_and_other_flags_refused(self):
        before = (self.out / "base.pt").stat().st_mtime_ns
        status, _, said = self.command("--stage", "all", "--target", "paper", *self.TINY)
        self.assertEqual((status, (self.out / "base.pt").stat().st_mtime_ns), (0, before))
        self.assertIn("reused", said)
        self.refused("--base-lr 0.002, not 0.5", "--stage", "all", "--target", "paper", *self.TINY, "--base-lr", 0.5)

    def test_a_local_table_of_another_machine_is_refused(self):
        out = Path(self.folder.name) / "local"
        out.mkdir()
        for name in ("base.pt", "saliency.json"):
            (out / name).write_bytes((self.out / name).read_bytes())
        self.assertEqual(self.command("--stage", "profile", *self.TINY, out=out)[0], 0)
        self.assertIn("reused", self.command("--stage", "profile", *self.TINY, out=out)[2])
        table = json.loads((out / "profile.json").read_text())
        (out / "profile.json").write_text(json.dumps({**table, "threads": 77}))
        self.refused("with threads 77, not .*: give --threads 77", "--stage", "profile", *self.TINY, out=out)
        self.assertEqual(self.command("--stage", "profile", "--force", *self.TINY, out=out)[0], 0)
        self.assertNotEqual(json.loads((out / "profile.json").read_text())["threads"], 77)

    def test_the_exported_program_runs_without_the_project(self):
        status, _, said = self.command("--stage", "export")
        self.assertEqual(status, 0, said)
        card = json.loads((self.out / "deblur.json").read_text())
        self.assertEqual((card["input"], card["shape"], card["range"]), ("image", [1, 3, 32, 32], [0, 1]))
        self.assertEqual(card["psnr_db"], json.loads((self.out / "metrics.json").read_text())["chosen"]["psnr_db"])
        with tempfile.TemporaryDirectory() as folder:
            torch.save(images(*card["shape"]), Path(folder, "in.pt"))
            code = ("import torch, sys; x = torch.load('in.pt')\n"
                    "torch.save(torch.export.load(sys.argv[1]).module()(x), 'out.pt')")
            subprocess.run([sys.executable, "-I", "-c", code, self.out / "deblur.pt2"], cwd=folder, check=True)
            got = torch.load(Path(folder, "out.pt"))
        tuned = torch.load(self.out / "finetuned.pt", weights_only=True)
        expected = blocks.deploy(hwdeblur.chosen_net({"finetune": tuned}))(images(*card["shape"]))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        for name in ("deblur.pt2", "deblur.json"):
            (self.out / name).unlink()

    def test_the_command_line_teaches_the_stages(self):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self.assertEqual(hwdeblur.main(["--stage"]), 0)
        listed = [line.split()[0] for line in printed.getvalue().splitlines()]
        self.assertEqual(listed, "base saliency profile distill search finetune evaluate report all deblur export".split())
        with mock.patch.dict(os.environ, {"COLUMNS": "100"}):
            text = hwdeblur.parser().format_help()
        self.assertIn(printed.getvalue(), text)
        self.assertLessEqual(max(map(len, text.splitlines())), 100)
        flags = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
        own = [hwdeblur.flag(field.name) for field in dataclasses.fields(hwdeblur.Config)]
        self.assertEqual(sorted(flags), sorted([*own, "--stage", "--preset", "--out", "--device", "--threads", "--force",
                                                "--input", "--output"]))
        self.assertRegex(" ".join(text.split()), r"stage distill: --distill-share [^:]+\[150 steps; paper: 20000\]")
        self.refused("no stage is given: --stage all")

    def test_damaged_artefacts_are_refused_by_name(self):
        other = Path(self.folder.name) / "other"
        other.mkdir()
        for name, content in (("base.pt", (self.out / "base.pt").read_bytes()[:1000]), ("base.pt", b"junk"),
                              ("base.pt", b""), ("saliency.json", b"{"), ("saliency.json", b"[]")):
            for file in ("base.pt", "saliency.json"):
                (other / file).write_bytes((self.out / file).read_bytes())
            (other / name).write_bytes(content)
            self.refused(name, "--stage", "profile", "--target", "paper", *self.TINY, out=other)

    def test_bad_input_is_one_line(self):
        empty = Path(self.folder.name) / "empty"
        self.refused("invalid choice: 'bake'", "--stage", "bake")
        self.refused("unrecognized.*--colour", "--stage", "all", "--colour", "red")
        self.refused("invalid choice: 'large'", "--stage", "all", "--preset", "large")
        self.refused("run --stage base", "--stage", "saliency", *self.TINY, out=empty)
        self.refused("run --stage all", "--stage", "deblur", "--input", "a", "--output", "b", out=empty)
        self.refused("no folder", "--stage", "base", *self.TINY, "--data", self.folder.name, out=empty)
        self.refused("no file /nowhere.pth", "--stage", "base", *self.TINY, "--weights", "/nowhere.pth", out=empty)
        self.refused("cannot be written", "--stage", "base", *self.TINY, out=__file__)
        self.refused("step 1 .*last good checkpoint is .*base.part, of step 0", "--stage", "base", *self.TINY,
                     "--base-lr", 1e30, out=empty)
        self.assertTrue(all(p.isfinite().all() for p in hwdeblur.load_weights(empty / "base.part").parameters()))
        self.refused("finetune.*diverged", "--stage", "all", "--target", "paper", *self.TINY, "--finetune-steps", 1,
                     "--finetune-lr", "1e30", out=Path(self.folder.name) / "third")
        self.refused("--crop 99", "--stage", "base", *self.TINY, "--crop", 99, out=empty)
        self.assertFalse((empty / "base.pt").exists())

    def test_deblur_takes_any_photograph(self):
        root = Path(self.folder.name)
        shades = (np.arange(40 * 30).reshape(40, 30) * 50).astype(np.uint16)
        rotated = Image.new("RGB", (30, 40), "blue")
        exif = rotated.getexif()
        exif[0x0112] = 6
        kinds = {"rgb.jpg": Image.new("RGB", (33, 21)), "rgba.png": Image.new("RGBA", (33, 21)),
                 "one.png": Image.new("RGB", (1, 1)), "grey.png": Image.new("L", (9, 30)),
                 "palette.gif": Image.new("P", (20, 20)), "deep.png": Image.fromarray(shades)}
        for name, image in kinds.items():
            image.save(root / name)
        rotated.save(root / "turned.jpg", exif=exif)
        for name, size in {**{n: i.size for n, i in kinds.items()}, "turned.jpg": (40, 30)}.items():
            status, _, said = self.command("--stage", "deblur", "--input", root / name, "--output", root / "out.png")
            self.assertEqual(status, 0, said)
            with Image.open(root / "out.png") as image:
                self.assertEqual(image.size, size)
        self.refused("cannot read", "--stage", "deblur", "--input", __file__, "--output", root / "o.png")
        deep = hwdeblur.load_image(root / "deep.png")[0].numpy()
        self.assertLessEqual(np.abs(deep - shades / 257).max(), 0.5)
        half = Image.new("RGB", (4, 2), "red")
        half.paste("blue", (2, 0, 4, 2))
        exif[0x0112] = 6                          # the camera was turned: row 0 of the file is the right edge
        half.save(root / "half.png", exif=exif)
        upright = hwdeblur.load_image(root / "half.png")
        self.assertEqual(tuple(upright.shape), (3, 4, 2))
        self.assertEqual((upright[0, 0, 0].item(), upright[2, 3, 1].item()), (255, 255))
        clear = Image.new("RGBA", (9, 5), (10, 20, 30, 77))
        clear.save(root / "clear.png")
        self.command("--stage", "deblur", "--input", root / "clear.png", "--output", root / "out.png")
        with Image.open(root / "out.png") as image:
            self.assertEqual(image.getchannel("A").getextrema(), (77, 77))
        (root / "cut.jpg").write_bytes((root / "rgb.jpg").read_bytes()[:400])
        self.refused("cannot read image .*cut.jpg", "--stage", "deblur", "--input", root / "cut.jpg", "--output", root / "o.png")
        self.refused("unknown kind", "--stage", "deblur", "--input", root / "rgb.jpg", "--output", root / "o.xyz")

    def copied(self, name, *files):
        """A new folder with these artefacts of the run."""
        out = Path(self.folder.name) / name
        out.mkdir()
        for file in files:
            (out / file).write_bytes((self.out / file).read_bytes())
        return out

    def test_the_same_seed_gives_the_same_bits_however_often_the_run_is_cut_off(self):
        """SystemExit stops the run before or after a rename, as a kill would; what an earlier kill left goes."""
        out, rng, replace, cuts = self.copied("cut"), np.random.default_rng(1), Path.replace, 0
        (out / ".base.part.1234").write_bytes(b"half")
        for _ in range(40):
            left, before = int(rng.integers(1, 20)), bool(rng.integers(2))

            def replace_or_stop(path, target):
                nonlocal left
                left -= 1
                if left or not before:
                    replace(path, target)
                if not left:
                    raise SystemExit

            with mock.patch.object(Path, "replace", replace_or_stop), contextlib.suppress(SystemExit):
                status, _, said = self.command("--stage", "all", "--target", "paper", *self.TINY, out=out)
                self.assertEqual(status, 0, said)
                break
            cuts += 1
        self.assertGreater(cuts, 3)
        self.assertEqual({path.name: path.read_bytes() for path in out.iterdir()},
                         {path.name: path.read_bytes() for path in self.out.iterdir()})

    def test_search_scores_nothing_twice(self):
        out = self.copied("cut_search", "base.pt", "saliency.json", "profile.json", "surrogates.pt")
        scored, evaluate = [], hwdeblur.evaluate

        def evaluate_or_stop(net, *args, **kwargs):
            scored.append(str([type(block) for block in net.blocks().values()]))
            if len(scored) == stop:
                raise SystemExit
            return evaluate(net, *args, **kwargs)

        for stop in (15, 25, 29, 999):
            with mock.patch.object(hwdeblur, "evaluate", evaluate_or_stop), contextlib.suppress(SystemExit):
                self.command("--stage", "search", "--target", "paper", *self.TINY, out=out)
        self.assertEqual((out / "search.json").read_bytes(), (self.out / "search.json").read_bytes())
        self.assertEqual(scored.count(scored[0]), 4 + 1)               # the base: the reference of each run, one score
        others = [name for name in scored if name != scored[0]]
        self.assertEqual(len(others) - len(set(others)), 3)            # only those that a stop cut off

    def test_diverged_surrogates_are_left_out_and_the_run_goes_on(self):
        out, distill = self.copied("diverged", "base.pt", "saliency.json", "profile.json"), blocks.distill

        def distill_badly(*args):
            surrogates, losses = distill(*args)
            losses["mid.0"][3][-1] = math.nan
            next(surrogates["enc0.0"][5].parameters()).data.fill_(math.inf)
            return surrogates, losses

        with mock.patch.object(blocks, "distill", distill_badly):
            status, _, said = self.command("--stage", "all", "--target", "paper", *self.TINY, "--candidates", 1, out=out)
        self.assertEqual(status, 0, said)
        self.assertIn("option 3 at mid.0 diverged and is left out", said)
        self.assertIn("diverged: option 3 at mid.0, 5 at enc0.0.", (out / "report.md").read_text())
        found = json.loads((out / "search.json").read_text())
        taken = [dict(zip(found["sites"], row["options"])) for row in found["evaluations"]]
        self.assertFalse(any(choice["enc0.0"] == 5 or choice["mid.0"] == 3 for choice in taken))
        self.assertTrue(any(choice["enc0.0"] == 3 for choice in taken))

    def test_two_ranks_do_the_work_of_one(self):
        """All stages; distillation from the same base, bit for bit; an error of rank 1 alone, told once."""
        whole, shared = self.copied("ranks"), self.copied("shared", "base.pt", "saliency.json", "profile.json")
        common = ["--target", "paper", *self.TINY, "--threads", str(torch.get_num_threads()), "--out"]
        few = ["--evaluations", "7", "--candidates", "1", "--stage", "all"]
        lines = [[*common, str(whole), *few], ["--stage", "distill", *common, str(shared)],
                 ["--stage", "search", *common, str(shared)]]
        code = f"""if True:
            import os
            from test_hwdeblur import hwdeblur
            def fail(pair):
                raise hwdeblur.InputError('a broken image')
            for port, line in zip({free_ports(3)}, {lines}):
                os.environ['MASTER_PORT'] = str(port)
                if 'search' in line and hwdeblur.rank() == 1:
                    hwdeblur.load_pair = fail
                print('status', hwdeblur.main(line))"""
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
        ranks = [subprocess.Popen([sys.executable, "-c", code], cwd=HERE, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, env={**env, "RANK": str(r)}) for r in (0, 1)]
        (printed, said), other = (rank.communicate(timeout=120) for rank in ranks)
        self.assertEqual(other, ("status 0\nstatus 0\nstatus 2\n", ""))
        self.assertEqual([line for line in printed.splitlines() if "status" in line], ["status 0", "status 0", "status 2"], said)
        self.assertEqual(said.splitlines()[-1], "hwdeblur: a broken image")
        self.assertEqual(len(json.loads((whole / "search.json").read_text())["evaluations"]), 7)
        self.assertTrue((whole / "report.md").exists())
        self.assertEqual((shared / "surrogates.pt").read_bytes(), (self.out / "surrogates.pt").read_bytes())
        one, two = (torch.load(out / "base.pt", weights_only=True)["params"] for out in (self.out, whole))
        for name, p in one.items():
            torch.testing.assert_close(two[name], p, rtol=1e-4, atol=1e-4 * p.abs().max().item())

    def test_damaged_files_are_refused_or_load_as_they_were(self):
        """Cuts, flipped bits and noise, seeded. JSON may be edited by hand, so there a run may also go on."""
        rng, root = np.random.default_rng(0), self.copied("fuzz")
        Image.effect_noise((40, 30), 50).convert("RGB").save(root / "a.png")
        Image.effect_noise((40, 30), 50).convert("RGB").save(root / "a.jpg")
        good, config = torch.load(self.out / "base.pt", weights_only=True), hwdeblur.Config()
        torch.save(good["params"], root / "a.pth", _use_new_zipfile_serialization=False)
        loads = {self.out / "base.pt": hwdeblur.load_weights, root / "a.pth": hwdeblur.load_weights,
                 self.out / "finetuned.pt": hwdeblur.load_tuned,
                 root / "a.png": hwdeblur.load_image, root / "a.jpg": hwdeblur.load_image}
        refused = dict.fromkeys(loads, 0)
        for path, load in loads.items():
            for content in damaged(path.read_bytes(), 40, rng):
                (root / ("x" + path.suffix)).write_bytes(content)
                try:
                    loaded = load(root / ("x" + path.suffix))
                except hwdeblur.InputError:
                    refused[path] += 1
                    continue
                if path.suffix == ".pt":
                    whole = load(path)
                    state, same = ((x.state_dict() if load == hwdeblur.load_weights else x["params"]) for x in (loaded, whole))
                    self.assertTrue(all(torch.equal(v, same[k]) for k, v in state.items()))
        self.assertGreater(min(refused.values()), 15)
        for name, stage in (("metrics.json", "evaluate"), ("saliency.json", "profile"), ("search.json", "search")):
            statuses = set()
            out = self.copied(f"fuzz_{stage}", "base.pt", *{name, "saliency.json"})
            for content in damaged((self.out / name).read_bytes(), 30, rng):
                (out / name).write_bytes(content)
                (out / "profile.json").unlink(missing_ok=True)
                status, _, said = self.command("--stage", stage, "--target", "paper", *self.TINY, out=out)
                statuses.add(status)
                self.assertLessEqual(status * said.count("hwdeblur: "), 2, said)
            self.assertIn(2, statuses)
            self.assertLessEqual(statuses, {0, 2})

    def test_real_folders_of_different_sizes(self):
        root = Path(self.folder.name) / "data"
        for split, sizes in (("train", ((40, 50), (36, 33), (64, 48))), ("test", ((35, 47), (50, 33)))):
            for i, size in enumerate(sizes):
                for kind in ("blur", "sharp"):
                    (root / split / "s" / kind).mkdir(parents=True, exist_ok=True)
                    Image.effect_noise(size, 30 if kind == "sharp" else 10).save(root / split / "s" / kind / f"{i}.png")
        out = Path(self.folder.name) / "real"
        status, printed, said = self.command(
            "--stage", "all", "--target", "paper", *self.TINY, "--data", root, "--tlc", "--amp", "--workers", 1,
            "--test", f"DPDD-indoor={root}", "--test", f"mine={root / 'train'}", out=out)
        self.assertEqual(status, 0, said)
        metrics = json.loads((out / "metrics.json").read_text())
        counts = {name: test["pairs"] for name, test in metrics["tests"].items()}
        self.assertEqual(counts, {"DPDD-indoor": 2, "mine": 3})
        self.assertEqual(metrics["tests"]["DPDD-indoor"]["chosen"]["ssim"], metrics["chosen"]["ssim"])
        report = (out / "report.md").read_text()
        self.assertIn("a local window of 48 pixels", report)
        for score in (metrics["base"]["psnr_db"], metrics["tests"]["mine"]["blurred"]["psnr_db"]):
            self.assertIn(f"{score:.2f}/", report.split("## Table 4")[1].split("## The chosen net")[0])
        for text in (printed, report):                                 # published figures of Tables 4 and 5
            self.assertRegex(text, r"NAFNet, published +\| 35.80/.980 ")
            self.assertRegex(text, r"Ours \(fine-tuned\), published \| 26.87/.818 +\| 21.89/.656 +\| 63 ")
        values, net = [], hwdeblur.base_net({"base": torch.load(out / "base.pt", weights_only=True)})
        blocks.set_window(net, 48)
        for i in range(2):
            blur, sharp = (torch.tensor(np.array(Image.open(root / "test" / "s" / kind / f"{i}.png").convert("RGB")))
                           for kind in ("blur", "sharp"))              # (H, W, 3)
            output = net(blur.permute(2, 0, 1)[None] / 255).detach()[0].permute(1, 2, 0).clamp(0, 1)
            values.append(10 * np.log10(255 ** 2 / ((output * 255).round() - sharp).double().square().mean().item()))
        self.assertAlmostEqual(metrics["base"]["psnr_db"], np.mean(values), places=4)
        self.adapted(root)
        self.refused("too small to be cropped at --crop 45", "--stage", "base", *self.TINY, "--data", root, "--crop", 45,
                     out=Path(self.folder.name) / "real2")


    def adapted(self, root):
        """The net found on made pairs, adapted to the pairs in `root`: --stage finetune --from."""
        out, start = Path(self.folder.name) / "adapted", self.out / "finetuned.pt"
        flags = ("--stage", "finetune", "--from", start, "--data", root, "--crop", 32, "--batch", 2,
                 "--finetune-lr", 0.01, "--test", f"DPDD-outdoor={root}")
        status, printed, said = self.command(*flags, "--finetune-steps", 5, out=out)
        self.assertEqual(status, 0, said)
        tuned, found = (torch.load(path, weights_only=True) for path in (out / "finetuned.pt", start))
        self.assertEqual((tuned["choice"], tuned["arch"]), (found["choice"], found["arch"]))
        config = hwdeblur.Config(data=str(root), crop=32)
        for split, name in (("val", "validation"), ("test", "test")):
            for when, art in (("before", found), ("after", tuned)):
                score = hwdeblur.evaluate(hwdeblur.chosen_net({"finetune": art}), hwdeblur.split_pairs(config, split))
                self.assertEqual(score, tuned["scores"][name][when])
                self.assertIn(f"{score['psnr_db']:.2f}/", printed)
        self.assertNotEqual(tuned["scores"]["test"]["before"], tuned["scores"]["test"]["after"])
        self.assertIn("Table 5", (out / "report.md").read_text())
        picture = root / "test" / "s" / "blur" / "0.png"
        status, _, said = self.command("--stage", "deblur", "--input", picture, "--output", root / "o.png", out=out)
        self.assertEqual(status, 0, said)
        self.refused("--from .*finetuned.pt, not ''", "--stage", "finetune", "--data", root, out=out)
        self.refused("--finetune-steps 5, not 6", *flags, "--finetune-steps", 6, out=out)
        self.refused("goes with --stage finetune", "--stage", "all", "--from", start, out=out)
        for file, pattern in ((root / "o.png", "no checkpoint of tensors"), (self.out / "base.pt", "not an artefact")):
            self.refused(pattern, "--stage", "finetune", "--from", file, out=root / "new")


class PlainConv(nn.Module):
    """A block that nothing knows of: one convolution, without a norm."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale = blocks.zero_scale(channels)

    def forward(self, x):
        return blocks.residual(x, F.relu(self.conv(x)), self.scale)


class Extension(unittest.TestCase):
    def test_a_further_block_is_one_class_and_one_entry(self):
        flags = ["--stage", "all", "--target", "paper", *Whole.TINY, "--enc", 1, "--dec", 1, "--evaluations", 20]
        with mock.patch.object(blocks, "BLOCKS", (*blocks.BLOCKS, PlainConv)), tempfile.TemporaryDirectory() as out:
            new = len(blocks.BLOCKS) - 1
            status, _, said = Whole.command(*flags, out=out)
            self.assertEqual(status, 2)
            self.assertRegex(said.splitlines()[-1], f"table has {new} options, this search {new + 1}: use target local")
            with mock.patch.object(profile_device, "PAPER_BLOCK_MS", (*profile_device.PAPER_BLOCK_MS, 8.0)):
                status, _, said = Whole.command(*flags, out=out)
            self.assertEqual(status, 0, said)
            found = json.loads(Path(out, "search.json").read_text())
            self.assertIn(new, sum((row["options"] for row in found["evaluations"]), []))
            params = torch.load(Path(out, "surrogates.pt"), weights_only=True)["params"]
            self.assertEqual({site: new in row for site, row in params.items()}, dict.fromkeys(found["sites"], True))
            self.assertRegex(Path(out, "report.md").read_text(), rf"\| {new} PlainConv +\|")


class Project(unittest.TestCase):
    def test_the_contents_name_the_sections_in_order(self):
        sections = re.findall(r"^# -{10,} (.+)$", (HERE / "hwdeblur.py").read_text(), re.MULTILINE)
        listed = re.findall(r"^    (\S.+?) {2,}\S", hwdeblur.__doc__.split("in order:")[1], re.MULTILINE)
        self.assertEqual(listed, sections)

    def test_every_function_that_the_readme_names_exists(self):
        text, modules = (HERE / "README.md").read_text(), {m.__name__: m for m in (blocks, search, profile_device, hwdeblur)}
        paper_map = text.split("| paper | here |")[1].split("| file |")[0].strip().splitlines()[1:]
        self.assertGreater(len(paper_map), 10)
        for row in paper_map:
            self.assertRegex(row, rf"`({'|'.join(modules)})\.\w+`")
        for module, name in re.findall(rf"`({'|'.join(modules)})\.(?!py\b)(\w+)`", text):
            self.assertTrue(hasattr(modules[module], name), f"{module}.{name}")

    def test_leaf_files_stand_alone(self):
        allowed = {"blocks.py": {"torch"}, "search.py": {"numpy", "scipy"}, "profile_device.py": {"torch", "qai_hub"}}
        for name, packages in allowed.items():
            roots = set()
            for node in ast.walk(ast.parse((HERE / name).read_text())):
                if isinstance(node, ast.Import):
                    roots |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    roots.add(node.module.split(".")[0])
            self.assertLessEqual(roots - set(sys.stdlib_module_names), packages, name)

    def test_leaf_files_run_alone(self):
        for name, args in (("blocks.py", []), ("profile_device.py", ["--width", "4", "--frame", "32"])):
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, name).write_text((HERE / name).read_text())
                done = subprocess.run([sys.executable, name, *args], cwd=folder, capture_output=True, text=True)
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertIn("convolution" if args else "NAFBlock", done.stdout)

    def test_requirements_are_the_five_packages(self):
        lines = (HERE / "requirements.txt").read_text().split()
        self.assertEqual([line.split("==")[0] for line in lines], ["torch", "numpy", "scipy", "pillow", "qai-hub"])
        self.assertTrue(all("==" in line for line in lines))


class Timed(unittest.TextTestResult):
    """Prints the seconds, name and outcome of each test as it ends."""

    def startTest(self, test):
        super().startTest(test)
        self.begun, self.bad = time.perf_counter(), len(self.failures + self.errors)

    def stopTest(self, test):
        super().stopTest(test)
        outcome = "ok" if len(self.failures + self.errors) == self.bad else "FAILED"
        self.stream.writeln(f"{time.perf_counter() - self.begun:6.2f} s  {test.id().removeprefix('__main__.')}  {outcome}")


class Runner(unittest.TextTestRunner):
    resultclass = Timed


if __name__ == "__main__":
    unittest.main(testRunner=Runner, verbosity=0)
