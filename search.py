"""Multi-objective Bayesian search over block choices: a GP and Monte-Carlo EHVI by hand.

Letters in every docstring: n evaluated, q candidates, m = 2 objectives, s draws, d sites, k options.
Both objectives are MINIMISED everywhere. Objective 1, `loss_db`, is measured; objective 2, `penalty`,
is the sum of one known number per site. numpy and scipy only: this file can be copied by itself.
R&W: Rasmussen & Williams 2006, Gaussian Processes for Machine Learning.
"""
import sys
import time
from typing import NamedTuple

import numpy as np
from scipy.linalg import LinAlgError, cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.stats import norm, qmc

INITIAL = 20            # quasi-random configurations after the base and the all-fastest one
DRAWS = 32              # quasi-random normal draws per EHVI: more gave nothing with objective 2 exact
MUTANTS = RANDOMS = 200


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
    Y = _objectives(Y)
    order = np.lexsort((Y[:, 1], Y[:, 0]))
    y = Y[order]
    before = np.minimum.accumulate(np.append(np.inf, y[:, 1]))[:-1]    # best objective 2 so far
    new = np.append(True, (y[1:] != y[:-1]).any(1))[:len(y)]           # equal rows share one fate
    first = np.maximum.accumulate(np.where(new, np.arange(len(y)), 0))
    best = y[:, 1] < before
    best[:1] = True                                                    # the first beats nothing: inf too
    mask = np.empty(len(Y), dtype=bool)
    mask[order] = best[first]
    return mask


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
    lower, upper = boxes[:, 0], boxes[:, 1]                            # (b, 2)
    sides = upper - np.maximum(lower, y[:, :, None])                   # (q, s, b, 2)
    return np.maximum(sides, 0).prod(-1).sum(-1).mean(-1)


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
    """A fitted process: y ~ N(offset, scale^2 (signal exp(-D . rates) + noise I))."""
    X: np.ndarray               # (n, d)
    kernel: str                 # "overlap" or "rbf"
    rates: np.ndarray           # (d,) per-site rate: 1 / length scale (overlap), its square (rbf)
    signal: float
    noise: float
    offset: float
    scale: float
    chol: np.ndarray            # (n, n) lower Cholesky factor of the standardised covariance
    alpha: np.ndarray           # (n,) covariance^-1 (y - offset) / scale
    log_evidence: float         # log marginal likelihood of the standardised y, R&W (2.30)


def distances(A, B, kernel):
    """Per-site distances (d, a, b): [x != x'] for overlap, (x - x')^2 / 2 for rbf.

    The score is constant inside an interval of [0, 1], so a kernel on decoded options, exp of minus the
    weighted number of differing sites, knows what one on coordinates must learn.
    """
    delta = np.asarray(A).T[:, :, None] - np.asarray(B).T[:, None, :]
    return (delta != 0).astype(float) if kernel == "overlap" else delta ** 2 / 2


def log_evidence(log_params, D, y):
    """Log marginal likelihood R&W (2.30) and its gradient (5.9) at log (rates, signal, noise).

    D (d, n, n) from `distances`, y (n,) standardised. Returns value, gradient (d+2,), factor, alpha.
    """
    *rates, signal, noise = np.exp(log_params)
    S = signal * np.exp(-np.tensordot(rates, D, 1))                    # (n, n)
    chol = stable_cholesky(S + noise * np.eye(len(y)))
    alpha = cho_solve((chol, True), y)
    value = -0.5 * y @ alpha - np.log(np.diag(chol)).sum() - 0.5 * len(y) * np.log(2 * np.pi)
    W = np.outer(alpha, alpha) - cho_solve((chol, True), np.eye(len(y)))
    WS = W * S
    gradient = 0.5 * np.concatenate([-np.array(rates) * np.tensordot(D, WS, 2),
                                     [WS.sum(), noise * np.trace(W)]])
    return value, gradient, chol, alpha


def stable_cholesky(K):
    """Lower Cholesky factor of K, with the least jitter (from 1e-10, times 10) that makes it succeed."""
    jitter = 0.0
    while True:
        try:
            return cholesky(K + jitter * np.eye(len(K)), lower=True)
        except LinAlgError:
            jitter = max(10 * jitter, 1e-10 * np.trace(K) / len(K))
            if jitter > np.trace(K):
                raise


def gp_fit(X, y, kernel="overlap"):
    """Fit by maximum marginal likelihood (L-BFGS-B, analytic gradient), R&W chapter 5 -> GP.

    X (n, d): option numbers for "overlap", coordinates for "rbf"; y (n,) finite. One length scale per
    site; y is standardised; a constant y is its own prediction. Always the same start: no state.
    """
    X, y = np.asarray(X, dtype=float), np.asarray(y, dtype=float)
    if not (np.isfinite(X).all() and np.isfinite(y).all()):
        raise ValueError("gp_fit: X and y must be finite")
    if kernel not in ("overlap", "rbf"):
        raise ValueError(f"gp_fit: kernel {kernel!r} is neither 'overlap' nor 'rbf'")
    offset, scale = y.mean(), y.std() or 1.0
    z, D, d = (y - offset) / scale, distances(X, X, kernel), X.shape[1]
    start, top = (0.3, 5.0) if kernel == "overlap" else (5.0, 1e3)
    bounds = np.log([(1e-3, top)] * d + [(1e-2, 1e2), (1e-6, 1e-1)])
    fit = minimize(lambda p: [-v for v in log_evidence(p, D, z)[:2]], np.log([start] * d + [1.0, 1e-3]),
                   jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 40})
    value, _, chol, alpha = log_evidence(fit.x, D, z)
    *rates, signal, noise = np.exp(fit.x)
    return GP(X, kernel, np.array(rates), signal, noise, offset, scale, chol, alpha, value)


def gp_predict(gp, X):
    """Posterior mean and standard deviation (q,) of the noiseless objective, R&W (2.25), (2.26)."""
    K = gp.signal * np.exp(-np.tensordot(gp.rates, distances(X, gp.X, gp.kernel), 1))   # (q, n)
    v = solve_triangular(gp.chol, K.T, lower=True)                     # (n, q)
    variance = np.maximum(gp.signal - (v ** 2).sum(0), 0)
    return gp.offset + gp.scale * K @ gp.alpha, gp.scale * np.sqrt(variance)


# ---------------------------------------------------------------------------------- the search

def search(score, penalty, n_evaluations, rng, ref=None, history=(), kernel="overlap"):
    """Spend `n_evaluations` scores on the front of (loss_db, penalty) -> [Evaluation, ...] in order.

    score(options: tuple of int) -> dB, finite; penalty: one array per site, its entries' sum is
    objective 2; rng: one draw from it decides everything, so the same rng and history give the same
    proposals. ref (2,): reference point, default 1.1 x the worst of base and all-fastest. `history`
    counts towards n_evaluations. Ends early when the space is exhausted.
    kernel="rbf" is the paper's plain form: GPs on the relaxed vector for both objectives.
    """
    penalty = [np.asarray(p, dtype=float) for p in penalty]
    seed = int(rng.integers(2 ** 63))
    design = initial_design(penalty, seed)
    history = list(history)
    size = np.prod([float(len(p)) for p in penalty])
    while len(history) < min(n_evaluations, size):
        options = propose(history, penalty, design, seed, ref, kernel)
        loss_db = float(score(options))
        if not np.isfinite(loss_db):
            raise ValueError(f"search: the score of configuration {options} is {loss_db}, not finite")
        history.append(Evaluation(options, loss_db, total_penalty(penalty, options)))
    return history


def total_penalty(penalty, options):
    """Objective 2 of one configuration: the sum of its sites' penalties."""
    return float(sum(p[o] for p, o in zip(penalty, options)))


def initial_design(penalty, seed):
    """Base, all-fastest, and INITIAL quasi-random configurations (scrambled Sobol), without repeats."""
    n_options = [len(p) for p in penalty]
    sobol = qmc.Sobol(len(penalty), seed=np.random.default_rng([seed, 0])).random_base2(6)
    rows = [[0] * len(penalty), [int(p.argmin()) for p in penalty], *decode(sobol, n_options).tolist()]
    return list(dict.fromkeys(map(tuple, rows)))[:INITIAL + 2]


def propose(history, penalty, design, seed, ref, kernel):
    """The next configuration: the design's first new one, then the candidate of largest EHVI.

    When EHVI is nil for every candidate, the one the GP knows least about.
    """
    seen = {e.options for e in history}
    if len(history) < len(design):
        fresh = [options for options in design if options not in seen]
        if fresh:
            return fresh[0]
    rng = np.random.default_rng([seed, len(history)])
    Y = np.array([(e.loss_db, e.penalty) for e in history])
    front = [history[i].options for i in np.flatnonzero(pareto_mask(Y))]
    pool = candidates(front, [len(p) for p in penalty], seen, rng)
    mean, std = predict(history, pool, penalty, kernel)
    draws = norm.ppf(qmc.Sobol(2, seed=rng).random(DRAWS).clip(1e-9, 1 - 1e-9))
    ref = default_ref(history, penalty) if ref is None else ref
    gain = mc_ehvi(mean, std, draws, free_boxes(Y, ref))
    return pool[int(gain.argmax() if gain.max() > 0 else std[:, 0].argmax())]


def default_ref(history, penalty):
    """1.1 x the worst of base and all-fastest in each objective (a tenth beyond it, if not positive)."""
    ends = [(0,) * len(penalty), tuple(int(p.argmin()) for p in penalty)]
    rows = [e for e in history if e.options in ends] or history
    Y = np.array([(e.loss_db, e.penalty) for e in rows])
    return Y.max(0) + 0.1 * np.maximum(np.abs(Y).max(0), 1e-6)


def candidates(front, n_options, seen, rng):
    """Configurations not in `seen`: every one-site neighbour of the front, mutants, crossings, randoms.

    With none left among those (a nearly exhausted space), all remaining ones.
    """
    d = len(n_options)
    pool = [f[:i] + (o,) + f[i + 1:] for f in front for i in range(d) for o in range(n_options[i])]
    parents = np.array(front)[rng.integers(len(front), size=(MUTANTS, 2))]             # (., 2, d)
    crossed = np.where(rng.random((MUTANTS, d)) < 0.5, parents[:, 0], parents[:, 1])
    fresh = rng.integers(n_options, size=(MUTANTS + RANDOMS, d))
    mutants = np.where(rng.random((MUTANTS, d)) < 2 / d, fresh[:MUTANTS], crossed)
    pool += map(tuple, np.concatenate([crossed, mutants, fresh[MUTANTS:]]).tolist())
    pool = [options for options in dict.fromkeys(pool) if options not in seen]
    return pool or [o for o in np.ndindex(*n_options) if o not in seen]


def predict(history, pool, penalty, kernel):
    """Posterior mean and std (q, 2) of both objectives; objective 2 is exact unless kernel is "rbf"."""
    n_options = [len(p) for p in penalty]
    X, Q = np.array([e.options for e in history]), np.array(pool)
    if kernel == "rbf":
        X, Q = encode(X, n_options), encode(Q, n_options)
    loss = gp_predict(gp_fit(X, [e.loss_db for e in history], kernel), Q)
    if kernel == "rbf":
        cost = gp_predict(gp_fit(X, [e.penalty for e in history], kernel), Q)
    else:
        cost = np.array([total_penalty(penalty, o) for o in pool]), np.zeros(len(pool))
    return np.stack([loss[0], cost[0]], 1), np.stack([loss[1], cost[1]], 1)


def knee(front, count):
    """Indices of the `count` best compromises of `front` (n, 2), best first.

    Both axes scaled to [0, 1] over the front; ranked by distance below the chord between its two ends.
    """
    front = _objectives(front)
    span = np.ptp(front, axis=0)
    y = (front - front.min(0)) / np.where(span > 0, span, 1)
    below = 1 - y.sum(1)                      # the chord runs from (0, 1) to (1, 0)
    return [int(i) for i in np.argsort(-below, kind="stable")[:count]]


# ------------------------------------------------------------------- a problem with a known answer

def landscape(rng, d=8, k=7):
    """A made problem, all k^d configurations enumerated -> (losses (k,)*d, penalties, one (k,) per site).

    Faster options lose more; losses add up in the mean squared error, 10 log10(1 + sum_i e_i), and each
    pair of sites i, j adds a tenth of sqrt(e_i e_j) times a random factor.
    """
    penalty = [np.concatenate([[1.0], rng.uniform(0.2, 0.9, k - 1)]) * w
               for w in rng.dirichlet(np.ones(d))]
    error = [np.concatenate([[0.0], rng.lognormal(-2.5, 0.9, k - 1)]) for _ in range(d)]

    def along(values, *axes):                 # a table over `axes`, ready to broadcast over the k^d grid
        return values.reshape([k if i in axes else 1 for i in range(d)])

    total = sum(along(e, i) for i, e in enumerate(error))
    for i in range(d):
        for j in range(i + 1, d):
            pair = np.sqrt(np.outer(error[i], error[j])) * rng.normal(0, 0.3, (k, k))
            total = total + along(pair, i, j)
    return 10 * np.log10(np.maximum(1 + total, 0.5)), penalty


def main():
    """Race the search against random and against the paper's plain encoding; under a minute."""
    budgets, runs = (25, 50, 100), {"random": [], "rbf (the paper's form)": [], "overlap": []}
    for seed in range(2):
        losses, penalty = landscape(np.random.default_rng(seed))
        cost = sum(np.ix_(*penalty))
        ref = (3.0, 1.05 * sum(p[0] for p in penalty))
        best = hypervolume(np.stack([losses.ravel(), np.broadcast_to(cost, losses.shape).ravel()], 1), ref)
        for name in runs:
            started = time.perf_counter()
            rng = np.random.default_rng(seed)
            if name == "random":
                rows = rng.integers(losses.shape, size=(budgets[-1], losses.ndim)).tolist()
                found = [Evaluation(tuple(o), losses[tuple(o)], total_penalty(penalty, o)) for o in rows]
            else:
                found = search(lambda o: losses[o], penalty, budgets[-1], rng, ref, kernel=name.split()[0])
            Y = np.array([e[1:] for e in found])
            runs[name].append([hypervolume(Y[:b], ref) / best for b in budgets])
            print(f"seed {seed}, {name}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
    print(f"share of the exact hypervolume after {budgets} of {losses.size:,} configurations")
    for name, shares in runs.items():
        print(f"{name:<24}" + "".join(f"{share:8.3f}" for share in np.mean(shares, 0)))


if __name__ == "__main__":
    main()
