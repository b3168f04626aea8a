"""Speed of soft logic: entity logits to item relevance, forward alone (serving) and forward with backward (training).

    make bench, or: pytest benchmarks/test_kernel_soft_logic.py --benchmark-json=out.json

Peer: the same product logic in torch operations, with index_add for the sums over slots and items.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from recis.bench.harness import at_threads, compare
from recis_kernels.soft_logic import MAX_U, goedel_pool, lukasiewicz_pool, product_pool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "triton" if DEVICE == "cuda" else "numba"
CASES = [1000, 100_000]  # items of 6 slots and 8 entities, as the spec's serving target has them
ENTITIES_PER_SLOT = (1, 1, 1, 2, 2, 1)
ITEMS_PER_S = 300_000  # cached QI scores on one core: ebrm.md, section 11
TORCH = "torch operations"


def _make(num_items: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    lengths = torch.tensor(ENTITIES_PER_SLOT).repeat(num_items)
    slot_offsets = F.pad(lengths.cumsum(0), (1, 0))
    item_offsets = torch.arange(num_items + 1) * len(ENTITIES_PER_SLOT)
    logits = 3 * torch.randn(int(slot_offsets[-1]))
    return logits.to(DEVICE).requires_grad_(), slot_offsets.to(DEVICE), item_offsets.to(DEVICE)


def _in_torch(logits: torch.Tensor, slot_offsets: torch.Tensor, item_offsets: torch.Tensor) -> torch.Tensor:
    num_slots, num_items = slot_offsets.numel() - 1, item_offsets.numel() - 1
    slot = torch.arange(num_slots, device=logits.device).repeat_interleave(
        slot_offsets.diff(), output_size=logits.numel()
    )
    item = torch.arange(num_items, device=logits.device).repeat_interleave(item_offsets.diff(), output_size=num_slots)
    u = logits.new_zeros(num_slots).index_add(0, slot, -F.softplus(logits)).clamp(max=MAX_U)
    near = u > -0.6931471805599453
    log_near = torch.log(-torch.expm1(torch.where(near, u, -0.1)))
    log_g = torch.where(near, log_near, torch.log1p(-torch.exp(torch.where(near, -1.0, u))))
    return logits.new_zeros(num_items).index_add(0, item, log_g)


def _ours(*inputs: torch.Tensor) -> torch.Tensor:
    return product_pool(*inputs).log_r


@pytest.mark.parametrize("num_items", CASES)
def test_serving(benchmark, num_items):
    logits, slots, items = _make(num_items)
    inputs = (logits.detach(), slots, items)
    run = partial(_ours, *inputs)
    torch.testing.assert_close(run(), _in_torch(*inputs), rtol=1e-4, atol=1e-5)
    impls = {
        OURS: run,
        f"{OURS}, goedel": partial(goedel_pool, *inputs),
        f"{OURS}, lukasiewicz": partial(lukasiewicz_pool, *inputs),
        TORCH: partial(_in_torch, *inputs),
    }
    if DEVICE == "cpu":
        impls[f"{OURS}, 1 thread"] = at_threads(1, run)
    compare(
        benchmark,
        case=f"product logic, {num_items} items of 6 slots and 8 entities",
        ours=OURS,
        impls=impls,
        items=num_items,
        bytes_moved=4 * logits.numel()
        + 16 * slots.numel()
        + 12 * items.numel(),  # offsets in, log g and u and log r out
        targets={"items_per_s": ITEMS_PER_S},
        device=DEVICE,
    )


@pytest.mark.parametrize("num_items", CASES)
def test_training(benchmark, num_items):
    logits, slots, items = _make(num_items)
    upstream = torch.linspace(-1, 1, num_items, device=DEVICE)

    def step(pool) -> torch.Tensor:
        return torch.autograd.grad(pool(logits, slots, items), logits, upstream)[0]

    torch.testing.assert_close(step(_ours), step(_in_torch), rtol=1e-4, atol=1e-5)
    compare(
        benchmark,
        case=f"product logic with gradient, {num_items} items of 6 slots and 8 entities",
        ours=OURS,
        impls={OURS: partial(step, _ours), TORCH: partial(step, _in_torch)},
        items=num_items,
        device=DEVICE,
    )
