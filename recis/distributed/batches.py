"""Cut a batch by samples: the parts that ranks evaluate, and the empty batch of a rank that has run out of data."""

from collections.abc import Mapping

import torch
from torch import Tensor

from recis.io.batch import Batch
from recis.jagged import JaggedTensor, KeyedJaggedTensor


def part_bounds(num_samples: int, num_parts: int) -> list[int]:
    """Return P + 1 sample numbers: part p of a batch is bounds[p]:bounds[p + 1]."""
    return [num_samples * part // num_parts for part in range(num_parts + 1)]


def samples_of(batch: Batch, start: int, stop: int) -> Batch:
    """Return samples start .. stop - 1 of a batch, as a batch of its own."""

    def cut(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[start:stop]

    return Batch(
        sparse=_keyed(batch.sparse, start, stop),
        dense=batch.dense[start:stop],
        dense_keys=batch.dense_keys,
        dense_widths=batch.dense_widths,
        labels=batch.labels[start:stop],
        label_mask=cut(batch.label_mask),
        label_weights=cut(batch.label_weights),
        weights=batch.weights[start:stop],
        group_ids=cut(batch.group_ids),
        extras=_extras(batch.extras, start, stop),
        num_samples=stop - start,
    )


def _keyed(features: KeyedJaggedTensor, start: int, stop: int) -> KeyedJaggedTensor:
    stride, num_keys = features.stride, len(features.keys)
    lengths = features.lengths.view(num_keys, stride)[:, start:stop]
    offsets = features.offsets
    firsts = offsets[torch.arange(num_keys) * stride + start] if num_keys else offsets[:0]
    counts = lengths.sum(1)
    # position l of the result lies in key k: it was at firsts[k] + (l - where key k begins in the result)
    begins = torch.cumsum(counts, 0) - counts
    total = int(counts.sum())
    shift = torch.repeat_interleave(firsts.long() - begins.long(), counts.long(), output_size=total)
    places = torch.arange(total) + shift
    return KeyedJaggedTensor(
        keys=features.keys,
        values=features.values[places],
        lengths=lengths.reshape(-1),
        weights=None if features.weights is None else features.weights[places],
        stride=stop - start,
    )


def _extras(extras: Mapping[str, Tensor | JaggedTensor], start: int, stop: int) -> dict[str, Tensor | JaggedTensor]:
    return {
        name: value[start:stop] if isinstance(value, Tensor) else _bags(value, start, stop)
        for name, value in extras.items()
    }


def _bags(values: JaggedTensor, start: int, stop: int) -> JaggedTensor:
    first, last = int(values.offsets[start]), int(values.offsets[stop])
    inner = values.values
    inner = _bags(inner, first, last) if isinstance(inner, JaggedTensor) else inner[first:last]
    weights = None if values.weights is None else values.weights[first:last]
    return JaggedTensor(values=inner, lengths=values.lengths[start:stop], weights=weights)
