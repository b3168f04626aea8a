"""The commands `recis towers ...`: a few lines around the part that does the work."""

import argparse
import sys
from pathlib import Path
from typing import Any

from recis.errors import ConfigError, DataError

OK = 0
POOLINGS = ("mean", "first", "last")


def add_towers(commands: Any) -> None:
    """Mount `towers` and its commands below the subparsers of `recis`."""
    text = "Text towers: run a frozen one once over all texts, and keep the vectors by id."
    towers = commands.add_parser("towers", help=text, description=text)
    below = towers.add_subparsers(title="commands", metavar="COMMAND", required=True)
    text = "Write the vectors of all texts into a folder; run it again to go on where it was stopped."
    command = below.add_parser("precompute", help=text, description=text)
    command.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    command.set_defaults(run_command=_precompute)
    command.add_argument(
        "--tower", required=True, metavar="DIR", help="folder of a Hugging Face model and its tokenizer"
    )
    command.add_argument("--data", type=Path, required=True, metavar="FILE", help="Parquet, CSV or JSON lines")
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a new folder, or that of a stopped run"
    )
    command.add_argument(
        "--id-column", default="id", help="integers, or strings, which are hashed as Hash('farm') does"
    )
    command.add_argument("--text-column", default="text", help="strings; a missing one is an empty text")
    command.add_argument("--pooling", choices=POOLINGS, default="mean", help="over the tokens' states (default mean)")
    command.add_argument(
        "--cut",
        type=int,
        metavar="LAYERS",
        help="keep every token's state behind this many layers, for a CutTower that trains those above",
    )
    command.add_argument("--max-tokens", type=int, default=64, help="tokens of a text that are read (default 64)")
    command.add_argument("--batch-tokens", type=int, default=8192, help="token places of a batch (default 8192)")
    command.add_argument("--part-rows", type=int, default=4096, help="texts a kill can cost (default 4096)")
    command.add_argument("--bf16", action="store_true", help="run the model in bfloat16")


def _precompute(args: argparse.Namespace) -> int:
    from recis.towers.cut import CutEncoder
    from recis.towers.pooling import FirstToken, LastToken, MeanPool
    from recis.towers.precomputation import PrecomputeConfig, precompute
    from recis.towers.text import TextTowerConfig

    config = PrecomputeConfig(batch_tokens=args.batch_tokens, part_rows=args.part_rows)
    ids, texts = read_texts(args.data, args.id_column, args.text_column)
    pooling = dict(zip(POOLINGS, (MeanPool, FirstToken, LastToken), strict=True))[args.pooling]
    tower = TextTowerConfig(
        name="text",
        column="text",
        path=args.tower,
        pooling=pooling,
        max_tokens=args.max_tokens,
        bf16=args.bf16,
        frozen_layers=args.cut,
    ).build()

    def show(done: int, rows: int) -> None:
        print(f"{done:,} of {rows:,} distinct texts", file=sys.stderr)

    encoder = tower.eval() if args.cut is None else CutEncoder(tower)
    report = precompute(encoder, ids, texts, args.out, config, progress=show)
    num_empty, num_cut = tower.counts.tolist()
    print(
        f"{args.out}: {report.num_ids:,} ids, {report.num_rows:,} distinct texts, {report.num_encoded:,} of them encoded now; "
        f"padding {report.waste:.1%}; {num_cut:,} texts cut to {args.max_tokens} tokens, {num_empty:,} empty; "
        f"version {report.version[:12]}"
    )
    return OK


def read_texts(path: Path, id_column: str, text_column: str) -> tuple[Any, list[str]]:
    """Return ids int64 [N] and texts [N] of two columns of a file.

    Raises:
        DataError: the file cannot be read, or an id is missing.
        ConfigError: there is no such column, or its type is wrong.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet as pq

    from recis.errors import nearest

    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
        elif path.suffix == ".csv":
            table = pyarrow.csv.read_csv(path)
        else:
            table = pyarrow.json.read_json(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"cannot be read: {error}", file=str(path)) from error
    for name in (id_column, text_column):
        if name not in table.column_names:
            raise ConfigError(f"{path}: no column {name!r}; {nearest(name, table.column_names)}")
    ids, texts = table[id_column].combine_chunks(), table[text_column].combine_chunks()
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type) or pa.types.is_null(texts.type)):
        raise ConfigError(f"{path}: column {text_column!r} must hold strings; it holds {texts.type}")
    if ids.null_count:
        raise DataError("an id is missing", file=str(path), row=ids.is_null().index(True).as_py(), column=id_column)
    return _int64(ids, path, id_column), [text or "" for text in texts.to_pylist()]


def _int64(ids: Any, path: Path, name: str) -> Any:
    import pyarrow as pa

    from recis.jagged import JaggedTensor
    from recis_kernels.id_hash import hash_strings

    if pa.types.is_integer(ids.type):
        return ids.cast(pa.int64()).to_numpy(zero_copy_only=False)
    if not (pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)):
        raise ConfigError(f"{path}: column {name!r} must hold integers or strings; it holds {ids.type}")
    strings = JaggedTensor.from_strings(ids.to_pylist())
    return hash_strings(strings.flat_values, strings.offsets, [0, len(ids)], ["farm"], [None]).numpy()
