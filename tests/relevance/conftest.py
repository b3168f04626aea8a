"""A model of a few thousand weights, saved once per test file, for the tests that train or serve one."""

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tiny_lm import save_micro, small_task  # transformers is loaded only where a model is used

    return save_micro(tmp_path_factory.mktemp("micro"), small_task())


@pytest.fixture
def lm(folder):
    from tiny_lm import load_micro

    return load_micro(folder)
