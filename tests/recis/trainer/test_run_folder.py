"""The run folder: empty or resumed, one config, one writer, left-overs cleaned."""

import json
from typing import Any

import pytest

from recis.distributed import Parallel
from recis.errors import CheckpointError, ConfigError
from recis.trainer.run_folder import RunFolder, read_config
from recis.trainer.serialize import to_json

CONFIG = json.dumps({"steps": 1, "optimizer": {"lr": 0.1}})


def test_new_run_writes_its_config(tmp_path):
    folder = RunFolder(tmp_path / "a" / "run", CONFIG, resume=False)
    assert read_config(tmp_path / "a" / "run") == json.loads(CONFIG)
    folder.close()


def test_folder_that_is_not_empty(tmp_path):
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(ConfigError, match=r"not empty \(it has photo\.jpg\); add --resume"):
        RunFolder(tmp_path, CONFIG, resume=False)


def test_resume_with_the_same_config(tmp_path):
    RunFolder(tmp_path, CONFIG, resume=False).close()
    (tmp_path / ".tmp-step_000000003-abcd").mkdir()
    RunFolder(tmp_path, CONFIG, resume=True).close()
    assert not (tmp_path / ".tmp-step_000000003-abcd").exists()


def test_resume_with_another_config(tmp_path):
    RunFolder(tmp_path, CONFIG, resume=False).close()
    with pytest.raises(ConfigError, match=r"another config: optimizer\.lr: 0\.1 -> 0\.2"):
        RunFolder(tmp_path, json.dumps({"steps": 1, "optimizer": {"lr": 0.2}}), resume=True)


def config_of(**settings: Any) -> str:
    return json.dumps({"steps": 1, "parallel": to_json(Parallel(**settings))})


@pytest.mark.parametrize(
    ("name", "value"), [("overlap", False), ("timeline_steps", 3), ("link_delay_ms", 5.0), ("timeout_s", 9.0)]
)
def test_resume_with_another_setting_that_changes_no_value(tmp_path, name, value):
    RunFolder(tmp_path, config_of(), resume=False).close()
    RunFolder(tmp_path, config_of(**{name: value}), resume=True).close()
    assert read_config(tmp_path) == json.loads(config_of())  # how the run was started


@pytest.mark.parametrize(("name", "value"), [("parts", 4), ("rows_dtype", "bfloat16")])
def test_resume_with_a_setting_that_changes_values(tmp_path, name, value):
    RunFolder(tmp_path, config_of(), resume=False).close()
    with pytest.raises(
        ConfigError, match=rf"another config: parallel\.{name}: .* -> .*\(parallel\.overlap, .* may differ\)"
    ):
        RunFolder(tmp_path, config_of(**{name: value}, overlap=False), resume=True)


def test_resume_where_no_run_began(tmp_path):
    RunFolder(tmp_path / "new", CONFIG, resume=True).close()
    assert read_config(tmp_path / "new") == json.loads(CONFIG)


def test_two_writers(tmp_path):
    first = RunFolder(tmp_path, CONFIG, resume=False)
    with pytest.raises(ConfigError, match="another process is writing"):
        RunFolder(tmp_path, CONFIG, resume=True)
    first.close()
    RunFolder(tmp_path, CONFIG, resume=True).close()


def test_unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        RunFolder(tmp_path / "file" / "run", CONFIG, resume=False)


def test_config_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="no run here"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not whole JSON"):
        read_config(tmp_path)


def test_what_a_killed_start_left_is_nothing(tmp_path):
    (tmp_path / ".tmp-config.json").write_text('{"st')
    folder = RunFolder(tmp_path, CONFIG, resume=False)
    assert sorted(item.name for item in tmp_path.iterdir()) == [".lock", "config.json"]
    folder.close()
