"""Run a frozen tower once over all texts, so that training reads vectors by id instead of running the tower each epoch.

    ids, texts --distinct texts--> token ids --distinct, sorted by length--> batches (length_batches) --groups--> parts
    each part: encode, float16, write under another name, fsync, rename        all parts -> vectors.npy, MANIFEST.json last

The plan is a function of the encoder's version and the data alone. A run that was killed at any instant goes on behind its
last whole part and gives the same bytes; each distinct text is in exactly one part. Another version, or other data, is refused
in a folder that holds something already. One process writes at a time (flock).
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from recis.checkpoint.folder import sync_folder
from recis.errors import ConfigError, DataError
from recis.towers.batching import length_batches, padding_waste
from recis.towers.vector_files import FORMAT, FORMAT_VERSION, IDS, LENGTHS, MANIFEST, ROWS, STATES_FORMAT, VECTORS

_PARTS, _PLAN, _LOCK = "parts", "plan.json", ".lock"
_TOKENIZE_TEXTS = 4096


class Encoder(Protocol):
    """What is run: a TextTower, or anything else with these three.

    With an attribute `per_token = True` (CutEncoder) `encode` gives a vector per token, [sum of the lengths, D]; the folder
    then holds states that open_states reads.
    """

    def version(self) -> str:
        """Return what names the vectors: a hash of all they depend on but the text."""
        ...

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        ...

    def encode(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Return vectors [B, D]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecomputeConfig:
    """How the work is cut."""

    batch_tokens: int = 8192
    """Cells (rows * longest) of a batch."""
    max_waste: float = 0.05
    """Largest share of padding in a batch."""
    part_rows: int = 4096
    """Texts of a part, at least: what a kill can cost."""

    def __post_init__(self) -> None:
        if self.part_rows < 1:
            raise ConfigError(f"PrecomputeConfig: part_rows must be at least 1; got {self.part_rows}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecomputeReport:
    """What a call did."""

    num_ids: int
    num_rows: int
    """Distinct texts (by their tokens): rows of vectors.npy."""
    num_encoded: int
    """Of them, encoded by this call; the others were there."""
    waste: float
    """Share of padding over the whole plan."""
    version: str


def precompute(
    encoder: Encoder,
    ids: Sequence[int] | np.ndarray,
    texts: Sequence[str],
    out: str | Path,
    config: PrecomputeConfig | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> PrecomputeReport:
    """Write the vectors of some texts by id into a folder that open_vectors reads; go on where an earlier call was stopped.

    Args:
        encoder: what is run; it must not train.
        ids: N int64; an id may come again with the same text.
        texts: N strings.
        out: folder, made where it is missing.
        config: None: the defaults.
        progress: called with (rows done, rows in all) after each part.

    Raises:
        DataError: an id has two texts, or a vector is not finite in float16.
        ConfigError: the folder holds other vectors, or another process writes into it.
    """
    config = config or PrecomputeConfig()
    id_array = np.asarray(ids)
    if id_array.ndim != 1 or len(id_array) != len(texts) or (len(id_array) and id_array.dtype.kind != "i"):
        raise ConfigError(
            f"ids and texts must be one each per row; got {id_array.shape} {id_array.dtype}, {len(texts)}"
        )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        unique_ids, text_of_id, distinct = _distinct(id_array.astype(np.int64), texts)
        version = encoder.version()
        fingerprint = _fingerprint(version, config, unique_ids, text_of_id, distinct)
        done = _finished(out, fingerprint)
        if done is not None:
            return done
        token_of_text, tokens = _tokens(encoder, distinct)
        lengths = [len(row) for row in tokens]
        batches = length_batches(lengths, max_tokens=config.batch_tokens, max_waste=config.max_waste)
        waste = padding_waste(lengths, batches)
        parts = _grouped(batches, config.part_rows)
        folder = _begin(out, fingerprint)
        num_encoded = _encode_parts(encoder, tokens, parts, folder, progress)
        position = np.zeros(len(tokens), dtype=np.int64)  # of each distinct token row in vectors.npy
        order = np.array([number for batch in batches for number in batch], dtype=np.int64)
        position[order] = np.arange(len(tokens))
        _save(out / IDS, unique_ids)
        _save(out / ROWS, position[token_of_text[text_of_id]])
        per_token = bool(getattr(encoder, "per_token", False))
        if per_token:
            _save(out / LENGTHS, np.array(lengths, dtype=np.int64)[order])
        width = _join_parts(out, folder, len(parts), sum(lengths) if per_token else len(tokens))
        report = PrecomputeReport(
            num_ids=len(unique_ids), num_rows=len(tokens), num_encoded=num_encoded, waste=waste, version=version
        )
        _write_manifest(out, fingerprint, report, width, STATES_FORMAT if per_token else FORMAT)
        shutil.rmtree(folder)
        return report


def _distinct(ids: np.ndarray, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return distinct ids ascending [N'], the number of each one's text [N'], and the distinct texts."""
    numbers: dict[str, int] = {}
    number_of = np.fromiter((numbers.setdefault(text, len(numbers)) for text in texts), np.int64, len(texts))
    order = np.argsort(ids, kind="stable")
    ids, number_of = ids[order], number_of[order]
    first = np.ones(len(ids), dtype=bool)
    first[1:] = ids[1:] != ids[:-1]
    clash = ~first
    clash[1:] &= number_of[1:] != number_of[:-1]
    if clash.any():
        at = int(clash.argmax())
        raise DataError(
            "an id has two different texts",
            row=int(order[at]),
            value=int(ids[at]),
            option=f"its text in row {int(order[at - 1])} is another; keep one row per id",
        )
    return ids[first], number_of[first], list(numbers)


def _tokens(encoder: Encoder, texts: list[str]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the number of each text's tokens [N], and the distinct token rows: texts that are cut may become equal."""
    numbers: dict[bytes, int] = {}
    number_of = np.zeros(len(texts), dtype=np.int64)
    for first in range(0, len(texts), _TOKENIZE_TEXTS):
        for offset, row in enumerate(encoder.tokenize(texts[first : first + _TOKENIZE_TEXTS])):
            key = np.asarray(row, dtype=np.int32).tobytes()
            number_of[first + offset] = numbers.setdefault(key, len(numbers))
    return number_of, [np.frombuffer(key, dtype=np.int32) for key in numbers]


def _fingerprint(version: str, config: PrecomputeConfig, ids: np.ndarray, numbers: np.ndarray, texts: list[str]) -> str:
    digest = hashlib.sha256(f"{version} {config}".encode())
    digest.update(ids.tobytes())
    digest.update(numbers.tobytes())
    for text in texts:
        data = text.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _finished(out: Path, fingerprint: str) -> PrecomputeReport | None:
    if not (out / MANIFEST).exists():
        return None
    manifest: dict[str, Any] = json.loads((out / MANIFEST).read_text())
    if manifest.get("fingerprint") != fingerprint:
        raise _other(out)
    shutil.rmtree(out / _PARTS, ignore_errors=True)
    told = {name: manifest[name] for name in ("num_ids", "num_rows", "waste", "version")}
    return PrecomputeReport(num_encoded=0, **told)


def _other(out: Path) -> ConfigError:
    return ConfigError(
        f"{out}: holds vectors of other weights, settings or data; name another folder for the new ones, and let the towers "
        "refresh to it"
    )


def _begin(out: Path, fingerprint: str) -> Path:
    """Return the folder of the parts, begun by this run or by an earlier one of the same plan."""
    folder = out / _PARTS
    plan = folder / _PLAN
    if plan.exists():
        if json.loads(plan.read_text())["fingerprint"] != fingerprint:
            raise _other(out)
        return folder
    others = sorted(item.name for item in out.iterdir() if item.name not in (_LOCK, _PARTS))
    if others:
        raise ConfigError(f"{out}: the folder is not empty (it has {others[0]}); name another")
    folder.mkdir(exist_ok=True)
    _write(plan, json.dumps({"fingerprint": fingerprint}).encode())
    return folder


def _grouped(batches: list[list[int]], part_rows: int) -> list[list[list[int]]]:
    parts: list[list[list[int]]] = []
    rows = part_rows
    for batch in batches:
        if rows >= part_rows:
            parts.append([])
            rows = 0
        parts[-1].append(batch)
        rows += len(batch)
    return parts


def _encode_parts(
    encoder: Encoder,
    tokens: list[np.ndarray],
    parts: list[list[list[int]]],
    folder: Path,
    progress: Callable[[int, int], None] | None,
) -> int:
    num_encoded = num_done = 0
    for number, part in enumerate(parts):
        rows = sum(len(batch) for batch in part)
        path = folder / f"{number:06d}.npy"
        if not path.exists():
            vectors = [
                encoder.encode([tokens[at].tolist() for at in batch]).detach().float().cpu().numpy() for batch in part
            ]
            joined = np.concatenate(vectors)
            if len(joined) and not float(np.abs(joined).max()) <= float(np.finfo(np.float16).max):
                raise DataError("the tower gives vectors that are not finite in float16", option="normalise its output")
            _save(path, joined.astype(np.float16))
            num_encoded += rows
        num_done += rows
        if progress is not None:
            progress(num_done, len(tokens))
    return num_encoded


def _join_parts(out: Path, folder: Path, num_parts: int, num_rows: int) -> int:
    """Write vectors.npy part by part and return its width; nothing is held but one part."""
    paths = [folder / f"{number:06d}.npy" for number in range(num_parts)]
    width = np.load(paths[0], mmap_mode="r").shape[1] if paths else 0
    partial = out / f".tmp-{VECTORS}"
    target = (
        np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=(num_rows, width)) if num_rows else None
    )
    if target is None:
        _save(out / VECTORS, np.zeros((0, width), dtype=np.float16))
        return width
    first = 0
    for path in paths:
        part = np.load(path)
        target[first : first + len(part)] = part
        first += len(part)
    if first != num_rows:
        raise DataError(
            f"the parts hold {first} rows, the plan has {num_rows}", file=str(folder), option="delete the folder"
        )
    target.flush()
    del target
    _settle(partial, out / VECTORS)
    return width


def _write_manifest(out: Path, fingerprint: str, report: PrecomputeReport, width: int, kind: str) -> None:
    files = (IDS, ROWS, VECTORS) if kind == FORMAT else (IDS, ROWS, LENGTHS, VECTORS)
    content = {
        "format": kind,
        "format_version": FORMAT_VERSION,
        "version": report.version,
        "fingerprint": fingerprint,
        "num_ids": report.num_ids,
        "num_rows": report.num_rows,
        "width": width,
        "dtype": "float16",
        "waste": report.waste,
        "bytes": {name: (out / name).stat().st_size for name in files},
    }
    _write(out / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def _save(path: Path, array: np.ndarray) -> None:
    partial = path.with_name(f".tmp-{path.name}")
    with partial.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    _settle(partial, path)


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".tmp-{path.name}")
    partial.write_bytes(data)
    _settle(partial, path)


def _settle(partial: Path, path: Path) -> None:
    """Bring a written file to the disk and give it its name: after a kill it is there whole, or not at all."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    partial.replace(path)
    sync_folder(path.parent)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / _LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{out}: another process is writing these vectors; wait for it") from None
        yield
