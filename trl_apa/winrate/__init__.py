"""Which of two models answers better, as a judge sees it (figure 1 of the paper)."""

from trl_apa.winrate.cache import VerdictCache
from trl_apa.winrate.comparing import Judge, Judgement, Pair, Question, compare, win_rate
from trl_apa.winrate.local import LanguageModelJudge, RewardModelJudge
from trl_apa.winrate.openai import JudgeError, OpenAIJudge


__all__ = [
    "Judge",
    "JudgeError",
    "Judgement",
    "LanguageModelJudge",
    "OpenAIJudge",
    "Pair",
    "Question",
    "RewardModelJudge",
    "VerdictCache",
    "compare",
    "win_rate",
]
