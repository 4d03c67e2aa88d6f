"""This package on a workload, and the same update in plain calls: `python -m benchmarks.our_side SIDE WORKLOAD`."""

import sys
import tempfile
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from benchmarks.plain_calls import PlainUpdate
from benchmarks.serving import serve
from benchmarks.workload import PAD, Workload
from trl_apa import APAConfig, APATrainer
from trl_apa.rollout import shared_prompts


# What the trainer of a side has other than the default. Responses that `generate` made need no pass for their KL, as
# all need none without an exact one.
OPTIONS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, sampled": {"exact_kl": False},
    "ours, padded": {"padding_free": False},
    "ours, not shared": {},
    "ours, no critic": {"advantage_estimator": "group"},
    "ours, GRPO": {"loss_type": "grpo"},
}


def make_trainer(workload: Workload, folder: str, **options: Any) -> APATrainer:
    config = APAConfig(
        output_dir=folder,
        use_cpu=True,
        report_to="none",
        batch_size=workload.batch_size,
        mini_batch_size=workload.mini_batch_size,
        ppo_epochs=workload.epochs,
        shuffle=workload.shuffle,
        num_generations=workload.rows_per_prompt,
        **options,
    )
    return APATrainer(config, workload.model(), tokenizer=workload.tokenizer())


def serve_ours(workload: Workload, **options: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(workload, folder, **options)
        queries, responses, scores = workload.rollouts()
        sampling = {"do_sample": True, "max_new_tokens": workload.limit, "return_prompt": False}
        serve(
            {
                "step": lambda: trainer.step(queries, responses, scores),
                "generate": lambda: trainer.generate(queries, batch_size=workload.generation_batch_size, **sampling),
            }
        )


def serve_plain(workload: Workload) -> None:
    update = PlainUpdate(workload)
    queries, *_ = workload.rollouts()
    serve({"step": update.step, "generate": lambda: generate_sorted(update.policy, queries, workload)})


@torch.no_grad()
def generate_sorted(model: torch.nn.Module, queries: list[Tensor], workload: Workload) -> None:
    """transformers' `generate` on batches of queries of similar length, padded on the left."""
    options = workload.sampling()
    by_length = sorted(queries, key=len)
    for start in range(0, len(queries), workload.generation_batch_size):
        batch = by_length[start : start + workload.generation_batch_size]
        width = max(len(query) for query in batch)
        pad = [torch.nn.functional.pad(query, (width - len(query), 0), value=PAD) for query in batch]
        real = [torch.nn.functional.pad(torch.ones_like(query), (width - len(query), 0)) for query in batch]
        inputs = {"input_ids": torch.stack(pad), "attention_mask": torch.stack(real)}
        model.generate(**inputs, generation_config=GenerationConfig(**options))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    side, workload = sys.argv[1], Workload.from_json(sys.argv[2])
    if side == "plain":
        serve_plain(workload)
    else:
        if side == "ours, not shared":
            shared_prompts.SHORTEST = sys.maxsize  # no prompt has so many tokens
        serve_ours(workload, **OPTIONS[side])
