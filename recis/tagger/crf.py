"""A linear-chain conditional random field over the tags of a text, with labels that may be known only in part.

    score(y) = start[y_1] + sum_t emission[t, y_t] + sum_t transition[y_{t-1}, y_t] + end[y_T]
    loss     = log sum over all y exp score(y)  -  log sum over y exp(score(y) + sum_t label[t, y_t])

label is 0 for a tag that a word may have and -inf for one that it may not; a soft label lies between. With one allowed
tag per word this is the usual negative log-likelihood; words whose tag is unknown allow every tag.
A BIO tag set forbids I-x unless B-x or I-x stands before it. Sums in fp32 logs. Source: Lafferty, McCallum and Pereira 2001.
"""

import torch
from torch import Tensor, nn

FORBIDDEN = -1e4  # added to a score that must not happen; -inf would give NaN gradients where all paths are forbidden


class LinearChainCRF(nn.Module):
    """Transition scores of K tags and the sums over paths."""

    forbidden: Tensor
    forbidden_start: Tensor

    def __init__(self, tags: tuple[str, ...]) -> None:
        super().__init__()
        num_tags = len(tags)
        self.transition = nn.Parameter(torch.zeros(num_tags, num_tags))
        self.start = nn.Parameter(torch.zeros(num_tags))
        self.end = nn.Parameter(torch.zeros(num_tags))
        forbidden = torch.tensor([[is_broken(before, after) for after in tags] for before in tags])
        self.register_buffer("forbidden", forbidden.float() * FORBIDDEN, persistent=False)
        begins = torch.tensor([is_broken("O", tag) for tag in tags])
        self.register_buffer("forbidden_start", begins.float() * FORBIDDEN, persistent=False)

    def loss(self, emissions: Tensor, lengths: Tensor, allowed: Tensor) -> Tensor:
        """Return -log P(a path within `allowed`) per text, [B]; with soft labels -log E exp(sum of them over the path).

        Args:
            emissions: [B, T, K].
            lengths: [B] int64, words of each text, each >= 1.
            allowed: [B, T, K]: bool, each word allowing at least one tag, or soft labels in fp32, each <= 0.
        """
        if allowed.dtype == torch.bool:
            masked = emissions.masked_fill(~allowed, FORBIDDEN)
        else:
            masked = emissions.float() + allowed
        return self.log_norm(emissions, lengths) - self.log_norm(masked, lengths)

    def log_norm(self, emissions: Tensor, lengths: Tensor) -> Tensor:
        """Return log of the sum of exp score over all paths, [B]."""
        emissions = emissions.float()
        transition, start = self._scores()
        alpha = emissions[:, 0] + start
        for step in range(1, emissions.shape[1]):
            moved = torch.logsumexp(alpha[:, :, None] + transition, dim=1) + emissions[:, step]
            alpha = torch.where((step < lengths)[:, None], moved, alpha)
        return torch.logsumexp(alpha + self.end, dim=1)

    def best_paths(self, emissions: Tensor, lengths: Tensor) -> list[list[int]]:
        """Return the tags of the best path of each text."""
        emissions = emissions.float()
        transition, start = self._scores()
        alpha = emissions[:, 0] + start
        back: list[Tensor] = []
        for step in range(1, emissions.shape[1]):
            best, came_from = (alpha[:, :, None] + transition).max(dim=1)
            alpha = torch.where((step < lengths)[:, None], best + emissions[:, step], alpha)
            back.append(came_from)
        last = (alpha + self.end).argmax(dim=1).tolist()
        steps = [came_from.tolist() for came_from in back]
        paths: list[list[int]] = []
        for row, length in enumerate(lengths.tolist()):
            path = [last[row]]
            for step in range(length - 2, -1, -1):
                path.append(steps[step][row][path[-1]])
            paths.append(path[::-1])
        return paths

    def marginals(self, emissions: Tensor, lengths: Tensor) -> Tensor:
        """Return P(tag of word t) [B, T, K]: the gradient of log_norm; rows beyond a text's length are 0."""
        with torch.enable_grad():
            leaf = emissions.detach().float().requires_grad_()
            (found,) = torch.autograd.grad(self.log_norm(leaf, lengths).sum(), leaf)
        return found

    def _scores(self) -> tuple[Tensor, Tensor]:
        return self.transition + self.forbidden, self.start + self.forbidden_start


def is_broken(before: str, after: str) -> bool:
    """Return whether BIO tag `after` may not follow `before`."""
    return after.startswith("I-") and before[2:] != after[2:]


def bio_tags(types: tuple[str, ...]) -> tuple[str, ...]:
    """Return O and, per type, B- and I-."""
    return ("O", *(f"{head}-{name}" for name in types for head in ("B", "I")))
