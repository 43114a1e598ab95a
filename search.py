"""Choosing: a multi-objective Bayesian search over block options, with a GP and Monte-Carlo EHVI by hand.

Letters in every docstring: n evaluated, q candidates, m = 2 objectives, s draws, d sites, k options.
Both objectives are MINIMISED everywhere. Objective 1, `loss_db`, is measured; objective 2, `penalty`,
is the sum of one known number per site. numpy and scipy only: this file can be copied by itself.
R&W: Rasmussen & Williams 2006, Gaussian Processes for Machine Learning.
"""
import argparse
import functools
import heapq
import math
import time
import warnings
from html import escape
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
from scipy.linalg import LinAlgError, cho_solve, cholesky, solve_triangular
from scipy.linalg.lapack import dpotri
from scipy.optimize import Bounds, LinearConstraint, brentq, milp, minimize
from scipy.spatial.distance import cdist
from scipy.special import softmax
from scipy.stats import norm, qmc

INITIAL = 20            # random configurations after the base and the all-fastest one
CHEAPEST = 2            # options of a site that these choose among
DRAWS = 32              # quasi-random normal draws per EHVI: more gave nothing with objective 2 exact
MUTANTS = RANDOMS = 200
WIDTH = 0.5             # of the posterior that EHVI sees
CLIMBS = 4              # steps uphill from the best of a pool
UNIT = 10 / np.log(10)  # dB per neper of an error ratio


class Evaluation(NamedTuple):
    """One scored configuration: an option number per site, PSNR loss in dB, latency penalty."""
    options: tuple
    loss_db: float
    penalty: float


# ------------------------------------------------------------------ encoding (section II-C)

def encode(options, n_options):
    """Option numbers (..., d) -> the centres of their intervals in [0, 1]^d."""
    return (np.asarray(options) + 0.5) / np.asarray(n_options)


def decode(x, n_options):
    """x (..., d) in [0, 1] -> option numbers, by k equal intervals; x = 1 belongs to the last."""
    x, n_options = np.asarray(x, dtype=float), np.asarray(n_options)
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError("decode: coordinates must lie in [0, 1]")
    return np.minimum((x * n_options).astype(int), n_options - 1)


# ----------------------------------------------------------- Pareto front and hypervolume, m = 2

def _objectives(Y):
    Y = np.asarray(Y, dtype=float).reshape(-1, 2)
    if np.isnan(Y).any():
        raise ValueError("objectives must not be NaN")
    return Y


def pareto_mask(Y):
    """(n, 2) objectives -> (n,) True where no other row is as good in both and better in one."""
    rows, inverse = np.unique(_objectives(Y), axis=0, return_inverse=True)     # ascending; equal ones once
    best = rows[:, 1] < np.minimum.accumulate(np.append(np.inf, rows[:, 1]))[:-1]
    best[:1] = True                                                    # the first beats nothing: inf too
    return best[inverse.ravel()]


def free_boxes(front, ref):
    """Disjoint boxes (b, 2, 2) = [lower, upper] that tile what `front` (n, 2) leaves free below ref.

    Vertical strips between neighbouring front points, each open towards minus infinity.
    """
    front = _objectives(front)
    front = front[(front < ref).all(1)]
    front = np.unique(front[pareto_mask(front)], axis=0)               # ascending objective 1
    edges = np.concatenate([[-np.inf], front[:, 0], [ref[0]]])
    tops = np.append(ref[1], front[:, 1])
    lower = np.stack([edges[:-1], np.full(len(tops), -np.inf)], 1)
    return np.stack([lower, np.stack([edges[1:], tops], 1)], 1)


def hypervolume(Y, ref):
    """Area between the front of Y (n, 2) and the reference point; 0 if no point is below it."""
    boxes = free_boxes(Y, ref)[1:]                                     # those above a front point
    return float(((boxes[:, 1, 0] - boxes[:, 0, 0]) * (ref[1] - boxes[:, 1, 1])).sum())


# -------------------------------------------------------------------------- Gaussian process

class GP(NamedTuple):
    """A fitted process: warp(y, power) ~ N(offset, scale^2 (signal exp(-D . rates) + noise I))."""
    X: np.ndarray               # (n, d)
    kernel: str                 # "overlap" or "rbf"
    rates: np.ndarray           # (d,) 1 / length scale (overlap), its square (rbf), one per site
    signal: float
    noise: float
    power: float                # 0: y as it is
    offset: float
    scale: float
    chol: np.ndarray            # (n, n) lower Cholesky factor of the standardised covariance
    alpha: np.ndarray           # (n,) covariance^-1 (warp(y, power) - offset) / scale
    log_evidence: float         # log marginal likelihood of y / its standard deviation, R&W (2.30)


def distances(A, B, kernel):
    """Distances (a, b), site by site: [x != x'] for overlap, (x - x')^2 / 2 for rbf.

    The score is constant inside an interval of [0, 1], so a kernel on decoded options, exp of minus the
    weighted number of differing sites, knows what one on coordinates must learn.
    """
    pairs = zip(np.asarray(A).T[:, :, None], np.asarray(B).T[:, None, :])
    return ((a != b).astype(float) if kernel == "overlap" else (a - b) ** 2 / 2 for a, b in pairs)


def weighted_distances(rates, A, B, kernel):
    """The `distances` (a, b) added up over the sites, each times its rate."""
    if kernel == "rbf":
        return cdist(A, B, "sqeuclidean", w=rates) / 2
    A, B = np.asarray(A), np.asarray(B)                                # what agrees, by matrix products
    return rates.sum() - sum((A == k).astype(float) @ ((B == k) * rates).T for k in np.unique(B))


def stable_cholesky(K, jitter=0.0):
    """Lower Cholesky factor of K, with the least jitter that it needs: 1e-10 of its mean, or tens of that."""
    try:
        return cholesky(K + jitter * np.eye(len(K)), lower=True)
    except LinAlgError:
        if jitter >= np.trace(K):
            raise
        return stable_cholesky(K, max(10 * jitter, 1e-10 * np.trace(K) / len(K)))


def log_evidence(log_params, D, y):
    """Log marginal likelihood R&W (2.30) and its gradient (5.9) at log (rates, signal, noise).

    D (d, n, n): all `distances`; y (n,) standardised. Returns value, gradient (d+2,), factor, alpha.
    """
    *rates, signal, noise = np.exp(log_params)
    S = signal * np.exp(-np.tensordot(rates, D, 1))                    # (n, n)
    chol = stable_cholesky(S + noise * np.eye(len(y)))
    alpha = cho_solve((chol, True), y)
    value = -0.5 * y @ alpha - np.log(np.diag(chol)).sum() - 0.5 * len(y) * np.log(2 * np.pi)
    inverse = np.tril(dpotri(chol, lower=1)[0])                        # its lower triangle
    W = np.outer(alpha, alpha) - inverse - np.tril(inverse, -1).T
    WS = W * S
    gradient = 0.5 * np.concatenate([-np.array(rates) * np.tensordot(D, WS, 2),
                                     [WS.sum(), noise * np.trace(W)]])
    return value, gradient, chol, alpha


def warp(y, power):
    """(r^power - 1) / power (Box & Cox 1964) of the error ratio r = 10^(y / 10), in dB near 0; d / d power.

    Power 1 is the mean squared error, in which independent errors add up; 0 is y itself; below 0 swaps
    that are stacked lose more than the sum of their losses in dB.
    """
    u = y / UNIT
    if power == 0:
        return y, UNIT * u ** 2 / 2
    e = np.expm1(power * u)
    return UNIT * e / power, UNIT * (u * (e + 1) - e / power) / power


def unwarp(g, power):
    """The y of warp(y, power) = g; beyond the range of a bounded transform, its far end."""
    return UNIT * np.log1p(np.maximum(power * g / UNIT, -1 + 1e-9)) / power if power else g


def warped_evidence(params, D, y):
    """`log_evidence` of warp(y, power), standardised, as a density of y; params: (its own, power).

    A change of variables adds log |dz/dy| (Snelson et al. 2004). Returns value, gradient (d+3,), factor,
    alpha, offset, scale.
    """
    g, dg = warp(y, params[-1])
    offset, scale = g.mean(), g.std() or 1.0
    z, dg = (g - offset) / scale, dg - dg.mean()
    dscale, jacobian = (z * dg).mean(), y.sum() / UNIT
    value, gradient, chol, alpha = log_evidence(params[:-1], D, z)
    value += params[-1] * jacobian - len(y) * np.log(scale / (y.std() or 1.0))
    dpower = jacobian - (alpha @ (dg - z * dscale) + len(y) * dscale) / scale
    return value, np.append(gradient, dpower), chol, alpha, offset, scale


def gp_fit(X, y, kernel="overlap", warped=False):
    """Fit by maximum marginal likelihood (L-BFGS-B, analytic gradient), R&W chapter 5 -> GP.

    X (n, d): option numbers for "overlap", coordinates for "rbf"; y (n,) finite. One length scale per
    site, its log a priori normal around the sites' mean with unit variance, so that few data are not
    over-read; y is standardised; a constant y is its own prediction. warped: y is in dB, and the power
    of its `warp` is fitted too. Always the same start: no state.
    Tried on fifteen 7^8 landscapes (additive, pairwise, super-additive, small nets), share of the exact
    volume after 50 / 100: neither warp nor prior .919 / .969, warp .921 / .964, both .937 / .974. No gain
    from additive and pairwise terms anchored at the base, clipped losses, another width of posterior, more
    mutation.
    """
    X, y = np.asarray(X, dtype=float), np.asarray(y, dtype=float)
    if not (np.isfinite(X).all() and np.isfinite(y).all()):
        raise ValueError("gp_fit: X and y must be finite")
    if kernel not in ("overlap", "rbf"):
        raise ValueError(f"gp_fit: kernel {kernel!r} is neither 'overlap' nor 'rbf'")
    D, d = np.stack(list(distances(X, X, kernel))), X.shape[1]
    start, top = (0.3, 5.0) if kernel == "overlap" else (5.0, 1e3)
    most = min(1.0, 20 / max(np.abs(y / UNIT).max(), 1e-9)) if warped else 0.0       # r^power stays finite

    def cost(params):
        value, gradient = warped_evidence(params, D, y)[:2]
        excess = params[:d] - params[:d].mean()
        return (excess ** 2).sum() / 2 - value, np.append(excess, np.zeros(3)) - gradient

    fit = minimize(cost, [*np.log([start] * d + [1.0, 1e-3]), 0.5 * most], jac=True, method="L-BFGS-B",
                   bounds=[*np.log([(1e-3, top)] * d + [(1e-2, 1e2), (1e-6, 1e-1)]), (-most, 1.5 * most)],
                   options={"maxiter": 40, "ftol": 1e-6})
    value, _, chol, alpha, offset, scale = warped_evidence(fit.x, D, y)
    *rates, signal, noise = np.exp(fit.x[:-1])
    return GP(X, kernel, np.array(rates), signal, noise, fit.x[-1], offset, scale, chol, alpha, value)


def gp_predict(gp, X):
    """Posterior mean and standard deviation (q,) of the noiseless warp(y, gp.power), R&W (2.25), (2.26)."""
    K = gp.signal * np.exp(-weighted_distances(gp.rates, X, gp.X, gp.kernel))           # (q, n)
    v = solve_triangular(gp.chol, K.T, lower=True)                     # (n, q)
    variance = np.maximum(gp.signal - (v ** 2).sum(0), 0)
    return gp.offset + gp.scale * K @ gp.alpha, gp.scale * np.sqrt(variance)


# ------------------------------------------- expected hypervolume improvement (section II-C)

def mc_ehvi(mean, std, draws, boxes, power=0.0):
    """Expected hypervolume improvement (q,) by Monte Carlo: a sum over free boxes (Yang et al. 2019).

    mean, std (q, 2); draws (s, 2) standard normal, common to all candidates; boxes from free_boxes.
    Objective 1 is drawn where its GP is normal and then unwarped (`warp` with this power): in dB a wide
    posterior is so lopsided that its standard deviation would promise losses far below 0.
    """
    known = not std[:, 1].any()
    losses = unwarp(mean[:, :1] + std[:, :1] * draws[:, 0], power)                      # (q, s)
    costs = mean[:, 1:] + std[:, 1:] * (draws[:1, 1] if known else draws[:, 1])         # (q, 1 or s)

    def sides(y, axis):                                                # of the boxes beyond y, (q, ., b)
        found = np.maximum(boxes[:, 0, axis], y[:, :, None])
        return np.maximum(np.subtract(boxes[:, 1, axis], found, out=found), 0, out=found)

    return (sides(losses, 0) * sides(costs, 1)).sum(-1).mean(-1)


def exact_ehvi(mean, std, boxes):
    """The closed form of the same for independent normal marginals (q,) (Yang et al. 2019).

    A box's share of an axis is max(0, u - max(l, y)) = (u - y)+ - (l - y)+, so its expectation is a
    difference of E(t - y)+ = (t - mean) Phi(z) + std phi(z), z = (t - mean) / std.
    """
    def below(t):                                                      # E(t - y)+, (q, b, 2)
        gap = np.where(np.isfinite(t), t, 0) - mean[:, None]
        width = np.broadcast_to(std[:, None], gap.shape)
        z = np.divide(gap, width, out=np.zeros(gap.shape), where=width > 0)
        value = np.where(width > 0, gap * norm.cdf(z) + width * norm.pdf(z), np.maximum(gap, 0))
        return np.where(np.isfinite(t), value, 0)

    return (below(boxes[:, 1]) - below(boxes[:, 0])).prod(-1).sum(-1)


# ---------------------------------------------------------------------------------- the search

def penalties(table, sites, diverged=()):
    """Objective 2 of a latency table: one array per site, its options' ms over the base blocks' total.

    So the base has penalty 1, the order of magnitude of the loss in dB (II-C); no result depends on the
    factor. Infinite is an option that the device cannot run (None in the table), or in `diverged`
    [[site, option], ...].
    """
    total = sum(table["sites"][site][0] for site in sites)
    return [np.array([math.inf if ms is None or [site, k] in diverged else ms / total
                      for k, ms in enumerate(table["sites"][site])]) for site in sites]


def total_penalty(penalty, options):
    """Objective 2 of one configuration: the sum of its sites' penalties."""
    return float(sum(p[o] for p, o in zip(penalty, options)))


def evaluated(options, loss_db, penalty):
    """An Evaluation whose numbers are finite, else ValueError."""
    options = tuple(map(int, options))
    found = Evaluation(options, float(loss_db), total_penalty(penalty, options))
    if not np.isfinite(found[1:]).all():
        raise ValueError(f"search: {options} has score {loss_db} and penalty {found.penalty}: not finite")
    return found


def available(penalty):
    """The option numbers of finite penalty, one array per site."""
    return [np.flatnonzero(np.isfinite(p)) for p in penalty]


def initial_design(penalty, seed):
    """Base, all-fastest, and INITIAL random configurations of one swap up to all, evenly in log; no repeats.

    Where sites are many, a configuration that is swapped throughout tells nothing about one that is good, and
    of hundreds of swaps few can be told apart: swaps are to the CHEAPEST options of a site.
    """
    options, d, rng = available(penalty), len(penalty), np.random.default_rng([seed, 0])
    base = np.array([o[0] for o in options])
    cheap = [o[1:][np.argsort(p[o[1:]], kind="stable")][:CHEAPEST] for o, p in zip(options, penalty)]
    rows = [base, [p.argmin() for p in penalty]]
    for i in range(3 * INITIAL):                                       # spare ones, since some are equal
        other = [rng.choice(o) if len(o) else b for o, b in zip(cheap, base)]
        swapped = rng.permutation(d) < round(d ** ((i % INITIAL + 0.5) / INITIAL))
        rows.append(np.where(swapped, other, base))
    return list(dict.fromkeys(tuple(map(int, row)) for row in rows))[:INITIAL + 2]


def default_ref(history, penalty):
    """A tenth beyond the worst of base and all-fastest (of all, where one is missing) in each objective."""
    ends = [tuple(int(o[0]) for o in available(penalty)), tuple(int(p.argmin()) for p in penalty)]
    rows = [e for e in history if e.options in ends]
    Y = np.array([(e.loss_db, e.penalty) for e in (rows if len(rows) >= len(set(ends)) else history)])
    worst, spread = Y.max(0), np.ptp(Y, axis=0)
    return worst + 0.1 * np.where(worst != 0, np.abs(worst), np.where(spread > 0, spread, 1))


def neighbours(front, options):
    """Every configuration that differs from one of `front` in one site, or in none, some of them twice."""
    return [f[:i] + (int(o),) + f[i + 1:] for f in front for i in range(len(options)) for o in options[i]]


def candidates(front, options, seen, rng):
    """Configurations not in `seen`: every one-site neighbour of the front, mutants, crossings, randoms.

    options: the numbers to choose from, one array per site. With none left among those (a nearly exhausted
    space), all remaining ones.
    """
    d, pool = len(options), neighbours(front, options)
    parents = np.array(front)[rng.integers(len(front), size=(MUTANTS, 2))]             # (., 2, d)
    crossed = np.where(rng.random((MUTANTS, d)) < 0.5, parents[:, 0], parents[:, 1])
    fresh = np.stack([o[rng.integers(len(o), size=MUTANTS + RANDOMS)] for o in options], 1)
    mutants = np.where(rng.random((MUTANTS, d)) < 2 / d, fresh[:MUTANTS], crossed)
    pool += map(tuple, np.concatenate([crossed, mutants, fresh[MUTANTS:]]).tolist())
    pool = [configuration for configuration in dict.fromkeys(pool) if configuration not in seen]
    return pool or [c for c in product(*(map(int, o) for o in options)) if c not in seen]


def posterior(history, penalty, kernel):
    """A function pool -> mean, deviation (q, 2) of both objectives, and the power that warps objective 1.

    Penalties are known exactly, so their deviation is 0, unless kernel is "rbf".
    """
    X, Y = np.array([e.options for e in history]), np.array([e[1:] for e in history])
    if kernel == "rbf":
        coded = functools.partial(encode, n_options=[len(p) for p in penalty])
        gps = [gp_fit(coded(X), y, kernel) for y in Y.T]
        return lambda pool: np.stack([gp_predict(gp, coded(pool)) for gp in gps], 2), 0.0
    gp = gp_fit(X, Y[:, 0], kernel, warped=True)

    def at(pool):
        mean, std = gp_predict(gp, pool)
        cost = sum(p[column] for p, column in zip(penalty, np.transpose(pool)))
        return np.stack([mean, cost], 1), np.stack([std, np.zeros(len(pool))], 1)

    return at, gp.power


def untried(history):
    """A function: whether a configuration has an option that none in history has at that site."""
    tried = [set(column) for column in zip(*(e.options for e in history))]
    return lambda options: any(o not in site for o, site in zip(options, tried))


def best_candidate(history, penalty, seed, ref, kernel):
    """The configuration of largest EHVI, with its posterior median for a score; None when all are scored.

    Uphill, a site at a time, from the best of a pool. Every other one must have an option that is `untried`
    at its site, as long as there are any: EHVI credits an option with what it gives to one configuration, not
    with what knowing it is worth to the rest of the front. Where EHVI is nil, what the GP knows least about.
    Tried with 36 sites of 8 options, swaps that add up, interact or are punished where stacked, share of the
    best known volume after 100 / 200: a Sobol design and a pool alone .79 / .90, uphill .80 / .92, designs
    from one swap to all .84 / .93, half the deviation .89 / .94 (.3 of it as much, 1.5 .79 / .90); on harder
    ones all that .84 / .91, designs of the CHEAPEST options .86 / .91 (of three .85 / .92), untried ones as
    well .86 / .93 (without such designs .81 / .90), one proposal in three .86 / .93. No gain from a kernel
    that adds up over sites (rates fall until this one does), starts that show every option once, 10 or 40,
    deviations that grow with the search or change in turn.
    """
    options, seen = available(penalty), {e.options for e in history}
    rng, Y = np.random.default_rng([seed, len(history)]), np.array([e[1:] for e in history])
    pool = candidates([history[i].options for i in np.flatnonzero(pareto_mask(Y))], options, seen, rng)
    if not pool:
        return None
    wanted = untried(history)
    if kernel == "rbf" or len(history) % 2 or not any(map(wanted, pool)):
        wanted = lambda options: True
    pool = list(filter(wanted, pool))
    draws = norm.ppf(qmc.Sobol(2, seed=rng).random(DRAWS).clip(1e-9, 1 - 1e-9))
    boxes = free_boxes(Y, default_ref(history, penalty) if ref is None else ref)
    (at, power), worth = posterior(history, penalty, kernel), {}       # {configuration: (EHVI, deviation)}
    for _ in range(1 + CLIMBS):
        for part in (pool[i:i + 1000] for i in range(0, len(pool), 1000)):             # bounds the memory
            mean, std = at(part)
            gain = mc_ehvi(mean, WIDTH * std, draws, boxes, power)
            worth.update(zip(part, zip(gain.tolist(), std[:, 0].tolist())))
        top = heapq.nlargest(3, worth, key=worth.get)
        pool = [o for o in dict.fromkeys(neighbours(top, options))
                if o not in worth and o not in seen and wanted(o)]
    return evaluated(top[0], unwarp(at(top[:1])[0][0, 0], power), penalty)


def propose(history, design, penalty, seed, ref=None, kernel="overlap", batch=1):
    """The next `batch` configurations: of the design as long as history is shorter, then the best candidates.

    Each of these supposes that those before it score their posterior median (the "kriging believer" of
    Ginsbourger et al. 2010). Fewer where the design or the space ends.
    """
    if len(history) < len(design):
        seen = {e.options for e in history}
        return [o for o in design if o not in seen][:min(batch, len(design) - len(history))]
    believed = list(history)
    while len(believed) < len(history) + batch:
        following = best_candidate(believed, penalty, seed, ref, kernel)
        if following is None:
            break
        believed.append(following)
    return [e.options for e in believed[len(history):]]


def search(score, penalty, n_evaluations, rng, ref=None, history=(), kernel="overlap", batch=1, map=map,
           each=None):
    """Spend `n_evaluations` scores on the front of (loss_db, penalty) -> [Evaluation, ...] in order.

    score(options: tuple of int) -> dB, finite; penalty: one array per site, the sum of whose entries is
    objective 2; an option of infinite penalty is never proposed. ref (2,): reference point, default 1.1 x
    the worst of base and all-fastest. rng: one draw from it decides everything, so the same rng and history
    (which counts towards n_evaluations) give the same proposals. `batch` of them are made at once; `map`
    (score, proposals) may score them in parallel; each(history) is called after every batch, to save or to
    show. Warns and ends early when the space is exhausted. kernel="rbf" is the paper's plain form: GPs on the
    relaxed vector for both objectives.
    """
    penalty = [np.asarray(p, dtype=float) for p in penalty]
    if not penalty or not all(np.isfinite(p).any() and (p > -np.inf).all() for p in penalty):
        raise ValueError("search: every site needs an option of finite penalty, and none may be NaN or -inf")
    if batch < 1 or kernel not in ("overlap", "rbf"):
        raise ValueError(f"search: batch {batch} must be at least 1, kernel {kernel!r} 'overlap' or 'rbf'")
    design = initial_design(penalty, seed := int(rng.integers(2 ** 63)))
    history = [evaluated(*e[:2], penalty) for e in history]
    if len(design) < len(history) < n_evaluations:                     # a batch cut off is begun anew
        del history[len(history) - (len(history) - len(design)) % batch:]
    while len(history) < n_evaluations:
        count = min(batch, n_evaluations - len(history))
        proposals = propose(history, design, penalty, seed, ref, kernel, count)
        if not proposals:
            warnings.warn(f"search: the space is exhausted, all {len(history)} configurations are scored",
                          stacklevel=2)
            break
        history += [evaluated(o, loss_db, penalty) for o, loss_db in zip(proposals, map(score, proposals))]
        if each:
            each(history)
    return history


def front_of(Y):
    """Indices of the Pareto front of Y (n, 2), ascending in objective 2."""
    front = np.flatnonzero(pareto_mask(Y))
    return front[np.argsort(np.asarray(Y)[front, 1], kind="stable")].tolist()


def below_chord(front):
    """(n, 2) -> (n,) distance below the chord between the front's ends, along an axis scaled to [0, 1]."""
    front = _objectives(front)
    if not np.isfinite(front).all():
        raise ValueError("knee: objectives must be finite")
    span = np.ptp(front, axis=0)
    return 1 - ((front - front.min(0)) / np.where(span > 0, span, 1)).sum(1)    # the chord: (0, 1) to (1, 0)


def knee(front, count):
    """Indices of the `count` best compromises of `front` (n, 2), best first: furthest below the chord."""
    return [int(i) for i in np.argsort(-below_chord(front), kind="stable")[:count]]


def apart(front, ranked, count, gap=0.1):
    """The first `count` of `ranked`, indices of front (n, 2), that lie apart; if too few do, the next best.

    Apart: by `gap` of the front's span in objective 2. Neighbours on a front differ in a swap or two.
    """
    cost, taken = _objectives(front)[:, 1], []
    for i in ranked:
        if all(abs(cost[i] - cost[j]) >= gap * np.ptp(cost) for j in taken):
            taken.append(i)
    return [*taken, *(i for i in ranked if i not in taken)][:count]


# ------------------------------------------------------------- what a search is to be compared with

def budgeted(losses, penalty, limit):
    """The options (d,) of least total loss whose penalties come to `limit` at most, exactly; None if none.

    losses, penalty: an array (k,) per site; options of infinite penalty do not count. A multiple-choice
    knapsack, by integer programming: with the loss of every single swap for its losses, the choice of LANA
    (Molchanov et al. 2022) and Puzzle (Bercovich et al. 2024).
    """
    items = [(i, k) for i, options in enumerate(available(penalty)) for k in options.tolist()]
    one_each = np.arange(len(penalty))[:, None] == [i for i, _ in items]                # (d, items)
    rules = [LinearConstraint(one_each.astype(float), 1, 1),
             LinearConstraint([[penalty[i][k] for i, k in items]], -np.inf, limit)]
    fit = milp([losses[i][k] for i, k in items], integrality=1, bounds=Bounds(0, 1), constraints=rules,
               options={"mip_rel_gap": 0})
    return None if fit.x is None else tuple(k for (_, k), taken in zip(items, fit.x) if taken > 0.5)


def random_at(penalty, target, count, rng, tolerance=0.03):
    """At most `count` random configurations, no two alike, of penalty `target` within a share `tolerance`.

    Each is uniform among all such: options are drawn with weights exp(-rate x penalty), at the rate that
    makes the expected sum the target, and those within the band accepted as it takes to undo the weights.
    """
    options, found = available(penalty), {}
    values = [penalty[i][o] for i, o in enumerate(options)]
    excess = lambda rate: sum(softmax(-rate * v) @ v for v in values) - target
    steepest = 30 / max(*map(np.ptp, values), 1e-9)
    rate = next((end for end in (-steepest, steepest) if excess(end) * end > 0), None)  # beyond the ends
    rate = brentq(excess, -steepest, steepest) if rate is None else rate
    edge = target * (1 + math.copysign(tolerance, rate))
    for _ in range(500):
        draws = np.stack([rng.choice(o, 2_000, p=softmax(-rate * v)) for o, v in zip(options, values)], 1)
        sums = sum(p[column] for p, column in zip(penalty, draws.T))
        taken = rng.random(len(sums)) < np.exp(np.minimum(rate * (sums - edge), 0))
        taken &= abs(sums - target) <= tolerance * target
        found.update(dict.fromkeys(map(tuple, draws[taken].tolist())))
        if len(found) >= count:
            break
    return list(found)[:count]


# ----------------------------------------------------------------------- the picture of a front

# Okabe & Ito's colours, apart for every kind of colour vision; shapes, dashes and lightness differ as
# well, for print.
INK, GREY, SKY, BLUE, ORANGE = "#222222", "#b0b0b0", "#56b4e9", "#0072b2", "#d55e00"
LEFT, TOP, RIGHT, BOTTOM = 80, 45, 868, 500          # the plot area, in SVG units


class Mark(NamedTuple):
    """Points of one kind in a picture, their name in the legend, and a label beside the first."""
    kind: str                   # "dot", "ring", "square", "diamond" or "hollow" (diamond)
    size: float                 # SVG units
    colour: str
    legend: str
    points: object              # (., 2)
    label: str = ""


def ticks(low, high, most=6):
    """Round numbers in [low, high], at most about `most`."""
    raw = (high - low) / most
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def svg_mark(kind, x, y, size, colour):
    """One mark around (x, y) as SVG text."""
    if kind in ("dot", "ring"):
        fill, stroke = (colour, "none") if kind == "dot" else ("none", colour)
        return (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{fill}" stroke="{stroke}" '
                'stroke-width="2"/>')
    corners = ((-1, -1), (1, -1), (1, 1), (-1, 1)) if kind == "square" else ((0, -1), (1, 0), (0, 1), (-1, 0))
    path = " ".join(f"{x + size * i:.1f},{y + size * j:.1f}" for i, j in corners)
    fill, stroke = (colour, "white") if kind == "diamond" else ("white", colour)
    return f'<polygon points="{path}" fill="{fill}" stroke="{stroke}" stroke-width="2"/>'


def svg_line(path, colour, dash="none", width=2.5):
    """An open path as SVG text; dash: lengths on and off."""
    return (f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}" '
            f'stroke-dasharray="{dash}"/>')


def svg_text(x, y, text, anchor="middle", size=15):
    """Lines of text at (x, y), in a white halo that parts them from what lies beneath."""
    lines = "".join(f'<tspan x="{x:.1f}" dy="{1.25 * size if i else 0}">{escape(line)}</tspan>'
                    for i, line in enumerate(text.split("\n")))
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{INK}" '
            f'stroke="white" stroke-width="4" paint-order="stroke">{lines}</text>')


def svg_axes(x_range, y_range, at, x_label, y_label):
    """Grid, numbers, frame and labels of the plot, as SVG parts; at(x, y) -> SVG units."""
    parts = []
    for x, value in ((at(value, 0)[0], value) for value in ticks(*x_range)):
        parts += [svg_line(f"M{x:.1f} {TOP}V{BOTTOM}", "#eeeeee", width=1),
                  svg_text(x, BOTTOM + 20, f"{value:.7g}")]
    for y, value in ((at(0, value)[1], value) for value in ticks(*y_range)):
        parts += [svg_line(f"M{LEFT} {y:.1f}H{RIGHT}", "#eeeeee", width=1),
                  svg_text(LEFT - 8, y + 5, f"{value:.7g}", "end")]
    return [*parts, svg_line(f"M{LEFT} {TOP}H{RIGHT}V{BOTTOM}H{LEFT}Z", INK, width=1),
            svg_text((LEFT + RIGHT) / 2, BOTTOM + 50, x_label, size=18),
            svg_text(LEFT, TOP - 18, y_label, "start", 18)]


def svg_labels(labels):
    """Texts beside marks [(x, y, text)], right of them, off the front, where there is room; none overlap."""
    parts, taken = [], []
    for x, y, text in labels:
        # A line is up to 200 units long and 19 high, and two texts may face each other.
        side, height = 1 if x < RIGHT - 200 else -1, 19 * (1 + text.count("\n"))
        top = max(y - height - 8, TOP + 18)
        while any(abs(x - other) < 420 and low - height < top < high for other, low, high in taken):
            top -= 19
        taken.append((x, top, top + height))
        parts.append(svg_text(x + 16 * side, top, text, "start" if side > 0 else "end"))
    return parts


def staircase(front):
    """The border of what a front (in SVG units) dominates, from the top of the plot to its right side."""
    corners = zip(front, [x for x, _ in front[1:]] + [RIGHT])
    return f"M{front[0][0]:.1f} {TOP}" + "".join(f"V{y:.1f}H{x:.1f}" for (_, y), x in corners)


def svg_legend(marks, lines):
    """Marks, then (name, colour, dash) of lines, below the axis in three columns, as SVG parts."""
    spots = [(LEFT + 22 + i // 3 * (RIGHT - LEFT) / 3, BOTTOM + 84 + i % 3 * 26)
             for i in range(len(marks) + len(lines))]
    symbols = [svg_mark(mark.kind, x, y, mark.size, mark.colour) for mark, (x, y) in zip(marks, spots)]
    symbols += [svg_line(f"M{x - 22} {y}h44", *line[1:]) for line, (x, y) in zip(lines, spots[len(marks):])]
    names = [mark.legend for mark in marks] + [line[0] for line in lines]
    return symbols + [svg_text(x + 30, y + 5, name, "start") for name, (x, y) in zip(names, spots)]


def ranges(points, seen):
    """What the plot shows, two (low, high): all x of points (n, 2), the y of `seen` and half more."""
    xs, low, high = points[:, 0], min(0.0, seen[:, 1].min()), max(1.5 * seen[:, 1].max(), 0.1)
    margin = 0.06 * (max(np.ptp(xs), 0.1 * xs.max()) or 1.0)
    return (xs.min() - margin, xs.max() + margin), (low - 0.08 * (high - low), high)


def front_svg(points, counts, marks, x_label, y_label):
    """A search as a picture, SVG text: every point, how the front grew, and marked points.

    points (n, 2): x and y, both minimised, in the order they were scored; counts: the front is shown after
    each, at most three; marks [Mark, ...]. What lies far above the last front and the marks is cut off.
    """
    points = np.asarray(points, dtype=float)
    fronts = [points[front_of(points[:n, ::-1])] for n in counts]
    seen = np.concatenate([fronts[-1], *(np.asarray(mark.points, dtype=float) for mark in marks)])
    (left, right), (low, high) = ranges(points, seen)

    def at(x, y):
        return (LEFT + (x - left) / (right - left) * (RIGHT - LEFT),
                BOTTOM - (y - low) / (high - low) * (BOTTOM - TOP))

    above = int((points[:, 1] > high).sum())
    marks = [Mark("dot", 3, GREY, f"scored ({above} of {len(points)} are above)", points),
             Mark("dot", 4, INK, "final front", fronts[-1]), *marks]
    drawn = [[svg_mark(mark.kind, *at(*p), mark.size, mark.colour) for p in mark.points] for mark in marks]
    styles = ((SKY, "2 4"), (BLUE, "9 5"), (INK, "none"))[-len(counts):]
    stairs = [svg_line(staircase([at(*p) for p in front]), *style) for front, style in zip(fronts, styles)]
    labels = svg_labels([(*at(*mark.points[0]), mark.label) for mark in marks if mark.label])
    box = f'<rect x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" height="{BOTTOM - TOP}"/>'
    lines = [(f"front after {n} scored", *style) for n, style in zip(counts, styles)]
    return "\n".join([
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 650" font-family="sans-serif">',
        f'<rect width="900" height="650" fill="white"/><clipPath id="plot">{box}</clipPath>',
        *svg_axes((left, right), (low, high), at, x_label, y_label), '<g clip-path="url(#plot)">',
        *drawn[0], *stairs, *sum(drawn[1:], []), "</g>", *labels, *svg_legend(marks, lines), "</svg>", ""])


# ------------------------------------------------------------------- a problem with a known answer

def landscape(rng, d=8, k=7):
    """A made problem, all k^d configurations enumerated -> (losses (k,)*d, penalties, one (k,) per site).

    Loss 10 log10 max(1 + sum_i e_i + sum_{i<j} z_ij sqrt(e_i e_j), 0.5), e_i of each option
    lognormal(-2.5, 0.9), 0 for the base; z_ij of each two options normal(0, 0.3). Penalties: a site's share
    times 1 or uniform(0.2, 0.9).
    """
    penalty = [np.concatenate([[1.0], rng.uniform(0.2, 0.9, k - 1)]) * w for w in rng.dirichlet(np.ones(d))]
    error = [np.concatenate([[0.0], rng.lognormal(-2.5, 0.9, k - 1)]) for _ in range(d)]
    total = 1 + sum(np.ix_(*error))
    for i, j in combinations(range(d), 2):
        pair = np.sqrt(np.outer(error[i], error[j])) * rng.normal(0, 0.3, (k, k))
        total = total + pair.reshape([k if axis in (i, j) else 1 for axis in range(d)])
    return 10 * np.log10(np.maximum(total, 0.5)), penalty


def additive(losses, penalty, n):
    """The race's additive prediction (an idea of LANA, Molchanov et al. 2022) -> [Evaluation, ...].

    Scores every single swap, then the configurations nearest the front that their errors' sum predicts.
    """
    d, cost = losses.ndim, sum(np.ix_(*penalty)).ravel()
    rows = [(0,) * i + (o,) + (0,) * (d - 1 - i) for i in range(d) for o in range(losses.shape[i])]
    error = [10 ** (losses[(0,) * i + (slice(None),) + (0,) * (d - 1 - i)] / 10) - 1 for i in range(d)]
    predicted, order = 1 + sum(np.ix_(*error)).ravel(), np.argsort(cost, kind="stable")
    above = np.empty_like(cost)
    above[order] = predicted[order] - np.minimum.accumulate(predicted[order])
    nearest = np.unravel_index(np.argsort(above, kind="stable")[:n], losses.shape)
    rows = list(dict.fromkeys(rows + list(zip(*(axis.tolist() for axis in nearest)))))[:n]
    return [evaluated(o, losses[o], penalty) for o in rows]


def race(seeds=2, budgets=(25, 50, 100)):
    """Print the share of the exact hypervolume that four searches reach on `landscape`, mean over seeds."""
    shares, n = {}, budgets[-1]
    for seed in range(seeds):
        losses, penalty = landscape(np.random.default_rng(seed))
        ref, rng = (3.0, 1.05 * sum(p[0] for p in penalty)), np.random.default_rng(seed)
        best = hypervolume(np.stack([losses.ravel(), sum(np.ix_(*penalty)).ravel()], 1), ref)
        drawn = map(tuple, rng.integers(losses.shape, size=(n, losses.ndim)).tolist())
        runs = {"random": [evaluated(o, losses[o], penalty) for o in drawn],
                "the paper's form (rbf)": search(losses.__getitem__, penalty, n, rng, ref, kernel="rbf"),
                "additive prediction": additive(losses, penalty, n),
                "this search": search(losses.__getitem__, penalty, n, rng, ref)}
        for name, run in runs.items():
            Y = np.array([e[1:] for e in run])
            shares.setdefault(name, []).append([hypervolume(Y[:b], ref) / best for b in budgets])
    print(f"share of the exact hypervolume after {budgets} of {losses.size:,} configurations, "
          f"mean of {seeds} seeds")
    for name, rows in shares.items():
        print(f"{name:<24}" + "".join(f"{share:8.3f}" for share in np.mean(rows, 0)))


def bench(budgets=(100, 200, 400)):
    """Print the seconds that one proposal takes, by sites and evaluations so far."""
    print(f"seconds per proposal after {budgets} evaluations")
    for d in (8, 36):
        rng, penalty, seconds = np.random.default_rng(d), [np.linspace(1, 0.2, 7) / d] * d, []
        rows = dict.fromkeys(map(tuple, rng.integers(7, size=(budgets[-1], d)).tolist()))
        history = [Evaluation(o, np.mean(o) + rng.random(), total_penalty(penalty, o)) for o in rows]
        for n in budgets:
            started = time.perf_counter()
            best_candidate(history[:n], penalty, 0, None, "overlap")
            seconds.append(time.perf_counter() - started)
        print(f"{d:>3} sites of 7 options   " + "".join(f"{s:8.2f}" for s in seconds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Race the search on a problem whose exact front is known.")
    parser.add_argument("--bench", action="store_true", help="time proposals instead")
    bench() if parser.parse_args().bench else race()
