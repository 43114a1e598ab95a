"""Multi-objective Bayesian search over block choices: a GP and Monte-Carlo EHVI by hand.

Letters in every docstring: n evaluated, q candidates, m = 2 objectives, s draws, d sites, k options.
Both objectives are MINIMISED everywhere. Objective 1, `loss_db`, is measured; objective 2, `penalty`,
is the sum of one known number per site. numpy and scipy only: this file can be copied by itself.
R&W: Rasmussen & Williams 2006, Gaussian Processes for Machine Learning.
"""
import argparse
import time
import warnings
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
from scipy.linalg import LinAlgError, cho_solve, cholesky, solve_triangular
from scipy.linalg.lapack import dpotri
from scipy.optimize import minimize
from scipy.stats import norm, qmc

INITIAL = 20            # quasi-random configurations after the base and the all-fastest one
DRAWS = 32              # quasi-random normal draws per EHVI: more gave nothing with objective 2 exact
MUTANTS = RANDOMS = 200
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

def pareto_mask(Y):
    """(n, 2) objectives -> (n,) True where no other row is as good in both and better in one."""
    rows, inverse = np.unique(_objectives(Y), axis=0, return_inverse=True)   # ascending; equal rows share one fate
    best = rows[:, 1] < np.minimum.accumulate(np.append(np.inf, rows[:, 1]))[:-1]
    best[:1] = True                                                    # the first beats nothing: inf too
    return best[inverse.ravel()]


def _objectives(Y):
    Y = np.asarray(Y, dtype=float).reshape(-1, 2)
    if np.isnan(Y).any():
        raise ValueError("objectives must not be NaN")
    return Y


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


def mc_ehvi(mean, std, draws, boxes):
    """Expected hypervolume improvement (q,) by Monte Carlo: a sum over free boxes (Yang et al. 2019).

    mean, std (q, 2); draws (s, 2) standard normal, common to all candidates; boxes from free_boxes.
    """
    y = mean[:, None] + std[:, None] * draws                           # (q, s, 2)
    return mean_improvement(y[..., 0], y[..., 1], boxes)


def mean_improvement(losses, penalties, boxes):
    """Hypervolume improvement, averaged over outcomes of both objectives, (q, s) or (q, 1) if known -> (q,)."""
    def sides(y, axis):                                                # of the boxes beyond y, (q, s, b)
        sides = np.maximum(boxes[:, 0, axis], y[:, :, None])
        return np.maximum(np.subtract(boxes[:, 1, axis], sides, out=sides), 0, out=sides)

    return (sides(losses, 0) * sides(penalties, 1)).sum(-1).mean(-1)


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


def stable_cholesky(K, jitter=0.0):
    """Lower Cholesky factor of K, with the least jitter (1e-10 of the mean variance, times 10) that makes it succeed."""
    try:
        return cholesky(K + jitter * np.eye(len(K)), lower=True)
    except LinAlgError:
        if jitter >= np.trace(K):
            raise
        return stable_cholesky(K, max(10 * jitter, 1e-10 * np.trace(K) / len(K)))


def warp(y, power):
    """Box & Cox's (1964) (r^power - 1) / power of the error ratio r = 10^(y / 10), in dB near 0, and d / d power.

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
    Tried on fifteen 7^8 landscapes (additive, pairwise, super-additive, small nets), share of the exact volume after
    50 / 100: neither warp nor prior .919 / .969, warp .921 / .964, both .937 / .974. No gain from additive and
    pairwise terms anchored at the base, clipped losses, a wider or narrower posterior, more mutation.
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
    exponent = sum(rate * D for rate, D in zip(gp.rates, distances(X, gp.X, gp.kernel)))
    K = gp.signal * np.exp(-exponent)                                  # (q, n)
    v = solve_triangular(gp.chol, K.T, lower=True)                     # (n, q)
    variance = np.maximum(gp.signal - (v ** 2).sum(0), 0)
    return gp.offset + gp.scale * K @ gp.alpha, gp.scale * np.sqrt(variance)


# ---------------------------------------------------------------------------------- the search

def search(score, penalty, n_evaluations, rng, ref=None, history=(), kernel="overlap", batch=1, map=map):
    """Spend `n_evaluations` scores on the front of (loss_db, penalty) -> [Evaluation, ...] in order.

    score(options: tuple of int) -> dB, finite; penalty: one array per site, its entries' sum is
    objective 2; an option of infinite penalty is never proposed. ref (2,): reference point, default 1.1 x
    the worst of base and all-fastest. rng: one draw from it decides everything, so the same rng and history
    (which counts towards n_evaluations) give the same proposals; `batch` of them are made at once, and
    `map` (score, proposals) may score them in parallel. Warns and ends early when the space is exhausted.
    kernel="rbf" is the paper's plain form: GPs on the relaxed vector for both objectives.
    """
    penalty = [np.asarray(p, dtype=float) for p in penalty]
    if not penalty or not all(np.isfinite(p).any() and (p > -np.inf).all() for p in penalty):
        raise ValueError("search: every site needs an option of finite penalty, and none may be NaN or -inf")
    if batch < 1 or kernel not in ("overlap", "rbf"):
        raise ValueError(f"search: batch {batch} must be at least 1, kernel {kernel!r} 'overlap' or 'rbf'")
    seed, history = int(rng.integers(2 ** 63)), [evaluated(*e[:2], penalty) for e in history]
    design = initial_design(penalty, seed)
    while len(history) < n_evaluations:
        n, seen = len(history), {e.options for e in history}
        if n < len(design):
            proposals = [o for o in design if o not in seen][:len(design) - n]
        else:
            begun = (n - len(design)) % batch                          # of a batch that was cut off, if it is one
            proposals = propose(history[:n - begun], penalty, seed, ref, kernel, batch)
            if [e.options for e in history[n - begun:]] != proposals[:begun]:
                begun, proposals = 0, propose(history, penalty, seed, ref, kernel, batch)
            proposals = proposals[begun:]
        if not proposals:
            warnings.warn(f"search: the space is exhausted, all {n} configurations are scored", stacklevel=2)
            break
        proposals = proposals[:n_evaluations - n]
        for options, loss_db in zip(proposals, map(score, proposals)):
            history.append(evaluated(options, loss_db, penalty))
    return history


def evaluated(options, loss_db, penalty):
    """An Evaluation whose numbers are finite, else ValueError."""
    options = tuple(map(int, options))
    found = Evaluation(options, float(loss_db), total_penalty(penalty, options))
    if not np.isfinite(found[1:]).all():
        raise ValueError(f"search: configuration {options} has score {loss_db}, penalty {found.penalty}: not finite")
    return found


def total_penalty(penalty, options):
    """Objective 2 of one configuration: the sum of its sites' penalties."""
    return float(sum(p[o] for p, o in zip(penalty, options)))


def available(penalty):
    """The option numbers of finite penalty, one array per site."""
    return [np.flatnonzero(np.isfinite(p)) for p in penalty]


def initial_design(penalty, seed):
    """Base, all-fastest, and INITIAL quasi-random configurations (scrambled Sobol), without repeats."""
    options = available(penalty)
    sobol = qmc.Sobol(len(penalty), seed=np.random.default_rng([seed, 0])).random_base2(6)
    spread = [[int(o[c]) for o, c in zip(options, row)] for row in decode(sobol, [len(o) for o in options])]
    rows = [[int(o[0]) for o in options], [int(p.argmin()) for p in penalty], *spread]
    return list(dict.fromkeys(map(tuple, rows)))[:INITIAL + 2]


def propose(history, penalty, seed, ref=None, kernel="overlap", batch=1):
    """The next `batch` configurations, greedily: each supposes that those before score their posterior median.

    (The "kriging believer" of Ginsbourger et al. 2010.) Fewer when the space ends.
    """
    believed = list(history)
    while len(believed) < len(history) + batch:
        following = best_candidate(believed, penalty, seed, ref, kernel)
        if following is None:
            break
        believed.append(following)
    return [e.options for e in believed[len(history):]]


def best_candidate(history, penalty, seed, ref, kernel):
    """The candidate of largest EHVI, with its posterior median for a score; None when all are scored.

    When EHVI is nil for every candidate, the one the GP knows least about.
    """
    rng = np.random.default_rng([seed, len(history)])
    Y = np.array([(e.loss_db, e.penalty) for e in history])
    front = [history[i].options for i in np.flatnonzero(pareto_mask(Y))]
    pool = candidates(front, available(penalty), {e.options for e in history}, rng)
    if not pool:
        return None
    draws = norm.ppf(qmc.Sobol(2, seed=rng).random(DRAWS).clip(1e-9, 1 - 1e-9))
    losses, penalties, std = outcomes(history, pool, penalty, kernel, draws)
    boxes = free_boxes(Y, default_ref(history, penalty) if ref is None else ref)
    parts = [slice(i, i + 1000) for i in range(0, len(pool), 1000)]    # bounds the memory
    gain = np.concatenate([mean_improvement(losses[part], penalties[part], boxes) for part in parts])
    best = int(gain.argmax() if gain.max() > 0 else std.argmax())
    return evaluated(pool[best], np.median(losses[best]), penalty)


def default_ref(history, penalty):
    """A tenth beyond the worst of base and all-fastest (of all, where one is missing) in each objective."""
    ends = [tuple(int(o[0]) for o in available(penalty)), tuple(int(p.argmin()) for p in penalty)]
    rows = [e for e in history if e.options in ends]
    Y = np.array([(e.loss_db, e.penalty) for e in (rows if len(rows) >= len(set(ends)) else history)])
    worst, spread = Y.max(0), np.ptp(Y, axis=0)
    return worst + 0.1 * np.where(worst != 0, np.abs(worst), np.where(spread > 0, spread, 1))


def candidates(front, options, seen, rng):
    """Configurations not in `seen`: every one-site neighbour of the front, mutants, crossings, randoms.

    options: the numbers to choose from, one array per site. With none left among those (a nearly exhausted
    space), all remaining ones.
    """
    d = len(options)
    pool = [f[:i] + (int(o),) + f[i + 1:] for f in front for i in range(d) for o in options[i]]
    parents = np.array(front)[rng.integers(len(front), size=(MUTANTS, 2))]             # (., 2, d)
    crossed = np.where(rng.random((MUTANTS, d)) < 0.5, parents[:, 0], parents[:, 1])
    fresh = np.stack([o[rng.integers(len(o), size=MUTANTS + RANDOMS)] for o in options], 1)
    mutants = np.where(rng.random((MUTANTS, d)) < 2 / d, fresh[:MUTANTS], crossed)
    pool += map(tuple, np.concatenate([crossed, mutants, fresh[MUTANTS:]]).tolist())
    pool = [configuration for configuration in dict.fromkeys(pool) if configuration not in seen]
    return pool or [c for c in product(*(map(int, o) for o in options)) if c not in seen]


def outcomes(history, pool, penalty, kernel, draws):
    """Both objectives of the pool under common draws (s, 2) -> losses (q, s), penalties, the loss GP's std (q,).

    Penalties are exact, (q, 1), unless kernel is "rbf". Losses are drawn where the GP is normal and then unwarped:
    in dB a wide posterior is so lopsided that its standard deviation would promise losses far below 0.
    """
    n_options = [len(p) for p in penalty]
    X, Q = np.array([e.options for e in history]), np.array(pool)
    if kernel == "rbf":
        X, Q = encode(X, n_options), encode(Q, n_options)
    gp = gp_fit(X, [e.loss_db for e in history], kernel, warped=kernel == "overlap")
    mean, std = gp_predict(gp, Q)
    losses = unwarp(mean[:, None] + std[:, None] * draws[:, 0], gp.power)
    if kernel == "rbf":
        cost, width = gp_predict(gp_fit(X, [e.penalty for e in history], kernel), Q)
        return losses, cost[:, None] + width[:, None] * draws[:, 1], std
    return losses, np.array([[total_penalty(penalty, o)] for o in pool]), std


def knee(front, count):
    """Indices of the `count` best compromises of `front` (n, 2), best first: those furthest below the chord."""
    return [int(i) for i in np.argsort(-below_chord(front), kind="stable")[:count]]


def below_chord(front):
    """(n, 2) -> how far below the chord between the front's two ends, along an axis, both scaled to [0, 1] over the front."""
    front = _objectives(front)
    if not np.isfinite(front).all():
        raise ValueError("knee: objectives must be finite")
    span = np.ptp(front, axis=0)
    return 1 - ((front - front.min(0)) / np.where(span > 0, span, 1)).sum(1)            # the chord runs from (0, 1) to (1, 0)


# ------------------------------------------------------------------- a problem with a known answer

def landscape(rng, d=8, k=7):
    """A made problem, all k^d configurations enumerated -> (losses (k,)*d, penalties, one (k,) per site).

    Loss 10 log10 max(1 + sum_i e_i + sum_{i<j} z_ij sqrt(e_i e_j), 0.5), e_i of each option lognormal(-2.5, 0.9),
    0 for the base; z_ij of each two options normal(0, 0.3). Penalties: a site's share times 1 or uniform(0.2, 0.9).
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
    print(f"share of the exact hypervolume after {budgets} of {losses.size:,} configurations, mean of {seeds} seeds")
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
            propose(history[:n], penalty, 0)
            seconds.append(time.perf_counter() - started)
        print(f"{d:>3} sites of 7 options   " + "".join(f"{s:8.2f}" for s in seconds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Race the search on a problem whose exact front is known.")
    parser.add_argument("--bench", action="store_true", help="time proposals instead")
    bench() if parser.parse_args().bench else race()
