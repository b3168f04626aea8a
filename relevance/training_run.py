"""A run of a recipe: its folder, settings, task and stages, and how it goes on where it stopped.

    run = open_run("grpo", model=None, data=None, out=Path("runs/grpo"), settings=["rl.max_steps=40"])
    run.stage("rl"), run.start_model(), run.finish(final)

    run.json         recipe, model, data and settings as they were asked for; --resume is held against them
    base/            the tiny model before training, where no --model is given
    sft/, rl/, ..    stages, see `engine`
    final            link to the last stage's model; grader.json in it tells `relevance score` how to ask it

Every stage leaves a done stage alone, so a run that is started again goes on.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from recis.errors import ConfigError
from recis.trainer.override import override
from recis.trainer.serialize import to_json
from relevance.checkpoints import write_json
from relevance.config import RunConfig
from relevance.data import Pair, check_missing
from relevance.files import sha256_of
from relevance.language_model import LanguageModel, load_language_model, model_hash, wrap
from relevance.oracle import oracle
from relevance.ranks import is_main, main_first
from relevance.rules import RuleBase
from relevance.run_log import write_curves
from relevance.task import Task, catalog_task, file_task
from relevance.tiny import make_tiny

if TYPE_CHECKING:
    from relevance.engine import Stage

RUN_NAME, GRADER_NAME, FINAL = "run.json", "grader.json", "final"
Config = TypeVar("Config", bound=RunConfig)
FRESH_LABEL_WEIGHT, FRESH_PROMPT_WEIGHT = 10.0, 0.3  # of a model from random weights; see `sft_loss`


@dataclass(frozen=True, kw_only=True)
class TrainingRun(Generic[Config]):
    """One run of a recipe."""

    recipe: str
    config: Config
    task: Task
    folder: Path
    model_path: str | None
    """Where training starts; None trains a tiny model first."""
    data_hash: str
    rules: str
    """"catalog", "none", or module:attribute."""
    deadline: float | None = None
    say: Callable[[str], None] = print

    def stage(self, name: str) -> "Stage":
        """Return the stage of a name; its folder is made when it starts."""
        from relevance.engine import Limits, Stage

        config = self.config
        return Stage(
            folder=self.folder / name,
            engine=config.engine,
            model=config.model,
            seed=config.seed,
            limits=Limits(deadline=self.deadline),
            state={"config": to_json(config), "data": self.data_hash},
            say=self.say,
        )

    def load(self, path: str | Path) -> LanguageModel:
        """Return a model of this run, checked against one of its prompts."""
        lm = load_language_model(path, chat_template=self.config.model.chat_template)
        probe = self.task.prompts.plain(self.task.train[0])
        return wrap(lm.model, lm.tokenizer, chat_template=self.config.model.chat_template, name=str(path), probe=probe)

    def task_of(self, lm: LanguageModel) -> Task:
        """Return the task with the limits and the template of a model."""
        return dataclasses.replace(self.task.counting(lm.num_tokens), render=lm.render)

    def base_model(self) -> LanguageModel:
        """Return the model before any training: --model, or a fresh tiny one."""
        if self.model_path is not None:
            return self.load(self.whole_model(self.model_path))
        folder = self.folder / "base"
        with main_first():
            if not (folder / "config.json").exists():
                train = self.task.train[:4000]  # enough to meet every word of the catalogue
                texts = [self.task.prompt(pair) for pair in train] + [self.rationale(pair) for pair in train]
                rules = self.task.rule_ids if isinstance(self.task.rule_ids, frozenset) else ()
                part = make_tiny(
                    folder.with_name("base.part"), texts, self.config.model, rule_ids=rules, seed=self.config.seed
                )
                part.rename(folder)
        return self.load(folder)

    def rationale(self, pair: Pair, *, with_chunk: bool | None = None) -> str:
        """Return the completion that SFT learns for a pair."""
        shows = self.task.with_chunk if with_chunk is None else with_chunk
        return oracle(pair, self.task.profile, with_chunk=shows)

    def sft_rows(self, task: Task) -> list[tuple[str, str]]:
        """Return (prompt, completion) of all train pairs that have what the profile needs; both prompts of a RAG task."""
        tags = set(task.profile.tags)
        needed = ["label", *(name for name, tag in _PARTS.items() if tag in tags)]
        check_missing(task.train, needed, max_missing=self.config.max_missing)
        rows = []
        for pair in task.train:
            if pair.label is None or any(
                pair.steps is None or getattr(pair.steps, name) is None for name in needed if name != "label"
            ):
                continue
            variants = (False, True) if "context" in tags and task.with_chunk else (task.with_chunk,)
            rows += [
                (task.prompt(pair, with_chunk=shows), self.rationale(pair, with_chunk=shows)) for shows in variants
            ]
        return rows

    def start_model(self) -> LanguageModel:
        """Return the model that reinforcement starts from: --model, or a tiny one after SFT in this run's folder."""
        return self.load(self.whole_model(self.train_sft() if self.model_path is None else self.model_path))

    def whole_model(self, path: str | Path) -> str | Path:
        """Return a path with whole weights: an adapter is merged into its base once, in this run's folder `start`.

        The next adapter and the reference model name the folder that they build on; the adapter's own base lacks what it
        has learned.
        """
        if not (Path(path) / "adapter_config.json").exists():
            return path
        folder = self.folder / "start"
        with main_first():
            if not folder.exists():
                lm, part = self.load(path), folder.with_name("start.part")
                lm.model.save_pretrained(part)
                lm.tokenizer.save_pretrained(part)
                part.rename(folder)
        return folder

    def train_sft(self) -> Path:
        """Train the base model on the rationales, in this run's folder, and return the finished model's folder."""
        from relevance.engine import train_sft
        from relevance.sft_loss import TokenWeights

        stage, settings = self.stage("sft"), self.config.sft
        if stage.is_done:
            return stage.final
        lm, is_fresh = self.base_model(), self.model_path is None
        weights = TokenWeights(
            label=_or(settings.label_weight, FRESH_LABEL_WEIGHT if is_fresh else 1.0),
            prompt=_or(settings.prompt_weight, FRESH_PROMPT_WEIGHT if is_fresh else 0.0),
            is_label_last=self.task.profile.is_label_last,
        )
        return train_sft(lm, self.sft_rows(self.task_of(lm)), settings, stage, weights=weights)

    def finish(self, final: Path, *, with_b: bool = True) -> Path:
        """Fit b on dev pairs, write grader.json and the curves, and link the model as `final`."""
        link = self.folder / FINAL
        with main_first():
            if is_main():
                self._write_final(final, link, with_b=with_b)
        return link

    def _write_final(self, final: Path, link: Path, *, with_b: bool) -> None:
        lm = self.load(final)
        settings = {
            "recipe": self.recipe,
            "profile": self.task.profile.name,
            "prompt": dataclasses.asdict(self.config.prompt),
            "rules": self.rules,
            "with_chunk": self.task.with_chunk,
            "chat_template": self.config.model.chat_template,
            "data": self.data_hash,
            "catalog": to_json(self.config.catalog) if self.rules == "catalog" else None,
            "train_queries": sorted({hashlib.sha256(pair.query.encode()).hexdigest()[:16] for pair in self.task.train}),
            "b_cum": None,
        }
        labelled = [pair for pair in self.task.dev if pair.label is not None][:2000]
        if with_b and labelled and not self.task.profile.is_label_last:
            import torch

            from relevance.prefill import score_prompts
            from relevance.scoring import fit_cumpt

            task = self.task_of(lm)
            probs = score_prompts(lm, [task.prompt(pair) for pair in labelled], [pair.query_id for pair in labelled])
            settings["b_cum"] = fit_cumpt(probs, torch.tensor([pair.label for pair in labelled])).b
        settings["model"] = model_hash(final)
        write_json(final / GRADER_NAME, settings)
        if link.is_symlink():
            link.unlink()
        link.symlink_to(final.resolve().relative_to(self.folder.resolve()))
        write_curves(self.folder, title=f"relevance train {self.recipe}")


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


_PARTS = {"category": "category", "attributes": "attribute", "rule": "rule"}


def open_run(
    recipe: str,
    *,
    model: str | None = None,
    data: str | None = None,
    out: Path,
    settings: Sequence[str] = (),
    resume: bool = False,
    max_minutes: float | None = None,
    say: Callable[[str], None] = print,
    config: RunConfig | None = None,
    task: Task | None = None,
) -> TrainingRun[Any]:
    """Return a run ready to train, new or gone on with.

    Args:
        recipe: a name of `recipes.RECIPES`.
        model: folder or hub name that training starts from; None makes a tiny model.
        data: pairs as .jsonl or .parquet; None generates the catalogue of `config.catalog`.
        out: the run's folder.
        settings: "a.b=c" of the recipe's config.
        resume: go on with the run in `out`; what is not given is as it was.
        max_minutes: stop with a checkpoint after this time.
        say: where progress goes; ranks but 0 say nothing.
        config: the recipe's config before `settings`; None takes its default.
        task: the task instead of data or catalogue, for callers in Python.

    Raises:
        ConfigError: unknown recipe or setting; the folder is not empty and resume is off, or holds another run.
        DataError: the data cannot be used.
    """
    from relevance.recipes import default_config, find_recipe

    find_recipe(recipe)
    asked = {"recipe": recipe, "model": model, "data": data, "settings": list(settings)}
    with main_first():  # rank 0 looks at the folder and refuses for all; the ranks are connected from here on
        asked = _asked(out, asked, resume=resume)
    own = override(config or default_config(recipe), asked["settings"])
    chosen = own.model.path if asked["model"] is None else asked["model"]
    rules, digest = "catalog", ""
    if task is None and asked["data"] is not None:
        rules = own.rules or "none"
        task = file_task(
            asked["data"],
            profile=own.profile,
            prompt=own.prompt,
            rules=find_rules(rules),
            with_chunk=own.catalog.with_chunks,
        )
        digest = sha256_of(asked["data"])
    elif task is None:
        task = catalog_task(own.catalog, profile=own.profile, prompt=own.prompt)
        digest = hashlib.sha256(json.dumps(to_json(own.catalog)).encode()).hexdigest()
    else:
        rules = own.rules or ("catalog" if task.hidden_steps else "none")
    task.part("train")
    if is_main() and not (out / RUN_NAME).exists():
        write_json(out / RUN_NAME, asked | {"config": to_json(own), "data_hash": digest})
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    return TrainingRun(
        recipe=recipe,
        config=own,
        task=task,
        folder=out,
        model_path=chosen,
        data_hash=digest,
        rules=rules,
        deadline=deadline,
        say=say if is_main() else _unsaid,
    )


def _unsaid(line: str) -> None:
    """Leave the telling to rank 0."""


def find_rules(name: str) -> RuleBase | None:
    """Return the rule base of "catalog", "none" or module:attribute.

    Raises:
        ConfigError: no such module or attribute, or it is no rule base.
    """
    if name == "none":
        return None
    if name == "catalog":
        from relevance.catalog_rules import catalog_rules

        return catalog_rules()
    module, colon, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute) if colon else None
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"rules {name!r}: cannot be imported ({error}); give module:attribute") from None
    found = found() if callable(found) else found
    if not isinstance(found, RuleBase):
        raise ConfigError(f"rules {name!r}: give module:attribute of a RuleBase, or of a function that returns one")
    return found


def _asked(out: Path, asked: dict[str, Any], *, resume: bool) -> dict[str, Any]:
    """Return what is asked for, completed by the run that is there."""
    path = out / RUN_NAME
    if not is_main() and not resume:  # rank 0 checks the folder; it may have written into it already
        return asked
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"--out {out}: the folder is not empty and holds no run; name another one")
        return asked
    if not resume:
        raise ConfigError(f"--out {out}: there is a run in this folder; go on with --resume, or name another folder")
    stored = json.loads(path.read_text())
    for name in ("recipe", "model", "data", "settings"):
        if asked[name] and asked[name] != stored[name]:
            raise ConfigError(f"--resume: the run in {out} has {name} {stored[name]!r}, not {asked[name]!r}")
    return {name: stored[name] for name in asked}
