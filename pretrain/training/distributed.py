"""The processes of one training: alone, or several under `torchrun` (gloo on CPUs, nccl on GPUs).

`ddp` copies the model to each process; `fsdp` (FSDP2) shards parameters, gradients and optimiser state.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from pretrain.core.errors import PretrainError


@dataclass(frozen=True)
class World:
    """Which process this is, of how many, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of some numbers over all processes; an exchange between hosts, which no device waits for."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers)
        return numbers.tolist()

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


def join(device: torch.device) -> World:
    """The world that `torchrun` set up (its environment variables), or the one process there is."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # The others wait while the first prepares data, however long that takes.
        backends, timeout = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timedelta(days=7)
        # Processes that are started again meet in the store of those before, which holds the addresses of the dead.
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backends, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(dist.get_rank(), size, device)


def wrap(trainee: nn.Module, blocks: list[nn.Module], world: World, strategy: str) -> nn.Module:
    """The module to call for a distributed step; `trainee` itself when alone."""
    if strategy not in ("ddp", "fsdp"):
        raise PretrainError(f"strategy {strategy!r}: accepted: ddp, fsdp")
    if world.size == 1:
        return trainee
    if strategy == "ddp":
        return nn.parallel.DistributedDataParallel(trainee, broadcast_buffers=False)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(trainee, mesh=mesh)
    return trainee


@contextmanager
def synchronised(wrapped: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are exchanged in the step's last micro-batch only."""
    if isinstance(wrapped, nn.parallel.DistributedDataParallel) and not last:
        with wrapped.no_sync():
            yield
        return
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
    yield


def gather(module: nn.Module, world: World) -> None:
    """In the first process, put whole parameters where sharded ones are, for saving; every process must call it.

    The others keep their shards and are never given more than one parameter whole at a time.
    """
    seen: dict[int, nn.Parameter | None] = {}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if isinstance(parameter, DTensor):
                if id(parameter) not in seen:
                    whole = parameter.full_tensor().detach()
                    seen[id(parameter)] = nn.Parameter(whole, parameter.requires_grad) if world.main else None
                if world.main:
                    part._parameters[name] = seen[id(parameter)]


@contextmanager
def unsharded(wrapped: nn.Module) -> Iterator[None]:
    """While open, a sharded model can be called as an ordinary one, its blocks and its parts."""
    sharded = [module for module in wrapped.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    yield
    for module in sharded:
        module.reshard()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor (all processes must call it); others are handed back as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
