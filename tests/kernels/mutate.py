"""Seed the faults of MUTATIONS.md into a copy of the kernels, one at a time: the test that each names must catch it.

    python tests/kernels/mutate.py [--only 3,7] [--list] [--jobs 2]

Kernels and their tests are copied to a temporary folder. There the named tests run once as they are and must pass; that
also fills numba's cache. Then each fault gets its own copy, whose tests run with these kernels (this file is a pytest plugin
there and makes sure of it). A fault is caught when tests fail: exit code 1 of pytest. An import that fails, a crash or an
empty selection of tests catches nothing, nor does the time limit, unless the entry says that the fault crashes or hangs.
Prints `7 caught` or `7 SURVIVED` per fault; the exit code is 1 if any survives or the list does not fit the kernels.
"""

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).resolve().parent
LIST = HERE / "MUTATIONS.md"
LIMIT_S = 240  # of one fault's tests; the slowest takes a tenth of it alone
_OTHER_FOLDER = 9  # exit code of a run that imported other kernels than its copy's

_HEADING = re.compile(r"^### (\d+)\. (\w+\.py): (.+)$", re.MULTILINE)
_DIFF = re.compile(r"^```diff\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TEST = re.compile(
    r"^caught by: `tests/kernels/(test_\w+\.py)(?: -k (.+?))?`(?: \((?:hangs: (\d+) s|(crashes))\))?$", re.MULTILINE
)


class Fault(NamedTuple):
    """One entry of the list: `old` stands once in recis_kernels/`file` and is replaced by `new`.

    selection: pytest's -k expression, empty for the whole test file.  hangs_s: time after which a run counts as hung; 0 = the
    fault must fail, not hang.  crashes: whether the process may die of a signal.
    """

    number: int
    file: str
    title: str
    old: str
    new: str
    test: str
    selection: str
    hangs_s: int
    crashes: bool


def read_faults(path: Path = LIST) -> list[Fault]:
    """Return the entries of the list.

    Raises:
        ValueError: an entry lacks a part, or numbers do not ascend by one.
    """
    faults = []
    text = path.read_text()
    strange = [line for line in text.splitlines() if line.startswith("###") and not _HEADING.match(line)]
    if strange:
        raise ValueError(f"{path.name}: headings must be `### number. file.py: fault`; got {strange[0]!r}")
    pieces = _HEADING.split(text)[1:]
    for number, file, title, body in zip(pieces[::4], pieces[1::4], pieces[2::4], pieces[3::4], strict=True):
        diff, test = _DIFF.search(body), _TEST.search(body)
        if int(number) != len(faults) + 1 or diff is None or test is None:
            raise ValueError(
                f"{path.name}, entry {number}: needs the next number, a diff block and a `caught by:` line"
            )
        lines = diff[1].splitlines()
        if any(line[:1] not in ("-", "+", " ", "") for line in lines):
            raise ValueError(f"{path.name}, entry {number}: lines of a diff start with '-', '+' or a space")
        old, new = ("\n".join(line[1:] for line in lines if line[:1] != other) for other in ("+", "-"))
        selection = shlex.split(test[2])[0] if test[2] else ""
        faults.append(Fault(int(number), file, title, old, new, test[1], selection, int(test[3] or 0), bool(test[4])))
    return faults


def misfit(fault: Fault, kernels: Path) -> str | None:
    """Return why a fault cannot be seeded into the kernels in a folder, or None."""
    path = kernels / fault.file
    if not path.is_file():
        return f"no file {fault.file}"
    found = path.read_text().count(fault.old)
    if found != 1:
        return f"its text stands {found} times in {fault.file}, not once"
    if fault.old == fault.new:
        return "it changes nothing"
    return None if (HERE / fault.test).is_file() else f"no test file {fault.test}"


def kernels_folder() -> Path:
    """Return where the package of the kernels lies, without importing it."""
    spec = importlib.util.find_spec("recis_kernels")
    if spec is None or spec.origin is None:
        raise RuntimeError("recis_kernels is not installed: run `pip install -e .` in the checkout")
    return Path(spec.origin).resolve().parent


def pytest_sessionstart(session: pytest.Session) -> None:
    """End a run in a copy whose tests import the kernels of another folder; let property tests draw the same each time."""
    import recis_kernels  # not before the tests' own set-up, which says how triton is to run

    root = HERE.parents[1]
    found = Path(str(recis_kernels.__file__)).resolve()
    if root not in found.parents or session.config.rootpath.resolve() != root:
        pytest.exit(f"kernels {found}, tests of {session.config.rootpath}, not of {root}", returncode=_OTHER_FOLDER)
    if importlib.util.find_spec("hypothesis"):
        from hypothesis import Phase, settings

        found_is_enough = (Phase.explicit, Phase.generate)  # nobody reads a smaller example of a seeded fault
        settings.register_profile("seeded", derandomize=True, database=None, phases=found_is_enough)
        settings.load_profile("seeded")


def _copy_all(target: Path) -> None:
    """Copy what kernel tests need, numba's cache included: it holds for files of the same content and time."""
    root = HERE.parents[1]
    shutil.copytree(kernels_folder(), target / "kernels" / "recis_kernels")
    shutil.copytree(HERE, target / "tests" / "kernels")
    for path in [root / "pyproject.toml", *(root / "tests").glob("*.py")]:
        shutil.copy2(path, target / path.relative_to(root))


def _run_tests(folder: Path, test: str, selection: str, limit_s: int) -> tuple[int | None, str]:
    """Return pytest's exit code, None if it ran past the limit, and the end of what it printed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "mutate"]
    command += [f"tests/kernels/{test}", *(["-k", selection] if selection else [])]
    paths = [str(folder / part) for part in ("tests/kernels", "kernels", "tests")]
    # of pytest's other plugins none is needed, and together they take longer to start than most of these tests
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, (done.stdout + done.stderr)[-1500:]


def _sound(base: Path, test: str, selections: Sequence[str]) -> str | None:
    """Run a test file's selections without any fault; returns what was printed if they do not pass."""
    selection = "" if "" in selections else " or ".join(f"({one})" for one in sorted(set(selections)))
    code, text = _run_tests(base, test, selection, 4 * LIMIT_S)
    return None if code == 0 else f"{test} without a fault: exit code {code}\n{text}"


def _is_caught(base: Path, fault: Fault) -> bool:
    """Seed one fault into a copy of its own, run its test, and print what became of it."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=base.parent) as name:
        folder = Path(name)
        shutil.copytree(base, folder, dirs_exist_ok=True)
        path = folder / "kernels" / "recis_kernels" / fault.file
        path.write_text(path.read_text().replace(fault.old, fault.new))
        code, text = _run_tests(folder, fault.test, fault.selection, fault.hangs_s or LIMIT_S)
    caught = code == 1 or (code is None and fault.hangs_s > 0) or (code is not None and code < 0 and fault.crashes)
    how = "" if code == 1 else ", ran past its time limit" if code is None else f", exit code {code} of pytest"
    word = "caught" if caught else "SURVIVED"
    print(f"{fault.number} {word}: {fault.file}, {fault.title} ({time.monotonic() - start:.0f} s{how})", flush=True)
    if not caught:
        print(text, flush=True)
    return caught


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="numbers of faults, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the faults and run nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="faults that run at a time")
    options = parser.parse_args()
    faults = read_faults()
    if options.only:
        numbers = {int(number) for number in options.only.split(",")}
        faults = [fault for fault in faults if fault.number in numbers]
    kernels = kernels_folder()
    unfit = [f"{fault.number}: {reason}" for fault in faults if (reason := misfit(fault, kernels))]
    if options.list or unfit or not faults:
        print(
            "\n".join(unfit or [f"{fault.number} {fault.file}: {fault.title}" for fault in faults] or ["no such fault"])
        )
        return int(bool(unfit) or not faults)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.jobs) as pool:
        base = Path(name).resolve() / "base"
        _copy_all(base)
        tests: dict[str, list[str]] = {}
        for fault in faults:
            tests.setdefault(fault.test, []).append(fault.selection)
        broken = [text for text in pool.map(lambda item: _sound(base, *item), tests.items()) if text]
        if broken:
            print("\n".join(broken))
            return 1
        caught = list(pool.map(lambda fault: _is_caught(base, fault), faults))
    print(f"{sum(caught)} of {len(faults)} faults caught")
    return int(not all(caught))


if __name__ == "__main__":
    sys.exit(main())
