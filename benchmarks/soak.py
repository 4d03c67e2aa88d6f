"""Does memory grow over a long run? A thousand optimizer steps of `train()` on a small random model.

    python -m benchmarks.soak [--steps 1000]

Prints resident memory as it goes, and fails if it grew by more than `--allowed` MiB after the first third of the run,
when caches are filled.
"""

import argparse
import tempfile
import time

import psutil
from transformers import PrinterCallback, TrainerCallback

from tests.tiny import tiny_model, tiny_tokenizer
from trl_apa import APAConfig, APATrainer


MIB = 2**20


class Memory(TrainerCallback):
    """Resident memory every `every` optimizer steps, MiB."""

    def __init__(self, every: int):
        self.every = every
        self.start = time.perf_counter()
        self.table: list[tuple[int, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.table.append((state.global_step, psutil.Process().memory_info().rss / MIB))
            seconds = time.perf_counter() - self.start
            print(f"step {state.global_step:5d}   {self.table[-1][1]:8.1f} MiB   {seconds:7.1f} s", flush=True)


def share_of_fives(completion_ids, **kwargs):
    return [sum(token == 5 for token in ids) / len(ids) for ids in completion_ids]


def run(steps: int, folder: str) -> list[tuple[int, float]]:
    memory = Memory(every=max(steps // 20, 1))
    config = APAConfig(
        output_dir=folder,
        use_cpu=True,
        report_to="none",
        batch_size=8,
        mini_batch_size=4,
        num_epochs_per_batch=2,
        max_completion_length=16,
        max_steps=steps,
        logging_steps=10,
        save_steps=100,
        save_total_limit=2,
        learning_rate=1e-4,
        disable_tqdm=True,
    )
    prompts = [f"w{2 + i % 29} w{2 + i % 17}" for i in range(256)]
    trainer = APATrainer(
        config,
        tiny_model(scale=1.0),
        tokenizer=tiny_tokenizer(),
        train_dataset=prompts,
        reward_funcs=share_of_fives,
        callbacks=[memory],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return memory.table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--allowed", type=float, default=16.0, help="growth after the first third of the run, MiB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = run(options.steps, folder)
    settled = [mib for step, mib in table if step >= options.steps / 3]
    growth = settled[-1] - settled[0]
    print(f"grew by {growth:+.1f} MiB from step {options.steps - (len(settled) - 1) * table[0][0]} to {options.steps}")
    if growth > options.allowed:
        raise SystemExit(f"memory grew by more than {options.allowed} MiB")


if __name__ == "__main__":
    main()
