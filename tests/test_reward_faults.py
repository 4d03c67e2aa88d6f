"""Reward functions that fail, answer nonsense or edit what they are given: they are named, and nothing is lost."""

import asyncio
import collections
import math
import os
import signal
import threading
import time
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests.test_training import PROMPTS, few_nines, parameters, trainer_for
from tests.test_update import assert_same
from trl_apa.rollout.scoring import Scorer
from trl_apa.trainer.resuming import last_complete_checkpoint
from trl_apa.values import shown


# Two responses of two tokens.
TEXTS, IDS = ["w5", "w6"], [torch.tensor([5, 6]), torch.tensor([7, 8])]


def table_of(*values):
    """A pandas DataFrame with the values in its columns 1 and 0; `datasets` brings pandas with it."""
    return Dataset.from_dict({"x": values, "y": values}).to_pandas().rename(columns={"x": 1, "y": 0})


def score(*functions, columns=None, **options):
    return Scorer(functions, **options)(TEXTS, TEXTS, IDS, IDS, columns or {})


def answers(value, name="judge"):
    def judge(**_):
        return value

    judge.__name__ = name
    return judge


async def patient(prompts, **_):
    await asyncio.sleep(30)
    return [0.0] * len(prompts)


class Abandoned(BaseException):
    pass


FAILURES = [
    asyncio.CancelledError(),
    SystemExit(3),
    StopIteration("x"),
    StopAsyncIteration(),
    GeneratorExit(),
    Abandoned("x"),
    BaseExceptionGroup("x", [SystemExit(3)]),
    ConnectionError("the judge is away"),
]


async def cancels_what_it_waits_for():
    task = asyncio.ensure_future(asyncio.sleep(30))
    asyncio.get_running_loop().call_soon(task.cancel)
    await task


async def cancels_itself():
    asyncio.current_task().cancel()
    await asyncio.sleep(30)


async def cancels_everything():
    for task in asyncio.all_tasks():
        task.cancel()
    await asyncio.sleep(30)


async def stops_the_loop():
    asyncio.get_running_loop().stop()
    await asyncio.sleep(30)


@pytest.mark.parametrize("timeout", [None, 20])
@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.filterwarnings("error")
def test_whatever_a_function_raises_is_an_error_that_names_it(error, timeout):
    def at_once(**_):
        raise error

    async def later(**_):
        await asyncio.sleep(0)
        raise error

    for judge in (at_once, later):
        for others in ([], [patient], [few_nines]):
            with pytest.raises(RuntimeError, match=f"reward function {judge.__name__} failed: ") as raised:
                score(*others, judge, timeout=timeout)
            assert type(error).__name__ in str(raised.value) or "StopIteration" in str(raised.value)


@pytest.mark.parametrize("timeout", [None, 20])
@pytest.mark.parametrize(
    "deed", [cancels_what_it_waits_for, cancels_itself, cancels_everything, stops_the_loop], ids=lambda f: f.__name__
)
def test_a_function_that_is_cancelled_is_named(deed, timeout):
    """Also in a notebook, where a loop is running, and beside another one that waits."""

    async def judge(**_):
        await deed()

    async def in_a_notebook():
        score(judge, timeout=timeout)

    for run in (lambda: score(judge, timeout=timeout), lambda: asyncio.run(in_a_notebook())):
        with pytest.raises(
            RuntimeError, match=r"reward function judge failed: (CancelledError|RuntimeError: Event loop)"
        ):
            run()
    with pytest.raises(RuntimeError, match=r"reward function (patient, )?judge failed: "):
        score(patient, judge, timeout=timeout)


@pytest.mark.parametrize("is_async", [False, True])
def test_an_interrupt_ends_scoring_at_once_and_stays_one(is_async):
    """Of the function itself, and of a user in the middle of it."""

    def raises(**_):
        raise KeyboardInterrupt

    async def raises_later(**_):
        raise KeyboardInterrupt

    def waits(**_):
        time.sleep(30)

    own, waiting = (raises_later, patient) if is_async else (raises, waits)
    for timeout in (None, 20):
        with pytest.raises(KeyboardInterrupt, match=f"reward function {own.__name__} was interrupted"):
            score(own, timeout=timeout)
    start, before = time.monotonic(), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for timeout, message in ((None, f"reward function {waiting.__name__} was interrupted"), (20, None)):
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt, match=message):
                score(waiting, timeout=timeout)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 10


class Lazy:
    """Its length is known; what it holds cannot be had."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 2

    def __iter__(self):
        raise self.error


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says that some of these will go
    ODD_TENSORS = {
        "meta": torch.zeros(2, device="meta"),
        "sparse": torch.ones(2).to_sparse(),
        "csr": torch.ones(2, 2).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]),
        "mkldnn": torch.ones(2).to_mkldnn(),
    }
NO_LISTS = {
    **ODD_TENSORS,
    "0-d tensor": torch.tensor(1.0),
    "0-d array": np.array(1.0),
    "scalar": np.float32(1.0),
    "None": None,
    "number": 2.0,
    "dict": {0: 1.0, 1: 2.0},
    "counter": collections.Counter([0, 1]),
    "keys": {0: 1.0, 1: 2.0}.keys(),
    "set": {1.0, 2.0},
    "frozenset": frozenset({1.0, 2.0}),
    "bytes": b"12",
    "bytearray": bytearray(b"12"),
    "memoryview": memoryview(b"12"),
    "str": "12",
    "generator": (value for value in [1.0, 2.0]),
    "map": map(float, [1, 2]),
    "table": table_of(1.0, 2.0),
}


@pytest.mark.parametrize("skip_unscored", [False, True])
@pytest.mark.parametrize("kind", NO_LISTS)
def test_an_answer_that_is_no_list_of_numbers_is_refused_by_name(kind, skip_unscored):
    with pytest.raises(ValueError, match=r"reward function judge gave .*; it should give a list of numbers"):
        score(answers(NO_LISTS[kind]), skip_unscored=skip_unscored)


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3), GeneratorExit(), StopIteration(), MemoryError()])
def test_an_answer_that_fails_when_it_is_read_is_refused_by_name(error):
    with pytest.raises((RuntimeError, ValueError), match=r"reward function judge (failed|gave)"):
        score(answers(Lazy(error)))


@pytest.mark.parametrize("skip_unscored", [False, True])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1e39, r"1e\+39"),
        (-1e300, r"-1e\+300"),
        (10**39, "1000"),
        (10**400, r"1000.*\(int\)"),
        (-(10**5000), "an object of type int"),
        (Fraction(10**400, 3), "Fraction"),
        (Decimal("1e39"), "Decimal"),
        (math.inf, "inf"),
        (Decimal("-inf"), "Decimal"),
        (torch.tensor(1e39, dtype=torch.float64), r"1e\+39"),
        (1 + 0j, r"\(1\+0j\)"),
        ("1", "'1'"),
        (b"1", "b'1'"),
        ({1.0}, "{1.0}"),
        ({0: 1.0}, "{0: 1.0}"),
        (torch.zeros((), device="meta"), "tensor"),
        (float, "<class 'float'>"),
    ],
    ids=shown,
)
def test_a_value_that_is_no_finite_number_in_float32_is_refused_by_name(value, said, skip_unscored):
    """Of a response or of a token, in the second row, whether or not responses may be left out."""
    with pytest.raises(
        ValueError, match=rf"reward function judge gave {said}.* for row 1; it should be a finite numb"
    ):
        score(answers([0.0, value]), skip_unscored=skip_unscored)
    with pytest.raises(ValueError, match=rf"reward function judge gave {said}.* for token 0 of row 1; it should be a"):
        score(answers([[0.0, 0.0], [value, 0.0]]), skip_unscored=skip_unscored)


@pytest.mark.parametrize("skip_unscored", [False, True])
@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([[[3e38, 3e38], [0.0, 0.0]]], None, r"judge_0 gave 6e\+38 for row 0, added up; it should be a finite number"),
        (
            [[0.0, 1e30]],
            None,
            r"judge_0 gave 1e\+30 for row 1, .*at most 1e\+18 in size: its square overflows float32",
        ),
        ([[0.0, -1e10]], [1e30], r"judge_0 gave -1e\+10 for row 1, -1e\+40 with its weight; it should be at most"),
        ([[[1e30, -1e30], [0.0, 0.0]]], None, r"judge_0 gave 1e\+30 for row 0, 1e\+30 with its weight"),
        ([[None, 0.0], [1e30, 0.0]], [1, 1], r"judge_1 gave 1e\+30 for row 0"),
        ([[0.0, 9e17], [0.0, 9e17]], None, r"reward functions judge_0, judge_1 gave 1.8e\+18 together, .* for row 1"),
    ],
)
def test_a_reward_that_is_too_large_to_learn_from_is_refused_by_name(values, weights, message, skip_unscored):
    judges = [answers(value, f"judge_{number}") for number, value in enumerate(values)]
    if values[0][0] is None and not skip_unscored:
        message = "judge_0 gave None for row 0"
    with pytest.raises(ValueError, match=message):
        score(*judges, weights=weights, skip_unscored=skip_unscored)


def test_what_has_no_weight_may_be_larger():
    scores = score(answers([1e30, 0.0]), answers([1.0, 2.0]), weights=[0.0, 1.0])
    assert scores.total_B.tolist() == [1.0, 2.0] and scores.by_function_BF[0, 0] == pytest.approx(1e30)


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2.5],
        (True, Fraction(5, 2)),
        [Decimal(1), Decimal("2.5")],
        collections.deque([1, 2.5]),
        {"a": 1, "b": 2.5}.values(),
        np.array([1, 2.5], dtype=np.float16),
        np.array([1, 2.5], dtype=object),
        [np.float32(1), np.float64(2.5)],
        [np.bool_(True), torch.tensor(2.5)],
        torch.tensor([1, 2.5], dtype=torch.bfloat16),
        torch.tensor([1, 2.5], requires_grad=True) * 1,
        table_of(2.5, 1)[1][::-1],
        np.ma.array([1, 2.5]),
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_numbers_of_every_kind_are_read(answer):
    assert score(answers(answer)).total_B.tolist() == [1.0, 2.5]


@pytest.mark.parametrize(
    "answer",
    [
        [[1, 2], (0.5, Decimal(1))],
        [[torch.tensor(1.0), np.float32(2)], torch.tensor([0.5, 1])],
        np.array([[1, 2], [0.5, 1]]),
        np.array([[1, 2], [0.5, 1]], dtype=object),
        [table_of(1, 2)[1], collections.deque([0.5, 1])],
    ],
)
def test_numbers_for_each_token_are_read(answer):
    scores = score(answers(answer))
    assert [row.tolist() for row in scores.per_token] == [[1.0, 2.0], [0.5, 1.0]]
    assert scores.total_B.tolist() == [3.0, 1.5]


@pytest.mark.parametrize("missing", [None, math.nan, Decimal("nan"), np.float32("nan"), torch.tensor(math.nan)])
def test_a_response_without_a_number_is_left_out_only_when_asked(missing):
    for answer in ([missing, 1.0], [[missing, 1.0], [0.5, 0.5]]):
        assert score(answers(answer), skip_unscored=True).kept_B.tolist() == [False, True]
        with pytest.raises(ValueError, match=r"judge gave .* for (token 0 of )?row 0; it should be a finite number"):
            score(answers(answer))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([math.nan], r"reward_weights\[0\] is nan; it should be a finite number in float32"),
        ([1.0, -math.inf], r"reward_weights\[1\] is -inf"),
        ([1e39], r"reward_weights\[0\] is 1e\+39"),
        ([10**400], r"reward_weights\[0\] is 1000"),
        (["1"], r"reward_weights\[0\] is '1'"),
        ([True], r"reward_weights\[0\] is True"),
        ([None], r"reward_weights\[0\] is None"),
        ([[1.0]], r"reward_weights\[0\] is \[1.0\]"),
        ("1", "reward_weights='1': it should be a list of numbers"),
        (0.5, "reward_weights=0.5: it should be a list"),
        ({0: 1.0}, "reward_weights={0: 1.0}: it should be a list"),
    ],
    ids=str,
)
def test_weights_that_are_no_finite_numbers_are_refused_before_anything_is_built(tmp_path, weights, message):
    for build in (lambda: trainer_for(tmp_path, reward_weights=weights), lambda: score(few_nines, weights=weights)):
        with pytest.raises(ValueError, match=message):
            build()


# ---- functions that edit what they are given ----


class Unique:
    """Can neither be copied nor pickled, as an open connection."""

    def __deepcopy__(self, memo):
        raise TypeError("no copies")


def spoil(value):
    """Edit everything in place that can be."""
    if isinstance(value, list):
        for element in value:
            spoil(element)
        value.append("spoilt")
    elif isinstance(value, dict):
        for element in value.values():
            spoil(element)
        value["content"] = "spoilt"
    elif isinstance(value, torch.Tensor | np.ndarray):
        value[...] = -1


def test_a_function_that_edits_its_arguments_harms_nobody(tmp_path):
    """Not the next function, the data, what is learned from nor what is logged; chat and nested columns too."""
    rows = [
        {
            "prompt": [{"role": "user", "content": text}],
            "facts": {"names": [text], "numbers": [1, 2]},
            "vector": np.arange(3),
            "tensor": torch.arange(2.0, requires_grad=True) * 2,
            "mixed": [Unique(), [text]],
        }
        for text in PROMPTS
    ]
    seen = {"vandal": [], "witness": []}

    def note(name, arguments):
        shown = {key: value for key, value in arguments.items() if key != "mixed"}
        seen[name].append(repr(shown) + repr([mixed[1] for mixed in arguments["mixed"]]))

    def vandal(**arguments):
        note("vandal", arguments)
        for column in arguments.values():
            spoil(column)
        return [0.0, 0.5, 1.0, 1.5]

    def witness(**arguments):
        note("witness", arguments)
        return [0.0] * 4

    def judge(**_):
        return [0.0, 0.5, 1.0, 1.5]

    def blind(**_):
        return [0.0] * 4

    options = {"dataset": rows, "max_steps": 8, "num_generations": 2, "log_completions": True}
    trainers = {}
    for name, functions in {"spoilt": [vandal, witness], "kept": [judge, blind]}.items():
        trainer = trainers[name] = trainer_for(tmp_path / name, reward_funcs=functions, **options)
        trainer.processing_class.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        trainer.train()
    assert len(seen["vandal"]) == 2 and seen["witness"] == seen["vandal"]
    assert_same(parameters(trainers["spoilt"]), parameters(trainers["kept"]), tolerance=1e-30)
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": text}] for text in PROMPTS]
    assert [row["facts"] for row in rows] == [{"names": [text], "numbers": [1, 2]} for text in PROMPTS]
    assert all(row["vector"].tolist() == [0, 1, 2] and row["tensor"].tolist() == [0.0, 2.0] for row in rows)
    assert all(row["mixed"][1] == [row["facts"]["names"][0]] for row in rows)
    tables = [
        Dataset.from_parquet(
            str(tmp_path / name / "completions" / "completions_000004.parquet"), cache_dir=tmp_path / "cache" / name
        )
        for name in ("spoilt", "kept")
    ]
    for column in ("prompt", "completion"):
        assert list(tables[0][column]) == list(tables[1][column]) and "spoilt" not in str(list(tables[0][column]))


def test_rows_of_one_prompt_are_apart_too():
    """As many responses to one prompt share a row of the data: each gets messages of its own."""
    row, lengths = [{"role": "user", "content": "w5"}], []

    def appends(notes, **_):
        for note in notes:
            note.append("read")
            lengths.append(len(note))
        return [0.0, 0.0]

    score(appends, columns={"notes": [row, row]})
    assert lengths == [2, 2] and len(row) == 1


# ---- in training ----


FAULTS = {
    "KeyboardInterrupt": (KeyboardInterrupt, "reward function judge was interrupted"),
    "SystemExit": (RuntimeError, "reward function judge failed: SystemExit: 3"),
    "StopIteration": (RuntimeError, "reward function judge failed: StopIteration"),
    "CancelledError": (RuntimeError, "reward function judge failed: CancelledError"),
    "1e39": (ValueError, r"reward function judge gave 1e\+39 for row 0"),
}


def fails_at(call, fault):
    """A reward function that is `few_nines` until its `call`-th call."""
    calls = []

    def judge(completions, **_):
        calls.append(len(completions))
        if len(calls) != call:
            return few_nines(completions)
        if fault == "1e39":
            return [1e39, *few_nines(completions)[1:]]
        errors = (asyncio.CancelledError(), KeyboardInterrupt(), StopIteration(), SystemExit(3))
        raise {type(error).__name__: error for error in errors}[fault]

    return judge


@pytest.mark.parametrize("fault", ["KeyboardInterrupt", "StopIteration", "1e39"])
def test_what_was_learned_before_a_fault_is_saved_and_the_run_goes_on_from_there(tmp_path, fault):
    """Reward functions are called once an iteration of four steps."""
    error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        trainer_for(tmp_path, reward_funcs=fails_at(2, fault), max_steps=5, skip_unscored=True).train()
    assert last_complete_checkpoint(str(tmp_path)).endswith("checkpoint-4")
    if fault == "StopIteration":  # one is as good as the other
        never_stopped = trainer_for(tmp_path / "whole", max_steps=5)
        never_stopped.train()
        resumed = trainer_for(tmp_path, max_steps=5)
        resumed.train(resume_from_checkpoint=True, resume_anyway=["reward_funcs"])  # which has another name
        assert_same(parameters(resumed), parameters(never_stopped), tolerance=1e-30)


@pytest.mark.parametrize("fault", ["SystemExit", "KeyboardInterrupt"])
def test_what_was_learned_before_a_fault_in_an_evaluation_is_saved(tmp_path, fault):
    """The functions are called for the first iteration, and then for the policy and for pi_init."""
    error, message = FAULTS[fault]
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": PROMPTS[:2], "max_steps": 4}
    with pytest.raises(error, match=message):
        trainer_for(tmp_path, reward_funcs=fails_at(2, fault), **options).train()
    assert last_complete_checkpoint(str(tmp_path)).endswith("checkpoint-2")


def test_score_names_the_argument_that_it_cannot_read(tmp_path):
    trainer = trainer_for(tmp_path)
    query, response = torch.tensor([5]), torch.tensor([6])
    assert len(trainer.score([query], [response])) == 1
    for queries, responses, columns, message in (
        ([], [], {}, "queries is empty; it should hold at least one tensor"),
        ([query], [], {}, "responses is empty"),
        ([query], [response, response], {}, "responses has 2 elements; there are 1 queries"),
        ([query], [response], {"target": [1, 2]}, "target has 2 elements; there are 1 queries"),
        ([query], [response], {"prompts": []}, "prompts has 0 elements"),
        ([query], [torch.zeros(2, device="meta")], {}, r"responses\[0\] is a meta tensor"),
        ([query.to(torch.uint16)], [response], {}, r"queries\[0\] has dtype torch.uint16"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.score(queries, responses, **columns)
