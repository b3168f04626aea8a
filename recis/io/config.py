"""What to read and how: one frozen config per source of samples.

A config holds no open file and no state; `recis.io.Reader` takes it, checks the files and reads. `to_json` / `from_json`
round-trip, so a checkpoint can say how its data was read.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from recis.errors import ConfigError, nearest
from recis.io import columns as columns_module
from recis.io.columns import Column, Strings, check_columns

FORMATS = ("parquet", "orc", "csv", "jsonl", "huggingface")


@dataclass(frozen=True, kw_only=True, slots=True)
class Csv:
    """How the text of a CSV file is cut. Cells may be quoted by "; a line break inside a cell is not supported."""

    delimiter: str = ","
    column_names: tuple[str, ...] | None = None
    """Names of the columns of files without a header; None: the first line of each file is the header."""
    list_separator: str = "|"
    """What stands between the entries of a list in one cell."""

    def __post_init__(self) -> None:
        for name in ("delimiter", "list_separator"):
            value = getattr(self, name)
            if len(value) != 1 or value in '"\r\n':
                raise ConfigError(f"Csv: {name} must be one character, no quote and no line break; got {value!r}")
        if self.delimiter == self.list_separator:
            raise ConfigError(f"Csv: delimiter and list_separator must differ; both are {self.delimiter!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeWindow:
    """Read the data one window of time after the other: window w is [start + w * seconds, start + (w + 1) * seconds).

    With `column` the rows of a window are those whose time lies in it. Without, the paths are patterns of
    `time.strftime` (UTC), filled in with the begin of the window: "clicks/%Y-%m-%d/*.parquet".
    """

    start: int
    """Begin of the first window, seconds since 1970 (UTC)."""
    stop: int
    """No window begins at or after this second."""
    seconds: int
    column: str | None = None
    """A timestamp column of the file, or an integer one in `unit` since 1970."""
    unit: Literal["s", "ms", "us", "ns"] = "s"

    def __post_init__(self) -> None:
        if self.seconds < 1:
            raise ConfigError(f"TimeWindow: seconds must be at least 1; got {self.seconds}")
        if self.stop <= self.start:
            raise ConfigError(f"TimeWindow: stop must be after start; got start={self.start}, stop={self.stop}")
        if self.unit not in ("s", "ms", "us", "ns"):
            raise ConfigError(f"TimeWindow: unit must be s, ms, us or ns; got {self.unit!r}")

    @property
    def num_windows(self) -> int:
        """Windows that begin before `stop`."""
        return -(-(self.stop - self.start) // self.seconds)

    def bounds(self, window: int) -> tuple[int, int]:
        """Return [begin, end) of a window in seconds since 1970; the last one ends at `stop` at the latest."""
        begin = self.start + window * self.seconds
        return begin, min(begin + self.seconds, self.stop)


@dataclass(frozen=True, kw_only=True, slots=True)
class Follow:
    """Watch the paths for new files, read each one once, then wait for more."""

    closed: Literal["done", "stable"] = "done"
    """A file is complete when `<file>.done` stands beside it, or when its size has not changed for `stable_s`."""
    stable_s: float = 30.0
    poll_s: float = 5.0
    stop_after_idle_s: float | None = None
    """Seconds without a new file after which the reader ends; None waits for ever."""

    def __post_init__(self) -> None:
        if self.closed not in ("done", "stable"):
            raise ConfigError(f"Follow: closed must be 'done' or 'stable'; got {self.closed!r}")
        if self.poll_s <= 0 or self.stable_s < 0:
            raise ConfigError(
                f"Follow: poll_s must be above 0 and stable_s not below; got {self.poll_s}, {self.stable_s}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Files, their columns, and the order and size of batches."""

    paths: tuple[str, ...]
    """Files, folders (all files of the format below them) or globs; any fsspec path ("s3://...", "memory://...")."""
    format: Literal["parquet", "orc", "csv", "jsonl", "huggingface"]
    columns: tuple[Column, ...]
    batch_size: int
    """Global samples per optimizer step; a rank's micro-batch has at most batch_size / (ranks * micro-batches)."""
    num_lanes: int = 64
    """Parallel streams the units are dealt to: the most ranks that can read. Each open lane holds one row group open."""
    shuffle_rows: int = 0
    """Rows in the shuffle buffers of all lanes together; above 0 the order of the units is shuffled too."""
    seed: int = 0
    epochs: int = 1
    memory_limit_mib: int = 2048
    """Bound on what the reader holds: open row groups, shuffle buffers, prefetched batches."""
    prefetch_batches: int = 4
    """Steps prepared ahead of the one being used."""
    threads: int = 2
    """Threads that read and decode; the order of samples does not depend on it."""
    drop_last: bool = False
    """Whether the last step of an epoch is left out when it is smaller than batch_size."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """Whether a row that breaks its column's rule stops the run, or is left out, counted and listed."""
    csv: Csv = Csv()
    window: TimeWindow | None = None
    follow: Follow | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(
                f"format must be one of {', '.join(FORMATS)}; got {self.format!r}; {nearest(str(self.format), FORMATS)}"
            )
        if isinstance(self.paths, str) or not all(isinstance(path, str) for path in self.paths):
            raise ConfigError(f"paths must be a tuple of strings; got {self.paths!r}")
        if not self.paths and self.format != "huggingface":
            raise ConfigError("paths must name at least one file, folder or glob")
        check_columns(self.columns)
        least = {
            "batch_size": 1,
            "num_lanes": 1,
            "shuffle_rows": 0,
            "seed": 0,
            "epochs": 1,
            "memory_limit_mib": 1,
            "prefetch_batches": 1,
            "threads": 1,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name} must be at least {bound}; got {getattr(self, name)}")
        if self.seed >= 2**64:
            raise ConfigError(f"seed must be below 2**64; got {self.seed}")
        if self.on_bad_row not in ("raise", "skip"):
            raise ConfigError(f"on_bad_row must be 'raise' or 'skip'; got {self.on_bad_row!r}")
        self._check_modes()

    def _check_modes(self) -> None:
        if self.follow is not None and self.window is not None:
            raise ConfigError(
                "window and follow cannot be combined: a window needs all its files, follow reads them as they come"
            )
        if self.follow is not None and (self.epochs != 1 or self.drop_last):
            raise ConfigError("follow reads each file once and all of it: leave epochs at 1 and drop_last at False")
        if self.format == "huggingface" and self.follow is not None:
            raise ConfigError("follow watches files; a Hugging Face dataset has none to watch")
        if self.format == "huggingface" and self.window is not None and self.window.column is None:
            raise ConfigError("a window over a Hugging Face dataset needs TimeWindow(column=...)")
        if self.format == "csv":
            for column in self.columns:
                depth = 0 if isinstance(column, Strings) else 1
                if getattr(column, "depth", depth) > 1:
                    raise ConfigError(f"column {column.name!r}: CSV has no nested lists; use JSONL, Parquet or ORC")

    def to_json(self) -> dict[str, Any]:
        """Return the config as JSON-able data; `from_json` gives an equal one."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["paths"] = list(self.paths)
        data["columns"] = [columns_module.to_json(column) for column in self.columns]
        for name in ("csv", "window", "follow"):
            data[name] = None if data[name] is None else dataclasses.asdict(data[name])
        return json.loads(json.dumps(data))

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "DataConfig":
        """Return the config that `to_json` described.

        Raises:
            ConfigError: a field is unknown or breaks its rule.
        """
        fields = dict(data)
        known = [field.name for field in dataclasses.fields(DataConfig)]
        for name in fields:
            if name not in known:
                raise ConfigError(f"DataConfig has no field {name!r}; {nearest(name, known)}")
        fields["paths"] = tuple(fields["paths"])
        fields["columns"] = tuple(columns_module.from_json(column) for column in fields["columns"])
        if fields.get("csv") is not None:
            names = fields["csv"].get("column_names")
            fields["csv"] = Csv(**{**fields["csv"], "column_names": None if names is None else tuple(names)})
        if fields.get("window") is not None:
            fields["window"] = TimeWindow(**fields["window"])
        if fields.get("follow") is not None:
            fields["follow"] = Follow(**fields["follow"])
        return DataConfig(**fields)
