"""The list of seeded faults fits the kernels: every entry can be seeded, and names tests that exist."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def mutate() -> ModuleType:
    """Return the script that seeds the faults."""
    spec = importlib.util.spec_from_file_location("mutate", HERE / "mutate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_fault_can_be_seeded(mutate):
    faults, kernels = mutate.read_faults(), mutate.kernels_folder()
    assert len(faults) >= 30
    assert len({(fault.file, fault.old, fault.new) for fault in faults}) == len(faults)
    assert {fault.number: reason for fault in faults if (reason := mutate.misfit(fault, kernels))} == {}


def test_named_tests_exist(mutate):
    """Some word of a -k expression is part of a test's name in the file; others may be parameters."""
    for fault in mutate.read_faults():
        words = set(re.findall(r"\w+", fault.selection)) - {"and", "or", "not"}
        tests = re.findall(r"^(?:def|class) ([tT]est\w+)", (HERE / fault.test).read_text(), re.MULTILINE)
        assert tests, fault.test
        assert not words or any(word in name for word in words for name in tests), f"entry {fault.number}: no such test"


def test_both_kinds_of_kernels_are_covered(mutate):
    """At least fifteen faults in loops for the CPU and in Triton kernels each, in thirty files."""
    faults = mutate.read_faults()
    in_triton = [fault for fault in faults if "tl." in fault.old or "_triton" in fault.file]
    assert len(in_triton) >= 15
    assert len(faults) - len(in_triton) >= 15
    assert len({fault.file for fault in faults}) >= 30


ENTRY = """### 1. segment.py: a fault

```diff
 kept
-removed
+added
```

caught by: `tests/kernels/test_segment.py -k "by_hand and triton"` (hangs: 20 s)
"""


def test_an_entry_is_read_by_hand(mutate, tmp_path):
    path = tmp_path / "LIST.md"
    path.write_text(ENTRY)
    (fault,) = mutate.read_faults(path)
    assert fault == (
        1,
        "segment.py",
        "a fault",
        "kept\nremoved",
        "kept\nadded",
        "test_segment.py",
        "by_hand and triton",
        20,
        False,
    )
    for content, want in {
        "kept\nremoved\n": None,
        "removed\n": "its text stands 0 times in segment.py, not once",
        "kept\nremoved\nkept\nremoved\n": "its text stands 2 times in segment.py, not once",
    }.items():
        (tmp_path / "segment.py").write_text(content)
        assert mutate.misfit(fault, tmp_path) == want
    assert mutate.misfit(fault._replace(file="gone.py"), tmp_path) == "no file gone.py"
    assert mutate.misfit(fault._replace(new=fault.old), tmp_path) is not None


@pytest.mark.parametrize(
    ("part", "wrong"), [("1.", "2."), (".py:", ""), ("caught by", "by"), ("-removed", "removed")], ids=str
)
def test_malformed_entries_are_refused(mutate, tmp_path, part, wrong):
    path = tmp_path / "LIST.md"
    path.write_text(ENTRY.replace(part, wrong, 1))
    with pytest.raises(ValueError, match=r"entry|headings"):
        mutate.read_faults(path)


def test_the_copy_is_what_runs(mutate, monkeypatch, tmp_path):
    """A run whose kernels lie outside its own folder ends with its own exit code, which counts as nothing caught."""
    monkeypatch.setattr(mutate, "HERE", tmp_path / "tests" / "kernels")

    class Session:
        class config:  # noqa: N801
            rootpath = tmp_path

    with pytest.raises(pytest.exit.Exception, match="kernels") as ended:
        mutate.pytest_sessionstart(Session)
    assert ended.value.returncode not in (0, 1)
