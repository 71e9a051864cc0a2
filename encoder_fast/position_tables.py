"""What attention by distance reads beside its tokens: the same in every forward.

The tables of DeBERTa's layers: each projects the shared table of position embeddings to a key,
a query or both for each row. And which row of its table a distance has, in DeBERTa and MPNet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from encoder_fast.ops import add_layer_norm, linear
from encoder_fast.ops.disentangled_attention import make_row_of_distance
from encoder_fast.spec import (
    DisentangledAttention,
    LayerSpec,
    RelativeBias,
    RelativePositions,
    epsilon,
)


def row_of_distance(
    positions: RelativePositions | None, bias: RelativeBias | None
) -> Tensor | None:
    """The row of its table for each distance, by whichever of the two an encoder has.

    Made on the model's device, as in the original: a logarithm decides between neighbouring rows.
    """
    if positions is not None:
        device = positions.table.weight.device
        return make_row_of_distance(
            positions.span, positions.buckets, positions.max_distance, device
        )
    if bias is not None:
        device = bias.table.weight.device
        return bias.bucket_of(torch.arange(-bias.reach, bias.reach + 1, device=device))
    return None


def project_positions(
    positions: RelativePositions | None, layers: Sequence[LayerSpec], backend: str
) -> list[tuple[Tensor | None, Tensor | None]]:
    """The tables ``(rows, H, D)`` for keys and for queries of each layer, as the model is now.

    All layers are one GEMM, over weights that are copied to lie side by side; on the backend
    ``cpu``, which keeps the tables, each is one of oneDNN's.
    """
    wanted = [_projections(layer) for layer in layers]
    linears = [module for pair in wanted for module in pair if module is not None]
    if positions is None or not linears:
        return [(None, None)] * len(layers)
    table = positions.table.weight.detach()[: 2 * positions.span]
    norm = positions.norm
    if norm is not None:
        table = add_layer_norm.operator.run(
            table, None, norm.weight, norm.bias, epsilon(norm), None, backend
        )
    if backend == "cpu":
        projected = iter([_project(table, module, backend) for module in linears])
    else:
        projected = iter(_project_all(table, linears).unbind())

    def shaped(layer: LayerSpec, module: nn.Linear | None) -> Tensor | None:
        if module is None:
            return None
        return next(projected).view(len(table), -1, layer.attention.head_size)

    return [
        (shaped(layer, pos_key), shaped(layer, pos_query))
        for layer, (pos_key, pos_query) in zip(layers, wanted, strict=True)
    ]


def _projections(layer: LayerSpec) -> tuple[nn.Linear | None, nn.Linear | None]:
    attention = layer.attention
    if isinstance(attention, DisentangledAttention):
        return attention.pos_key, attention.pos_query
    return None, None


def _project(table: Tensor, module: nn.Linear, backend: str) -> Tensor:
    prepared = linear.prepare([module.weight], [module.bias], backend)
    return linear.run(table, prepared, None, backend)


def _project_all(table: Tensor, linears: list[nn.Linear]) -> Tensor:
    """``(linears, rows, outputs)``."""
    weights = torch.stack([module.weight.detach() for module in linears])
    biases = [
        table.new_zeros(len(module.weight)) if module.bias is None else module.bias.detach()
        for module in linears
    ]
    tables = table.expand(len(linears), -1, -1)
    return torch.baddbmm(torch.stack(biases)[:, None], tables, weights.mT)
