"""Speed around EBRM's scoring: precomputing a cache, and answering clients over HTTP.

    make bench, or: pytest benchmarks/test_ebrm_service.py --benchmark-json=out.json

test_precompute: pairs per second into a cache folder, beside the same encoder over the same pairs in bare batches.
test_precompute_10k: 10,000 queries with a scorer that costs nothing: what precomputing costs besides the encoder.
test_http: `recis ebrm serve` in a process of its own, 50 clients at a time on loopback, all scores cached. Clients and service
share the machine's cores, and a request waits for those before it: the model answers one at a time.
"""

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from recis.bench.harness import alternate, keep
from recis.ebrm import EBRM, EBRMConfig, Item, QEScorer
from recis.ebrm.files import write_rows
from recis.ebrm.persist import CACHE_NAME
from recis.ebrm.precompute import precompute

if TYPE_CHECKING:
    from conftest import Offers

    from recis.ebrm.scorer import Pair

BATCH_PAIRS = 256
LEAST_SHARE = 0.9  # of the encoder's own throughput
NUM_QUERIES, CANDIDATES = 10_000, 200
CLIENTS, REQUESTS_PER_CLIENT = 50, 20
LISTENS = re.compile(r"http://([\d.]+):(\d+)")


@pytest.fixture(scope="module")
def encoder(offers: "Offers") -> QEScorer:
    """The small encoder with fresh weights: what it says is noise, what it costs is not."""
    return QEScorer.small([*offers.texts[:2000], *offers.queries]).eval()


@torch.inference_mode()
def bare_batches(scorer: QEScorer, pairs: "list[Pair]") -> None:
    order = scorer.longest_first(pairs)
    for first in range(0, len(order), BATCH_PAIRS):
        scorer([pairs[place] for place in order[first : first + BATCH_PAIRS]])


def test_precompute(benchmark, offers, encoder, tmp_path):
    items, queries = offers.items[:200], offers.queries[:30]
    model = EBRM(EBRMConfig(schema=offers.schema), encoder)
    pairs = [(query, entity) for query in queries for entity in model.pack([*items, Item(id="none of all")]).distinct]
    folders = iter(range(1000))
    done = []

    def ahead() -> None:
        model.open_cache(tmp_path / str(next(folders)))
        done.append(precompute(model, queries, items))

    impls = {"precompute": ahead, "bare batches": partial(bare_batches, encoder, pairs)}
    bare_batches(encoder, pairs[:1000])
    benchmark.pedantic(ahead, rounds=1)
    told = keep(
        benchmark,
        case=f"{len(queries)} queries, {len(pairs)} (query, entity) pairs, small encoder",
        ours="precompute",
        seconds=alternate(impls, 4, "cpu"),
        items=len(pairs),
        targets={"bare batches": LEAST_SHARE},
    )
    assert all(run.num_encoded == len(pairs) for run in done)
    assert told["results"]["precompute"]["items_per_s"] > 0


def test_precompute_10k(benchmark, offers, tmp_path):
    """The whole of 10,000 queries, each with 200 candidates; a looked-up score costs a microsecond."""
    model = EBRM(EBRMConfig(schema=offers.schema), QEScorer.table({}, default=1.0))
    queries = [f"{offers.queries[place % len(offers.queries)]} {place}" for place in range(NUM_QUERIES)]
    generator = np.random.default_rng(0)
    candidates = {query: generator.choice(3000, CANDIDATES, replace=False).tolist() for query in queries}
    model.open_cache(tmp_path / "cache")
    began = time.perf_counter()
    done = precompute(model, queries, offers.items[:3000], candidates=candidates)
    seconds = time.perf_counter() - began
    assert done.num_encoded == done.num_pairs == model.cache.num_pairs
    benchmark.pedantic(partial(precompute, model, queries[:100], offers.items[:3000], candidates=candidates), rounds=3)
    keep(
        benchmark,
        case=f"{NUM_QUERIES} queries x {CANDIDATES} candidates, {done.num_pairs} pairs, a scorer that costs nothing",
        ours="precompute",
        seconds={"precompute": [seconds]},
        items=done.num_pairs,
        extra={
            "us_per_pair": round(seconds / done.num_pairs * 1e6, 3),
            "cache_bytes_per_pair": round(model.cache.num_bytes / done.num_pairs, 3),
        },
    )


@contextmanager
def serving(folder: Path, items: Path) -> Iterator[tuple[str, int]]:
    """Run the service in a process of its own and give its address."""
    command = [
        sys.executable,
        "-m",
        "recis",
        "ebrm",
        "serve",
        "--model",
        f"{folder}",
        "--items",
        f"{items}",
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = LISTENS.search(line)
            assert found is not None, line
            yield found[1], int(found[2])
        finally:
            process.terminate()


async def one_client(host: str, port: int, bodies: list[bytes]) -> list[float]:
    """Send requests one after the other over one connection; return the seconds of each."""
    reader, writer = await asyncio.open_connection(host, port)
    seconds = []
    for body in bodies:
        head = f"POST /score HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        began = time.perf_counter()
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", answer.lower())[1])  # pyright: ignore[reportOptionalSubscript]
        content = await reader.readexactly(length)
        seconds.append(time.perf_counter() - began)
        assert answer.startswith(b"HTTP/1.1 200"), content[:200]
    writer.close()
    return seconds


async def all_clients(host: str, port: int, bodies: list[list[bytes]]) -> list[float]:
    answers = await asyncio.gather(*(one_client(host, port, own) for own in bodies))
    return [second for seconds in answers for second in seconds]


@pytest.mark.parametrize("num_candidates", [50, 1000])
def test_http(benchmark, offers, encoder, tmp_path, num_candidates):
    items, queries = offers.items[:1000], offers.queries[:10]
    model = EBRM(EBRMConfig(schema=offers.schema), encoder)
    model.save(tmp_path / "run")
    model.open_cache(tmp_path / "run" / CACHE_NAME)
    precompute(model, queries, items)
    write_rows(tmp_path / "items.jsonl", (item.to_json() for item in items))
    ids = [item.id for item in items[:num_candidates]]
    texts = [json.dumps({"query": query, "item_ids": ids}).encode() for query in queries]
    bodies = [[texts[(client + turn) % len(texts)] for turn in range(REQUESTS_PER_CLIENT)] for client in range(CLIENTS)]
    with serving(tmp_path / "run", tmp_path / "items.jsonl") as (host, port):
        alone = asyncio.run(one_client(host, port, texts * 5))[len(texts) :]
        began = time.perf_counter()
        crowd = asyncio.run(all_clients(host, port, bodies))
        per_s = len(crowd) / (time.perf_counter() - began)
        benchmark.pedantic(lambda: asyncio.run(one_client(host, port, texts)), rounds=2)
    p50, p99 = np.percentile(crowd, [50, 99]) * 1e3
    told = keep(
        benchmark,
        case=f"{CLIENTS} clients at a time on loopback, {num_candidates} candidates by id, all cached",
        ours="one of 50 clients",
        seconds={"one of 50 clients": crowd, "a client alone": alone},
        items=num_candidates,
        extra={
            "requests": len(crowd),
            "requests_per_s": round(per_s, 1),
            "scores_per_s": round(per_s * num_candidates, 1),
            "p50_ms": round(float(p50), 3),
            "p99_ms": round(float(p99), 3),
            "alone_p99_ms": round(float(np.percentile(alone, 99)) * 1e3, 3),
        },
    )
    assert told["requests"] == CLIENTS * REQUESTS_PER_CLIENT
