"""Hooks and the progress line, each on a RunState by hand."""

import io
import json
import math

import pytest
import torch

from recis.errors import ConfigError
from recis.trainer.config import Monitor
from recis.trainer.hooks import Checkpoint, EarlyStop, Evict, Logger, Profiler, TensorBoard, call_hooks, check_hooks
from recis.trainer.log import MetricsLog, read_log
from recis.trainer.metric_set import MetricSet
from recis.trainer.progress import Progress
from recis.trainer.state import RunState


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def stepped(state: RunState, step: int, loss: float = 0.5, samples: int = 10) -> RunState:
    state.step = step
    state.samples += samples
    state.loss_tensor = torch.tensor(loss)
    state.window_loss += loss
    state.window_steps += 1
    return state


def evaluated(state: RunState, step: int, value: float) -> RunState:
    state.step = step
    state.metrics = {"auc": value}
    return state


def test_early_stop():
    hook, state = EarlyStop(Monitor(patience_evals=2)), RunState()
    for step, value in ((1, 0.5), (2, 0.7), (3, 0.6)):
        hook.on_evaluate_end(evaluated(state, step, value))
    assert (state.best, state.best_step, state.bad_evals, state.stop_reason) == (0.7, 2, 1, None)
    hook.on_evaluate_end(evaluated(state, 4, math.nan))
    assert state.stop_reason == "auc has not beaten 0.7 of step 2 in 2 evaluations"


def test_early_stop_names_what_there_is():
    state = RunState(metrics={"loss": 1.0})
    with pytest.raises(ConfigError, match="no metric 'auc' in the evaluation, which gives loss"):
        EarlyStop(Monitor()).on_evaluate_end(state)


def test_checkpoint_saves_when_due_best_or_over():
    saved, state = [], RunState()
    hook = Checkpoint(every_steps=3, save=lambda: saved.append(state.step))
    hook.on_train_start(state)
    for step in range(1, 9):
        state.step = step
        if step == 4:
            state.best_step = 4
        hook.on_step_end(state)
    hook.on_train_end(state)
    assert saved == [3, 4, 6, 8]
    hook.on_train_end(state)
    assert saved == [3, 4, 6, 8]


def test_logger_takes_the_window(tmp_path):
    clock, state = Clock(), RunState()
    log = MetricsLog(tmp_path / "m.jsonl")
    hook = Logger(log, every_steps=2, metrics=MetricSet((), ("label",)), clock=clock)
    hook.on_train_start(state)
    for step, loss in ((1, 1.0), (2, 2.0), (3, 5.0), (4, 7.0)):
        clock.now += 0.5
        hook.on_step_end(stepped(state, step, loss))
    hook.on_evaluate_end(evaluated(state, 4, 0.75))
    hook.on_train_end(state)
    lines = read_log(tmp_path / "m.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 2), ("train", 4), ("eval", 4)]
    assert [line["loss"] for line in lines[:2]] == [1.5, 6.0]
    assert [line["samples_per_s"] for line in lines[:2]] == [20.0, 20.0]
    assert lines[2]["auc"] == 0.75


def test_logger_counts_rows_of_tables(tmp_path, toy):
    model = toy.Config().build()
    state = RunState(tables=dict(model.embeddings.table_set.tables))
    log = MetricsLog(tmp_path / "m.jsonl")
    hook = Logger(log, every_steps=1, metrics=MetricSet((), ("label",)), clock=Clock())
    hook.on_step_end(stepped(state, 1))
    log.close()
    (line,) = read_log(tmp_path / "m.jsonl")
    assert set(line["tables"]) == {"user", "item"}
    assert line["tables"]["user"]["size"] == 0


def test_progress_in_a_file():
    clock, stream, state = Clock(), io.StringIO(), RunState(max_steps=2000)
    hook = Progress(every_steps=1000, stream=stream, clock=clock)
    hook.on_train_start(state)
    for step in (1, 1000):
        clock.now += 5
        hook.on_step_end(stepped(state, step, loss=0.43121, samples=40_000))
    hook.on_train_end(state)
    assert stream.getvalue() == "step 1,000/2,000   loss 0.4312   8,000 samples/s   ETA 0:00:10\n"


def test_rates_leave_out_evaluation(tmp_path):
    clock, stream, state = Clock(), io.StringIO(), RunState()
    log = MetricsLog(tmp_path / "m.jsonl")
    hooks = [
        Progress(every_steps=10, stream=stream, clock=clock, note="a note"),
        Logger(log, every_steps=10, metrics=MetricSet((), ("label",)), clock=clock),
    ]
    for hook in hooks:
        hook.on_train_start(state)
    clock.now += 25
    state.evaluation_s += 20
    stepped(state, 10, samples=100)
    for hook in hooks:
        hook.on_step_end(state)
    log.close()
    assert stream.getvalue() == "a note\nstep 10   loss 0.5000   20 samples/s\n"
    assert read_log(tmp_path / "m.jsonl")[0]["samples_per_s"] == 20.0


def test_progress_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    clock, stream, state = Clock(), Terminal(), RunState()
    hook = Progress(every_steps=100, stream=stream, clock=clock)
    hook.on_train_start(state)
    for step in range(1, 11):
        clock.now += 0.1
        hook.on_step_end(stepped(state, step))
    hook.on_train_end(state)
    lines = stream.getvalue().split("\r\x1b[2K")
    assert 4 <= len(lines) - 1 <= 7  # rewritten no oftener than every 0.2 s
    assert lines[-1].startswith("step 10   loss 0.5000")
    assert lines[-1].endswith("\n")


def test_evict_frees_old_rows(toy):
    model = toy.Config().build()
    tables = model.embeddings.table_set.tables
    table = tables["user"]
    ids = torch.tensor([1, 2, 3])
    fields = {"ids": ids, "weight": torch.zeros(3, 4), "last_seen": torch.tensor([1, 3, 5], dtype=torch.int32)}
    table.import_rows(fields)
    state = RunState(tables=dict(tables))
    hook = Evict(["user"], every_steps=2, older_than_steps=3)
    hook.on_train_start(state)
    state.step = 5
    hook.on_step_end(state)
    assert table.size == 3
    state.step = 6
    hook.on_step_end(state)  # 6 - 3 >= 3 goes, 6 - 5 < 3 stays
    assert table.ids().tolist() == [3]
    with pytest.raises(ConfigError, match="no table 'usr'; did you mean 'user'"):
        Evict(["usr"], every_steps=1, older_than_steps=1).on_train_start(state)
    with pytest.raises(ConfigError, match="at least 1"):
        Evict([], every_steps=0, older_than_steps=1)


def test_tensorboard(tmp_path):
    state, hook = RunState(), TensorBoard(tmp_path, every_steps=1)
    hook.on_train_start(state)
    hook.on_step_end(stepped(state, 1, loss=0.25))
    hook.on_evaluate_end(evaluated(state, 1, 0.75))
    hook.on_train_end(state)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [0.25]
    assert [event.value for event in events.Scalars("eval/auc")] == [0.75]


def test_tensorboard_names_its_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "recis\[tb\]"'):
        TensorBoard(tmp_path).on_train_start(RunState())


def test_profiler(tmp_path):
    state, hook = RunState(), Profiler(tmp_path / "profile", after_steps=1, num_steps=1)
    hook.on_train_start(state)
    for step in (1, 2, 3):
        torch.ones(3).sum()
        hook.on_step_end(stepped(state, step))
    hook.on_train_end(state)
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    assert any("sum" in event.get("name", "") for event in trace["traceEvents"])


def test_objects_without_events_are_refused():
    with pytest.raises(ConfigError, match="has none of on_train_start"):
        check_hooks([object()])
    check_hooks([EarlyStop(Monitor())])
    call_hooks([object(), EarlyStop(Monitor())], "on_checkpoint", RunState())
