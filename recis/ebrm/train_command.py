"""`recis ebrm train`: what its options mean, and how a killed run goes on."""

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recis.errors import ConfigError

if TYPE_CHECKING:
    from recis.ebrm.datasets import TrainingSet
    from recis.ebrm.runs import RunConfig

OPTIONS: dict[str, Any] = {
    "data": None,
    "scorer": "small",
    "fast": False,
    "logic": "product",
    "no_pretraining": False,
    "pretrain_epochs": 1,
    "epochs": 2,
    "lr": None,
    "precision": "auto",
    "queries": None,
    "composed": 1_200,
    "seed": 0,
}
"""Defaults of what decides the weights; kept with an unfinished run."""


def add_train_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    command.add_argument("--resume", action="store_true", help="go on with the run in --out that was killed")
    command.add_argument(
        "--data", metavar="PATH", help="Parquet of offers, or a folder of JSON lines (default: generated)"
    )
    command.add_argument("--scorer", help="small, minilm, or the folder of a Hugging Face encoder")
    command.add_argument("--fast", action="store_true", help="compare codes and numbers instead of encoding them")
    command.add_argument("--logic", choices=("product", "goedel", "lukasiewicz"))
    command.add_argument("--no-pretraining", action="store_true", help="leave the first stage out")
    command.add_argument("--pretrain-epochs", type=int, help="of the first stage (default 1)")
    command.add_argument("--epochs", type=int, help="of the second stage (default 2)")
    command.add_argument("--lr", type=float, help="default: 1e-3 for small, 3e-5 for pretrained encoders")
    command.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        help="of matrix products; auto: bf16 where this machine is fast at it, else fp32",
    )
    command.add_argument("--queries", type=int, help="train queries, of offers or generated (default: 12000 or 600)")
    command.add_argument(
        "--composed", type=int, help="queries composed for the first stage, but of offers (default 1200)"
    )
    command.add_argument("--seed", type=int)
    command.set_defaults(**OPTIONS)


def run_train(args: argparse.Namespace) -> int:
    """Train, or go on training, and write the run's folder."""
    from recis.ebrm.resume import TRAINING_NAME, Progress, write_settings
    from recis.ebrm.runs import fit_model, save_run

    options = _resumed(args) if args.resume else _fresh(args)
    config = run_config(options)
    data = training_set(options["data"], options["queries"], options["composed"], options["seed"])
    hashes = dict(data.hashes)
    if args.resume and options["hashes"] != hashes:
        raise ConfigError(f"--resume: the data has changed since the run in {args.out} began; start a new one")
    write_settings(args.out, options | {"hashes": hashes})
    print(f"precision {config.train.precision}, seed {config.seed}", flush=True)
    trained = fit_model(data, config, say=lambda line: print(line, flush=True), progress=Progress(folder=args.out))
    save_run(trained, data, config, args.out)
    shutil.rmtree(args.out / TRAINING_NAME)
    best = trained.history.best
    print(f"{args.out}: model {trained.model.version}, dev ROC-AUC {best.dev_roc_auc:.4f} at step {best.step}")
    return 0


def _fresh(args: argparse.Namespace) -> dict[str, Any]:
    from recis.ebrm.descent import fast_precision

    if args.out.exists() and any(args.out.iterdir()):
        raise ConfigError(f"--out {args.out} is not empty; give a new folder, or --resume")
    options = {name: getattr(args, name) for name in OPTIONS}
    precision = fast_precision() if args.precision == "auto" else args.precision
    return options | {"precision": precision}


def _resumed(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the run was started with; options that are given again must be the same."""
    from recis.ebrm.resume import read_settings

    kept = read_settings(args.out)
    for name, default in OPTIONS.items():
        given = getattr(args, name)
        if given not in (default, kept[name]):
            raise ConfigError(
                f"--resume: {name} was {kept[name]!r} when the run in {args.out} began, now {given!r}; leave it out"
            )
    return kept


def run_config(options: dict[str, Any]) -> "RunConfig":
    """Return the settings of a run from its options; precision is fp32 or bf16."""
    from recis.ebrm.descent import StepConfig
    from recis.ebrm.runs import FRESH_LR, PRETRAIN_BATCH_PAIRS, PRETRAINED_LR, RunConfig
    from recis.ebrm.train import QIConfig

    seed, precision = options["seed"], options["precision"]
    lr = options["lr"] or (FRESH_LR if options["scorer"] == "small" else PRETRAINED_LR)
    first = StepConfig(
        epochs=options["pretrain_epochs"], lr=lr, batch_pairs=PRETRAIN_BATCH_PAIRS, precision=precision, seed=seed
    )
    return RunConfig(
        scorer=options["scorer"],
        fast=options["fast"],
        logic=options["logic"],
        pretrain=None if options["no_pretraining"] else first,
        train=QIConfig(epochs=options["epochs"], lr=lr, precision=precision, seed=seed),
        seed=seed,
    )


def training_set(data: str | None, num_queries: int | None, num_composed: int, seed: int) -> "TrainingSet":
    """Return what a run learns from: the generated catalogue, a folder, or a file of offers. Raises as their readers."""
    from recis.ebrm.composed_queries import ComposeConfig
    from recis.ebrm.datasets import folder_set, offers_set, synthetic_set
    from recis.ebrm.pricerunner import NUM_QUERIES
    from recis.ebrm.synthetic import SyntheticConfig, make_data

    composed = ComposeConfig(num_queries=num_composed)
    if data is None:
        return synthetic_set(make_data(SyntheticConfig(num_queries=num_queries or 600, seed=seed)), composed=composed)
    path = Path(data)
    if path.is_dir():
        return folder_set(path, composed=composed)
    return offers_set(path, num_queries={**NUM_QUERIES, "train": num_queries or NUM_QUERIES["train"]}, seed=seed)
