"""Jagged tensors: one feature (JaggedTensor) or all features of a batch (KeyedJaggedTensor).

Objects are immutable; operations return new ones and share storage where they can. Construction looks at shapes and
dtypes, and, on the CPU where that costs no synchronisation, at both ends of the offsets; under
`recis_kernels.checks()` at all of them on any device.
"""

from recis.jagged.bags import JaggedTensor, ragged_take
from recis.jagged.keyed import KeyedJaggedTensor

__all__ = ["JaggedTensor", "KeyedJaggedTensor", "ragged_take"]
