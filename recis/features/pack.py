"""Put the ends of the chains together to one Batch.

Ids of the last call usually lie side by side already, so the sparse features are joined without a copy.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from recis.features.spec import FeatureSpec, Kind
from recis.features.values import Data, as_bags
from recis.io.batch import Batch
from recis.jagged import KeyedJaggedTensor

Ends = Sequence[tuple[FeatureSpec, Sequence[Data]]]
"""Each feature with what its chain made."""


def pack(ends: Ends, num_samples: int, device: torch.device) -> Batch:
    """Return the batch of these features; kinds that no feature has are empty or None."""
    by_kind: dict[Kind, list[tuple[FeatureSpec, Sequence[Data]]]] = {}
    for spec, made in ends:
        by_kind.setdefault(spec.kind, []).append((spec, made))

    def single(kind: Kind) -> dict[str, Data]:
        return {spec.name: made[0] for spec, made in by_kind.get(kind, ())}

    sparse = {
        name: as_bags(data)
        for spec, made in by_kind.get("sparse", ())
        for name, data in zip(spec.outputs, made, strict=True)
    }
    dense = {name: _matrix(data) for name, data in single("dense").items()}
    labels, mask = _labels(single("label"), single("label_mask"), num_samples, device)
    weights = [_column(data) for data in single("weight").values()]
    groups = list(single("group").values())
    keyed = KeyedJaggedTensor.from_jagged(sparse, stride=num_samples)
    return Batch(
        sparse=keyed if sparse else keyed.to(device),
        dense=torch.cat(list(dense.values()), dim=1) if dense else torch.zeros(num_samples, 0, device=device),
        dense_keys=tuple(dense),
        dense_widths=tuple(matrix.shape[1] for matrix in dense.values()),
        labels=labels,
        label_mask=mask,
        label_weights=_label_weights(single("label"), single("label_weight"), num_samples, device),
        weights=weights[0] if weights else torch.ones(num_samples, device=device),
        group_ids=_as_tensor(groups[0]) if groups else None,
        extras=single("extra"),
        num_samples=num_samples,
    )


def _labels(
    labels: Mapping[str, Data], masks: Mapping[str, Data], num_samples: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Return labels [B, T], 0 where missing, and the mask [B, T], None where nothing is missing.

    Whether anything is missing is read on the CPU only; on a GPU, where that would stall the step, there is always a mask.
    """
    if not labels:
        return torch.zeros(num_samples, 0, device=device), None
    values = torch.stack([_column(data) for data in labels.values()], dim=1)
    present = ~values.isnan()
    if masks:
        everywhere = torch.ones(num_samples, dtype=torch.bool, device=device)
        given = [_as_tensor(masks[name]) != 0 if name in masks else everywhere for name in labels]
        present = present & torch.stack(given, dim=1)
    if present.device.type == "cpu" and bool(present.all()):
        return values, None
    return torch.where(present, values, 0.0), present


def _label_weights(
    labels: Mapping[str, Data], weights: Mapping[str, Data], num_samples: int, device: torch.device
) -> Tensor | None:
    if not weights:
        return None
    ones = torch.ones(num_samples, device=device)
    return torch.stack([_column(weights[name]) if name in weights else ones for name in labels], dim=1)


def _as_tensor(data: Data) -> Tensor:
    assert isinstance(data, Tensor)
    return data.reshape(-1) if data.ndim == 2 else data


def _column(data: Data) -> Tensor:
    return _as_tensor(data).to(torch.float32)


def _matrix(data: Data) -> Tensor:
    assert isinstance(data, Tensor)
    return (data[:, None] if data.ndim == 1 else data).to(torch.float32)
