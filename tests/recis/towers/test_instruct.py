"""The instruction decoder: the loss by hand against logits, side features, writing, and a fit that writes what it learned."""

import math

import pytest
import torch

from recis.embedding import TableConfig
from recis.errors import ConfigError
from recis.io.batch import Batch
from recis.jagged import JaggedTensor, KeyedJaggedTensor
from recis.optim import Adam, SparseOptimizer
from recis.towers.backbone import BackboneError
from recis.towers.instruct import InstructConfig, instruct_loss, joined, load_decoder

SIDE = TableConfig(name="entity", features=("entities",), embedding_dim=6, optimizer=Adam(lr=0.05))
SEP = 3


def batch_of(prompts, answers, entities) -> Batch:
    size = len(prompts)
    extras = {"prompt": JaggedTensor.from_lists(prompts), "answer": JaggedTensor.from_lists(answers)}
    return Batch(
        sparse=KeyedJaggedTensor.from_jagged({"entities": JaggedTensor.from_lists(entities)}, stride=size),
        dense=torch.zeros(size, 0), dense_keys=(), dense_widths=(), labels=torch.zeros(size, 0), label_mask=None,
        label_weights=None, weights=torch.ones(size), group_ids=None, extras=extras, num_samples=size,
    )  # fmt: skip


@pytest.fixture(params=["qwen3", "llama"])
def folder(request, tiny, tmp_path):
    getattr(tiny, request.param)().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_joined_by_hand():
    ids, lengths, first = joined(
        JaggedTensor.from_lists([[2, 9, 3], [2, 3]]), JaggedTensor.from_lists([[2, 7, 3], [2, 3]])
    )
    assert ids.tolist() == [[2, 9, 3, 7, 3], [2, 3, 3, 0, 0]]
    assert (lengths.tolist(), first.tolist()) == ([5, 3], [3, 2])
    plain = JaggedTensor.from_lists([[9], [8, 8]]), JaggedTensor.from_lists([[7, 6], []])
    ids, lengths, first = joined(*plain, skip=0, end=1)  # a tokenizer without special tokens of its own
    assert ids.tolist() == [[9, 7, 6, 1], [8, 8, 1, 0]]
    assert (lengths.tolist(), first.tolist()) == ([4, 3], [1, 2])


def test_the_loss_is_that_of_the_answers_tokens_alone(folder):
    model = InstructConfig(path=str(folder), side=SIDE).build().eval()
    batch = batch_of([[2, 9, 3], [2, 11, 12, 3]], [[2, 7, 8, 3], [2, 3]], [[], []])
    losses = model(batch)
    want = []
    for sequence, first in (([2, 9, 3, 7, 8, 3], 3), ([2, 11, 12, 3, 3], 4)):
        logits = model.base(input_ids=torch.tensor([sequence])).logits[0].log_softmax(-1)
        told = range(first, len(sequence))
        want.append(-sum(float(logits[at - 1, sequence[at]].detach()) for at in told) / len(told))
    assert losses.tolist() == pytest.approx(want, rel=1e-4)
    assert float(instruct_loss(losses, batch).detach()) == pytest.approx(sum(want), rel=1e-4)


def test_samples_of_any_length_have_the_loss_they_have_alone(folder):
    """Lengths that need several passes: losses and gradients are those of each sample by itself."""
    model = InstructConfig(path=str(folder), side=SIDE, trains_base=True).build()
    with torch.no_grad():
        for layer in model.adapters.layers:
            layer.get_parameter("gate").fill_(0.5)
    prompts = [[2, *range(9, 9 + length), 3] for length in (1, 30, 2, 12, 31, 1)]
    answers = [[2, *range(5, 5 + length), 3] for length in (3, 1, 0, 6, 2, 9)]
    entities = [[5, 6], [], [7], [5], [], [6, 7, 8]]
    weight = model.base.base_model.layers[0].self_attn.q_proj.weight
    model.train()
    model(batch_of(prompts, answers, entities))  # admits the rows
    together = model(batch_of(prompts, answers, entities))
    alone = torch.cat([model(batch_of([p], [a], [e])) for p, a, e in zip(prompts, answers, entities, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    pulls = torch.arange(1.0, 7.0)
    (want,), (got,) = (torch.autograd.grad(losses @ pulls, [weight]) for losses in (alone, together))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    assert model(batch_of([], [], [])).shape == (0,)


def test_side_features_enter_through_the_gates_and_only_where_a_sample_has_some(folder):
    model = InstructConfig(path=str(folder), side=SIDE).build().eval()
    with_side = batch_of([[2, 9, 3]] * 2, [[2, 7, 3]] * 2, [[5, 6], []])
    model.train()
    model(with_side).sum().backward()  # admits the rows; gates are closed: both losses equal
    model.eval()
    closed = model(with_side).tolist()
    assert closed[0] == closed[1]
    with torch.no_grad():
        for layer in model.adapters.layers:
            layer.get_parameter("gate").fill_(0.5)
    opened = model(with_side).tolist()
    assert opened[0] != opened[1]
    assert opened[1] == closed[1]


def test_it_learns_to_write_what_the_side_features_say(folder):
    """Two products with one prompt: only the entities tell which answer is right."""
    torch.manual_seed(0)
    model = InstructConfig(path=str(folder), side=SIDE, trains_base=True).build()
    batch = batch_of([[2, 9, 3]] * 2, [[2, 20, 21, 3], [2, 30, 3]], [[5], [6]])
    dense = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=2e-2)
    sparse = SparseOptimizer(model)
    for _ in range(120):
        model.train()
        dense.zero_grad()
        instruct_loss(model(batch), batch).backward()
        dense.step()
        sparse.step()
    model.eval()
    answers = model.write(batch, max_tokens=5)
    assert answers.tokens == [[20, 21], [30]]
    assert [len(row) for row in answers.log_probs] == [2, 1]
    assert all(math.log(0.5) < value <= 0 for row in answers.log_probs for value in row)


def test_prompts_of_any_length_are_written_as_alone(folder):
    model = InstructConfig(path=str(folder), side=SIDE).build().eval()
    prompts = [[2, 9, 3], [2, 11, 12, 13, 14, 3], [2, 3]]
    together = model.write(batch_of(prompts, [[2, 3]] * 3, [[]] * 3), max_tokens=4)
    for number, prompt in enumerate(prompts):
        alone = model.write(batch_of([prompt], [[2, 3]], [[]]), max_tokens=4)
        assert alone.tokens[0] == together.tokens[number]
        assert alone.log_probs[0] == pytest.approx(together.log_probs[number], abs=1e-4)


def test_a_frozen_decoder_trains_adapters_and_lora_alone(folder):
    pytest.importorskip("peft")
    model = InstructConfig(path=str(folder), side=SIDE, lora_rank=2).build()
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained
    assert all(name.startswith("adapters.") or "lora_" in name for name in trained)
    assert not trained & model.frozen_state().names


def test_bad_settings(folder, tmp_path_factory):
    with pytest.raises(BackboneError, match=r"no config\.json here"):
        load_decoder(tmp_path_factory.mktemp("none"))
    with pytest.raises(ConfigError, match="LoRA is for a frozen decoder"):
        InstructConfig(path="x", side=SIDE, trains_base=True, lora_rank=4)
    model = InstructConfig(path=str(folder), side=SIDE, prompt="promt").build()
    with pytest.raises(ConfigError, match="no token ids 'promt'; did you mean 'prompt'"):
        model(batch_of([[2, 3]], [[2, 3]], [[]]))
