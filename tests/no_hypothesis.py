"""Stands in for hypothesis where it is not installed: property tests are then skipped by name, all others run.

A GPU machine has torch, triton, numba and pytest, and often nothing else; a test file must not be lost to one import.
"""

import sys
import unittest
from types import ModuleType
from typing import Any

import pytest

REASON = "hypothesis is not installed"


class _Anything:
    """Answers every call and attribute with itself: strategies are built when a module is imported, and never drawn from."""

    def __call__(self, *args: Any, **kwargs: Any) -> "_Anything":
        return self

    def __getattr__(self, name: str) -> "_Anything":
        return self

    def __or__(self, other: Any) -> "_Anything":
        return self


def _skipping(*args: Any, **kwargs: Any) -> Any:
    def skip(function: Any) -> Any:
        def skipped() -> None:
            pytest.skip(REASON)

        skipped.__name__, skipped.__doc__ = function.__name__, function.__doc__
        return skipped

    return skip


def _unchanged(*args: Any, **kwargs: Any) -> Any:
    return lambda function: function


class _Settings:
    """`settings`, as a decorator and as a value."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, function: Any) -> Any:
        return function


class _SkippedCase(unittest.TestCase):
    settings: Any = None

    @unittest.skip(REASON)
    def runTest(self) -> None:  # noqa: N802
        pass


class _Machine:
    TestCase = _SkippedCase


def install() -> None:
    """Put the stand-in where `import hypothesis` finds it."""
    anything = _Anything()
    package, strategies, stateful = map(ModuleType, ("hypothesis", "hypothesis.strategies", "hypothesis.stateful"))
    contents: dict[ModuleType, dict[str, Any]] = {
        package: {"given": _skipping, "settings": _Settings, "strategies": strategies, "stateful": stateful},
        strategies: {"__getattr__": lambda name: anything},
        stateful: {"RuleBasedStateMachine": _Machine},
    }
    for name in ("example", "seed"):
        contents[package][name] = _unchanged
    for name in ("assume", "note", "HealthCheck", "Phase"):
        contents[package][name] = anything
    for name in ("rule", "initialize", "invariant", "precondition"):
        contents[stateful][name] = _unchanged
    for name in ("Bundle", "multiple", "consumes", "run_state_machine_as_test"):
        contents[stateful][name] = anything
    for module, values in contents.items():
        vars(module).update(values)
        sys.modules[module.__name__] = module
