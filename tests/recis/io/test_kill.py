"""A reader that is killed with SIGKILL and started again goes on where the last saved position stands (B23)."""

import json
import multiprocessing
import random

import io_data
from io_data import make_config, read_all, write_row_groups


def test_killed_again_and_again(tmp_path):
    folder = write_row_groups(tmp_path / "data", [[200, 150, 90], [300], [100, 70, 50]])
    straight, _ = read_all(make_config(folder, shuffle_rows=40, epochs=2))
    state_file, finished = tmp_path / "state.json", tmp_path / "finished"
    context = multiprocessing.get_context("forkserver")  # a fresh interpreter that forks: torch is imported once
    context.set_forkserver_preload(["torch", "pyarrow.parquet", "fsspec"])
    chance = random.Random(23)
    kills, steps_at_kill = 0, []
    while not finished.exists():
        assert kills < 60, "no progress between kills"
        arguments = (str(folder), str(tmp_path), chance.choice([1, 2, 4]))
        process = context.Process(target=io_data.read_and_save, args=arguments)
        process.start()
        if kills < 5:
            steps_before = number_of_steps(state_file)
            while number_of_steps(state_file) <= steps_before + 3 and process.is_alive():
                process.join(0.001)
            process.join(chance.uniform(0, 0.01))
            process.kill()
            kills += 1
        process.join(60)
        assert process.exitcode in (0, -9)
        steps_at_kill.append(number_of_steps(state_file))
    assert len({*steps_at_kill}) >= 5, f"kills did not hit different places: {steps_at_kill}"
    assert steps_at_kill == sorted(steps_at_kill)
    steps = json.loads(state_file.read_text())["steps"]
    assert [sorted(step) for step in steps] == [sorted(step) for step in straight]


def number_of_steps(state_file):
    return len(json.loads(state_file.read_text())["steps"]) if state_file.exists() else 0
