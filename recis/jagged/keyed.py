"""All features of one batch as a keyed jagged tensor.

    lengths [F * B], key-major: the B bags of keys[0], then the B bags of keys[1], ...;   stride = B

Naming and layout are TorchRec's (torchrec.sparse.jagged_tensor), so the two convert without a copy. `stride` is
explicit, so B is known with no feature and with no id.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Self

import torch
from torch import Tensor

from recis.jagged.bags import JaggedTensor, check_bags, derive_offsets, describe, move
from recis_kernels.columns import join
from recis_kernels.jagged import offsets_to_lengths

TORCHREC_EXTRA = 'run `pip install "recis[torchrec]"`, then `pip install --no-deps torchrec==1.8.0`'


class KeyedJaggedTensor:
    """F features of one batch, key-major: lengths [F * B] is all of keys[0], then all of keys[1], ...

    Args:
        keys: F distinct, non-empty names.
        values: [L] ids of all features, in the order of the bags.
        lengths: [F * B] int64 or int32.
        offsets: [F * B + 1] of the same, from 0. Give either.
        weights: [L] floating point or None.
        stride: B. May be left out when F > 0.

    Raises:
        ValueError: keys repeat or are empty, a shape or dtype is wrong, F * stride is not the number of bags, or the
            offsets do not start at 0 (on the CPU; on a GPU only under `recis_kernels.checks()`).
    """

    __slots__ = ("_lengths", "_offset_per_key", "_offsets", "keys", "stride", "values", "weights")

    keys: tuple[str, ...]
    values: Tensor
    weights: Tensor | None
    stride: int

    def __init__(
        self,
        keys: Sequence[str],
        values: Tensor,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        weights: Tensor | None = None,
        stride: int | None = None,
    ) -> None:
        keys = tuple(keys)
        _check_keys(keys)
        if not isinstance(values, Tensor) or values.ndim != 1:
            raise ValueError(f"values of a KeyedJaggedTensor must be a 1-D tensor; got {describe(values)}")
        check_bags(values.shape[0], lengths, offsets, weights, exact=True)
        num_bags = lengths.numel() if lengths is not None else offsets.numel() - 1  # type: ignore[union-attr]
        if stride is None:
            if not keys:
                raise ValueError("a KeyedJaggedTensor without keys cannot derive its batch size: give stride")
            stride = num_bags // len(keys)
        if stride < 0 or num_bags != len(keys) * stride:
            raise ValueError(f"{len(keys)} keys with stride {stride} need {len(keys) * stride} bags; got {num_bags}")
        self._set(keys, values, lengths, offsets, weights, stride)

    @classmethod
    def _trusted(cls, keys, values, *, lengths=None, offsets=None, weights=None, stride, offset_per_key=None) -> Self:
        new = object.__new__(cls)
        new._set(tuple(keys), values, lengths, offsets, weights, stride, offset_per_key)
        return new

    def _set(self, keys, values, lengths, offsets, weights, stride, offset_per_key=None) -> None:
        fields = {"keys": keys, "values": values, "weights": weights, "stride": stride}
        fields |= {"_lengths": lengths, "_offsets": offsets, "_offset_per_key": offset_per_key}
        for name, field in fields.items():
            object.__setattr__(self, name, field)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"KeyedJaggedTensor is immutable: build a new one instead of setting {name!r}")

    def __getstate__(self) -> tuple:
        return self.keys, self.values, self._lengths, self._offsets, self.weights, self.stride, self._offset_per_key

    def __setstate__(self, state: tuple) -> None:
        self._set(*state)

    @property
    def lengths(self) -> Tensor:
        """Bag sizes [F * B], key-major."""
        if self._lengths is None:
            object.__setattr__(self, "_lengths", offsets_to_lengths(self.offsets))
        return self._lengths  # type: ignore[return-value]

    @property
    def offsets(self) -> Tensor:
        """Bag boundaries [F * B + 1], from 0."""
        if self._offsets is None:
            object.__setattr__(self, "_offsets", derive_offsets(self._lengths, self.values.shape[0], exact=True))
        return self._offsets  # type: ignore[return-value]

    @property
    def key_offsets(self) -> Tensor:
        """Where each feature starts in values, [F + 1], on the device of the offsets: no read."""
        return self.offsets[:: self.stride] if self.stride else self.offsets.new_zeros(len(self.keys) + 1)

    @property
    def offset_per_key(self) -> tuple[int, ...]:
        """Where each feature starts in values, as F + 1 Python ints; reads the offsets once and is kept."""
        if self._offset_per_key is None:
            object.__setattr__(self, "_offset_per_key", tuple(self.key_offsets.tolist()))
        return self._offset_per_key  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        return self.values.device

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys)

    def __contains__(self, key: object) -> bool:
        return key in self.keys

    def __repr__(self) -> str:
        weighted = "" if self.weights is None else ", weighted"
        return f"KeyedJaggedTensor({list(self.keys)}, B = {self.stride}, {self.values.shape[0]} ids{weighted})"

    def __getitem__(self, key: str) -> JaggedTensor:
        """Return one feature, a view of values and weights.

        Raises:
            KeyError: there is no such feature; the text lists those there are.
        """
        if key not in self.keys:
            raise KeyError(f"no feature {key!r}; this batch has {list(self.keys)}")
        part = self._slice(self.keys.index(key), self.keys.index(key) + 1)
        return JaggedTensor._trusted(part.values, lengths=part._lengths, offsets=part._offsets, weights=part.weights)

    def _slice(self, first: int, last: int) -> "KeyedJaggedTensor":
        """Features first..last - 1 as views; only offsets that do not start at 0 are new."""
        ends = self.offset_per_key
        start, stop = ends[first], ends[last]
        bags = slice(first * self.stride, last * self.stride)
        offsets = None
        if self._lengths is None or self._offsets is not None:
            offsets = self.offsets[bags.start : bags.stop + 1]
            offsets = offsets - start if start else offsets
        return KeyedJaggedTensor._trusted(
            self.keys[first:last],
            self.values[start:stop],
            lengths=None if self._lengths is None else self._lengths[bags],
            offsets=offsets,
            weights=None if self.weights is None else self.weights[start:stop],
            stride=self.stride,
            offset_per_key=tuple(end - start for end in ends[first : last + 1]),
        )

    def split(self, sizes: Sequence[int]) -> list["KeyedJaggedTensor"]:
        """Return consecutive groups of features, sizes[i] keys each; values and weights are views.

        Raises:
            ValueError: the sizes are negative or do not add up to F.
        """
        if sum(sizes) != len(self.keys) or min(sizes, default=0) < 0:
            raise ValueError(f"split sizes must be >= 0 and add up to {len(self.keys)} keys; got {list(sizes)}")
        return [self._slice(first, last) for first, last in pairwise(accumulate(sizes, initial=0))]

    def permute(self, order: Sequence[int]) -> "KeyedJaggedTensor":
        """Return features keys[order[0]], keys[order[1]], ...; some may be left out, none may repeat.

        Raises:
            ValueError: an index is outside [0, F) or repeats.
        """
        order = list(order)
        if len(set(order)) != len(order) or any(not 0 <= index < len(self.keys) for index in order):
            raise ValueError(f"order must hold distinct indices of {len(self.keys)} keys; got {order}")
        if order == list(range(len(self.keys))):
            return self
        return KeyedJaggedTensor._join([self._slice(index, index + 1) for index in order], self)

    @staticmethod
    def concat(parts: Sequence["KeyedJaggedTensor"]) -> "KeyedJaggedTensor":
        """Return the features of all parts, in order; parts without weights get ones if another has weights.

        Raises:
            ValueError: there is no part, a key repeats, or strides differ.
        """
        if not parts:
            raise ValueError("concat needs at least one KeyedJaggedTensor")
        strides = {part.stride for part in parts}
        if len(strides) > 1:
            raise ValueError(f"concat needs parts of one batch; their strides are {sorted(strides)}")
        _check_keys(tuple(key for part in parts for key in part.keys))
        return parts[0] if len(parts) == 1 else KeyedJaggedTensor._join(parts, parts[0])

    @staticmethod
    def _join(parts: Sequence["KeyedJaggedTensor"], like: "KeyedJaggedTensor") -> "KeyedJaggedTensor":
        if not parts:
            empty = None if like.weights is None else like.weights[:0]
            lengths = like.lengths[:0]
            return KeyedJaggedTensor._trusted((), like.values[:0], lengths=lengths, weights=empty, stride=like.stride)
        return KeyedJaggedTensor._trusted(
            [key for part in parts for key in part.keys],
            torch.cat([part.values for part in parts]),
            lengths=torch.cat([part.lengths for part in parts]),
            weights=join_weights([(part.values.shape[0], part.weights) for part in parts], like.values.device),
            stride=like.stride,
        )

    @staticmethod
    def from_jagged(features: Mapping[str, JaggedTensor], *, stride: int | None = None) -> "KeyedJaggedTensor":
        """Return one batch of these features, in order; features without weights get ones if another has weights.

        Raises:
            ValueError: a feature is nested or has vectors, their bag counts differ, or there is none and no stride.
        """
        for key, feature in features.items():
            if not isinstance(feature.values, Tensor) or feature.values.ndim != 1:
                raise ValueError(f"feature {key!r} must hold flat ids [L]; got {feature!r}")
        strides = {feature.num_bags for feature in features.values()} | ({stride} if stride is not None else set())
        if len(strides) != 1:
            counts = {key: feature.num_bags for key, feature in features.items()}
            raise ValueError(f"features need one and the same number of bags, stride; got stride {stride} and {counts}")
        if not features:
            none = torch.empty(0, dtype=torch.int64)
            return KeyedJaggedTensor((), none, lengths=none, stride=stride)
        _check_keys(tuple(features))
        values, ends = join([feature.flat_values for feature in features.values()])
        weights = [(feature.num_values, feature.weights) for feature in features.values()]
        return KeyedJaggedTensor._trusted(
            features,
            values,
            lengths=torch.cat([feature.lengths for feature in features.values()]),
            weights=join_weights(weights, values.device),
            stride=strides.pop(),
            offset_per_key=ends,
        )

    @staticmethod
    def from_lists(
        features: Mapping[str, Sequence[Sequence[int]]],
        *,
        weights: Mapping[str, Sequence[Sequence[float]]] | None = None,
        stride: int | None = None,
    ) -> "KeyedJaggedTensor":
        """Return the batch of {feature: B lists of ids}; `weights` may name some of the features."""
        weights = weights or {}
        jagged = {key: JaggedTensor.from_lists(rows, weights=weights.get(key)) for key, rows in features.items()}
        return KeyedJaggedTensor.from_jagged(jagged, stride=stride)

    def to_dict(self) -> dict[str, JaggedTensor]:
        """Return {key: feature}, each a view."""
        return {key: self[key] for key in self.keys}

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "KeyedJaggedTensor":
        """Return this on another device (sharing what does not have to move)."""
        fields = (self.values, self._lengths, self._offsets, self.weights)
        values, lengths, offsets, weights = (move(field, device, non_blocking) for field in fields)
        return KeyedJaggedTensor._trusted(
            self.keys,
            values,
            lengths=lengths,
            offsets=offsets,
            weights=weights,
            stride=self.stride,
            offset_per_key=self._offset_per_key,
        )

    def to_torchrec(self) -> Any:
        """Return TorchRec's KeyedJaggedTensor over the same storage (values, lengths, weights).

        Raises:
            ImportError: TorchRec is not installed; the text names the extra.
        """
        return _torchrec_class()(
            keys=list(self.keys), values=self.values, weights=self.weights, lengths=self.lengths, stride=self.stride
        )

    @staticmethod
    def from_torchrec(kjt: Any) -> "KeyedJaggedTensor":
        """Return the same batch over the same storage as TorchRec's KeyedJaggedTensor.

        Raises:
            ValueError: it has another stride per key, or inverse indices, which have no counterpart here.
        """
        if kjt.variable_stride_per_key():
            raise ValueError(
                "this KeyedJaggedTensor has a stride per key, which ours cannot have: pad its features to one B"
            )
        if kjt.inverse_indices_or_none() is not None:
            raise ValueError(
                "this KeyedJaggedTensor has inverse_indices, which ours cannot have: expand its samples first"
            )
        return KeyedJaggedTensor(
            kjt.keys(), kjt.values(), lengths=kjt.lengths(), weights=kjt.weights_or_none(), stride=kjt.stride()
        )


def join_weights(parts: Sequence[tuple[int, Tensor | None]], device: torch.device) -> Tensor | None:
    """Concatenate weights of (num_values, weights) parts, ones where a part has none; None if no part has any."""
    given = [weights for _, weights in parts if weights is not None]
    if not given:
        return None
    ones = [
        torch.ones(num_values, dtype=given[0].dtype, device=device) if weights is None else weights
        for num_values, weights in parts
    ]
    return torch.cat(ones)


def _check_keys(keys: tuple[str, ...]) -> None:
    if any(not isinstance(key, str) or not key for key in keys):
        raise ValueError(f"keys must be non-empty strings; got {list(keys)}")
    if len(set(keys)) != len(keys):
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"keys must be distinct; these repeat: {twice}")


def _torchrec_class() -> Any:
    try:
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor as TorchRecJagged
    except ImportError as error:
        raise ImportError(f"to_torchrec needs TorchRec: {TORCHREC_EXTRA}") from error
    return TorchRecJagged
