"""Generate a click log from a stated model, so that the best possible AUC is known and a run can be held against it.

A sample is an impression of item i to user u at time t. With x = sigmoid(logit), click ~ Bernoulli(x):

    logit = BIAS + quality[i] + 0.6 <taste[u], style[i]> + 1.2 match(i's category, u's last clicks)
            - 0.4 |log price[i] - budget[u]| + 0.25 fresh(i, t) + evening[t] * mobile[device]

Users and items are drawn from Zipf laws over those that exist at time t; both keep arriving through the whole log, so tables
grow and some items of the last day were never trained on. The log carries x itself in `true_probability`: no model can rank
better in expectation than by x, so its AUC is the Bayes-optimal AUC of this very log. Ids are 64-bit, negatives included.

With `text=True` each item has a title of words with hidden weights; most of `quality` comes from the words, so that a text
tower can know a new item. The generative model is ours.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recis.errors import ConfigError

NUM_CATEGORIES = 60
NUM_BRANDS = 400
TASTE_DIM = 6
HISTORY = 20
BIAS = -1.35
STEPS_PER_DAY = 6  # clicks of one step are in the histories of the next
DAY_MS = 86_400_000
FIRST_MS = 1_760_000_000_000
WORDS_PER_TITLE = 6
NUM_WORDS = 900
NEW_ITEM_DAYS = 1.5
DEVICES = ("phone", "tablet", "desktop")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClickLogConfig:
    """Sizes of a generated log; the same config gives the same bytes."""

    num_samples: int = 400_000
    num_days: int = 8
    num_users: int = 12_000
    """Users that exist at the end; a third of them from the start."""
    num_items: int = 6_000
    """Items that exist at the end; a third of them from the start."""
    seed: int = 0
    text: bool = False
    """Give each item a title that carries signal."""
    row_group_rows: int = 8_192

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_days", "num_users", "num_items", "row_group_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"click log: {name} must be at least 1; got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class _World:
    """What is hidden from the model: one row per user or item."""

    taste: np.ndarray
    budget: np.ndarray
    user_id: np.ndarray
    user_born: np.ndarray
    style: np.ndarray
    quality: np.ndarray
    category: np.ndarray
    brand: np.ndarray
    log_price: np.ndarray
    item_id: np.ndarray
    item_born: np.ndarray
    titles: np.ndarray | None


def generate(config: ClickLogConfig, folder: Path) -> list[Path]:
    """Write one Parquet file per day, `day-00.parquet` and so on, and return their paths in order of time.

    Columns: day int32, time_ms int64, user_id int64, item_id int64, category int64, brand string, device string, hour int64,
    price float32, item_age_days float32, history_items and history_categories list<int64> (the user's last clicks, newest
    last, at most 20), click int8, true_probability float64, and title string with `text=True`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(config.seed)
    world = _make_world(config, rng)
    history = np.full((config.num_users, HISTORY), -1, dtype=np.int64)  # item numbers, newest last; -1 = none
    steps = config.num_days * STEPS_PER_DAY
    bounds = np.linspace(0, config.num_samples, steps + 1).astype(np.int64)
    paths: list[Path] = []
    for day in range(config.num_days):
        parts = []
        for step in range(day * STEPS_PER_DAY, (day + 1) * STEPS_PER_DAY):
            part, clicked_users, clicked_items = _step(
                config, world, history, step, int(bounds[step + 1] - bounds[step]), rng
            )
            _push(history, clicked_users, clicked_items)
            parts.append(part)
        path = folder / f"day-{day:02d}.parquet"
        pq.write_table(pa.concat_tables(parts), path, row_group_size=config.row_group_rows)
        paths.append(path)
    return paths


def _make_world(config: ClickLogConfig, rng: np.random.Generator) -> _World:
    category_style = rng.normal(size=(NUM_CATEGORIES, TASTE_DIM))
    category = rng.integers(0, NUM_CATEGORIES, config.num_items)
    brand = rng.integers(0, NUM_BRANDS, config.num_items)
    style = 0.8 * category_style[category] + 0.45 * rng.normal(size=(config.num_items, TASTE_DIM))
    word_weight = rng.normal(size=NUM_WORDS) * 0.42
    words = rng.integers(0, NUM_WORDS, size=(config.num_items, WORDS_PER_TITLE))
    brand_quality = rng.normal(size=NUM_BRANDS) * 0.35
    from_words = word_weight[words].sum(1)
    quality = brand_quality[brand] + 0.25 * rng.normal(size=config.num_items)
    quality += from_words if config.text else 0.7 * rng.normal(size=config.num_items)
    titles = None
    if config.text:
        syllables = ("ba", "co", "di", "fu", "ga", "he", "jo", "ki", "la", "me", "no", "pi", "ra", "so", "tu", "va")
        vocabulary = ["".join(syllables[(w // 16**k) % 16] for k in range(3)) for w in range(NUM_WORDS)]
        titles = np.array(
            [" ".join(["cat" + str(c), *(vocabulary[w] for w in row)]) for c, row in zip(category, words, strict=True)]
        )
    return _World(
        taste=rng.normal(size=(config.num_users, TASTE_DIM)) / np.sqrt(TASTE_DIM),
        budget=rng.normal(3.0, 0.6, config.num_users),
        user_id=_ids(rng, config.num_users),
        user_born=_born(config.num_users, config.num_days),
        style=style,
        quality=quality,
        category=category,
        brand=brand,
        log_price=rng.normal(3.0, 0.8, config.num_items),
        item_id=_ids(rng, config.num_items),
        item_born=_born(config.num_items, config.num_days),
        titles=titles,
    )


def _ids(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(np.iinfo(np.int64).min, np.iinfo(np.int64).max, count, dtype=np.int64, endpoint=True)


def _born(count: int, num_days: int) -> np.ndarray:
    """Return birth times in days: the first third exists before the log begins, the rest arrives evenly."""
    old = count // 3
    return np.concatenate([np.full(old, -30.0), np.linspace(0, num_days, count - old, endpoint=False)])


def _zipf(rng: np.random.Generator, alive: np.ndarray, exponent: float, count: int) -> np.ndarray:
    """Draw `count` of the alive numbers; a fixed shuffle decides who is popular, so newcomers can be hits too."""
    order = (alive * 2_654_435_761 % 4_294_967_291).argsort(kind="stable")
    weights = 1.0 / (np.arange(len(alive)) + 10.0) ** exponent
    return alive[order[rng.choice(len(alive), size=count, p=weights / weights.sum())]]


def _step(
    config: ClickLogConfig, world: _World, history: np.ndarray, step: int, count: int, rng: np.random.Generator
) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    now = step / STEPS_PER_DAY
    user = _zipf(rng, np.flatnonzero(world.user_born <= now), 0.8, count)
    item = _zipf(rng, np.flatnonzero(world.item_born <= now), 0.9, count)
    device = rng.integers(0, len(DEVICES), count)
    time_ms = np.sort(rng.integers(0, DAY_MS // STEPS_PER_DAY, count)) + FIRST_MS + int(now * DAY_MS)
    hour = (time_ms // 3_600_000) % 24
    past = history[user]
    past_category = np.where(past >= 0, world.category[past], -1)
    category = world.category[item]
    match = (past_category == category[:, None]).sum(1).clip(max=3) / 3.0
    age_days = now - world.item_born[item]
    logit = (
        BIAS
        + world.quality[item]
        + 0.6 * (world.taste[user] * world.style[item]).sum(1)
        + 1.2 * match
        - 0.4 * np.abs(world.log_price[item] - world.budget[user])
        + 0.25 * (age_days < NEW_ITEM_DAYS)
        + 0.3 * (hour >= 18) * (device == 0)
    )
    probability = 1.0 / (1.0 + np.exp(-logit))
    click = rng.random(count) < probability
    lengths = (past >= 0).sum(1)
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    columns = {
        "day": np.full(count, step // STEPS_PER_DAY, dtype=np.int32),
        "time_ms": time_ms,
        "user_id": world.user_id[user],
        "item_id": world.item_id[item],
        "category": category,
        "brand": pa.array([f"brand-{b}" for b in world.brand[item]]),
        "device": pa.array(np.array(DEVICES)[device]),
        "hour": hour,
        "price": np.exp(world.log_price[item]).astype(np.float32),
        "item_age_days": age_days.astype(np.float32),
        "history_items": pa.ListArray.from_arrays(pa.array(offsets), pa.array(world.item_id[past[past >= 0]])),
        "history_categories": pa.ListArray.from_arrays(pa.array(offsets), pa.array(past_category[past >= 0])),
        "click": click.astype(np.int8),
        "true_probability": probability,
    }
    if world.titles is not None:
        columns["title"] = pa.array(world.titles[item])
    return pa.table(columns), user[click], item[click]


def _push(history: np.ndarray, users: np.ndarray, items: np.ndarray) -> None:
    """Append each click to its user's history, oldest out; a user with k clicks in the step shifts by k."""
    for user, item in zip(users.tolist(), items.tolist(), strict=True):
        row = history[user]
        row[:-1] = row[1:]
        row[-1] = item
