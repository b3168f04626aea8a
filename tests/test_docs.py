"""The pages of docs/ cannot rot: their examples run and print what the page says, and what they name exists.

    ```python        first line `# runs`       executed in a fresh namespace; the blocks of one page share a working folder
                     first line `# goes on`    executed in the namespace of the block before
    ```sh            first line `# runs`       each line `recis ...` goes through the command line; `# exit N` states its code
    ```output        right behind such a block: what it printed; `...` stands for anything

Links and file paths are looked up in the repository, dotted names are imported, and each page must name every field or class
of the part it describes.
"""

import contextlib
import dataclasses
import doctest
import importlib
import inspect
import io
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from recis.cli import main

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [page for page in (*DOCS, ROOT / "README.md") if page.exists()]
FOLDERS = ("recis", "relevance", "kernels", "tests", "benchmarks", "docs")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block: its language, its text and the line of the page that its text begins at, from 1."""

    language: str
    text: str
    line: int

    @property
    def mark(self) -> str:
        """Its first line, which says what is done with it."""
        return self.text.split("\n", 1)[0].removeprefix("#").strip()


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    content = page.read_text()
    return [
        Block(language=match[1], text=match[2], line=content.count("\n", 0, match.start(2)) + 1)
        for match in _FENCE.finditer(content)
    ]


def is_run(block: Block) -> bool:
    """Return whether a block is executed."""
    return block.language in ("python", "sh") and block.mark in ("runs", "goes on")


def run_python(block: Block, page: Path, module: ModuleType) -> None:
    """Execute a block so that a traceback names line and page."""
    code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
    exec(code, module.__dict__)


def run_commands(block: Block, page: Path) -> None:
    """Run the `recis` lines of a block in this process and compare their exit codes."""
    for offset, line in enumerate(block.text.replace("\\\n", "  ").splitlines()):
        if not line.startswith("recis "):
            continue
        command, _, comment = line.partition("# exit ")
        try:
            code = main(shlex.split(command)[1:])
        except SystemExit as stopped:  # argparse: a wrong argument, --help
            code = stopped.code
        assert code == int(comment or 0), f"{page}:{block.line + offset}: {line} gave exit code {code}"


def check_output(block: Block, printed: str, page: Path) -> None:
    """Compare what a block printed with the `output` block behind it."""
    checker = doctest.OutputChecker()
    same = checker.check_output(block.text, printed, doctest.ELLIPSIS)
    assert same, f"{page}:{block.line}: the page says\n{block.text}\nthe block printed\n{printed}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(map(is_run, blocks_of(page)))], ids=lambda page: page.stem
)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("sys.stderr", io.StringIO())
    imported = set(sys.modules)
    blocks, printed, module = blocks_of(page), "", ModuleType("")
    for number, block in enumerate(blocks):
        if is_run(block):
            stream = io.StringIO()
            with contextlib.redirect_stdout(stream):
                if block.language == "sh":
                    run_commands(block, page)
                else:
                    if block.mark == "runs":
                        module = ModuleType(f"example_{page.stem}_{number}")
                        monkeypatch.setitem(sys.modules, module.__name__, module)
                    run_python(block, page, module)
            printed = stream.getvalue()
        elif block.language == "output":
            assert is_run(blocks[number - 1]), f"{page}:{block.line}: the block before it does not run"
            check_output(block, printed, page)
    for name in set(sys.modules) - imported:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]  # modules that the example wrote


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", page.read_text()))
    relative = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    dead = []
    for link in relative:
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            dead.append(link)
    assert not dead


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_paths_exist(page):
    content = page.read_text()
    spans = [span for span in _CODE.findall(_FENCE.sub("", content)) if re.match(rf"({'|'.join(FOLDERS)})/", span)]
    missing = [span for span in spans if not any(ROOT.glob(span.split("::")[0].split(" ")[0].rstrip("/")))]
    assert not missing
    trees = [block.text for block in blocks_of(page) if block.language == "" and "recis/" in block.text]
    paths = {path for tree in trees for path in re.findall(rf"\b(?:{'|'.join(FOLDERS)})/[\w./-]+\.\w+", tree)}
    assert not [path for path in paths if not (ROOT / path).exists()]
    names = {name for tree in trees for name in re.findall(r"(?<![\w*/.<>-])[\w.-]+\.(?:py|md|toml)\b", tree)}
    known = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*")} | {p.name for p in ROOT.iterdir()}
    assert not names - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_objects_exist(page):
    content = _FENCE.sub("", page.read_text())
    names = {span for span in _CODE.findall(content) if re.fullmatch(r"(recis|recis_kernels)(\.\w+)+", span)}
    missing = sorted(name for name in names if not is_object(name))
    assert not missing


def is_object(name: str) -> bool:
    """Return whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[split:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def fields_of(name: str, *classes: str) -> set[str]:
    """Return the fields of some dataclasses of a module."""
    module = importlib.import_module(name)
    return {field.name for kind in classes for field in dataclasses.fields(getattr(module, kind))}


def classes_of(name: str) -> set[str]:
    """Return the public classes and functions of a module."""
    module = importlib.import_module(name)
    return {key for key in module.__all__ if inspect.isclass(getattr(module, key)) or callable(getattr(module, key))}


def required_words() -> dict[str, set[str]]:
    """Return what each page must name in backticks."""
    commands = re.findall(r"^ {4}(\w+)(?: {2,}|$)", help_text(), re.MULTILINE)
    return {
        "input": fields_of("recis.io.config", "DataConfig", "Csv", "TimeWindow", "Follow")
        | {kind.__name__ for kind in importlib.import_module("recis.io.columns").KINDS},
        "features": {op.__name__ for op in importlib.import_module("recis.features.ops").OPS}
        | {rule.__name__ for rule in importlib.import_module("recis.features.ops").RULES}
        | set(importlib.import_module("recis.features.spec").KINDS),
        "tables": fields_of("recis.embedding.config", "TableConfig")
        | fields_of("recis.embedding.counters", "TableCounters")
        | classes_of("recis.embedding")
        - {"RowStore", "TableSnapshot", "Initializer", "Admission", "Eviction", "Pooling"},
        "optimizers": classes_of("recis.optim") - {"RowOptimizer", "Schedule"},
        "scale": fields_of("recis.distributed.config", "Parallel"),
        "training": fields_of("recis.trainer.config", "TrainConfig", "Monitor", "InitFrom")
        | {"Logger", "EarlyStop", "Checkpoint", "Evict", "TensorBoard", "Profiler", "Progress"},
        "checkpoints": fields_of("recis.checkpoint.manifest", "Manifest"),
        "metrics": classes_of("recis.metrics") - {"Metric", "Interval", "PolicyValue"},
        "commands": set(commands) | {"bench"},
    }


def help_text() -> str:
    """Return what `recis --help` prints."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.suppress(SystemExit):
        main(["--help"])
    return stream.getvalue()


@pytest.mark.parametrize("name", sorted(required_words()))
def test_page_is_complete(name):
    content = (ROOT / "docs" / f"{name}.md").read_text()
    words = {word for span in _CODE.findall(content) for word in re.findall(r"\w+", span)}
    missing = sorted(required_words()[name] - words)
    assert not missing, f"docs/{name}.md does not name these in backticks: {missing}"
