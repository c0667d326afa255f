"""FSDP2: each rank holds a part of every parameter, of its gradient and of its moments.

torch's ``fully_shard`` brings the parts of a block together while it runs. What a checkpoint holds are whole tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from models.common.layers import TransformerBlock

# What autocast would turn a block's matrices into. They are gathered in it, and autograd then keeps no copies of them.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def shard(model: nn.Module, device: torch.device, ranks: int, precision: str) -> frozenset[str]:
    """Shard a model that every rank has built alike; the names of its scalars, which have shape [1] from then on.

    Each block is a unit in the precision of the run; gradients are summed in float32. What lies around the blocks is
    one unit in float32: embeddings, projections, and the temperature, of which bfloat16 would make 99 of 100.
    """
    scalars = frozenset(name for name, parameter in model.named_parameters() if parameter.dim() == 0)
    for name in scalars:  # a tensor without dimensions has no parts
        above, _, own = name.rpartition(".")
        holder = model.get_submodule(above)
        setattr(holder, own, nn.Parameter(holder.get_parameter(own).detach()[None]))
    model.to(memory_format=torch.contiguous_format)  # rows of other formats do not lie side by side
    mesh = init_device_mesh(device.type, (ranks,))
    policy = MixedPrecisionPolicy(DTYPES.get(precision), torch.float32, cast_forward_inputs=False)
    for module in model.modules():
        if isinstance(module, TransformerBlock):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    return scalars


def local(x: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """A tensor with the parts of all ranks, who call this together."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def placed(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every rank has, as ``like`` lies: on its device, and this rank's part of it alone."""
    x = x.to(like.device)
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x.view(like.shape), like.device_mesh, like.placements, src_data_rank=None)
