"""Options of `trl-apa winrate`, and its beginning. Imports nothing heavy, so that `--help` answers at once."""

import json
from collections.abc import Sequence
from typing import Any

from trl_apa.commands.parsing import OneLineParser
from trl_apa.data.layouts import LAYOUTS


PROGRAM = "trl-apa winrate"


def make_parser() -> OneLineParser:
    """The options of the command."""
    parser = OneLineParser(
        prog=PROGRAM,
        description="How often a judge prefers the answers in A to those in B. Every pair is judged in both orders.",
        allow_abbrev=False,
    )
    parser.add_argument("ours", metavar="A", help="answers of one model, as `trl-apa generate` writes them")
    parser.add_argument("theirs", metavar="B", help="answers of the other model to the same prompts")
    add = parser.add_argument
    add("--judge", choices=("openai", "local"), required=True, help="an OpenAI-compatible endpoint, or a model here")
    add(
        "--judge_model",
        required=True,
        help="name at the endpoint; or folder or hub name of a reward or language model",
    )
    add(
        "--references", metavar="ROWS", help="preferences or demonstrations with the same prompts, as `sft` reads them"
    )
    add(
        "--references_layout",
        choices=tuple(LAYOUTS),
        help="columns of references that are not called prompt, chosen, ...",
    )
    add("--references_data_dir", help="of references: folder inside a hub data set")
    add("--references_split", default="train", help="of references: split of a hub data set (default: %(default)s)")
    add("--cut_at", nargs="+", default=[], metavar="TEXT", help="texts at which an answer ends")
    add("--output", metavar="FILE", help="file for the result and every verdict, as JSON; written at the end")
    add(
        "--cache",
        metavar="FILE",
        help="file of the verdicts, each written as it comes, which are not asked for again (default: "
        "winrate_cache.jsonl beside A)",
    )
    add("--seed", type=int, default=0, help="of the bootstrap that gives the interval (default: %(default)s)")
    add("--confidence", type=float, default=0.95, help="probability that the interval covers (default: %(default)s)")
    _add_judges(parser)
    return parser


def _add_judges(parser: OneLineParser) -> None:
    """The options of one kind of judge each."""
    openai = parser.add_argument_group("--judge openai")
    openai.add_argument("--base_url", help="address of the endpoint (default: OpenAI's)")
    openai.add_argument(
        "--api_key_env", default="OPENAI_API_KEY", help="environment variable with the key (default: %(default)s)"
    )
    openai.add_argument("--request", type=_json_object, default={}, help="JSON: more fields of the request")
    openai.add_argument("--workers", type=int, default=8, help="requests at a time (default: %(default)s)")
    openai.add_argument(
        "--retries", type=int, default=6, help="most times that a failed request is sent again (default: %(default)s)"
    )
    openai.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        help="of a request, seconds from connecting to the last byte; of each retry anew (default: %(default)s)",
    )
    local = parser.add_argument_group("--judge local")
    local.add_argument(
        "--tie_margin", type=float, default=0.0, help="scores within this margin are a tie (default: %(default)s)"
    )
    local.add_argument(
        "--batch_size", type=int, default=8, help="answers or questions in a forward pass (default: %(default)s)"
    )
    local.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: %(default)s)",
    )
    local.add_argument("--use_cpu", action="store_true", help="leave a GPU alone")
    local.add_argument("--trust_remote_code", action="store_true", help="let code that comes with the model run")


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


# What argparse calls the type in its message.
_json_object.__name__ = "JSON object"


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options = make_parser().parse_args(argv)
    from trl_apa.commands.winrate import run

    return run(options)
