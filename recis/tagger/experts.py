"""Ask a language model, a dictionary or recorded answers what type a span has, through two differently worded templates.

    T1  "<text> <span> is a [MASK] ."        T2  "<span> is a type of [MASK] . <text>"

An answer is type -> score in nats for each type of the schema and for `none`, as log-odds against a blank span: how much
more likely the span makes the type's words than the sentence alone does. An empty answer counts as `none`.
Source of asking two templates: arXiv:2210.02768; the templates, verbalisers and calibration here are ours.
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from recis.tagger.text import Text, tokenize

NONE = "none"
TEMPLATES: dict[str, str] = {"T1": "{text} {span} is a {mask} .", "T2": "{span} is a type of {mask} . {text}"}
ANSWER_SCORE = 5.0
"""Nats given to a type that an expert named without a score of its own."""

Answer = dict[str, float]


class ExpertTimeout(RuntimeError):
    """An expert did not answer in time; the phrase is skipped this round."""


class Expert(Protocol):
    """Says how well each type fits a span."""

    @property
    def version(self) -> str:
        """Changes whenever an answer could."""
        ...

    def type_scores(self, text: Text, span: tuple[int, int], template: str) -> Answer:
        """Return type or `none` -> log-odds; {} when there is no answer.

        Raises:
            ExpertTimeout: no answer in time.
        """
        ...


class TableExpert:
    """Recorded answers by surface: phrase -> template -> a type's name, or type -> score. Unknown phrases get no answer."""

    def __init__(self, answers: Mapping[str, Mapping[str, str | Mapping[str, float]]]) -> None:
        """Normalise the phrases.

        Raises:
            ValueError: an answer is for a template that does not exist.
        """
        self._answers: dict[str, dict[str, Answer]] = {}
        for phrase, by_template in answers.items():
            unknown = set(by_template) - set(TEMPLATES)
            if unknown:
                raise ValueError(f"phrase {phrase!r}: template must be one of {list(TEMPLATES)}; got {sorted(unknown)}")
            known = {
                name: {answer: ANSWER_SCORE} if isinstance(answer, str) else dict(answer)
                for name, answer in by_template.items()
            }
            self._answers[" ".join(tokenize(phrase).tokens)] = known
        text = json.dumps(self._answers, sort_keys=True)
        self.version = "table-" + hashlib.sha256(text.encode()).hexdigest()[:12]

    @classmethod
    def load(cls, path: str | Path) -> "TableExpert":
        """Read {"phrase": {"T1": "type", "T2": {"type": score}}} from a JSON file."""
        return cls(json.loads(Path(path).read_text(encoding="utf-8")))

    def type_scores(self, text: Text, span: tuple[int, int], template: str) -> Answer:
        return dict(self._answers.get(text.surface(*span), {}).get(template, {}))


class CachedExpert:
    """Checks another expert's answers and asks each question once.

    The key is (text, span, template, expert version). `empty` counts questions without an answer.
    """

    def __init__(self, expert: Expert, types: Sequence[str]) -> None:
        self.expert = expert
        self.types = tuple(types)
        self.empty = 0
        self._answers: dict[tuple[str, tuple[int, int], str, str], Answer] = {}

    @property
    def version(self) -> str:
        return self.expert.version

    def type_scores(self, text: Text, span: tuple[int, int], template: str) -> Answer:
        """Return the whole answer: each type and `none`; what the expert left out scores 0.

        Raises:
            ValueError: a score is NaN, or a type is outside the schema; with phrase and template.
        """
        key = (text.text, span, template, self.expert.version)
        if key not in self._answers:
            self._answers[key] = self._ask(text, span, template)
        return self._answers[key]

    def _ask(self, text: Text, span: tuple[int, int], template: str) -> Answer:
        answer = self.expert.type_scores(text, span, template)
        place = f"phrase {text.surface(*span)!r}, template {template}"
        for name, score in answer.items():
            if name != NONE and name not in self.types:
                raise ValueError(
                    f"{place}: the expert named type {name!r}, which is not in the schema {list(self.types)}"
                )
            if math.isnan(score):
                raise ValueError(f"{place}: the expert's score of {name!r} is NaN")
        if not answer:
            self.empty += 1
            answer = {NONE: ANSWER_SCORE}
        return {name: answer.get(name, 0.0) for name in (*self.types, NONE)}


class MaskedLMExpert:
    """Asks a masked language model from a local folder; needs transformers.

    score(type) = mean over its words log p(word | template with span) - the same with a blank span
    """

    def __init__(
        self, path: str | Path, words: Mapping[str, Sequence[str]], templates: Mapping[str, str] | None = None
    ) -> None:
        """Load the model.

        Args:
            path: folder of a Hugging Face masked LM and its tokenizer; nothing is fetched.
            words: type, or `none`, -> 5 to 20 words that say it; each must be one token of the model.
            templates: name -> sentence with {text}, {span} and {mask}; TEMPLATES where left out.

        Raises:
            ValueError: a word is more than one token of the model, or a type has no words.
        """
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        self.model: Any = AutoModelForMaskedLM.from_pretrained(str(path), local_files_only=True).eval()
        self._templates = dict(templates or TEMPLATES)
        self._words = {name: self._ids(name, said) for name, said in words.items()}
        self._blank: dict[tuple[str, str], Answer] = {}
        self.version = self._version()

    @property
    def types(self) -> tuple[str, ...]:
        """What can be answered: types, and `none` where it has words."""
        return tuple(self._words)

    def copy(self, templates: Mapping[str, str]) -> "MaskedLMExpert":
        """Return an expert with weights of its own that asks through other templates."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        other._templates = dict(templates)
        return other.renewed()

    def renewed(self) -> "MaskedLMExpert":
        """Return this expert after its weights or templates changed: a new version, and nothing remembered."""
        self._blank = {}
        self.version = self._version()
        return self

    def type_scores(self, text: Text, span: tuple[int, int], template: str) -> Answer:
        without = text.surface(0, span[0]) + " " + text.surface(span[1], len(text.tokens))
        blank = self._blank.get((without, template))
        if blank is None:
            blank = self._blank[without, template] = self._answer(without, "", template)
        said = self._answer(text.surface(0, len(text.tokens)), text.surface(*span), template)
        return {name: said[name] - blank[name] for name in said}

    def log_probs(self, asked: Sequence[tuple[Text, tuple[int, int], str]]) -> dict[str, Tensor]:
        """Return type -> mean log-probability [B] of its words, for B questions (text, span, template); differentiable.

        A question whose mask a long text pushed out of the model's window gets zeros.
        """
        return self._score(
            [
                self._sentence(text.surface(0, len(text.tokens)), text.surface(*span), template)
                for text, span, template in asked
            ]
        )

    def _version(self) -> str:
        told = json.dumps([sorted(self._words.items()), sorted(self._templates.items())])
        digest = hashlib.sha256(told.encode())
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.cpu().numpy().tobytes())
        return "masked-lm-" + digest.hexdigest()[:12]

    def _ids(self, name: str, words: Sequence[str]) -> list[int]:
        if not words:
            raise ValueError(f"type {name!r} needs words that say it")
        ids: list[int] = []
        for word in words:
            pieces = self._tokenizer(word, add_special_tokens=False)["input_ids"]
            if len(pieces) != 1 or pieces[0] == self._tokenizer.unk_token_id:
                raise ValueError(f"type {name!r}: word {word!r} must be one token of the model; it is {len(pieces)}")
            ids.append(pieces[0])
        return ids

    def _sentence(self, text: str, span: str, template: str) -> str:
        mask = self._tokenizer.mask_token
        return " ".join(self._templates[template].format(text=text, span=span, mask=mask).split())

    @torch.no_grad()
    def _answer(self, text: str, span: str, template: str) -> Answer:
        scores = self._score([self._sentence(text, span, template)])
        return {name: float(score[0]) for name, score in scores.items()}

    def _score(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        batch = self._tokenizer(list(sentences), return_tensors="pt", truncation=True, padding=True)
        is_mask = batch["input_ids"] == self._tokenizer.mask_token_id
        places = is_mask.int().argmax(1)
        logits = self.model(**batch).logits[torch.arange(len(sentences)), places]
        log_probs = torch.log_softmax(logits.float(), dim=-1) * is_mask.any(1)[:, None]
        return {name: log_probs[:, ids].mean(1) for name, ids in self._words.items()}


class LLMExpert:
    """Asks through a function prompt -> text; the caller owns network and keys. The answer is one label of a closed list."""

    def __init__(self, generate: Callable[[str], str], types: Mapping[str, str], *, version: str) -> None:
        """Keep the function.

        Args:
            generate: returns the model's text for a prompt; raise ExpertTimeout to have the phrase skipped.
            types: type -> one line that explains it.
            version: names the model and its settings; part of every cache key.
        """
        self._generate = generate
        self._types = dict(types)
        self.version = version
        self.not_a_label = 0
        """Answers that were none of the labels; each counted as no answer."""

    def type_scores(self, text: Text, span: tuple[int, int], template: str) -> Answer:
        said = self._generate(self.prompt(text, span, template)).strip().strip(".\"'`").casefold()
        labels = {name.casefold(): name for name in (*self._types, NONE)}
        if said not in labels:
            self.not_a_label += 1
            return {}
        return {labels[said]: ANSWER_SCORE}

    def prompt(self, text: Text, span: tuple[int, int], template: str) -> str:
        """Return the question; the two templates put text and span in another order."""
        choices = "\n".join(f"- {name}: {meaning}" for name, meaning in self._types.items())
        whole, part = text.surface(0, len(text.tokens)), text.surface(*span)
        told = (
            f"Product text: {whole}\nWhat is the part {part!r} in it?"
            if template == "T1"
            else f"The words {part!r} are of one type.\nThey stand in this product text: {whole}\nWhich type?"
        )
        return f"{told}\n{choices}\n- {NONE}: none of these\nAnswer with one label only."
