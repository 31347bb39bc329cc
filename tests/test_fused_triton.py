"""The Triton kernels in Triton's interpreter, which needs no GPU; tests/test_cuda.py runs them on one."""

import importlib.util
import subprocess
import sys
from os import environ

import pytest
import torch
from test_fused import CASES
from torch.testing import assert_close


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: nothing to interpret")
def test_kernels_are_the_formula():
    # In a process of its own: Triton decides when it is imported whether it interprets.
    result = subprocess.run(
        [sys.executable, __file__],
        env={**environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:-1] == list(CASES)


def main():
    from rlloss import fused_triton

    torch.manual_seed(0)
    for name, (reduction, operands) in CASES.items():
        operands = tuple(x.float() if x.is_floating_point() else x for x in operands())
        live, constants = operands[: reduction.live], operands[reduction.live :]
        values, pull = torch.func.vjp(lambda *live, r=reduction, c=constants: r.formula(*live, *c), *live)
        assert_close(fused_triton.value(reduction, operands), values[0], rtol=1e-4, atol=1e-5)
        scales = tuple(torch.randn_like(value) for value in values)
        slopes = fused_triton.slopes(reduction, tuple(range(reduction.live)), scales, operands)
        assert_close(slopes, pull(scales), rtol=1e-4, atol=1e-5)
        print(name)


if __name__ == "__main__":
    main()
