"""Rollouts of several turns: their token ids, masks, limits and rewards, in one process and in two."""

import threading
from types import SimpleNamespace

import pytest
import torch

from trl_apa.distributed.processes import Processes
from trl_apa.tools.turns import Episode, Sampled, Told, play


ALONE = SimpleNamespace(together=lambda work: work(), largest=lambda count: count)


class Counting:
    """Answers each rollout as often as its prompt's first token says, with its second as many tokens."""

    def __init__(self):
        self.num_answered = {}

    def read(self, episodes):
        for episode in episodes:
            start, end = episode.turns[-1]
            episode.messages.append({"role": "assistant", "content": str(episode.ids[start:end])})

    def answer(self, episodes):
        return [self.answer_one(episode) for episode in episodes]

    def answer_one(self, episode):
        number = self.num_answered[id(episode)] = self.num_answered.get(id(episode), 0) + 1
        if number > episode.query[0]:
            return None
        return Told([90] * episode.query[1], [{"role": "tool", "name": "count", "content": str(number)}])


def in_turn(asked):
    """A sampler whose tokens count up in each row, three a turn."""

    def sample(contexts, limits):
        asked.append(([context.tolist() for context in contexts], list(limits)))
        return [Sampled([len(context), len(context) + 1, len(context) + 2][:limit], torch.tensor([-1.0, -2.0, -3.0]))
                for context, limit in zip(contexts, limits, strict=True)]  # fmt: skip

    return sample


def played(queries, max_length=100, **options):
    asked, episodes = [], [Episode(query, max_length) for query in queries]
    play(episodes, in_turn(asked), Counting(), ALONE, **options)
    return episodes, asked


def test_what_was_sampled_and_told_is_kept_in_order_with_its_mask():
    (episode,), _ = played([[2, 2]])
    assert episode.ids == [2, 3, 4, 90, 90, 7, 8, 9, 90, 90, 12, 13, 14]
    assert "".join("st"[not sampled] for sampled in episode.mask) == "sssttsssttsss"
    assert episode.turns == [(0, 3), (5, 8), (10, 13)]
    assert [message["role"] for message in episode.messages] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert episode.finished and not episode.dropped


def test_rollouts_in_different_turns_are_sampled_together_and_finished_ones_leave():
    episodes, asked = played([[0, 1], [2, 1], [1, 1]])
    assert [len(contexts) for contexts, _ in asked] == [3, 2, 1]
    assert [len(episode.turns) for episode in episodes] == [1, 3, 2]
    assert asked[1][0] == [[2, 1, *episodes[1].ids[:4]], [1, 1, *episodes[2].ids[:4]]]


def test_all_turns_share_one_limit_of_tokens():
    (episode,), asked = played([[9, 2]], max_length=12)
    assert [limits for _, limits in asked] == [[12], [7], [2]]
    assert len(episode.ids) == 12 and episode.mask[-1]  # the last turn is cut where the room ends
    assert episode.dropped and not episode.finished


@pytest.mark.parametrize(("told", "num_turns"), [(6, 2), (7, 1), (8, 1)])
def test_an_answer_that_leaves_no_token_for_the_next_turn_is_left_out(told, num_turns):
    (episode,), _ = played([[9, told]], max_length=10)
    assert len(episode.turns) == num_turns and episode.mask[-1] and len(episode.ids) <= 10
    assert episode.messages[-1]["role"] == "assistant" and episode.dropped


@pytest.mark.parametrize("most", [0, 1, 2])
def test_no_more_answers_than_asked_for(most):
    (episode,), _ = played([[9, 2]], max_answers=most)
    assert len(episode.turns) == most + 1 and not episode.finished and not episode.dropped
    assert episode.messages[-1]["role"] == "assistant"


def test_rewards_of_turns_lie_on_their_last_tokens():
    (episode,), _ = played([[1, 2]])
    episode.add_reward(2.0)
    assert episode.token_rewards() == [0.0] * 7 + [2.0]
    episode.rewards[0] = 0.5
    episode.add_reward(1.0)
    assert episode.token_rewards() == [0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 3.0]


def test_log_probs_are_joined_and_unknown_if_one_turn_s_are():
    (episode,), _ = played([[1, 2]])
    assert episode.logprobs().tolist() == [-1.0, -2.0, -3.0, 0.0, 0.0, -1.0, -2.0, -3.0]
    other = Episode([1], 10)
    other.add_sampled(Sampled([5], torch.tensor([-1.0])))
    other.add_sampled(Sampled([6]))
    assert other.logprobs() is None


class TwoProcesses:
    """Two threads that meet as two processes do; a collective that one of them leaves out times out."""

    def __init__(self):
        self.barrier, self.given = threading.Barrier(2, timeout=10), [None, None]

    def process(self, index):
        def gather(tensor):
            self.given[index] = tensor
            self.barrier.wait()
            gathered = torch.cat(self.given)
            self.barrier.wait()
            return gathered

        def together(work):
            result = work()
            gather(torch.zeros(1))
            return result

        accelerator = SimpleNamespace(num_processes=2, device="cpu", gather=gather)
        return SimpleNamespace(largest=Processes(accelerator).largest, together=together)


def test_processes_sample_equally_many_rows_in_every_turn_and_equally_often():
    processes, asked = TwoProcesses(), ([], [])
    queries = ([[0, 1], [0, 1], [1, 1]], [[3, 1], [0, 1], [3, 1]])
    episodes = tuple([Episode(query, 50) for query in part] for part in queries)

    def work(index):
        play(episodes[index], in_turn(asked[index]), Counting(), processes.process(index))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[len(contexts) for contexts, _ in part] for part in asked] == [[3, 2, 2, 2]] * 2
    assert asked[0][1][1] == [46, 1] and asked[0][3][1] == [1, 1]  # what fills up gets one token
    for part, given in zip(episodes, queries, strict=True):
        alone, _ = played(given, 50)
        assert [episode.ids for episode in part] == [episode.ids for episode in alone]
