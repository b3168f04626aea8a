"""Jobs of several ranks for tests: `fleet.run(2, ["train", ...])` is what torchrun does, without the seconds of its start.

A helper process imports the product, warms its compiled loops and then forks the ranks of one job after the other; each is
a process of its own with torchrun's variables, its own output files and a real end. Files of torchrun itself are used by
one test, which shows that the two do alike.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_PATHS = [ROOT, ROOT / "kernels", ROOT / "tests", ROOT / "tests" / "integration"]


@dataclass(frozen=True)
class RankDone:
    """How one rank ended: exit code (negative: the signal that killed it), standard output and standard error."""

    code: int
    out: str
    err: str


class FleetJob:
    """A job that runs: the process ids of its ranks, and its end."""

    def __init__(self, fleet: "Fleet", folder: Path, pids: list[int]) -> None:
        self._fleet, self._folder, self.pids = fleet, folder, pids

    def wait(self, timeout_s: float = 400.0) -> list[RankDone]:
        """Return how the ranks ended. One that is left when another has failed gets SIGTERM, as torchrun sends it.

        Raises:
            TimeoutError: a rank did not end; all are killed first.
        """
        codes = self._fleet.ask({"wait": self.pids, "timeout_s": timeout_s})
        done = []
        for rank, code in enumerate(codes):
            out, err = ((self._folder / f"{rank}.{kind}").read_text() for kind in ("out", "err"))
            done.append(RankDone(code, out, err))
        if any(code == -999 for code in codes):
            raise TimeoutError(f"ranks did not end within {timeout_s} s: {[(d.code, d.err[-2000:]) for d in done]}")
        return done


class Fleet:
    """The helper process."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        ours, theirs = socket.socketpair()
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, _PATHS)),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fleet_server.py")), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=env,
            cwd=ROOT,
        )
        theirs.close()
        self._socket = ours.makefile("rw")

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Send a request to the helper and return its answer."""
        self._socket.write(json.dumps(request) + "\n")
        self._socket.flush()
        line = self._socket.readline()
        if not line:
            raise RuntimeError("the fleet's helper process has ended")
        return json.loads(line)

    def start(
        self,
        world_size: int,
        argv: Sequence[Any] | Sequence[Sequence[Any]],
        *,
        env: Mapping[str, str] | Sequence[Mapping[str, str]] = {},
        call: str = "recis.cli:main",
    ) -> FleetJob:
        """Start a job.

        Args:
            world_size: ranks.
            argv: of the command, or one list per rank.
            env: variables on top of torchrun's, or one mapping per rank.
            call: module:function that is given argv.
        """
        self._count += 1
        folder = self._folder / f"job-{self._count}"
        folder.mkdir(parents=True)
        per_rank = argv if argv and isinstance(argv[0], list | tuple) else [argv] * world_size
        envs = [env] * world_size if isinstance(env, Mapping) else env
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = [
            {
                "argv": [str(item) for item in per_rank[rank]],
                "env": {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_RANK": str(rank),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    **envs[rank],
                },
            }
            for rank in range(world_size)
        ]
        pids = self.ask({"start": ranks, "folder": str(folder), "call": call})
        return FleetJob(self, folder, pids)

    def run(self, world_size: int, argv: Sequence[Any], *, timeout_s: float = 400.0, **options: Any) -> list[RankDone]:
        """Start a job and return how its ranks ended."""
        return self.start(world_size, argv, **options).wait(timeout_s)

    def close(self) -> None:
        """End the helper."""
        self._socket.close()
        self._process.terminate()
        self._process.wait(60)
