"""`recis ebrm serve`: score, explain and overrule over HTTP, with a page for people.

One process serves one model: its overrides file and its cache folder have one writer. There is no login. Listen on loopback,
or put a proxy that knows its users in front.
"""

import argparse
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from recis.errors import ConfigError

if TYPE_CHECKING:  # the command line builds its parser from this file, without loading torch
    from fastapi import FastAPI

    from recis.ebrm.entities import Item
    from recis.ebrm.model import EBRM
    from recis.ebrm.service import ServeConfig

OK = 0


def create_app(model: "EBRM", items: "Sequence[Item]" = (), config: "ServeConfig | None" = None) -> "FastAPI":
    """Return the application (ASGI) that serves a model and a catalogue.

    Raises:
        ConfigError: fastapi or uvicorn is not installed; an item has an undeclared type; two items have one id.
    """
    from recis.ebrm.service import ServeConfig, Service

    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"the service needs {' and '.join(missing)}: pip install 'recis[serve]'")
    return import_module("recis.ebrm.service_app").build_app(Service(model, items, config or ServeConfig()))


def add_serve_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments that `run_serve` reads."""
    command.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder that EBRM.save wrote")
    command.add_argument(
        "--items", type=Path, metavar="FILE", help="catalogue for the page and for scoring by id, JSON lines"
    )
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)"
    )
    command.add_argument("--port", type=int, default=8080, help="0 takes a free one (default 8080)")
    command.add_argument(
        "--encode-timeout-ms",
        type=float,
        default=50.0,
        metavar="MS",
        help="longest time a request spends on the encoder; 0: as long as it takes (default 50)",
    )
    command.add_argument("--max-items", type=int, default=5000, help="a request (default 5,000)")
    command.add_argument("--max-query-chars", type=int, default=2048, help="default 2,048")
    command.add_argument("--max-body-mib", type=float, default=16.0, help="default 16")


def run_serve(args: argparse.Namespace) -> int:
    """Serve until interrupted; prints the address once it listens.

    Raises:
        ConfigError: no model in the folder, a limit that breaks a rule, fastapi or uvicorn is not installed.
        DataError: the catalogue cannot be read; file and line are named.
        OSError: the address cannot be listened on.
    """
    from recis.ebrm.files import read_items
    from recis.ebrm.model import EBRM
    from recis.ebrm.service import ServeConfig

    config = ServeConfig(
        encode_timeout_ms=args.encode_timeout_ms or None,
        max_items=args.max_items,
        max_query_chars=args.max_query_chars,
        max_body_bytes=int(args.max_body_mib * 2**20),
    )
    model = EBRM.load(args.model, on_corrupt="skip")
    for damage in model.cache.damaged:
        print(f"recis ebrm serve: left out, its pairs are scored anew: {damage}", file=sys.stderr, flush=True)
    items = [] if args.items is None else list(read_items(args.items, model.config.schema))
    app = create_app(model, items, config)
    uvicorn = import_module("uvicorn")
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.create_server((args.host, args.port), family=family) as listener:
        # asyncio sets this only on sockets whose protocol is given; without it an answer in two writes waits 40 ms for an ACK
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        host, port = listener.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        print(f"model {model.version}, {len(items):,} items: http://{name}:{port}", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        with suppress(KeyboardInterrupt):  # uvicorn ends in order, then passes the signal on
            server.run(sockets=[listener])
    return OK
