"""How much memory the log-probs of a vocabulary of 128 thousand take: `python -m benchmarks.vocabulary`.

Forward and backward pass of the vocabulary head alone, for more and more response tokens, with the logits of
`logprobs.LOGITS_AT_ONCE` at a time and with all of them at once. Each number is from a process of its own: the
largest resident memory during the passes, less what was resident before them.
"""

import argparse
import subprocess
import sys
import time

import psutil
import torch

from benchmarks.serving import MIB, peak_memory
from trl_apa import logprobs


VOCABULARY, HIDDEN = 128_000, 256


def run(num_tokens: int, in_chunks: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not in_chunks:
        logprobs.LOGITS_AT_ONCE = num_tokens * VOCABULARY
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
    head.weight.grad = torch.zeros_like(head.weight)
    hidden = torch.randn(num_tokens, HIDDEN, requires_grad=True)
    targets = torch.randint(VOCABULARY, (num_tokens,))
    before, start = psutil.Process().memory_info().rss / MIB, time.process_time()
    logprobs_M, _ = logprobs.head_logprobs(head, hidden, targets, with_entropy=True)
    logprobs_M.square().mean().backward()
    print(f"{peak_memory() - before:.0f} {time.process_time() - start:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(int(options.run[0]), options.run[1] == "in-chunks")
        return
    print(f"{'tokens':>7} {'in chunks':>22} {'all at once':>22}")
    for num_tokens in options.tokens:
        cells = []
        for way in ("in-chunks", "at-once"):
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.vocabulary", "--run", str(num_tokens), way]
            mib, seconds = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]
            cells.append(f"{mib} MiB {seconds} s")
        print(f"{num_tokens:>7} {cells[0]:>22} {cells[1]:>22}", flush=True)


if __name__ == "__main__":
    main()
