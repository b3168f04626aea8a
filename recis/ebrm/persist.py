"""A model in a folder.

    model/            model.json (settings, calibrators, thresholds, priors, version), weights.safetensors, the scorer's files
    overrides.jsonl   kept when the model is saved again
    cache/            where one was opened: recis.ebrm.cache

`model/` is written aside and swapped in by renames. A fallback that is a function (AffineCosine) is not saved.
"""

import json
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recis.ebrm.calibrate import Calibrator, VerdictThresholds
from recis.ebrm.config import EBRMConfig
from recis.ebrm.fallback import TypePriors
from recis.ebrm.overrides import Overrides
from recis.ebrm.scorer import QEScorer
from recis.errors import ConfigError

if TYPE_CHECKING:
    from recis.ebrm.model import EBRM

FORMAT = 1
MODEL_NAME, OVERRIDES_NAME, CACHE_NAME = "model", "overrides.jsonl", "cache"


def save_model(model: "EBRM", folder: Path) -> None:
    """Write a model into a folder; an older model there is replaced, its overrides are not.

    Raises:
        ConfigError: the folder has overrides of its own, and the model others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _save_overrides(model.overrides, folder / OVERRIDES_NAME)
    tmp = folder / f".tmp-model-{secrets.token_hex(4)}"
    tmp.mkdir()
    weights = {
        "relaxation": model.pool.relaxation.detach().cpu().contiguous(),
        "comparators": model.comparators.logits.detach().cpu().contiguous(),
    }
    save_file(weights, tmp / "weights.safetensors")
    model.scorer.save(tmp)
    priors = model.fallback.logits if isinstance(model.fallback, TypePriors) else {}
    settings = {
        "format": FORMAT,
        "version": model.version,
        "config": model.config.to_json(),
        "calibrator": None if model.calibrator is None else model.calibrator.to_json(),
        "accept": None if model.accept is None else model.accept.to_json(),
        "thresholds": model.thresholds.to_json(),
        "priors": priors,
    }
    (tmp / "model.json").write_text(json.dumps(settings, indent=1, sort_keys=True))
    final = folder / MODEL_NAME
    if final.exists():
        old = folder / f".tmp-removed-{secrets.token_hex(4)}"
        final.rename(old)
        tmp.rename(final)
        shutil.rmtree(old)
    else:
        tmp.rename(final)


def load_model(folder: Path, kind: "type[EBRM]") -> "EBRM":
    """Return the model of a folder, in evaluation mode; a cache is not opened.

    Raises:
        ConfigError: there is no model, it is of another format, or its weights are not those that were saved.
    """
    home = folder / MODEL_NAME
    if not (home / "model.json").is_file():
        raise ConfigError(
            f"no EBRM model at {folder}: {MODEL_NAME}/model.json is missing; give the folder of EBRM.save"
        )
    settings = _read_settings(home / "model.json")
    if settings["format"] != FORMAT:
        raise ConfigError(f"the model at {folder} has format {settings['format']}; this version reads format {FORMAT}")
    model = kind(EBRMConfig.from_json(settings["config"]), QEScorer.load(home))
    try:
        weights = load_file(home / "weights.safetensors")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"the model at {folder} is damaged: weights.safetensors cannot be read ({error})") from error
    with torch.no_grad():
        model.pool.relaxation.copy_(weights["relaxation"])
        model.comparators.logits.copy_(weights["comparators"])
    model.calibrator = _calibrator(settings["calibrator"])
    model.accept = _calibrator(settings["accept"])
    model.thresholds = VerdictThresholds.from_json(settings["thresholds"])
    model.fallback = TypePriors(settings["priors"])
    model.overrides = Overrides(model.config.schema, folder / OVERRIDES_NAME, is_known=model.has_entity)
    if model.version != settings["version"]:
        raise ConfigError(
            f"the model at {folder} is damaged: its weights are of version {model.version}, model.json says "
            f"{settings['version']}"
        )
    return model.eval()


def _read_settings(path: Path) -> dict[str, Any]:
    keys = ("format", "version", "config", "calibrator", "accept", "thresholds", "priors")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise TypeError(f"it must be a JSON object, not a {type(settings).__name__}")
        missing = [key for key in keys if key not in settings]
    except (ValueError, TypeError) as error:  # cut off, not UTF-8, no JSON
        raise ConfigError(
            f"the model at {path.parent.parent} is damaged: {path.name} cannot be read ({error})"
        ) from error
    if missing and settings.get("format") in (None, FORMAT):
        raise ConfigError(f"the model at {path.parent.parent} is damaged: {path.name} lacks {', '.join(missing)}")
    return settings


def _calibrator(data: dict[str, float] | None) -> Calibrator | None:
    return None if data is None else Calibrator(**data)


def _save_overrides(overrides: Overrides, path: Path) -> None:
    lines = "".join(json.dumps(record, sort_keys=True) + "\n" for record in overrides.audit())
    if not lines or overrides.path == path:
        return
    if path.exists() and path.read_text() != lines:
        raise ConfigError(
            f"{path} has overrides of its own: load that model and add the rules to it, or save elsewhere"
        )
    path.write_text(lines)
