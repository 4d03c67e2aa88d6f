"""The battery: what holds for every decoder family of transformers that can be built small, as `docs/models.md` says.

`make test-families` runs all of it; a sample runs in `make test`. `python -m tests.test_families` prints the table.
"""

import re
import tempfile
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from transformers import GenerationConfig

from tests.all_families import VOCABULARY, families, small_model, why_left_out
from tests.tiny import lora_config, tiny_rollouts, tiny_trainer
from trl_apa.checking import learning, reading, run, saving
from trl_apa.models.layouts import sampling_trial
from trl_apa.rollout.batch import Layout
from trl_apa.rollout.generation import generate_responses


PAGE = Path(__file__).parents[1] / "docs" / "models.md"
SAMPLE = ("cohere2", "deepseek_v3", "phimoe", "gemma3", "rwkv")
PROMPTS = ["w2 w3 w4", "w5", "w6 w7 w8 w9 w10 w11 w12 w13"]
FULL = (reading.layouts, reading.sampling, reading.greedy, reading.modes, reading.reference, learning.gradient)
FULL += (saving.reloaded,)
LORA = (reading.layouts, reading.reference, learning.gradient, saving.merged)
HEADINGS = ("family", "rows are read", "log-probs", "sampling", "gradient", "KL at rate 0", "saving", "LoRA")
READ = {
    Layout.PACKED: "packed",
    Layout.PADDED: "padded",
    Layout.SEPARATE: "by equal length",
    Layout.ONE_BY_ONE: "one by one",
}
# Which findings stand in a column.
COLUMNS = {
    "log-probs": r"log-probs, as trained|train mode|policy against|.*the same row",
    "sampling": r".*with cache|greedy",
    "gradient": r"gradient",
    "saving": r"saved",
}


def held(report, column):
    findings = [finding for finding in report.findings if re.match(COLUMNS[column], finding.name)]
    return bool(findings) and all(finding.ok is not False for finding in findings)


def battery(kind):
    """The cells of a family's row, by heading, and the reports behind them."""
    run_checks = partial(_checked, kind)
    trainer, report = run_checks({}, FULL)
    cells = {column: held(report, column) for column in COLUMNS}
    cells["KL at rate 0"] = _moves_nowhere(trainer)
    of_lora = _with_lora(run_checks)
    cells["LoRA"] = of_lora.ok
    cells["rows are read"] = READ[trainer.layouts(16)]
    return cells, (report, of_lora)


def _moves_nowhere(trainer):
    queries, responses, scores = tiny_rollouts()
    try:
        kl = [abs(trainer.step(queries, responses, scores)["objective/kl"]) for _ in range(2)]
    except FloatingPointError:  # a gradient that is not a number
        return False
    return max(kl) < 1e-5


def _with_lora(run_checks):
    try:
        return run_checks({"peft_config": lora_config(), "value_model": "adapter"}, LORA)[1]
    except ValueError as refusal:
        if "Mamba-based" not in str(refusal):
            raise
        # peft refuses these, because fused kernels read their weights without their forward.
        lora = lora_config(exclude_modules=["out_proj", "conv1d"])
        return run_checks({"peft_config": lora, "value_model": "adapter"}, LORA)[1]


def _checked(kind, trainer_kwargs, checks):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patched.setattr(run, "CHECKS", checks)
        options = {"learning_rate": 0.0, "mini_batch_size": 2, "max_completion_length": 6, "ppo_epochs": 2}
        trainer = tiny_trainer(folder, small_model(kind), trainer_kwargs, **options)
        return trainer, trainer.check(PROMPTS)


def row(kind):
    """A family's row of the table."""
    try:
        cells, _ = battery(kind)
    except ValueError as refusal:
        told = " ".join(str(refusal).split())
        return f"| {kind} | refused: {told} |" + " |" * (len(HEADINGS) - 2)
    return f"| {kind} | " + " | ".join(_cell(cells[heading]) for heading in HEADINGS[1:]) + " |"


def _cell(value):
    return value if isinstance(value, str) else "yes" if value else "**no**"


def row_of_the_page(kind):
    (found,) = re.findall(rf"^\| {kind} \|.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return found


def page_is_of_this_version():
    (version,) = re.findall(r"registry of transformers ([\d.]+)", PAGE.read_text(encoding="utf-8"))
    return transformers.__version__.startswith(f"{version}.")


@pytest.mark.skipif(not page_is_of_this_version(), reason="the page is of another version of transformers")
@pytest.mark.parametrize(
    "kind", [kind if kind in SAMPLE else pytest.param(kind, marks=pytest.mark.families) for kind in families()]
)
def test_what_holds_for_a_family_is_what_the_page_says(kind):
    if (why := why_left_out(kind)) is not None:
        pytest.skip(why)
    assert row(kind) == row_of_the_page(kind)


@pytest.mark.parametrize(
    "kind", [kind if kind in SAMPLE[3:] else pytest.param(kind, marks=pytest.mark.families) for kind in families()]
)
def test_greedy_answers_do_not_depend_on_how_many_rows_are_sampled_at_a_time(kind):
    """Prompts and responses within the families' windows and beyond, and prompts that are asked twice."""
    if (why := why_left_out(kind)) is not None:
        pytest.skip(why)
    model = in_double(kind)
    lengths, generator = (3, 19, 1, 12, 21, 7), torch.Generator().manual_seed(0)
    queries = [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in lengths]
    queries += [queries[2], queries[4], queries[2]]
    ends = list(range(5, VOCABULARY, 8))
    config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=ends, max_new_tokens=12, use_cache=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = generate_responses(model, queries, config, None, batch_size=1)
        except (RuntimeError, ValueError) as error:
            pytest.skip(f"not even one prompt can be answered: {error}")
        for size in (3, len(queries)):
            assert all(map(torch.equal, generate_responses(model, queries, config, None, batch_size=size), expected))


def in_double(kind):
    """In float64, where a family computes in it: no two tokens are as likely."""
    model = small_model(kind).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        works = not isinstance(sampling_trial(model, 34), Exception)
    return model if works else small_model(kind)


@pytest.mark.skipif(not page_is_of_this_version(), reason="the page is of another version of transformers")
@pytest.mark.families
def test_the_page_names_what_is_left_out_and_why():
    page = PAGE.read_text(encoding="utf-8")
    for kind in families():
        assert (f"\n- {kind}: " in page) == (why_left_out(kind) is not None)
    assert set(re.findall(r"^\| ([\w-]+) \| (?:packed|padded|by|one|refused)", page, re.MULTILINE)) <= set(families())


def table():
    """The page's section: rows of families, then what is left out."""
    tried = [kind for kind in families() if why_left_out(kind) is None]
    yield f"| {' | '.join(HEADINGS)} |"
    yield "| --- " * len(HEADINGS) + "|"
    yield from map(row, tried)
    yield ""
    for kind in families():
        if (why := why_left_out(kind)) is not None:
            yield f"- {kind}: {why}"


if __name__ == "__main__":
    for line in table():
        print(line, flush=True)
