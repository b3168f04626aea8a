"""`--set a.b=c`: typed values, nested fields, near names, and the config's own rules."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from recis.errors import ConfigError
from recis.trainer.config import DenseAdamW
from recis.trainer.override import override


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    name: str
    dim: int = 16

    def __post_init__(self):
        if self.dim < 1:
            raise ConfigError(f"table {self.name!r}: dim must be at least 1; got {self.dim}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    steps: int | None = None
    rate: float = 0.1
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    note: str = ""
    text: str | None = None
    out: Path = Path("x")
    widths: tuple[int, ...] = (1, 2)
    optimizer: DenseAdamW = DenseAdamW()  # noqa: RUF009
    tables: tuple[Table, ...] = (Table(name="u"), Table(name="v"))


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("steps=100", "steps", 100),
        ("steps=1e3", "steps", 1000),
        ("steps=none", "steps", None),
        ("steps=9007199254740993", "steps", 9007199254740993),
        ("rate=3", "rate", 3.0),
        ("rate=1e-4", "rate", 1e-4),
        ("flag=true", "flag", True),
        ("flag=0", "flag", False),
        ("kind=b", "kind", "b"),
        ("note=1", "note", "1"),
        ("note=a=b", "note", "a=b"),
        ("note=", "note", ""),
        ("text=none", "text", None),
        ("text=x", "text", "x"),
        ("out=/a/b", "out", Path("/a/b")),
        ("widths=3,4,5", "widths", (3, 4, 5)),
        ("widths=[]", "widths", ()),
        ("widths.1=9", "widths", (1, 9)),
        ("optimizer.betas=0.5,0.6", "optimizer", DenseAdamW(betas=(0.5, 0.6))),
        ("optimizer.lr=2", "optimizer", DenseAdamW(lr=2.0)),
        ("tables.1.dim=32", "tables", (Table(name="u"), Table(name="v", dim=32))),
    ],
)
def test_values(setting, field, value):
    got = getattr(override(Config(), [setting]), field)
    assert got == value
    assert type(got) is type(value)


def test_several_in_order():
    got = override(Config(), ["steps=1", "steps=2", "rate=0.5"])
    assert (got.steps, got.rate) == (2, 0.5)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("stepz=1", "Config has no field 'stepz'; did you mean 'steps'"),
        ("tables.0.dime=1", "Table has no field 'dime'; did you mean 'dim'"),
        ("tables.2.dim=1", "must be a position from 0 to 1"),
        ("tables.u.dim=1", "must be a position from 0 to 1"),
        ("rate.x=1", "asks for a field of a float"),
        ("steps=ten", "'ten' is not a number"),
        ("steps=1.5", "'1.5' is not a whole number"),
        ("flag=maybe", "'maybe' is not true or false"),
        ("kind=c", "'c' is not one of a, b"),
        ("optimizer=adam", "set its fields"),
        ("optimizer.betas=1", "must have 2 values"),
        ("tables.0.dim=0", "table 'u': dim must be at least 1; got 0"),
        ("steps", "write it as name=value"),
        ("=3", "write it as name=value"),
    ],
)
def test_refused(setting, text):
    with pytest.raises(ConfigError) as error:
        override(Config(), [setting])
    assert text in str(error.value)
    assert setting in str(error.value)
