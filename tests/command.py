"""Run a command of the product in this process: `recis("eval", "--run", folder, ...)` -> its exit code and output.

And look at what it left on the disk.
"""

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recis.checkpoint import list_checkpoints, read_manifest
from recis.cli import main


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a failure prints; what the progress bar wrote before it is left out."""
        line = self.err.splitlines()[-1]
        assert line.startswith("recis "), self.err
        assert "Traceback" not in self.err
        return line


def recis(*argv: Any) -> Done:
    """Run one command."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(item) for item in argv])
        except SystemExit as stop:  # argparse ends wrong arguments and --help in this way
            code = stop.code if isinstance(stop.code, int) else 1
    return Done(code, out.getvalue(), err.getvalue())


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_end(run: Path, other: Path) -> None:
    """Assert that the newest checkpoints of two runs are equal in every byte of every tensor and in the reader's position."""
    ours, theirs = (read_manifest(list_checkpoints(folder)[-1]) for folder in (run, other))
    assert ours.step == theirs.step
    assert ours.reader == theirs.reader
    for name in {*ours.files, *theirs.files} - {"config.json"}:
        assert ours.files[name].sha256 == theirs.files[name].sha256, name
