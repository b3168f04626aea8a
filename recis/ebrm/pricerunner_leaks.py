"""Whether the PriceRunner task can be solved without reading both texts: baselines that must stay near chance.

item text alone       logistic regression, ROC-AUC at most .70     expected near .66
query text alone      logistic regression, at most .65             expected near .59
permuted titles       no model may be more than .03 above a logistic regression on query text and category equality
category equality     about .67: what is known once the category is
"""

from collections.abc import Mapping

import numpy as np

from recis.ebrm.baselines import query_category_logistic, text_logistic
from recis.ebrm.evaluate import roc_auc
from recis.ebrm.pricerunner import Part, Task
from recis.ebrm.pricerunner_text import noun_of

MAX_ITEM_AUC, MAX_QUERY_AUC, MAX_GAIN_PERMUTED = 0.70, 0.65, 0.03


def leak_aucs(task: Task, *, test: str = "test", max_train_queries: int = 2_000) -> Mapping[str, float]:
    """Return ROC-AUC on a part of models that see too little: item_text, query_text, category, query_and_category.

    Args:
        task: with a train part.
        test: part that is measured on.
        max_train_queries: the logistic regressions are fitted on pairs of so many train queries.

    Raises:
        ImportError: scikit-learn is not installed (the dev extra has it).
    """
    train, measured = task.parts["train"], task.parts[test]
    rows = train.pairs.query < max_train_queries
    fit_offers, fit_labels = train.pairs.offer[rows].tolist(), train.pairs.label[rows]
    fit_queries = [train.queries[number].text for number in train.pairs.query[rows].tolist()]
    offers, labels = measured.pairs.offer.tolist(), measured.pairs.label
    queries = [measured.queries[number].text for number in measured.pairs.query.tolist()]
    fit_equal, equal = same_category(task, train)[rows], same_category(task, measured)
    items = text_logistic(
        [task.item_text(offer) for offer in fit_offers], fit_labels, [task.item_text(offer) for offer in offers]
    )
    both = query_category_logistic((fit_queries, fit_equal, fit_labels), (queries, equal))
    return {
        "item_text": roc_auc(items, labels),
        "query_text": roc_auc(text_logistic(fit_queries, fit_labels, queries), labels),
        "category": roc_auc(equal, labels),
        "query_and_category": roc_auc(both, labels),
    }


def same_category(task: Task, part: Part) -> np.ndarray:
    """Return float64 [N], 1.0 where a pair's item has the category of the query's cluster."""
    offers = task.catalogue.offers
    pairs = zip(part.pairs.query.tolist(), part.pairs.offer.tolist(), strict=True)
    return np.array(
        [
            noun_of(task.catalogue.categories[offers[offer].cluster_id]) in part.queries[number].constraints["category"]
            for number, offer in pairs
        ],
        dtype=np.float64,
    )


def permuted_offers(task: Task, part: Part, *, seed: int = 0) -> np.ndarray:
    """Return the offers [N] of a part's pairs with titles permuted within their category: what a model is then scored on.

    Every offer takes the place of another one of its part and category. A model that stays good on these knows labels.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    offers = np.unique(part.pairs.offer)
    cluster_ids = [task.catalogue.offers[offer].cluster_id for offer in offers.tolist()]
    categories = np.array([task.catalogue.categories[cluster] for cluster in cluster_ids])
    stand_in = offers.copy()
    for category in np.unique(categories):
        members = np.flatnonzero(categories == category)
        stand_in[members] = offers[rng.permutation(members)]
    return stand_in[np.searchsorted(offers, part.pairs.offer)]
