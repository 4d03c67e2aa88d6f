"""Checks that tokenizer and networks fit together, and how a chat template renders a message."""

import itertools
from collections.abc import Iterator
from typing import Any

from trl_apa.checking.report import Finding, skipped
from trl_apa.checking.subject import Subject
from trl_apa.models.logprobs import head_width
from trl_apa.models.network_parts import inner_model, max_positions, num_token_ids
from trl_apa.models.trials import boundaries, rope_limit
from trl_apa.rollout.tokenizing import text_ids


QUESTION = "What is it?"


def tokens(subject: Subject) -> Iterator[Finding]:
    """Ids of the tokenizer, rows of the embedding and of the vocabulary head."""
    base, tokenizer = inner_model(subject.policy), subject.tokenizer
    known, head = num_token_ids(base), head_width(base.get_output_embeddings())
    figures: dict[str, Any] = {
        "tokenizer": len(tokenizer),
        "embedding": known,
        "head": head,
        "pad": subject.pad_token_id,
    }
    measured = f"tokenizer {len(tokenizer)}, embedding {known}, head {head}; pad {subject.pad_token_id}"
    advice = []
    if known is not None and len(tokenizer) > known:
        beyond = sorted(token for token, number in tokenizer.get_vocab().items() if number >= known)
        advice.append(
            f"the embedding has no row for {', '.join(map(repr, beyond[:5]))}: an error if they occur, except as "
            "padding"
        )
    if subject.tokenizer.pad_token_id is None:
        advice.append("the tokenizer has no pad: EOS is used")
    ends = [f"{tokenizer.convert_ids_to_tokens(end)!r}" for end in subject.end_token_ids]
    figures["ends"] = list(subject.end_token_ids)
    stops = subject.args.stop_strings or []
    ends += [f"the text {stop!r}" for stop in ([stops] if isinstance(stops, str) else stops)]
    measured += f"; responses end with {' or '.join(ends) or 'nothing'}"
    ok = bool(ends)
    if not ok:
        advice.append("no token ends a response: set eos_token, or stop_strings")
    yield Finding("tokens", ok, measured, figures, "; ".join(advice))


def positions(subject: Subject) -> Iterator[Finding]:
    """Compare the model's positions with prompt and response, and find lengths that change its computation."""
    config, args = inner_model(subject.policy).config, subject.args
    limit, needed = max_positions(subject.policy), subject.longest
    measured = f"{'no limit' if limit is None else limit}; a prompt and its response take up to {needed} tokens"
    if args.max_prompt_length is None:
        measured += " (max_prompt_length is not set)"
    crossed = [number for number in boundaries(config) if number < needed]
    advice = []
    if crossed:
        advice.append(
            f"rows cross length limits in the config: {', '.join(map(str, crossed))}; the trials covered them"
        )
    if (rope := rope_limit(config)) is not None and needed > rope:
        advice.append(
            f"RoPE depends on the longest row of a batch beyond {rope} tokens: longer rows are processed one by one"
        )
    ok = limit is None or needed <= limit
    if not ok:
        advice.append("lower max_prompt_length or max_completion_length")
    figures = {"positions": limit, "needed": needed, "boundaries": crossed}
    yield Finding("positions", ok, measured, figures, "; ".join(advice))


def text_prompt(subject: Subject) -> Iterator[Finding]:
    """What the tokenizer puts around a prompt that is plain text."""
    before, own, after, _ = text_ids(QUESTION, subject.tokenizer)
    shown = subject.tokenizer.decode([*before, *own])
    advice = (
        f"{subject.tokenizer.decode(after)!r} is appended by the tokenizer and removed from prompts" if after else ""
    )
    figures: dict[str, Any] = {"before": before, "after": after}
    yield Finding("text prompts", True, f"read as {shown!r}", figures, advice)


def chat_template(subject: Subject) -> Iterator[Finding]:
    """A message as the policy reads it: one BOS, a header for the answer, and an end that ends a response."""
    tokenizer, options = subject.tokenizer, subject.args.chat_template_kwargs or {}
    if tokenizer.chat_template is None:
        yield skipped("chat template", "none; prompts are texts")
        return
    question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": "It is so."}
    render = {"tokenize": True, "return_dict": False, **options}
    ids = list(tokenizer.apply_chat_template([question], add_generation_prompt=True, **render))
    without = list(tokenizer.apply_chat_template([question], add_generation_prompt=False, **render))
    answered = list(tokenizer.apply_chat_template([question, answer], **render))
    # At the beginning: ChatML's models have the token that begins each turn as their BOS.
    beginnings = len(ids) - len(list(itertools.dropwhile(lambda token: token == tokenizer.bos_token_id, ids)))
    ends = [token for token in answered[len(without) :] if token in subject.end_token_ids]
    header = tokenizer.decode(ids[len(without) :]) if ids[: len(without)] == without else tokenizer.decode(ids)
    wrong, notes = [], []
    if beginnings > 1:
        wrong.append(f"it begins with BOS {beginnings} times")
    if ids == without:
        notes.append("it writes no header for the answer (add_generation_prompt has no effect)")
    if subject.end_token_ids and not ends:
        wrong.append(
            "no answer that it renders ends with a token that ends a response: set stop_token_id or eos_token"
        )
    shown = f"{tokenizer.decode(ids)!r}; the answer follows {header!r}"
    if ends:
        shown += f" and ends with {tokenizer.convert_ids_to_tokens(ends[-1])!r}"
    figures = {"bos": beginnings, "ids": ids}
    yield Finding("chat template", not wrong, shown, figures, "; ".join([*wrong, *notes]))
