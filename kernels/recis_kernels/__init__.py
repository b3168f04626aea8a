"""Embedding and sequence kernels: one file per op, each with a float64 reference, a CPU version and a Triton version.

checks      context manager: content checks on (each costs one host sync)
"""

from recis_kernels.dispatch import checks

__all__ = ["checks"]
