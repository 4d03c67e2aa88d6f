"""`trl-apa winrate A B`: how often a judge prefers the answers of one model to those of another."""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from trl_apa.commands.models import checkpoint_stamp, loading
from trl_apa.commands.rows import demonstration
from trl_apa.commands.winrate_options import PROGRAM, make_parser
from trl_apa.data.layouts import rows_in_layout
from trl_apa.data.sources import iter_rows
from trl_apa.files import replace_text
from trl_apa.models import gguf, load_language_model, load_reward_model
from trl_apa.winrate import (
    Judge,
    JudgeError,
    Judgement,
    LanguageModelJudge,
    OpenAIJudge,
    Pair,
    RewardModelJudge,
    VerdictCache,
    compare,
    win_rate,
)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: see `run`."""
    return run(make_parser().parse_args(argv))


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status: 1 if the endpoint failed, after which the run can be repeated."""
    try:
        ours, theirs = read_answers(options.ours), read_answers(options.theirs)
        references = read_references(options, {json.dumps(answer.prompt) for answer in ours})
        pairs = make_pairs(ours, theirs, references, options.cut_at)
        with loading("judge", options.judge_model):
            judge = make_judge(options)
        cache = open_cache(options)
        judgements = compare(pairs, judge, cache)
        without_verdict: Counter[str] = getattr(judge, "without_verdict", None) or Counter()
        for reason, number in without_verdict.most_common():
            print(f"{number} replies without a verdict: {reason}")
        result = win_rate(judgements, options.seed, confidence=options.confidence)
        if options.output is not None:
            write(options.output, options, result, judgements)
    except JudgeError as error:
        print(f"{PROGRAM}: {error}\nthe verdicts so far are in {cache.path}: run it again", file=sys.stderr)
        return 1
    print(describe(options, result))
    return 0


def open_cache(options: argparse.Namespace) -> VerdictCache:
    """The verdicts so far. Checks that verdicts and result can be written before any question is sent.

    Raises:
        ValueError: if the output is a folder.
        OSError: if the cache cannot be read or written.
    """
    cache = VerdictCache(options.cache or Path(options.ours).parent / "winrate_cache.jsonl")
    if options.output is not None and Path(options.output).is_dir():
        raise ValueError(f"output={options.output!r} is a folder; it should be a file")
    for path in (cache.path, Path(options.output or cache.path)):
        path.parent.mkdir(parents=True, exist_ok=True)
    with open(cache.path, "ab"):
        return cache


class Answer(NamedTuple):
    """A line of `trl-apa generate`.

    Args:
        prompt: text or chat messages.
        text: the answer.
        ended: False if it met a limit.
    """

    prompt: Any
    text: str
    ended: bool = True


def read_answers(path: str) -> list[Answer]:
    """Prompt and completion of each line, as `trl-apa generate` writes them; `ended` is true where it is not there.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has no row, or one without them.
    """
    answers = []
    for row in iter_rows(path):
        fields = row.fields
        if row.problem or fields.get("prompt") is None or not isinstance(fields.get("completion"), str):
            raise ValueError(f"{path}, row {row.number}: {row.problem or 'it should have prompt and completion'}")
        answers.append(Answer(fields["prompt"], fields["completion"], fields.get("ended") is not False))
    if not answers:
        raise ValueError(f"{path} has no row")
    return answers


def read_references(options: argparse.Namespace, prompts: Collection[str]) -> dict[str, str] | None:
    """The first answer that people chose to each prompt; None without references.

    Args:
        options: where they are.
        prompts: those whose references are wanted, as JSON. Reading ends with the last of them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if no row has a prompt and an answer.
    """
    if options.references is None:
        return None
    rows = iter_rows(options.references, data_dir=options.references_data_dir, split=options.references_split)
    if options.references_layout is not None:
        rows = (found for row in rows for found in rows_in_layout(row, options.references_layout))
    references: dict[str, str] = {}
    found_any = False
    for row in rows:
        try:
            fields = demonstration(row) if row.problem is None else {}
        except ValueError:
            continue
        answer = fields.get("completion")
        answer = answer[-1]["content"] if isinstance(answer, list) else answer
        if fields.get("prompt") is not None and answer is not None:
            found_any = True
            if (prompt := json.dumps(fields["prompt"])) in prompts:
                references.setdefault(prompt, answer)
            if len(references) == len(prompts):
                break
    if not found_any:
        raise ValueError(f"references={options.references!r} has no row with a prompt and a chosen answer")
    return references


def make_pairs(
    ours: Sequence[Answer],
    theirs: Sequence[Answer],
    references: dict[str, str] | None,
    cut_at: Sequence[str],
) -> list[Pair]:
    """The k-th answers of both to each prompt; a prompt that only one of them answered is left out.

    Raises:
        ValueError: if they have no prompt in common.
    """
    waiting: dict[str, list[Answer]] = defaultdict(list)
    for answer in reversed(theirs):
        waiting[json.dumps(answer.prompt)].append(answer)
    pairs = []
    for answer in ours:
        key = json.dumps(answer.prompt)
        if waiting[key]:
            reference = None if references is None else references.get(key)
            one, other = _cut(answer, cut_at), _cut(waiting[key].pop(), cut_at)
            pairs.append(Pair(answer.prompt, one.text, other.text, reference, one.ended, other.ended))
    if not pairs:
        raise ValueError("A and B have no prompt in common: generate both from the same data")
    left_out = len(ours) + len(theirs) - 2 * len(pairs)
    if left_out:
        print(f"{left_out} answers are dropped: the other model did not answer their prompts")
    without = sum(pair.reference is None for pair in pairs)
    if references is not None and without:
        print(f"{without} of {len(pairs)} prompts have no reference answer")
    return pairs


def _cut(answer: Answer, cut_at: Sequence[str]) -> Answer:
    """The answer up to the first of the texts, where it ended then."""
    place = min((answer.text.find(text) for text in cut_at if text in answer.text), default=None)
    return answer if place is None else answer._replace(text=answer.text[:place], ended=True)


def make_judge(options: argparse.Namespace) -> Judge:
    """The judge that the options name.

    Raises:
        ValueError, OSError, ImportError: if it cannot be made.
    """
    name = options.judge_model
    if options.judge == "openai":
        return OpenAIJudge(
            name,
            options.base_url,
            options.api_key_env,
            options.request,
            max_retries=options.retries,
            timeout=options.timeout,
            workers=options.workers,
        )
    tokenizer = gguf.load_tokenizer(name, trust_remote_code=options.trust_remote_code)
    device = "cuda" if torch.cuda.is_available() and not options.use_cpu else "cpu"
    dtype = getattr(torch, options.dtype)
    if _is_classifier(name, options.trust_remote_code):
        model = load_reward_model(name, trust_remote_code=options.trust_remote_code).to(device, dtype)
        return RewardModelJudge(model, tokenizer, _fingerprint(name, model), options.tie_margin, options.batch_size)
    model = load_language_model(name, is_trainable=False, dtype=dtype, trust_remote_code=options.trust_remote_code)
    return LanguageModelJudge(model.to(device), tokenizer, _fingerprint(name, model), options.batch_size)


def _fingerprint(name: str, model: PreTrainedModel) -> str:
    """Tells a checkpoint from one that was trained into the same folder later, whose verdicts are others."""
    return f"{name} {model.dtype} {checkpoint_stamp(name)}"


def _is_classifier(name: str, trust_remote_code: bool) -> bool:
    if gguf.adapter_config_file(name) is not None:
        from peft import PeftConfig

        return bool(PeftConfig.from_pretrained(name).task_type == "SEQ_CLS")
    config = gguf.load_config(name, trust_remote_code=trust_remote_code)
    return any(kind.endswith("ForSequenceClassification") for kind in config.architectures or ())


def describe(options: argparse.Namespace, result: dict[str, float]) -> str:
    """The result in words."""
    lines = [
        f"{options.ours} against {options.theirs}, judged by {options.judge_model}",
        f"win rate {result['win_rate']:.3f}, {options.confidence:.0%} interval {result['low']:.3f} to "
        f"{result['high']:.3f} (ties count half)",
        f"{result['wins']} wins, {result['ties']} ties, {result['losses']} losses in {result['pairs']} pairs"
        + (f"; {result['unreadable']} without a verdict" if result["unreadable"] else ""),
    ]
    if "agreement" in result:
        lines.append(
            f"both orders agree on {result['agreement']:.0%} of the pairs; the answer that came first got "
            f"{result['first_place']:.0%} of the decided verdicts"
        )
    return "\n".join(lines)


def write(path: str, options: argparse.Namespace, result: dict[str, float], judgements: Sequence[Judgement]) -> None:
    """The result, and every pair with its verdicts, as JSON."""
    rows = [{**judgement.pair._asdict(), "verdicts": judgement.verdicts} for judgement in judgements]
    about = {name: getattr(options, name) for name in ("ours", "theirs", "judge", "judge_model", "references", "seed")}
    text = json.dumps({**about, **result, "judgements": rows}, indent=2, ensure_ascii=False)
    replace_text(path, text + "\n")
