"""How long collectives take, by message size and hops: assumptions about a cluster, none of them measured."""

from dataclasses import dataclass
from math import log2


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs. A collective runs within each node, then each GPU's own link joins the nodes.

    Args:
        gpus_per_node: Joined by NVLink.
        nvlink_bytes_per_s: What a ring within a node reaches of the 450 GB/s each way of an H200.
        infiniband_bytes_per_s: What a GPU's own link to other nodes reaches of 400 Gbit/s.
        launch_seconds: Of a collective, whatever its size.
        nvlink_hop_seconds: From GPU to GPU in a node.
        infiniband_hop_seconds: From node to node.
    """

    gpus_per_node: int = 8
    nvlink_bytes_per_s: float = 360e9
    infiniband_bytes_per_s: float = 45e9
    launch_seconds: float = 10e-6
    nvlink_hop_seconds: float = 1e-6
    infiniband_hop_seconds: float = 5e-6

    def all_reduce(self, num_bytes: float, gpus: int) -> float:
        """Seconds of a sum over all GPUs: twice the bytes of a gather, and the hops of a tree."""
        if gpus == 1:
            return 0.0
        inner, nodes = self._split(gpus)
        hops = 2 * log2(inner) * self.nvlink_hop_seconds + 2 * log2(nodes) * self.infiniband_hop_seconds
        return self.launch_seconds + hops + 2 * self._transfer(num_bytes, gpus)

    def gather(self, num_bytes: float, gpus: int) -> float:
        """Seconds in which all GPUs get all `num_bytes`, or sum and scatter them: the hops of a ring."""
        if gpus == 1:
            return 0.0
        inner, nodes = self._split(gpus)
        hops = (inner - 1) * self.nvlink_hop_seconds + (nodes - 1) * self.infiniband_hop_seconds
        return self.launch_seconds + hops + self._transfer(num_bytes, gpus)

    def _split(self, gpus: int) -> tuple[int, int]:
        inner = min(gpus, self.gpus_per_node)
        return inner, gpus // inner

    def _transfer(self, num_bytes: float, gpus: int) -> float:
        inner, nodes = self._split(gpus)
        within = (inner - 1) / inner * num_bytes / self.nvlink_bytes_per_s
        return within + (nodes - 1) / nodes * num_bytes / inner / self.infiniband_bytes_per_s
