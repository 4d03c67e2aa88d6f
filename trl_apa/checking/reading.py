"""Whether a row is read alike alone, in a batch, in a packed row, and from the cache while it is sampled."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from trl_apa.checking.report import Finding, compared, skipped
from trl_apa.checking.subject import Subject
from trl_apa.models import ValueModel
from trl_apa.models.layouts import layout_trial, sampling_trial
from trl_apa.models.network_parts import Network, inner_model
from trl_apa.models.packing import attending_with
from trl_apa.models.trials import LayoutTrial, alone
from trl_apa.rollout.batch import Layout
from trl_apa.rollout.generation import generate_responses


# Nats a token on average that half precision, or an engine's other kernels, may change.
LARGEST_MEAN = 0.05
# Attention that a check compares with, for each that a network may have.
OTHER_ATTENTION = {"eager": "sdpa", "sdpa": "eager"}
PADDED_ANYWAY = "padding changes the results: report this model"
ONE_BY_ONE = "the trainer reads rows one by one instead, or batched by equal length"


def layouts(subject: Subject) -> Iterator[Finding]:
    """Compares each network's own plain forward pass of two rows alone with the other ways of reading them."""
    networks: dict[str, Network] = {"log-probs": subject.policy}
    if isinstance(subject.module.value_model, ValueModel):
        networks["values"] = subject.module.value_model.network
    for what, network in networks.items():
        with subject.around():
            trial = layout_trial(network, subject.longest)
        if isinstance(trial, Exception):
            yield Finding(f"{what}, padded", False, f"could not be tried out: {trial}")
            continue
        yield from _of_trial(what, trial, subject.layout_of(subject.longest))
    yield compared(
        "log-probs, as trained",
        subject.difference(subject.each_alone(), subject.as_trained()),
        subject.allowed,
        "the update would use wrong log-probs: report this model",
    )


def _of_trial(what: str, trial: LayoutTrial, used: Layout) -> Iterator[Finding]:
    yield compared(
        f"{what}, the same row twice", trial.repeated, trial.rounding, "the log-ratio to pi_init would be noise"
    )
    # What is not exact is not used.
    ok = trial.is_exact_padded or used is not Layout.PADDED
    name, advice = f"{what}, padded", ONE_BY_ONE if ok else PADDED_ANYWAY
    if trial.has_padded_gradient:
        yield compared(name, trial.padded, trial.allowed, advice, ok)
    else:
        yield Finding(name, ok, "its gradient is not a number", {}, advice)
    if trial.packed is None:
        why = trial.not_packed or "networks of this kind are not packed"
        yield skipped(f"{what}, packed", f"not packed: {why}")
        return
    ok = trial.is_exact_packed or used is not Layout.PACKED
    yield compared(f"{what}, packed", trial.packed, trial.allowed, "the trainer does not pack rows of this model", ok)
    if trial.shared is not None:
        advice = "the trainer reads a common prompt once for each response"
        yield compared(f"{what}, common prompt read once", trial.shared, trial.allowed, advice, ok=True)


def sampling(subject: Subject) -> Iterator[Finding]:
    """Compare the logits that tokens are sampled from with those of the plain forward pass of the finished row."""
    with subject.around():
        trial = sampling_trial(subject.policy, subject.longest)
    if isinstance(trial, Exception):
        yield Finding("log-probs, sampled with cache", False, f"could not be tried out: {trial}")
        return
    yield compared(
        "log-probs, sampled with cache",
        trial.cached,
        trial.allowed,
        "the trainer samples without a cache, which is slower; vLLM is not affected",
        ok=True,
    )
    yield compared("prompts in a batch", trial.batched, trial.allowed, "prompts are answered one by one", ok=True)


def greedy(subject: Subject) -> Iterator[Finding]:
    """Greedy answers in a batch and alone; where they part, two tokens have to be equally likely within rounding."""
    name = "greedy, batch against alone"
    if len(subject.queries) < 2:
        yield skipped(name, "one prompt is no batch: give more")
        return
    together, each = (_greedy(subject, size) for size in (len(subject.queries), 1))
    parted = [
        (row, place)
        for row, (one, other) in enumerate(zip(together, each, strict=True))
        if (place := _first_difference(one, other)) is not None
    ]
    if not parted:
        tokens = sum(len(response) for response in each)
        yield Finding(
            name, True, f"all {tokens} tokens of {len(each)} answers", {"tokens": tokens, "answers_that_differ": 0}
        )
        return
    gap = max(_gap(subject, row, together[row], each[row], place) for row, place in parted)
    measured = f"{len(parted)} of {len(each)} answers differ, first at tokens up to {gap:.1e} apart, relative"
    yield Finding(
        name,
        gap <= subject.allowed,
        measured,
        {"answers_that_differ": len(parted), "gap_relative": gap},
        "rounding between equally likely tokens" if gap <= subject.allowed else "a batch changes what is answered",
    )


def _greedy(subject: Subject, batch_size: int) -> list[Tensor]:
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max(len(response) for response in subject.responses),
        pad_token_id=subject.pad_token_id,
        eos_token_id=list(subject.end_token_ids) or None,
        decoder_start_token_id=subject.decoder_start_token_id,
    )
    with subject.around():
        return generate_responses(
            subject.policy, subject.queries, config, tokenizer=subject.tokenizer, batch_size=batch_size
        )


def _first_difference(one: Tensor, other: Tensor) -> int | None:
    common = min(len(one), len(other))
    differs = (one[:common] != other[:common]).nonzero()
    if len(differs):
        return int(differs[0])
    return None if len(one) == len(other) else common


def _gap(subject: Subject, row: int, one: Tensor, other: Tensor, place: int) -> float:
    """How far apart the two answers' logits are where they part, over the largest logit."""
    if place >= min(len(one), len(other)):
        return float("inf")
    with subject.around():
        logits_V = alone(subject.policy, subject.queries[row], one[: place + 1], subject.decoder_start_token_id)[-1]
    return float((logits_V[one[place]] - logits_V[other[place]]).abs() / logits_V.abs().max())


def modes(subject: Subject) -> Iterator[Finding]:
    """The policy in train mode, in which it learns, and in eval mode, in which it samples."""
    module, training = subject.module, subject.module.training
    try:
        module.eval()
        in_eval_mode = subject.as_trained()
        module.train()
        in_train_mode = subject.as_trained()
    finally:
        module.train(training)
    yield compared(
        "train mode against eval mode",
        subject.difference(in_eval_mode, in_train_mode),
        subject.allowed,
        "train mode is random or gives other results: report this model",
    )


def reference(subject: Subject) -> Iterator[Finding]:
    """log pi - log pi_init, which is 0 before training."""
    with subject.reference(subject.policy) as pi_init:
        of_reference = subject.each_alone(pi_init)
    difference = subject.difference(of_reference, subject.each_alone())
    if subject.has_learned:
        finding = compared("policy against pi_init", difference, subject.allowed)
        yield Finding(finding.name, None, f"{finding.measured}, after training", finding.figures)
        return
    yield compared(
        "policy against pi_init, before training",
        difference,
        subject.allowed,
        "the run does not start at KL 0: check whether ref_model is another model, or has another precision",
    )


def attention(subject: Subject) -> Iterator[Finding]:
    """Compare the policy's attention with another implementation: flash attention with SDPA, SDPA with eager."""
    base = inner_model(subject.policy)
    own = _own_attention(base)
    other = OTHER_ATTENTION.get(own, "sdpa")
    name = f"attention, {own} against {other}"
    before = subject.each_alone()
    try:
        with attending_with(base, other):
            after = subject.each_alone()
    except (ValueError, NotImplementedError, RuntimeError) as error:
        yield skipped(name, f"not compared: {str(error).splitlines()[0][:200]}")
        return
    yield compared(
        name, subject.difference(after, before), subject.allowed, f"load with attn_implementation={other!r}"
    )


def _own_attention(base: PreTrainedModel) -> str:
    implementation: str = base.config._attn_implementation
    # SDPA's own implementation for packed rows is SDPA for all others.
    return implementation if implementation in OTHER_ATTENTION or "flash" in implementation else "sdpa"


def vllm(subject: Subject) -> Iterator[Finding]:
    """Compare vLLM's log-probs of its sampled tokens with the policy's log-probs of the same tokens."""
    name = "log-probs, vLLM"
    if subject.vllm is None:
        yield skipped(name, "not used: use_vllm is off")
        return
    new_tokens = max(len(response) for response in subject.responses)
    samples = subject.vllm.samples_and_logprobs(subject.queries, new_tokens, subject.step)
    differences = []
    with subject.around():
        for query, (tokens, logprobs) in zip(subject.queries, samples, strict=True):
            logits = alone(subject.policy, query, tokens.to(query.device), subject.decoder_start_token_id)
            differences.append((logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0] - logprobs).abs())
    nats = torch.cat(differences)
    most, mean = float(nats.max()), float(nats.mean())
    ok = mean <= LARGEST_MEAN
    advice = (
        ""
        if ok
        else "vLLM samples from another distribution than the policy's: check that both have the same precision"
    )
    measured = f"max {most:.1e}, mean {mean:.1e} nats a token"
    yield Finding(name, ok, measured, {"max_nats": most, "mean_nats": mean}, advice)
