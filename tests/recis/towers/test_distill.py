"""Distillation: the loss by hand, a made score file end to end, and every bad line named."""

import json
import math
from dataclasses import replace

import pytest
import torch

from recis.errors import ConfigError, DataError
from recis.io.batch import Batch
from recis.jagged import KeyedJaggedTensor
from recis.models.losses import binary_loss
from recis.towers.distill import Distilled, read_scores
from recis.trainer import TrainConfig, Trainer


def batch_of(teacher, labels=None) -> Batch:
    teacher = torch.as_tensor(teacher, dtype=torch.float32)
    size = len(teacher)
    return Batch(
        sparse=KeyedJaggedTensor.from_jagged({}, stride=size), dense=torch.eye(size), dense_keys=("x",),
        dense_widths=(size,), labels=torch.zeros(size, 1) if labels is None else labels, label_mask=None,
        label_weights=None, weights=torch.ones(size), group_ids=None, extras={"teacher": teacher}, num_samples=size,
    )  # fmt: skip


def test_by_hand():
    batch = replace(batch_of([0.5, math.nan]), weights=torch.tensor([2.0, 1.0]))
    logits = torch.tensor([[math.log(3.0)], [0.0]])  # p = .75 and .5, labels 0
    loss = Distilled(column="teacher", weight=0.25)(logits, batch)
    apart = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert float(loss) == pytest.approx(0.75 * 2 * math.log(4) + 0.25 * 2 * apart + math.log(2), rel=1e-6)
    assert float(Distilled(column="teacher", weight=0.0)(logits, batch)) == pytest.approx(
        float(binary_loss(logits, batch))
    )


def test_the_gradient_vanishes_at_the_teacher_and_keeps_its_size_over_temperature():
    logits = torch.tensor([[math.log(3.0)]], requires_grad=True)
    grads = []
    for temperature, teacher in ((1.0, 0.75), (1.0, 0.7), (8.0, 0.5 - 1e-3)):
        loss = Distilled(column="teacher", weight=1.0, temperature=temperature)(logits, batch_of([teacher]))
        grads.append(float(torch.autograd.grad(loss, logits)[0]))
    assert grads[0] == pytest.approx(0.0, abs=1e-6)
    assert grads[1] == pytest.approx(0.05, rel=1e-4)
    assert grads[2] == pytest.approx(8 * (1 / (1 + 3 ** (-1 / 8)) - 0.499), rel=1e-3)


def records(num=8):
    return [
        {"id": f"p{at}", "label": 3, "p": [0.1, 0.2, 0.3, 0.4] if at % 2 else [0.4, 0.5, 0.1, 0.0]} for at in range(num)
    ]


def write(path, lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_a_student_takes_up_a_score_file(tmp_path):
    scores = read_scores(write(tmp_path / "scores.jsonl", records()))
    assert scores["p1"] == pytest.approx(0.7)
    assert scores["p0"] == pytest.approx(0.1)
    ids = [f"p{at}" for at in range(10)]  # two that the teacher did not score
    batch = batch_of([scores.get(name, math.nan) for name in ids])

    class Source:
        def __iter__(self):
            yield from [batch] * 150

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    class Student(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(10, 1)

        def forward(self, given):
            return self.layer(given.dense)

    from recis.trainer import DenseAdamW

    trainer = Trainer(
        TrainConfig(name="student", model=Student, train_data=Source(), loss=Distilled(column="teacher", weight=1.0),
                    dense_optimizer=DenseAdamW(lr=0.1)), quiet=True)  # fmt: skip
    trainer.train()
    found = trainer.model(batch).sigmoid().flatten().tolist()
    assert found[:8] == pytest.approx([scores[name] for name in ids[:8]], abs=0.02)
    assert max(found[8:]) < 0.05  # no teacher: the label alone, which is 0


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{\n", "is no score record"),
        ({"id": "a"}, "is no score record"),
        ({"id": "a", "p": [0.5, 0.6]}, "probabilities that sum to 1"),
        ({"id": "a", "p": [1.5, -0.5]}, "probabilities that sum to 1"),
        ({"id": "a", "p": [1.0], "labl": 3}, "did you mean 'label'"),
    ],
)
def test_bad_lines(tmp_path, line, text):
    path = write(tmp_path / "scores.jsonl", [records(1)[0], line])
    with pytest.raises(DataError, match=text) as caught:
        read_scores(path)
    assert caught.value.row == 2


def test_bad_teachers(tmp_path):
    with pytest.raises(DataError, match="a pair is scored twice"):
        read_scores(write(tmp_path / "s.jsonl", records(1) * 2))
    with pytest.raises(ConfigError, match=r"from_grade must lie in \[1, 4\]"):
        read_scores(tmp_path / "s.jsonl", from_grade=5)
    with pytest.raises(ConfigError, match="no column 'techer'; did you mean 'teacher'"):
        Distilled(column="techer")(torch.zeros(1, 1), batch_of([0.5]))
    with pytest.raises(DataError, match=r"must lie in \[0, 1\]") as caught:
        Distilled(column="teacher")(torch.zeros(2, 1), batch_of([0.5, 1.5]))
    assert caught.value.row == 1
    with pytest.raises(ConfigError, match="weight must lie in"):
        Distilled(column="teacher", weight=1.5)
