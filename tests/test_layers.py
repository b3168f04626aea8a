"""Imports go one way: recis_kernels <- recis <- relevance, and inside recis along the order of its parts."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "recis_kernels": ROOT / "kernels" / "recis_kernels",
    "recis": ROOT / "recis",
    "relevance": ROOT / "relevance",
}
MAY_IMPORT = {"recis_kernels": {"recis_kernels"}, "recis": {"recis_kernels", "recis"}, "relevance": set(PACKAGES)}
# part of recis -> parts it may import; parts that are not listed may import any of recis
INSIDE_RECIS = {
    "errors": set(),
    "jagged": {"errors"},
    "io": {"errors", "jagged"},
    "features": {"errors", "jagged", "io"},
    "embedding": {"errors", "jagged", "optim"},
    "optim": {"errors", "jagged", "embedding"},
    "checkpoint": {"errors", "jagged", "embedding", "optim", "io"},
    "distributed": {"errors", "jagged", "io", "embedding", "optim"},
    "metrics": {"errors", "jagged"},
    "models": {"errors", "jagged", "io", "embedding", "optim", "metrics"},
    "trainer": {
        "errors",
        "jagged",
        "io",
        "features",
        "embedding",
        "optim",
        "distributed",
        "checkpoint",
        "metrics",
        "models",
    },
}


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_downwards_only(package):
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported_modules(path)
        if name.split(".")[0] in PACKAGES and name.split(".")[0] not in MAY_IMPORT[package]
    ]
    assert wrong == []


def test_parts_of_recis_import_downwards_only():
    wrong = []
    for path in (ROOT / "recis").rglob("*.py"):
        part = path.relative_to(ROOT / "recis").parts[0].removesuffix(".py")
        if part not in INSIDE_RECIS:
            continue
        for name in imported_modules(path):
            pieces = name.split(".")
            if pieces[0] == "recis" and len(pieces) > 1 and pieces[1] != part and pieces[1] not in INSIDE_RECIS[part]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_nothing_imports_tests_or_benchmarks():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for folder in PACKAGES.values()
        for path in folder.rglob("*.py")
        for name in imported_modules(path)
        if name.split(".")[0] in {"tests", "benchmarks", "support", "conftest"}
    ]
    assert wrong == []


def test_import_is_light():
    """`import recis` loads neither numba nor pyarrow, and nothing optional."""
    heavy = ("numba", "pyarrow", "triton", "transformers", "torchrec", "fbgemm_gpu")
    code = f"import sys, recis; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"
