"""How much memory the log-probs of a vocabulary of 128 thousand take: `python -m benchmarks.vocabulary`.

Forward and backward pass of the vocabulary head alone, for more and more response tokens: with the logits of
`logprobs.LOGITS_AT_ONCE` at a time, with all of them at once, and, where there is a GPU, fused with the softmax. Each
number is from a process of its own: the largest resident memory during the passes, less what was resident before them,
and CPU seconds. On a GPU it is what torch allocated there, and seconds of a second turn, as the first compiles.
"""

import argparse
import subprocess
import sys
import time

import psutil
import torch

from benchmarks.serving import MIB, peak_memory
from trl_apa.models import fused_head, logprobs


VOCABULARY, HIDDEN = 128_000, 256
WAYS = ("in chunks", "all at once", "fused")


def run(num_tokens: int, way: str) -> None:
    """Print MiB and seconds of one way."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if way != "fused":
        fused_head.runs_kernel = lambda device: False
    if way == "all at once":
        logprobs.LOGITS_AT_ONCE = num_tokens * VOCABULARY
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False, device=device)
    head.weight.grad = torch.zeros_like(head.weight)
    hidden = torch.randn(num_tokens, HIDDEN, device=device, requires_grad=True)
    targets = torch.randint(VOCABULARY, (num_tokens,), device=device)

    def passes() -> None:
        logprobs_M, _ = logprobs.head_logprobs(head, hidden, targets, with_entropy=True)
        logprobs_M.square().mean().backward()

    if device.type == "cpu":
        before, start = psutil.Process().memory_info().rss / MIB, time.process_time()
        passes()
        print(f"{peak_memory() - before:.0f} {time.process_time() - start:.2f}")
        return
    passes()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated() / MIB, time.perf_counter()
    passes()
    torch.cuda.synchronize()
    print(f"{torch.cuda.max_memory_allocated() / MIB - before:.0f} {time.perf_counter() - start:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(int(options.run[0]), options.run[1])
        return
    ways = WAYS if torch.cuda.is_available() else WAYS[:2]
    print(f"{'tokens':>7}" + "".join(f" {way:>22}" for way in ways))
    for num_tokens in options.tokens:
        cells = []
        for way in ways:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.vocabulary", "--run", str(num_tokens), way]
            mib, seconds = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]
            cells.append(f"{mib} MiB {seconds} s")
        print(f"{num_tokens:>7}" + "".join(f" {cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
