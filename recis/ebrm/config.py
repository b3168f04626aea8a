"""Settings of a model, and the schemas it is usually built with.

`ebrm_full` lets the encoder score every type. `ebrm_fast` compares codes and numbers with those of the query instead, so
that a cold query needs few encoder calls.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from recis.ebrm.entities import EntitySchema, TypeConfig, check_keys
from recis.errors import ConfigError

Logic = Literal["product", "goedel", "lukasiewicz"]
COMPARED = ("model", "capacity", "size", "speed")


@dataclass(frozen=True, kw_only=True, slots=True)
class EBRMConfig:
    """How a model scores; saved with it."""

    schema: EntitySchema
    logic: Logic = "product"
    """product, goedel or lukasiewicz: see recis.ebrm.soft_logic."""
    learn_relaxation: bool = True
    category_type: str = "category"
    """The type whose verdict is the category step."""
    encode_timeout_ms: float | None = None
    """Longest time a request spends on the encoder; None: as long as it takes."""
    retry_after_s: float = 30.0
    """How long a pair that failed or timed out is not encoded again."""
    max_delta_pairs: int = 5_000_000
    """Pairs the memory part of the cache holds."""
    encode_batch_pairs: int = 256

    def __post_init__(self) -> None:
        if self.encode_timeout_ms is not None and not self.encode_timeout_ms > 0:
            raise ConfigError(f"encode_timeout_ms must be above 0 or None; got {self.encode_timeout_ms}")
        if not self.retry_after_s >= 0:
            raise ConfigError(f"retry_after_s must be at least 0; got {self.retry_after_s}")
        if self.max_delta_pairs < 1 or self.encode_batch_pairs < 1:
            raise ConfigError(
                "max_delta_pairs and encode_batch_pairs must be at least 1; got "
                f"{self.max_delta_pairs} and {self.encode_batch_pairs}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a JSON object."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "schema"}
        return plain | {"schema": self.schema.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "EBRMConfig":
        """Return the settings that `to_json` wrote.

        Raises:
            DataError: unknown or missing keys.
            ConfigError: a value breaks a rule.
        """
        optional = [name for name in EBRMConfig.__dataclass_fields__ if name != "schema"]
        check_keys(data, required=("schema",), optional=optional, what="EBRM config")
        return EBRMConfig(**{**data, "schema": EntitySchema.from_json(data["schema"])})


def ebrm_full() -> EntitySchema:
    """Return the default schema: ten types of shop items, all scored by the encoder."""
    return EntitySchema(
        types=(
            TypeConfig(name="category", hard=True),
            TypeConfig(name="brand", hard=True),
            TypeConfig(name="series"),
            TypeConfig(name="model", kind="code", hard=True),
            TypeConfig(name="capacity", kind="number", units=("gb", "l")),
            TypeConfig(name="size", kind="number", units=("inch", "cm")),
            TypeConfig(name="speed", kind="number", units=("ghz", "rpm")),
            TypeConfig(name="colour"),
            TypeConfig(name="form"),
            TypeConfig(name="lens"),
        )
    )


def ebrm_fast(schema: EntitySchema | None = None) -> EntitySchema:
    """Return a schema (the default one) whose model, capacity, size and speed are compared, not encoded."""
    return with_comparators(schema or ebrm_full(), COMPARED)


def with_comparators(schema: EntitySchema, names: tuple[str, ...]) -> EntitySchema:
    """Return the schema with comparators for those of the named types that it declares.

    Raises:
        ConfigError: one of them is a text.
    """
    return EntitySchema(
        types=tuple(replace(config, scorer="comparator") if config.name in names else config for config in schema.types)
    )
