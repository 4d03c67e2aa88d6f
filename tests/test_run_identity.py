"""A run is told by what it learns from: the same rows and weights have one fingerprint, others another."""

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets

from tests.tiny import tiny_model
from trl_apa.trainer.run_identity import (
    ROWS_A_BATCH,
    data_fingerprint,
    differences,
    initial_policy_fingerprint,
    weights_fingerprint,
)


COUNT = 2 * ROWS_A_BATCH + 500
ROWS = [{"prompt": f"w{i}" * (i % 5), "target": [i] * (i % 3), "score": i / 7, "note": None} for i in range(COUNT)]


def tables(rows, folder):
    """The same rows, however the table came to be."""
    table = Dataset.from_list(rows)
    yield table
    yield Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]}, features=table.features)
    yield concatenate_datasets([table.select(range(700)), table.select(range(700, len(rows)))])
    yield concatenate_datasets([table, table]).select(range(len(rows)))
    yield table.shuffle(seed=1).select(np.argsort(table.shuffle(seed=1).with_format("numpy")["score"]))
    yield table.map(lambda row: row, cache_file_name=str(folder / "map.arrow"))
    table.save_to_disk(folder / "table")
    yield Dataset.load_from_disk(folder / "table")


def test_equal_rows_have_one_fingerprint(tmp_path):
    assert len({data_fingerprint(table) for table in tables(ROWS, tmp_path)}) == 1
    assert data_fingerprint(ROWS) == data_fingerprint([dict(row) for row in ROWS])


@pytest.mark.parametrize("place", [0, ROWS_A_BATCH, COUNT - 1])
@pytest.mark.parametrize("change", [{"prompt": "other"}, {"target": [9]}, {"score": -1.0}])
def test_one_changed_cell_changes_it(place, change):
    changed = [*ROWS[:place], ROWS[place] | change, *ROWS[place + 1 :]]
    assert data_fingerprint(Dataset.from_list(changed)) != data_fingerprint(Dataset.from_list(ROWS))
    assert data_fingerprint(changed) != data_fingerprint(ROWS)


def test_order_length_and_columns_count():
    table = Dataset.from_list(ROWS)
    others = [table.shuffle(seed=0), table.select(range(COUNT - 1)), table.remove_columns("note")]
    assert len({data_fingerprint(other) for other in [table, *others]}) == 4


def test_tensors_in_rows_are_read_and_streams_are_not():
    one, other = ([{"input_ids": torch.tensor([1, last])}] for last in (2, 3))
    assert data_fingerprint(one) == data_fingerprint([{"input_ids": torch.tensor([1, 2])}]) != data_fingerprint(other)
    assert data_fingerprint(IterableDataset.from_generator(lambda: iter(ROWS))) is None


def test_models_of_one_shape_are_told_apart_by_their_weights():
    same, other = (initial_policy_fingerprint(tiny_model(), tiny_model(seed=seed)) for seed in (0, 1))
    assert same == initial_policy_fingerprint(tiny_model(seed=2), tiny_model()) != other
    halves = [torch.ones(3, 4, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert weights_fingerprint(halves[:1]) != weights_fingerprint(halves[1:])
    assert weights_fingerprint([torch.ones(3, 4)]) != weights_fingerprint([torch.ones(4, 3)])


def test_what_is_unknown_is_no_difference():
    then = {"train_dataset": None, "reward_funcs": ["a"], "ref_model": "x", "seed": None}
    now = {"train_dataset": "b", "reward_funcs": None, "ref_model": "y", "seed": 1, "new": 2}
    assert differences(then, now) == {"ref_model": ("x", "y"), "seed": (None, 1)}
