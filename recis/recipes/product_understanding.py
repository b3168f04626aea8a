"""A small decoder that answers about products, and what its answers and states are worth elsewhere.

    recis train product_understanding                 generated records; OA-Mine and PriceRunner where RECIS_DATA is set
    recis train product_understanding --set decoder=FOLDER        a decoder of your own: frozen, layer-wise adapters and LoRA

Six tasks from product records (`product_tasks`): captioning, category question, attribute extraction, attribute question with
`unknown`, completion and correction. In captioning half of the facts are text and all of them side features: entity rows of a
dynamic table, which the decoder sees through layer-wise adapters alone. Prompts and answers are tokenised in the reader's
threads. `after` prints the metrics of the test part by source, and two tables with and without the decoder (`product_uses`).
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recis.ebrm.synthetic import SyntheticConfig, SyntheticData, make_data
from recis.embedding import Feature, Normal, TableConfig
from recis.errors import ConfigError, nearest
from recis.features import FeatureSpec, Hash
from recis.io import Batch, DataConfig, Strings
from recis.optim import Adam, Cosine
from recis.recipes.item_text import fresh_decoder
from recis.recipes.product_metrics import measure
from recis.recipes.product_records import (
    Record,
    attribute_names,
    generated_records,
    oa_mine_records,
    pricerunner_records,
)
from recis.recipes.product_tasks import TASKS, TEMPLATES, Sample, make_sample, make_samples, read_attributes
from recis.recipes.product_uses import ReadValue, ebrm_lines, ranker_lines, value_confidences
from recis.recipes.retail_towers import has_fast_bfloat16
from recis.towers.instruct import InstructConfig, InstructDecoder, instruct_loss
from recis.trainer import DenseAdamW, TrainConfig, Trainer

BATCH = 32
MAX_PROMPT, MAX_ANSWER = 72, 56
SIDE_DIM = 32
TRAINED = "trained_decoder"
SOURCES = ("generated", "oa_mine", "pricerunner")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Which records there are; the same fields give the same ones."""

    root: str | None
    """Folder with oa_mine and pricerunner; None: generated records alone."""
    sources: tuple[str, ...]
    """Of SOURCES."""
    num_items: int
    seed: int

    def data(self) -> SyntheticData:
        """Return the generated catalogue, its queries and clicks."""
        config = SyntheticConfig(
            num_items=self.num_items, num_queries=200, num_impressions=60 * self.num_items, seed=self.seed
        )
        return make_data(config)

    def records(self, data: SyntheticData) -> list[Record]:
        """Return the records of all sources, both parts."""
        records = generated_records(data)
        if "oa_mine" in self.sources:
            records += oa_mine_records(self._file("oa_mine", "titles.parquet"))
        if "pricerunner" in self.sources:
            records += pricerunner_records(self._file("pricerunner", "offers.parquet"), most=self.num_items // 2)
        return records

    def _file(self, source: str, name: str) -> Path:
        path = Path(self.root or "") / source / name
        if self.root is None or not path.is_file():
            raise ConfigError(
                f"source {source!r}: no file {path}; give --data or RECIS_DATA, the folder that {source}/{name} lies in, or "
                "leave the source out"
            )
        return path


def chosen_sources(sources: tuple[str, ...], root: str | None) -> tuple[str, ...]:
    """Return the sources asked for; of none all, where there is a folder of public data, else the generated one.

    Raises:
        ConfigError: one is unknown, or the generated one is left out.
    """
    if not sources:
        return SOURCES if root is not None else SOURCES[:1]
    for source in sources:
        if source not in SOURCES:
            raise ConfigError(f"no source {source!r}; {nearest(source, SOURCES)}")
    if SOURCES[0] not in sources:
        raise ConfigError(f"sources {','.join(sources)}: EBRM and the ranker need {SOURCES[0]!r} among them")
    return sources


def product_understanding(
    *,
    data: str | None,
    out: Path,
    decoder: str = "tiny",
    sources: tuple[str, ...] = (),
    num_items: int = 1000,
    per_record: int = 4,
    epochs: int = 5,
    num_test: int = 40,
    lora_rank: int = 16,
    uses: bool = True,
    seed: int = 0,
) -> TrainConfig:
    """Return the decoder's run; `after` prints metrics and what the decoder is good for.

    Args:
        data: folder with `oa_mine` and `pricerunner`; None: RECIS_DATA, or generated records alone.
        out: the run folder.
        decoder: tiny, which trains from nothing, or the folder of a Hugging Face decoder, which stays frozen.
        sources: of the records: generated, oa_mine, pricerunner; none named: all whose data there are.
        num_items: generated products; of PriceRunner half as many.
        per_record: samples of each record in an epoch.
        epochs: passes over the samples.
        num_test: samples of each task and source that are answered in the test.
        lora_rank: of a frozen decoder; 0 trains the adapters alone.
        uses: whether `after` also measures EBRM and the ranker with and without the decoder.
        seed: of records, samples and weights.
    """
    sizes = {"num_items": num_items, "per_record": per_record, "epochs": epochs, "num_test": num_test}
    if min(sizes.values()) < 1:
        raise ConfigError(f"sizes must be at least 1; got {sizes}")
    root = data or os.environ.get("RECIS_DATA")
    corpus = Corpus(root=root, sources=chosen_sources(sources, root), num_items=num_items, seed=seed)
    samples_file, folder = out / "samples.parquet", out / "decoder" if decoder == "tiny" else Path(decoder)
    if not samples_file.exists():
        out.mkdir(parents=True, exist_ok=True)
        train = [record for record in corpus.records(corpus.data()) if not record.is_test]
        samples = make_samples(train, per_record=per_record, seed=seed)
        if decoder == "tiny":
            fresh_decoder([text for sample in samples for text in (sample.prompt, sample.answer)], folder, seed=seed)
        write_samples(samples, samples_file)
    steps = epochs * math.ceil(pq.read_metadata(samples_file).num_rows / BATCH)
    return TrainConfig(
        name="product_understanding",
        model=InstructConfig(
            path=str(folder),
            side=TableConfig(
                name="entity",
                features=(Feature("entities", "none"),),
                embedding_dim=SIDE_DIM,
                initializer=Normal(0.0, 1.0),
                optimizer=Adam(lr=2e-3),
            ),
            rank=16 if decoder == "tiny" else 64,
            trains_base=decoder == "tiny",
            lora_rank=0 if decoder == "tiny" else lora_rank,
            seed=seed,
        ),
        train_data=replace(
            sample_data(samples_file, folder), num_lanes=4, shuffle_rows=65_536, epochs=epochs, seed=seed
        ),
        features=(
            FeatureSpec(name="prompt", kind="extra"),
            FeatureSpec(name="answer", kind="extra"),
            FeatureSpec(name="entities", kind="sparse", ops=(Hash(),)),
        ),
        loss=instruct_loss,
        score=as_scores,
        dense_optimizer=DenseAdamW(lr=2e-3 if decoder == "tiny" else 1e-3, weight_decay=1e-2),
        schedule=Cosine(total_steps=steps, warmup_steps=min(steps - 1, max(1, steps // 20))),
        clip_grad_norm=1.0,
        bf16_autocast=decoder != "tiny" and has_fast_bfloat16(),  # matrices of the tiny one are too small to gain
        evaluate=partial(validate, corpus=corpus, num_test=num_test),
        after=partial(show_uses, corpus=corpus) if uses else None,
        epochs=epochs,
        seed=seed,
    )


def as_scores(losses: torch.Tensor) -> torch.Tensor:
    """Return the negative loss of each answer [B, 1]: the likelier, the higher."""
    return -losses.unsqueeze(1)


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """Write samples as Parquet with prompt, answer and entities."""
    table = pa.table(
        {
            "prompt": [sample.prompt for sample in samples],
            "answer": [sample.answer for sample in samples],
            "entities": pa.array([list(sample.side) for sample in samples], pa.list_(pa.string())),
        }
    )
    part = path.with_name(f".tmp-{path.name}")
    pq.write_table(table, part, row_group_size=2048)
    part.replace(path)


def sample_data(path: Path, tokenizer: Path) -> DataConfig:
    """Return how a file of samples is read, in order; the reader's threads tokenise."""
    return DataConfig(
        paths=(str(path),),
        format="parquet",
        columns=(
            Strings("prompt", tokenizer=str(tokenizer), max_tokens=MAX_PROMPT),
            Strings("answer", tokenizer=str(tokenizer), max_tokens=MAX_ANSWER),
            Strings("entities", depth=1),
        ),
        batch_size=BATCH,
        num_lanes=1,
    )


# ---- answers


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer's text, and the confidence of each of its parts between semicolons."""

    text: str
    confidences: list[float]


def answers_of(trainer: Trainer, samples: Sequence[Sample]) -> list[Answer]:
    """Return what the decoder writes to the prompts of some samples."""
    model = trainer.model
    assert isinstance(model, InstructDecoder)
    assert trainer.engine is not None
    model.eval()
    (separator,) = model.tokenizer.convert_tokens_to_ids([";"])
    found: list[Answer] = []
    for batch in _batches(trainer, samples, model):
        written = model.write(batch, max_tokens=MAX_ANSWER)
        texts = model.tokenizer.batch_decode(written.tokens, skip_special_tokens=True)
        confidences = [
            value_confidences(*pair, separator) for pair in zip(written.tokens, written.log_probs, strict=True)
        ]
        found += [Answer(text, own) for text, own in zip(texts, confidences, strict=True)]
    return found


def _batches(trainer: Trainer, samples: Sequence[Sample], model: InstructDecoder) -> Sequence[Batch]:
    """Return the samples as the trainer's features make them of a file."""
    import tempfile

    from recis.io import Reader

    assert trainer.engine is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.parquet"
        write_samples(samples, path)
        with Reader(sample_data(path, Path(model.config.path))) as reader:
            return [trainer.engine.forward(raw) for raw in reader]


def held_out_samples(records: Sequence[Record], *, most: int, seed: int) -> list[Sample]:
    """Return at most `most` samples of each task and source, of the records of the test part.

    They stand by source, task and length of the prompt: answers of one task end together, so no batch waits for one.
    """
    held = [record for record in records if record.is_test]
    counts: dict[tuple[str, str], int] = {}
    chosen = []
    for sample in make_samples(held, per_record=len(TASKS), seed=seed + 1):
        key = (sample.record.source, sample.task)
        counts[key] = counts.get(key, 0) + 1
        if counts[key] <= most:
            chosen.append(sample)
    order = {name: place for place, name in enumerate((*SOURCES, *TASKS))}
    return sorted(chosen, key=lambda own: (order[own.record.source], order[own.task], len(own.prompt)))


def validate(trainer: Trainer, *, corpus: Corpus, num_test: int) -> dict[str, float]:
    """Return the metrics of the test part, `<source>.<task>.<metric>`."""
    samples = held_out_samples(corpus.records(corpus.data()), most=num_test, seed=corpus.seed)
    model = trainer.model
    assert isinstance(model, InstructDecoder)
    answers = answers_of(trainer, samples)
    found: dict[str, float] = {}
    for source in dict.fromkeys(sample.record.source for sample in samples):
        own = [
            (replace(sample, answer=_as_written(model, sample.answer)), said.text)
            for sample, said in zip(samples, answers, strict=True)
            if sample.record.source == source
        ]
        metrics = measure([sample for sample, _ in own], [said for _, said in own])
        found |= {f"{source}.{name}": value for name, value in metrics.items()}
    return found


def _as_written(model: InstructDecoder, text: str) -> str:
    """Return a text as the tokenizer gives it back: blanks around marks are not the decoder's to choose."""
    ids = model.tokenizer(text, truncation=True, max_length=MAX_ANSWER)["input_ids"]
    return model.tokenizer.decode(ids, skip_special_tokens=True)


# ---- after training


def show_uses(trainer: Trainer, out: Path | None, *, corpus: Corpus) -> None:
    """Print the metrics by source and task, then EBRM and the ranker with and without the decoder."""
    print(metrics_table(trainer.state.metrics))
    if out is None:
        return
    data = corpus.data()
    print("\n".join(ebrm_lines(data, read_values(trainer, data))))
    model = trainer.model
    assert isinstance(model, InstructDecoder)
    folder = out / TRAINED
    model.base.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    print("\n".join(ranker_lines(data, folder, out / "ranker", seed=corpus.seed)))


def read_values(trainer: Trainer, data: SyntheticData) -> dict[int, list[ReadValue]]:
    """Return what the decoder extracts from the titles of the generated items of the test part, by item number."""
    import random

    records = generated_records(data)
    numbers = [number for number, record in enumerate(records) if record.is_test]
    names, rng = attribute_names(records)["generated"], random.Random(0)
    samples = []
    for number in numbers:
        sample = make_sample("extract", records[number], (), names, rng)
        prompt = TEMPLATES["extract"][0].format(title=records[number].title)  # one wording for all
        samples.append(replace(sample, prompt=prompt))
    return {
        number: values_in(said, records[number])
        for number, said in zip(numbers, answers_of(trainer, samples), strict=True)
    }


def values_in(said: Answer, record: Record) -> list[ReadValue]:
    """Return the values of an extraction's answer with their confidences; parts that are no `name = value` are left out."""
    found = []
    for part, conf in zip(said.text.split(";"), said.confidences, strict=False):
        for name, value in read_attributes(part):
            if conf > 0:
                found.append(ReadValue(name, record.normalised(value), min(1.0, conf)))
    return found


def metrics_table(metrics: dict[str, float]) -> str:
    """Return the metrics of the test part: a line per task and metric, a column per source."""
    sources = list(dict.fromkeys(name.split(".")[0] for name in metrics if name.count(".") == 2))
    rows = dict.fromkeys(name.partition(".")[2] for name in metrics if name.count(".") == 2)
    lines = [f"  {'test part':<28}" + "".join(f"{source:>14}" for source in sources)]
    for row in rows:
        cells = (metrics.get(f"{source}.{row}") for source in sources)
        lines.append(f"  {row:<28}" + "".join(f"{'-':>14}" if cell is None else f"{cell:>14.3f}" for cell in cells))
    return "\n".join(lines)
