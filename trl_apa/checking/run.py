"""All checks of a trainer's networks, one after the other; what one of them raises is a finding."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trl_apa.checking import learning, memory, precision, reading, saving, sizes
from trl_apa.checking.report import Finding, Report
from trl_apa.checking.subject import Subject
from trl_apa.distributed.sharded import is_sharded
from trl_apa.models import reference_policy
from trl_apa.models.network_parts import inner_model, max_positions
from trl_apa.rollout.prompts import as_rows, query_of


PROMPTS = (
    "Hello.",
    "Why is the sky blue?",
    "Write two sentences about a river that flows through an old town.",
    "List the planets of the solar system from the sun outwards, and say of each in a few words what it is made of.",
)
NEW_TOKENS = 16
CHECKS: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    sizes.tokens,
    sizes.positions,
    sizes.text_prompt,
    sizes.chat_template,
    reading.layouts,
    reading.sampling,
    reading.greedy,
    reading.modes,
    reading.reference,
    learning.gradient,
    reading.attention,
    precision.half_precision,
    precision.quantised_layers,
    saving.reloaded,
    saving.merged,
    memory.weights,
    memory.micro_batch,
    reading.vllm,
)


def check_trainer(
    trainer: Any, prompts: Sequence[Any] | None = None, tell: Callable[[str], None] | None = None
) -> Report:
    """Measure whether the numbers of a trainer's networks can be trusted on this machine.

    The networks, gradients and random numbers are left as they were.

    Args:
        trainer: an `APATrainer`.
        prompts: texts, chat messages or rows to read; by default four questions.
        tell: called with the name of each check before it is made.

    Raises:
        ValueError: where weights are sharded over processes, or if a prompt cannot be read.
    """
    if is_sharded(trainer.accelerator):
        raise ValueError("check() needs unsharded networks; with FSDP or DeepSpeed run `trl-apa check` instead")
    with _random_numbers_kept(trainer.accelerator.device), _modes_kept(trainer):
        subject = _subject(trainer, PROMPTS if prompts is None else prompts)
        findings: list[Finding] = []
        for check in CHECKS:
            if tell is not None:
                tell(_name(check))
            findings += _findings(check, subject)
    base = inner_model(subject.policy)
    dtype = str(base.get_input_embeddings().weight.dtype).removeprefix("torch.")
    name = getattr(base, "name_or_path", "") or type(base).__name__
    return Report(name, f"{trainer.accelerator.device}, {dtype}", tuple(findings))


def _findings(check: Callable[[Subject], Iterator[Finding]], subject: Subject) -> list[Finding]:
    found: list[Finding] = []
    try:
        for finding in check(subject):
            found.append(finding)
    except torch.OutOfMemoryError as error:  # some checks hold a second copy of the policy
        torch.cuda.empty_cache()
        found.append(Finding(_name(check), None, f"not enough memory for this check: {_in_one_line(error)}"))
    except Exception as error:
        told = f"{type(error).__name__}: {_in_one_line(error)}"
        found.append(Finding(_name(check), False, told, {}, "this check failed: report it"))
    return found


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _name(check: Callable[[Subject], Iterator[Finding]]) -> str:
    return check.__name__.replace("_", " ")


def _subject(trainer: Any, prompts: Sequence[Any]) -> Subject:
    args, device = trainer.args, trainer.accelerator.device
    module = trainer.accelerator.unwrap_model(trainer.model)
    torch.manual_seed(0)
    for_encoder = trainer.special_tokens.decoder_start is not None
    options = (trainer.processing_class, args.max_prompt_length, args.chat_template_kwargs, for_encoder)
    new_tokens = min(NEW_TOKENS, args.max_completion_length)
    room = (max_positions(module.policy) or 2**62) - new_tokens
    queries = [query_of(row, *options).to(device)[-room:] for row in as_rows(prompts)]
    responses = trainer.generate(
        queries,
        batch_size=len(queries),
        return_prompt=False,
        min_new_tokens=min(2, new_tokens),
        max_new_tokens=new_tokens,
    )
    if for_encoder:
        responses = [response[1:] for response in responses]
    return Subject(
        module=module,
        reference=lambda policy: reference_policy(policy, trainer.ref_model),
        tokenizer=trainer.processing_class,
        args=args,
        layout_of=trainer.layouts,
        around=trainer.accelerator.autocast,
        queries=queries,
        responses=[response.to(device) for response in responses],
        pad_token_id=trainer.special_tokens.pad,
        decoder_start_token_id=trainer.special_tokens.decoder_start,
        end_token_ids=trainer.special_tokens.ends,
        has_learned=trainer.num_iterations_done > 0 or trainer.state.global_step > 0,
        vllm=trainer.vllm,
        step=trainer.state.global_step,
    )


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


@contextmanager
def _modes_kept(trainer: Any) -> Iterator[None]:
    module: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
