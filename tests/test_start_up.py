"""`--help` answers without what computes, and our parser reads fields as transformers' does."""

import argparse
import dataclasses
import os
import subprocess
import sys
from enum import Enum
from typing import Any, Literal, get_type_hints

import pytest
from transformers import HfArgumentParser
from trl import ModelConfig

from trl_apa import APAConfig
from trl_apa.cli import COMMANDS, WITH_TRAINER
from trl_apa.commands import check, evaluate_options, generate_options, memory, offline, reward, sft, train_options
from trl_apa.commands.evaluate_options import EvaluateSampling
from trl_apa.commands.field_parser import FieldParser, OptionField
from trl_apa.commands.generate_options import GenerateLoading, GenerateSampling
from trl_apa.commands.options import CommandParser
from trl_apa.commands.sampling_options import LoadingOptions


HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
# Commands whose options are their own, and not those of a Trainer's config.
OWN_OPTIONS = [command for command in COMMANDS if command not in WITH_TRAINER]
ASK = """
import sys
from trl_apa.cli import main
try:
    main([*sys.argv[2:]])
except SystemExit as ended:
    assert not ended.code, ended.code
found = [name for name in sys.argv[1].split(",") if name in sys.modules]
print("imported:", found, file=sys.stderr)
"""


@pytest.mark.parametrize("command", OWN_OPTIONS)
def test_help_needs_no_library_that_computes(command):
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    argv = [sys.executable, "-c", ASK, ",".join(HEAVY), command, "--help"]
    asked = subprocess.run(argv, capture_output=True, text=True, env=environment, check=True)
    assert asked.stderr.splitlines()[-1] == "imported: []"
    assert "usage: trl-apa" in asked.stdout


@pytest.mark.slow
def test_train_lists_its_options_without_what_trains():
    """Beside `TrainingArguments`, which imports torch: no model, no data set, no tracker, no other parser."""
    unused = ("datasets", "pandas", "wandb", "transformers.hf_argparser", "transformers.trainer")
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    argv = [sys.executable, "-c", ASK, ",".join(unused), "train", "--help"]
    asked = subprocess.run(argv, capture_output=True, text=True, env=environment, check=True)
    assert asked.stderr.splitlines()[-1] == "imported: []"


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Fields:
    """One of each kind."""

    needed: int
    text: str = "a"
    maybe_text: str | None = dataclasses.field(default=None, metadata={"help": "a text"})
    number: int = 3
    maybe_number: float | None = None
    on: bool = True
    off_by_default: bool = False
    bare_bool: bool = dataclasses.field(default_factory=bool)
    maybe_bool: bool | None = None
    maybe_on: bool | None = True
    a_list: list[str] = dataclasses.field(default_factory=lambda: ["x"])
    maybe_list: list[int] | None = None
    needed_list: list[int] = dataclasses.field(default=dataclasses.MISSING, kw_only=True)
    literal: Literal["a", 2] = "a"
    colour: Colour = Colour.RED
    chosen: str = dataclasses.field(default="b", metadata={"choices": ["b", "c"], "aliases": ["--chosen-one"]})
    an_object: dict[str, Any] | str | None = None
    either: int | str = 1


def groups_of(cls):
    hints = {field.name: field.type for field in dataclasses.fields(cls)}
    return {"fields": [OptionField(field.name, hints[field.name], field) for field in dataclasses.fields(cls)]}


TEXTS = ("1", "0", "yes", "no", "2.5", "red", "a", "True", "none", "")


def described(action):
    """What an action does, its conversion of some texts included."""

    def converted(text):
        try:
            return repr(action.type(text)) if callable(action.type) else text
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            return "refused"

    names = ("option_strings", "dest", "nargs", "const", "default", "required", "help")
    choices = None if action.choices is None else list(action.choices)
    return {name: getattr(action, name) for name in names} | {
        "choices": choices,
        "kind": type(action).__name__,
        "converted": [converted(text) for text in TEXTS],
    }


def assert_same_options(ours, theirs):
    ours, theirs = ([described(action) for action in parser._actions] for parser in (ours, theirs))
    alone = (["--help-all"], ["--debug"])  # of ours
    ours = [
        action for action in ours if action["default"] != argparse.SUPPRESS or action["option_strings"] not in alone
    ]
    ours = {tuple(action["option_strings"]): action for action in ours}
    theirs = {tuple(action["option_strings"]): action for action in theirs}
    assert len(theirs) > 5 and ours == theirs


def test_every_kind_of_field_is_read_as_transformers_reads_it():
    assert_same_options(FieldParser(groups_of(Fields), prog="x"), HfArgumentParser(Fields, prog="x"))
    with pytest.raises(ValueError, match="wrong: a union of types is read as one of them"):
        wrong = OptionField("wrong", int | float | None, dataclasses.field(default=None))
        FieldParser({"fields": [wrong]})


@pytest.mark.parametrize(
    "module", [check, evaluate_options, generate_options, memory, offline, reward, sft, train_options]
)
def test_the_options_of_every_command_are_those_that_transformers_would_make(module, monkeypatch):
    """Defaults, spellings, choices, conversions, groups."""
    made = []
    original = CommandParser.__init__
    monkeypatch.setattr(
        CommandParser, "__init__", lambda self, *args, **kw: (made.append(self), original(self, *args, **kw))[1]
    )
    with pytest.raises(SystemExit):
        module.main(["--help"])
    parser = made[0]
    classes = []
    for title, fields in parser.groups.items():
        rows = []
        for name, hint, field in fields:
            default = {"default": field.default, "default_factory": field.default_factory}
            rows.append((name, hint, dataclasses.field(**default, metadata=dict(field.metadata))))
        classes.append(dataclasses.make_dataclass("Options", rows, namespace={"_argument_group_name": title}))
    theirs = HfArgumentParser(classes)
    theirs.add_argument("--config", metavar="FILE", help="YAML file with options; the command line wins")
    assert_same_options(parser._parser, theirs)
    titles = [group.title for group in theirs._action_groups]
    assert [group.title for group in parser._parser._action_groups] == titles


@pytest.mark.parametrize(
    ("options", "config"),
    [
        (GenerateLoading, ModelConfig),
        (LoadingOptions, ModelConfig),
        (GenerateSampling, APAConfig),
        (EvaluateSampling, APAConfig),
    ],
)
def test_options_that_are_written_out_are_those_of_the_config_that_is_made_of_them(options, config):
    """Name, type, default, and all that a command line reads of them; their help may be another."""

    def read(cls):
        hints = get_type_hints(cls)
        ours = [field for field in dataclasses.fields(cls) if field.name in options.__dataclass_fields__]
        return {
            field.name: (
                hints[field.name],
                field.default,
                {name: value for name, value in field.metadata.items() if name != "help"},
            )
            for field in ours
        }

    assert read(options) == read(config)
    assert len(read(options)) == len(dataclasses.fields(options)) >= 5
