"""Calibration: what a table may hold, which one holds where, and that choosing follows it."""

import json
import threading
from dataclasses import replace

import pytest
import torch

from recis_kernels import calibration, threads
from recis_kernels.calibration import BUILT_IN, Calibration
from recis_kernels.dispatch import choose


@pytest.fixture
def no_file(tmp_path, monkeypatch):
    """A cache folder of the test's own, with nothing in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibration.of_this_machine.cache_clear()
    yield tmp_path
    calibration.of_this_machine.cache_clear()


def test_json_and_back():
    table = Calibration(machine="m, 2 cores", measured_at="2026-11-21T11:00:00", thread_hand_over_us=12.5)
    data = json.loads(json.dumps(calibration.to_json(table)))
    assert data["format"] == "recis-calibration"
    assert calibration.from_json(data) == table


def test_a_table_of_an_older_release_has_built_in_values():
    data = {"format": "recis-calibration", "version": 1, "find_keys_per_program": 128}
    assert calibration.from_json(data) == replace(BUILT_IN, find_keys_per_program=128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format must be 'recis-calibration'; got 'other'"),
        ({"version": 2}, "version must be 1..1; got 2"),
        ({"version": True}, "version must be 1..1; got True"),
        ({"speed": 1}, "unknown field 'speed'"),
        ({"thread_hand_over_us": 0}, r"thread_hand_over_us must lie in 0.1..100000 us; got 0"),
        ({"thread_hand_over_us": float("nan")}, r"thread_hand_over_us must lie in"),
        ({"thread_hand_over_us": "fast"}, "thread_hand_over_us must be a number; got 'fast'"),
        ({"numba_from_items": -1}, "numba_from_items must be at least 0; got -1"),
        ({"numba_from_items": 1.5}, "numba_from_items must be a whole number; got 1.5"),
        ({"bucketed_sort_from_ids": -2}, "bucketed_sort_from_ids must be at least 0; got -2"),
        ({"reduce_duplicates_by": "magic"}, "reduce_duplicates_by must be one of .*; got 'magic'"),
        ({"gather_tile_items": 384}, "gather_tile_items must be a power of two in 128..4096; got 384"),
        ({"gather_tile_items": 8192}, "gather_tile_items must be a power of two in 128..4096; got 8192"),
        ({"find_keys_per_program": 8}, "find_keys_per_program must be a power of two in 16..256; got 8"),
        ({"block_items": True}, "block_items must be a whole number; got True"),
        ({"machine": 3}, "machine must be text; got 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_tables_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        calibration.from_json({**calibration.to_json(BUILT_IN), **changes})


def test_no_table_at_all():
    with pytest.raises(ValueError, match="format must be 'recis-calibration'; got 'list'"):
        calibration.from_json([1])


def test_an_unknown_machine_has_the_built_in_table(no_file):
    assert calibration.current() is BUILT_IN
    assert calibration.default_path().parent == no_file / "recis"


def test_the_file_of_this_machine_is_read_once(no_file):
    table = replace(BUILT_IN, machine="here", block_items=2048)
    calibration.save(table, calibration.default_path())
    assert calibration.current() == table
    calibration.default_path().unlink()
    assert calibration.current() == table
    assert list(calibration.default_path().parent.iterdir()) == []


def test_a_damaged_file_is_named(no_file):
    path = calibration.default_path()
    path.parent.mkdir(parents=True)
    path.write_text('{"format": "recis-')
    with pytest.raises(ValueError, match=rf"{path.name}: .*; write it anew with `recis roofline --calibrate`"):
        calibration.current()
    with calibration.use(BUILT_IN):
        assert calibration.current() is BUILT_IN


def test_use_is_nested_and_belongs_to_its_thread(no_file):
    inner, outer, seen = replace(BUILT_IN, block_items=256), replace(BUILT_IN, block_items=512), []
    with calibration.use(outer):
        with calibration.use(inner):
            assert calibration.current() is inner
        assert calibration.current() is outer
        thread = threading.Thread(target=lambda: seen.append(calibration.current()))
        thread.start()
        thread.join()
    assert seen == [BUILT_IN]
    assert calibration.current() is BUILT_IN


def test_machine_name_as_a_file_name():
    assert calibration.machine_slug("AMD EPYC(TM) 9B45, 2 cores, H200") == "amd-epyc-tm-9b45-2-cores-h200"
    assert calibration.machine_slug(calibration.machine_name())


def test_a_dear_hand_over_makes_fewer_shares():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with calibration.use(BUILT_IN):
            assert len(threads.split(16384, min_items=4096)) == 4
        with calibration.use(replace(BUILT_IN, thread_hand_over_us=60)):
            assert threads.split(16384, min_items=4096) == [(0, 8192), (8192, 16384)]
        with calibration.use(replace(BUILT_IN, thread_hand_over_us=15)):
            assert len(threads.split(16384, min_items=8192)) == 4
            assert threads.split(1, min_items=1) == [(0, 1)]
    finally:
        torch.set_num_threads(before)


def test_small_tensors_go_to_torch_from_where_the_table_says():
    def pick(count, **versions):
        return choose("auto", torch.empty(count), **versions)()

    both = {"numba": lambda: "numba", "torch": lambda: "torch"}
    with calibration.use(BUILT_IN):
        assert pick(0, **both) == "numba"
    with calibration.use(replace(BUILT_IN, numba_from_items=100)):
        assert pick(99, **both) == "torch"
        assert pick(100, **both) == "numba"
        assert pick(1, numba=both["numba"]) == "numba"
        assert choose("numba", torch.empty(1), **both)() == "numba"
