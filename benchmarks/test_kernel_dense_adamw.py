"""Speed of AdamW over all dense parameters of a model, against torch.optim.AdamW in its three forms.

    make bench, or: pytest benchmarks/test_kernel_dense_adamw.py --benchmark-json=out.json
    pytest benchmarks/test_kernel_dense_adamw.py -k small      seconds, to see that it runs

The shapes are those of a ranking model (few wide layers) and of a transformer (many tensors, most of them small). torch's
step includes what its optimizer object does around the kernels, as its caller pays it.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recis.bench.harness import compare
from recis_kernels.dense_adamw import dense_adamw
from recis_kernels.row_rules import ADAMW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "triton" if DEVICE == "cuda" else "numba"
LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01
BLOCK = [(512, 1536), (1536,), (512, 512), (512,), (512, 2048), (2048,), (2048, 512), (512,), (512,), (512,)]
MODELS: dict[str, list[tuple[int, ...]]] = {
    "small": [(64, 32), (32,), (7, 3)],
    "ranker": [(1024, 1024), (1024,), (1024, 512), (512,), (512, 256), (256,), (256, 1), (1,)],
    "transformer": BLOCK * 6,
}


def tensors_of(shapes: list[tuple[int, ...]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).mul_(0.02).to(DEVICE) for shape in shapes]


def torch_step(shapes: list[tuple[int, ...]], **form: bool) -> tuple[list[Tensor], Callable[[], object]]:
    """Return torch's parameters with gradients, and its step."""
    parameters = [torch.nn.Parameter(tensor) for tensor in tensors_of(shapes, 1)]
    for parameter, grad in zip(parameters, tensors_of(shapes, 2), strict=True):
        parameter.grad = grad
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, **form)
    return [parameter.data for parameter in parameters], optimizer.step


def our_step(shapes: list[tuple[int, ...]]) -> tuple[list[Tensor], Callable[[], object]]:
    """Return our parameters and a step that counts its calls."""
    params, grads = tensors_of(shapes, 1), tensors_of(shapes, 2)
    means, squares = ([torch.zeros_like(param) for param in params] for _ in range(2))
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        line = torch.tensor([[LR, *BETAS, EPS, DECAY, float(count)]], dtype=torch.float64)
        dense_adamw(params, grads, means, squares, ADAMW, line)

    return params, step


@pytest.mark.parametrize("model", MODELS)
def test_adamw_step(benchmark, model):
    shapes = MODELS[model]
    steps = {
        OURS: our_step(shapes),
        "torch foreach": torch_step(shapes, foreach=True),
        "torch fused": torch_step(shapes, fused=True),
        "torch for loop": torch_step(shapes, foreach=False),
    }
    for _ in range(3):
        for _, step in steps.values():
            step()
    want = steps["torch for loop"][0]
    for params, _ in steps.values():
        for param, exact in zip(params, want, strict=True):
            torch.testing.assert_close(param, exact, rtol=1e-5, atol=1e-6)
    num_elements = sum(param.numel() for param in want)
    compare(
        benchmark,
        case=f"AdamW step, {model}: {len(shapes)} tensors, {num_elements / 1e6:.2f} M elements, float32",
        ours=OURS,
        impls={name: step for name, (_, step) in steps.items()},
        bytes_moved=28 * num_elements,
        items=num_elements,
        device=DEVICE,
    )
