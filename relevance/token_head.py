"""Give a causal language model a head that returns token log-probabilities from hidden states, never [T, V] logits.

    use_token_head(model, temperature=0.99)
    model(input_ids, attention_mask, labels=labels, fused_lm_head=True).log_probs         [B, L - 1], 0 where not labelled

TRL calls a policy with `fused_lm_head=True` and reads `log_probs` and `entropy`. Its own head projects every position on a
CPU, prompt included; this one projects labelled positions only, with `recis_kernels.token_logprob`. Any other call, such as
generation, goes through the model's own forward. `forward` is what is replaced, so that a wrapper of DDP or FSDP around the
model still sees every call. This is the one place of the package that patches another library's object.
"""

import functools
import types
from typing import Any

import torch
from torch import Tensor

from recis_kernels.token_logprob import token_stats
from relevance.prefill import head_options


def use_token_head(model: Any, *, temperature: float = 1.0) -> None:
    """Replace the forward of a model (of the base model, under PEFT).

    Args:
        model: a causal language model of transformers, patched by TRL or not.
        temperature: logits are divided by it, for policy, reference and behaviour alike.

    Raises:
        ValueError: temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"the temperature of log-probabilities must be above 0; got {temperature}")
    own_forward = model.forward
    softcap, scale = head_options(model.config)

    @functools.wraps(type(model).forward)  # generate checks its arguments against this signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return own_forward(*args, **kwargs) if labels is None else own_forward(*args, labels=labels, **kwargs)
        if labels is None:
            raise ValueError("fused_lm_head=True needs labels: the tokens whose log-probabilities are asked for")
        kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        return token_outputs(hidden, labels[:, 1:], self.get_output_embeddings(), temperature, softcap, scale)

    model.forward = types.MethodType(forward, model)


def token_outputs(
    hidden: Tensor, labels: Tensor, head: Any, temperature: float, softcap: float | None, scale: float
) -> Any:
    """Return TRL's output object with log_probs and entropy [B, L] of labels [B, L], zeros where a label is -100.

    Args:
        hidden: [B, L, H], the state that predicts each label.
        labels: int64; -100 is left out.
        head: module with `weight` [V, H] and `bias` or None.
        temperature, softcap, scale: of the logits.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    is_labelled = labels != -100
    kept, targets = hidden[is_labelled], labels[is_labelled]
    weight, bias = _whole(head.weight), _whole(head.bias)
    kind = torch.get_autocast_dtype(kept.device.type) if torch.is_autocast_enabled(kept.device.type) else weight.dtype
    kept, weight, bias = kept.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
    with torch.autocast(kept.device.type, enabled=False):
        stats = token_stats(
            kept * scale if scale != 1.0 else kept,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            with_entropy=True,
        )
    assert stats.entropy is not None
    blank = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    # masked_scatter keeps the output tied to the model where no label is left: a differentiable zero, not an error
    log_probs = blank.masked_scatter(is_labelled, stats.logprob)
    entropy = blank.masked_scatter(is_labelled, stats.entropy)
    loss = -log_probs.sum() / is_labelled.sum().clamp(min=1)
    return FusedCausalLMOutput(loss=loss, log_probs=log_probs, entropy=entropy, label_mask=is_labelled)


def _whole(parameter: Any) -> Any:
    """Return a parameter that FSDP2 has cut into shards as one tensor."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
