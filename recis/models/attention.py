"""Attend from one target to a sequence of any length, without padding: the pooling of DIN.

    score_t = MLP([q, k_t, q - k_t, q * k_t])       q = target of the sample, k_t = the sequence's vectors
    a_t = softmax over the sequence of score_t, or score_t itself (the paper's form, which keeps the strength of interest)
    out = sum_t a_t w_t k_t                         w_t = weights of the sequence, 1 without

Cost is that of the MLP on L rows, L = positions in the batch; an empty sequence gives zeros. Source: Zhou et al. 2018,
arXiv:1706.06978.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recis.jagged import JaggedTensor
from recis.models.layers import MLP, Activation
from recis_kernels.jagged import bag_of_value
from recis_kernels.segment import segment_softmax, segment_sum


class TargetAttention(nn.Module):
    """DIN's pooling of a sequence by its fit to a target: ([B, width], bags of [L, width]) -> [B, width].

    Args:
        width: of target and sequence vectors.
        hidden: hidden widths of the scoring MLP.
        softmax: normalise the scores within a sequence.
        activation: of the scoring MLP.
    """

    def __init__(
        self, width: int, hidden: Sequence[int] = (64, 16), *, softmax: bool = True, activation: Activation = nn.ReLU
    ) -> None:
        super().__init__()
        self.softmax = softmax
        self.score = MLP(4 * width, hidden, out_width=1, activation=activation)

    def forward(self, target: Tensor, sequence: JaggedTensor) -> Tensor:
        """Return [B, width]; sequence has B bags.

        Raises:
            ValueError: the sequence is nested, or its width or number of bags is not that of the target.
        """
        keys = sequence.values
        num_bags = target.shape[0]
        if not isinstance(keys, Tensor) or keys.ndim != 2 or keys.shape[1] != target.shape[1]:
            raise ValueError(f"the sequence must hold vectors [L, {target.shape[1]}]; got {sequence!r}")
        if sequence.num_bags != num_bags:
            raise ValueError(f"{num_bags} targets need as many sequences; got {sequence.num_bags}")
        offsets = sequence.offsets.long()
        query = target.index_select(0, bag_of_value(offsets, keys.shape[0]))
        scores = self.score(torch.cat([query, keys, query - keys, query * keys], dim=1)).float()
        weights = segment_softmax(scores, offsets) if self.softmax else scores
        if sequence.weights is not None:
            weights = weights * sequence.weights.unsqueeze(1)
        return segment_sum(weights * keys, offsets)
