"""Joining columns: values, borders, and no copy where they already lie side by side."""

import pytest
import torch

from recis_kernels.columns import check_columns, column_of_value, join, run_columns


def test_join_copies_only_what_lies_apart():
    whole = torch.arange(10)
    parts = [whole[0:3], whole[3:3], whole[3:7]]
    joined, ends = join(parts)
    assert joined.tolist() == list(range(7))
    assert ends == (0, 3, 3, 7)
    assert joined.data_ptr() == whole.data_ptr()
    apart, ends = join([whole[5:7], whole[0:2]])
    assert apart.tolist() == [5, 6, 0, 1]
    assert ends == (0, 2, 4)
    rows = torch.arange(12).view(6, 2)
    joined, _ = join([rows[1:2], rows[2:5]])
    assert joined.tolist() == rows[1:5].tolist()
    assert joined.data_ptr() == rows[1:].data_ptr()
    strided, _ = join([rows[0:2, 0], rows[2:4, 0]])
    assert strided.tolist() == [0, 2, 4, 6]
    empty, _ = join([whole[:0], torch.zeros(0, dtype=torch.int64)])
    assert empty.tolist() == []


def test_parameters_per_value_and_pieces_per_column():
    assert column_of_value((0, 2, 2, 5), [7, 8, 9], torch.device("cpu")).tolist() == [7, 7, 9, 9, 9]
    calls = []
    run_columns(lambda *piece: calls.append(piece), 5, (0, 2, 2, 5), min_items=100)
    assert calls == [(0, 0, 2), (2, 2, 5)]


@pytest.mark.parametrize(("ends", "count"), [((1, 3), 1), ((0, 2), 1), ((), 0), ((0, 4, 3), 2), ((0, 3), 2)], ids=str)
def test_wrong_columns_are_refused(ends, count):
    with pytest.raises(ValueError, match=r"column"):
        check_columns(3, ends, count)
