"""The task: begin a sentence about a film, and let the model end it. A reward says how good the sentence is."""

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple


SUBJECTS = (
    "the film",
    "this movie",
    "the plot",
    "the acting",
    "the ending",
    "the soundtrack",
    "the main character",
    "the first scene",
    "the script",
    "the camera work",
)
# None of them has a word that VADER scores.
BEGINNINGS = (
    "{} was",
    "{} is",
    "I thought that {} was",
    "When I left the cinema, {} seemed",
    "My sister said that {} was",
    "After two hours, {} felt",
    "Everyone talks about {}. I",
    "About {}: it",
)
NUM_HELD_OUT = 16


Reward = Callable[[Sequence[str], Sequence[str]], list[float]]


class Prompts(NamedTuple):
    """Beginnings of sentences for training and for evaluation, disjoint."""

    train: list[str]
    held_out: list[str]


def make_prompts(seed: int) -> Prompts:
    """Every beginning with every subject, in an order that `seed` decides; the first are held out."""
    prompts = [_capitalised(beginning.format(subject)) for beginning in BEGINNINGS for subject in SUBJECTS]
    random.Random(seed).shuffle(prompts)
    return Prompts(prompts[NUM_HELD_OUT:], prompts[:NUM_HELD_OUT])


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def sentiment_reward() -> Reward:
    """A function of prompts and responses: VADER's compound score of each sentence, from -1 (bad) to 1 (good).

    VADER (Hutto and Gilbert, 2014) adds up the valence of a text's words, with rules for negation and emphasis.
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()

    def scores(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        pairs = zip(prompts, responses, strict=True)
        return [analyzer.polarity_scores(prompt + response)["compound"] for prompt, response in pairs]

    return scores


def alliteration_reward() -> Reward:
    """A function of prompts and responses: how many of the response's words begin with an s."""

    def counts(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float(len(re.findall(r"(?<![\w'\u2019])s\w*", response.lower()))) for response in responses]

    return counts


REWARDS: dict[str, Callable[[], Reward]] = {"sentiment": sentiment_reward, "alliteration": alliteration_reward}
