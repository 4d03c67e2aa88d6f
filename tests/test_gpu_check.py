"""`make gpu-check`: its parts run in small on a CPU, and one that fails, hangs or lacks something harms no other."""

import json
import os
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_check
from benchmarks.gpu_check import Part, Runner, results_file, verdicts
from benchmarks.gpu_check_tables import tables


ROOT = Path(__file__).resolve().parents[1]


def runner(folder, seconds=60.0):
    return Runner(Namespace(output=folder, seconds=seconds, small=False, data=None), [ROOT])


def part(name, program, seconds=30.0, **options):
    return Part(name, seconds, ("-c", program), results_file(name), **options)


def writes(folder, name, then=""):
    return f"import json, time; json.dump([1], open({str(folder / name)!r} + '.json', 'w')); {then}"


def lines_of(folder):
    return [json.loads(line) for line in (folder / "parts.jsonl").read_text().splitlines()]


def test_a_part_that_fails_does_not_end_the_others(tmp_path, capsys):
    parts = runner(tmp_path)
    parts.run(part("bad", "print('before'); raise ValueError('on purpose')"))
    parts.run(part("good", writes(tmp_path, "good")))
    bad, good = lines_of(tmp_path)
    assert bad["status"] == "failed" and bad["exit_status"] == 1 and bad["last_lines"][-1] == "ValueError: on purpose"
    assert good["status"] == "ok" and good["results"] == [1]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [bad, good]


@pytest.mark.slow
def test_a_part_that_is_late_is_ended_with_all_that_it_started_and_keeps_its_results(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 1)
    child = "import time; time.sleep(60)"
    program = writes(
        tmp_path, "late", f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]);"
    )
    program += "print(p.pid, flush=True); import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    start, parts = time.monotonic(), runner(tmp_path)
    late = parts.run(part("late", program, seconds=3.0))
    assert time.monotonic() - start < 15
    assert late["status"] == "late" and late["results"] == [1] and late["exit_status"] is None
    assert not _runs(int((tmp_path / "late.log").read_text()))
    open_ended = parts.run(part("open", writes(tmp_path, "open", "time.sleep(60)"), seconds=3.0, until_stopped=True))
    assert open_ended["status"] == "ok" and open_ended["results"] == [1]
    without = parts.run(part("without", "import time; time.sleep(60)", seconds=2.0, until_stopped=True))
    assert without["status"] == "late" and without["results"] is None


def _runs(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_parts_without_time_or_packages_are_skipped_and_say_why(tmp_path):
    late = runner(tmp_path, seconds=8.0).run(part("late", "raise ValueError"))
    assert late["status"] == "skipped" and late["why"].endswith("seconds were left of the 10 that it needs")
    lacking = runner(tmp_path).run(part("lacking", "raise ValueError", needs=("json", "no_such_package")))
    assert lacking["status"] == "skipped" and lacking["why"] == "not installed: no_such_package"
    named = runner(tmp_path).run(part("named", "raise ValueError", unless="no --data"))
    assert named["status"] == "skipped" and named["why"] == "no --data"


def test_a_part_sees_one_gpu_unless_it_is_about_two(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    program = "import json, os; json.dump(os.environ['CUDA_VISIBLE_DEVICES'], open({!r}, 'w'))"
    for name, expected in (("one", "3"), ("all", "3,5")):
        given = part(name, program.format(str(tmp_path / f"{name}.json")), all_gpus=name == "all")
        assert runner(tmp_path).run(given)["results"] == expected


def test_wheels_are_put_in_front_of_the_path(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with pytest.raises(SystemExit, match=r"has no file that ends with \.whl"):
        gpu_check.install(wheels, tmp_path / "installed")
    with zipfile.ZipFile(wheels / "carried_along-1.0-py3-none-any.whl", "w") as wheel:
        info = "carried_along-1.0.dist-info"
        wheel.writestr("carried_along.py", "ANSWER = 42\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried-along\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    gpu_check.install(wheels, tmp_path / "installed")
    parts = runner(tmp_path)
    assert not parts.has("carried_along")
    parts.path = [tmp_path / "installed", ROOT]
    assert parts.has("carried_along")
    program = f"import carried_along, json; json.dump(carried_along.ANSWER, open({str(tmp_path / 'w.json')!r}, 'w'))"
    assert parts.run(part("w", program))["results"] == 42


def test_verdicts_are_those_of_the_tests_that_were_done():
    log = (
        "tests/test_gpu.py::test_a[x-y z] PASSED   [ 25%]\ntests/test_gpu.py::test_b SKIPPED (no) [ 50%]\n"
        "tests/test_gpu.py::test_c FAILED [ 75%]\ntests/test_gpu.py::test_d "
    )
    assert verdicts(log, Path()) == {"passed": 1, "failed": ["test_c"], "skipped": ["test_b"]}


def test_the_tables_say_how_far_memory_is_from_the_planners():
    row = {"layout": "one-base", "micro_batch": 4, "reserved": None, "generate_mfu": None, "step_mfu": 0.25}
    row |= {"predicted_generate": 11.0, "generate_peak": 10.0, "predicted_step": 9.0, "step_peak": 12.0}
    row |= {"generated_tokens_per_second": 100.4, "step_tokens_per_second": 2000.0}
    lines = [{"part": "memory-7b", "status": "ok", "seconds": 3.0, "limit": 9.0, "results": [row]}]
    text = tables(lines, {"triton": True})
    assert "| 7b | one-base | 4 | generate | 11.000 | 10.000 | +10.0% | - |" in text
    assert "| 7b | one-base | 4 | step | 9.000 | 12.000 | -25.0% | - |" in text
    assert "| 7b | one-base | 4 | 100 | - | 2000 | 25.0% |" in text


def test_without_a_gpu_nothing_is_run_that_needs_one(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match="torch sees no GPU: --small rehearses on the CPU"):
        gpu_check.main(["--output", str(tmp_path)])
    assert [line["part"] for line in lines_of(tmp_path)] == ["environment"]


@pytest.mark.parametrize("has_bitsandbytes", [True, False])
def test_on_a_gpu_the_layouts_are_ones_that_the_benchmark_has(tmp_path, has_bitsandbytes):
    options = Namespace(output=tmp_path, small=False, data=None)
    planned = {part.name: part for part in gpu_check.parts(options, has_bitsandbytes, 1)}
    assert planned["two-ranks"].unless and planned["pairs"].unless == "no --data"
    for scale in ("160m", "1b", "7b"):
        command = planned[f"memory-{scale}"].command
        layouts = command[command.index("--layouts") + 1 : command.index("--micro-batches")]
        assert gpu.scale_of(scale) and set(layouts) <= set(gpu.LAYOUTS)
        quantised = [layout for layout in layouts if layout in ("one-base", "separate-8bit")]
        assert quantised == (["one-base"] if has_bitsandbytes and scale != "160m" else [])


@pytest.mark.slow
def test_every_part_is_rehearsed_in_small_on_the_cpu(tmp_path):
    data = tmp_path / "pairs.jsonl"
    prompts = [f"\n\nHuman: What is {number} plus {number % 7}?\n\nAssistant:" for number in range(60)]
    rows = [{"chosen": f"{prompt} It is {len(prompt)}.", "rejected": f"{prompt} I do not know."} for prompt in prompts]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--small", "--seconds", "3000"]
    command += ["--output", str(tmp_path / "out"), "--data", str(data)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    lines = {line["part"]: line for line in lines_of(tmp_path / "out")}
    assert done.returncode == 0, lines
    assert {name: line["status"] for name, line in lines.items()} == dict.fromkeys(lines, "ok")
    names = [
        "environment",
        "tests",
        "two-ranks",
        "check",
        "launches",
        "memory-tiny",
        "sampling",
        "vocabulary",
        "pairs",
    ]
    assert list(lines) == names
    results = {name: line["results"] for name, line in lines.items()}
    assert results["tests"]["passed"] > 15 and results["tests"]["failed"] == []
    assert results["two-ranks"] == {"passed": 1, "failed": [], "skipped": []}
    assert results["check"]["ok"] and len(results["check"]["findings"]) > 20
    assert [row["layout"] for row in results["memory-tiny"]] == ["full", "one-base-bf16"]
    assert [row["how"] for row in results["launches"]][::4] == ["prompt once, one launch a layer", "padded"]
    assert len(results["sampling"]) == 6 and len(results["vocabulary"]) == 2
    assert results["pairs"]["iterations"] == 2
    text = (tmp_path / "out" / "tables.md").read_text()
    assert done.stdout.endswith(text + "\n") and "off by" in text and "MFU" in text
    assert not (tmp_path / "out" / "scratch").exists()
