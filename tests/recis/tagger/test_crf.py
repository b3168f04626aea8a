"""The CRF against all paths, one by one."""

import itertools

import pytest
import torch

from recis.tagger.crf import FORBIDDEN, LinearChainCRF, bio_tags, is_broken

TAGS = bio_tags(("a", "b"))


def random_crf(seed: int = 0) -> LinearChainCRF:
    torch.manual_seed(seed)
    crf = LinearChainCRF(TAGS).double()
    for parameter in crf.parameters():
        torch.nn.init.normal_(parameter)
    return crf


def all_paths(crf, emissions):
    """Every path that BIO allows, with its score; emissions [T, K]."""
    found = {}
    for path in itertools.product(range(len(TAGS)), repeat=len(emissions)):
        if any(is_broken(TAGS[a], TAGS[b]) for a, b in itertools.pairwise((0, *path))):
            continue
        score = crf.start[path[0]] + crf.end[path[-1]] + sum(emissions[t, tag] for t, tag in enumerate(path))
        found[path] = float((score + sum(crf.transition[a, b] for a, b in itertools.pairwise(path))).detach())
    return found


@pytest.mark.parametrize("lengths", [(1,), (4,), (3, 1, 4)])
def test_sum_best_path_and_marginals_over_all_paths(lengths):
    crf = random_crf()
    emissions = torch.randn(len(lengths), max(lengths), len(TAGS), dtype=torch.float64)
    sizes = torch.tensor(lengths)
    norms, best, sure = (
        crf.log_norm(emissions, sizes),
        crf.best_paths(emissions, sizes),
        crf.marginals(emissions, sizes),
    )
    for row, length in enumerate(lengths):
        paths = all_paths(crf, emissions[row, :length])
        scores = torch.tensor(list(paths.values()), dtype=torch.float64)
        assert float(norms[row]) == pytest.approx(float(scores.logsumexp(0)), rel=1e-5)
        assert tuple(best[row]) == max(paths, key=paths.__getitem__)
        weights = scores.softmax(0)
        for step, tag in itertools.product(range(length), range(len(TAGS))):
            share = sum(float(w) for w, path in zip(weights, paths, strict=True) if path[step] == tag)
            assert float(sure[row, step, tag]) == pytest.approx(share, abs=1e-5)
        assert not sure[row, length:].any()


def test_loss_is_minus_the_log_probability_of_the_allowed_paths():
    crf = random_crf(1)
    emissions = torch.randn(1, 3, len(TAGS), dtype=torch.float64)
    allowed = torch.zeros(1, 3, len(TAGS), dtype=torch.bool)
    allowed[0, 0, 1] = True  # B-a
    allowed[0, 1] = True  # unknown
    allowed[0, 2, :2] = True  # O or B-a
    paths = all_paths(crf, emissions[0])
    kept = [score for path, score in paths.items() if path[0] == 1 and path[2] in (0, 1)]
    total = torch.tensor(list(paths.values())).logsumexp(0) - torch.tensor(kept).logsumexp(0)
    assert float(crf.loss(emissions, torch.tensor([3]), allowed)) == pytest.approx(float(total), rel=1e-5)


def test_all_tags_allowed_costs_nothing_and_pulls_nowhere():
    crf = random_crf(2)
    emissions = torch.randn(2, 3, len(TAGS), dtype=torch.float64, requires_grad=True)
    loss = crf.loss(emissions, torch.tensor([3, 2]), torch.ones(2, 3, len(TAGS), dtype=torch.bool)).sum()
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert emissions.grad is not None
    assert float(emissions.grad.abs().max()) < 1e-6


def test_soft_labels_weigh_every_path():
    crf = random_crf(4)
    emissions, soft = torch.randn(1, 3, len(TAGS)), -torch.rand(1, 3, len(TAGS)) * 3
    paths = all_paths(crf, emissions[0])
    weighed = [score + sum(float(soft[0, t, tag]) for t, tag in enumerate(path)) for path, score in paths.items()]
    total = torch.tensor(list(paths.values())).logsumexp(0) - torch.tensor(weighed).logsumexp(0)
    assert float(crf.loss(emissions, torch.tensor([3]), soft)) == pytest.approx(float(total), rel=1e-5)
    hard = torch.rand(1, 3, len(TAGS)) < 0.5
    hard[..., 0] = True
    as_soft = torch.where(hard, 0.0, FORBIDDEN)
    lengths = torch.tensor([3])
    assert float(crf.loss(emissions, lengths, hard)) == pytest.approx(float(crf.loss(emissions, lengths, as_soft)))


def test_gradients_agree_with_differences():
    crf = random_crf(3)
    emissions = torch.randn(1, 3, len(TAGS), dtype=torch.float64)
    allowed = torch.zeros_like(emissions, dtype=torch.bool)
    allowed[0, torch.arange(3), torch.tensor([1, 2, 0])] = True
    for parameter in crf.parameters():
        crf.zero_grad()
        crf.loss(emissions, torch.tensor([3]), allowed).sum().backward()
        assert parameter.grad is not None
        flat, grads = parameter.data.view(-1), parameter.grad.view(-1)
        for place in range(len(flat)):
            step = 1e-2
            flat[place] += step
            above = float(crf.loss(emissions, torch.tensor([3]), allowed).detach())
            flat[place] -= 2 * step
            below = float(crf.loss(emissions, torch.tensor([3]), allowed).detach())
            flat[place] += step
            assert float(grads[place]) == pytest.approx((above - below) / (2 * step), abs=2e-3)


@pytest.mark.parametrize(
    ("before", "after", "broken"),
    [
        ("O", "I-a", True),
        ("B-a", "I-a", False),
        ("I-a", "I-a", False),
        ("B-b", "I-a", True),
        ("B-b", "B-a", False),
        ("I-a", "O", False),
    ],
)
def test_which_tags_may_not_follow(before, after, broken):
    assert is_broken(before, after) == broken
