"""What the card itself reaches: the scale of all other figures."""

import sys

import torch

from tests.benchmarks.rounds import Spread, interleave
from tests.gpu.figures import figure


def main(device: str, part: str) -> None:
    """Print versions, the bandwidth of the memory, and the speed of matrix products in bf16."""
    real = device == "cuda"
    figure(f"{part}/torch", torch.__version__)
    if real:
        figure(f"{part}/memory", torch.cuda.get_device_properties(0).total_memory / 2**30, "GiB")
    elements, width = (1 << 28, 8192) if real else (1 << 22, 256)
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: left @ right}
    times = {name: Spread.of(own).median for name, own in interleave(calls, 5, turn_s=0.05).items()}
    # A copy reads and writes 4 bytes an element.
    figure(f"{part}/bandwidth of a copy", 8 * elements / times["copy"] / 1e9, "GB/s")
    figure(f"{part}/bf16 matrix product", 2 * width**3 / times["matmul"] / 1e12, "TFLOP/s")


if __name__ == "__main__":
    main(*sys.argv[1:])
