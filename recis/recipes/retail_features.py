"""The dense features of `online_retail`: what is known at a cut-off about a customer, an item and the two together.

    candidate_features(history, customers [N], candidates [N, C]) -> float32 [N, C, K], K = len(FEATURES)

Everything is a logarithm, a ratio or a day count squeezed by log(1 + x); the model standardises it. The kinds:

    pair      decayed lines sum exp(-age / t) at four t, invoices, first and last time, rhythm, usual quantity
    item      buyers in the last days and weeks and their trends, price, how many customers come back for it
    customer  shopping days and their rhythm, breadth, basket size, taste for new things and prices
    together  item-kNN, ridge-regularised item-item weights (EASE, Steck 2019, arXiv:1905.03375), a ridge regression from
              earlier to later purchases, what similar customers bought lately, words of the item's text, near stock codes

Cost per cut-off: about ten products of [U, I] with [I, I] or [I, U] matrices and two factorisations [I, I].
"""

import re

import numpy as np
import torch
from torch import Tensor

from recis.recipes.retail_history import History, cosine
from recis.recipes.retail_log import WINDOW_DAYS

DECAY_DAYS = (10, 30, 90, 300)
NEVER_DAYS = 500.0  # age given to what never happened
WORD = re.compile("[A-Z]{3,}")
WORD_ITEMS = (4, 400)  # a word counts when at least, and fewer than, so many items have it
NEAR_CODES = 5  # stock codes at most so far apart often belong to one product line
NEIGHBOURS = 20
EASE_DECAY_DAYS = 120.0
EASE_PENALTY = 60.0
RIDGE_PENALTY = 2.0
RIDGE_WINDOWS = 4
RIDGE_FADE = 0.7  # weight of a window relative to the next later one
USUAL_GAP_DAYS = 60.0  # between shopping days of a customer who has one

PAIR = (
    *(f"lines_{days}d" for days in DECAY_DAYS), "lines", "invoices", "owned", "last", "first", "gap", "overdue",
    "share_of_days", "share_of_gaps", "quantity", "in_last_basket",
)  # fmt: skip
ITEM = (
    *(f"buyers_{days}d" for days in (3, 7, 14, 30, 90)), "buyers", *(f"buyers_week_{week}" for week in range(4)),
    "trend_7d", "trend_30d", "trend_90d", "item_age", "item_last", "item_price", "item_quantity", "item_return",
    "item_reach", "item_repeat", "word_trend_7d", "word_trend_28d",
)  # fmt: skip
CUSTOMER = (
    "days", "day_gap", "day_last", "day_first", "breadth", "basket", "variety", "day_overdue", "novelty",
)  # fmt: skip
TOGETHER = (
    "rule", "knn", "knn_mean", "knn_near", "knn_90d", "knn_last_basket", "ease", "ridge", "alike_28d", "alike_14d",
    "words", "words_30d", "codes", "price_gap", "quantity_gap",
)  # fmt: skip
FEATURES = (*PAIR, *ITEM, *CUSTOMER, *TOGETHER)


def candidate_features(history: History, customers: np.ndarray, candidates: np.ndarray, rule: Tensor) -> np.ndarray:
    """Return float32 [N, C, K].

    Args:
        history: the purchases before the cut-off.
        customers: [N], each with at least one purchase there.
        candidates: [N, C] items.
        rule: [N, I] scores of the hand rule.
    """
    view = _View(history, customers, candidates)
    values = _pair(view) | _item(view) | _customer(view) | _together(view, rule)
    return np.stack([np.asarray(values[name], dtype=np.float32) for name in FEATURES], axis=2)


class _View:
    """How values per pair, item or customer are laid out for candidates [N, C]."""

    def __init__(self, history: History, customers: np.ndarray, candidates: np.ndarray) -> None:
        self.history = history
        self.customers = customers
        self.candidates = candidates
        wanted = customers[:, None] * history.num_items + candidates
        found = np.searchsorted(history.keys, wanted).clip(max=len(history.keys) - 1)
        self._pair = found
        self.owned = history.keys[found] == wanted

    def pair(self, values: np.ndarray, missing: float = 0.0) -> np.ndarray:
        return np.where(self.owned, values[self._pair], missing)

    def item(self, values: np.ndarray) -> np.ndarray:
        return values[self.candidates]

    def customer(self, values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values[self.customers][:, None], self.candidates.shape)

    def cells(self, table: Tensor) -> np.ndarray:
        """Return the candidates' entries of a matrix [N, I]."""
        return table.gather(1, torch.from_numpy(self.candidates)).double().numpy()


def _log(values: np.ndarray, least: float = 1e-4) -> np.ndarray:
    return np.log(np.maximum(values, 0) + least)


class _Shopping:
    """Shopping days per customer, [U]."""

    def __init__(self, history: History) -> None:
        lines, size = history.lines, history.num_customers
        day = np.floor(history.age)
        days = np.unique(lines.customer * 10_000 + day.astype(np.int64))
        customer, age = days // 10_000, (days % 10_000).astype(np.float64)
        self.count = np.bincount(customer, minlength=size).astype(np.float64)
        self.last = np.full(size, NEVER_DAYS)
        np.minimum.at(self.last, customer, age)
        self.first = np.zeros(size)
        np.maximum.at(self.first, customer, age)
        gaps = self.count - 1
        self.gap = np.where(gaps > 0, (self.first - self.last) / gaps.clip(min=1), USUAL_GAP_DAYS)


def _pair(view: _View) -> dict[str, np.ndarray]:
    history = view.history
    shopping = _Shopping(history)
    both = np.unique(history.lines.invoice * len(history.keys) + history.pair)
    invoices = view.pair(np.bincount(both % len(history.keys), minlength=len(history.keys)))
    lines = history.pair_sum()
    last, first = view.pair(history.last_age, NEVER_DAYS), view.pair(history.first_age)
    gap = np.where(invoices > 1, (first - last) / (invoices - 1).clip(min=1), 3 * view.customer(shopping.gap))
    quantity = history.pair_sum(np.log1p(history.lines.quantity)) / lines
    decayed = {
        f"lines_{days}d": np.log1p(10 * view.pair(history.pair_sum(np.exp(-history.age / days)))) for days in DECAY_DAYS
    }
    return decayed | {
        "lines": np.log1p(view.pair(lines)),
        "invoices": np.log1p(invoices),
        "owned": view.owned,
        "last": np.log1p(last),
        "first": np.log1p(first),
        "gap": np.log1p(gap),
        "overdue": np.where(view.owned, np.log1p(last / gap.clip(min=3)), -1.0),
        "share_of_days": invoices / view.customer(shopping.count).clip(min=1),
        "share_of_gaps": invoices / (1 + first / view.customer(shopping.gap).clip(min=1)),
        "quantity": view.pair(quantity),
        "in_last_basket": view.owned & (last < view.customer(shopping.last) + 1),
    }


def _item_means(history: History) -> tuple[np.ndarray, np.ndarray]:
    """Return [I] mean log price and mean log quantity of each item's lines."""
    item = history.lines.item
    count = np.bincount(item, minlength=history.num_items).clip(min=1)
    price, quantity = (
        np.bincount(item, weights=np.log1p(values), minlength=history.num_items) / count
        for values in (history.lines.unit_price.clip(min=0), history.lines.quantity)
    )
    return price, quantity


def _item(view: _View) -> dict[str, np.ndarray]:
    history = view.history
    item, size = history.lines.item, history.num_items
    buyers = {days: history.buyers(days) for days in (3, 7, 14, 30, 60, 90, np.inf)}
    weeks = [history.buyers(7 * week + 7, until=7 * week) for week in range(4)]
    age, last = np.zeros(size), np.full(size, NEVER_DAYS)
    np.maximum.at(age, item, history.age)
    np.minimum.at(last, item, history.age)
    price, quantity = _item_means(history)
    earlier, lately = history.bought_within(np.inf, until=WINDOW_DAYS), history.bought_within(WINDOW_DAYS)
    active = history.active()
    come_back = (earlier * lately).sum(0).numpy()  # who has a line of the last 28 days is active
    had, have = earlier[active].sum(0).numpy(), lately.sum(0).numpy()
    repeated = np.bincount(history.keys[history.pair_sum() > 1] % size, minlength=size)
    values = {f"buyers_{days}d": _log(buyers[days], 0.3) for days in (3, 7, 14, 30, 90)}
    values |= {f"buyers_week_{week}": np.log1p(count) for week, count in enumerate(weeks)}
    values |= {
        "buyers": _log(buyers[np.inf], 0.3),
        "trend_7d": np.log((buyers[7] * 30 / 7 + 1) / (buyers[30] + 1)),
        "trend_30d": np.log((buyers[30] + 1) / (buyers[60] - buyers[30] + 1).clip(min=1)),
        "trend_90d": np.log((buyers[30] * 3 + 1) / (buyers[90] + 1)),
        "item_age": np.log1p(age),
        "item_last": np.log1p(last),
        "item_price": price,
        "item_quantity": quantity,
        "item_return": np.log((come_back + 0.5) / (had + 5)),
        "item_reach": np.log((have - come_back + 0.1) / (float(active.sum()) - had + 10)),
        "item_repeat": np.log((repeated + 1) / (buyers[np.inf] + 5)),
    }
    words = _words(history)
    for days in (7, WINDOW_DAYS):
        values[f"word_trend_{days}d"] = _word_trend(history, words, days)
    return {name: view.item(value) for name, value in values.items()}


def _words(history: History) -> np.ndarray:
    """Return float32 [I, W]: which word of the items' texts each item has, its row divided by the number of its words.

    Only items sold before the cut-off have words, and only words of neither too few nor too many of those count.
    """
    sold = np.unique(history.lines.item)
    found = {int(item): set(WORD.findall(history.lines.descriptions[item].upper())) for item in sold}
    count: dict[str, int] = {}
    for words in found.values():
        for word in words:
            count[word] = count.get(word, 0) + 1
    number = {
        word: k for k, word in enumerate(sorted(w for w, n in count.items() if WORD_ITEMS[0] <= n < WORD_ITEMS[1]))
    }
    table = np.zeros((history.num_items, len(number)), dtype=np.float32)
    for item, words in found.items():
        table[item, [number[word] for word in words if word in number]] = 1
    return table / table.sum(1, keepdims=True).clip(min=1)


def _word_trend(history: History, words: np.ndarray, days: int) -> np.ndarray:
    """Return [I]: mean over the item's words of the log trend of all items with that word; a flat trend gives 0."""
    longer = {7: 28, 28: 56}[days]
    has = (words > 0).astype(np.float64)
    recent, wide = has.T @ history.buyers(days), has.T @ history.buyers(longer)
    return words @ np.log((recent * longer / days + 10) / (wide + 10))


def _customer(view: _View) -> dict[str, np.ndarray]:
    history = view.history
    size = history.num_customers
    shopping = _Shopping(history)
    lines = np.bincount(history.lines.customer, minlength=size).clip(min=1)
    breadth = np.bincount(history.keys // history.num_items, minlength=size)
    recent = history.age <= 90
    first_time = recent & (history.age >= history.first_age[history.pair])
    customer = history.lines.customer
    novelty = (np.bincount(customer[first_time], minlength=size) + 5) / (
        np.bincount(customer[recent], minlength=size) + 8
    )
    values = {
        "days": np.log1p(shopping.count),
        "day_gap": np.log1p(shopping.gap),
        "day_last": np.log1p(shopping.last),
        "day_first": np.log1p(shopping.first),
        "breadth": np.log1p(breadth),
        "basket": np.log1p(lines / shopping.count.clip(min=1)),
        "variety": breadth / lines,
        "day_overdue": np.log1p(shopping.last / shopping.gap.clip(min=3)),
        "novelty": novelty,
    }
    return {name: view.customer(value) for name, value in values.items()}


def _together(view: _View, rule: Tensor) -> dict[str, np.ndarray]:
    history, rows = view.history, torch.from_numpy(view.customers)
    decayed = history.decayed[rows]
    mass = decayed.sum(1, keepdim=True)
    similarity = history.similarity
    knn = decayed @ similarity
    near = torch.where(
        similarity >= similarity.topk(min(NEIGHBOURS, len(similarity)), dim=1).values[:, -1:], similarity, 0.0
    )
    shopping = _Shopping(history)
    basket = history.matrix(history.last_age < shopping.last[history.keys // history.num_items] + 1)[rows]
    words = torch.from_numpy(_words(history))
    recent = history.matrix(history.pair_sum(np.exp(-history.age / 30)))[rows]
    price, quantity = _item_means(history)
    own_price = np.bincount(history.lines.customer, weights=price[history.lines.item], minlength=history.num_customers)
    own_price /= np.bincount(history.lines.customer, minlength=history.num_customers).clip(min=1)
    own_quantity = np.bincount(
        history.lines.customer,
        weights=np.log1p(history.lines.quantity) - quantity[history.lines.item],
        minlength=history.num_customers,
    ) / np.bincount(history.lines.customer, minlength=history.num_customers).clip(min=1)
    tables = {
        "rule": rule,
        "knn": knn,
        "knn_mean": knn / (mass + 1e-3),
        "knn_near": history.owned[rows] @ near.T,
        "knn_90d": decayed @ cosine(history.bought_within(90)),
        "knn_last_basket": basket @ similarity / (basket.sum(1, keepdim=True) + 1),
        "words": (decayed @ words / mass.clamp(min=1e-3)) @ words.T,
        "words_30d": (recent @ words / recent.sum(1, keepdim=True).clamp(min=1e-3)) @ words.T,
        "codes": decayed @ _near_codes(history.lines.stock_codes),
    }
    values = {name: _log(view.cells(table)) for name, table in tables.items()}
    values["ease"] = _log(view.cells(_ease(history, rows)), 3e-3)
    values["ridge"] = _log(view.cells(_ridge(history, rows)), 3e-3)
    alike = _alike(history, rows)
    for days in (WINDOW_DAYS, 14):
        values[f"alike_{days}d"] = _log(view.cells(_bought_by(alike, history.bought_within(days))))
    values["price_gap"] = view.item(price) - view.customer(own_price)
    values["quantity_gap"] = view.item(quantity) + view.customer(own_quantity)
    return values


def _near_codes(stock_codes: tuple[str, ...]) -> Tensor:
    """Return [I, I], 1 where two different items' stock codes are numbers at most NEAR_CODES apart."""
    leading = [re.match(r"\d{5}", code) for code in stock_codes]
    number = torch.tensor([float(found.group()) if found else float("nan") for found in leading])
    near = ((number[:, None] - number).abs() <= NEAR_CODES).float()
    return near.fill_diagonal_(0)


def _ease(history: History, rows: Tensor) -> Tensor:
    """Return [N, I]: history times the item-item weights that best rebuild all histories, an item not from itself."""
    seen = history.matrix(history.pair_sum(np.exp(-history.age / EASE_DECAY_DAYS)).clip(max=1.5))
    gram = seen.T @ seen
    gram.diagonal().add_(EASE_PENALTY)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    weights = (inverse / -inverse.diagonal()).fill_diagonal_(0)
    return seen[rows] @ weights


def _ridge(history: History, rows: Tensor) -> Tensor:
    """Return [N, I]: history times the weights that best foretold each of the last windows from what came before it."""
    size = history.num_items
    inner, outer = RIDGE_PENALTY * torch.eye(size), torch.zeros(size, size)
    for window in range(RIDGE_WINDOWS):
        start, stop = WINDOW_DAYS * (window + 1), WINDOW_DAYS * window
        before, bought = _scaled_history(history, start), history.bought_within(start, until=stop)
        use = (before.sum(1) > 0) & (bought.sum(1) > 0)
        before, bought = before[use], bought[use]
        inner += RIDGE_FADE**window * (before.T @ before)
        outer += RIDGE_FADE**window * (before.T @ bought)
    weights = torch.cholesky_solve(outer, torch.linalg.cholesky(inner))
    return _scaled_history(history, 0)[rows] @ weights


def _scaled_history(history: History, until: float) -> Tensor:
    """Return [U, I]: decayed lines older than `until`, at most 2 per pair, divided by sqrt(1 + the customer's sum)."""
    old = history.age > until
    decayed = np.where(old, np.exp(-np.maximum(history.age - until, 0) / 90.0), 0.0)
    table = history.matrix(history.pair_sum(decayed).clip(max=2))
    return table / (1 + table.sum(1, keepdim=True)).sqrt()


def _alike(history: History, rows: Tensor) -> Tensor:
    """Return [N, U]: squared cosine of customers' histories, rare items counting more; 0 with oneself."""
    owners = history.owned.sum(0)
    rarity = torch.log(history.num_customers / owners.clamp(min=1))
    profile = torch.nn.functional.normalize(history.decayed.sqrt() * rarity, dim=1, eps=1e-6)
    alike = profile[rows] @ profile.T
    alike[torch.arange(len(rows)), rows] = 0
    return alike.square()


def _bought_by(alike: Tensor, lately: Tensor) -> Tensor:
    """Return [N, I]: which share of the customers active lately, weighted by likeness, bought the item."""
    active = (lately.sum(1) > 0).float()
    return alike @ lately / (alike @ active + 1e-6)[:, None]
