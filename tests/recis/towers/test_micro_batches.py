"""Passes over a batch: the same rows as one pass, each distinct text once, no more activations than one pass has."""

import pytest
import torch

from recis.jagged import JaggedTensor
from recis.towers.micro_batches import FEW_ROWS, MAX_WASTE, ROW_STEP, WIDTH_STEP, distinct_rows, in_passes
from recis.towers.text import TextTowerConfig

TEXTS = ["w1 w2 w3", "w9", "", "w9", "w4 w4 w5 w6 w7 w8", "w1 w2 w3"]


def test_distinct_rows_by_hand():
    ids = torch.tensor([[4, 5, 9], [4, 5, 7], [4, 5, 9], [8, 0, 0]])
    rows, place = distinct_rows(ids, torch.tensor([2, 2, 3, 1]))  # what stands behind a length is not looked at
    assert rows[place].tolist() == [0, 0, 2, 3]


def test_passes_stay_within_the_limit_and_run_each_text_once():
    seen = []

    def run(ids, lengths):
        seen.append(tuple(ids.shape))
        return ids.sum(1, keepdim=True).float()

    lengths = torch.tensor([3, 1, 3, 2, 1, 5])
    ids = torch.arange(6)[:, None] * (torch.arange(5) < lengths[:, None])
    ids[2] = ids[0]
    out = in_passes(run, ids, lengths, max_tokens=6, recompute=False)
    assert out[:, 0].tolist() == ids.sum(1).tolist()
    assert sum(rows for rows, _ in seen) == 5
    assert all(rows * places <= 6 for rows, places in seen)


def test_few_shapes_occur_and_filled_rows_change_nothing():
    """Over batches of any size the passes have few shapes, and the gradient is that of the texts alone."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(50, 3, generator=generator, requires_grad=True)
    shapes = set()

    def run(ids, lengths):
        inside = torch.arange(ids.shape[1]) < lengths[:, None]
        return (table[ids] * inside[:, :, None]).sum(1).square()

    def noted(ids, lengths):
        shapes.add(tuple(ids.shape))
        return run(ids, lengths)

    def gradients(out, upstream):
        return out.detach(), *torch.autograd.grad(out, [table], upstream)

    for num in range(300, 700, 25):
        lengths = torch.randint(1, 13, (num,), generator=generator)
        ids = torch.randint(1, 50, (num, 12), generator=generator)
        upstream = torch.randn(num, 3, generator=generator)
        got = gradients(in_passes(noted, ids, lengths, max_tokens=4096, recompute=num % 2 == 0), upstream)
        torch.testing.assert_close(got, gradients(run(ids, lengths), upstream), rtol=1e-4, atol=1e-4)
    assert all(width % WIDTH_STEP == 0 for _, width in shapes)
    assert all(rows % (ROW_STEP if rows > ROW_STEP else FEW_ROWS) == 0 or rows <= FEW_ROWS for rows, _ in shapes)
    assert len(shapes) <= 20


def test_texts_of_unlike_length_do_not_share_a_pass():
    places = []

    def run(ids, lengths):
        places.append(ids.numel())
        return ids.sum(1, keepdim=True).float()

    lengths = torch.tensor([4] * 256 + [8] * 512 + [16] * 64)
    ids = torch.arange(1, len(lengths) + 1)[:, None] * (torch.arange(16) < lengths[:, None])
    assert in_passes(run, ids, lengths, max_tokens=100_000, recompute=False)[:, 0].equal(ids.sum(1).float())
    assert int(lengths.sum()) >= (1 - MAX_WASTE) * sum(places)


@pytest.mark.parametrize("limit", [1, 8, 1000])
def test_output_and_gradients_are_those_of_one_pass(bert_folder, limit):
    results = []
    for tokens in (None, limit):
        tower = TextTowerConfig(
            name="t", column="t", path=str(bert_folder), frozen_layers=0, out_width=2, micro_batch_tokens=tokens
        ).build()
        out = tower.project(tower.encode(tower.tokenize(TEXTS)))
        (out * torch.arange(12.0).view(6, 2)).sum().backward()
        results.append((out.detach(), {name: value.grad for name, value in tower.named_parameters()}))
    (want, want_grads), (got, got_grads) = results
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for name, value in want_grads.items():
        torch.testing.assert_close(got_grads[name], value, rtol=1e-4, atol=1e-4)


def test_activations_are_those_of_one_pass(bert_folder):
    """Bytes that autograd keeps between forward and backward do not grow with the number of texts."""
    tower = TextTowerConfig(name="t", column="t", path=str(bert_folder), frozen_layers=0, micro_batch_tokens=16).build()
    kept = []
    for num in (8, 64):
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        texts = [f"w{at % 40} w{at // 40} w{at % 7}" for at in range(num)]
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            tower.encode(tower.tokenize(texts))
        kept.append(total / num)
    whole = TextTowerConfig(name="t", column="t", path=str(bert_folder), frozen_layers=0).build()
    total = 0
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        whole.encode(JaggedTensor(torch.ones(64 * 5, dtype=torch.int64), torch.full((64,), 5)))
    assert max(kept) < 0.05 * total / 64  # a recomputed pass keeps its inputs, not the states of every layer
