"""Which point of an anchor-free detector learns which box (TOOD's task alignment, 2021).

    t(k, a) = s(k, a)^alpha * IoU(k, a)^beta

for box k and point a: s is the point's score for the class of k, IoU that of the box it predicts
with k. Of the points inside of k the `top` best learn it; a point that several boxes want learns
the one it overlaps most. Its class target is t, scaled so that the best of each box has the IoU of
that box's best. An IoU counts as LEAST at least: so a detector whose boxes are all far off learns,
too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-12
LEAST = 0.1
ALPHA, BETA = 1.0, 6.0


@dataclass(frozen=True)
class Aligned:
    """What each of A points learns.

    `scores`: (N, A, C). `boxes`: (N, A, 4), left, top, right, bottom in pixels. `weight`: (N, A),
    the sum of its scores; 0 for a point that learns no box."""

    scores: Tensor
    boxes: Tensor
    weight: Tensor


@torch.no_grad()
def aligned(
    boxes: Tensor, scores: Tensor, points: Tensor, truth: Tensor, *, top: int = 13
) -> Aligned:
    """Assigns K boxes to A points.

    `boxes` (N, A, 4) and `scores` (N, A, C), in 0..1, are predicted at `points` (A, 2), x and y.
    `truth` (N, K, 5): class, left, top, right, bottom; the class -1 is no box."""
    real, label = truth[..., 0] >= 0, truth[..., 0].clamp(min=0).long()
    common = iou(truth[..., 1:], boxes)
    overlap = common.clamp(min=LEAST)
    said = scores.transpose(1, 2).gather(1, label[..., None].expand(-1, -1, len(points)))
    allowed = inside(points, truth[..., 1:]) & real[..., None]
    value = (said**ALPHA * overlap**BETA).where(allowed, torch.zeros_like(overlap))
    best = value.topk(min(top, len(points)), -1).indices
    chosen = torch.zeros_like(allowed).scatter(-1, best, True) & allowed
    # A point that several boxes have chosen keeps the one it overlaps most.
    rival = common.where(chosen, torch.full_like(common, -1))
    chosen &= torch.zeros_like(chosen).scatter(1, rival.argmax(1, keepdim=True), True)
    value, overlap = value * chosen, overlap * chosen
    scale = overlap.amax(-1, keepdim=True) / (value.amax(-1, keepdim=True) + EPS)
    weight, of = (value * scale).max(1)
    targets = torch.zeros_like(scores)
    targets.scatter_(2, label.gather(1, of)[..., None], weight[..., None])
    mine = truth[..., 1:].gather(1, of[..., None].expand(-1, -1, 4))
    return Aligned(targets, mine, weight)


def inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether a point (A, 2) lies in a box (N, K, 4); of each box at least the nearest: (N, K, A).

    A box smaller than the distance of two points may hold none."""
    low, high = points - boxes[..., None, :2], boxes[..., None, 2:] - points
    found = torch.cat((low, high), -1).amin(-1) > 0
    middle = (boxes[..., :2] + boxes[..., 2:])[..., None, :] / 2
    nearest = (points - middle).square().sum(-1).argmin(-1, keepdim=True)
    return found.scatter(-1, nearest, True)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Area of intersection over that of union: (N, K, 4) and (N, A, 4) -> (N, K, A)."""
    a, b = a[:, :, None], b[:, None]
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    whole = _area(a) + _area(b) - common
    return common / whole.clamp(min=EPS)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
