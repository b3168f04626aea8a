"""What two ranks check of a dealt model together, against a plain one in float64: the job behind test_dense_shards.

main([])    one line `ok NAME` per case on rank 0; an assertion that fails ends the job
"""

import pickle
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from recis.distributed.dense_shards import DenseShards
from recis.distributed.launch import joined
from recis.distributed.ranks import Ranks
from recis.errors import ConfigError

NUM_SAMPLES, MICRO_BATCHES, STEPS = 5, 2, 2


class Twice(nn.Module):
    """A unit that runs twice, units in a list, a tied weight, a frozen layer, a scalar, a hook, rows that W does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.some = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 3)])
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.up, self.down = nn.Linear(3, 7, bias=False), nn.Linear(3, 7, bias=False)
        self.down.weight = self.up.weight
        self.gain = nn.Parameter(torch.rand(()) + 1)
        self.of_rank_0, self.of_nobody = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 2))
        self.register_buffer("shift", torch.full((3,), 0.5))
        self.register_buffer("calls", torch.zeros(()))
        self.both.register_forward_hook(self._count)

    def _count(self, module: nn.Module, given: Any, out: Tensor) -> None:
        self.calls += 1

    def forward(self, x: Tensor, flag: bool) -> dict[str, Tensor]:
        x = self.both(self.both(x)) + self.shift
        for layer in self.some:
            x = layer(x)
        x = x + self.frozen(x)
        if flag:
            x = x * self.of_rank_0
        return {"up": self.up(x) * self.gain, "down": self.down(x)}


class Opaque(nn.Module):
    """What it returns is of a kind that torch cannot look into."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        class Box:
            inside = self.layer(x)

        return Box()


class Peeking(nn.Module):
    """It reads a unit's weight and does not call the unit."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rest = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(x) @ self.layer.weight


class Choosing(nn.Module):
    """Which of two units of one size runs is for the samples to say."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, x: Tensor, choice: int) -> Tensor:
        return self.units[choice](x)


def data(rank: int, step: int, micro_batch: int) -> Tensor:
    """Return the samples [NUM_SAMPLES, 3] of a rank's micro-batch."""
    seed = 100 * rank + 10 * step + micro_batch
    return torch.randn(NUM_SAMPLES, 3, generator=torch.Generator().manual_seed(seed))


def loss_of(out: dict[str, Tensor]) -> Tensor:
    """Return a sum over samples, as losses that are divided by the weight of the global batch are."""
    return (out["up"] * out["down"]).square().sum() / 10


def refused(work: Any) -> str:
    """Return the text of the ConfigError that `work` raises."""
    try:
        work()
    except ConfigError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def total_reached(shards: DenseShards, ranks: Ranks) -> Tensor:
    """Return which parameters any rank has reached."""
    return ranks.largest(shards.reached.double(), "reached") > 0


def of_model(ranks: Ranks) -> None:
    """Gradients, norms, states and whole weights of Twice over steps of two micro-batches."""
    torch.manual_seed(ranks.rank)  # the ranks' own first weights differ: rank 0's hold
    model, plain = Twice(), Twice()
    model.some[0].weight.mark = "kept"  # type: ignore[assignment]
    shards = DenseShards(model, ranks, unit_parameters=12)
    plain.load_state_dict(shards.gather(model.state_dict()))
    torch.manual_seed(0)
    first = Twice()
    assert all(torch.equal(value, plain.get_parameter(name)) for name, value in first.named_parameters())
    plain = plain.double()
    optimizer = torch.optim.AdamW(shards.parameters.values(), lr=0.01, weight_decay=0.1)
    reference = torch.optim.AdamW([v for v in plain.parameters() if v.requires_grad], lr=0.01, weight_decay=0.1)
    names = [name for name, value in plain.named_parameters() if value.requires_grad]
    assert list(shards.parameters) == names
    assert all(isinstance(value, DTensor) == (value.ndim > 0) for value in model.parameters())
    for step in range(STEPS):
        for micro_batch in range(MICRO_BATCHES):
            flag = ranks.rank == 0 and micro_batch == 0
            loss = loss_of(model(data(ranks.rank, step, micro_batch), flag))
            shards.before_backward(is_last=micro_batch == MICRO_BATCHES - 1)
            loss.backward()
            shards.take()
            for rank in range(ranks.world_size):
                flag = rank == 0 and micro_batch == 0
                loss_of(plain(data(rank, step, micro_batch).double(), flag)).backward()
        shards.sum_up(total_reached(shards, ranks))
        for (name, own), value in zip(shards.parameters.items(), reference.param_groups[0]["params"], strict=True):
            assert (own.grad is None) == (value.grad is None), name
            if value.grad is not None:
                want = value.grad if value.ndim == 0 else value.grad[rows(ranks, value.shape[0])]
                assert own.grad is not None
                torch.testing.assert_close(own.grad.double(), want, rtol=1e-5, atol=1e-6, msg=name)
        assert shards.parameters["of_nobody"].grad is None
        squares = torch.stack([v.grad.square().sum() for v in plain.parameters() if v.grad is not None]).sum()
        torch.testing.assert_close(shards.square_sum(), squares, rtol=1e-5, atol=0)
        optimizer.step()
        reference.step()
        shards.check_optimizer(optimizer)
        optimizer.zero_grad()
        plain.zero_grad()
    found = shards.gather(model.state_dict())
    for name, value in plain.state_dict().items():
        if name != "calls":
            torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6, msg=name)
    of_whole(ranks, model, shards, found)
    of_states(model, shards, optimizer, found)


def of_whole(ranks: Ranks, model: Twice, shards: DenseShards, found: dict[str, Tensor]) -> None:
    """Inside `whole` a model is as it was before it was dealt, outside it is dealt as before."""
    calls = float(model.calls)
    shards_before = list(model.parameters())
    with shards.whole():
        with shards.whole():
            assert type(model) is Twice
        assert type(model.both) is nn.Sequential
        assert not any(isinstance(value, DTensor) for value in model.parameters())
        assert model.down.weight is model.up.weight
        for value in (model.some[0].weight, shards.parameters["some.0.weight"]):
            assert vars(value)["mark"] == "kept"
        copied = pickle.loads(pickle.dumps(model))
        assert all(torch.equal(value, found[name]) for name, value in copied.state_dict().items() if name != "calls")
        if ranks.rank == 0:  # alone
            model(data(7, 0, 0), True)
            assert float(model.calls) == calls + 2
        assert {name for module in model.modules() for name in vars(module) if "fsdp" in name.lower()} == set()
        model.both.register_forward_pre_hook(_negated)
    assert all(old is new for old, new in zip(shards_before, model.parameters(), strict=True))
    first = model(data(7, 0, 0), True)["up"]
    torch.testing.assert_close(first, copied_with_hook(copied)(data(7, 0, 0), True)["up"])


def _negated(module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    return (-given[0],)


def copied_with_hook(copied: Twice) -> Twice:
    """Return a copy with the hook that was hung on the model while it was whole: it must still be there."""
    copied.both.register_forward_pre_hook(_negated)
    return copied


def of_states(model: Twice, shards: DenseShards, optimizer: Any, found: dict[str, Tensor]) -> None:
    """What is gathered and dealt again is what was there, and a load after a forward is seen by the next one."""
    from recis.trainer.build import load_named_optimizer_state, named_optimizer_state

    names = list(shards.parameters)
    whole = shards.gather_optimizer(named_optimizer_state(optimizer, names))
    assert whole["state"]["some.0.weight"]["exp_avg"].shape == (5, 3)
    assert whole["state"]["gain"]["exp_avg"].shape == ()
    other = torch.optim.AdamW(shards.parameters.values(), lr=0.5)
    load_named_optimizer_state(other, names, shards.own_optimizer(whole))
    again = shards.gather_optimizer(named_optimizer_state(other, names))
    for name, entries in whole["state"].items():
        assert all(torch.equal(value, again["state"][name][key]) for key, value in entries.items()), name
    assert shards.gather(model.state_dict(), keep=False) == {}
    model.eval()
    with torch.no_grad():
        before = model(data(3, 0, 0), False)["up"].clone()
        shards.scatter({name: 2 * value for name, value in found.items() if name == "up.weight"})
        torch.testing.assert_close(model(data(3, 0, 0), False)["up"], 2 * before)
    with shards.whole():
        shards.scatter(found)
    assert torch.equal(shards.gather(model.state_dict())["up.weight"], found["up.weight"])


def of_refusals(ranks: Ranks) -> None:
    """Models that cannot be dealt are refused, and the text says what would do."""
    opaque = DenseShards(box := Opaque(), ranks, unit_parameters=1000)

    def step() -> None:
        out = box(torch.ones(1, 2))
        opaque.before_backward(is_last=True)
        out.inside.sum().backward()
        opaque.sum_up(total_reached(opaque, ranks))

    said = refused(step)
    assert "no gradient of 'layer.weight' came out of backward" in said, said
    assert "let forward return tensors" in said
    peeking = DenseShards(model := Peeking(), ranks, unit_parameters=6)

    def forward() -> None:
        with peeking.explained():
            model(torch.ones(1, 2))

    said = refused(forward)
    assert "weights of one of its units ['layer', 'rest'] without calling it" in said, said
    assert "a larger parallel.unit_parameters makes it no unit" in said
    whole = DenseShards(again := Peeking(), ranks, unit_parameters=7)  # as it says
    with whole.explained():
        again(torch.ones(1, 2)).sum().backward()
    choosing = DenseShards(chooser := Choosing(), ranks, unit_parameters=6)
    chooser(torch.ones(1, 2), 0).sum().backward()
    choosing.check_order(ranks.all_gather(choosing.order, "orders").flatten())  # all ran the first one
    chooser(torch.ones(1, 2), min(ranks.rank, 1)).sum().backward()
    orders = ranks.all_gather(choosing.order, "orders").flatten()
    said = refused(lambda: choosing.check_order(orders))
    assert "rank 1 ran other units of the model than rank 0, or in another order" in said, said
    optimizer = torch.optim.SGD(whole.parameters.values(), lr=0.1)
    optimizer.state[whole.parameters["layer.weight"]]["rows"] = torch.zeros(1, 1)
    said = refused(lambda: whole.check_optimizer(optimizer))
    own = list(whole.parameters["layer.weight"].shape)
    assert f"the optimizer keeps 'rows' [1, 1] of 'layer.weight', of which this rank has {own}" in said, said


def rows(ranks: Ranks, count: int) -> slice:
    """Return which rows of a parameter [count, ...] a rank has, as torch.chunk cuts."""
    chunks = torch.arange(count).chunk(ranks.world_size)
    own = chunks[ranks.rank] if ranks.rank < len(chunks) else torch.arange(0)
    return slice(int(own[0]), int(own[-1]) + 1) if len(own) else slice(0, 0)


def main(argv: list[str]) -> int:
    """Run the cases on this rank."""
    with joined() as job:
        assert job is not None
        ranks = job.connect(60.0)
        for case in (of_model, of_refusals):
            case(ranks)
            if ranks.rank == 0:
                print(f"ok {case.__name__}")
    return 0
