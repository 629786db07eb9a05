"""Detection: the loss and the metric of an anchor-free detector, and its boxes.

The model returns a map (N, 4 + C, h, w) for each level, or one map. In the middle of each of its
h x w cells, of `stride` pixels, lies a point (x, y) with C logits and the distances of its box:

    box = (x - l * stride, y - t * stride, x + r * stride, y + b * stride)

    loss = (sum BCE(logits, targets) + 2.5 sum targets * (1 - GIoU)) / sum targets

The targets are those of `assign`. A distance d below c = 1/4 of a cell counts as c^2 / (2c - d),
which goes on as smoothly, so that no box is turned inside out, whatever the model returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repfx.data.archive import Size
from repfx.data.boxes import train_and_valid
from repfx.data.packaged import DETECTION
from repfx.data.vision import torchvision
from repfx.errors import InputError, MissingPart
from repfx.processes import gathered
from repfx.training.assign import aligned, inside, iou
from repfx.training.metrics import pair, torchmetrics

BOX = 2.5  # weight of the boxes in the loss
LEAST = 0.25  # cells


@dataclass(frozen=True)
class Detection:
    """Detection, with average precision as metric: COCO's `ap`, over IoU 0.5 to 0.95, and `ap50`.

    A batch is images (N, C, H, W) and boxes (N, K, 5): class, left, top, right, bottom in pixels;
    the class -1 is no box. A sixth column that is not 0 marks a box around many objects.

    `threshold`: the least score of a box. `overlap`: the IoU above which the worse of two boxes of
    a class is dropped. `candidates`: the best pairs of a point and a class, of which this leaves
    the boxes. `most`: boxes kept of an image. `flip`: whether training may mirror images.
    """

    threshold: float = 0.01
    overlap: float = 0.6
    candidates: int = 1000
    most: int = 100
    flip: bool = True

    def read(
        self, path: Any, *, size: Size | None = None, skip_broken: bool = False
    ) -> tuple[Any, Any]:
        """Reads a folder or zip with boxes in COCO's form (see `Boxes`), or "digits".

        `size`: (height, width) or the side of a square, by default 640 (digits: 64)."""
        if str(path) in DETECTION and not Path(path).exists():
            return DETECTION[str(path)](**({} if size is None else {"size": size}))
        options: dict[str, Any] = {} if size is None else {"size": size}
        return train_and_valid(path, flip=self.flip, skip_broken=skip_broken, **options)

    def loss(self, model: Callable[..., Any], batch: Any) -> Tensor:
        x, y = pair(batch)
        boxes, logits, points = spread(model(x), x.shape[-2:])
        check_boxes(x, y, logits.shape[-1])
        truth, crowd = objects(y.to(boxes))
        goal = aligned(boxes, logits.sigmoid(), points, truth)
        total, learn = goal.weight.sum().clamp(min=1), goal.weight > 0
        # A point among many objects that learns none of them is not blamed for what it says.
        open_ = (inside(points, crowd[..., 1:]) & (crowd[..., :1] >= 0)).any(1) & ~learn
        each = F.binary_cross_entropy_with_logits(logits, goal.scores, reduction="none")
        classes = each.masked_fill(open_[..., None], 0).sum()
        far = torchvision("ops").generalized_box_iou_loss(boxes[learn], goal.boxes[learn])
        found: Tensor = (classes + BOX * (far * goal.weight[learn]).sum()) / total
        return found

    def distance(self, output: Any, reference: Any) -> Tensor:
        """The mean absolute difference of all maps."""
        pairs = list(zip(maps_of(output), maps_of(reference), strict=True))
        gaps = torch.stack([F.l1_loss(a.float(), b.float()) for a, b in pairs])
        return gaps.mean()

    def metric(self) -> Any:
        return _Precision(self)


class _Precision:
    """COCO's average precision, in the pixels of the image that the model is given."""

    def __init__(self, task: Detection) -> None:
        torchvision()
        self.task = task
        try:
            self.make = torchmetrics().detection.MeanAveragePrecision
            self.fresh()
        except (AttributeError, ModuleNotFoundError) as error:
            raise MissingPart("detection needs pip install repfx[detect]") from error
        self.found: list[dict[str, Tensor]] = []
        self.truth: list[dict[str, Tensor]] = []

    def fresh(self) -> Any:
        """The metric of torchmetrics, with COCO's thresholds in float64."""
        metric = self.make(
            backend="faster_coco_eval",
            iou_thresholds=[v / 100 for v in range(50, 100, 5)],
            rec_thresholds=[v / 100 for v in range(101)],
        )
        metric.warn_on_many_detections = False
        return metric

    def update(self, model: Callable[..., Any], batch: Any) -> None:
        x, y = pair(batch)
        maps = maps_of(model(x))
        check_boxes(x, y, maps[0].shape[1] - 4)
        for i, rows in enumerate(y.float().cpu()):  # one by one, which bounds the memory
            mine = [v[i : i + 1] for v in maps]
            # What is below the threshold is no box, and drops none that is above it.
            sure = sum(int((v[:, 4:].sigmoid() >= self.task.threshold).sum()) for v in mine)
            task = replace(self.task, candidates=min(self.task.candidates, max(1, sure)))
            boxes, scores, classes = best(mine, x.shape[-2:], task)
            kept, real = scores[0] > 0, rows[rows[:, 0] >= 0]
            seen = {"boxes": boxes, "scores": scores, "labels": classes}
            self.found.append({name: v[0, kept].cpu() for name, v in seen.items()})
            crowd = real[:, 5] if real.shape[1] > 5 else torch.zeros_like(real[:, 0])
            self.truth.append(
                {"boxes": real[:, 1:5], "labels": real[:, 0].long(), "iscrowd": crowd.long()}
            )

    def compute(self) -> Mapping[str, Any]:
        metric = self.fresh()
        metric.sync_on_compute = False  # processes may have other numbers of images
        for found, truth in gathered((self.found, self.truth)):
            metric.update(found, truth)
        found = metric.compute()
        return {"ap": found["map"], "ap50": found["map_50"]}


class Boxed(nn.Module):
    """A detector with its boxes in place of its maps: what a runtime is to compute.

    Images (N, C, H, W) -> boxes (N, most, 4) in pixels, scores (N, most) and classes (N, most), the
    best first; a score of 0 is no box. With `suppress=False`, all boxes (N, A, 4) and their scores
    (N, A, C), for a runtime with a suppression of its own."""

    def __init__(
        self, model: nn.Module, task: Detection | None = None, suppress: bool = True
    ) -> None:
        super().__init__()
        self.model, self.task, self.suppress = model, task or Detection(), suppress

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = maps_of(self.model(x))
        if self.suppress:
            return best(maps, x.shape[-2:], self.task)
        boxes, logits, _ = spread(maps, x.shape[-2:])
        return boxes, logits.sigmoid()


def spread(output: Any, size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The boxes (N, A, 4) and logits (N, A, C) of all maps, and their points (A, 2), x and y.

    `size`: height and width of the images. Raises InputError for another output."""
    boxes, logits, points = [], [], []
    for v in maps_of(output):
        v = v.float()
        h, w = v.shape[-2:]
        down, right = size[0] / h, size[1] / w
        y = (torch.arange(h, device=v.device, dtype=v.dtype) + 0.5) * down
        x = (torch.arange(w, device=v.device, dtype=v.dtype) + 0.5) * right
        at = torch.stack((x.repeat(h), y.repeat_interleave(w)), -1)
        rows = v.flatten(2).transpose(1, 2)
        unit = torch.tensor([right, down], device=v.device, dtype=v.dtype)
        sides = rows[..., :4]
        small = LEAST**2 / (2 * LEAST - sides.clamp(max=LEAST))
        sides = torch.where(sides > LEAST, sides, small)
        low, high = at - sides[..., :2] * unit, at + sides[..., 2:] * unit
        boxes.append(torch.cat((low, high), -1))
        logits.append(rows[..., 4:])
        points.append(at)
    return torch.cat(boxes, 1), torch.cat(logits, 1), torch.cat(points)


def best(maps: Any, size: Sequence[int], task: Detection) -> tuple[Tensor, Tensor, Tensor]:
    """The best boxes of an image: (N, most, 4), scores (N, most), classes (N, most).

    Of the best pairs of a point and a class, `candidates` of them, one is dropped if a better one
    of its class that is not dropped overlaps it too much: non-maximum suppression, a fixed point of

        keep(j) = max over better i with keep(i) of IoU(i, j) <= overlap

    (Cluster-NMS, Zheng et al., 2020). It is reached from above in as many rounds as the longest
    chain of boxes that drop each other has links; eight are run. So a graph of it has fixed shapes
    and no loop."""
    boxes, logits, _ = spread(maps, size)
    points, classes = logits.shape[1:]
    count = min(task.candidates, points * classes)
    scores, at = logits.sigmoid().flatten(1).topk(count)
    label = at % classes
    mine = boxes.gather(1, (at // classes)[..., None].expand(-1, -1, 4))
    same = label[:, :, None] == label[:, None]
    better = torch.ones(count, count, device=boxes.device).triu(1)
    over = iou(mine, mine) * same * better
    keep = torch.ones_like(scores)
    for _ in range(8):
        keep = ((over * keep[:, :, None]).amax(1) <= task.overlap).to(scores.dtype)
    scores = scores * keep * (scores >= task.threshold)
    scores, order = scores.topk(min(task.most, count))
    return mine.gather(1, order[..., None].expand(-1, -1, 4)), scores, label.gather(1, order)


def maps_of(output: Any) -> list[Tensor]:
    """The maps of a detector's output. Raises InputError if it is something else."""
    values = list(output.values()) if isinstance(output, Mapping) else output
    maps = [values] if isinstance(values, Tensor) else values
    if not isinstance(maps, (list, tuple)) or not maps:
        raise InputError(f"a detector returns maps (N, 4 + classes, h, w), not {type(output)}")
    for v in maps:
        shape = tuple(v.shape) if isinstance(v, Tensor) else type(v)
        if not isinstance(v, Tensor) or v.dim() != 4 or v.shape[1] < 5:
            raise InputError(f"a detector returns maps (N, 4 + classes, h, w), not {shape}")
        if v.shape[1] != maps[0].shape[1]:
            raise InputError(
                f"the maps of a detector have the same classes, not {maps[0].shape[1] - 4} and "
                f"{v.shape[1] - 4}"
            )
    return list(maps)


def objects(y: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (N, K, 5) of single objects, and those around many; the others have the class -1.

    K is at least 1."""
    rows = y[..., :5]
    if not y.shape[1]:
        rows = torch.full((len(y), 1, 5), -1.0, device=y.device, dtype=y.dtype)
    if not y.shape[1] or y.shape[-1] == 5:
        return rows, torch.full_like(rows, -1)
    many = y[..., 5:] > 0
    return rows.masked_fill(many, -1), rows.masked_fill(~many, -1)


def check_boxes(x: Tensor, y: Tensor, classes: int) -> None:
    """Raises InputError for boxes that are not (N, K, 5 or 6) of the images x, are empty or not
    finite, and for classes out of range."""
    if y.dim() != 3 or y.shape[-1] not in (5, 6) or len(y) != len(x):
        raise InputError(
            f"boxes are (N, K, 5): class, left, top, right, bottom; not {tuple(y.shape)} for "
            f"{len(x)} images"
        )
    real = y[y[..., 0] != -1]
    if not bool(torch.isfinite(real).all()) or not bool((real[:, 3:5] > real[:, 1:3]).all()):
        raise InputError("a box has no area, or is not finite; the class -1 means that it is none")
    wrong = y[..., 0][y[..., 0] >= classes]
    if wrong.numel():
        raise InputError(
            f"class {int(wrong[0])} is out of range: the model has {classes} classes, 0 to "
            f"{classes - 1}"
        )
