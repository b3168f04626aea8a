"""Compiled loops follow their sources: a change in a file that a loop's file imports makes the cached loop stale."""

import subprocess
import sys
from pathlib import Path

from recis_kernels import dispatch

ROOT = Path(__file__).parents[2]

INNER = "from recis_kernels.dispatch import njit\n\n\n@njit\ndef inner(x):\n    return x + {number}\n"
OUTER = INNER.replace("inner", "outer").replace("x + {number}", "inner(x)")
OUTER = "from recis_kernels.probe_inner import inner\n" + OUTER
RUN = "import recis_kernels; recis_kernels.__path__.append({folder!r} + '/recis_kernels')"


def _run(folder: Path) -> str:
    code = RUN.format(folder=str(folder)) + "\nfrom recis_kernels.probe_outer import outer\nprint(outer(1))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_digest_covers_imported_files():
    path = Path(dispatch.__file__).with_name("embedding_bag.py")
    imports, _ = dispatch._imports(path)
    assert {"lanes.py", "row_blocks.py", "dispatch.py"} <= {file.name for file in imports}
    assert dispatch.source_digest(path) != dispatch.source_digest(path.with_name("lanes.py"))


def test_digest_changes_with_a_file_two_imports_away(tmp_path, monkeypatch):
    package = tmp_path / "recis_kernels"
    package.mkdir()
    monkeypatch.setattr(sys.modules["recis_kernels"], "__path__", [str(package)])
    (package / "a.py").write_text("from recis_kernels.b import x\n")
    (package / "b.py").write_text("from recis_kernels import c\n")
    (package / "c.py").write_text("x = 1\n")
    before = dispatch.source_digest(package / "a.py")
    dispatch._imports.cache_clear()
    assert dispatch.source_digest(package / "a.py") == before
    (package / "c.py").write_text("x = 2\n")
    dispatch._imports.cache_clear()
    assert dispatch.source_digest(package / "a.py") != before


def test_a_cached_loop_is_compiled_again_when_what_it_calls_changes(tmp_path):
    package = tmp_path / "recis_kernels"
    package.mkdir()
    (package / "probe_outer.py").write_text(OUTER)
    for number in (1, 10):
        (package / "probe_inner.py").write_text(INNER.format(number=number))
        assert _run(tmp_path) == str(1 + number)
        assert _run(tmp_path) == str(1 + number)  # from the cache


def test_every_module_imports_where_triton_is_absent():
    code = (
        "import importlib, pkgutil, sys\nsys.modules['triton'] = None\nimport recis_kernels\n"
        "for info in pkgutil.iter_modules(recis_kernels.__path__):\n"
        "    importlib.import_module('recis_kernels.' + info.name)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
