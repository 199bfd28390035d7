"""FSDP2: every process holds a slice of every weight, gradient and optimizer state, and layers are gathered as needed.

`accelerate launch` with a configuration of type FSDP asks for it. Sharding itself is torch's `fully_shard`, applied
here: the same call on GPUs and, for tests, on CPUs, where accelerate would quietly replicate instead. Sharded states
are saved by torch's distributed checkpoint in its safetensors form, from which any number of processes can go on.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anygen.errors import CheckpointError, ConfigError
from anygen.files import publishing
from anygen.training import processes

ONE_FILE = "state.safetensors"
UNUSED = {
    "FSDP_OFFLOAD_PARAMS": "shard over more processes",
    "FSDP_ACTIVATION_CHECKPOINTING": "write `recompute: selective` or `full` in the recipe",
}
"""What a launcher's configuration may say and nothing here does: refused, with what to do instead."""


def is_asked_for() -> bool:
    """True where the launcher's configuration is of type FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard(module: nn.Module, device: torch.device, *, bf16: bool) -> None:
    """Shard in place: each repeated block alone, so that one is gathered while another computes, then the rest.

    Args:
        module: on any device; its weights become DTensors on `device`.
        device: of this process.
        bf16: gather and compute in bf16; weights, gradients' sums and optimizer stay fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    assert dist.is_initialized(), "processes.join comes first"
    for name, instead in UNUSED.items():
        if os.environ.get(name, "false").lower() == "true":
            raise ConfigError(f"the launcher's configuration sets {name.lower()}, which is not used here: {instead}")
    mesh = init_device_mesh(device.type, (processes.count(),))
    half = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {"mesh": mesh, "reshard_after_forward": reshards(), **({"mp_policy": half} if bf16 else {})}
    module.to(device)
    for block in repeated_blocks(module):
        fully_shard(block, **options)  # type: ignore[call-overload]
    fully_shard(module, **options)  # type: ignore[call-overload]


def reshards() -> bool:
    """True where layers are sliced again between forward and backward, as by default."""
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in ("false", "no_shard", "shard_grad_op")


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost module lists: the layers that a transformer repeats.

    >>> inner = nn.ModuleList([nn.Linear(2, 2)])
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([inner, nn.Linear(2, 2)]))
    >>> [type(block).__name__ for block in repeated_blocks(net)]
    ['ModuleList', 'Linear']
    """
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [block for child in module.children() for block in repeated_blocks(child)]


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its slices; every process must ask."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers by name, whole, on the CPU, tied ones once: what is saved. Every process must ask."""
    own = own_names(module)
    return {name: whole(tensor.detach()).cpu() for name, tensor in module.state_dict().items() if name in own}


def own_names(module: nn.Module) -> set[str]:
    """Names of weights and buffers; of one that has several names (tied embeddings) the first.

    >>> net = nn.ModuleDict({"embed": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 2, bias=False)})
    >>> net["head"].weight = net["embed"].weight
    >>> own_names(net)
    {'embed.weight'}
    """
    return {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}


@contextlib.contextmanager
def publishing_together(folder: Path) -> Iterator[Path]:
    """`files.publishing` on a file system that all processes share: all write, the first one publishes."""
    if processes.rank() == 0:
        with publishing(folder) as temporary:
            processes.told(str(temporary))
            yield temporary
            processes.wait()
    else:
        yield Path(processes.told(None))
        processes.wait()
    processes.wait()


def write(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write every process's slices of `tensors` into `folder`.

    Raises:
        OSError: on every process, where one could not write.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    # safetensors' slices know no tensors without dimensions
    flat = {name: tensor if tensor.ndim else tensor.reshape(1) for name, tensor in tensors.items()}
    try:
        dcp.save(flat, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))  # type: ignore[attr-defined]
    except dcp.api.CheckpointException as error:  # not an Exception: it would pass every other handler
        first = next(iter(error.failures.values()))[0]
        raise OSError(f"a process could not write its shard: {first}") from error


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a checkpoint holds, sharded or not."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in found.items()}  # type: ignore[union-attr]


def read(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill `tensors`, slices or whole, from a checkpoint that any number of processes wrote.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    held = shapes_in(folder)
    for name, tensor in tensors.items():
        if held.get(name) not in (tuple(tensor.shape), tuple(tensor.shape) or (1,)):
            raise CheckpointError(
                f"{folder} does not fit this run: {name} is {held.get(name)}, not {tuple(tensor.shape)}"
            )
    flat = {
        name: tensor if len(held[name]) == tensor.ndim else tensor.view(held[name]) for name, tensor in tensors.items()
    }
    with warnings.catch_warnings():  # that one process alone loads is what we want
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(flat, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())  # type: ignore[attr-defined]
