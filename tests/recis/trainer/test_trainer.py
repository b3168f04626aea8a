"""The trainer: what a step is, when a run ends, evaluation, stopping, resuming, starting from another run, faults."""

import json
import math
import sys
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import nn

from recis.checkpoint import latest, list_checkpoints, read_manifest, verify
from recis.embedding import AfterSightings, TtlSteps
from recis.errors import CheckpointError, ConfigError
from recis.models.losses import binary_loss
from recis.optim.config import Sgd
from recis.optim.schedule import Linear
from recis.trainer import Trainer
from recis.trainer.config import DenseAdamW, DenseSgd, InitFrom, Monitor
from recis.trainer.log import read_log
from recis.trainer.trainer import NonFiniteLossError


def run(config, out=None, **more):
    trainer = Trainer(config, out, quiet=True, **more)
    return trainer, trainer.train()


def same_tensors(have, want):
    assert have.keys() == want.keys()
    for name in want:
        assert torch.equal(have[name], want[name]), name


def same_state(have, want):
    """Two trainers hold equal bytes in tables and dense tensors."""
    same_tensors(have.model.state_dict(), want.model.state_dict())
    for name, table in want.tables.items():
        same_tensors(have.tables[name].export(), table.export())


def same_files(have, want, *, but=("MANIFEST.json",)):
    """Two checkpoints hold equal bytes in every file, and equal manifests but for the clock."""
    names = sorted(path.name for path in want.iterdir())
    assert sorted(path.name for path in have.iterdir()) == names
    for name in names:
        if name not in but:
            assert (have / name).read_bytes() == (want / name).read_bytes(), name
    first, second = replace(read_manifest(have), clock_s=0), replace(read_manifest(want), clock_s=0)
    assert first == second


# ---- steps


def test_n_steps_are_n_updates(toy):
    trainer, _ = run(toy.config(train_data=toy.source(range(4), epochs=100), max_steps=7))
    assert trainer.state.step == 7
    assert trainer.state.samples == 7 * 16
    assert all(table.t == 7 for table in trainer.tables.values())


def test_the_data_ends_first(toy):
    trainer, _ = run(toy.config(max_steps=100))
    assert trainer.state.step == 10


def test_no_batch_is_taken_beyond_the_last_step(toy):
    source = toy.source(range(10))
    run(toy.config(train_data=source, max_steps=3))
    assert source.state_dict() == {"next": 3}


def test_learning_lowers_the_loss(toy):
    data = toy.source(range(20), size=64)
    trainer, _ = run(toy.config(train_data=toy.source(range(20), size=64, epochs=10)))
    trained = trainer.evaluate(data)
    fresh = Trainer(toy.config(), quiet=True).evaluate(data)
    assert trained["loss"] < 0.8 * fresh["loss"]
    assert trained["auc"] > 0.8


def one_row_model(toy):
    """A model whose gradient is the mean of the dense column: logits = w, loss = sum of x w."""

    class OneRow(nn.Module):
        def __init__(self):
            super().__init__()
            self.embeddings = toy.Config(tables=toy.tables(optimizer=Sgd(lr=1.0))).build().embeddings

        def forward(self, batch):
            return self.embeddings(batch.sparse)["user"][:, :1] * batch.dense[:, :1]

    return OneRow


def sum_of_outputs(output, batch):
    return (output[:, 0] * batch.weights).sum()


def test_micro_batches_by_hand(toy):
    """Conformance B19: 1 sample with gradient 6 and 3 with 2 each give 3, the mean of the four."""
    first = toy.batch_of([5], [[]], torch.tensor([[6.0]]), torch.zeros(1))
    second = toy.batch_of([5, 5, 5], [[]] * 3, torch.full((3, 1), 2.0), torch.zeros(3))
    config = toy.config(
        model=one_row_model(toy),
        loss=sum_of_outputs,
        metrics=(),
        train_data=toy.Source([first, second]),
        accumulate_steps=2,
    )
    trainer, _ = run(config)
    table = trainer.tables["user"]
    rows = table.export()
    assert rows["count"].tolist() == [4]
    assert table.t == 1
    assert trainer.state.step == 1

    whole = toy.batch_of([5] * 4, [[]] * 4, torch.tensor([[6.0], [2.0], [2.0], [2.0]]), torch.zeros(4))
    other, _ = run(replace(config, train_data=toy.Source([whole]), accumulate_steps=1))
    same_tensors(other.tables["user"].export(), rows)
    initial = initial_row(toy, 5)
    torch.testing.assert_close(initial - rows["weight"][0], torch.tensor([3.0, 0, 0, 0]), rtol=0, atol=1e-6)


def initial_row(toy, row_id):
    table = toy.Config().build().embeddings.table_set["user"]
    table.lookup(torch.tensor([row_id]), train=True, step=1)
    return table.export()["weight"][0]


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_equal_the_big_batch(toy, parts):
    whole = [toy.random_batch(seed, 16) for seed in range(6)]
    pieces = [piece for batch in whole for piece in split(toy, batch, parts)]
    tables = toy.tables(admission=AfterSightings(2), eviction=(TtlSteps(3),))
    config = toy.config(model=toy.Config(tables=tables), train_data=toy.Source(whole), clip_grad_norm=0.5)
    big, _ = run(config)
    small, _ = run(replace(config, train_data=toy.Source(pieces), accumulate_steps=parts))
    assert small.state.step == big.state.step == 6
    for name, table in big.tables.items():
        have, want = small.tables[name].export(), table.export()
        for field in ("ids", "last_seen", "count"):
            assert torch.equal(have[field], want[field])
        torch.testing.assert_close(have["weight"], want["weight"], rtol=1e-5, atol=1e-6)
        assert small.tables[name].counters() == table.counters()
    for name, value in big.model.state_dict().items():
        torch.testing.assert_close(small.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def split(toy, batch, parts):
    """Cut a toy batch into equal parts of its samples."""
    bags = [batch.sparse["user"].to_lists(), batch.sparse["item"].to_lists()]
    size = batch.num_samples // parts
    for start in range(0, batch.num_samples, size):
        cut = slice(start, start + size)
        users = [bag[0] for bag in bags[0][cut]]
        yield toy.batch_of(users, bags[1][cut], batch.dense[cut], batch.labels[cut])


def test_weights_scale_and_normalise(toy):
    """A sample of weight 2 equals the sample twice; weights are divided by their sum."""
    doubled = toy.batch_of([3, 3, 4], [[], [], [7]], torch.ones(3, 2), torch.tensor([1.0, 1.0, 0.0]))
    weighted = toy.batch_of(
        [3, 4], [[], [7]], torch.ones(2, 2), torch.tensor([1.0, 0.0]), weights=torch.tensor([2.0, 1])
    )
    first, _ = run(toy.config(train_data=toy.Source([doubled])))
    second, _ = run(toy.config(train_data=toy.Source([weighted])))
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value)


def test_empty_batches(toy):
    """Conformance B24: a batch without samples, alone and beside another."""
    empty = toy.batch_of([], [], torch.zeros(0, 2), torch.zeros(0))
    some = toy.random_batch(1, 8)
    alone, _ = run(toy.config(train_data=toy.Source([empty])))
    assert alone.state.step == 1
    assert all(table.size == 0 for table in alone.tables.values())
    assert all(torch.isfinite(value).all() for value in alone.model.state_dict().values())
    with_empty, _ = run(toy.config(train_data=toy.Source([empty, some]), accumulate_steps=2))
    without, _ = run(toy.config(train_data=toy.Source([some])))
    same_state(with_empty, without)


def test_masked_labels_do_not_count(toy):
    labels = torch.tensor([[1.0, 0.0], [0.0, math.nan], [1.0, math.nan]])
    mask = ~labels.isnan()
    batch = toy.batch_of([1, 2, 3], [[]] * 3, torch.zeros(3, 2), labels, label_mask=mask)
    config = toy.config(
        model=toy.Config(num_tasks=2),
        tasks=("click", "buy"),
        train_data=toy.Source([batch] * 3),
        eval_data=toy.Source([batch]),
    )
    _, metrics = run(config)
    assert math.isfinite(metrics["loss"])
    assert math.isfinite(metrics["click.auc"])
    assert math.isnan(metrics["buy.auc"])  # one class left


def test_clipping_bounds_the_update(toy):
    model = toy.Config(tables=toy.tables(optimizer=Sgd(lr=1.0)))
    config = toy.config(model=model, dense_optimizer=DenseSgd(lr=1.0), clip_grad_norm=1e-3, max_steps=1)
    clipped, _ = run(config)
    fresh = Trainer(config, quiet=True)
    moved = sum(
        float((a - b).square().sum())
        for a, b in zip(clipped.model.state_dict().values(), fresh.model.state_dict().values(), strict=True)
    )
    for batch in toy.source([0]):
        for name, table in fresh.tables.items():
            ids = batch.sparse[name].values
            table.lookup(ids, train=True, step=1)
            rows = clipped.tables[name].export()
            moved += float((rows["weight"] - table.export()["weight"]).square().sum())
    assert moved**0.5 == pytest.approx(1e-3, rel=1e-3)


def test_a_model_without_tables(toy):
    @dataclass(frozen=True)
    class Linear:
        def build(self):
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.linear = nn.Linear(2, 1)

                def forward(self, batch):
                    return self.linear(batch.dense)

            return Model()

    trainer, _ = run(toy.config(model=Linear()))
    assert trainer.collections == []
    assert trainer.state.step == 10


def test_model_as_a_function(toy):
    trainer, _ = run(toy.config(model=partial(toy.Model, toy.Config())))
    assert set(trainer.tables) == {"user", "item"}
    with pytest.raises(ConfigError, match=r"model must build an nn\.Module; got int"):
        Trainer(toy.config(model=lambda: 3))


def test_two_collections_with_one_table_name(toy):
    def twice():
        model = nn.Module()
        model.a, model.b = toy.Config().build(), toy.Config().build()
        return model

    with pytest.raises(ConfigError, match="two collections have a table 'user' each"):
        Trainer(toy.config(model=twice))


def test_autocast_keeps_rows_and_loss_in_float32(toy):
    seen = []

    def loss(output, batch):
        seen.append(output.dtype)
        return binary_loss(output, batch)

    exact, _ = run(toy.config())
    half, _ = run(toy.config(bf16_autocast=True, loss=loss))
    assert set(seen) == {torch.float32}
    assert half.tables["user"].export()["weight"].dtype == torch.float32
    name = "hidden.weight"
    assert not torch.equal(half.model.state_dict()[name], exact.model.state_dict()[name])
    torch.testing.assert_close(half.model.state_dict()[name], exact.model.state_dict()[name], rtol=0.1, atol=0.05)


def test_compiled_dense_part(toy, monkeypatch):
    """Traced by dynamo, run eagerly (the code generator of torch would take a minute): rows stay outside the graph."""
    exact, _ = run(toy.config(max_steps=3))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled, _ = run(toy.config(max_steps=3, compile_dense=True))
    same_state(compiled, exact)


# ---- evaluation, early stop, best


def test_evaluation_reads_from_the_start_and_changes_nothing(toy):
    trainer, _ = run(toy.config(eval_data=toy.source(range(100, 103))))
    before = {name: table.export() for name, table in trainer.tables.items()}
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first == second
    for name, rows in before.items():
        same_tensors(trainer.tables[name].export(), rows)


def test_evaluation_by_hand(toy):
    batch = toy.batch_of([1, 2], [[], []], torch.zeros(2, 2), torch.tensor([1.0, 0.0]), weights=torch.tensor([3.0, 1]))
    trainer = Trainer(toy.config(), quiet=True)
    (scores,) = trainer.predict(toy.Source([batch]))
    p = scores[:, 0].double()
    want = -(3 * p[0].log() + (1 - p[1]).log()) / 4
    got = trainer.evaluate(toy.Source([batch]))
    assert got["loss"] == pytest.approx(float(want), rel=1e-6)


def test_evaluation_is_due_every_n_steps_and_at_the_end(toy, tmp_path):
    config = toy.config(eval_data=toy.source([50]), eval_every_steps=4, evaluate=extra_metric)
    _, metrics = run(config, tmp_path)
    lines = [line for line in read_log(tmp_path / "metrics.jsonl") if line["kind"] == "eval"]
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert [line["double_step"] for line in lines] == [8, 16, 20]
    assert set(metrics) == {"loss", "auc", "double_step"}


def extra_metric(trainer):
    return {"double_step": 2.0 * trainer.state.step}


def scripted(values):
    """An evaluation that returns given values one after the other."""
    values = iter(values)
    return lambda trainer: {"score": next(values)}


def test_early_stop_and_best_checkpoint(toy, tmp_path):
    config = toy.config(
        evaluate=scripted([0.1, 0.5, 0.4, 0.3, 0.9]),
        eval_every_steps=1,
        monitor=Monitor(metric="score", patience_evals=2),
        keep_checkpoints=1,
        save_every_steps=1,
    )
    trainer, _ = run(config, tmp_path)
    assert trainer.state.step == 4
    assert trainer.state.stop_reason == "score has not beaten 0.5 of step 2 in 2 evaluations"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000000002", "step_000000004"]
    assert trainer.best_checkpoint() == tmp_path / "step_000000002"
    again, _ = run(config, tmp_path, resume=True)  # a stopped run stays stopped
    assert again.state.step == 4
    assert again.best_checkpoint() == tmp_path / "step_000000002"


def test_monitored_metric_that_does_not_exist(toy):
    with pytest.raises(ConfigError, match="no metric 'gauc' in the evaluation, which gives loss, auc"):
        run(toy.config(eval_data=toy.source([1]), monitor=Monitor(metric="gauc")))


def test_after_is_called_at_the_end(toy, tmp_path):
    calls = []
    run(toy.config(after=lambda trainer, out: calls.append((trainer.state.step, out))), tmp_path)
    assert calls == [(10, tmp_path)]


def test_hooks_see_the_run(toy, tmp_path):
    events = []

    class Recorder:
        def on_train_start(self, state):
            events.append(("start", state.step))

        def on_step_end(self, state):
            events.append(("step", state.step))
            if state.step == 3:
                state.stop_reason = "enough"

        def on_evaluate_end(self, state):
            events.append(("eval", state.step))

        def on_checkpoint(self, state):
            events.append(("checkpoint", state.checkpoint.name))

        def on_train_end(self, state):
            events.append(("end", state.step))

    config = toy.config(hooks=(Recorder(),), eval_data=toy.source([9]), eval_every_steps=2, async_save=False)
    run(replace(config, save_every_steps=2), tmp_path)
    assert events == [
        ("start", 0),
        ("step", 1),
        ("eval", 2),
        ("step", 2),
        ("checkpoint", "step_000000002"),
        ("step", 3),
        ("eval", 3),
        ("end", 3),
        ("checkpoint", "step_000000003"),
    ]


def test_predict_keeps_the_order(toy):
    trainer, _ = run(toy.config())
    batches = [toy.random_batch(seed, 8) for seed in (1, 2)]
    scores = torch.cat(list(trainer.predict(toy.Source(batches))))
    trainer.model.eval()
    with torch.no_grad():
        want = torch.cat([torch.sigmoid(trainer.model(batch)) for batch in batches])
    assert torch.equal(scores, want)


def test_a_run_that_a_hook_stopped_goes_on(toy, tmp_path):
    class Enough:
        def on_step_end(self, state):
            if state.step == 3:
                state.stop_reason = "enough for today"

    config = toy.config(hooks=(Enough(),))
    stopped, _ = run(config, tmp_path)
    assert stopped.state.step == 3
    resumed, _ = run(toy.config(hooks=(Enough(),)), tmp_path, resume=True)
    assert resumed.state.step == 10


def test_a_run_that_cannot_be_built_frees_its_folder(toy, tmp_path):
    with pytest.raises(ConfigError, match=r"must build an nn\.Module"):
        Trainer(toy.config(model=dict), tmp_path)
    with pytest.raises(ConfigError, match=r"must build an nn\.Module"):
        Trainer(toy.config(model=dict), tmp_path, resume=True)


# ---- the run folder


def test_run_folder(toy, tmp_path):
    run(toy.config(save_every_steps=4, keep_checkpoints=2), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".lock"))
    assert names == ["config.json", "metrics.jsonl", "step_000000008", "step_000000010"]
    assert verify(tmp_path) == []
    assert json.loads((tmp_path / "config.json").read_text())["name"] == "toy"
    lines = read_log(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [5, 10]
    assert lines[-1]["tables"]["user"]["size"] == 12


def test_a_second_run_into_the_same_folder(toy, tmp_path):
    run(toy.config(), tmp_path)
    with pytest.raises(ConfigError, match=r"not empty.*--resume"):
        Trainer(toy.config(), tmp_path)
    with pytest.raises(ConfigError, match=r"another config: dense_optimizer\.lr: 0\.01 -> 0\.5"):
        Trainer(toy.config(dense_optimizer=DenseAdamW(lr=0.5)), tmp_path, resume=True)


def busy_config(toy, **changes):
    tables = toy.tables(admission=AfterSightings(2), eviction=(TtlSteps(3),))
    settings = {
        "model": toy.Config(tables=tables, dropout=0.3),
        "train_data": toy.source(range(8), epochs=100),
        "eval_data": toy.source([99]),
        "max_steps": 20,
        "eval_every_steps": 6,
        "save_every_steps": 8,
        "monitor": Monitor(metric="auc"),
        "clip_grad_norm": 1.0,
        "schedule": Linear(warmup_steps=3, total_steps=20, final=0.1),
        "log_every_steps": 3,
    }
    return toy.config(**{**settings, **changes})


class Dies(Exception):
    pass


class DieAt:
    """Ends the process's part of a run at a step, as a kill would: nothing after it happens."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, state):
        if state.step == self.step:
            raise Dies


@pytest.mark.parametrize("delta_saves", [0, 1])
def test_evaluated_after_the_last_save(toy, tmp_path, delta_saves):
    """The data ends on a step that is saved already; the final evaluation must be in the checkpoint all the same."""
    config = toy.config(
        eval_data=toy.source([9]), save_every_steps=5, monitor=Monitor(metric="auc"), delta_saves=delta_saves
    )
    trainer, want = run(config, tmp_path)
    newest = latest(tmp_path)
    assert newest is not None
    assert newest.name == "step_000000010"
    assert verify(tmp_path) == []
    assert read_manifest(newest).trainer["run"]["best_step"] == 10
    again, got = run(config, tmp_path, resume=True)
    assert got == want
    assert again.state.best == trainer.state.best
    assert [line["kind"] for line in read_log(tmp_path / "metrics.jsonl")] == ["train", "train", "eval"]


@pytest.mark.parametrize("delta_saves", [0, 2])
@pytest.mark.parametrize("die_at", [1, 8, 11, 19])
def test_resumed_equals_straight(toy, tmp_path, die_at, delta_saves):
    """Conformance B21 inside one process (tests/integration kills real ones)."""
    changes = {"delta_saves": delta_saves, "save_every_steps": 4 if delta_saves else 8}
    straight, want = run(busy_config(toy, **changes), tmp_path / "straight")
    hurt = Trainer(busy_config(toy, **changes), tmp_path / "killed", quiet=True)
    hurt._hooks.insert(0, DieAt(die_at))
    with pytest.raises(Dies):
        hurt.train()
    resumed, got = run(busy_config(toy, **changes), tmp_path / "killed", resume=True)
    assert got == want
    same_state(resumed, straight)
    first, second = latest(tmp_path / "killed"), latest(tmp_path / "straight")
    assert first is not None
    assert second is not None
    same_files(first, second)
    lines = [
        [(line["kind"], line["step"], line["loss"]) for line in read_log(tmp_path / name / "metrics.jsonl")]
        for name in ("killed", "straight")
    ]
    assert lines[0] == lines[1]


def test_resume_falls_back_loudly(toy, tmp_path, caplog):
    straight, _ = run(busy_config(toy), tmp_path / "straight")
    run(busy_config(toy), tmp_path / "run")
    newest = latest(tmp_path / "run")
    assert newest is not None
    name = "dense-00000-of-00001.safetensors"
    content = bytearray((newest / name).read_bytes())
    content[-1] ^= 1
    (newest / name).write_bytes(content)
    resumed, _ = run(busy_config(toy), tmp_path / "run", resume=True)
    assert f"{newest.name} is skipped" in caplog.text
    assert name in caplog.text
    same_state(resumed, straight)
    same_files(newest, tmp_path / "straight" / newest.name)


def test_resume_of_a_finished_run_changes_nothing(toy, tmp_path):
    _, want = run(busy_config(toy), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    trainer, got = run(busy_config(toy), tmp_path, resume=True)
    assert trainer.state.step == 20
    assert got == want
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_deltas_between_full_checkpoints(toy, tmp_path):
    run(toy.config(save_every_steps=2, delta_saves=2, keep_checkpoints=9), tmp_path)
    kinds = [read_manifest(path).kind for path in list_checkpoints(tmp_path)]
    assert kinds == ["full", "delta", "delta", "full", "delta"]
    assert verify(tmp_path) == []


# ---- starting from another run


def test_init_from_a_run(toy, tmp_path):
    first, _ = run(toy.config(), tmp_path / "day1")
    config = toy.config(train_data=toy.source(range(50, 60)), init_from=InitFrom(paths=(str(tmp_path / "day1"),)))
    second = Trainer(config, quiet=True)
    same_tensors(second.model.state_dict(), first.model.state_dict())
    for name, table in first.tables.items():
        have, want = second.tables[name].export(), table.export()
        assert torch.equal(have["weight"], want["weight"])
        assert torch.equal(have["last_seen"], want["last_seen"] - 10)  # seen 10 - last_seen steps ago
        assert second.tables[name].t == 10
    second.train()
    assert second.state.step == 10
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        Trainer(toy.config(init_from=InitFrom(paths=(str(tmp_path / "nothing"),))), quiet=True)


def test_init_from_a_chain(toy, tmp_path):
    first, _ = run(toy.config(save_every_steps=5, delta_saves=1), tmp_path / "day1")
    full, delta = list_checkpoints(tmp_path / "day1")
    second = Trainer(toy.config(init_from=InitFrom(paths=(str(full), str(delta)))), quiet=True)
    for name, table in first.tables.items():
        assert torch.equal(second.tables[name].export()["weight"], table.export()["weight"])


def test_init_from_weights_of_one_table(toy, tmp_path):
    first, _ = run(toy.config(), tmp_path)
    init = InitFrom(paths=(str(tmp_path),), tables=(("user", "user"),), parts=("weights",))
    second = Trainer(toy.config(init_from=init), quiet=True)
    assert torch.equal(second.tables["user"].export()["weight"], first.tables["user"].export()["weight"])
    assert second.tables["user"].t == 0
    assert second.tables["item"].size == 0


def test_resume_wins_over_init_from(toy, tmp_path):
    run(toy.config(), tmp_path / "day1")
    config = toy.config(init_from=InitFrom(paths=(str(tmp_path / "day1"),)), max_steps=4)
    first, _ = run(config, tmp_path / "day2")
    config = toy.config(init_from=InitFrom(paths=(str(tmp_path / "day1"),)), max_steps=4)
    again, _ = run(config, tmp_path / "day2", resume=True)
    same_state(again, first)


# ---- faults


def test_a_loss_that_is_not_finite_stops_before_the_update(toy, tmp_path):
    bad = toy.batch_of([1, 2], [[], [3]], torch.tensor([[0.0, 0], [math.nan, 0]]), torch.tensor([1.0, 0]))
    good = [toy.random_batch(seed, 16) for seed in range(3)]
    config = toy.config(train_data=toy.Source([*good, bad]), save_every_steps=2, metrics=())
    trainer = Trainer(config, tmp_path, quiet=True)
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    text = str(error.value)
    assert "step 4: the loss is nan; not finite: x;" in text
    assert "step_000000002" in text
    other, _ = run(replace(config, train_data=toy.Source(good)))
    same_tensors(trainer.model.state_dict(), other.model.state_dict())
    assert trainer.state.step == 3


def test_rows_that_are_not_finite_are_named(toy):
    trainer = Trainer(toy.config(), quiet=True)
    trainer.tables["item"].insert(torch.tensor([3]), torch.full((1, 3), math.inf))
    batch = toy.batch_of([1], [[3]], torch.zeros(1, 2), torch.zeros(1))
    with pytest.raises(NonFiniteLossError, match="not finite: item;"):
        trainer.train_step([batch])


def test_labels_are_named_too(toy):
    trainer = Trainer(toy.config(), quiet=True)
    batch = toy.batch_of([1], [[]], torch.zeros(1, 2), torch.tensor([math.inf]))
    with pytest.raises(NonFiniteLossError, match="not finite: labels;"):
        trainer.train_step([batch])


def test_unusable_data(toy):
    with pytest.raises(ConfigError, match="data must be a DataConfig or a source"):
        run(toy.config(train_data=[1, 2]))


def test_nothing_to_evaluate_on(toy):
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        Trainer(toy.config(), quiet=True).evaluate()


def test_equal_runs_and_other_seeds(toy):
    config = busy_config(toy)
    first, _ = run(config)
    second, _ = run(busy_config(toy))
    same_state(second, first)
    other, _ = run(busy_config(toy, seed=1))
    assert not torch.equal(other.model.state_dict()["out.weight"], first.model.state_dict()["out.weight"])


def test_resume_deletes_what_a_killed_process_had_no_time_to(toy, tmp_path, monkeypatch):
    """Killed between the commit of the last checkpoint and the deletion of the old ones."""
    config = busy_config(toy, save_every_steps=4, keep_checkpoints=2)
    run(config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["recis.checkpoint.save"], "rotate", lambda run, keep, protect: [])
        run(config, tmp_path / "killed")
    assert len(list_checkpoints(tmp_path / "killed")) > 2
    run(config, tmp_path / "killed", resume=True)
    have, want = ([path.name for path in list_checkpoints(tmp_path / name)] for name in ("killed", "straight"))
    assert have == want
