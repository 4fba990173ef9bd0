# SPDX-License-Identifier: Apache-2.0
"""Training on many processes and hosts with PyTorch's own engines: `torchrun`, DistributedDataParallel and FSDP2."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lwd_learner.ranks import ALONE, Ranks, RanksDiverged

Strategy = Literal["ddp", "fsdp"]
_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_TIMEOUT = timedelta(minutes=10)  # of one collective; the first rank may be ingesting meanwhile


class LaunchRefused(Exception):
    """`torchrun` was started in a way in which its processes would not find each other."""


def launched() -> bool:
    """Whether `torchrun` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def local_device(device: str) -> torch.device:
    """cpu, or for cuda under `torchrun` the GPU with the local rank's number."""
    return (
        torch.device(device, int(os.environ["LOCAL_RANK"]))
        if device == "cuda" and launched()
        else torch.device(device)
    )


# Process groups, which outlive the networks that use them. If the last reference to one is DistributedDataParallel's, it is
# destroyed with the interpreter's lock held, and joins a thread that waits for this lock: two runs of four hung at their
# end, and none of twelve since.
_GROUPS: list[dist.ProcessGroup | None] = []


@contextmanager
def joined(strategy: Strategy, device: str = "cpu", holds: bool = False) -> Iterator[Ranks]:
    """The ranks that `torchrun` started; alone without it. device: see `local_device`; holds:
    whether this process can reach what the run starts from. The first that can becomes the first rank: which host gets
    torchrun's rank 0 is chance.

    Raises LaunchRefused.
    """
    if not launched():
        yield ALONE
        return
    _require_new_store()
    place = local_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=_TIMEOUT)
    _GROUPS.append(dist.group.WORLD)
    try:
        root = _first_with(holds, place)
        yield ShardedGroup(place, root) if strategy == "fsdp" else Group(place, root)
    finally:
        dist.destroy_process_group()


def _require_new_store() -> None:
    """torchrun keeps one store for all restarts unless told otherwise. The addresses of processes that are gone are
    still in it, and new ones wait for them, for ever or until they fail."""
    restarts = int(os.environ["TORCHELASTIC_MAX_RESTARTS"])
    if restarts > 0 and os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True":
        raise LaunchRefused(
            f"torchrun may restart these processes {restarts} times, but they would look for each other where the dead"
            f" ones were; start it as `{_OWN_STORE}=1 torchrun ...`"
        )


def _first_with(holds: bool, device: torch.device) -> int:
    """The lowest of torchrun's ranks where it is so; 0 where nowhere."""
    size = dist.get_world_size()
    mine = torch.tensor(dist.get_rank() if holds else size, device=device)
    dist.all_reduce(mine, dist.ReduceOp.MIN)
    return int(mine) % size


class Group(Ranks):
    """All processes of the default process group; every one holds all parameters (DistributedDataParallel)."""

    def __init__(self, device: torch.device, root: int = 0) -> None:
        """device: of the tensors that are sent; root: torchrun's number of what is the first rank here."""
        self.size = dist.get_world_size()
        self.index = (dist.get_rank() - root) % self.size
        self.keeper = os.environ["LOCAL_RANK"] == "0"
        self.device = device
        self._root = root

    def sampling(self, generator: torch.Generator) -> torch.Generator:
        seed = int(torch.randint(2**62, (), generator=generator))
        return torch.Generator().manual_seed(seed + self.index)

    def mean(self, value: Tensor) -> Tensor:
        return self.total(value) / self.size

    def total(self, value: Tensor) -> Tensor:
        everywhere = value.detach().clone()
        dist.all_reduce(everywhere)
        return everywhere

    def means(self, numbers: Mapping[str, float]) -> dict[str, float]:
        means = self.mean(self._numbers(list(numbers.values())))
        return dict(zip(numbers, means.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        return bool(self.total(self._numbers([float(flag)])) > 0)

    def given(
        self, tensors: Mapping[str, Tensor], record: dict[str, Any]
    ) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        shapes = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
        text = json.dumps([shapes, record]).encode()
        sent = torch.zeros(self.newest(len(text)), dtype=torch.uint8, device=self.device)
        if self.first:
            sent.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(sent, src=self._root)
        shapes, record = json.loads(bytes(sent.tolist()))
        got = {}
        for name, (dtype, shape) in shapes.items():
            tensor = tensors[name] if self.first else torch.empty(shape, dtype=getattr(torch, dtype))
            moved = tensor.to(self.device).contiguous()
            dist.broadcast(moved, src=self._root)
            got[name] = moved.cpu()
        return got, record

    def newest(self, number: int) -> int:
        sent = torch.tensor(number, device=self.device)
        dist.broadcast(sent, src=self._root)
        return int(sent)

    def least(self, number: int) -> int:
        sent = torch.tensor(number, device=self.device)
        dist.all_reduce(sent, dist.ReduceOp.MIN)
        return int(sent)

    def require_equal(self, tensors: Mapping[str, Tensor]) -> None:
        sums = torch.stack([tensor.detach().double().sum().to(self.device) for tensor in tensors.values()])
        low, high = sums.clone(), sums.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        different = [name for name, a, b in zip(tensors, low, high, strict=True) if a != b]
        if different:
            raise RanksDiverged(
                f"{self.size} ranks hold different values of {', '.join(different[:3])}; nothing was saved"
            )

    def wait(self) -> None:
        dist.barrier()

    def place(self, module: nn.Module) -> nn.Module:
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, src=self._root)
        return module

    def engine(self, module: nn.Module) -> nn.Module:
        # Networks here have constant buffers only. A network that is called several times before one `backward`, as
        # the flow expert is by adjoint matching, has its gradient reduced once.
        devices = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():  # a new name that older versions do not know
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)

    def bare(self, module: nn.Module) -> nn.Module:
        return module.module if isinstance(module, DistributedDataParallel) else module

    def _numbers(self, numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=self.device)


class ShardedGroup(Group):
    """As `Group`, with parameters, gradients and moments of the optimiser spread over the ranks (FSDP2).

    Every element of a network's module lists is gathered when it is needed and released after it; so is the rest. All
    ranks must therefore call a network equally often, also without gradient.
    """

    sharded = True

    def __init__(self, device: torch.device, root: int = 0) -> None:
        super().__init__(device, root)
        self._mesh = init_device_mesh(device.type, (self.size,))
        # FSDP's modules cannot be copied: plain ones without memory are kept to make copies from.
        self._blanks: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
        # Nothing here writes into what a network returned.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)

    def place(self, module: nn.Module) -> nn.Module:
        if module in self._blanks:  # or a copy of one: it is placed
            return module
        blank = copy.deepcopy(module).to("meta")
        module = self._shard(super().place(module))
        self._blanks[module] = blank
        return module

    def copy(self, module: nn.Module) -> nn.Module:
        blank = self._blanks[module]
        copied = self._shard(copy.deepcopy(blank)).to_empty(device=self.device)
        with torch.no_grad():
            pairs = zip(
                (*copied.parameters(), *copied.buffers()),
                (*module.parameters(), *module.buffers()),
                strict=True,
            )
            for mine, theirs in pairs:
                mine.copy_(theirs)
        self._blanks[copied] = blank
        return copied

    def engine(self, module: nn.Module) -> nn.Module:
        return module

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor):
            return whole
        return distribute_tensor(whole.to(self.device), like.device_mesh, like.placements)

    def _shard(self, module: nn.Module) -> nn.Module:
        lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
        # What is read between two calls (slow copies, saved states) must lie in parts then, also the outermost.
        for block in (*(block for each in reversed(lists) for block in each), module):
            fully_shard(block, mesh=self._mesh, reshard_after_forward=True)
        return module
