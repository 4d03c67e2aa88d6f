"""The results of `make gpu-check` as Markdown, for docs/performance.md and docs/memory.md. Imports nothing heavy."""

from collections.abc import Mapping, Sequence
from typing import Any


GIB = 2**30
Line = Mapping[str, Any]


def tables(lines: Sequence[Line], optional: Mapping[str, bool]) -> str:
    """All tables: the parts, what is wrong, and the figures of those parts that have any.

    Args:
        lines: of the parts, in their order.
        optional: which of the packages that may be there are.
    """
    results = {line["part"]: line["results"] for line in lines if line.get("results")}
    sections = [_machine(results.get("environment", {}), optional), _parts(lines)]
    sections += [_tests(name, results[name]) for name in ("tests", "two-ranks") if name in results]
    if "check" in results:
        sections.append(_check(results["check"]))
    if "launches" in results:
        sections.append(_launches(results["launches"]))
    measured = {name.removeprefix("memory-"): rows for name, rows in results.items() if name.startswith("memory-")}
    if measured:
        sections += [_memory(measured), _speed(measured)]
    if "sampling" in results:
        sections.append(_sampling(results["sampling"]))
    if "vocabulary" in results:
        sections.append("Vocabulary head, memory and time:\n\n" + "\n".join(f"    {x}" for x in results["vocabulary"]))
    if "pairs" in results:
        sections.append(_pairs(results["pairs"]))
    return "\n\n".join(sections) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def _machine(machine: Mapping[str, Any], optional: Mapping[str, bool]) -> str:
    gpus = ", ".join(machine.get("gpus", [])) or "no GPU: a rehearsal, whose figures mean nothing"
    there = ", ".join(name for name, is_there in optional.items() if is_there) or "none"
    return f"{gpus}; torch {machine.get('torch')}, CUDA {machine.get('cuda')}. Optional packages there: {there}."


def _parts(lines: Sequence[Line]) -> str:
    rows = [(x["part"], x["status"], f"{x['seconds']:.0f}", f"{x['limit']:.0f}", x.get("why", "")) for x in lines]
    return _table(("part", "status", "seconds", "limit", ""), rows)


def _tests(name: str, found: Mapping[str, Any]) -> str:
    text = f"{name}: {found['passed']} passed, {len(found['failed'])} failed, {len(found['skipped'])} skipped."
    told = [f"- {kind}: `{test}`" for kind in ("failed", "skipped") for test in found[kind]]
    return "\n".join([text, *([""] if told else []), *told])


def _check(report: Mapping[str, Any]) -> str:
    rows = [
        (finding["name"], {True: "ok", False: "WRONG", None: "-"}[finding["ok"]], finding["measured"])
        for finding in report["findings"]
    ]
    verdict = "nothing is wrong" if report["ok"] else "something is wrong"
    return f"`trl-apa check`, {report['machine']}: {verdict}.\n\n" + _table(("property", "", "measured"), rows)


def _memory(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    columns = ("size", "layout", "micro-batch", "phase", "predicted, GiB", "measured, GiB", "off by", "reserved, GiB")
    rows = []
    for size, results in measured.items():
        for row in results:
            reserved = "-" if row["reserved"] is None else f"{row['reserved']:.2f}"
            for phase in ("generate", "step"):
                guess, found = row[f"predicted_{phase}"], row[f"{phase}_peak"]
                figures = (f"{guess:.3f}", f"{found:.3f}", f"{guess / found - 1:+.1%}", reserved)
                rows.append((size, row["layout"], row["micro_batch"], phase, *figures))
    return "Peak memory beside the planner's (docs/memory.md):\n\n" + _table(columns, rows)


def _speed(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    columns = ("size", "layout", "micro-batch", "generate, tokens/s", "MFU", "step, tokens/s", "MFU")
    rows = []
    for size, results in measured.items():
        for row in results:
            cells = [size, row["layout"], row["micro_batch"]]
            for phase, tokens in (("generate", "generated"), ("step", "step")):
                share = row[f"{phase}_mfu"]
                cells += [f"{row[f'{tokens}_tokens_per_second']:.0f}", "-" if share is None else f"{share:.1%}"]
            rows.append(cells)
    return "Speed, prompts of 896 tokens and responses of 128 (docs/performance.md):\n\n" + _table(columns, rows)


def _sampling(speeds: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (x["call"], x["how"], x["rows_together"], x["tokens"], f"{x['seconds']:.2f}", f"{x['tokens_per_second']:.0f}")
        for x in speeds
    ]
    return "Sampling and update, ragged rows (docs/performance.md):\n\n" + _table(
        ("call", "", "rows together", "tokens", "seconds", "tokens/s"), rows
    )


def _launches(passes: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (x["prompt"], x["response"], x["rows"], x["how"], f"{x['seconds']:.4f}", f"{x['ratio']:.2f}", told)
        for x in passes
        for told in [x["why_per_sequence"] or "-"]
    ]
    return (
        "A forward and backward pass by launches of attention, 8 responses a prompt (docs/performance.md):\n\n"
        + _table(("prompt", "response", "rows", "", "seconds", "ratio", "why a launch a sequence"), rows)
    )


def _pairs(curve: Mapping[str, Any]) -> str:
    ends = "; ".join(
        f"{end} iteration: reward {curve[end]['reward']:+.3f}, KL {curve[end]['kl_nats']:.3f} nats"
        for end in ("first", "last")
    )
    return (
        f"Figure 3's options on pairs, APA: {curve['iterations']} iterations, "
        f"{curve['seconds_per_iteration']:.1f} s each; {ends}."
    )
