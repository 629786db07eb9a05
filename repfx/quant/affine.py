"""Affine (QPRep in RepAPQ, arXiv 2402.16121): y_k -> eta_k y_k + eps_k after a quantized layer.

It is applied to the layer's weight and bias:

    eta_k (conv(Q(x), Q(W))_k + b_k) + eps_k  =  conv(Q(x), eta_k Q(W)_k) + eta_k b_k + eps_k

It folds exactly, because Q(W) has one scale per output channel:

    s_k' = |eta_k| s_k,    codes_k' = sign(eta_k) codes_k,    b_k' = eta_k b_k + eps_k
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Affine(nn.Module):
    """Maps a layer's Q(W) (out, ...) and b (out,) or None to those of eta y + eps.

    It starts as the identity."""

    is_graph_leaf = True

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.eta = nn.Parameter(torch.ones(like.shape[0], dtype=like.dtype, device=like.device))
        self.eps = nn.Parameter(torch.zeros(like.shape[0], dtype=like.dtype, device=like.device))

    def forward(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scaled = weight * self.eta.reshape(-1, *(1,) * (weight.dim() - 1))
        return scaled, self.eps if bias is None else bias * self.eta + self.eps
