"""Speed of sampling and of an update: `python -m benchmarks.sampling [--small] [--output F]`, on a GPU if there is.

New tokens a second of `generate` by the number of rows that are sampled together, for prompts that are all different
and for a quarter as many asked four times each, as `num_generations=4` does; and tokens a second of one `step` on
ragged rows, without padding and padded. A Llama of a billion random weights; `--small` takes one of a few thousand.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.speed import tokens_of
from benchmarks.workload import Workload
from trl_apa import APAConfig, APATrainer


RESPONSES = 4
LARGE = Workload(size="2048 x 16", vocabulary=32000, batch_size=64, mini_batch_size=8, epochs=1, length=8.0)
SMALL = Workload(size="32 x 2", vocabulary=64, batch_size=8, mini_batch_size=4, epochs=1)


@dataclass(frozen=True)
class Speed:
    """One line: what was called, how, and real tokens a second; of `generate` those that were sampled."""

    call: str
    how: str
    rows_together: int
    tokens: int
    seconds: float
    tokens_per_second: float


def trainer_for(workload: Workload, folder: str, padding_free: bool | None) -> APATrainer:
    """The default set-up; in bfloat16 (autocast) on a GPU."""
    on_gpu = torch.cuda.is_available()
    config = APAConfig(
        output_dir=folder,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        report_to="none",
        batch_size=workload.batch_size,
        mini_batch_size=workload.mini_batch_size,
        ppo_epochs=workload.epochs,
        gradient_checkpointing=True,
        padding_free=padding_free,
    )
    with torch.device("cuda" if on_gpu else "cpu"):
        model = workload.model()
    return APATrainer(config, model, tokenizer=workload.tokenizer())


def timed(work: Callable[[], int]) -> tuple[int, float]:
    """Tokens that `work` says it made, and seconds until the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    tokens = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return tokens, time.perf_counter() - start


def speeds(workload: Workload, new_tokens: int, batches: list[int]) -> Iterator[Speed]:
    """Each line after a call that warms up."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(workload, folder, None)
        yield from of_sampling(trainer, workload, new_tokens, batches)
        yield of_step(trainer, workload, "default layout")
        del trainer
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        yield of_step(trainer_for(workload, folder, False), workload, "padded")


def of_sampling(trainer: APATrainer, workload: Workload, new_tokens: int, batches: list[int]) -> Iterator[Speed]:
    """`generate` for as many rows with either kind of prompts, for each number of rows sampled together."""
    queries = workload.rollouts()[0]
    few = queries[: len(queries) // RESPONSES]
    asked = {"prompts all different": queries, "4 responses a prompt": [q for q in few for _ in range(RESPONSES)]}
    options = {"return_prompt": False, "do_sample": True}
    trainer.generate(queries[:4], max_new_tokens=4, **options)
    sizes = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}

    def sample(prompts: list[Tensor], batch: int) -> int:
        return sum(len(answer) for answer in trainer.generate(prompts, batch_size=batch, **sizes, **options))

    for how, prompts in asked.items():
        for batch in batches:
            tokens, seconds = timed(partial(sample, prompts, batch))
            yield Speed("generate", how, batch, tokens, seconds, tokens / seconds)


def of_step(trainer: APATrainer, workload: Workload, how: str) -> Speed:
    """The second of two calls of `step`."""
    rollouts = workload.rollouts()

    def step() -> int:
        trainer.step(*rollouts)
        return tokens_of(workload)[0]

    step()
    tokens, seconds = timed(step)
    return Speed("step", how, workload.mini_batch_size, tokens, seconds, tokens / seconds)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few thousand weights and short rows, for a CPU")
    parser.add_argument("--output", help="a file for the results as JSON, written anew after each")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    given = (SMALL, 4, [4, 8]) if options.small else (LARGE, 128, [16, 64])
    print(f"{'call':<9} {'how':<24} {'rows':>5} {'tokens':>7} {'seconds':>8} {'tokens/s':>9}")
    results = []
    for speed in speeds(*given):
        results.append(asdict(speed))
        print(
            f"{speed.call:<9} {speed.how:<24} {speed.rows_together:>5} {speed.tokens:>7} {speed.seconds:>8.2f} "
            f"{speed.tokens_per_second:>9.0f}",
            flush=True,
        )
        if options.output:
            Path(options.output).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
