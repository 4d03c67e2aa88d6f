"""The task: sums of three numbers, a tool that adds two, and a policy that knows how to call but seldom does.

A token is a digit, a word or a sign. The chat template writes a turn with a call as
`<policy><call>add(a=12,b=34)<end>`, and one with an answer as `<policy>46<end>`.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import float32
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig

from trl_apa.demo.supervised import run_trainer, training_options
from trl_apa.trl_trainers import QuietSFTTrainer


PAD, UNKNOWN, END, USER, POLICY, TOOL, CALL = "<pad>", "<unk>", "<end>", "<user>", "<policy>", "<tool>", "<call>"
WORDS = (PAD, UNKNOWN, END, USER, POLICY, TOOL, CALL, *"0123456789", "+", "add(", "a=", ",b=", ")")
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<user>{{ m.content }}{% elif m.role == 'tool' %}<tool>{{ m.content }}"
    "{% else %}<policy>{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}("
    "{% for name, value in c.function.arguments.items() %}{{ '' if loop.first else ',' }}{{ name }}={{ value }}"
    "{% endfor %}){% endfor %}{% endif %}<end>"
    "{% endfor %}{% if add_generation_prompt %}<policy>{% endif %}"
)
# By which transformers reads calls out of what the policy writes.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": POLICY,
    "fields": {
        "tool_calls": {
            "open_pattern": r"<call>(?P<name>[a-z]+)\(",
            "close_pattern": r"\)",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"(?P<key>[ab])=(?P<value>\d+)", "value_parser": {"name": "int"}},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": END, "content": "text"},
    },
}
# How the writer of the demonstrations goes about a sum, as probabilities.
CALLS, CALLS_AGAIN, RIGHT_ARGUMENTS, COPIES_THE_RESULT = 0.35, 0.7, 0.7, 0.8
SFT_LEARNING_RATE = 3e-3


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: the first number.
        b: the second number.
    """
    return a + b


def is_right(completions: list[list[dict[str, Any]]], answer: list[int], **columns: Any) -> list[float]:
    """1 if the last message is the sum, 0 otherwise."""
    return [float(messages[-1]["content"] == str(right)) for messages, right in zip(completions, answer, strict=True)]


def num_calls(completions: list[list[dict[str, Any]]], **columns: Any) -> list[float]:
    """Tool calls of each rollout; with weight 0 among the reward functions it is logged and rewards nothing."""
    return [float(sum(len(m.get("tool_calls", ())) for m in messages)) for messages in completions]


def draw_sums(rng: random.Random, count: int) -> list[list[int]]:
    """`count` different sums of three numbers of two digits."""
    numbered = rng.sample(range(90**3), count)
    return [[10 + n % 90, 10 + n // 90 % 90, 10 + n // 90**2] for n in numbered]


def rows_of(sums: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Rows of a data set: the question as a chat message, and the answer."""
    return [
        {"prompt": [{"role": "user", "content": "+".join(map(str, numbers))}], "answer": sum(numbers)}
        for numbers in sums
    ]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 22 words with the chat template and the response template above."""
    inside = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    inside.pre_tokenizer = Split(Regex(r"<[a-z]+>|[a-z]+\(|,?[a-z]=|\d|\S"), "isolated")
    inside.decoder = decoders.Fuse()
    names = {"pad_token": PAD, "unk_token": UNKNOWN, "eos_token": END, "padding_side": "left"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inside, **names)
    tokenizer.chat_template, tokenizer.response_template = CHAT_TEMPLATE, RESPONSE_TEMPLATE
    return tokenizer


def build_policy(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A randomly initialised Llama of about 100,000 parameters."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=192,
        max_position_embeddings=96,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config, dtype=float32)


def demonstration(numbers: Sequence[int], rng: random.Random) -> list[tuple[str, bool]]:
    """A careless writer's response, in pieces: the text of each, and whether the policy writes it.

    It mostly guesses. Where it calls the tool it often takes a wrong number, forgets the third one, or miscopies.
    """
    pieces: list[tuple[str, bool]] = []
    if rng.random() >= CALLS:
        return [(f"{rng.randint(30, 297)}{END}", True)]
    total, left = numbers[0], list(numbers[1:])
    while left:
        a, b = total, left.pop(0)
        if rng.random() >= RIGHT_ARGUMENTS:
            a, b = rng.choice([(rng.choice(numbers), b), (a, rng.choice(numbers))])
        total = a + b
        pieces += [(f"{CALL}add(a={a},b={b}){END}", True), (f"{TOOL}{total}{END}{POLICY}", False)]
        if rng.random() >= CALLS_AGAIN:
            break
    answer = total if rng.random() < COPIES_THE_RESULT else rng.randint(30, 297)
    return [*pieces, (f"{answer}{END}", True)]


def fine_tune(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    sums: Sequence[Sequence[int]],
    steps: int,
    folder: Path,
) -> None:
    """Teach `policy`, in place, to write as the careless writer does; the tool's tokens are left out of the loss."""
    rng, rows = random.Random(1), []
    for numbers in rng.choices(sums, k=64 * steps):
        prompt = f"{USER}{'+'.join(map(str, numbers))}{END}{POLICY}"
        pieces = [(prompt, False), *demonstration(numbers, rng)]
        ids = [tokenizer(text)["input_ids"] for text, _ in pieces]
        mask = [int(own) for (_, own), piece in zip(pieces, ids, strict=True) for _ in piece]
        rows.append({"input_ids": [token for piece in ids for token in piece], "completion_mask": mask})
    options = training_options(str(folder), 0, SFT_LEARNING_RATE, steps) | {"per_device_train_batch_size": 64}
    trainer = QuietSFTTrainer(
        model=policy,
        args=SFTConfig(**options, completion_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    run_trainer(trainer)
