"""Run a function in two processes on this machine and hand back what each rank returned."""

import datetime
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


WORLD_SIZE = 2
# Imported once for all processes that a process of pytest starts, and not by each of them.
multiprocessing.set_forkserver_preload(["trl_apa.trainer.apa", "transformers.models.llama.modeling_llama", "peft"])


def run_in_two_processes(function: Callable[..., Any], *args: Any, backend: str = "gloo") -> list[Any]:
    """
    `[function(0, *args), function(1, *args)]`, each in its own process of one initialised group; with NCCL each has
    the GPU of its rank.

    `function` is defined at module level (it is imported by the processes), and its result can be pickled. An
    exception in either process is raised here, and ends the other one.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = (folder, dict(os.environ), function, args, backend)
        # What has looked for a GPU before it is forked cannot use one afterwards; and the path of the server's socket,
        # in the folder of temporary files, may have a hundred letters.
        short = len(tempfile.gettempdir()) < 70
        method = "forkserver" if backend == "gloo" and short else "spawn"
        mp.start_processes(_run_rank, args=given, nprocs=WORLD_SIZE, start_method=method)
        return [torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=False) for rank in range(WORLD_SIZE)]


def _run_rank(
    rank: int,
    folder: str,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    backend: str,
) -> None:
    # Those of the test, not of the one that started the server.
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        store=dist.FileStore(os.path.join(folder, "store"), WORLD_SIZE),
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        torch.save(function(rank, *args), os.path.join(folder, f"{rank}.pt"))
        # the store's file must outlive the slower rank
        dist.barrier()
    finally:
        dist.destroy_process_group()
