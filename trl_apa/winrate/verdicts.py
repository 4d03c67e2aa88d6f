"""The verdicts that there are."""

FIRST, SECOND, TIE = "first", "second", "tie"
# What the verdict on a question is worth to the answer that stood first in it.
WORTH = {FIRST: 1.0, TIE: 0.5, SECOND: 0.0}
