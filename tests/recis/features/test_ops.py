"""Parameters of ops are checked when they are made; the error names op, rule and value."""

import math
from typing import Any

import pytest

from recis.errors import ConfigError
from recis.features import (
    Bucketize,
    Clip,
    Cross,
    Dedup,
    Hash,
    LastN,
    Log,
    MinMax,
    Mod,
    MultiHash,
    Normalize,
    Sequence,
    TimeWindow,
    Truncate,
    Vocab,
)

ANY: dict[str, Any] = {word: word for word in ("sha", "middle", "some", "h", "LastN")}  # past the type checker


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Hash(ANY["sha"]), "Hash: kind must be one of farm, murmur; got 'sha'"),
        (lambda: Hash("farm", -1), r"Hash: num_buckets must be None or in \[0, 2\*\*63\); got -1"),
        (lambda: Cross("a", "b", 2**63), "Cross: num_buckets"),
        (lambda: Mod(0), r"Mod: n must be in \[1, 2\*\*63\); got 0"),
        (lambda: Bucketize((1.0, 0.0)), "Bucketize: boundaries must ascend"),
        (lambda: Bucketize((math.nan,)), "Bucketize: boundaries must be finite"),
        (lambda: Truncate(-1), "Truncate: keep and level must be at least 0; got -1 and 0"),
        (lambda: Truncate(1, drop=ANY["middle"]), 'Truncate: drop must be "left" or "right"'),
        (lambda: MultiHash((1, 2, 3, 4, 5)), "MultiHash: num_buckets must name 1 to 4"),
        (lambda: Log(math.inf), "Log: offset must be finite"),
        (lambda: Normalize(0.0, 0.0), "Normalize: std must be above 0"),
        (lambda: MinMax(1.0, 1.0), "MinMax: high must be above low"),
        (lambda: Clip(2.0, 1.0), "Clip: low must not be above high"),
        (lambda: LastN(-1), "LastN: n must be at least 0"),
        (lambda: Dedup(keep=ANY["some"]), 'Dedup: keep must be "first" or "last"'),
        (lambda: TimeWindow(-1, time="t", now="n"), "TimeWindow: seconds must be at least 0"),
        (lambda: TimeWindow(1, time="t", now="n", unit=ANY["h"]), "TimeWindow: unit must be one of s, ms, us, ns"),
        (lambda: Sequence(ANY["LastN"]), "Sequence: rule must be LastN, Dedup or TimeWindow"),
        (lambda: Vocab("v.txt", unknown=2**63), "Vocab: unknown must be an int64"),
    ],
    ids=range(19),
)
def test_wrong_parameters_are_refused(make, text):
    with pytest.raises(ConfigError, match=text):
        make()


def test_lists_become_tuples_so_that_ops_compare_and_hash():
    assert Bucketize([1, 2]) == Bucketize((1, 2))  # type: ignore[arg-type]
    assert hash(MultiHash([3, 4])) == hash(MultiHash((3, 4)))  # type: ignore[arg-type]
