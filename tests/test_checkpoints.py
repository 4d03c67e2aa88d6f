"""Checkpoints as files: complete until the successor is, and no run's taken for another's."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest

from trl_apa.trainer.checkpoints import (
    MANIFEST,
    IncompleteCheckpoint,
    checkpoints_in,
    clean_up,
    delete_surplus,
    newest_checkpoint,
    problem_with,
    put_in_place,
    read_manifest,
    staging_folder,
    write_manifest,
)
from trl_apa.trainer.run_identity import Run


FILES = (
    *("config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "apa_state_0.pt"),
    *("value_model/config.json", "value_model/model.safetensors"),
    *("value_model/value_model.json", "value_model/value_head.safetensors"),
)
A, B = Run("aaaaaaaaaaaa", started=100.0), Run("bbbbbbbbbbbb", started=200.0)


def written(output_dir, step, run, content="weights", **manifest):
    """A folder with every file of a checkpoint, complete but for its name."""
    folder = staging_folder(output_dir, step, run)
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{content} {step}")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    write_manifest(folder, {"version": "0", "step": step, "resumable": True, "run": run.as_dict(), **manifest})
    return folder


def saved(output_dir, step, run, **manifest):
    return put_in_place(written(output_dir, step, run, **manifest), step, run)


def names(output_dir):
    return sorted(path.name for path in Path(output_dir).iterdir())


def test_a_checkpoint_has_its_name_only_when_it_is_complete(tmp_path):
    folder = written(tmp_path, 4, A)
    assert names(tmp_path) == ["_incomplete-checkpoint-4-aaaaaaaaaaaa"] and newest_checkpoint(tmp_path) is None
    place = put_in_place(folder, 4, A)
    assert names(tmp_path) == ["checkpoint-4"] and problem_with(place) is None
    assert Run(**read_manifest(place)["run"]) == A


@pytest.mark.parametrize("name", [*FILES, "trainer_state.json"])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_checkpoint_that_lacks_a_file_is_refused_by_the_name_of_the_file(tmp_path, name, with_manifest):
    place = saved(tmp_path, 4, A)
    if not with_manifest:
        (place / MANIFEST).unlink()
    assert problem_with(place) is None
    (place / name).unlink()
    assert problem_with(place) in (f"{name} is missing", f"{name} cannot be read")


@pytest.mark.parametrize("name", [*FILES, "trainer_state.json", MANIFEST])
def test_a_flipped_bit_and_a_lost_end_are_found_in_every_file(tmp_path, name):
    place = saved(tmp_path, 4, A)
    file = place / name
    before = file.read_bytes()
    for position in (0, len(before) // 2, len(before) - 1):
        flipped = bytearray(before)
        flipped[position] ^= 1
        file.write_bytes(flipped)
        assert name in problem_with(place)
    for end in (0, len(before) - 1):
        file.write_bytes(before[:end])
        assert name in problem_with(place)
    file.write_bytes(before)
    assert problem_with(place) is None


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "[" * 100_000, '{"global_step": "four"}', '{"global_step": 5}', "\x00", '{"x": 1}']
)
def test_a_state_that_cannot_be_read_or_is_of_another_step_is_no_checkpoint(tmp_path, text):
    place = saved(tmp_path, 4, A)
    (place / MANIFEST).unlink()
    (place / "trainer_state.json").write_text(text)
    assert problem_with(place).startswith("trainer_state.json ")


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "[" * 100_000, '{"content": {}, "xxh3_128": ""}', "\x00"])
def test_a_manifest_that_cannot_be_read_is_no_checkpoint_and_is_named(tmp_path, text):
    saved(tmp_path, 4, A)
    damaged = saved(tmp_path, 6, A)
    (damaged / MANIFEST).write_text(text)
    with pytest.warns(UserWarning, match=rf"checkpoint-6 is incomplete \({MANIFEST} "):
        assert newest_checkpoint(tmp_path).name == "checkpoint-4"


def test_a_checkpoint_of_a_later_format_and_one_without_optimizer_are_refused(tmp_path):
    place = saved(tmp_path, 4, A, resumable=False)
    assert "save_only_model" in problem_with(place)
    manifest = read_manifest(place)
    write_manifest(place, {**manifest, "format": 99, "version": "9.9"})
    assert problem_with(place) == f"{MANIFEST} was written by a later version of trl_apa: 9.9"


def test_the_predecessor_of_a_rewritten_checkpoint_is_there_until_the_new_one_has_its_name(tmp_path, monkeypatch):
    """Killed at each rename: a complete checkpoint of this step remains, and gets its name back."""
    saved(tmp_path, 4, A, content="old")
    renames = []
    rename = Path.rename

    def killed_at(number):
        def renaming(self, target):
            if len(renames) == number:
                raise KeyboardInterrupt
            renames.append(target)
            return rename(self, target)

        return renaming

    for number in range(2):
        renames.clear()
        folder = written(tmp_path, 4, A.resumed([A]), content="new")
        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", killed_at(number))
            with pytest.raises(KeyboardInterrupt):
                put_in_place(folder, 4, A)
        clean_up(tmp_path)
        assert problem_with(tmp_path / "checkpoint-4") is None
        clean_up(tmp_path, A)
        assert names(tmp_path) == ["checkpoint-4"]
    assert (tmp_path / "checkpoint-4" / "model.safetensors").read_text() == "new 4"


def test_another_runs_checkpoint_of_the_same_step_is_moved_not_deleted(tmp_path):
    saved(tmp_path, 4, A, content="of a")
    with pytest.warns(
        UserWarning, match=r"checkpoint-4 is of another run; it was moved to .*_older-runs/aaaaaaaaaaaa"
    ):
        saved(tmp_path, 4, B, content="of b")
    with pytest.warns(UserWarning, match="_older-runs/bbbbbbbbbbbb"):
        saved(tmp_path, 4, A, content="of a again")
    with pytest.warns(UserWarning, match=r"_older-runs/aaaaaaaaaaaa/checkpoint-4\.1"):
        saved(tmp_path, 4, B, content="of b again")
    moved = tmp_path / "_older-runs"
    places = [moved / A.id / "checkpoint-4", moved / B.id / "checkpoint-4", moved / A.id / "checkpoint-4.1"]
    places.append(tmp_path / "checkpoint-4")
    texts = [(place / "model.safetensors").read_text() for place in places]
    assert texts == ["of a 4", "of b 4", "of a again 4", "of b again 4"]
    assert all(problem_with(place) is None for place in places)


def test_the_newest_run_is_resumed_whatever_the_steps_of_older_ones_are(tmp_path):
    for step in (4, 12):
        saved(tmp_path, step, A)
    for step in (2, 6):
        saved(tmp_path, step, B)
    assert newest_checkpoint(tmp_path).name == "checkpoint-6"
    os.remove(tmp_path / "checkpoint-6" / "optimizer.pt")
    with pytest.warns(UserWarning, match="checkpoint-6 is incomplete .optimizer.pt is missing"):
        assert newest_checkpoint(tmp_path).name == "checkpoint-2"
    os.remove(tmp_path / "checkpoint-2" / "optimizer.pt")
    with (
        warnings.catch_warnings(),
        pytest.raises(IncompleteCheckpoint, match=r"no complete checkpoint of run bbbb.*older run.*checkpoint-12"),
    ):
        warnings.simplefilter("ignore")
        newest_checkpoint(tmp_path)


def test_a_later_attempt_is_newer_though_it_resumed_from_an_earlier_step(tmp_path):
    for step in (4, 6, 8):
        saved(tmp_path, step, A)
    again = A.resumed(checkpoint.run for checkpoint in checkpoints_in(tmp_path))
    assert (again.id, again.attempt) == (A.id, 2)
    saved(tmp_path, 5, again)
    assert newest_checkpoint(tmp_path).name == "checkpoint-5"


def test_checkpoints_of_0_1_0_are_resumed_where_there_are_no_others(tmp_path):
    for step in (4, 8):
        (saved(tmp_path, step, A) / MANIFEST).unlink()
    assert newest_checkpoint(tmp_path).name == "checkpoint-8"
    saved(tmp_path, 2, B)
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"


def test_only_the_runs_own_checkpoints_count_and_go(tmp_path):
    for step in (1, 2, 3):
        saved(tmp_path, step, A)
    (saved(tmp_path, 4, A) / MANIFEST).unlink()
    (tmp_path / "checkpoint-99").mkdir()
    for step in (10, 11, 12, 13):
        saved(tmp_path, step, B)
        delete_surplus(tmp_path, B, 2, keep=str(tmp_path / "checkpoint-10"))
    kept = ["checkpoint-10", "checkpoint-13"]
    others = ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-99"]
    assert names(tmp_path) == sorted([*kept, *others])
    delete_surplus(tmp_path, B, 1, keep=None)
    assert names(tmp_path) == sorted(["checkpoint-13", *others])
    delete_surplus(tmp_path, B, None, keep=None)
    assert names(tmp_path) == sorted(["checkpoint-13", *others])


def test_what_a_killed_process_left_is_deleted_by_its_own_run_alone(tmp_path):
    unfinished = written(tmp_path, 6, A)
    (unfinished / MANIFEST).unlink()
    for kind in ("replaced", "deleted"):
        shutil.copytree(saved(tmp_path, 2, A), tmp_path / f"_{kind}-checkpoint-2-{A.id}", dirs_exist_ok=True)
    left = names(tmp_path)
    clean_up(tmp_path)
    clean_up(tmp_path, B)
    assert names(tmp_path) == left
    clean_up(tmp_path, A)
    assert names(tmp_path) == ["checkpoint-2"]


def test_new_runs_are_later_than_all_others_and_have_ids_of_their_own():
    tomorrow = Run("cccccccccccc", started=1e12)
    runs = [Run.new([A, tomorrow]) for _ in range(3)]
    assert len({run.id for run in runs}) == 3 and all(run.started > tomorrow.started for run in runs)
