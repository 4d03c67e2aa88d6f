"""TRL 0.11.4's `PPOTrainer` on a workload: `python -m benchmarks.classic_side WORKLOAD`, in its own environment."""

import sys
import warnings

import torch
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

from benchmarks.serving import serve
from benchmarks.workload import Workload


def main(workload: Workload) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(workload.model())
    config = PPOConfig(
        batch_size=workload.batch_size,
        mini_batch_size=workload.mini_batch_size,
        ppo_epochs=workload.epochs,
        accelerator_kwargs={"cpu": True},
    )
    trainer = PPOTrainer(config, model, None, workload.tokenizer())
    queries, responses, scores = workload.rollouts()
    options = workload.sampling()

    def step() -> None:
        trainer.step(list(queries), list(responses), list(scores))

    def generate() -> None:
        trainer.generate(list(queries), batch_size=workload.generation_batch_size, return_prompt=False, **options)

    serve({"step": step, "generate": generate})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Workload.from_json(sys.argv[1]))
