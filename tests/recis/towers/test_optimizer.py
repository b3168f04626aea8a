"""ByPart: each part moves by its own rule, rate, schedule and accumulation, and goes on exactly after a checkpoint."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from recis.errors import ConfigError
from recis.optim.schedule import Linear, build_schedule
from recis.towers.optimizer import ByPart, Part, set_lr_scale, set_part
from recis.trainer.config import DenseAdagrad, DenseAdamW, DenseSgd


def model() -> nn.ModuleDict:
    made = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in ("ranker", "text", "head")})
    for layer in made.values():
        nn.init.zeros_(layer.get_parameter("weight"))
    set_part(made["text"], "text")
    set_part(made["head"], "text")
    set_lr_scale(made["head"], 0.5)
    return made


def give_gradients(made: nn.ModuleDict, **by_name: float) -> None:
    for name, value in by_name.items():
        made[name].get_parameter("weight").grad = torch.tensor([[value]])


def weights(made: nn.ModuleDict) -> list[float]:
    return [round(float(layer.get_parameter("weight").detach()), 6) for layer in made.values()]


def test_rates_marks_schedules_and_accumulation_by_hand():
    made = model()
    text = Part(name="text", optimizer=DenseSgd(lr=1.0), schedule=Linear(total_steps=4), every_steps=2)
    optimizer = ByPart(rest=DenseSgd(lr=0.1), parts=(text,)).build(made.parameters())
    give_gradients(made, ranker=1.0, text=1.0, head=2.0)
    optimizer.step()
    assert weights(made) == [-0.1, 0.0, 0.0]  # the tower waits for its second step
    give_gradients(made, ranker=1.0, text=3.0, head=2.0)
    optimizer.step()  # factor 1 - 2/4; text: mean 2 * .5;  head: mean 2 * .5 * mark .5
    assert weights(made) == [-0.2, -1.0, -0.5]


def test_the_schedule_of_the_run_reaches_every_part():
    made = model()
    optimizer = ByPart(rest=DenseSgd(lr=0.1), parts=(Part(name="text", optimizer=DenseSgd(lr=1.0)),)).build(
        made.parameters()
    )
    schedule = build_schedule(Linear(total_steps=2, final=0.5), (optimizer,))
    for _ in range(2):
        give_gradients(made, ranker=1.0, text=1.0, head=1.0)
        optimizer.step()
        schedule.step()
    assert weights(made) == [-0.125, -1.25, -0.625]  # factors .75 and .5


@pytest.mark.parametrize("rule", [DenseAdamW(lr=0.1), DenseAdagrad(lr=0.1), DenseSgd(lr=0.1, momentum=0.9)], ids=repr)
def test_a_scale_holds_for_every_rule(rule):
    made = model()
    optimizer = ByPart(rest=rule).build(made.parameters())
    for _ in range(3):
        give_gradients(made, ranker=1.0, text=1.0, head=1.0)
        optimizer.step()
    full, _, half = weights(made)
    assert full < 0
    assert half == pytest.approx(full / 2, abs=2e-6)


@pytest.mark.parametrize("rule", [DenseAdamW(lr=0.1), DenseAdagrad(lr=0.1), DenseSgd(lr=0.1, momentum=0.9)], ids=repr)
def test_a_saved_state_goes_on_as_if_nothing_had_happened(rule):
    config = ByPart(rest=DenseAdamW(lr=0.01), parts=(Part(name="text", optimizer=rule, every_steps=3),))
    straight = model()
    optimizer = config.build(straight.parameters())
    kept = None
    for step in range(8):
        if step == 4:  # between two updates of the tower
            kept = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
        give_gradients(straight, ranker=1.0 + step, text=2.0 - step, head=0.5 * step)
        optimizer.step()
    assert kept is not None
    resumed = model()
    again = config.build(resumed.parameters())
    resumed.load_state_dict(kept[0])
    again.load_state_dict(kept[1])
    for step in range(4, 8):
        give_gradients(resumed, ranker=1.0 + step, text=2.0 - step, head=0.5 * step)
        again.step()
    assert weights(resumed) == weights(straight)
    assert again.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


@settings(max_examples=25, deadline=None)
@given(
    every=st.integers(1, 4),
    num_steps=st.integers(1, 9),
    saves=st.sets(st.integers(0, 8), max_size=3),
    missing=st.sets(st.integers(0, 8), max_size=3),
)
def test_any_saves_at_any_steps_change_nothing(every, num_steps, saves, missing):
    """A tower without a gradient in some steps (nothing of it in the batch), saved and loaded at any steps of the way."""
    config = ByPart(
        rest=DenseSgd(lr=0.1, momentum=0.5),
        parts=(Part(name="text", optimizer=DenseAdamW(lr=0.1), schedule=Linear(total_steps=12), every_steps=every),),
    )
    ends = []
    for at in (set(), saves):
        made = model()
        optimizer = config.build(made.parameters())
        for step in range(num_steps):
            if step in at:
                kept = copy.deepcopy((made.state_dict(), optimizer.state_dict()))
                made = model()
                optimizer = config.build(made.parameters())
                made.load_state_dict(kept[0])
                optimizer.load_state_dict(kept[1])
            optimizer.zero_grad()
            give_gradients(made, ranker=1.0 + step)
            if step not in missing:
                give_gradients(made, text=step - 3.0, head=0.5)
            optimizer.step()
        ends.append(weights(made))
    assert ends[0] == ends[1]


def test_bad_settings():
    with pytest.raises(ConfigError, match=r"no trained parameter belongs to part 'txt'; did you mean 'text'"):
        ByPart(parts=(Part(name="txt", optimizer=DenseSgd()),)).build(model().parameters())
    with pytest.raises(ConfigError, match="each part has one optimizer"):
        ByPart(parts=(Part(name="text", optimizer=DenseSgd()),) * 2)
    with pytest.raises(ConfigError, match="every_steps must be at least 1; got 0"):
        Part(name="text", optimizer=DenseSgd(), every_steps=0)
    with pytest.raises(ConfigError, match="nothing to train"):
        ByPart().build([])
