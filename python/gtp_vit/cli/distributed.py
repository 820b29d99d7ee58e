"""Several processes: what `torchrun` started, or this one alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """The processes of this run.

    Attributes:
        device: where this process computes.
        rank, size: this process's number, and how many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank, in every process; a value is anything that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[Group]:
    """Joins the processes that `torchrun` started: gloo between CPUs, NCCL between GPUs, each process its own GPU.

    Python objects go through gloo on either. Without `torchrun` the group is this process.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield Group(device, dist.get_rank(), size)
    # Not after an error: the others may wait for this process, and torchrun ends them.
    dist.destroy_process_group()
