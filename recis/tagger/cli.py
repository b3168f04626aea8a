"""The commands `recis tag ...`: one function per command, a few lines around the part that does the work."""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recis.errors import ConfigError
from recis.tagger.rules import RuleTagger

if TYPE_CHECKING:
    from recis.tagger.combine import TextTagger
    from recis.tagger.distil import DistilConfig, Distilled
    from recis.tagger.io import Labelled
    from recis.tagger.text import Text

OK, FAILED = 0, 1
DATA_HELP = "Parquet or JSON lines with `tokens` and `labels` (BIO), or `text` and `spans`"
TEXTS_HELP = "JSON lines or Parquet with `text_id` and `text`, `query`, `title` or `tokens`"


def add_tag(commands: Any) -> None:
    """Mount `tag` and its commands below the subparsers of `recis`."""
    text = "Tag titles and queries with typed spans: distil rules, train, apply, evaluate, check and compare."
    tag = commands.add_parser("tag", help=text, description=text)
    below = tag.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = _add(below, "distil", _distil, "Distil a rule file from unlabelled texts and an expert.")
    command.add_argument("--texts", type=Path, required=True, metavar="FILE", help=TEXTS_HELP)
    command.add_argument(
        "--types", type=Path, required=True, metavar="FILE", help="JSON list of types, or type -> words"
    )
    command.add_argument(
        "--expert", required=True, help="table:ANSWERS.json, or masked-lm:FOLDER (needs words per type)"
    )
    command.add_argument("--out", type=Path, required=True, metavar="RULES.json")
    command.add_argument("--pool", type=Path, metavar="POOL.jsonl", help="also write the labelled spans")
    command.add_argument("--precision-floor", type=float, default=0.9, help="least F / N of a rule (default 0.9)")
    command.add_argument("--min-support", type=int, default=3, help="least F of a rule (default 3)")
    command.add_argument(
        "--second-pass", action="store_true", help="tune the masked LM on the pool, distil anew, keep the better rules"
    )
    command.add_argument("--dev", type=Path, metavar="FILE", help="labelled texts that say which pass is better")
    command.add_argument("--seed", type=int, default=0)
    command = _add(below, "train", _train, "Train a neural tagger on labelled texts.")
    command.add_argument("--data", type=Path, required=True, metavar="FILE", help=DATA_HELP)
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    command.add_argument("--encoder", metavar="DIR", help="Hugging Face encoder to start from (default: a small one)")
    command.add_argument("--split", help="train on the rows of this split (default: all)")
    command.add_argument("--dev-split", help="keep the epoch that is best on this split")
    command.add_argument("--epochs", type=int, default=8)
    command.add_argument("--lr", type=float, default=2e-4, help="of the encoder (default 2e-4)")
    command.add_argument("--seed", type=int, default=0)
    command = _add(below, "apply", _apply, "Tag texts and write their spans.")
    command.add_argument("--model", type=Path, required=True, metavar="PATH", help="rule file, or folder of a tagger")
    command.add_argument("--texts", type=Path, required=True, metavar="FILE", help=TEXTS_HELP)
    command.add_argument("--out", type=Path, required=True, metavar="SPANS.jsonl")
    command = _add(below, "eval", _eval, "Score a tagger on labelled texts by exact spans.")
    command.add_argument("--model", type=Path, required=True, metavar="PATH", help="rule file, or folder of a tagger")
    command.add_argument("--data", type=Path, required=True, metavar="FILE", help=DATA_HELP)
    command.add_argument("--split", help="only rows of this split")
    command.add_argument("--repair-bio", action="store_true", help="read a stray I- as B-")
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")
    command = _add(
        below, "check", _check, "Measure a rule file again on labelled texts; exit 1 if a rule is under the floor."
    )
    command.add_argument("--rules", type=Path, required=True, metavar="RULES.json")
    command.add_argument("--data", type=Path, required=True, metavar="FILE", help=DATA_HELP)
    command.add_argument("--floor", type=float, default=0.9, help="least precision (default 0.9)")
    command.add_argument("--out", type=Path, metavar="RULES.json", help="write the rules with the measured figures")
    command = _add(below, "diff", _diff, "Show the spans that change between two rule files.")
    command.add_argument("old", type=Path)
    command.add_argument("new", type=Path)
    command.add_argument("--texts", type=Path, metavar="FILE", help=TEXTS_HELP)
    command.add_argument("--ebrm", type=Path, metavar="DIR", help="also list items whose r changes, by this model")
    command.add_argument(
        "--items", type=Path, metavar="FILE", help="with --ebrm: items as JSON lines, instead of --texts"
    )
    command.add_argument("--queries", type=Path, metavar="FILE", help="with --ebrm: queries, one a line")
    command.add_argument(
        "--type-map", type=Path, metavar="FILE", help="with --ebrm: JSON object, tagger type -> its type"
    )


def _add(commands: Any, name: str, run_command: Any, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    command.set_defaults(run_command=run_command)
    return command


def _distil(args: argparse.Namespace) -> int:
    from recis.tagger.distil import DistilConfig, distil
    from recis.tagger.io import load_texts, load_types, save_pool, save_rules
    from recis.tagger.phrases import find_phrases
    from recis.tagger.seeds import SeedConfig, find_seeds

    types = load_types(args.types)
    ids, texts = load_texts(args.texts)
    config = DistilConfig(precision_floor=args.precision_floor, min_support=args.min_support, seed=args.seed)
    expert, phrases = _expert(args.expert, types), list(find_phrases(texts))
    if args.second_pass and not args.expert.startswith("masked-lm:"):
        raise ConfigError(f"--second-pass tunes a masked language model; --expert is {args.expert!r}")
    seeds = find_seeds(texts, phrases, expert, list(types), SeedConfig(seed=args.seed))
    result = distil(texts, ids, list(types), seeds.rules, config)
    if args.second_pass:
        result = _second_pass(args, result, expert, texts, ids, phrases, config)
    save_rules(result.rules, args.out)
    if args.pool is not None:
        save_pool(result.pool.entries, args.pool)
    for told in result.rounds:
        print(
            f"round {told.number}: {told.accepted} rules accepted, {told.pool} spans in the pool, {told.waiting} wait"
        )
    print(f"{args.out}: {len(result.rules.rules)} rules from {len(seeds.rules)} seeds; ended: {result.stop}")
    return OK


def _second_pass(
    args: argparse.Namespace,
    first: "Distilled",
    expert: Any,
    texts: "list[Text]",
    ids: list[str],
    phrases: list[str],
    config: "DistilConfig",
) -> "Distilled":
    from recis.tagger.io import load_labelled
    from recis.tagger.second_pass import TuneConfig, second_pass
    from recis.tagger.seeds import SeedConfig

    dev = load_labelled(args.dev) if args.dev is not None else []
    found = second_pass(
        first,
        expert,
        texts,
        ids,
        phrases,
        tune=TuneConfig(seed=args.seed),
        seeds=SeedConfig(seed=args.seed),
        config=config,
        measure=(lambda rules: _micro_f1(RuleTagger(rules), dev)) if dev else None,
    )
    what = "dev F1" if dev else "agreement with the pool"
    told = "no seeds" if found.second is None else f"{found.values[1]:.4f}"
    which = "first" if found.kept is first else "second"
    print(f"second pass: {what} {told}, first pass {found.values[0]:.4f}: the {which} is kept")
    return found.kept


def _micro_f1(tagger: "TextTagger", rows: "list[Labelled]") -> float:
    from recis.tagger.evaluate import score_spans

    found = [tagger.tag_text(row.text) for row in rows]
    return score_spans([row.spans for row in rows], found, [len(row.text.tokens) for row in rows]).micro.f1


def _expert(name: str, types: dict[str, list[str]]) -> Any:
    from recis.tagger.experts import MaskedLMExpert, TableExpert

    kind, _, path = name.partition(":")
    if kind == "table" and path:
        return TableExpert.load(path)
    if kind == "masked-lm" and path:
        return MaskedLMExpert(path, types)
    raise ConfigError(f"--expert must be table:FILE or masked-lm:FOLDER; got {name!r}")


def _train(args: argparse.Namespace) -> int:
    from recis.tagger.evaluate import score_spans
    from recis.tagger.io import load_labelled
    from recis.tagger.neural import NeuralConfig, TaggerModel
    from recis.tagger.rules import Span
    from recis.tagger.text import WORDS
    from recis.tagger.train import examples_of, train

    if args.out.exists() and any(args.out.iterdir()):
        raise ConfigError(f"--out {args.out} is not empty; give a new folder")
    rows = load_labelled(args.data, WORDS, split=args.split)
    types = sorted({name for row in rows for _, _, name in row.spans})
    dev = load_labelled(args.data, WORDS, split=args.dev_split) if args.dev_split else []
    config = NeuralConfig(
        encoder=args.encoder, epochs=args.epochs, lr=args.lr, average=0.99 if args.encoder else 0.0, seed=args.seed
    )
    model = TaggerModel(types, config, tokenizer=WORDS)

    def measure(trained: TaggerModel) -> float:
        found = trained.tag_texts([row.text for row in dev])
        return score_spans([row.spans for row in dev], found, [len(row.text.tokens) for row in dev]).micro.f1

    spans = [[Span(start=start, end=end, type=name) for start, end, name in row.spans] for row in rows]
    train(
        model,
        examples_of(model, [row.text for row in rows], spans, outside_known=True),
        measure=measure if dev else None,
        on_epoch=lambda epoch, loss, value: print(f"epoch {epoch + 1}: loss {loss:.4f}, dev F1 {value:.4f}"),
    )
    model.save(args.out)
    print(f"{args.out}: trained on {len(rows):,} texts, {len(types)} types")
    return OK


def _apply(args: argparse.Namespace) -> int:
    from recis.tagger.combine import load_tagger
    from recis.tagger.io import load_texts, save_spans

    tagger, tokenizer = load_tagger(args.model)
    ids, texts = load_texts(args.texts, tokenizer)
    spans = [tagger.tag_text(text) for text in texts]
    save_spans(ids, spans, args.out)
    print(f"{args.out}: {sum(map(len, spans)):,} spans in {len(texts):,} texts")
    return OK


def _eval(args: argparse.Namespace) -> int:
    from recis.tagger.combine import load_tagger
    from recis.tagger.evaluate import score_spans
    from recis.tagger.io import load_labelled

    tagger, tokenizer = load_tagger(args.model)
    rows = load_labelled(args.data, tokenizer, split=args.split, repair_bio=args.repair_bio)
    predicted = [tagger.tag_text(row.text) for row in rows]
    scores = score_spans([row.spans for row in rows], predicted, [len(row.text.tokens) for row in rows])
    if args.json:
        versions = {"recis": version("recis"), "torch": version("torch"), "python": sys.version.split()[0]}
        head = {"command": "tag eval", "model": str(args.model), "data": str(args.data), "n": len(rows)}
        print(json.dumps({**head, "metrics": scores.flat(), "versions": versions}))
    else:
        print(f"{args.data}: {len(rows):,} texts")
        print("\n".join(f"{name:>24}  {value:.4f}" for name, value in scores.flat().items()))
    return OK


def _check(args: argparse.Namespace) -> int:
    from recis.tagger.check import check
    from recis.tagger.io import load_labelled, load_rules, save_rules

    rules = load_rules(args.rules)
    found = check(rules, load_labelled(args.data, rules.tokenizer), floor=args.floor)
    by_id = {rule.rule_id: rule for rule in found.rules.rules}
    for key in found.under_floor:
        rule = by_id[key]
        tests = " and ".join(f"{test.kind} {test.value!r}" for test in rule.tests)
        print(
            f"under {args.floor}: {key} {tests} -> {rule.type}: precision {rule.precision:.3f}, support {rule.support}"
        )
    for one, two in found.conflicts:
        print(f"equal conditions, different types: {one} -> {by_id[one].type}, {two} -> {by_id[two].type}")
    print(f"{len(by_id)} rules, {len(found.under_floor)} under the floor, {len(found.silent)} matched nothing")
    if args.out is not None:
        save_rules(found.rules, args.out)
    return FAILED if found.under_floor else OK


def _diff(args: argparse.Namespace) -> int:
    from recis.tagger.check import diff
    from recis.tagger.io import load_rules, load_texts

    if args.ebrm is None and args.texts is None:
        raise ConfigError("diff needs --texts FILE, or --ebrm DIR with --items FILE and --queries FILE")
    if args.ebrm is not None and (args.items is None or args.queries is None):
        raise ConfigError("diff --ebrm needs --items FILE and --queries FILE: r is of a query and an item")
    old, new = load_rules(args.old), load_rules(args.new)
    if args.texts is not None:
        ids, texts = load_texts(args.texts, new.tokenizer)
        changes = diff(old, new, ids, texts)
        for change in changes:
            lost = [f"-{span.surface}:{span.type}" for span in change.lost]
            gained = [f"+{span.surface}:{span.type}" for span in change.new]
            print(f"{change.text_id}: {'  '.join([*lost, *gained])}")
        print(f"{len(changes)} of {len(texts)} texts change")
    if args.ebrm is not None:
        _diff_relevance(args, RuleTagger(old), RuleTagger(new))
    return OK


def _diff_relevance(args: argparse.Namespace, old: RuleTagger, new: RuleTagger) -> None:
    from recis.ebrm.files import read_items
    from recis.ebrm.model import EBRM
    from recis.tagger.impact import LEAST_CHANGE, relevance_changes, tagged_item

    model = EBRM.load(args.ebrm)
    schema = model.config.schema
    types = json.loads(args.type_map.read_text(encoding="utf-8")) if args.type_map is not None else None
    items = list(read_items(args.items, schema))
    queries = [line for line in args.queries.read_text(encoding="utf-8").splitlines() if line.strip()]
    before, after = ([tagged_item(item, rules.tag, schema, types=types) for item in items] for rules in (old, new))
    changes = relevance_changes(model, queries, before, after)
    for change in changes:
        print(f"{change.query!r}, item {change.item_id}: r {change.before:.4f} -> {change.after:.4f}")
    pairs = len(queries) * len(items)
    print(f"{len(changes)} of {pairs} pairs of query and item change r by more than {LEAST_CHANGE}")
