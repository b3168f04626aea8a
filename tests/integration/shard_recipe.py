"""What tests of a dealt dense part train: job_recipe with a model that has everything a dealer can stumble over.

Units and parameters outside of them, rows that no number of ranks divides, a scalar, a frozen layer, a buffer, a tied weight,
a parameter that nothing reaches and one that only some samples reach. Probes write down what each rank holds and sees.
"""

import json
import pickle
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import job_recipe
import torch
from torch import Tensor, nn

from recis.models.inputs import PooledInputs
from recis.trainer import InitFrom, TrainConfig, Trainer

UNIT = 60  # parameters: `first`, the blocks, `frozen` and `small` are units; `back`, `again`, `last` and loose ones are not


class Net(nn.Module):
    """forward(batch) -> logits [B, 1]."""

    def __init__(self, tables: Any, dense: Any) -> None:
        super().__init__()
        self.inputs = PooledInputs(tables, dense, seed=5)
        width = self.inputs.num_fields * self.inputs.field_dim() + 1
        self.first = nn.Sequential(nn.Linear(width, 13), nn.LayerNorm(13), nn.ReLU(), nn.Dropout(0.2))
        self.register_buffer("scale", torch.full((13,), 1.1))
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(13, 13), nn.ReLU()) for _ in range(2)])
        self.frozen = nn.Linear(13, 13)
        self.frozen.requires_grad_(False)
        self.small = nn.Linear(13, 7)
        self.back = nn.Linear(7, 13)
        self.back.weight = nn.Parameter(torch.randn(13, 7) * 0.1)
        self.again = nn.Linear(7, 13)
        self.again.weight = self.back.weight
        self.last = nn.Linear(13, 1)
        self.gain = nn.Parameter(torch.ones(()))
        self.rare = nn.Parameter(torch.ones(3))
        self.unused = nn.Parameter(torch.ones(5, 2))

    def forward(self, batch: Any) -> Tensor:
        dense = self.inputs.dense(batch)
        hidden = self.first(torch.cat([self.inputs.fields(batch).flatten(1), dense], dim=1))
        hidden = hidden * self.scale
        for block in self.blocks:
            hidden = hidden + block(hidden)
        hidden = hidden + self.frozen(hidden)
        narrow = self.small(hidden)
        hidden = hidden + self.back(narrow) + self.again(narrow)
        logits = self.last(hidden) * self.gain
        if bool((dense[:1] > 0.8).any()):  # one sample of five: some ranks of a step have one at the front
            logits = logits * self.rare.mean()
        return logits


@dataclass(frozen=True, kw_only=True)
class BuildNet:
    """The model over the tables of job_recipe."""

    tables: Any
    dense: Any

    def build(self) -> nn.Module:
        return Net(self.tables, self.dense)


@dataclass(frozen=True)
class Sees:
    """A hook of rank 0 that reads whole weights after every step."""

    folder: str
    rank_0_only = True
    reads_weights = True

    def on_step_end(self, state: Any) -> None:
        assert state.model is not None
        norms = {name: float(value.detach().norm()) for name, value in state.model.named_parameters()}
        with (Path(self.folder) / "norms.jsonl").open("a") as file:
            file.write(json.dumps(norms) + "\n")


def evaluate(trainer: Trainer) -> dict[str, float]:
    """Return the norm of a unit's weights, which a rank alone reads, and of what it computes."""
    model: Any = trainer.model
    assert vars(type(model)) == vars(Net)  # not the class that torch has put over it
    return {
        "first": float(model.first[0].weight.detach().norm()),
        "run": float(model.blocks[0](torch.ones(1, 13)).detach().norm()),
    }


def write_down(trainer: Trainer, out: Path | None, *, probe: str) -> None:
    """Write down what this rank holds, and that rank 0 alone can use the model."""
    folder = Path(probe)
    model: Any = trainer.model
    optimizer = trainer.dense_optimizer.state
    held = {
        name: {
            "own": value.numel() * value.element_size(),
            "state": sum(v.numel() * v.element_size() for v in optimizer.get(value, {}).values() if v.ndim),
            "seen": model.get_parameter(name).numel() * 4,
            "shape": list(model.get_parameter(name).shape),
        }
        for name, value in trainer.dense_parameters.items()
    }
    (folder / f"held-{trainer.ranks.rank}.json").write_text(json.dumps(held))
    if out is not None:  # rank 0 alone
        copied = pickle.loads(pickle.dumps(model.blocks))
        assert torch.equal(copied[1](torch.ones(2, 13)), model.blocks[1](torch.ones(2, 13)))
        torch.save(dict(model.state_dict()), folder / "model.pt")


def recipe(
    *,
    data: str | None,
    out: Path,
    probe: str = "",
    init: str = "",
    faults: str = "",
) -> TrainConfig:
    """Return the run; `probe` is a folder for what ranks write down, `init` a checkpoint to start from."""
    config = job_recipe.recipe(data=data, out=out, deterministic=False, faults=faults)
    base: Any = config.model
    return replace(
        config,
        model=BuildNet(tables=base.tables, dense=base.dense),
        evaluate=evaluate,
        eval_every_steps=3,
        after=partial(write_down, probe=probe) if probe else None,
        hooks=(*config.hooks, Sees(probe)) if probe else config.hooks,
        init_from=InitFrom(paths=(init,)) if init else None,
        parallel=replace(config.parallel, shard_dense=True, unit_parameters=UNIT),
    )
