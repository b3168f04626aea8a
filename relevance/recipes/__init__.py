"""The recipes by name, each one script: `python -m relevance.recipes.grpo` is `relevance train grpo`.

    sft      rationales                               dpo       preferences from own samples
    grpo     plain GRPO, the baseline                 taosr1    SFT, DPO, balance and difficulty, GRPO with refill
    agrl     rule-aware reward, guided replay         she       advantages per reasoning step, curriculum
    dyknow   rollouts with and without the chunk

agrl and she are reconstructions after TaoSR-AGRL and TaoSR-SHE: their papers do not print formulas or thresholds.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from recis.errors import ConfigError, nearest
from relevance.config import AgrlRun, DpoRun, DyknowRun, GrpoRun, RunConfig, SftRun, SheRun, TaosrRun

RECIPES: dict[str, type[RunConfig]] = {
    "sft": SftRun,
    "dpo": DpoRun,
    "grpo": GrpoRun,
    "taosr1": TaosrRun,
    "agrl": AgrlRun,
    "she": SheRun,
    "dyknow": DyknowRun,
}


def default_config(recipe: str) -> RunConfig:
    """Return the default config of a recipe."""
    find_recipe(recipe)
    return RECIPES[recipe]()


def find_recipe(recipe: str) -> str:
    """Return the name of a recipe.

    Raises:
        ConfigError: no such recipe; the nearest name is told.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"no recipe {recipe!r}; {nearest(recipe, RECIPES)}")
    return recipe


def recipe_function(recipe: str) -> Callable[[Any], Path]:
    """Return the function `train(run) -> folder of the model` of a recipe; imports TRL."""
    return import_module(f"relevance.recipes.{find_recipe(recipe)}").train
