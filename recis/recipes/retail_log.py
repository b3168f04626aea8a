"""The purchase log of Online Retail (UCI 352): cleaned lines in the order of time, and what a cut-off splits them into.

Dropped are lines without a customer, cancelled invoices (`InvoiceNo` begins with C) and quantities of zero or below. A line
is one item on one invoice. Times are days since 1970 as float64; a day of 28 after a cut-off c is c <= day < c + 28.

    history = log.before(cutoff)            all that features may read: nothing else of the log is at hand then
    window = log.window(cutoff)             what was bought in the 28 days from the cut-off on
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from recis.errors import ConfigError

pc: Any = pyarrow.compute  # its functions are made when it is imported, so type checkers do not see them

WINDOW_DAYS = 28
MS_PER_DAY = 86_400_000
COLUMNS = ("InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID")


@dataclass(frozen=True, slots=True, kw_only=True)
class PurchaseLog:
    """Lines [N] in the order of time, with customers, items and invoices as numbers into the tables below them."""

    day: np.ndarray
    customer: np.ndarray
    item: np.ndarray
    invoice: np.ndarray
    quantity: np.ndarray
    unit_price: np.ndarray
    customer_ids: np.ndarray
    """[U] int64, ascending: CustomerID of each customer number. All of the log, whatever part of it this is."""
    stock_codes: tuple[str, ...]
    """[I], ascending: StockCode of each item number, likewise."""
    descriptions: tuple[str, ...]
    """[I]: text of the item's first line, "" where it has none."""

    def __len__(self) -> int:
        return len(self.day)

    @property
    def num_customers(self) -> int:
        """U, of the whole log."""
        return len(self.customer_ids)

    @property
    def num_items(self) -> int:
        """I, of the whole log."""
        return len(self.stock_codes)

    @property
    def end(self) -> float:
        """Midnight after the last line, in days since 1970."""
        return float(np.floor(self.day[-1])) + 1.0

    def before(self, cutoff: float) -> "PurchaseLog":
        """Return the lines before a cut-off."""
        return self._lines(slice(0, int(np.searchsorted(self.day, cutoff))))

    def window(self, cutoff: float, days: int = WINDOW_DAYS) -> "PurchaseLog":
        """Return the lines of the `days` days from a cut-off on."""
        return self._lines(slice(*np.searchsorted(self.day, (cutoff, cutoff + days))))

    def pairs(self) -> np.ndarray:
        """Return the distinct customer * I + item of these lines, ascending."""
        return np.unique(self.customer * self.num_items + self.item)

    def bought(self, customers: np.ndarray) -> np.ndarray:
        """Return bool [len(customers), I]: whether each of the customers bought the item in these lines."""
        pairs = self.pairs()
        table = np.zeros((self.num_customers, self.num_items), dtype=bool)
        table[pairs // self.num_items, pairs % self.num_items] = True
        return table[customers]

    def _lines(self, lines: slice) -> "PurchaseLog":
        names = ("day", "customer", "item", "invoice", "quantity", "unit_price")
        return replace(self, **{name: getattr(self, name)[lines] for name in names})


def active_customers(log: PurchaseLog, cutoff: float) -> np.ndarray:
    """Return the customers, ascending, seen before a cut-off who buy anything in the 28 days after it."""
    return np.intersect1d(log.before(cutoff).customer, log.window(cutoff).customer)


def read_log(path: Path) -> PurchaseLog:
    """Read and clean transactions.parquet.

    Raises:
        ConfigError: a column is missing, or no line is left.
    """
    names = pq.read_schema(path).names
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ConfigError(f"--data {path}: has no column {missing[0]!r}; it has {', '.join(names)}")
    return clean(pq.read_table(path, columns=list(COLUMNS)), where=f"--data {path}")


def clean(table: pa.Table, *, where: str = "purchases") -> PurchaseLog:
    """Return the log of a table with the columns of the public file.

    Raises:
        ConfigError: no line is left.
    """
    cancelled = pc.starts_with(table["InvoiceNo"].cast(pa.string()), "C")
    keep = pc.and_(pc.is_valid(table["CustomerID"]), pc.and_(pc.invert(cancelled), pc.greater(table["Quantity"], 0)))
    table = table.filter(keep)
    if table.num_rows == 0:
        raise ConfigError(f"{where}: no purchase is left without unknown customers, cancellations and returns")
    time_ms = table["InvoiceDate"].cast(pa.timestamp("ms")).cast(pa.int64()).to_numpy()
    order = np.argsort(time_ms, kind="stable")
    customer_ids, customer = np.unique(table["CustomerID"].cast(pa.int64()).to_numpy()[order], return_inverse=True)
    stock_codes, item = _numbered(table["StockCode"], order)
    _, invoice = _numbered(table["InvoiceNo"], order)
    first_line = np.unique(item, return_index=True)[1]
    descriptions = pc.fill_null(table["Description"], "").take(pa.array(order[first_line])).to_pylist()
    return PurchaseLog(
        day=time_ms[order] / MS_PER_DAY,
        customer=customer,
        item=item,
        invoice=invoice,
        quantity=table["Quantity"].to_numpy()[order].astype(np.float64),
        unit_price=table["UnitPrice"].to_numpy()[order].astype(np.float64),
        customer_ids=customer_ids,
        stock_codes=tuple(stock_codes),
        descriptions=tuple(descriptions),
    )


def _numbered(column: pa.ChunkedArray, order: np.ndarray) -> tuple[Sequence[str], np.ndarray]:
    """Return the distinct strings of a column, ascending, and the number of each line's, lines in the given order."""
    encoded = column.cast(pa.string()).combine_chunks().dictionary_encode()
    words = np.array(encoded.dictionary.to_pylist(), dtype=object)
    rank = np.argsort(words)
    number = np.empty(len(words), dtype=np.int64)
    number[rank] = np.arange(len(words))
    return words[rank].tolist(), number[encoded.indices.to_numpy()[order]]
