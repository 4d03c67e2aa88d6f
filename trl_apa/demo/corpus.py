"""Questions and answers about products, made by a small grammar whose true quality is known.

Everything is words separated by single spaces, so that a word-level tokenizer reads a text back exactly.
"""

import random
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


COLOURS = ("red", "blue", "green", "black", "white", "brown")

# What is true of each product; every other word of ALL_REASONS is false of it.
TRUE_REASONS = {
    "lamp": ("bright", "cheap", "quiet"),
    "chair": ("soft", "strong", "safe"),
    "phone": ("fast", "light", "bright"),
    "coat": ("warm", "soft", "light"),
    "bike": ("fast", "strong", "cheap"),
    "oven": ("warm", "safe", "quiet"),
}
PRODUCTS = tuple(TRUE_REASONS)
ALL_REASONS = tuple(sorted({reason for reasons in TRUE_REASONS.values() for reason in reasons}))

QUESTIONS = (
    "question : is the {} good ? answer :",
    "question : should i buy the {} ? answer :",
    "question : why do you like the {} ? answer :",
    "question : what about the {} ? answer :",
    "question : can you tell me more about the {} ? answer :",
    "question : would the {} make a good gift ? answer :",
)
OPENINGS = ("", "yes ,", "well ,", "sure ,")
SENTENCES = (
    "the {item} is {reasons} .",
    "the {item} is good because it is {reasons} .",
    "i like the {item} , it is {reasons} .",
)
NAMELESS_SENTENCES = ("it is {reasons} .", "you should buy it , it is {reasons} .")
EVASIONS = ("i do not know .", "maybe .", "ask me later .")
FILLER = "it is good ."
CLOSINGS = ("hope this helps !", "have a nice day !", "thank you !")

# Saying one of these twice in an answer is repetition; words such as "the" and "is" may recur.
CONTENT_WORDS = frozenset((*COLOURS, *PRODUCTS, *ALL_REASONS, "good", "buy", "like", "helps", "nice", "thank"))


class Item(NamedTuple):
    """A product in one colour."""

    colour: str
    product: str

    def __str__(self) -> str:
        return f"{self.colour} {self.product}"


@dataclass(frozen=True)
class AnswerStyle:
    """How good the answers of a writer are, as probabilities.

    Args:
        evasive (`float`): of not answering at all.
        names_item (`float`): of naming the item asked for; the rest splits evenly between another item and none.
        true_reason (`float`): of each reason given being true of the item asked for.
        polite (`float`): of a polite closing.
        repetitive (`float`): of padding the answer with the same empty sentence, twice or three times.
    """

    evasive: float = 0.2
    names_item: float = 0.8
    true_reason: float = 0.75
    polite: float = 0.25
    repetitive: float = 0.25


@dataclass(frozen=True)
class Corpus:
    """Prompts for training and for evaluation (disjoint), and prompt-answer pairs to imitate."""

    train_prompts: list[str]
    eval_prompts: list[str]
    demonstrations: list[dict[str, str]]


def all_prompts() -> list[str]:
    """Every question about every item, in a fixed order."""
    items = [Item(colour, product) for colour in COLOURS for product in PRODUCTS]
    return [question.format(item) for question in QUESTIONS for item in items]


def item_of(prompt: str) -> Item:
    """The item a prompt asks about.

    Raises:
        ValueError: `prompt` names no item of the grammar.
    """
    words = prompt.split()
    for colour, product in pairwise(words):
        if colour in COLOURS and product in PRODUCTS:
            return Item(colour, product)
    raise ValueError(f"prompt must name one item such as 'red lamp', got {prompt!r}")


def write_answer(rng: random.Random, prompt: str, style: AnswerStyle) -> str:
    """One answer to `prompt`, drawn from the grammar."""
    asked = item_of(prompt)
    closing = rng.choice(CLOSINGS) if rng.random() < style.polite else ""
    if rng.random() < style.evasive:
        return _join(rng.choice(EVASIONS), closing)
    draw = rng.random()
    if draw < style.names_item:
        sentence, item = rng.choice(SENTENCES), asked
    elif draw < (1 + style.names_item) / 2:
        sentence, item = rng.choice(SENTENCES), Item(rng.choice(COLOURS), rng.choice(PRODUCTS))
    else:
        sentence, item = rng.choice(NAMELESS_SENTENCES), asked
    body = sentence.format(item=item, reasons=_write_reasons(rng, asked, style))
    padding = [FILLER] * rng.choice((2, 3)) if rng.random() < style.repetitive else []
    return _join(rng.choice(OPENINGS), body, *padding, closing)


def _write_reasons(rng: random.Random, item: Item, style: AnswerStyle) -> str:
    true_reasons = TRUE_REASONS[item.product]
    false_reasons = tuple(reason for reason in ALL_REASONS if reason not in true_reasons)
    count = rng.choice((1, 2))
    return " and ".join(
        rng.choice(true_reasons if rng.random() < style.true_reason else false_reasons) for _ in range(count)
    )


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def gold_quality(prompt: str, answer: str, finished: bool = True) -> float:
    """The true quality of an answer, which the learned reward model only approximates.

        quality =  1.0  if the answer names the item asked for (colour and product side by side)
                 - 0.5  if it names any other product, or puts any other colour before a product
                 + 0.5  for each distinct true reason, two at most
                 - 0.5  for each distinct false reason
                 + 1.0  if it ends with a polite closing
                 - 1.0  if it evades ("i do not know .", "maybe .", "ask me later .")
                 - 0.25 for each content word said again
                 - 1.0  if it was cut off before its end

    Args:
        prompt (`str`): the question.
        answer (`str`): the answer, without special tokens.
        finished (`bool`, *optional*, defaults to `True`): whether the answer ended with an end-of-sequence token.

    Returns:
        `float`: the quality in gold units; 3 is the best possible.
    """
    asked = item_of(prompt)
    words = answer.split()
    pairs = list(pairwise(words))
    other_product = any(word in PRODUCTS and word != asked.product for word in words)
    other_colour = any(first in COLOURS and second in PRODUCTS and first != asked.colour for first, second in pairs)
    reasons = {word for word in words if word in ALL_REASONS}
    true_reasons = reasons.intersection(TRUE_REASONS[asked.product])
    repeats = sum(count - 1 for word, count in Counter(words).items() if word in CONTENT_WORDS)
    quality = 1.0 * (tuple(asked) in pairs)
    quality -= 0.5 * (other_product or other_colour)
    quality += 0.5 * min(len(true_reasons), 2)
    quality -= 0.5 * len(reasons - true_reasons)
    quality += 1.0 * any(_ends_with(words, closing) for closing in CLOSINGS)
    quality -= 1.0 * any(_contains(words, evasion) for evasion in EVASIONS)
    quality -= 0.25 * repeats
    quality -= 1.0 * (not finished)
    return quality


def _ends_with(words: list[str], phrase: str) -> bool:
    return words[-len(phrase.split()) :] == phrase.split()


def _contains(words: list[str], phrase: str) -> bool:
    return f" {phrase} " in f" {' '.join(words)} "


def build_corpus(
    seed: int, num_demonstrations: int, num_eval_prompts: int, style: AnswerStyle | None = None
) -> Corpus:
    """Split the prompts and write the demonstrations; the same seed gives the same corpus.

    Args:
        seed (`int`): of the random generator.
        num_demonstrations (`int`): prompt-answer pairs to write, on training prompts only.
        num_eval_prompts (`int`): prompts to keep for evaluation.
        style (`AnswerStyle`, *optional*): of the writer; by default a mixture of good and poor answers.

    Returns:
        `Corpus`: `demonstrations` are rows with the text columns `prompt` and `completion`.

    Raises:
        ValueError: `num_eval_prompts` leaves no prompt to train on.
    """
    rng = random.Random(seed)
    prompts = all_prompts()
    if not 0 < num_eval_prompts < len(prompts):
        raise ValueError(f"num_eval_prompts must be between 1 and {len(prompts) - 1}, got {num_eval_prompts}")
    rng.shuffle(prompts)
    eval_prompts, train_prompts = prompts[:num_eval_prompts], prompts[num_eval_prompts:]
    demonstrations = []
    for _ in range(num_demonstrations):
        prompt = rng.choice(train_prompts)
        answer = write_answer(rng, prompt, style or AnswerStyle())
        demonstrations.append({"prompt": prompt, "completion": answer})
    return Corpus(train_prompts, eval_prompts, demonstrations)


def vocabulary() -> list[str]:
    """Every word the grammar can write, sorted."""
    texts = (*all_prompts(), *OPENINGS, *EVASIONS, *CLOSINGS, FILLER, *ALL_REASONS)
    templates = [text.replace("{item}", "").replace("{reasons}", "and") for text in (*SENTENCES, *NAMELESS_SENTENCES)]
    return sorted({word for text in (*texts, *templates) for word in text.split()})
