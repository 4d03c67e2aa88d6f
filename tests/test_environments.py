"""`environment_factory=`: environments by TRL's protocol, their tools, their prompts and their rewards."""

import asyncio
import threading

import pytest
import torch

from tests.test_tools import collected, length_reward, told_apart
from tests.tool_dialogues import add, ask, call, tool_trainer
from trl_apa.rollout.prompts import reward_columns


class Counter:
    """TRL's protocol and nothing else: this class works in TRL's GRPOTrainer as it is."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.resets = 0

    def reset(self, start=0, **kwargs):
        self.value, self.resets = start, self.resets + 1
        return f" It begins at {start}."

    def increase(self, by: int) -> str:
        """Increases the counter.

        Args:
            by: how much.
        """
        self.value += by
        return f"now {self.value}"

    def _secret(self):
        raise AssertionError("called")

    @property
    def computed(self):
        raise AssertionError("computed")

    def get_reward(self):
        return float(self.value)


class Late(Counter):
    async def increase(self, by: int) -> str:
        """Increases the counter.

        Args:
            by: how much.
        """
        await asyncio.sleep(0.01)
        self.value += by
        return f"now {self.value}"

    async def get_reward(self):
        await asyncio.sleep(0.01)
        return float(self.value)


class Game:
    """Gives its rewards turn by turn."""

    def __init__(self, total=None):
        self.turn_reward = 0.0

    def reset(self, **kwargs):
        self.moves = 0

    def move(self, points: float) -> str:
        """Moves.

        Args:
            points: what it is worth.
        """
        self.moves += 1
        self.turn_reward = self.turn_reward + torch.tensor(points)
        return "moved"


class Finished(Game):
    """The same with a reward for all of it."""

    def get_reward(self):
        return 10.0


SHORT = {"max_completion_length": 180}  # pi_init samples as many
ROWS = [{**row, "start": start} for row, start in zip(ask("one?", "two?"), (5, 7), strict=True)]
TURNS = {"one?": [call("increase", by=2), call("increase", by=1), "Done."], "two?": ["Nothing."]}


@pytest.mark.parametrize("kind", [Counter, Late])
def test_a_rollout_has_an_environment_of_its_own_with_its_prompt_tools_and_reward(tmp_path, kind):
    kind.made = 0
    trainer, _ = tool_trainer(tmp_path, TURNS, ROWS, environment_factory=kind, config={"max_steps": 3})
    kept = collected(trainer)
    trainer.train()
    assert kind.made == 2  # made once, reset often
    for queries, responses, scores, masks in kept:
        texts = trainer.processing_class.batch_decode(queries)
        row = next(row for row, text in enumerate(texts) if "one?" in text)
        assert "one? It begins at 5.<|im_end|>" in texts[row] and "two? It begins at 7." in texts[1 - row]
        assert '"name": "increase"' in texts[row]
        assert not any(name in texts[row] for name in ("reset", "get_reward", "_secret", "computed"))
        assert [float(scores[row]), float(scores[1 - row])] == [8.0, 7.0]
        assert ["now 7" in piece for piece in told_apart(trainer, responses[row], masks[row])] == [0, 1, 0, 0, 0]
    assert trainer.scorer.names == [kind.__name__]


def test_environments_and_functions_give_rewards_together_with_weights(tmp_path):
    seen = {}

    def half(environments, start, **_):
        seen.update(values=[environment.value for environment in environments], start=start)
        return [0.5] * len(start)

    options = {"reward_weights": [2.0]}
    trainer, _ = tool_trainer(tmp_path, TURNS, ROWS, reward=half, environment_factory=Counter, config=options)
    kept = collected(trainer)
    trainer.train()
    assert sorted(map(float, kept[0][2])) == [8.0, 9.0] and sorted(seen["values"]) == [7, 8]
    assert trainer.scorer.weights == [2.0, 1.0]


def test_several_environments_by_name_each_with_its_own_tools(tmp_path):
    rows = [
        {**ask("one?")[0], "environment": "count", "start": 1},
        {**ask("two?")[0], "environment": "game", "start": 2},
    ]
    turns = {
        "one?": [call("increase", by=2), call("move", points=1), "Done."],
        "two?": [call("move", points=1.5), "."],
    }
    factories = {"count": Counter, "game": Game}
    trainer, _ = tool_trainer(tmp_path, turns, rows, environment_factory=factories, tools=[add])
    kept = collected(trainer)
    trainer.train()
    [(queries, responses, scores, masks)] = kept
    texts = trainer.processing_class.batch_decode(queries)
    row = next(row for row, text in enumerate(texts) if "one?" in text)
    assert '"increase"' in texts[row] and '"move"' not in texts[row] and '"add"' in texts[row]
    assert '"increase"' not in texts[1 - row] and '"move"' in texts[1 - row] and '"add"' in texts[1 - row]
    assert [float(scores[row]), float(scores[1 - row])] == [3.0, 1.5]
    assert "Tool move not found." in told_apart(trainer, responses[row], masks[row])[3]


@pytest.mark.parametrize(("kind", "last"), [(Game, 0.0), (Finished, 6.5)])
def test_rewards_of_turns_are_on_the_last_tokens_of_their_turns(tmp_path, kind, last):
    turns = {"one?": [call("move", points=1.5), f"{call('move', points=1)}\n{call('move', points=1)}", "Done."]}
    trainer, _ = tool_trainer(tmp_path, turns, ask("one?"), environment_factory=kind)
    kept = collected(trainer)
    trainer.train()
    [(_, [response], [score], [mask])] = kept
    rollouts = trainer.run_state.iteration.rollouts
    ends = [i for i in range(len(response)) if mask[i] and (i + 1 == len(response) or not mask[i + 1])]
    expected = torch.zeros(len(response))
    expected[ends] = torch.tensor([1.5, 2.0, last])
    torch.testing.assert_close(rollouts.rewards_BR[0], expected)
    assert float(score) == 3.5 + last
    [log] = [log for log in trainer.state.log_history if "turns/mean" in log]
    assert (log["turns/reward_1"], log["turns/reward_2"]) == (1.5, 2.0) and "turns/reward_3" not in log


class Moves:
    """A game whose `turn_reward` is made where each of its kinds makes it."""

    def reset(self, **kwargs):
        self.moves = 0


class MadeAtFirst(Game):
    pass


class MadeInReset(Moves):
    def reset(self, **kwargs):
        super().reset(**kwargs)
        self.turn_reward = 0.0

    def move(self, points: float) -> str:
        """Moves.

        Args:
            points: what it is worth.
        """
        self.turn_reward += points
        return "moved"


class MadeInTheClass(MadeInReset):
    turn_reward = 0.0
    reset = Moves.reset


class MadeInAMove(Moves):
    def move(self, points: float) -> str:
        """Moves.

        Args:
            points: what it is worth.
        """
        self.turn_reward = points
        return "moved"


class MadeBySetattr(Moves):
    def move(self, points: float) -> str:
        """Moves.

        Args:
            points: what it is worth.
        """
        setattr(self, "turn_reward", points)  # noqa: B010
        return "moved"


class Computed(Moves):
    def reset(self, **kwargs):
        self.points = 0.0

    def move(self, points: float) -> str:
        """Moves.

        Args:
            points: what it is worth.
        """
        self.points = points
        return "moved"

    @property
    def turn_reward(self):
        return self.points  # an AttributeError before `reset`


class Delegated(Moves):
    def __init__(self):
        self.inner = None

    def reset(self, **kwargs):
        self.inner = Game()

    def move(self, points: float) -> str:
        """Moves.

        Args:
            points: what it is worth.
        """
        self.turn_reward = self.inner.turn_reward + points
        return "moved"

    def __getattr__(self, name):
        return getattr(self.inner, name)


KINDS = [MadeAtFirst, MadeInReset, MadeInTheClass, MadeInAMove, MadeBySetattr, Computed, Delegated]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_total", [False, True])
def test_a_turn_reward_is_part_of_the_reward_wherever_it_is_made(tmp_path, kind, with_total):
    kind = type(kind.__name__, (kind,), {"get_reward": lambda self: 10.0} if with_total else {})
    turns = {"one?": [call("move", points=1.5), call("move", points=2), "Done."], "two?": ["Done."]}
    trainer, _ = tool_trainer(tmp_path, turns, ask("one?", "two?"), environment_factory=kind)
    kept = collected(trainer)
    trainer.train()
    [(queries, _, scores, _)] = kept
    played = ["one?" in text for text in trainer.processing_class.batch_decode(queries)]
    expected = [10.0, 10.0] if with_total else [3.5 if one else 0.0 for one in played]
    assert list(map(float, scores)) == expected
    rewards = trainer.run_state.iteration.rollouts.rewards_BR[played.index(True)]
    assert rewards[rewards != 0].tolist() == [1.5, 2.0, *([6.5] if with_total else [])]


def test_a_turn_reward_that_nobody_could_expect_is_refused(tmp_path):
    def outside(environment):
        environment.turn_reward = 1.0

    class Moved(Moves):
        def move(self, points: float) -> str:
            """Moves.

            Args:
                points: what it is worth.
            """
            outside(self)
            return "moved"

    turns = {"one?": [call("move", points=1), "Done."]}
    trainer, _ = tool_trainer(tmp_path, turns, ask("one?"), reward=length_reward, environment_factory=Moved)
    with pytest.raises(ValueError, match="environment Moved: turn_reward appeared during a rollout"):
        trainer.train()


def test_gae_gives_each_turn_the_rewards_that_follow_it_and_skips_what_was_told(tmp_path):
    turns = {"one?": [call("move", points=1), call("move", points=2), "Done."]}
    options = {"gamma": 0.9, "lam": 1.0, "whiten_advantages": False}
    trainer, _ = tool_trainer(tmp_path, turns, ask("one?"), environment_factory=Game, config=options)
    kept = collected(trainer)
    trainer.train()
    mask = kept[0][3][0]
    rollouts = trainer.run_state.iteration.rollouts
    rewards = rollouts.rewards_BR[0][mask]
    returns, after = [], 0.0
    for reward in reversed(rewards.tolist()):  # the discount counts sampled tokens alone
        after = reward + 0.9 * after
        returns.insert(0, after)
    torch.testing.assert_close(rollouts.returns_BR[0][mask], torch.tensor(returns), rtol=1e-4, atol=1e-5)


def test_an_environment_that_owns_the_data_needs_no_data_set(tmp_path):
    class Own(Counter):
        def reset(self, prompt, **kwargs):
            self.value = 3
            return "one?"

    options = {"batch_size": 2, "mini_batch_size": 2}
    trainer, _ = tool_trainer(tmp_path, TURNS, None, environment_factory=Own, config=options)
    kept = collected(trainer)
    trainer.train()
    assert len(kept) == 1 and "<|im_start|>user\none?<|im_end|>" in trainer.processing_class.decode(kept[0][0][0])


def test_an_environment_whose_call_hangs_is_not_used_again(tmp_path):
    release, made = threading.Event(), []

    class Hanging(Counter):
        def __init__(self):
            super().__init__()
            made.append(self)

        def wait(self) -> str:
            """Waits."""
            release.wait(20)
            return "late"

    turns = {"one?": [f"{call('wait')}\n{call('increase', by=1)}", "Done."]}
    options = {"tool_timeout": 0.2, "max_steps": 2}
    trainer, _ = tool_trainer(tmp_path, turns, ROWS[:1], environment_factory=Hanging, config=options)
    kept = collected(trainer)
    trainer.train()
    release.set()
    assert [environment.resets for environment in made] == [1, 1]
    assert all(float(scores[0]) == 6.0 for _, _, scores, _ in kept)  # begun before the first was known to hang


def test_evaluation_keeps_each_environment_until_its_rollout_is_scored(tmp_path):
    trainer, _ = tool_trainer(
        tmp_path, TURNS, ROWS, environment_factory=Counter, config={"per_device_eval_batch_size": 1, **SHORT}
    )
    metrics = trainer.evaluate([ROWS[0], ROWS[1], {**ROWS[1], "start": 9}])
    assert metrics["eval_reward"] == pytest.approx((8 + 7 + 9) / 3)


@pytest.mark.parametrize("options", [{}, {"reward_timeout": 20.0}])
def test_async_tools_environments_and_reward_functions_share_one_event_loop(tmp_path, options):
    """A lock and a future that one of them made can be awaited by the others."""
    loops = []

    class Session(Counter):
        async def increase(self, by: int) -> str:
            """Increases the counter.

            Args:
                by: how much.
            """
            loops.append(asyncio.get_running_loop())
            self.answer = loops[-1].create_future()
            loops[-1].call_later(0.05, self.answer.set_result, 7.0)
            return "soon"

        async def get_reward(self):
            loops.append(asyncio.get_running_loop())
            return await asyncio.wait_for(self.answer, 5)

    async def other(completions, environments, **_):
        loops.append(asyncio.get_running_loop())
        return [await environment.answer for environment in environments]

    turns = {"one?": [call("increase", by=2), "Done."]}
    config = {"max_steps": 2, **options}
    trainer, _ = tool_trainer(tmp_path, turns, ROWS[:1], reward=other, environment_factory=Session, config=config)
    kept = collected(trainer)
    trainer.train()
    assert [float(scores[0]) for _, _, scores, _ in kept] == [14.0, 14.0]
    assert len(set(loops)) == 1 and len(loops) == 6


def test_half_a_character_in_what_reset_shows_does_not_end_a_run(tmp_path):
    class Half(Counter):
        def reset(self, **kwargs):
            super().reset()
            return "half \ud83d"

    trainer, _ = tool_trainer(tmp_path, TURNS, ROWS[:1], environment_factory=Half)
    kept = collected(trainer)
    trainer.train()
    assert r"half \ud83d" in trainer.processing_class.decode(kept[0][0][0])


def test_rows_of_different_environments_may_have_different_columns(tmp_path):
    rows = [
        {**ask("one?")[0], "environment": "count", "start": 1},
        {**ask("two?")[0], "environment": "game", "board": [3]},
    ]
    seen = {}

    def reward(completions, prompts, **columns):
        order = sorted(range(2), key=lambda row: prompts[row][0]["content"])
        seen.update({name: [columns[name][row] for row in order] for name in ("environment", "start", "board")})
        return [0.0] * len(completions)

    factories = {"count": Counter, "game": Game}
    trainer, _ = tool_trainer(tmp_path, {"?": ["Done."]}, rows, reward=reward, environment_factory=factories)
    trainer.train()
    assert seen == {"environment": ["count", "game"], "start": [1, None], "board": [None, [3]]}
    assert reward_columns([{"prompt": "a"}, {"b": 1, "query": "c"}, {"d": 2}]) == {
        "b": [None, 1, None],
        "d": [None, None, 2],
    }


@pytest.mark.parametrize(
    ("size", "most"), [(2, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 2), (3, 6)))]
)
def test_evaluation_needs_two_environments_for_each_row_of_a_batch_and_no_more(tmp_path, size, most):
    class Counted(Counter):
        made = 0

    config = {"per_device_eval_batch_size": size, **SHORT}
    trainer, _ = tool_trainer(tmp_path, TURNS, ROWS, environment_factory=Counted, config=config)
    for _ in range(2):
        metrics = trainer.evaluate([{**ROWS[1], "start": start} for start in range(7)])
        assert metrics["eval_reward"] == metrics["eval_ref_reward"] == 3.0
    assert Counted.made == most


class NoReset:
    def move(self) -> str:
        """Moves."""
        return ""


class Undescribed(Counter):
    def more(self, by):
        return by


class BadReset(Counter):
    def reset(self, **kwargs):
        raise OSError("the server is away")


class Picture(Counter):
    def reset(self, **kwargs):
        return [{"type": "text", "text": "Look:"}, {"type": "image", "image": None}]


class BadObservation(Counter):
    def reset(self, **kwargs):
        return 3


class BadTurnReward(Game):
    def move(self, points: float) -> str:
        """Moves.

        Args:
            points: what it is worth.
        """
        self.turn_reward = "much"
        return ""


@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        (NoReset, "NoReset, which has no method reset"),
        (Undescribed, "'more' cannot be described"),
        ({}, "environment_factory is empty"),
        ("Counter", "environment_factory is a str"),
        ({"a": 3}, "environment_factory is a int"),
    ],
)
def test_environments_that_cannot_be_are_refused_when_the_trainer_is_made(tmp_path, factory, problem):
    with pytest.raises(ValueError, match=problem):
        tool_trainer(tmp_path, TURNS, ROWS, environment_factory=factory)


@pytest.mark.parametrize(
    ("factory", "rows", "error", "problem"),
    [
        (BadReset, ROWS, RuntimeError, "environment BadReset: reset failed: OSError: the server is away"),
        (BadObservation, ROWS, ValueError, "BadObservation: reset gave a int"),
        (Picture, ROWS, ValueError, "environment Picture: reset: a block of type 'image'; only texts"),
        (
            {"a": Counter},
            ROWS,
            ValueError,
            r"a row has environment=None; it should be one of environment_factory: \['a'\]",
        ),
        (Counter, [{"prompt": "one?"}, {"prompt": "two?"}], ValueError, "a list of chat messages"),
    ],
)
def test_an_iteration_that_cannot_begin_says_why(tmp_path, factory, rows, error, problem):
    trainer, _ = tool_trainer(tmp_path, TURNS, rows, environment_factory=factory, reward=length_reward)
    with pytest.raises(error, match=problem):
        trainer.train()


def test_the_classic_loop_cannot_score_with_an_environment(tmp_path):
    trainer, _ = tool_trainer(tmp_path, TURNS, ROWS, environment_factory=Counter)
    with pytest.raises(ValueError, match=r"score\(\) was called with an environment"):
        trainer.score([torch.tensor([5])], [torch.tensor([6])])


def test_a_turn_reward_that_is_no_number_is_refused_by_name(tmp_path):
    turns = {"one?": [call("move", points=1), "Done."]}
    trainer, _ = tool_trainer(tmp_path, turns, ask("one?"), environment_factory=BadTurnReward)
    with pytest.raises(ValueError, match="environment BadTurnReward: turn_reward is 'much'"):
        trainer.train()
