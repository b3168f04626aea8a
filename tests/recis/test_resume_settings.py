"""What a resumed run may be asked otherwise than it was started with: settings that change no value, and no others."""

import click_recipe
import pytest
from command import same_end

from recis.errors import ConfigError
from recis.runs import start_run

RECIPE = "click_recipe:clicks"


@pytest.fixture
def started(tmp_path):
    """Return a function that starts the run or goes on with it, and a straight run."""
    data = click_recipe.write(tmp_path / "clicks.parquet", click_recipe.table())

    def start(name, *settings, resume=False):
        return start_run(
            RECIPE, data=None if resume else str(data), out=tmp_path / name, settings=settings, resume=resume
        )

    return start


PARTS = ("parallel.parts=2", "batch=64", "train_data.num_lanes=2")


def test_settings_that_change_no_value_are_the_new_ones(started, tmp_path):
    straight = started("straight", *PARTS)
    straight.train()
    run = started("run", *PARTS, "parallel.timeout_s=70", "parallel.overlap=false")
    run.trainer.close()
    again = started("run", "parallel.overlap=true", "parallel.timeline_steps=2", resume=True)
    parallel = again.config.parallel
    assert (parallel.overlap, parallel.timeline_steps, parallel.timeout_s, parallel.parts) == (True, 2, 70.0, 2)
    assert again.config.train_data.batch_size == 64  # what was not named is as it was
    again.trainer.close()
    free = ("parallel.timeout_s=80", "parallel.link_delay_ms=1", "parallel.places.hot_ids=5")
    last = started("run", *PARTS, *free, resume=True)
    parallel = last.config.parallel
    assert (parallel.overlap, parallel.timeline_steps, parallel.timeout_s, parallel.link_delay_ms) == (
        False,
        0,
        80.0,
        1.0,
    )
    assert parallel.places.hot_ids == 5
    last.train()
    same_end(tmp_path / "straight", tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (("parallel.parts=4",), r'settings\.parallel\.parts: "2" -> "4"'),
        (("parallel.rows_dtype=float16", *PARTS), r'settings\.parallel\.rows_dtype: "\(absent\)" -> "float16"'),
        (("parallel.overlap=false", "max_steps=3"), r'settings\.max_steps: "\(absent\)" -> "3"'),
    ],
)
def test_settings_that_change_values_are_refused(started, settings, text):
    started("run", *PARTS).trainer.close()
    with pytest.raises(ConfigError, match=rf"was started otherwise: .*{text}.*--set may name parallel\.overlap"):
        started("run", *settings, resume=True)
