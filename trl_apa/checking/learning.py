"""Whether the gradient of an optimizer step is the same however its rows are split into micro-batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trl_apa.algorithms.losses import apa_loss, value_loss
from trl_apa.checking.report import Finding, skipped
from trl_apa.checking.subject import Subject, part
from trl_apa.models.network_parts import inner_model
from trl_apa.models.trials import is_precise
from trl_apa.rollout.batch import lay_out, longest_row, response_mask


# Relative difference of gradients that rounding makes, in float32 and below.
PRECISE, ROUNDED = 1e-3, 1e-1


def gradient(subject: Subject) -> Iterator[Finding]:
    """The gradient of APA's loss and of the value loss, of all rows at once and of each row by itself."""
    networks = subject.module.trainable_parameters()
    rows = list(range(len(subject.queries)))
    if len(rows) < 2:
        yield skipped("gradient, split into micro-batches", "one prompt cannot be split: give more")
        return
    module, training = subject.module, subject.module.training
    module.train()
    try:
        for what, parameters in networks.items():
            if not parameters:
                continue
            together = _gradient(subject, [rows], parameters)
            apart = _gradient(subject, [[row] for row in rows], parameters)
            yield _compared(f"gradient of the {what}, split into micro-batches", together, apart, subject)
    finally:
        module.train(training)


def _compared(name: str, together: Tensor, apart: Tensor, subject: Subject) -> Finding:
    size, moved = float(together.norm()), float((apart - together).norm())
    if size == 0:
        return Finding(name, False, "the gradient is 0", {"norm": 0.0}, "nothing would be learned: what is trainable?")
    with subject.around():
        allowed = PRECISE if is_precise(inner_model(subject.policy)) else ROUNDED
    relative = moved / size
    ok = relative <= allowed
    advice = "" if ok else "the gradient depends on the split into micro-batches: report this model"
    figures = {"relative": relative, "allowed_relative": allowed, "norm": size}
    return Finding(name, ok, f"{relative:.1e} of its norm", figures, advice)


def _gradient(subject: Subject, micro_batches: Sequence[Sequence[int]], trained: Sequence[nn.Parameter]) -> Tensor:
    """With respect to a part of each weight, flat, float32 on the CPU, of the loss over all rows."""
    num_tokens = torch.tensor(float(sum(len(response) for response in subject.responses)))
    total = torch.zeros(sum(part(parameter).numel() for parameter in trained))
    for rows in micro_batches:
        for networks in subject.module.passes:
            with subject.module.adapter_for(**networks):
                loss = _loss(subject, rows, num_tokens, networks)
                if not loss.requires_grad:
                    continue
                gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            flat = [
                torch.zeros(part(parameter).numel()) if gradient is None else part(gradient).float().cpu().flatten()
                for parameter, gradient in zip(trained, gradients, strict=True)
            ]
            total += torch.cat(flat)
    return total


def _loss(subject: Subject, rows: Sequence[int], num_tokens: Tensor, networks: dict[str, bool]) -> Tensor:
    """APA's loss plus the value loss, for made-up advantages and returns that depend on the row alone."""
    queries, responses = ([tokens[row] for row in rows] for tokens in (subject.queries, subject.responses))
    layout = subject.layout_of(longest_row(queries, responses, subject.decoder_start_token_id))
    tokens = lay_out(layout, queries, responses, subject.pad_token_id, subject.decoder_start_token_id)
    mask_BR = response_mask(responses, device=queries[0].device)
    inputs: dict[str, Any] = {**tokens, "response_width": mask_BR.shape[1], "temperature": subject.args.temperature}
    with subject.around():
        outputs = subject.module(**inputs, **networks)
    num_tokens = num_tokens.to(mask_BR.device)
    targets_BR = torch.stack([torch.sin(torch.arange(mask_BR.shape[1]) + float(row)) for row in rows]).to(
        mask_BR.device
    )
    loss = torch.zeros((), device=mask_BR.device)
    if "logprobs" in outputs:
        anchor = outputs["logprobs"].detach()
        kl_coef = subject.args.kl_coef or 1.0  # that of a policy gradient may be 0
        loss = loss + apa_loss(outputs["logprobs"], anchor, targets_BR, mask_BR, kl_coef, num_tokens)[0]
    if "values" in outputs:
        before = outputs["values"].detach()
        clip = subject.args.cliprange_value
        loss = loss + value_loss(outputs["values"], before + targets_BR, mask_BR, before, clip, num_tokens)[0]
    return loss
