"""Read Parquet, ORC, CSV and JSONL files, watched folders and Hugging Face datasets into batches of tensors.

    config = DataConfig(paths=("logs/*.parquet",), format="parquet", batch_size=4096,
                        columns=(Ids("item_id"), Ids("clicks", default=()), Dense("price", default=0.0), Label("click")))
    with Reader(config) as reader:
        for batch in reader: ...           # RawBatch; reader.state_dict() after any of them is where to go on

Names are imported on first use, so that models and metrics, which need only Batch, do not import pyarrow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recis.io.assemble import BadRow
    from recis.io.batch import Batch, RawBatch, RowOrigin
    from recis.io.columns import Column, Dense, Floats, Group, Ids, Integer, Label, Strings, Weight
    from recis.io.config import Csv, DataConfig, Follow, TimeWindow
    from recis.io.files import check_same_files, fingerprint
    from recis.io.huggingface import from_hf
    from recis.io.reader import Reader

_HOME = {
    "BadRow": "recis.io.assemble",
    **dict.fromkeys(("Batch", "RawBatch", "RowOrigin"), "recis.io.batch"),
    **dict.fromkeys(
        ("Column", "Dense", "Floats", "Group", "Ids", "Integer", "Label", "Strings", "Weight"), "recis.io.columns"
    ),
    **dict.fromkeys(("Csv", "DataConfig", "Follow", "TimeWindow"), "recis.io.config"),
    **dict.fromkeys(("check_same_files", "fingerprint"), "recis.io.files"),
    "from_hf": "recis.io.huggingface",
    "Reader": "recis.io.reader",
}

__all__ = [
    "DataConfig",
    "Reader",
    "from_hf",
    "Column",
    "Dense",
    "Ids",
    "Floats",
    "Strings",
    "Label",
    "Weight",
    "Group",
    "Integer",
    "Csv",
    "TimeWindow",
    "Follow",
    "RawBatch",
    "RowOrigin",
    "Batch",
    "BadRow",
    "fingerprint",
    "check_same_files",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'recis.io' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
