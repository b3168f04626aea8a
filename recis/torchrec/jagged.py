"""One feature between recis and TorchRec without a copy.

A whole batch has this as methods: `KeyedJaggedTensor.to_torchrec()` and `KeyedJaggedTensor.from_torchrec(kjt)`.
"""

from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor as TorchRecJagged

from recis.jagged import JaggedTensor


def jagged_to_torchrec(feature: JaggedTensor) -> TorchRecJagged:
    """Return TorchRec's JaggedTensor over the same values ([L] or [L, D]), lengths and weights.

    Raises:
        ValueError: the feature is nested, which TorchRec's has no form for.
    """
    if not isinstance(feature.values, Tensor):
        raise ValueError(f"TorchRec's JaggedTensor is not nested; got {feature!r}: convert its inner level alone")
    return TorchRecJagged(feature.values, weights=feature.weights, lengths=feature.lengths)


def jagged_from_torchrec(feature: TorchRecJagged) -> JaggedTensor:
    """Return the same bags over the same values, lengths and weights as TorchRec's JaggedTensor."""
    return JaggedTensor(feature.values(), lengths=feature.lengths(), weights=feature.weights_or_none())
