"""From the states of a text's tokens to one vector: [B, T, H] and a mask [B, T] -> [B, H].

    MeanPool       mean over the text's tokens
    FirstToken     the state of the first one: what BERT-like encoders call [CLS]
    LastToken      the state of the last one: the only one of a decoder that has seen the whole text
    SummaryToken   the state of a learned token that is put behind the text
    AttentionPool  sum of softmax(w . h) h over the text's tokens; w starts at 0, so it starts as the mean

A text without tokens gives zeros (SummaryToken still has its own token). Padding stands behind the text.
"""

import torch
from torch import Tensor, nn


class MeanPool(nn.Module):
    """Mean over the tokens; no weights. `hidden_size` is not used: every pooling is made the same way."""

    has_own_token = False

    def __init__(self, hidden_size: int) -> None:
        super().__init__()

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        weights = mask.to(states.dtype)[:, :, None]
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


class FirstToken(MeanPool):
    """The first token's state; no weights."""

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return states[:, 0] * mask[:, :1].to(states.dtype)


class LastToken(MeanPool):
    """The last token's state; no weights."""

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        last = (mask.sum(1) - 1).clamp(min=0)
        return states[torch.arange(len(states), device=states.device), last] * mask.any(1, keepdim=True).to(
            states.dtype
        )


class SummaryToken(LastToken):
    """The state of a learned token behind the text, so it reads what LastToken reads. Attribute token: [H], its input."""

    has_own_token = True

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.token = nn.Parameter(torch.randn(hidden_size) * 0.02)


class AttentionPool(MeanPool):
    """A softmax over the tokens by one learned vector."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.weight = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        scores = (states @ self.weight.to(states.dtype)).float().masked_fill(~mask, -torch.inf)
        scores = scores.masked_fill(~mask.any(1, keepdim=True), 0.0)
        shares = scores.softmax(1).to(states.dtype) * mask
        return (shares[:, :, None] * states).sum(1)
