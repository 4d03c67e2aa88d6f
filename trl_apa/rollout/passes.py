"""Forward passes of at most so many tokens: which rows of an optimizer step are read together."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from trl_apa.rollout.batch import Layout, Rollouts
from trl_apa.rollout.shared_prompts import pays_once


# How often the interval in which the smallest sufficient budget lies is halved.
HALVINGS = 6


@dataclass(frozen=True)
class RowLengths:
    """What the cost of a forward pass depends on.

    Args:
        queries, responses: tokens of each row.
        prompts: a number for each row, the same for rows with equal queries.
        layout_for: tokens of the longest row, and whether rows `share` a prompt, to the layout of a pass.
        is_encoder_decoder: whether a decoder reads a start token and the response, and an encoder the query.
    """

    queries: list[int]
    responses: list[int]
    prompts: list[int]
    layout_for: Callable[..., Layout]
    is_encoder_decoder: bool = False

    @classmethod
    def of(cls, rollouts: Rollouts, layout_for: Callable[..., Layout]) -> "RowLengths":
        """Those of an iteration."""
        queries, responses = ([len(ids) for ids in column] for column in (rollouts.queries, rollouts.responses))
        prompts = list(range(len(rollouts))) if rollouts.prompts is None else rollouts.prompts
        return cls(queries, responses, prompts, layout_for, rollouts.decoder_start_token_id is not None)

    def longest(self, row: int) -> int:
        """Tokens that one stack reads of a row; see `batch.longest_row`."""
        query, response = self.queries[row], self.responses[row]
        return max(query, 1 + response) if self.is_encoder_decoder else query + response

    def alone(self, row: int) -> int:
        """Tokens of a pass of one row."""
        return self.queries[row] + self.responses[row] + self.is_encoder_decoder


class Pass:
    """The rows of one forward pass, and the tokens that a network reads of them, pads included.

    Args:
        lengths: of the rows of the iteration.
    """

    def __init__(self, lengths: RowLengths):
        self.lengths = lengths
        self.atoms: list[list[int]] = []
        self.tokens = self._longest = self._query = self._response = self._count = self._sum = self._saved = 0
        # Of each prompt its tokens, its responses, and their tokens.
        self._of_prompt: dict[int, tuple[int, int, int]] = {}

    @classmethod
    def of(cls, lengths: RowLengths, atoms: Iterable[list[int]]) -> "Pass":
        """A pass of these rows."""
        made = cls(lengths)
        for atom in atoms:
            made.add(atom)
        return made

    @property
    def rows(self) -> list[int]:
        return [row for atom in self.atoms for row in atom]

    def tokens_with(self, rows: Iterable[int]) -> int:
        """Tokens of the pass if `rows` were in it too."""
        known, rows = self.lengths, list(rows)
        longest = max(self._longest, *map(known.longest, rows))
        layout = known.layout_for(longest, share=True)
        if layout is Layout.PADDED:
            query = max(self._query, *(known.queries[row] for row in rows))
            response = max(self._response, *(known.responses[row] for row in rows))
            return (self._count + len(rows)) * (query + response + known.is_encoder_decoder)
        total = self._sum + sum(map(known.alone, rows))
        if layout is not Layout.SHARED:
            return total
        changed: dict[int, tuple[int, int, int]] = {}
        for row in rows:
            prompt = known.prompts[row]
            changed[prompt] = _and_row(changed.get(prompt) or self._of_prompt.get(prompt), known, row)
        before = sum(_saved(self._of_prompt[prompt]) for prompt in changed if prompt in self._of_prompt)
        return total - self._saved + before - sum(map(_saved, changed.values()))

    def add(self, atom: list[int]) -> None:
        """Put rows into the pass."""
        known = self.lengths
        self.tokens = self.tokens_with(atom)
        self.atoms.append(atom)
        self._count += len(atom)
        for row in atom:
            self._longest = max(self._longest, known.longest(row))
            self._query = max(self._query, known.queries[row])
            self._response = max(self._response, known.responses[row])
            self._sum += known.alone(row)
            of_prompt = self._of_prompt.get(known.prompts[row])
            with_row = _and_row(of_prompt, known, row)
            self._saved += _saved(with_row) - (_saved(of_prompt) if of_prompt else 0)
            self._of_prompt[known.prompts[row]] = with_row


def _and_row(of_prompt: tuple[int, int, int] | None, lengths: RowLengths, row: int) -> tuple[int, int, int]:
    query, count, responses = of_prompt or (lengths.queries[row], 0, 0)
    return query, count + 1, responses + lengths.responses[row]


def _saved(of_prompt: tuple[int, int, int]) -> int:
    """Tokens less if a prompt is read once, where it is."""
    query, count, _ = of_prompt
    return query * (count - 1) if pays_once(*of_prompt) else 0


def fewest_passes(lengths: RowLengths, atoms: Sequence[list[int]], budget: int) -> list[Pass]:
    """Few passes of at most `budget` tokens, the longest rows first; an atom with more has a pass of its own.

    First fit decreasing. Where a prompt that several rows have in common is read once, its rows are placed together
    as far as they fit.

    Args:
        lengths: of the rows of the iteration.
        atoms: rows that have to be read together, one row each as a rule.
        budget: tokens.
    """
    by_prompt: dict[tuple[bool, int], list[list[int]]] = {}
    for atom in sorted(atoms, key=lambda atom: -max(map(lengths.alone, atom))):
        shares = lengths.layout_for(max(map(lengths.longest, atom)), share=True) is Layout.SHARED
        by_prompt.setdefault((shares, lengths.prompts[atom[0]] if shares else atom[0]), []).append(atom)
    clusters = sorted(by_prompt.values(), key=lambda cluster: -Pass.of(lengths, cluster).tokens)
    passes: list[Pass] = []
    for cluster in clusters:
        rest = list(cluster)
        while rest:
            rows = [row for atom in rest for row in atom]
            home = next((known for known in passes if known.tokens_with(rows) <= budget), None)
            if home is not None:
                for atom in rest:
                    home.add(atom)
                break
            home = Pass.of(lengths, rest[:1])
            left = []
            for atom in rest[1:]:
                if home.tokens_with(atom) <= budget:
                    home.add(atom)
                else:
                    left.append(atom)
            passes.append(home)
            rest = left
    return passes


def balanced_passes(lengths: RowLengths, atoms: Sequence[list[int]], budget: int, count: int) -> list[list[int]]:
    """The rows of exactly `count` passes of at most `budget` tokens and of about as many each, the largest first.

    Args:
        lengths, atoms: as above.
        budget: tokens; if so many passes cannot keep it, they are as small as this finds them.
        count: passes, at most as many as atoms; at least those that `fewest_passes` makes, if the budget is to hold.
    """
    passes = fewest_passes(lengths, atoms, budget)
    enough = max(budget, passes[0].tokens) if len(passes) <= count else Pass.of(lengths, atoms).tokens
    too_small = -(-sum(one.tokens for one in passes) // count) - 1 if len(passes) <= count else budget
    passes = passes if len(passes) <= count else fewest_passes(lengths, atoms, enough)
    for _ in range(HALVINGS):
        tried = (too_small + enough) // 2
        found = fewest_passes(lengths, atoms, tried)
        if len(found) <= count:
            enough, passes = tried, found
        else:
            too_small = tried
    while len(passes) < count:
        largest = max((one for one in passes if len(one.atoms) > 1), key=lambda one: one.tokens)
        passes.remove(largest)
        first, *others = largest.atoms
        passes += [Pass.of(lengths, [first]), Pass.of(lengths, others)]
    passes.sort(key=lambda one: -one.tokens)
    return [one.rows for one in passes]
