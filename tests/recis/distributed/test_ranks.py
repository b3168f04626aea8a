"""What a rank says when another one fails, is lost, or hangs; and batches cut by samples."""

import itertools
import threading

import pytest
import torch

from recis.distributed.batches import part_bounds, samples_of
from recis.distributed.config import Parallel
from recis.distributed.ranks import RankError, Ranks
from recis.errors import ConfigError
from recis.io.batch import Batch
from recis.jagged import JaggedTensor, KeyedJaggedTensor


class DictStore:
    """The part of torch's stores that notes need."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]


@pytest.fixture
def job(monkeypatch) -> list[Ranks]:
    """Three ranks at step 12 that share a store, and do not wait for notes."""
    monkeypatch.setattr("recis.distributed.ranks._NOTE_WAIT_S", 0.05)
    store = DictStore()
    ranks = [Ranks(rank, 3, store=store, timeout_s=30) for rank in range(3)]
    for one in ranks:
        one.step = 12
    return ranks


def test_a_rank_that_failed_is_quoted(job):
    job[2].leave_note("error", "DataError: clicks.parquet,\n row 3")
    job[1].leave_note("lost", "rows")
    assert job[0].explain("lost", "rows") == "rank 2 failed in step 12: DataError: clicks.parquet, row 3"


def test_a_silent_rank_is_named_with_what_was_waited_for(job):
    job[1].leave_note("lost", "rows of table 'user'")
    said = job[0].explain("lost", "gradients of table 'user'")
    assert said == (
        "step 12, gradients of table 'user': rank 2 gives no sign of life: killed or lost; start again with --resume"
    )


def test_a_hung_rank_is_told_from_a_lost_one_by_anyone_s_time_limit(job):
    job[1].leave_note("timeout", "rows")
    said = job[0].explain("lost", "stopped by torchrun")
    assert said is not None
    assert "rank 2 gives no sign of life: hung, nothing came within timeout_s=30" in said


def test_ranks_at_different_places_are_told_apart(job):
    job[1].leave_note("timeout", "scores")
    job[2].leave_note("timeout", "scores")
    said = job[0].explain("timeout", "losses")
    assert said is not None
    assert "other ranks are at step 12, scores: they do not run the same steps" in said


def test_the_first_note_of_a_rank_stays(job):
    job[2].leave_note("error", "the cause")
    job[2].leave_note("stopped", "what came of it")
    assert "the cause" in (job[0].explain("lost", "rows") or "")


def test_ranks_meet_and_do_not_wait_for_one_that_failed(job):
    threads = [threading.Thread(target=one.meet, args=("the end",)) for one in job[1:]]
    for thread in threads:
        thread.start()
    job[0].meet("the end")
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    job[2].leave_note("error", "the cause")
    with pytest.raises(RankError, match="rank 2 failed in step 12: the cause"):
        job[0].meet("the end of more")


def test_on_rank_0_alone():
    ranks = Ranks()
    assert ranks.on_rank_0(lambda: 5, "work") == 5
    with pytest.raises(KeyError):
        ranks.on_rank_0(lambda: {}["missing"], "work")


def test_parts_must_be_a_multiple_of_the_processes():
    assert Parallel().parts_over(3) == 3
    assert Parallel(parts=6).parts_over(3) == 6
    with pytest.raises(ConfigError, match=r"parallel.parts=4 must be a multiple of the 3 processes.*parallel.parts=6"):
        Parallel(parts=4).parts_over(3)
    with pytest.raises(ConfigError, match="parts must be at least 1 or None; got 0"):
        Parallel(parts=0)
    with pytest.raises(ConfigError, match="rows_dtype must be float32, bfloat16 or float16; got 'int8'"):
        Parallel(rows_dtype="int8")  # pyright: ignore[reportArgumentType]


def test_samples_of_a_batch():
    """Samples 1 and 2 of 4: ids, weights, dense values, labels and nested extras of those alone."""
    sparse = KeyedJaggedTensor(
        keys=("a", "b"),
        values=torch.arange(10),
        lengths=torch.tensor([1, 2, 0, 1, 2, 1, 3, 0]),
        weights=torch.arange(10.0),
        stride=4,
    )
    nested = JaggedTensor(values=JaggedTensor.from_lists([[1], [2, 3], [], [4]]), lengths=torch.tensor([1, 1, 1, 1]))
    batch = Batch(
        sparse=sparse,
        dense=torch.arange(4.0)[:, None],
        dense_keys=("d",),
        dense_widths=(1,),
        labels=torch.arange(4.0)[:, None],
        label_mask=None,
        label_weights=None,
        weights=torch.ones(4),
        group_ids=torch.arange(4),
        extras={"rows": torch.arange(4), "texts": nested},
        num_samples=4,
    )
    part = samples_of(batch, 1, 3)
    assert part.num_samples == 2
    assert part.sparse.values.tolist() == [1, 2, 6, 7, 8, 9]
    assert part.sparse.lengths.tolist() == [2, 0, 1, 3]
    assert part.sparse.weights is not None
    assert part.sparse.weights.tolist() == [1, 2, 6, 7, 8, 9]
    assert part.dense.tolist() == [[1.0], [2.0]]
    assert part.group_ids is not None
    assert part.group_ids.tolist() == [1, 2]
    texts = part.extras["texts"]
    assert isinstance(texts, JaggedTensor)
    assert texts.to_lists() == [[[2, 3]], [[]]]
    bounds = part_bounds(4, 3)
    assert bounds == [0, 1, 2, 4]
    pieces = [samples_of(batch, start, stop).sparse for start, stop in itertools.pairwise(bounds)]
    assert sum(piece.values.numel() for piece in pieces) == 10
    assert samples_of(batch, 2, 2).sparse.values.numel() == 0
