"""The ladder runs its cells once and reports them; the demo prints before and after; rewards of a user's own."""

import json
import time

import pytest
import torch
from tiny_lm import MICRO_RL

from recis.errors import ConfigError
from relevance.demo import SHOWN, majority, run_demo
from relevance.ladder import cells_of, find_preset, known_settings, run_ladder
from relevance.ladder_report import targets
from relevance.ladder_rows import PRESETS, ROWS, Preset
from relevance.methods import own_reward
from relevance.recipes import RECIPES, default_config
from relevance.reward_calls import RewardError

pytestmark = pytest.mark.filterwarnings("ignore")
TINY = Preset(
    name="tiny",
    rows=("sft", "grpo", "dyknow"),
    seeds=(0,),
    settings=(*MICRO_RL, "rl.max_steps=1", "dyknow.pool.size=16"),
    num_test=16,
    num_texts=2,
)


def quiet(line):
    """Say nothing."""


class TestRows:
    def test_every_row_can_be_configured_and_starts_from_a_row(self):
        from recis.trainer.override import override

        for row in ROWS.values():
            assert row.recipe in RECIPES
            override(default_config(row.recipe), row.settings)
            assert row.start is None or ROWS[row.start].start is None

    def test_every_preset_can_be_configured_and_each_setting_reaches_a_row(self):
        from recis.trainer.override import override

        for preset in PRESETS.values():
            reached = set()
            for name in preset.rows:
                config = default_config(ROWS[name].recipe)
                known = known_settings(config, preset.settings)
                override(config, [*known, *ROWS[name].settings])
                reached.update(known)
            assert reached == set(preset.settings), preset.name

    def test_starts_come_first_and_presets_know_their_rows(self):
        names = [cell.name for cell in cells_of(PRESETS["quick"], ("agrl", "dyknow"))]
        assert names == ["sft-s0", "agrl-s0", "sft_rag-s0", "dyknow-s0"]
        assert len(cells_of(PRESETS["full"])) == 3 * len(ROWS)
        with pytest.raises(ConfigError, match="agrl"):
            cells_of(PRESETS["quick"], ("agrll",))
        with pytest.raises(ConfigError, match="quick"):
            find_preset("quik")

    def test_settings_that_a_recipe_lacks_are_left_out_and_wrong_values_refused(self):
        config = default_config("sft")
        assert known_settings(config, ["rl.max_steps=3", "sft.num_epochs=1"]) == ["sft.num_epochs=1"]
        with pytest.raises(ConfigError):
            known_settings(config, ["sft.num_epochs=many"])


def test_cells_run_once_and_the_table_has_their_numbers(tmp_path):
    out, said = tmp_path / "ladder", []
    left = run_ladder(TINY, out, deadline=time.monotonic() - 1, say=said.append)
    assert [cell.name for cell in left] == ["sft-s0", "grpo-s0", "sft_rag-s0", "dyknow-s0"]
    deadline = time.monotonic() + 0.5
    left = run_ladder(TINY, out, deadline=deadline, say=lambda line: time.sleep(max(0.0, deadline - time.monotonic())))
    assert [cell.name for cell in left] == ["sft-s0", "grpo-s0", "sft_rag-s0", "dyknow-s0"]  # stopped within the first
    assert (out / "cells" / "sft-s0" / "sft" / "checkpoint-1").is_dir()
    assert run_ladder(TINY, out, say=said.append) == []
    log = [json.loads(line) for line in (out / "cells" / "sft-s0" / "sft" / "train.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, len(log) + 1))  # gone on with, not begun again
    report = json.loads((out / "ladder.json").read_text())
    rows = {row["row"]: row for row in report["rows"]}
    assert list(rows) == ["majority", "sft", "grpo", "sft_rag", "dyknow"]
    for row in rows.values():
        assert row["macro_f1"]["low"] <= row["macro_f1"]["high"]
    assert rows["grpo"]["tokens"] > 0
    assert {"with_chunk", "without_chunk", "random_chunk", "by_kind"} <= rows["dyknow"].keys()
    assert "over_sft" in rows["grpo"]
    assert "over_sft" not in rows["sft"]
    assert "| + GRPO |" in (out / "ladder.md").read_text()
    assert "<circle" in (out / "ladder.html").read_text()
    said.clear()
    assert run_ladder(TINY, out, say=said.append) == []
    assert said == []


def row_of(name, f1, steps=(0.5, 0.5, 0.5), **more):
    interval = {"value": f1, "low": f1 - 0.02, "high": f1 + 0.02}
    found = dict(zip(("step_category", "step_attribute", "step_rule"), steps, strict=True))
    return {"row": name, "title": name, "macro_f1": interval, "hard_macro_f1": interval, **found, **more}


def test_targets_by_hand():
    rivals = [row_of("sft", 0.5), row_of("grpo", 0.55)]
    kinds = {"helpful": {"with": 0.6, "without": 0.5}, "misleading": {"with": 0.5, "without": 0.5}}
    asked = {"with_chunk": 0.6, "without_chunk": 0.5, "random_chunk": 0.5, "by_kind": kinds}
    lines = targets([*rivals, row_of("taosr1", 0.6), row_of("agrl", 0.58), row_of("dyknow", 0.5, **asked)])
    assert lines == [
        "taosr1 above post-CoT SFT and GRPO in macro-F1, intervals apart: met (0.600 beside 0.500, 0.550)",
        "agrl above post-CoT SFT and GRPO in macro-F1 of hard pairs, intervals apart: MISSED (0.580 beside 0.500, 0.550)",
        "dyknow: helpful chunks help, misleading and random ones do no harm: met",
    ]
    better, one_worse = (0.6, 0.6, 0.6), (0.6, 0.6, 0.5)
    for f1, steps, verdict in ((0.5, better, "met"), (0.5, one_worse, "MISSED"), (0.4, better, "MISSED")):
        assert targets([*rivals, row_of("she", f1, steps)])[0].endswith(f"not lower: {verdict}")
    kinds["misleading"]["with"] = 0.4
    assert targets([row_of("dyknow", 0.5, **asked)])[0].endswith("MISSED")
    assert targets(rivals) == []


def test_demo_prints_before_after_and_three_judgements(tmp_path):
    said = []
    reports = run_demo(tmp_path / "demo", settings=[*MICRO_RL, "rl.max_steps=1"], say=said.append)
    text = "\n".join(said)
    assert all(title in text for _, title in SHOWN)
    assert "always 4" in text
    assert text.count("because") == 3
    assert reports["before"].keys() == reports["after"].keys()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(ConfigError, match="holds no demo"):
        run_demo(tmp_path / "other", say=quiet)


def test_the_majority_by_hand():
    from graded_pairs import make_pair

    found = majority([make_pair(label) for label in (2, 2, 4, 1)])
    # F1 of label 2: 2 * 2 / (4 + 2) = 2/3; of 1 and 4: 0; 3 is absent
    assert found == {"label": 2, "accuracy": 0.5, "macro_f1": pytest.approx(2 / 9)}


class TestOwnReward:
    def test_what_raises_or_hangs_is_named(self):
        def broken(parsed, pairs):
            raise KeyError("clicks")

        def endless(parsed, pairs):
            time.sleep(5)
            return torch.zeros(len(pairs))

        with pytest.raises(RewardError, match="reward 'clicks' raised KeyError"):
            own_reward("clicks", broken)([], [])
        with pytest.raises(RewardError, match=r"gave no answer within 0\.05 s"):
            own_reward("slow", endless, timeout_s=0.05)([], [])

    def test_its_numbers_are_the_reward(self):
        rewards = own_reward("half", lambda parsed, pairs: torch.full((len(pairs),), 0.5))([], [])
        assert rewards.total.shape == (0,)
