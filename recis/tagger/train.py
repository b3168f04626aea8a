"""Train a neural tagger: AdamW with one learning rate per layer, batches of texts of like length, the best epoch kept."""

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recis.tagger.crf import FORBIDDEN
from recis.tagger.neural import NeuralConfig, TaggerModel, allowed_tags, soft_tags
from recis.tagger.rules import Span
from recis.tagger.text import TOKENIZER, Text

MIN_CONF = 0.01  # a label believed less says the opposite of itself


@dataclass(frozen=True, slots=True)
class Example:
    """A text and the tags each of its words may have [T, K]: bool, or soft labels; weight multiplies its loss."""

    text: Text
    allowed: Tensor
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class _Piece:
    """A window of an example."""

    words: tuple[str, ...]
    pieces: list[list[int]]
    allowed: Tensor
    weight: float


def train(
    model: TaggerModel,
    examples: Sequence[Example],
    *,
    measure: Callable[[TaggerModel], float] | None = None,
    on_epoch: Callable[[int, float, float], None] | None = None,
) -> list[float]:
    """Train a model in place by its config and return the value of `measure` after each epoch.

    With measure, the weights of the best epoch (the first of equals) stay in the end. on_epoch gets epoch, loss, value.

    Raises:
        ValueError: there are no examples with words.
    """
    config = model.config
    pieces = [piece for example in examples for piece in _windows(model, example)]
    if not pieces:
        raise ValueError("training needs at least one text with words; got none")
    rng = random.Random(config.seed)
    torch.manual_seed(config.seed)
    optimizer = torch.optim.AdamW(_groups(model, config), weight_decay=config.weight_decay, fused=True)
    num_steps = config.epochs * math.ceil(len(pieces) / config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps, config.warmup))
    average = _Average(model, config.average) if config.average else None
    values: list[float] = []
    best: dict[str, Tensor] | None = None
    for epoch in range(config.epochs):
        model.train()
        total = 0.0
        for batch in _batches(pieces, config.batch_size, rng):
            total += _step(model, batch, optimizer, config.clip)
            schedule.step()
            if average is not None:
                average.update()
        if measure is None:
            continue
        if average is not None:
            average.swap()
        values.append(measure(model))
        if values[-1] > max(values[:-1], default=-math.inf):
            best = copy.deepcopy(model.state_dict())
        if average is not None:
            average.swap()
        if on_epoch is not None:
            on_epoch(epoch, total / len(pieces), values[-1])
    if best is None and average is not None:
        average.swap()
    if best is not None:
        model.load_state_dict(best)
    model.eval()
    return values


def examples_of(
    model: TaggerModel,
    texts: Sequence[Text],
    spans: Sequence[Sequence[Span]],
    *,
    outside_known: bool,
    loose: bool = False,
    soft: bool = False,
) -> list[Example]:
    """Return training examples; see recis.tagger.neural.allowed_tags for the first two options.

    With soft, the conf of a span is how far its label is believed; see recis.tagger.neural.soft_tags.
    """
    examples: list[Example] = []
    for text, found in zip(texts, spans, strict=True):
        if not text.tokens:
            continue
        typed = [(span.start, span.end, span.type) for span in found]
        tags = allowed_tags(model.tags, typed, len(text.tokens), outside_known=outside_known, loose=loose)
        if soft:
            conf = torch.ones(len(text.tokens))
            for span in found:
                conf[span.start : span.end] = max(MIN_CONF, min(1.0, span.conf))
            tags = soft_tags(tags, conf)
        examples.append(Example(text, tags))
    return examples


class NeuralPoolTagger:
    """The neural tagger in the loop of recis.tagger.distil: each round a fresh model learns the pool of that round.

    Words outside the pool's spans are unknown, spans that overlap them are spoken against, and the score with which a span
    entered the pool is how far it is believed.
    """

    def __init__(self, types: Sequence[str], config: NeuralConfig, *, tokenizer: str = TOKENIZER) -> None:
        self.types, self.config, self.tokenizer = tuple(types), config, tokenizer
        self.model: TaggerModel | None = None
        """Of the last round."""

    def fit(self, texts: Sequence[Text], spans: Sequence[Sequence[Span]]) -> None:
        """Train a model on spans.

        Raises:
            ValueError: there are no texts with words.
        """
        self.model = TaggerModel(self.types, self.config, tokenizer=self.tokenizer)
        train(self.model, examples_of(self.model, texts, spans, outside_known=False, soft=True))

    def predict(self, texts: Sequence[Text]) -> list[list[Span]]:
        """Return the spans of each text.

        Raises:
            RuntimeError: nothing was learnt yet.
        """
        if self.model is None:
            raise RuntimeError("a pool tagger has no model yet: fit comes before predict")
        return self.model.tag_texts(texts)


def _windows(model: TaggerModel, example: Example) -> Iterator[_Piece]:
    if not example.text.tokens:
        return
    pieces = model.encoder.pieces_of(example.text.tokens)
    for start, end in model.encoder.windows(pieces):
        yield _Piece(example.text.tokens[start:end], pieces[start:end], example.allowed[start:end], example.weight)


def _step(model: TaggerModel, batch: Sequence[_Piece], optimizer: torch.optim.Optimizer, clip: float) -> float:
    emissions, lengths = model.emissions([piece.words for piece in batch], [piece.pieces for piece in batch])
    allowed = _side_by_side([piece.allowed for piece in batch])
    weights = torch.tensor([piece.weight for piece in batch])
    losses = model.crf.loss(emissions, lengths, allowed) * weights
    optimizer.zero_grad(set_to_none=True)
    losses.mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return float(losses.sum().detach())


def _side_by_side(allowed: Sequence[Tensor]) -> Tensor:
    """Return [B, T, K]: bool where all are, else soft labels; what lies behind a text's end may be anything."""
    if all(tags.dtype == torch.bool for tags in allowed):
        return nn.utils.rnn.pad_sequence(list(allowed), batch_first=True, padding_value=1.0).bool()
    soft = [tags if tags.is_floating_point() else torch.where(tags, 0.0, FORBIDDEN) for tags in allowed]
    return nn.utils.rnn.pad_sequence(soft, batch_first=True)


def _groups(model: TaggerModel, config: NeuralConfig) -> list[dict[str, object]]:
    """Return parameter groups: each layer of a pretrained encoder lower in rate than the one above; all else at head_lr."""
    if model.encoder.model is None:
        return [{"params": list(model.parameters()), "lr": config.head_lr}]
    num_layers = int(model.encoder.model.config.num_hidden_layers)
    by_rate: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name == "encoder.model.embeddings.word_embeddings.weight" and not config.train_embeddings:
            parameter.requires_grad_(False)
            continue
        rate = config.head_lr
        if name.startswith("encoder.model."):
            parts = name.split(".")
            depth = int(parts[parts.index("layer") + 1]) + 1 if "layer" in parts else 0
            rate = config.lr * config.layer_decay ** (num_layers - depth)
        by_rate.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]


def _rate(step: int, num_steps: int, warmup: float) -> float:
    rising = max(1, int(warmup * num_steps))
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (num_steps - step) / max(1, num_steps - rising))


def _batches(pieces: Sequence[_Piece], batch_size: int, rng: random.Random) -> list[list[_Piece]]:
    """Return one epoch of batches: shuffled, sorted by length within chunks of 16 batches, batches shuffled again."""
    order = list(pieces)
    rng.shuffle(order)
    chunk = 16 * batch_size
    batches: list[list[_Piece]] = []
    for at in range(0, len(order), chunk):
        near = sorted(order[at : at + chunk], key=lambda piece: sum(map(len, piece.pieces)) or len(piece.words))
        batches += [near[start : start + batch_size] for start in range(0, len(near), batch_size)]
    rng.shuffle(batches)
    return batches


class _Average:
    """Running mean of the weights that are trained."""

    def __init__(self, model: TaggerModel, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.mean = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 9))  # short at first, so that the start is soon forgotten
        torch._foreach_lerp_(self.mean, list(self.weights), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the mean and the model's weights; a second call takes it back."""
        for weight, mean in zip(self.weights, self.mean, strict=True):
            held = weight.clone()
            weight.copy_(mean)
            mean.copy_(held)
