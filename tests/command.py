"""Run a command of the product in this process: `recis("eval", "--run", folder, ...)` -> its exit code and output."""

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

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
