"""The identity of a training run: its id, and a description of its inputs."""

import hashlib
import json
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_apa.models.network_parts import Network
from trl_apa.models.partitioned import is_partitioned


ROWS_A_BATCH = 1000
# Rows of a data set that is no table, and elements of a tensor, that a fingerprint is made from.
ROWS_SAMPLED, ELEMENTS_SAMPLED = 1000, 64
# Options for folders, output and resuming, which do not change the result of training.
NOT_COMPARED = frozenset(
    {
        "_n_gpu",
        "disable_tqdm",
        "exp_name",
        "hub_token",
        "local_rank",
        "log_level",
        "logging_dir",
        "output_dir",
        "push_to_hub_token",
        "resume_anyway",
        "resume_from_checkpoint",
        "run_name",
    }
)
# Differences that no checkpoint can be resumed over: its weights or its files would not fit.
NEVER_OVERRIDDEN = ("networks", "world_size")
DATA, REWARDS, REFERENCE = "train_dataset", "reward_funcs", "ref_model"


@dataclass(frozen=True)
class Run:
    """The identity of a run, which its checkpoints carry.

    Args:
        id: random, 12 hexadecimal digits.
        started: seconds since 1970, later than that of every run with a checkpoint in the same folder.
        attempt: 1, and one more each time that the run is resumed. A later attempt's checkpoints are newer, also where
            it resumed from a step before the last one.
    """

    id: str
    started: float
    attempt: int = 1

    @classmethod
    def new(cls, others: Iterable["Run"]) -> "Run":
        """A run that starts now, after `others`. No random number of the training is used up."""
        after = max((other.started for other in others), default=0.0) + 1e-3
        return cls(uuid.uuid4().hex[:12], max(time.time(), after))

    def resumed(self, others: Iterable["Run"]) -> "Run":
        """The next attempt of this run, after those among `others`."""
        attempts = [other.attempt for other in others if other.id == self.id]
        return Run(self.id, self.started, 1 + max([self.attempt, *attempts]))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.id} (started {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.started))})"


def describe_networks(module: nn.Module) -> str:
    """Classes of the transformers inside, and how many weights there are and are trained."""
    kinds = [type(part).__name__ for part in module.modules() if isinstance(part, PreTrainedModel | PeftModel)]
    weights = [parameter.numel() for parameter in module.parameters()]
    trained = [parameter.numel() for parameter in module.parameters() if parameter.requires_grad]
    outermost = ", ".join(dict.fromkeys(kinds))
    return f"{outermost} with {sum(weights):,} weights in {len(weights)} parts, {sum(trained):,} of them trained"


def data_fingerprint(dataset: Any) -> str | None:
    """A hash of a data set's rows; None for a stream, which cannot be read twice.

    All rows of a table or a list count; of another data set, whose rows may take long to make, its length and up to
    `ROWS_SAMPLED` of them, evenly spaced.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return None
    digest = hashlib.blake2b(digest_size=16)
    digest.update(str(len(dataset)).encode())
    if isinstance(dataset, Dataset):
        table = dataset.with_format("arrow")
        for start in range(0, len(dataset), ROWS_A_BATCH):
            digest.update(_serialised(table[start : start + ROWS_A_BATCH]))
    else:
        step = 1 if isinstance(dataset, list | tuple) else max(1, len(dataset) // ROWS_SAMPLED)
        for row in range(0, len(dataset), step):
            digest.update(json.dumps(dataset[row], sort_keys=True, default=Hasher.hash).encode())
    return digest.hexdigest()


def _serialised(table: pa.Table) -> bytes:
    """The same bytes for the same rows, whatever the table's chunks."""
    sink = pa.BufferOutputStream()
    # Taken row by row, or a slice of a column would keep the offsets that it has in the column.
    plain = table.take(pa.array(range(len(table)), pa.int64())).combine_chunks().replace_schema_metadata(None)
    with pa.ipc.new_stream(sink, plain.schema) as stream:
        stream.write_table(plain)
    serialised: bytes = sink.getvalue().to_pybytes()
    return serialised


def weights_fingerprint(parameters: Iterable[Tensor]) -> str | None:
    """A hash of the shapes and of up to `ELEMENTS_SAMPLED` elements of each tensor; None if ZeRO-3 shards them.

    It cheaply distinguishes models of the same shape; it does not detect a flipped bit.
    """
    digest = hashlib.blake2b(digest_size=16)
    for parameter in parameters:
        if is_partitioned(parameter):
            return None
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // ELEMENTS_SAMPLED)]
        digest.update(str(tuple(parameter.shape)).encode())
        digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def initial_policy_fingerprint(policy: Network, reference: Network | None) -> str | None:
    """A hash of pi_init: the reference's weights, or the policy's frozen weights."""
    parameters = policy.parameters() if reference is None else reference.parameters()
    return weights_fingerprint(p for p in parameters if reference is not None or not p.requires_grad)


def comparable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON keeps them, without those in `NOT_COMPARED`."""
    kept = {name: value for name, value in options.items() if name not in NOT_COMPARED}
    as_json: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return as_json


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The differences between two descriptions in the names that both have: name to (then, now).

    A fingerprint, or the names of the rewards, that is unknown (None) in either is no difference.
    """
    unknown = (DATA, REWARDS, REFERENCE)
    differing = {name: (then[name], now[name]) for name in now if name in then and then[name] != now[name]}
    return {name: pair for name, pair in differing.items() if not (name in unknown and None in pair)}


def say(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """`kl_coef was 0.1, is 0.2`, for each of `differences`."""
    hashes = {DATA: "has other rows", REFERENCE: "is another model (pi_init)"}
    return ", ".join(
        f"{name} {hashes[name]}" if name in hashes else f"{name} was {then!r}, is {now!r}"
        for name, (then, now) in differing.items()
    )
