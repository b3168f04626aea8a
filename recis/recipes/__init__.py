"""Runs that the command `recis train NAME` knows, one file each.

A recipe is a function `recipe(*, data: str | None, out: Path, ...) -> TrainConfig`. Its further keyword arguments are options
that `--set name=value` fills; names with a dot set fields of the config it returns. A recipe module may also hold
`recommend_file(run, users, *, k, out)` and `evaluate_file(run, path)`, which `recis recommend` and `recis eval` then call.
"""

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from recis.errors import ConfigError, nearest

RECIPES = {
    "click_towers": "recis.recipes.click_towers:click_towers",
    "demo": "recis.recipes.demo:demo",
    "ebrm_ranker": "recis.recipes.ebrm_ranker:ebrm_ranker",
    "online_retail": "recis.recipes.online_retail:online_retail",
    "online_shoppers": "recis.recipes.online_shoppers:online_shoppers",
    "open_bandit": "recis.recipes.open_bandit:open_bandit",
    "product_understanding": "recis.recipes.product_understanding:product_understanding",
    "retail_hstu": "recis.recipes.retail_sequence:retail_hstu",
    "retail_sasrec": "recis.recipes.retail_sequence:retail_sasrec",
    "retail_towers": "recis.recipes.retail_towers:retail_towers",
    "teacher_ranker": "recis.recipes.teacher_ranker:teacher_ranker",
}


def find_recipe(name: str) -> Callable[..., Any]:
    """Return the recipe of that name, or what `module:function` names.

    Raises:
        ConfigError: no such recipe (with the nearest names), or the module or function cannot be imported.
    """
    if name not in RECIPES and ":" not in name:
        raise ConfigError(f"no recipe {name!r}; {nearest(name, RECIPES)}; or give your own as module:function")
    module_name, _, function = RECIPES.get(name, name).partition(":")
    try:
        found = getattr(import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"recipe {name!r} cannot be imported: {error}; module:function is looked up from the folder you run in"
        ) from error
    if not callable(found):
        raise ConfigError(f"recipe {name!r}: {function} is a {type(found).__name__}, not a function")
    return found


def call_recipe(name: str, *, data: str | None, out: Path, settings: Sequence[str]) -> Any:
    """Return the TrainConfig of a recipe, its options and then its fields set from `name=value` texts.

    Raises:
        ConfigError: as find_recipe; an unknown option or field; a value of the wrong type.
    """
    from recis.trainer.override import override, parse_option  # the trainer is loaded only when a recipe runs

    recipe = find_recipe(name)
    parameters = inspect.signature(recipe, eval_str=True).parameters
    missing = {"data", "out"} - set(parameters)
    if missing:
        raise ConfigError(
            f"recipe {name!r}: the function must take data and out as keywords; it lacks {', '.join(sorted(missing))}"
        )
    options, fields = {}, []
    for setting in settings:
        key, equals, text = setting.partition("=")
        if equals and key in parameters and key not in ("data", "out"):
            options[key] = parse_option(setting, parameters[key].annotation, parameters[key].default, text)
        else:
            fields.append(setting)
    return override(recipe(data=data, out=out, **options), fields)
