"""CPU seconds of sampling that leaves out finished rows, against the same with every row to the longest.

`python -m benchmarks.finished_rows`: for batches of several sizes and responses of several kinds of length, both ways
from the same random numbers, one thread, the best of three rounds each. Ratios below 1 are saved time.
"""

import time

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaForCausalLM

from benchmarks.workload import EOS, PAD, Workload
from trl_apa.rollout import generation
from trl_apa.rollout.generation import generate_responses


LIMIT, ROUNDS = 64, 3
# Probability of EOS at each token: 0 gives responses that are all as long as the limit.
KINDS = {"long tail": 1 / 28, "short": 1 / 8, "equal": 0.0}
BATCH_SIZES = (4, 16, 64)


def end_with(probability: float, network: LlamaForCausalLM) -> torch.utils.hooks.RemovableHandle:
    """Let every response end with this probability at each token."""

    def replace(head: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        logits = logits - logits.logsumexp(dim=-1, keepdim=True)
        logits[..., EOS] = torch.tensor(probability).log()
        return logits

    return network.lm_head.register_forward_hook(replace)


def seconds(network: LlamaForCausalLM, rows: list[Tensor], batch_size: int) -> tuple[float, list[Tensor]]:
    """CPU seconds, and the responses."""
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": EOS}
    config = GenerationConfig(**options, pad_token_id=PAD, max_new_tokens=LIMIT)
    torch.manual_seed(0)
    start = time.process_time()
    responses = generate_responses(network, rows, config, None, batch_size=batch_size)
    return time.process_time() - start, responses


def main() -> None:
    torch.set_num_threads(1)
    workload = Workload()
    network, rows = workload.model().eval(), workload.rollouts()[0]
    possible = generation.rows_can_be_selected
    print("| responses | batch | tokens, mean | every row to the longest, CPU s | finished rows left out | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind, probability in KINDS.items():
        handle = end_with(probability, network)
        for batch_size in BATCH_SIZES:
            best = {"left out": float("inf"), "kept": float("inf")}
            for _ in range(ROUNDS):
                generation.rows_can_be_selected = possible
                taken, responses = seconds(network, rows, batch_size)
                best["left out"] = min(best["left out"], taken)
                generation.rows_can_be_selected = lambda *given: False
                taken, others = seconds(network, rows, batch_size)
                best["kept"] = min(best["kept"], taken)
            assert all(map(torch.equal, responses, others)), "the two ways sampled different tokens"
            mean = sum(map(len, responses)) / len(responses)
            ratio = best["left out"] / best["kept"]
            cells = (kind, batch_size, f"{mean:.0f}", f"{best['kept']:.2f}", f"{best['left out']:.2f}", f"{ratio:.2f}")
            print("|", " | ".join(map(str, cells)), "|", flush=True)
        handle.remove()
    generation.rows_can_be_selected = possible


if __name__ == "__main__":
    main()
