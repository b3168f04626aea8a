"""Two ranks of every recipe over gloo: the numbers of one process, whole groups, one writer, one log, resume after kill -9."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_lm import MICRO
from two_ranks import CASES, SHARDED, TWO_ONLY

from relevance.ranks import WAIT
from relevance.run_log import read_log
from relevance.tally import Count, Highest, Mean, Share, mean_of, merged, spread_of

ROOT = Path(__file__).parents[2]
COMPARED = [case for case in CASES if case not in (*TWO_ONLY, "agrl_killed")]
RL = [case for case in COMPARED if case not in ("sft", "dpo")]
OF_ONE_RANK = ("seconds/", "step_time", "epoch")
MEANS_OF_MEANS = ("logits/", "kl", "mean_token_accuracy")
"""TRL averages these over micro-batches, which hold other rows on two ranks."""
OF_REPLAY = ("completions/", "num_tokens", "tokens/generated", "tokens/wasted")
"""A rank that replays less than the other one fills up with copies, and TRL counts them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "two_ranks.py"), str(out)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    codes = json.loads((out / "codes.json").read_text()) if (out / "codes.json").exists() else {}
    assert {name: own for name, own in codes.items() if name != "killed"} == {
        "start": [0], "resumed": [0, 0], "one": [0], "two": [0, 0], "sharded": [0, 0]
    }, done.stderr[-4000:]  # fmt: skip
    return out


def seen(folder, case, group="two"):
    """Return what each rank saw of a case."""
    count = 1 if group == "one" else 2
    return [json.loads((folder / f"{group}-{rank}.json").read_text())["cases"][case] for rank in range(count)]


def log_of(folder, group, case):
    stage = {"sft": "sft", "dpo": "dpo/train"}.get(case, "rl")
    return read_log(folder / group / case / stage / "train.jsonl")


def same_log(folder, case, group, of="one"):
    """Hold the log of a case against that of one process."""
    logs = [log_of(folder, "one", case if of == "one" else of), log_of(folder, group, case)]
    if case == "dpo":  # 34 pairs: the last step is filled up to whole micro-batches per rank
        logs = [log[:-1] for log in logs]
    assert len(logs[0]) == len(logs[1]) >= 2
    left_out = OF_ONE_RANK + MEANS_OF_MEANS + (OF_REPLAY if case == "agrl" else ())
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        kept = [name for name in one if not name.startswith(left_out)]
        assert len(kept) > 7
        for name in kept:
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5, nan_ok=True), (one["step"], name)
    assert any(entry["grad_norm"] > 1e-3 for entry in logs[0])


def same_weights(folder, case, group):
    """Hold the finished model of a case against that of one process."""
    name = "adapter_model.safetensors" if case.endswith("lora") else "model.safetensors"
    models = [load_file(folder / of / case / "final" / name) for of in ("one", group)]
    start = load_file(folder / ("rag" if case.startswith("dyknow") else "base") / "model.safetensors")
    if case.endswith("lora"):
        start = {name: torch.zeros_like(values) for name, values in models[0].items() if "lora_B" in name}
    elif group == "sharded":  # written twice there: the head is the embedding
        torch.testing.assert_close(
            models[1].pop("lm_head.weight"), models[1]["model.embed_tokens.weight"], rtol=0, atol=0
        )
    assert models[0].keys() == models[1].keys()
    moved = sum(float((models[0][name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-3
    for name, weights in models[0].items():
        torch.testing.assert_close(models[1][name], weights, rtol=1e-4, atol=5e-5)


class TestOneProcessAndTwo:
    @pytest.mark.parametrize("case", COMPARED)
    def test_log_the_same_numbers(self, folder, case):
        same_log(folder, case, "two")

    @pytest.mark.parametrize("case", ["sft", *RL])
    def test_end_with_the_same_weights(self, folder, case):
        same_weights(folder, case, "two")

    def test_draw_the_same_pools_pairs_and_thresholds(self, folder):
        for name in (
            "dyknow/dyknow/pool.json",
            "she/she/pools.json",
            "she/she/verifiers.json",
            "she/she/samples.jsonl",
            "dpo/dpo/preferences.jsonl",
            "dpo/dpo/samples.json",
        ):
            assert (folder / "one" / name).read_text() == (folder / "two" / name).read_text(), name
        stages = json.loads((folder / "two" / "she" / "she" / "pools.json").read_text())["stages"]
        assert len(set(stages)) > 1  # the curriculum is more than one pool

    def test_replay_the_same_group_where_only_one_of_a_rank_may(self, folder):
        # a quarter of 4 groups is one; a quarter of the two groups of a rank would be none
        of_ranks = [rank["guided"] for rank in seen(folder, "agrl")]
        assert [sum(step) for step in zip(*of_ranks, strict=True)] == seen(folder, "agrl", "one")[0]["guided"]
        assert sum(map(sum, of_ranks)) > 0


class TestRanks:
    @pytest.mark.parametrize("case", [*RL, "taosr1", "agrl_drawn"])
    def test_have_whole_groups_and_one_model(self, folder, case):
        ranks = seen(folder, case)
        for rank in ranks:
            assert rank["trained"]
            for rows in rank["trained"]:
                assert len(rows) == 8
                assert all(len(set(rows[first : first + 4])) == 1 for first in (0, 4))
        assert ranks[0]["weights"] == ranks[1]["weights"]
        assert {rank["wrapper"] for rank in ranks} == {"DistributedDataParallel"}

    def test_train_on_the_order_of_one_process(self, folder):
        one = seen(folder, "grpo", "one")[0]["asked"]
        two = [first + second for first, second in zip(*(rank["asked"] for rank in seen(folder, "grpo")), strict=True)]
        assert one == two

    @pytest.mark.parametrize("case", ["taosr1", "agrl_drawn"])
    def test_refill_from_prompts_of_their_own_and_the_log_adds_them_up(self, folder, case):
        ranks = seen(folder, case)
        drawn = [[name for names in rank["fresh"] for name in names] for rank in ranks]
        assert len(drawn[0]) == len(drawn[1]) == ranks[0]["taken"] == ranks[1]["taken"] > 0
        assert not set(drawn[0]) & set(drawn[1])
        changed = [0] * len(ranks[0]["asked"])
        for rank in ranks:
            for step, (asked, trained) in enumerate(zip(rank["asked"], rank["trained"], strict=True)):
                changed[step] += sum(before != after for before, after in zip(asked, trained[::4], strict=True))
        logged = [entry["groups/refilled"] for entry in log_of(folder, "two", case)]
        assert logged == changed
        assert sum(logged) > 0
        state = json.loads((folder / "two" / case / "rl" / f"checkpoint-{len(logged)}" / "relevance.json").read_text())
        assert state["reserve_taken"] == ranks[0]["taken"]

    def test_replay_and_the_log_counts_rows_of_both(self, folder):
        guided = [sum(step) for step in zip(*(rank["guided"] for rank in seen(folder, "agrl_drawn")), strict=True)]
        log = log_of(folder, "two", "agrl_drawn")
        assert [entry["replay/groups"] * 2 for entry in log if entry["groups/refilled"] == 0] == [
            rows for rows, entry in zip(guided, log, strict=True) if entry["groups/refilled"] == 0
        ]
        for entry in log:
            assert entry["tokens/generated"] == pytest.approx(entry["tokens/wasted"] + entry["tokens/trained"]) or (
                entry["groups/dropped"] > 0
            )

    @pytest.mark.parametrize("case", [*COMPARED, "taosr1", "agrl_drawn"])
    def test_rank_0_alone_writes_samples_and_talks(self, folder, case):
        first, second = seen(folder, case)
        assert second["written"] == second["said"] == []
        assert second["sampled"] == 0
        assert "relevance.json.part" in first["written"]
        assert [entry["step"] for entry in log_of(folder, "two", case)] == sorted(
            {entry["step"] for entry in log_of(folder, "two", case)}
        )

    def test_stop_together_at_the_time_of_rank_0(self, folder):
        stops = [rank["stopped"] for rank in seen(folder, "grpo_late")]
        assert stops[0] == stops[1]
        assert "OutOfTime: rl: time is up at step 1 of 3" in stops[0]
        same_log(folder, "grpo_late", "two", of="grpo")  # it went on from there

    def test_fail_together_with_the_error_of_rank_0(self, folder):
        stops = [rank["stopped"] for rank in seen(folder, "dpo_refused")]
        assert stops[0] == stops[1]
        assert "there is no preference pair" in stops[0]

    def test_wait_for_hours(self, folder):
        assert {rank["patience_s"] for rank in seen(folder, "grpo")} == {WAIT.total_seconds()}


class TestShardedModel:
    """FSDP2 through accelerate, which is told that the CPU is a GPU: it shards on those alone."""

    @pytest.mark.parametrize("case", [case for case in SHARDED if case in COMPARED])
    def test_trains_what_one_process_trains(self, folder, case):
        same_log(folder, case, "sharded")
        same_weights(folder, case, "sharded")

    def test_lies_in_halves_on_the_ranks(self, folder):
        whole = seen(folder, "agrl", "one")[0]["held"]
        halves = seen(folder, "agrl", "sharded")
        assert {rank["wrapper"] for rank in halves} == {"FSDPQwen3ForCausalLM"}
        assert sum(rank["held"] for rank in halves) == whole
        assert max(rank["held"] for rank in halves) < 0.6 * whole

    def test_goes_on_where_the_clock_stopped_it(self, folder):
        same_log(folder, "grpo_late", "sharded", of="grpo")

    def test_is_refused_where_accelerate_would_train_whole_copies(self, folder):
        stops = [rank["stopped"] for rank in seen(folder, "sft_whole")]
        assert all("accelerate does not shard on cpu" in text for text in stops)


@pytest.mark.parametrize("group", ["two", "sharded"])
def test_a_loss_of_one_rank_that_is_not_finite_is_skipped_by_both(folder, group):
    log = log_of(folder, group, "grpo_nan")
    assert [entry.get("skipped") for entry in log] == [None, 1.0, None]
    assert log[1]["grad_norm"] == 0.0
    assert log[2]["grad_norm"] > 0.0
    weights = load_file(folder / group / "grpo_nan" / "final" / "model.safetensors")
    assert all(bool(values.isfinite().all()) for values in weights.values())


def test_accelerate_launch_starts_two_processes(tmp_path):
    """The shipped config, for real; what the ranks do is tested above."""
    flags = [text for setting in (*MICRO, "catalog.num_train=16") for text in ("--set", setting)]
    config = ROOT / "relevance" / "accelerate" / "two_processes_cpu.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    done = subprocess.run(
        [*launch, "-m", "relevance", "train", "sft", "--out", str(tmp_path / "run"), *flags],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("model: ") == 1
    states = {path.name for path in (tmp_path / "run" / "sft" / "checkpoint-2").glob("rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}


class TestKilledRank:
    def test_the_other_rank_ends_at_once(self, folder):
        assert json.loads((folder / "codes.json").read_text())["killed"] == [1, -9]
        assert "RuntimeError" in json.loads((folder / "killed-0.json").read_text())["error"]

    def test_two_fresh_ranks_go_on_with_the_numbers_of_a_straight_run(self, folder):
        logs = [log_of(folder, "two", case) for case in ("agrl_drawn", "agrl_killed")]
        assert [entry["step"] for entry in logs[1]] == [1, 2, 3, 4]
        for straight, resumed in zip(*logs, strict=True):
            for name in straight:
                if not name.startswith(("seconds/", "step_time")):
                    assert resumed[name] == straight[name] or name == "num_tokens", (straight["step"], name)
        models = [
            load_file(folder / "two" / case / "final" / "model.safetensors") for case in ("agrl_drawn", "agrl_killed")
        ]
        assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
        assert any(entry["loss"] != 0 for entry in logs[0][2:])

    def test_a_checkpoint_has_the_random_state_of_every_rank(self, folder):
        for step in (2, 4):
            kept = folder / "two" / "agrl_killed" / "rl" / f"checkpoint-{step}"
            assert {path.name for path in kept.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}


class TestTally:
    def test_ranks_add_up_to_one_process(self):
        values = torch.tensor([1.0, 0.0, float("nan"), 4.0, 2.0]).double()
        parts = [values[:1], values[1:]]
        ranks = [{"mean": mean_of(part), "spread": spread_of(part), "most": Highest(float(part[0]))} for part in parts]
        ranks[0] |= {"share": Share(3.0, 4), "count": Count(2.0)}
        found = merged(ranks)
        known = values[~values.isnan()]
        assert found["mean"] == pytest.approx(float(known.mean()))
        assert found["spread"] == pytest.approx(float(known.std(correction=0)))
        assert (found["most"], found["share"], found["count"]) == (1.0, 3 / 8, 2.0)

    def test_nothing_known_is_nan(self):
        nothing = torch.full((3,), torch.nan)
        found = merged([{"mean": mean_of(nothing), "spread": spread_of(nothing)}] * 2)
        assert all(value != value for value in found.values())
        assert merged([{"mean": Mean(0.0, 0.0)}, {"mean": Mean(3.0, 2.0)}]) == {"mean": 1.5}
        assert merged([{"s": spread_of(nothing)}, {"s": spread_of(torch.tensor([1.0, 3.0]))}]) == {"s": 1.0}
