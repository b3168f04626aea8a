"""Runs of the recipes on a tiny model: every stage, exact resume after a kill, time limits, and what a run refuses."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_lm import MICRO, MICRO_RL

from recis.errors import ConfigError
from relevance.checkpoints import last_complete, mark_complete
from relevance.run_log import cut_log, read_log, write_curves
from relevance.training_run import open_run

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[2]


def quiet(line):
    """Say nothing."""


def run_recipe(name, out, settings, **options):
    """Run a recipe in this process."""
    from relevance.recipes import recipe_function

    run = open_run(name, out=out, settings=settings, say=quiet, **options)
    return run, recipe_function(name)(run)


def losses(folder):
    return [
        (entry["step"], entry["loss"], entry.get("grad_norm"))
        for entry in read_log(folder / "train.jsonl")
        if "loss" in entry
    ]


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """A finished SFT run."""
    out = tmp_path_factory.mktemp("sft") / "run"
    _, final = run_recipe("sft", out, MICRO)
    return out, final


KILL = """
import os, signal, sys
from pathlib import Path
from transformers import TrainerCallback
import relevance.engine as engine

class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)

own = engine.RunCallback
engine.RunCallback = lambda stage: Die() if stage.folder.name == sys.argv[2] else own(stage)
from relevance.cli import main
main(sys.argv[3:])
"""


def test_resume_after_kill_9_gives_the_losses_of_the_straight_run(sft, tmp_path):
    settings = [*MICRO_RL, "engine.save_steps=2", "replay.tau=1"]
    model = str(sft[1])
    straight, _ = run_recipe("agrl", tmp_path / "straight", settings, model=model)
    flags = [text for setting in settings for text in ("--set", setting)]
    command = ["train", "agrl", "--model", model, "--out", str(tmp_path / "killed"), *flags]
    killed = subprocess.run(
        [sys.executable, "-c", KILL, "3", "rl", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    found = last_complete(tmp_path / "killed" / "rl")
    assert found is not None
    assert found[0].name == "checkpoint-2"
    (tmp_path / "killed" / "rl" / "checkpoint-3").mkdir()  # what a kill during a save leaves
    again, _ = run_recipe("agrl", tmp_path / "killed", [], resume=True)
    want = losses(straight.folder / "rl")
    assert losses(again.folder / "rl") == want[2:]  # the killed process wrote no log of its own
    same = [
        torch.load(folder / "rl" / "checkpoint-4" / "optimizer.pt", weights_only=False)["state"][0]["exp_avg"]
        for folder in (straight.folder, again.folder)
    ]
    assert torch.equal(*same)


def test_sft_stopped_by_the_clock_goes_on_exactly(sft, tmp_path):
    from relevance.engine import OutOfTime

    out = tmp_path / "run"
    with pytest.raises(OutOfTime, match="--resume goes on"):
        run_recipe("sft", out, MICRO, max_minutes=0.0)
    assert losses(out / "sft")[-1][0] == 1
    run_recipe("sft", out, [], resume=True)
    assert losses(out / "sft") == losses(sft[0] / "sft")


def test_a_finished_run_says_how_to_ask_its_model(sft):
    out, final = sft
    settings = json.loads((final / "grader.json").read_text())
    assert (settings["profile"], settings["rules"]) == ("compact", "catalog")
    assert 0.05 <= settings["b_cum"] <= 0.95
    assert (out / "final").resolve() == (out / "sft" / "final").resolve()
    page = (out / "curves.html").read_text()
    assert "<polyline" in page
    assert "loss" in page


def test_the_first_dpo_loss_is_log_2_and_swapping_sides_flips_the_gradient(sft, tmp_path):
    from relevance.config import DpoConfig
    from relevance.engine import train_dpo
    from relevance.files import Preference

    run = open_run(
        "dpo", out=tmp_path / "run", settings=[*MICRO, "engine.accumulation=1"], model=str(sft[1]), say=quiet
    )
    deltas = []
    for name, (chosen, rejected) in {"straight": ("4", "1"), "swapped": ("1", "4")}.items():
        lm = run.start_model()
        task = run.task_of(lm)
        before = {key: value.clone() for key, value in lm.model.state_dict().items()}
        rows = [
            Preference(id=pair.id, prompt=task.prompt(pair), chosen=chosen, rejected=rejected)
            for pair in task.train[:8]
        ]
        train_dpo(lm, rows, DpoConfig(learning_rate=1e-3, num_epochs=2), run.stage(name))
        assert losses(tmp_path / "run" / name)[0][1] == pytest.approx(0.6931, abs=1e-4)
        after = run.load(run.stage(name).final).model.state_dict()
        logits = [_label_gap(run, state, task) for state in (before, after)]
        deltas.append(logits[1] - logits[0])
    assert deltas[0] > 0 > deltas[1]


def _label_gap(run, state, task):
    """Return the mean of log P(4) - log P(1) under given weights."""
    from relevance.prefill import score_prompts

    lm = run.start_model()
    lm.model.load_state_dict(state)
    probs = score_prompts(lm, [task.prompt(pair) for pair in task.train[:8]])
    return float((probs[:, 3].log() - probs[:, 0].log()).mean())


@pytest.mark.parametrize(("margin", "loss"), [(2.0, 0.5981), (-2.0, 0.7981), (0.0, 0.6931)])
def test_dpo_numbers(margin, loss):
    value = torch.tensor(margin, dtype=torch.float64, requires_grad=True)
    out = -torch.nn.functional.logsigmoid(0.1 * value)
    out.backward()
    assert float(out) == pytest.approx(loss, abs=5e-4)
    if margin == 0:
        assert value.grad is not None
        assert float(value.grad) == pytest.approx(-0.05)


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("grpo", []),
        (
            "taosr1",
            [
                "dpo.num_prompts=8",
                "dpo.num_samples=2",
                "dpo.limits.max_oracle_share=1",
                "rl.refill_rounds=1",
                "rl.max_steps=2",
            ],
        ),
        ("she", ["num_prompts=8", "she.num_logged=2", "rl.max_steps=2"]),
        ("dyknow", ["dyknow.pool.size=16", "rl.max_steps=2"]),
    ],
)
def test_every_recipe_runs_to_its_model(recipe, more, sft, tmp_path):
    model = None if recipe == "dyknow" else str(sft[1])  # its profile and catalogue are others
    run, final = run_recipe(recipe, tmp_path / "run", [*MICRO_RL, *more], model=model)
    assert (final / "config.json").exists()
    log = read_log(run.folder / "rl" / "train.jsonl")
    assert [entry["step"] for entry in log] == list(range(1, run.config.rl.max_steps + 1))
    for key in ("loss", "reward/total/mean", "accuracy", "tokens/generated", "seconds/generate", "advantage/std"):
        assert all(key in entry for entry in log), key
    assert {"she": "step/category/mean", "dyknow": "gate/beta"}.get(recipe, "reward/label/mean") in log[0]


def test_the_pool_can_be_ordered_by_the_gap_to_an_ebrm(tmp_path, monkeypatch):
    from relevance.recipes import dyknow

    class Verifier:
        def disagreement(self, pairs, probs):
            return torch.linspace(0, 1, len(pairs), dtype=torch.float64)

    own, given, order = dyknow.uncertainty_pool, [], []

    def pool(pairs, probs, *, disagreement, **options):
        given.append(disagreement)
        found = own(pairs, probs, disagreement=disagreement, **options)
        order.extend(pairs[place].id for place in found)
        return found

    trained = []
    monkeypatch.setattr("relevance.ebrm_verifier.load_verifier", lambda folder, pairs: Verifier())
    monkeypatch.setattr(dyknow, "uncertainty_pool", pool)
    monkeypatch.setattr(dyknow, "train_rl", lambda job, ids, *_, **__: trained.extend(ids))
    monkeypatch.setattr("relevance.training_run.TrainingRun.finish", lambda self, final: final)
    run_recipe("dyknow", tmp_path / "run", [*MICRO_RL, "dyknow.ebrm_run=somewhere", "dyknow.pool.size=4"])
    torch.testing.assert_close(given[0], torch.linspace(0, 1, 48, dtype=torch.float64))
    assert len(order) == 4
    assert set(trained) == set(order)


class TestRefusals:
    def test_a_folder_with_a_run_needs_resume(self, sft):
        with pytest.raises(ConfigError, match="--resume"):
            open_run("sft", out=sft[0], settings=MICRO, say=quiet)

    def test_resume_refuses_other_settings(self, sft):
        with pytest.raises(ConfigError, match="settings"):
            open_run("sft", out=sft[0], settings=["seed=5"], resume=True, say=quiet)

    def test_a_folder_with_something_else(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(ConfigError, match="not empty"):
            open_run("sft", out=tmp_path, settings=MICRO, say=quiet)

    @pytest.mark.parametrize(
        ("recipe", "setting", "match"),
        [
            ("grpo", "rl.num_generations=1", "at least 2"),
            ("grpo", "rl.num_generations=5", "multiple of rl.num_generations"),
            ("grpo", "rl.learning_rat=1", "learning_rate"),
            ("grpo", "rl.num_iterations=2", "num_iterations must be 1"),
            ("grpo", "profile=think_first", "label at the end"),
            ("grpo", "profile=compct", "compact"),
            ("agrl", "reward.w=0.4,0.3,0.3", "outrank"),
            ("she", "she.verifiers=gould", "gold"),
            ("she", "she.verifiers=ebrm", "ebrm_run"),
            ("she", "rl.rationale_weight=0.5", "have no effect"),
            ("dyknow", "rl.label_weight=2", "have no effect"),
            ("dyknow", "engine.keep=1", "keep at least 2"),
            ("sft", "sft.micro_rows=7", "multiple of micro_rows"),
        ],
    )
    def test_settings(self, recipe, setting, match, tmp_path):
        with pytest.raises(ConfigError, match=match):
            open_run(recipe, out=tmp_path / "run", settings=[setting], say=quiet)
        assert not (tmp_path / "run").exists()

    def test_prompts_per_step_that_do_not_fit(self, sft, tmp_path):
        with pytest.raises(ConfigError, match="set it so"):
            run_recipe("grpo", tmp_path / "run", [*MICRO_RL, "rl.prompts_per_step=5"], model=str(sft[1]))

    def test_dyknow_without_chunks(self, sft, tmp_path):
        settings = [*MICRO_RL, "profile=compact", "catalog.with_chunks=false"]
        with pytest.raises(ValueError, match="no train pair has a chunk"):
            run_recipe("dyknow", tmp_path / "run", settings, model=str(sft[1]))

    def test_missing_gold_steps(self, sft, tmp_path):
        with pytest.raises(ValueError, match="lack 'category'"):
            run_recipe("agrl", tmp_path / "run", [*MICRO_RL, "catalog.step_gold_rate=0.2"], model=str(sft[1]))

    def test_prompts_that_do_not_fit(self, tmp_path):
        with pytest.raises(ValueError, match="more than 20 tokens before the item"):
            run_recipe("sft", tmp_path / "run", [*MICRO, "prompt.max_prompt_tokens=20"])


def test_cut_off_checkpoints_are_passed_over(tmp_path):
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    mark_complete(tmp_path / "checkpoint-2", {"reserve_taken": 3})
    found = last_complete(tmp_path)
    assert found == (tmp_path / "checkpoint-2", {"reserve_taken": 3})
    assert not (tmp_path / "checkpoint-4").exists()


def test_the_log_is_cut_back_to_a_checkpoint(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    cut_log(path, 1)
    assert read_log(path) == [{"step": 1, "loss": 2.0}]
    assert "loss 2" in write_curves(tmp_path).read_text()
