"""The update of the installed TRL's `GRPOTrainer`: `python -m benchmarks.grpo_side NAME WORKLOAD`."""

import sys
import tempfile
import warnings

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from benchmarks.serving import serve
from benchmarks.workload import Workload


class GRPOUpdate:
    """Its log-probs of the policy before the update, its loss, clipping and optimizer, on rows that are given.

    What it does otherwise is left out: sampling, rewards, logs. Rewards become advantages here, as there.

    Args:
        workload: with prompts of one length and responses of one length, as its tensors have no pads then.
        folder: for what it might write.
    """

    def __init__(self, workload: Workload, folder: str):
        self.size = workload.mini_batch_size
        args = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            learning_rate=1.41e-5,
            lr_scheduler_type="constant",
            per_device_train_batch_size=workload.mini_batch_size,
            # Its samples are of an earlier policy from the second mini-batch on, so it takes their log-probs first.
            steps_per_generation=workload.batch_size // workload.mini_batch_size,
            num_generations=workload.rows_per_prompt,
            num_iterations=workload.epochs,
            max_completion_length=workload.response,
            beta=0.0,
        )
        rows = Dataset.from_dict({"prompt": ["w2"] * workload.batch_size})
        model = workload.model()
        self.trainer = GRPOTrainer(model, [_no_reward], args, rows, processing_class=workload.tokenizer())
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        self.epochs = workload.epochs
        queries, responses, scores = workload.rollouts()
        scores_PG = torch.stack(scores).view(-1, workload.rows_per_prompt)
        advantages_PG = (scores_PG - scores_PG.mean(1, keepdim=True)) / (scores_PG.std(1, keepdim=True) + 1e-4)
        self.rows = {
            "prompt_ids": torch.stack(queries),
            "completion_ids": torch.stack(responses),
            "advantages": advantages_PG.flatten(),
        }

    def step(self) -> None:
        trainer, model = self.trainer, self.trainer.model.train()
        batch = dict(self.rows)
        for name in ("prompt", "completion"):
            batch[f"{name}_mask"] = torch.ones_like(batch[f"{name}_ids"])
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        width = batch["completion_ids"].shape[1]
        with torch.no_grad():
            batch["old_per_token_logps"] = trainer._get_per_token_logps_and_entropies(
                model, ids, torch.ones_like(ids), width, self.size
            )[0]
        for _ in range(self.epochs):
            for start in range(0, len(ids), self.size):
                rows = {name: value[start : start + self.size] for name, value in batch.items()}
                rows["num_items_in_batch"] = rows["completion_mask"].sum()
                trainer._compute_loss(model, rows).backward()
                trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()


def _no_reward(completions: list, **columns: object) -> list[float]:
    return [0.0] * len(completions)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        serve({"step": GRPOUpdate(Workload.from_json(sys.argv[2]), scratch).step})
