"""A wire for weights between TRL's client and a real vLLM server on a CPU, in place of NCCL, which needs a GPU.

The server's workers import this file (`--worker-extension-cls tests.vllm_wire.Extension`), so that it knows the
engine by name. The requests, what they announce, the order of the tensors and how vLLM loads them are as with NCCL.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine


HOST = "127.0.0.1"


class StoreEngine(NCCLWeightTransferEngine):
    """The server's side: tensors come one by one through torch's TCP store."""

    def init_transfer_engine(self, init_info):
        self.model_update_group = StatelessProcessGroup.create(
            init_info.master_address,
            init_info.master_port,
            rank=init_info.rank_offset,
            world_size=init_info.world_size,
        )

    def receive_weights(self, update_info):
        announced = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        for name, dtype, shape in announced:
            tensor = self.model_update_group.broadcast(None, src=0)
            assert (tensor.dtype, list(tensor.shape)) == (getattr(torch, dtype), shape), name
            self.model.load_weights([(name, tensor)])


WeightTransferEngineFactory.register_engine("store", StoreEngine)


class Extension:
    """Nothing; asking for it imports this file."""


def install(monkeypatch):
    """The trainer's side."""
    from trl.generation import vllm_client

    def init_communicator(self, device):
        assert self.get_server_info()["weight_transfer_config"]["backend"] == "store"
        world = {"world_size": self.get_world_size() + 1}
        init_info = {"master_address": HOST, "master_port": self.group_port, "rank_offset": 1, **world}
        with ThreadPoolExecutor(max_workers=1) as executor:
            joined = executor.submit(
                self._post, f"{self.base_url}/init_weight_transfer_engine", json={"init_info": init_info}
            )
            self.communicator = StatelessProcessGroup.create(HOST, self.group_port, rank=0, **world)
            joined.result()

    def send(iterator, group, src, post_iter_func):
        for item in iterator:
            group.broadcast(post_iter_func(item), src)

    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", init_communicator)
    monkeypatch.setattr(vllm_client, "packed_nccl_broadcast_producer", send)
