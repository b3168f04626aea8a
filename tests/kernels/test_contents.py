"""Inside `checks()` every op that takes offsets, row numbers or other indices looks at them; outside nothing is read.

A case is an op with arguments that are right, and changes to them that are wrong in content alone, each with what the error
must say. Triton's versions are asked too: an op that let a bad index through would read or write foreign memory there.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from recis_kernels import checks, contents
from recis_kernels.attention_inputs import TimeBias
from recis_kernels.bag_factors import bag_factors
from recis_kernels.bucketize import Boundaries, bucketize
from recis_kernels.embedding_bag import embedding_bag, factor_grads, row_gather, tile_positions
from recis_kernels.feature_cross import feature_cross
from recis_kernels.hash_index import HashIndex, erase, find, find_or_insert, insert
from recis_kernels.hstu_attention import hstu_attention
from recis_kernels.id_hash import hash_ids, hash_strings
from recis_kernels.id_mod import id_mod
from recis_kernels.jagged import (
    bag_of_value,
    jagged_to_padded,
    lengths_to_offsets,
    merge_offsets,
    offsets_to_lengths,
    padded_to_jagged,
)
from recis_kernels.jagged_attention import jagged_attention
from recis_kernels.jagged_runs import concat_bags, gather_runs, permute_bags, scatter_runs, split_bags
from recis_kernels.linear_cross_entropy import linear_cross_entropy
from recis_kernels.multi_hash import linear_hashes, multi_hash
from recis_kernels.ragged_distinct import ragged_distinct
from recis_kernels.ragged_truncate import keep_where, ragged_take, ragged_truncate, take_runs
from recis_kernels.row_allocator import RowAllocator, find_or_insert_rows
from recis_kernels.row_blocks import RowBlocks, RowLayout
from recis_kernels.row_copies import copy_rows, read_either
from recis_kernels.row_grads import PendingLookup, RowGrad, merge_lookups, reduce_grads, reduce_lookups, row_square_sums
from recis_kernels.row_init import InitKind, InitSpec, admission_draws, init_rows, initial_values
from recis_kernels.row_rules import SGD
from recis_kernels.segment import segment_max, segment_mean, segment_softmax, segment_sum
from recis_kernels.soft_logic import goedel_pool, lukasiewicz_pool, product_pool
from recis_kernels.sparse_update import fused_update, fused_update_flags, update_rows
from recis_kernels.token_logprob import token_logprob, token_stats
from recis_kernels.unique_ids import order_by_segment_and_id, unique_ids, unique_ids_padded
from recis_kernels.vocab_lookup import IdVocab, StringVocab, id_vocab, lookup_ids, lookup_strings, string_vocab

ALL = ("auto", "triton", "reference")
LOOPS = ("auto", "triton")
NONE = ("none",)  # the op has one version and takes no impl

Changes = tuple[tuple[dict[str, Any], str], ...]


@dataclass(frozen=True)
class Case:
    """An op, arguments that are right, and wrong changes to them with what the error says."""

    op: Callable[..., Any]
    impls: tuple[str, ...]
    good: Callable[[], dict[str, Any]]
    bad: Changes
    always: bool = False
    """Whether the op looks outside checks() too."""

    @property
    def name(self) -> str:
        return self.op.__name__

    def run(self, impl: str, **changes: Any) -> Any:
        return self.op(**(self.good() | changes), **({} if impl == "none" else {"impl": impl}))


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def whole(name: str) -> Changes:
    """Return wrong forms of offsets [0, 2, 2, 5] over five values that must go from 0 to 5."""
    return (
        ({name: ints(0, 3, 2, 5)}, rf"{name} must ascend from 0 to 5; {name}\[1\] is 3 and {name}\[2\] is 2"),
        ({name: ints(1, 2, 2, 5)}, f"{name} must ascend from 0 to 5; they go from 1 to 5"),
        ({name: ints(0, 2, 2, 6)}, f"{name} must ascend from 0 to 5; they go from 0 to 6"),
    )


def within(name: str) -> Changes:
    """Return wrong forms of offsets [0, 2, 2, 5] that must stay within five values."""
    return (
        ({name: ints(0, 3, 2, 5)}, rf"{name} must ascend within 0\.\.5; {name}\[1\] is 3 and {name}\[2\] is 2"),
        ({name: ints(-1, 2, 2, 5)}, rf"{name} must ascend within 0\.\.5; they go from -1 to 5"),
        ({name: ints(0, 2, 2, 6)}, rf"{name} must ascend within 0\.\.5; they go from 0 to 6"),
    )


OFFSETS = ints(0, 2, 2, 5)
VALUES = torch.arange(10.0).view(5, 2)
IDS = ints(7, 7, 8, 9, 7)


# ---- jagged and segment


def _jagged() -> list[Case]:
    return [
        Case(
            lengths_to_offsets,
            NONE,
            lambda: {"lengths": ints(2, 0)},
            (({"lengths": ints(2, -1)}, "lengths must be at least 0; got -1"),),
        ),
        Case(
            offsets_to_lengths,
            NONE,
            lambda: {"offsets": OFFSETS},
            (({"offsets": ints(0, 2, 1)}, "offsets must ascend from at least 0"),),
        ),
        Case(bag_of_value, ALL, lambda: {"offsets": OFFSETS, "num_values": 5}, whole("offsets")),
        Case(
            merge_offsets,
            NONE,
            lambda: {"parts": [OFFSETS, ints(0, 3)]},
            (
                ({"parts": [OFFSETS, ints(0, 3, 2)]}, r"parts\[1\] must ascend from 0; parts\[1\]\[1\] is 3"),
                ({"parts": [ints(1, 2)]}, r"parts\[0\] must ascend from 0; they go from 1"),
            ),
        ),
        Case(
            jagged_to_padded,
            ALL,
            lambda: {"values": VALUES, "offsets": OFFSETS, "max_length": 2},
            (
                ({"offsets": ints(0, 3, 2, 5)}, "offsets must ascend"),
                ({"offsets": ints(1, 2, 2, 5)}, "offsets must ascend from 0"),
                ({"offsets": ints(0, 2, 2, 6)}, r"offsets must ascend within 0\.\.5"),
            ),
        ),
        Case(
            padded_to_jagged,
            ALL,
            lambda: {"padded": torch.ones(3, 2), "offsets": OFFSETS, "num_values": 5},
            whole("offsets"),
        ),
    ]


def _runs() -> list[Case]:
    def starts(rule: str, *numbers: int) -> tuple[dict[str, Any], str]:
        return {"starts": ints(*numbers)}, rule

    wrong_starts = (
        starts(r"runs must lie within 0\.\.8; starts\[0\] is -1, and 2 rows long", -1, 2, 3),
        starts(r"runs must lie within 0\.\.8; starts\[2\] is 6, and 3 rows long", 0, 2, 6),
        starts(r"runs must lie within 0\.\.8; starts\[2\] is 9223372036854775807", 0, 2, 2**63 - 1),
        starts(r"runs must not overlap; starts\[2\] is 3, 3 rows long, and starts\[0\] is 5", 5, 5, 3),
    )
    sides = {"first_offsets": OFFSETS, "second_offsets": ints(0, 0, 1, 2)}
    second = {"second_offsets": ints(0, 1, 0, 2)}, r"second_offsets must ascend from 0 to 2; second_offsets\[1\] is 1"
    return [
        Case(
            gather_runs,
            ALL,
            lambda: {"values": torch.ones(8, 2), "starts": ints(5, 5, 0), "offsets": OFFSETS, "num_taken": 5},
            (*whole("offsets"), *wrong_starts),
        ),
        Case(
            scatter_runs,
            ALL,
            lambda: {"packed": VALUES, "starts": ints(5, 5, 0), "offsets": OFFSETS, "num_rows": 8},
            (*whole("offsets"), *wrong_starts),
        ),
        Case(
            permute_bags,
            ALL,
            lambda: {"values": VALUES, "offsets": OFFSETS, "order": ints(2, 0, 1)},
            (
                *whole("offsets"),
                ({"order": ints(2, 0, 3)}, r"order must lie in 0\.\.2; got 0\.\.3"),
                ({"order": ints(1, 0, 1)}, "order must be distinct; 1 stands more than once"),
            ),
        ),
        Case(
            concat_bags,
            ALL,
            lambda: {"first": VALUES, "second": torch.ones(2, 2)} | sides,
            (*whole("first_offsets"), second),
        ),
        Case(
            split_bags,
            ALL,
            lambda: {"values": torch.ones(7, 2), "num_first": 5} | sides,
            (*whole("first_offsets"), second),
        ),
    ]


def _segment() -> list[Case]:
    ops = segment_sum, segment_mean, segment_max, segment_softmax
    return [Case(op, (*ALL, "torch"), lambda: {"values": VALUES, "offsets": OFFSETS}, whole("offsets")) for op in ops]


# ---- rows


def _blocks(num_rows: int = 8) -> RowBlocks:
    blocks = RowBlocks(RowLayout(2), shift=2)
    blocks.grow(num_rows)
    return blocks


WRONG_ROWS: Changes = (
    ({"rows": ints(0, 8, 2)}, r"rows must lie in -1\.\.7; got 0\.\.8"),
    ({"rows": ints(0, -2, 2)}, r"rows must lie in -1\.\.7; got -2\.\.2"),
)
WRONG_INVERSE: Changes = (
    ({"inverse": ints(0, 1, 2, 3, 0)}, r"inverse must lie in -1\.\.2; got 0\.\.3"),
    ({"inverse": ints(0, -2, 2, 0, 0).int()}, r"inverse must lie in -1\.\.2; got -2\.\.2"),
)


def _pooling() -> list[Case]:
    def lookup() -> dict[str, Any]:
        return {"blocks": _blocks(), "rows": ints(3, -1, 7), "inverse": ints(0, 2, -1, 1, 0)}

    return [
        Case(row_gather, ALL, lookup, (*WRONG_ROWS, *WRONG_INVERSE)),
        Case(
            embedding_bag,
            ALL,
            lambda: lookup() | {"offsets": OFFSETS, "factors": torch.ones(5)},
            (*WRONG_ROWS, *WRONG_INVERSE, *within("offsets")),
        ),
        Case(
            factor_grads,
            ALL,
            lambda: lookup() | {"offsets": OFFSETS, "grad": torch.ones(3, 2)},
            (*WRONG_ROWS, *WRONG_INVERSE, *within("offsets")),
        ),
        Case(
            tile_positions,
            NONE,
            lambda: {"offsets": OFFSETS, "num_kept": 2},
            (({"offsets": ints(0, 2, 1)}, "offsets must ascend"), ({"offsets": ints(-1, 2)}, "offsets must ascend")),
        ),
        Case(
            bag_factors,
            (*ALL, "torch"),
            lambda: {"offsets": OFFSETS, "weights": torch.ones(5), "mean": True},
            (
                *within("offsets"),
                ({"offsets": ints(0, 3, 2), "weights": None}, "offsets must ascend"),
                ({"offsets": ints(0, 6), "weights": None, "num_positions": 5}, r"offsets must ascend within 0\.\.5"),
            ),
        ),
    ]


VIEW = RowGrad(ints(0, 2, -1, 1, 0), OFFSETS, 3, grad=torch.ones(3, 2), factors=torch.ones(5))


def _lookup(**changes: Any) -> PendingLookup:
    return PendingLookup(ints(3, -1, 7), ints(0, 0, 0).int(), ints(1, 1, 1).int(), [replace(VIEW, **changes)])


def _gradients() -> list[Case]:
    wrong = (*WRONG_INVERSE, *within("offsets"))
    in_views = tuple(({"views": [replace(VIEW, **change)]}, message) for change, message in wrong)
    in_lookup = tuple(({"lookup": _lookup(**change)}, message) for change, message in wrong)
    in_lookups = tuple(({"lookups": [_lookup(**change)]}, message) for change, message in wrong)
    of_two = tuple(({"lookups": [_lookup(), _lookup(**change)]}, message) for change, message in WRONG_INVERSE)
    wrong_rows = tuple(
        ({"lookups": [replace(_lookup(), **change)]}, message)
        for change, message in (
            *WRONG_ROWS,
            ({"rows": ints(3, 3, -1)}, "rows must be distinct; 3 stands more than once"),
            ({"table_of_row": ints(0, 0, 1).int()}, r"table_of_row must lie in 0\.\.0; got 0\.\.1"),
            ({"table_of_row": ints(0, 0, -1).int()}, r"table_of_row must lie in 0\.\.0; got -1\.\.0"),
        )
    )
    scalars = torch.zeros(1, len(SGD.scalars), dtype=torch.float64)

    def update() -> dict[str, Any]:
        return {"blocks": _blocks(), "lookups": [_lookup()], "rule": SGD, "scalars": scalars, "step": 1}

    def apart() -> dict[str, Any]:
        return {"blocks": _blocks(), "rows": ints(3, -1, 7), "grads": torch.ones(3, 2), "rule": SGD} | {
            "scalars": scalars,
            "step": 1,
        }

    return [
        Case(reduce_grads, ALL, lambda: {"views": [VIEW], "num_rows": 3, "dim": 2}, in_views),
        Case(reduce_lookups, LOOPS, lambda: {"lookups": [_lookup()], "dim": 2}, (*in_lookups, *of_two)),
        Case(merge_lookups, ("auto",), lambda: {"lookups": [_lookup(), _lookup()]}, of_two),
        Case(row_square_sums, LOOPS, lambda: {"lookup": _lookup(), "dim": 2}, in_lookup),
        Case(fused_update, ALL, update, (*in_lookups, *of_two, *wrong_rows)),
        Case(fused_update_flags, ALL, update, (*in_lookups, *of_two, *wrong_rows)),
        Case(
            update_rows,
            ALL,
            apart,
            (*WRONG_ROWS, ({"table_of_row": ints(0, 0, 1).int()}, r"table_of_row must lie in 0\.\.0")),
        ),
    ]


def _first_values() -> list[Case]:
    spec = InitSpec(InitKind.UNIFORM, -1, 1)
    wrong_tables = (
        ({"tables": ints(0, 2, 1)}, r"tables must lie in 0\.\.1; got 0\.\.2"),
        ({"tables": ints(0, -1, 1).int()}, r"tables must lie in 0\.\.1; got -1\.\.1"),
        ({"tables": ints(0, 2**32, 1)}, r"tables must lie in 0\.\.1; got 0\.\.4294967296"),  # 0 once it is int32
    )

    def ids() -> dict[str, Any]:
        return {"ids": ints(7, 8, 9), "keys": ints(1, 2), "tables": ints(0, 1, 1)}

    return [
        Case(
            init_rows,
            ALL,
            lambda: ids() | {"blocks": _blocks(), "rows": ints(3, -1, 7), "spec": spec},
            (*WRONG_ROWS, ({"rows": ints(3, 3, -1)}, "rows must be distinct; 3"), *wrong_tables),
        ),
        Case(initial_values, ALL, lambda: ids() | {"dim": 2, "spec": spec}, wrong_tables),
        Case(admission_draws, ALL, lambda: ids() | {"step": 1}, wrong_tables),
    ]


def _stores() -> list[Case]:
    def copies() -> dict[str, Any]:
        return {"rows": ints(3, 7), "places": ints(0, 1)}

    def read(blocks: RowBlocks, rows: torch.Tensor, impl: Any) -> Any:
        return blocks.read(rows, impl=impl)

    def write(blocks: RowBlocks, rows: torch.Tensor, impl: Any) -> None:
        blocks.write(rows, {"weight": torch.zeros(rows.numel(), 2)}, impl=impl)

    wrong = tuple(({"rows": ints(3, row)}, r"rows must lie in \[0, 8\)") for row in (8, -1))
    places = {"places": ints(0, 8)}, r"places must lie in"
    return [
        Case(read, LOOPS, lambda: {"blocks": _blocks(), "rows": ints(3, 7)}, wrong, always=True),
        Case(write, LOOPS, lambda: {"blocks": _blocks(), "rows": ints(3, 7)}, wrong, always=True),
        Case(copy_rows, NONE, lambda: copies() | {"source": _blocks(), "target": _blocks()}, (*wrong, places), True),
        Case(read_either, NONE, lambda: copies() | {"blocks": _blocks(), "copies": _blocks()}, (*wrong, places), True),
    ]


# ---- ids


def _index() -> HashIndex:
    index = HashIndex()
    for segment in range(2):
        index.add_segment()
        index.insert(ints(7, 8), segment, ints(0, 1))
    return index


def _ids() -> list[Case]:
    wrong_segments = (
        ({"segments": ints(0, 2, 1)}, r"segments must lie in 0\.\.1; got 0\.\.2"),
        ({"segments": ints(0, -1, 1).int()}, r"segments must lie in 0\.\.1; got -1\.\.1"),
        ({"segments": ints(2)}, r"segments must lie in 0\.\.1; got 2\.\.2"),
    )

    def lookup() -> dict[str, Any]:
        return {"index": _index(), "ids": ints(7, 8, 9), "segments": ints(0, 1, 1)}

    def allocate(ids: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        return torch.arange(ids.numel())

    def make_room(index: HashIndex, segments: torch.Tensor) -> None:
        index.make_room(segments, 3)

    def release(rows: torch.Tensor) -> None:
        allocator = RowAllocator(8)
        find_or_insert_rows(_index(), ints(1, 2, 3), 0, allocator)
        allocator.release(rows)

    return [
        Case(find, ALL, lookup, wrong_segments),
        Case(erase, ALL, lookup, wrong_segments),
        Case(
            insert,
            ALL,
            lambda: lookup() | {"rows": ints(4, 5, 6)},
            (*wrong_segments, ({"rows": ints(4, -1, 6)}, "rows must be at least 0; got -1")),
        ),
        Case(find_or_insert, ALL, lambda: lookup() | {"allocate": allocate}, wrong_segments),
        Case(
            find_or_insert_rows,
            ALL,
            lambda: lookup() | {"allocator": RowAllocator(8)},
            (
                *wrong_segments,
                ({"num_ids": ints(4)}, r"num_ids must lie in 0\.\.3; got 4\.\.4"),
                ({"num_ids": ints(-1)}, r"num_ids must lie in 0\.\.3; got -1\.\.-1"),
            ),
        ),
        Case(make_room, NONE, lambda: {"index": _index(), "segments": ints(0, 1, 1)}, wrong_segments),
        Case(
            release,
            NONE,
            lambda: {"rows": ints(2, -1, 0)},
            (({"rows": ints(2, 2)}, "released twice"), ({"rows": ints(3)}, "rows to release must be in use")),
        ),
        *(
            Case(op, (*ALL, "torch"), lambda: {"ids": IDS, "segments": ints(1, 0, 1), "offsets": OFFSETS}, wrong)
            for op in (unique_ids, unique_ids_padded)
            for wrong in [
                (
                    *whole("offsets"),
                    ({"segments": ints(0, 2**31, 1)}, r"segments must lie in 0\.\.2147483647; got 0\.\.2147483648"),
                    ({"segments": ints(0, -1, 0, 0, 0), "offsets": None}, "segments must lie in"),
                    ({"segments": ints(1), "offsets": ints(0, 4)}, "offsets must ascend from 0 to 5"),
                )
            ]
        ),
        Case(
            order_by_segment_and_id,
            (*ALL, "torch"),
            lambda: {"ids": ints(7, 8, 9), "segments": ints(0, 1, 1).int(), "num_segments": 2},
            wrong_segments[:2],
        ),
    ]


# ---- features

TEXT = torch.tensor(list(b"hello"), dtype=torch.uint8)


def _columns(last: int) -> Changes:
    """Return wrong column_offsets of two columns over `last` values: Python numbers, which every call looks at."""
    return tuple(
        ({"column_offsets": ends}, "column_offsets must")
        for ends in ((0, 1, last + 1), (1, 1, last), (0, last + 1, last))
    )


def _features() -> list[Case]:
    hashes = {"column_offsets": (0, 1, 5), "kinds": ["farm", "murmur"], "num_buckets": [None, 3]}
    strings = {"data": TEXT, "offsets": OFFSETS, "column_offsets": (0, 1, 3)}
    parameters: list[tuple[Callable[..., Any], str, Any, tuple[str, ...]]] = [
        (id_mod, "moduli", [3, 4], ALL),
        (multi_hash, "hashes", [linear_hashes([5]), linear_hashes([5, 7])], ALL),
        (lookup_ids, "vocabs", [id_vocab(ints(7)), id_vocab(ints(9, 8))], ALL),
    ]
    by_column = [
        Case(
            op,
            impls,
            lambda name=name, value=value: {"ids": IDS, "column_offsets": (0, 1, 5), name: value},
            _columns(5),
            True,
        )
        for op, name, value, impls in parameters
    ]
    slots = id_vocab(ints(9, 8)).slots
    beyond = IdVocab(ints(9, 8), torch.where(slots < 0, slots, slots + 1))
    texts = string_vocab(TEXT, OFFSETS[[0, 1, 3]])
    return [
        *by_column,
        Case(hash_ids, ALL, lambda: hashes | {"ids": IDS}, _columns(5), True),
        Case(
            bucketize,
            ALL,
            lambda: {"values": VALUES[:, 0], "column_offsets": (0, 1, 5), "boundaries": [Boundaries([1.0])] * 2},
            _columns(5),
            True,
        ),
        Case(hash_strings, ALL, lambda: hashes | strings, (*within("offsets"), *_columns(3))),
        Case(
            lookup_ids,
            ALL,
            lambda: {"ids": IDS, "column_offsets": (0, 5), "vocabs": [id_vocab(ints(9, 8))]},
            (({"vocabs": [beyond]}, r"vocabs\[0\]\.slots must lie in -1\.\.1; got -1\.\.2"),),
        ),
        Case(
            lookup_strings,
            ALL,
            lambda: strings | {"vocabs": [texts, texts]},
            (
                *within("offsets"),
                *_columns(3),
                (
                    {"vocabs": [texts, StringVocab(TEXT, ints(0, 2, 6), texts.slots)]},
                    r"vocabs\[1\]\.offsets must ascend within 0\.\.5; they go from 0 to 6",
                ),
                ({"vocabs": [texts, replace(texts, slots=texts.slots - 1)]}, r"vocabs\[1\]\.slots must lie in -1\.\.1"),
            ),
        ),
        Case(string_vocab, NONE, lambda: {"data": TEXT, "offsets": ints(0, 2, 5)}, within("offsets")),
    ]


def _ragged() -> list[Case]:
    ascend = ({"offsets": ints(0, 3, 2, 5)}, "offsets must ascend"), ({"offsets": ints(-1, 2, 2, 5)}, "offsets must")
    crossed = {
        "a": IDS,
        "a_offsets": OFFSETS,
        "b": IDS,
        "b_offsets": OFFSETS,
        "row_offsets": (0, 3),
        "num_buckets": [9],
    }
    rows = {"offsets": OFFSETS, "row_offsets": (0, 1, 3)}
    row_offsets = (
        ({"row_offsets": (0, 1, 4)}, "column_offsets must"),
        ({"row_offsets": (0, 4, 3)}, "column_offsets must"),
    )
    return [
        Case(feature_cross, ALL, lambda: crossed, (*within("a_offsets"), *within("b_offsets"), row_offsets[0])),
        Case(
            ragged_truncate,
            ALL,
            lambda: rows | {"keeps": [1, 2], "drops": ["left", "right"]},
            (*ascend, *row_offsets),
        ),
        Case(
            ragged_distinct,
            ALL,
            lambda: rows | {"ids": IDS, "keeps": ["first", "last"]},
            (*within("offsets"), *row_offsets),
        ),
        Case(
            take_runs,
            ALL,
            lambda: {"values": VALUES, "starts": ints(0, 3), "lengths": ints(2, 1), "num_taken": 3},
            (
                ({"starts": ints(0, 5)}, r"runs must lie within 0\.\.5; starts\[1\] is 5, and 1 rows long"),
                ({"starts": ints(-1, 3)}, r"runs must lie within 0\.\.5; starts\[0\] is -1"),
                ({"starts": ints(0, 1)}, r"runs must not overlap"),
                ({"lengths": ints(4, -1)}, r"lengths must lie in 0\.\.3"),
                ({"lengths": ints(1, 1)}, "num_taken must be the sum of lengths, 2; got 3"),
                # as many as there are, which are returned as they are
                (
                    {"starts": ints(2, 0), "lengths": ints(3, 2), "num_taken": 5},
                    r"starts must ascend; starts\[0\] is 2 and starts\[1\] 0",
                ),
            ),
        ),
        Case(keep_where, NONE, lambda: {"mask": IDS == 7, "offsets": OFFSETS}, within("offsets")),
        Case(
            ragged_take,
            ALL,
            lambda: {"offsets": OFFSETS, "dropped": ints(1, 0, 0), "picks": IDS - 7, "pick_offsets": OFFSETS},
            (
                *ascend,
                *whole("pick_offsets"),
                ({"dropped": ints(1, -1, 0)}, r"dropped\[1\] must lie in 0\.\.0, its row's length; got -1"),
                ({"dropped": ints(3, 0, 0)}, r"dropped\[0\] must lie in 0\.\.2, its row's length; got 3"),
            ),
        ),
    ]


# ---- models


def _attention() -> list[Case]:
    rows = {name: torch.ones(5, 1, 4) for name in ("query", "key", "value")} | {"offsets": OFFSETS}
    time = TimeBias(table=torch.zeros(1, 3), boundaries=ints(0, 5), query_times=ints(1, 2, 3, 4, 5))
    late = {"time": replace(time, boundaries=ints(5, 0))}, r"time\.boundaries must ascend"
    return [
        Case(jagged_attention, ALL, lambda: rows | {"time": time}, (*whole("offsets"), late), True),
        Case(
            jagged_attention,
            ALL,
            lambda: rows | {"key_offsets": ints(0, 1, 2, 5)},
            whole("key_offsets"),
            True,
        ),
        Case(
            hstu_attention,
            ALL,
            lambda: rows | {"time": time, "num_targets": ints(1, 0, 3)},
            (
                *whole("offsets"),
                late,
                ({"num_targets": ints(3, 0, 0)}, "num_targets must lie between 0 and"),
                ({"num_targets": ints(0, -1, 0)}, "num_targets must lie between 0 and"),
            ),
            True,
        ),
    ]


def _tokens() -> list[Case]:
    def rows() -> dict[str, Any]:
        return {"hidden": torch.ones(3, 4), "weight": torch.ones(6, 4), "targets": ints(5, -100, 0)}

    wrong = tuple(
        ({"targets": ints(5, bad, 0)}, rf"targets\[1\] is {bad}; a target must be in \[0, 6\)") for bad in (6, -1)
    )
    return [Case(op, ALL, rows, wrong) for op in (linear_cross_entropy, token_logprob, token_stats)]


def _logic() -> list[Case]:
    items = {"item_offsets": ints(0, 2, 3)}
    wrong = (
        *whole("slot_offsets"),
        ({"item_offsets": ints(0, 2, 4)}, "item_offsets must ascend from 0 to 3; they go from 0 to 4"),
        ({"item_offsets": ints(0, 3, 2, 3)}, "item_offsets must ascend from 0 to 3"),
    )
    return [
        Case(op, ALL, lambda: items | {"entity_logits": torch.zeros(5), "slot_offsets": OFFSETS}, wrong)
        for op in (product_pool, goedel_pool, lukasiewicz_pool)
    ]


CASES = [
    *(*_jagged(), *_runs(), *_segment(), *_pooling(), *_gradients(), *_first_values(), *_stores(), *_ids()),
    *(*_features(), *_ragged(), *_attention(), *_tokens(), *_logic()),
]
EVERY = [(case, impl) for case in CASES for impl in case.impls]
BY_NAME = [f"{case.name}-{impl}" for case, impl in EVERY]


@pytest.mark.parametrize(("case", "impl"), EVERY, ids=BY_NAME)
def test_bad_content_is_refused_and_good_content_passes(case, impl):
    with checks():
        case.run(impl)
        for changes, message in case.bad:
            with pytest.raises(ValueError, match=message):
                case.run(impl, **changes)


@pytest.mark.parametrize("case", [case for case in CASES if not case.always], ids=lambda case: case.name)
def test_nothing_is_looked_at_outside_checks(case, monkeypatch):
    """The switch is the only thing asked: with a checker that stands in for it, the op asks and is told no."""
    asked = []

    def told() -> bool:
        asked.append(real())
        return asked[-1]

    def look(*args: Any, **options: Any) -> None:
        raise AssertionError("contents were looked at")

    real = contents.is_asked
    for name, module in list(_kernel_modules().items()):
        if getattr(module, "is_asked", None) is real:
            monkeypatch.setattr(module, "is_asked", told)
        if name.endswith((".contents", ".attention_inputs")):
            monkeypatch.setattr(module, "require_offsets", look)
    case.run(case.impls[0])
    assert asked
    assert not any(asked)


def _kernel_modules() -> dict[str, Any]:
    return {name: module for name, module in sys.modules.items() if name.startswith("recis_kernels")}


def test_checks_read_nothing_outside():
    """Tensors of the meta device hold nothing: to read them would raise."""
    blank = torch.empty(4, dtype=torch.int64, device="meta")

    def look() -> None:
        contents.check_offsets(blank, 3)
        contents.check_range("rows", blank, 0, 3)
        contents.check_distinct("rows", blank)
        contents.check_runs(blank[1:], blank, 3)

    look()
    with checks(), pytest.raises((RuntimeError, NotImplementedError)):
        look()
    with checks(False):
        look()


def test_a_traced_graph_holds_no_checks():
    """fullgraph fails at the first number that the host reads."""

    @torch.compile(fullgraph=True, backend="eager")
    def step(values: torch.Tensor, offsets: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        padded = jagged_to_padded(segment_sum(values, offsets), ints_of(order), 2)
        return padded.sum() + tile_positions(offsets, 2).sum() + unique_ids_padded(order).num_unique

    def ints_of(order: torch.Tensor) -> torch.Tensor:
        return torch.cat((order[:1] * 0, order[:1] * 0 + 3))

    order = ints(2, 0, 1)
    want = step(VALUES, OFFSETS, order)
    with checks():
        assert torch.equal(step(VALUES, OFFSETS, order), want)


def test_empty_tensors_hold_nothing_wrong():
    none = ints()
    with checks():
        contents.check_range("rows", none, 0, -1)
        contents.check_range("rows", None, 0, -1)
        contents.check_distinct("rows", none)
        contents.check_runs(none, ints(0), 0)
        contents.check_offsets(ints(0), 0, whole=True)
        assert segment_sum(VALUES[:0], ints(0)).shape == (0, 2)
        assert row_gather(_blocks(0), none).shape == (0, 2)


def test_offsets_whose_difference_overflows():
    with checks(), pytest.raises(ValueError, match=r"offsets\[1\] is 9223372036854775807 and offsets\[2\] is -5"):
        offsets_to_lengths(ints(0, 2**63 - 1, -5, 3))


def test_runs_of_no_rows_overlap_nothing():
    with checks():
        contents.check_runs(ints(2, 0, 2, 3, 1), ints(0, 0, 2, 3, 3, 3), 3)


def test_factors_shorter_than_the_positions_are_refused_always():
    short = torch.ones(4)
    with pytest.raises(ValueError, match=r"factors must be \[5\] float32; got \(4,\)"):
        embedding_bag(_blocks(), ints(3, -1, 7), ints(0, 2, -1, 1, 0), OFFSETS, short)
    with pytest.raises(ValueError, match=r"factors must be \[5\] float32; got \(4,\)"):
        reduce_grads([replace(VIEW, factors=short)], 3, 2)


def test_other_forms_that_were_read_past_their_end_are_refused_always():
    scalars = torch.zeros(2, len(SGD.scalars), dtype=torch.float64)
    blocks = RowBlocks(RowLayout(2, torch.bfloat16), shift=2)
    blocks.grow(4)
    for keys in (ints(1), ints(1, 2).int()):
        with pytest.raises(ValueError, match=r"keys must be int64 \[T\], one for each of the 2 lines of scalars"):
            update_rows(blocks, ints(0), torch.ones(1, 2), SGD, scalars, step=1, keys=keys)
    with pytest.raises(ValueError, match="segments must be int32 or int64"):
        order_by_segment_and_id(ints(1, 2), ints(0).int(), 1)
    with pytest.raises(ValueError, match="ids must be int64"):
        order_by_segment_and_id(ints(1, 2).int(), ints(0, 0).int(), 1)
    with pytest.raises(ValueError, match="data must be uint8"):
        string_vocab(TEXT.int(), ints(0, 5))
    with pytest.raises(ValueError, match="ids must be int64"):
        id_vocab(ints(1).int())
    with pytest.raises(ValueError, match=r"offsets must be \[N \+ 1\] int64"):
        tile_positions(OFFSETS.int(), 2)
    with pytest.raises(ValueError, match="num_kept must be at least 0; got -1"):
        tile_positions(OFFSETS, -1)
    index = _index()
    for segment in (-1, 2):
        for call in (
            index.export,
            index.clear,
            index.size,
            lambda s: index.reserve(s, 9),
            lambda s: index.make_room(s, 1),
        ):
            with pytest.raises(ValueError, match=rf"segment must lie in \[0, 2\); got {segment}"):
                call(segment)
