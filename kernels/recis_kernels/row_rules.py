"""The equations of the row optimizers: one row inside a numba loop, and many rows in float64 for tests.

    g = summed gradient of the row after clipping, w = weights, t = optimizer steps of the table, this one included

    sgd                 g += wd w;  w -= lr g
    sgd_momentum        g += wd w;  m = mu m + g;  w -= lr m
    adagrad             g += wd w;  h += g^2;  w -= lr g / (sqrt(h) + eps)
    row_wise_adagrad    g += wd w;  h += mean over D of g^2;  w -= lr g / (sqrt(h) + eps)
    adam                g += wd w;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
                        w -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    adamw               w *= 1 - lr wd, then adam without wd
    adamw_tf            w *= 1 - wd;  m, v as adam;  w -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)
    ftrl                n' = n + g^2;  z += g - (sqrt(n') - sqrt(n)) / lr w
                        w = 0 if |z| <= l1 else -(z - sign(z) l1) / ((beta + sqrt(n')) / lr + l2)

What depends on the table alone (1 - b1^t and the like) is computed once per step in float64 by `fold_scalars`; rows are
updated in fp32. With a state "t" of width 1 a row counts its own updates and uses that count instead of the table's.
Sources: Duchi et al. 2011; Kingma & Ba 2015; Loshchilov & Hutter 2019; McMahan et al. 2013; row-wise Adagrad as in FBGEMM,
adamw_tf as in TensorFlow Addons.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from recis_kernels.address import float32_at, load_float32, load_float64, store_float32
from recis_kernels.dispatch import njit
from recis_kernels.lanes import NUM_LANES, square_root, square_sum

ROW_STEPS = "t"  # the state of width 1 that counts a row's own updates
NUM_FOLDED = 9  # columns of what fold_scalars returns


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """One optimizer equation.

    Args:
        name: as at the head of this file.
        states: names of its state vectors, in the order the equations use them.
        scalars: what a table gives at each step: the columns of `scalars` [T, len(scalars)].
        row_steps: whether t is the row's own count of updates, kept in the state "t".
    """

    name: str
    states: tuple[str, ...]
    scalars: tuple[str, ...]
    row_steps: bool = False

    @property
    def code(self) -> int:
        """Number by which loops know the equation."""
        return _CODES[self.name]


_ADAM_SCALARS = ("lr", "beta1", "beta2", "eps", "weight_decay", "t")
SGD = UpdateRule("sgd", (), ("lr", "weight_decay"))
SGD_MOMENTUM = UpdateRule("sgd_momentum", ("m",), ("lr", "weight_decay", "momentum"))
ADAGRAD = UpdateRule("adagrad", ("h",), ("lr", "weight_decay", "eps"))
ROW_WISE_ADAGRAD = UpdateRule("row_wise_adagrad", ("h",), ("lr", "weight_decay", "eps"))
ADAM = UpdateRule("adam", ("m", "v"), _ADAM_SCALARS)
ADAMW = UpdateRule("adamw", ("m", "v"), _ADAM_SCALARS)
ADAMW_TF = UpdateRule("adamw_tf", ("m", "v"), _ADAM_SCALARS)
FTRL = UpdateRule("ftrl", ("n", "z"), ("lr", "beta", "l1", "l2"))

_SGD, _SGD_MOMENTUM, _ADAGRAD, _ROW_WISE, _ADAM, _FTRL = range(6)
_CODES = {
    "sgd": _SGD,
    "sgd_momentum": _SGD_MOMENTUM,
    "adagrad": _ADAGRAD,
    "row_wise_adagrad": _ROW_WISE,
    "adam": _ADAM,
    "adamw": _ADAM,
    "adamw_tf": _ADAM,
    "ftrl": _FTRL,
}


def rule_of(name: str, row_steps: bool = False) -> UpdateRule:
    """Return the rule of a name, what registered ops carry in its place; ValueError names the rules there are."""
    rules = {rule.name: rule for rule in (SGD, SGD_MOMENTUM, ADAGRAD, ROW_WISE_ADAGRAD, ADAM, ADAMW, ADAMW_TF, FTRL)}
    if name not in rules:
        raise ValueError(f"no rule {name!r}; there are {list(rules)}")
    return replace(rules[name], row_steps=row_steps)


def fold_scalars(rule: UpdateRule, scalars: Tensor) -> Tensor:
    """Return what the row loops read, float64 [T, NUM_FOLDED], from scalars [T, K] float64 (columns rule.scalars).

    Raises:
        ValueError: scalars has another shape or dtype.
    """
    if scalars.ndim != 2 or scalars.shape[1] != len(rule.scalars) or scalars.dtype != torch.float64:
        raise ValueError(
            f"scalars of {rule.name} must be [T, {len(rule.scalars)}] float64, columns {rule.scalars}; "
            f"got {tuple(scalars.shape)} {scalars.dtype}"
        )
    folded = scalars.new_zeros(scalars.shape[0], NUM_FOLDED)
    if rule.code != _ADAM:
        folded[:, : scalars.shape[1]] = scalars
        return folded
    # All forms of Adam are: g += coupled w;  m, v;  w = shrink w - step m / (sqrt(v) root + eps)
    lr, beta1, beta2, eps, decay, t = scalars.unbind(1)
    corrected = torch.full_like(lr, float(rule.name != "adamw_tf"))
    first, second = 1 - beta1**t, (1 - beta2**t).sqrt()
    shrink = {"adam": torch.ones_like(lr), "adamw": 1 - lr * decay, "adamw_tf": 1 - decay}[rule.name]
    coupled = decay if rule.name == "adam" else torch.zeros_like(decay)
    step = lr / first if rule.name != "adamw_tf" else lr * second / first
    root = 1 / second if rule.name != "adamw_tf" else torch.ones_like(lr)
    return torch.stack((coupled, shrink, beta1, beta2, eps, step, root, lr, corrected), dim=1).contiguous()


def has_coupled_decay(rule: UpdateRule, folded: Tensor) -> bool:
    """Return whether the rule adds weight decay to a gradient, given fold_scalars of its tables."""
    return rule.code != _FTRL and bool(folded.numpy()[:, 0 if rule.code == _ADAM else 1].any())


def reference_update(
    rule: UpdateRule, weight: Tensor, state: dict[str, Tensor], grad: Tensor, scalars: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return new weights [U, D] and states, all float64, of rows whose table gave scalars [U, K] (columns rule.scalars)."""
    w, g = weight.double(), grad.double()
    old = {name: value.double() for name, value in state.items()}
    k = {name: scalars[:, i : i + 1].double() for i, name in enumerate(rule.scalars)}
    if rule.name == "ftrl":
        return _reference_ftrl(w, old, g, k)
    if rule.name in ("sgd", "sgd_momentum", "adagrad", "row_wise_adagrad", "adam"):
        g = g + k["weight_decay"] * w
    if rule.name == "sgd":
        return w - k["lr"] * g, {}
    if rule.name == "sgd_momentum":
        m = k["momentum"] * old["m"] + g
        return w - k["lr"] * m, {"m": m}
    if rule.name in ("adagrad", "row_wise_adagrad"):
        squared = g.square() if rule.name == "adagrad" else g.square().mean(1, keepdim=True)
        h = old["h"] + squared
        return w - k["lr"] * g / (h.sqrt() + k["eps"]), {"h": h}
    new = {"m": k["beta1"] * old["m"] + (1 - k["beta1"]) * g, "v": k["beta2"] * old["v"] + (1 - k["beta2"]) * g * g}
    t = k["t"]
    if rule.row_steps:
        t = new[ROW_STEPS] = old[ROW_STEPS] + 1
    first, second = 1 - k["beta1"] ** t, 1 - k["beta2"] ** t
    if rule.name == "adamw_tf":
        w = w * (1 - k["weight_decay"])
        return w - k["lr"] * second.sqrt() / first * new["m"] / (new["v"].sqrt() + k["eps"]), new
    if rule.name == "adamw":
        w = w * (1 - k["lr"] * k["weight_decay"])
    return w - k["lr"] * (new["m"] / first) / ((new["v"] / second).sqrt() + k["eps"]), new


def _reference_ftrl(
    w: Tensor, old: dict[str, Tensor], g: Tensor, k: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    n = old["n"] + g.square()
    z = old["z"] + g - (n.sqrt() - old["n"].sqrt()) / k["lr"] * w
    moved = -(z - z.sign() * k["l1"]) / ((k["beta"] + n.sqrt()) / k["lr"] + k["l2"])
    return torch.where(z.abs() <= k["l1"], torch.zeros_like(w), moved), {"n": n, "z": z}


# ---- for numba loops: everything of one row is given by address

# g is padded with zeros to a multiple of 16 floats; coupled decay changes it; k = the table's line of fold_scalars.


@njit
def update_row(code, dim, weight, first_state, second_state, row_steps, g, square, k):
    """Apply the equation `code` to one row, in place.

    Addresses of states the rule does not have are not read; row_steps 0: the table's t holds; square = square_sum of g.
    """
    if code == _ADAM:
        _adam_row(dim, weight, first_state, second_state, row_steps, g, k)
    elif code == _ROW_WISE:
        _row_wise_row(dim, weight, first_state, g, square, k)
    elif code == _ADAGRAD:
        _adagrad_row(dim, weight, first_state, g, k)
    elif code == _SGD:
        _sgd_row(dim, weight, g, k)
    elif code == _SGD_MOMENTUM:
        _momentum_row(dim, weight, first_state, g, k)
    else:
        _ftrl_row(dim, weight, first_state, second_state, g, k)


@njit
def _sgd_row(dim, w_at, g_at, k):
    _add_decay(dim, g_at, w_at, load_float64(k + 8))
    w, g = float32_at(w_at, dim), float32_at(g_at, dim)
    lr = np.float32(load_float64(k))
    for i in range(dim):
        w[i] -= lr * g[i]


@njit
def _add_decay(dim, g_at, w_at, weight_decay):
    if weight_decay != 0.0:
        w, g = float32_at(w_at, dim), float32_at(g_at, dim)
        decay = np.float32(weight_decay)
        for i in range(dim):
            g[i] += decay * w[i]


@njit
def _momentum_row(dim, w_at, m_at, g_at, k):
    _add_decay(dim, g_at, w_at, load_float64(k + 8))
    w, m, g = float32_at(w_at, dim), float32_at(m_at, dim), float32_at(g_at, dim)
    lr, momentum = np.float32(load_float64(k)), np.float32(load_float64(k + 16))
    for i in range(dim):
        moved = momentum * m[i] + g[i]
        m[i] = moved
        w[i] -= lr * moved


@njit
def _adagrad_row(dim, w_at, h_at, g_at, k):
    _add_decay(dim, g_at, w_at, load_float64(k + 8))
    w, h, g = float32_at(w_at, dim), float32_at(h_at, dim), float32_at(g_at, dim)
    lr, eps = np.float32(load_float64(k)), np.float32(load_float64(k + 16))
    for i in range(dim):
        grown = h[i] + g[i] * g[i]
        h[i] = grown
        w[i] -= lr * g[i] / (np.sqrt(grown) + eps)


@njit
def _row_wise_row(dim, w_at, h_at, g_at, square, k):
    if load_float64(k + 8) != 0.0:
        _add_decay(dim, g_at, w_at, load_float64(k + 8))
        square = square_sum(g_at, (dim + NUM_LANES - 1) // NUM_LANES * NUM_LANES)
    grown = load_float32(h_at) + square / np.float32(dim)
    store_float32(h_at, grown)
    w, g = float32_at(w_at, dim), float32_at(g_at, dim)
    step = np.float32(load_float64(k)) / (square_root(grown) + np.float32(load_float64(k + 16)))
    for i in range(dim):
        w[i] -= step * g[i]


@njit
def _adam_row(dim, w_at, m_at, v_at, row_steps, g_at, k):
    _add_decay(dim, g_at, w_at, load_float64(k))
    w, m, v, g = float32_at(w_at, dim), float32_at(m_at, dim), float32_at(v_at, dim), float32_at(g_at, dim)
    beta1, beta2 = np.float32(load_float64(k + 16)), np.float32(load_float64(k + 24))
    rest1, rest2 = np.float32(1.0 - load_float64(k + 16)), np.float32(1.0 - load_float64(k + 24))
    shrink, eps = np.float32(load_float64(k + 8)), np.float32(load_float64(k + 32))
    step, root = np.float32(load_float64(k + 40)), np.float32(load_float64(k + 48))
    if row_steps != 0:
        t = load_float32(row_steps) + np.float32(1.0)
        store_float32(row_steps, t)
        first = 1.0 - load_float64(k + 16) ** np.float64(t)
        second = np.sqrt(1.0 - load_float64(k + 24) ** np.float64(t))
        if load_float64(k + 64) != 0.0:
            step, root = np.float32(load_float64(k + 56) / first), np.float32(1.0 / second)
        else:
            step, root = np.float32(load_float64(k + 56) * second / first), np.float32(1.0)
    for i in range(dim):
        mean = beta1 * m[i] + rest1 * g[i]
        square = beta2 * v[i] + rest2 * (g[i] * g[i])
        m[i] = mean
        v[i] = square
        w[i] = shrink * w[i] - step * mean / (np.sqrt(square) * root + eps)


@njit
def _ftrl_row(dim, w_at, n_at, z_at, g_at, k):
    w, n, z, g = float32_at(w_at, dim), float32_at(n_at, dim), float32_at(z_at, dim), float32_at(g_at, dim)
    lr, beta = np.float32(load_float64(k)), np.float32(load_float64(k + 8))
    l1, l2 = np.float32(load_float64(k + 16)), np.float32(load_float64(k + 24))
    zero = np.float32(0.0)
    for i in range(dim):
        square = g[i] * g[i]
        grown = n[i] + square
        root = np.sqrt(grown)
        roots = root + np.sqrt(n[i])
        # sqrt(n') - sqrt(n) = g^2 / (sqrt(n') + sqrt(n)): the difference itself loses most digits for a small g
        sigma = square / roots / lr if roots > zero else zero
        moved = z[i] + (g[i] - sigma * w[i])
        n[i] = grown
        z[i] = moved
        shrunk = moved - l1 if moved > zero else moved + l1
        w[i] = zero if abs(moved) <= l1 else -shrunk / ((beta + root) / lr + l2)
