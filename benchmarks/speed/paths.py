"""Which pairs of dtypes have no path of their own through memory: seen in what autograd records, not in a table."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import rlloss
from rlloss import fused

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TARGETS = (*FLOATS, torch.uint8, torch.int64)


def listing(device: str) -> str:
    """The pairs, one line for each loss."""
    lines = ["Pairs of dtypes that take the plain formula, whatever their size (first the one that is differentiated):"]
    for name, function, firsts, seconds in checked():
        pairs = [pair for pair in itertools.product(firsts, seconds) if not takes_fast_path(function, *pair, device)]
        shown = ", ".join(f"{str(a).split('.')[1]} and {str(b).split('.')[1]}" for a, b in pairs)
        lines.append(f"- {name}: {shown or 'none'}")
    return "\n".join(lines)


def checked() -> Iterator[tuple[str, Callable[[torch.dtype, torch.dtype, str], Tensor], tuple, tuple]]:
    """Name, function of two dtypes, and what it takes."""
    yield "squared error", squared_error, FLOATS, TARGETS
    yield "two-hot cross-entropy", two_hot, FLOATS, TARGETS
    yield "KL terms", kl_terms, FLOATS, FLOATS


def takes_fast_path(function: Callable[..., Tensor], first: torch.dtype, second: torch.dtype, device: str) -> bool:
    """Whether a Function of `rlloss.fused` is behind the value."""
    functions = [x for x in vars(fused).values() if isinstance(x, type) and issubclass(x, torch.autograd.Function)]
    names = {f"{function.__name__}Backward" for function in functions}
    nodes, seen = [function(first, second, device).grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ in names:
            return True
        nodes += [following for following, _ in node.next_functions]
    return False


def squared_error(first: torch.dtype, second: torch.dtype, device: str) -> Tensor:
    numbers = fused.ErrorSum.smallest
    logits = torch.zeros(1, 1, 1, 1, device=device)
    prediction = torch.zeros(1, 1, numbers, dtype=first, device=device, requires_grad=True)
    outputs = {"prior_logits": logits, "posterior_logits": logits, "reconstruction": prediction}
    target = torch.zeros(1, 1, numbers, dtype=second, device=device)
    batch = {"observation": target, "reward": logits[..., 0, 0]}
    outputs["reward"] = logits[..., 0, 0]
    return rlloss.dreamer_v3_model_terms(outputs, batch, reward_two_hot=False)["reco"]


def two_hot(first: torch.dtype, second: torch.dtype, device: str) -> Tensor:
    steps = -(-fused.TwoHotCrossEntropy.smallest // 255)
    logits = torch.zeros(steps, 255, dtype=first, device=device, requires_grad=True)
    target = torch.zeros(steps, dtype=second, device=device)
    return rlloss.two_hot_cross_entropy(logits, target, rlloss.symexp_bins(255, device=device))


def kl_terms(first: torch.dtype, second: torch.dtype, device: str) -> Tensor:
    shape = (-(-fused.Divergence.smallest // 1024), 32, 32)
    posterior = torch.zeros(shape, dtype=first, device=device, requires_grad=True)
    prior = torch.zeros(shape, dtype=second, device=device)
    return rlloss.categorical_kl_terms(posterior, prior)[1]
