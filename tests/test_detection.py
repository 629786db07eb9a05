"""Detection: what a point learns, the loss, the boxes, their precision, and the whole way."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.cli.options import pixels
from repfx.errors import InputError
from repfx.lowering.runtimes.run import session
from repfx.training import Boxed, Detection
from repfx.training.assign import LEAST, aligned, inside, iou
from repfx.training.detection import best, spread

EXAMPLE = Path(__file__).parents[1] / "examples" / "detector"


def detector(name: str, classes: int = 10, **options: Any) -> nn.Module:
    """The net of examples/detector."""
    found = importlib.util.spec_from_file_location("detector_net", EXAMPLE / "net.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    made: nn.Module = module.detector(name, classes, **options)
    return made


def random_boxes(*shape: int, seed: int = 0, side: float = 64.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    middle = torch.rand(*shape, 2, generator=g) * side
    half = torch.rand(*shape, 2, generator=g) * side / 4 + 1
    return torch.cat((middle - half, middle + half), -1)


def grid(high: int, wide: int, stride: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij")
    return torch.stack((x.flatten(), y.flatten()), -1) * stride + stride / 2


def overlap_of(a: list[float], b: list[float]) -> float:
    w, h = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    area = [max(0.0, v[2] - v[0]) * max(0.0, v[3] - v[1]) for v in (a, b)]
    whole = sum(area) - w * h
    return w * h / whole if whole > 0 else 0.0


def slowly(
    boxes: Tensor, scores: Tensor, points: Tensor, truth: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """The class targets and the weights of one image, box by box and point by point."""
    count, classes = scores.shape
    wanted: dict[int, list[tuple[float, int, float]]] = {}
    values: dict[tuple[int, int], float] = {}
    for k, row in enumerate(truth.tolist()):
        if row[0] < 0:
            continue
        left, top_side, right, bottom = row[1:]
        allowed = [
            a
            for a, (x, y) in enumerate(points.tolist())
            if left < x < right and top_side < y < bottom
        ]
        middle = ((left + right) / 2, (top_side + bottom) / 2)
        near = min(range(count), key=lambda a, m=middle: math.dist(points[a].tolist(), m))
        allowed = sorted({*allowed, near})
        over = {a: overlap_of(row[1:], boxes[a].tolist()) for a in allowed}
        value = {a: float(scores[a, int(row[0])]) * max(LEAST, over[a]) ** 6 for a in allowed}
        for a in sorted(allowed, key=lambda a, v=value: -v[a])[:top]:
            wanted.setdefault(a, []).append((over[a], k, value[a]))
            values[k, a] = value[a]
    given = {a: max(found, key=lambda f: (f[0], -f[1])) for a, found in wanted.items()}
    targets, weight = torch.zeros(count, classes), torch.zeros(count)
    for k in range(len(truth)):
        mine = {a: f for a, f in given.items() if f[1] == k}
        if mine:
            scale = max(LEAST, *(f[0] for f in mine.values())) / max(f[2] for f in mine.values())
            for a, f in mine.items():
                weight[a] = f[2] * scale
                targets[a, int(truth[k, 0])] = weight[a]
    return targets, weight


@pytest.mark.parametrize("seed", range(12))
def test_points_learn_what_the_definition_says(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    points = torch.cat((grid(8, 8, 8), grid(4, 4, 16)))
    truth = torch.cat(
        (torch.randint(-1, 3, (2, 5, 1), generator=g), random_boxes(2, 5, seed=seed)), -1
    )
    boxes = random_boxes(2, len(points), seed=seed + 100)
    near = random_boxes(2, 5, seed=seed)[:, torch.arange(len(points)) % 5]
    boxes = torch.where(torch.rand(2, len(points), 1, generator=g) < 0.5, boxes, near + 1)
    scores = torch.rand(2, len(points), 3, generator=g)
    found = aligned(boxes, scores, points, truth, top=4)
    for i in range(2):
        targets, weight = slowly(boxes[i], scores[i], points, truth[i], 4)
        torch.testing.assert_close(found.scores[i], targets, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.weight[i], weight, rtol=1e-3, atol=1e-5)
        learns = found.weight[i] > 0
        labels = found.scores[i][learns].argmax(1)
        own = [
            bool(((truth[i, :, 1:] == b).all(1) & (truth[i, :, 0] == c)).any())
            for b, c in zip(found.boxes[i][learns], labels, strict=True)
        ]
        assert own and all(own)


def test_the_order_of_the_boxes_does_not_matter() -> None:
    points, boxes = grid(8, 8, 8), random_boxes(1, 64, seed=1)
    boxes = boxes + torch.tensor([-30.0, -30, 30, 30])  # each overlaps every other
    truth = torch.cat((torch.arange(6).view(1, 6, 1) % 3, random_boxes(1, 6, seed=2)), -1)
    scores = torch.rand(1, 64, 3)
    first = aligned(boxes, scores, points, truth)
    second = aligned(boxes, scores, points, truth[:, [3, 1, 5, 0, 2, 4]])
    torch.testing.assert_close(first.scores, second.scores)
    assert torch.equal(first.boxes[first.weight > 0], second.boxes[second.weight > 0])


def test_a_box_smaller_than_a_cell_has_the_nearest_point() -> None:
    points = grid(4, 4, 16)
    tiny = torch.tensor([[[30.0, 30.0, 31.0, 31.0], [8.0, 8.0, 8.0, 8.0]]])
    assert inside(points, tiny)[0].nonzero().tolist() == [[0, 5], [1, 0]]


def test_iou_of_boxes_without_an_area() -> None:
    a = torch.tensor([[[0.0, 0.0, 4.0, 4.0], [5.0, 5.0, 5.0, 5.0], [9.0, 9.0, 3.0, 3.0]]])
    found = iou(a, a)
    assert found[0, 0].tolist() == [1.0, 0.0, 0.0] and found[0, 1:, 1:].abs().max() == 0


def maps(
    seed: int = 0, n: int = 2, classes: int = 3, size: tuple[int, int] = (32, 64)
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, 4 + classes, size[0] // s, size[1] // s, generator=g) + 1 for s in (8, 16)
    ]


def test_a_box_is_around_its_point() -> None:
    """Also where a cell is not square, and in double."""
    given = maps()
    boxes, logits, points = spread(given, (32, 64))
    assert boxes.shape == (2, 40, 4) and logits.shape == (2, 40, 3) and points.shape == (40, 2)
    for level, stride, start in ((0, 8, 0), (1, 16, 32)):
        high, wide = given[level].shape[-2:]
        for y in range(high):
            for x in range(wide):
                at = start + y * wide + x
                px, py = (x + 0.5) * stride, (y + 0.5) * stride
                sides = given[level][1, :4, y, x].tolist()
                left, top, right, bottom = (d if d > 0.25 else 1 / (8 - 16 * d) for d in sides)
                said = [
                    px - left * stride,
                    py - top * stride,
                    px + right * stride,
                    py + bottom * stride,
                ]
                assert boxes[1, at].tolist() == pytest.approx(said, rel=1e-5)
                assert torch.equal(logits[1, at], given[level][1, 4:, y, x])
                assert points[at].tolist() == [px, py]
    flat, *_ = spread(given[0].abs() + 0.3, (16, 64))  # cells of 4 x 8 pixels
    side = given[0][0, 1, 0, 0].abs().item() + 0.3
    assert flat[0, 0, 1].item() == pytest.approx(2 - 4 * side, rel=1e-5)
    named, *_ = spread({"a": given[0], "b": given[1]}, (32, 64))
    assert torch.equal(named, boxes)


def greedy(
    boxes: Tensor, scores: Tensor, labels: Tensor, task: Detection
) -> list[tuple[int, float, list[float]]]:
    """Plain non-maximum suppression of one image."""
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        same = [k for k in kept if labels[k] == labels[i]]
        over = [overlap_of(boxes[k].tolist(), boxes[i].tolist()) for k in same]
        if scores[i] >= task.threshold and all(v <= task.overlap for v in over):
            kept.append(i)
    return [(int(labels[i]), float(scores[i]), boxes[i].tolist()) for i in kept[: task.most]]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("overlap", [0.3, 0.6])
def test_suppression_is_greedy(seed: int, overlap: float) -> None:
    task = Detection(overlap=overlap, threshold=0.4, most=50)
    given = maps(seed)
    boxes, scores, labels = best(given, (32, 64), task)
    every, logits, _ = spread(given, (32, 64))
    assert boxes.shape == (2, 50, 4)
    for i in range(2):
        said = greedy(
            every[i].repeat_interleave(3, 0),
            logits[i].sigmoid().flatten(),
            torch.arange(120) % 3,
            task,
        )
        mine = scores[i] > 0
        assert len(said) == int(mine.sum()) > 5
        assert labels[i, mine].tolist() == [s[0] for s in said]
        torch.testing.assert_close(scores[i, mine], torch.tensor([s[1] for s in said]))
        torch.testing.assert_close(boxes[i, mine], torch.tensor([s[2] for s in said]))


def truth_of(given: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Images, and the one box of each, which the first map predicts at its point 9 exactly."""
    boxes, logits, _ = spread(given, (32, 64))
    y = torch.zeros(2, 3, 6)
    y[..., 0] = -1
    y[:, 1, 1:5], y[:, 1, 0] = boxes[:, 9], logits[:, 9].argmax(-1).float()
    return torch.zeros(2, 3, 32, 64), y


def sound() -> list[Tensor]:
    """Maps whose boxes are all of some size."""
    return [v.abs() + 0.2 for v in maps()]


def test_the_loss_is_that_of_its_equation() -> None:
    given = sound()
    x, y = truth_of(given)
    loss = Detection().loss(lambda _: given, (x, y))
    boxes, logits, points = spread(given, (32, 64))
    goal = aligned(boxes, logits.sigmoid(), points, y[..., :5])
    total, far = torch.zeros(()), torch.zeros(())
    for i, a in (goal.weight > 0).nonzero().tolist():
        p, q = boxes[i, a].tolist(), goal.boxes[i, a].tolist()
        hull = (max(p[2], q[2]) - min(p[0], q[0])) * (max(p[3], q[3]) - min(p[1], q[1]))
        area = [(v[2] - v[0]) * (v[3] - v[1]) for v in (p, q)]
        over = overlap_of(p, q)
        union = sum(area) / (1 + over)
        far = far + goal.weight[i, a] * (1 - (over - (hull - union) / hull))
        total = total + goal.weight[i, a]
    entropy = -(
        goal.scores * logits.sigmoid().log() + (1 - goal.scores) * (1 - logits.sigmoid()).log()
    ).sum()
    expected = (entropy + 2.5 * far) / total.clamp(min=1)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_a_gradient_step_makes_the_loss_smaller_and_empty_images_are_fine() -> None:
    leaf = [v.requires_grad_() for v in sound()]
    x, y = truth_of(leaf)
    y = y.detach()
    before = Detection().loss(lambda _: leaf, (x, y))
    before.backward()
    with torch.no_grad():
        after = Detection().loss(lambda _: [v - 0.01 * v.grad for v in leaf], (x, y))
    assert after < before
    empty = y.clone()
    empty[..., 0] = -1
    nothing = Detection().loss(lambda _: leaf, (x, empty))
    assert math.isfinite(float(nothing)) and nothing > 0
    torch.autograd.grad(nothing, leaf)
    half = Detection().loss(lambda _: [v.bfloat16() for v in leaf], (x, y))
    assert half.dtype == torch.float32 and abs(float(half / before) - 1) < 0.05


def test_boxes_around_many_objects_teach_nothing() -> None:
    """Nor is a point among them blamed, unless it learns an object of its own."""
    given = [v.detach().requires_grad_() for v in sound()]
    x, y = truth_of(given)
    y = y.detach()
    crowd = y.clone()
    crowd[:, 2] = torch.tensor([1.0, 0, 0, 32, 32, 1])  # the left half
    task = Detection()
    gradient = torch.autograd.grad(task.loss(lambda _: given, (x, crowd)), given)
    plain = torch.autograd.grad(task.loss(lambda _: given, (x, y)), given)
    for level, (found, before) in enumerate(zip(gradient, plain, strict=True)):
        half = found.shape[-1] // 2
        same = (found - before).abs().amax((0, 1)) < 1e-7
        assert bool(same[:, half:].all()), level  # outside of the crowd
        blamed = found[:, 4:].abs().amax((0, 1)) > 0
        learns = before[:, :4].abs().amax((0, 1)) > 0
        assert torch.equal(blamed[:, :half], learns[:, :half]), level
    single = crowd.clone()
    single[:, 2, 5] = 0
    losses = [float(task.loss(lambda _: given, (x, v)).detach()) for v in (y, y[..., :5], single)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("start", [-5.0, -0.5, 0.0, 5.0])
def test_no_box_turns_inside_out_and_a_box_is_learned_from_any_start(start: float) -> None:
    """The loss of boxes lies in 0..2 and falls from wherever the distances begin."""
    torch.manual_seed(0)
    leaf = torch.full((2, 5, 4, 8), start) + 0.1 * torch.randn(2, 5, 4, 8)
    leaf.requires_grad_()
    y = torch.tensor([0.0, 8, 4, 40, 28]).expand(2, 1, 5)
    x, task = torch.zeros(2, 3, 32, 64), Detection()
    optimizer = torch.optim.Adam([leaf], 0.3)
    for _ in range(150):
        loss = task.loss(lambda _: leaf, (x, y))
        assert float(loss.detach()) >= 0
        boxes, _, _ = spread(leaf, (32, 64))
        assert bool((boxes[..., 2:] > boxes[..., :2]).all())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found, scores, _ = best(leaf.detach(), (32, 64), task)
    assert overlap_of(found[0, 0].tolist(), [8, 4, 40, 28]) > 0.9 and scores[0, 0] > 0.8


def test_many_points_of_one_object_hide_no_other() -> None:
    """A large object whose hundreds of points are surer than ten small ones."""
    v = torch.full((1, 5, 40, 40), -9.0)
    v[:, :4] = 0.4
    v[:, 4, :25, :25] = 2.0  # each says the same large box
    rows = torch.arange(25.0)
    v[0, 0, :25, :25], v[0, 2, :25, :25] = rows[None, :] + 0.5, 25 - rows[None, :] - 0.5
    v[0, 1, :25, :25], v[0, 3, :25, :25] = rows[:, None] + 0.5, 25 - rows[:, None] - 0.5
    v[0, 4, 30:40, 35] = 0.5
    boxes, scores, _ = best(v, (320, 320), Detection())
    assert int((scores > 0.5).sum()) == 11
    assert boxes[0, 0].tolist() == pytest.approx([0, 0, 200, 200])
    few = Detection(most=5)
    assert int((best(v, (320, 320), few)[1] > 0.5).sum()) == 5


class Perfect(nn.Module):
    """Finds exactly these boxes, each at the pixel in its middle, with a score of its own."""

    def __init__(self, boxes: Tensor, classes: int) -> None:
        super().__init__()
        n, k, _ = boxes.shape
        made = torch.full((n, 4 + classes, 64, 64), -9.0)
        for i in range(n):
            for j in range(k):
                label, left, top, right, bottom = boxes[i, j, :5].tolist()
                a, b = int((left + right) / 2), int((top + bottom) / 2)
                x, y = a + 0.5, b + 0.5
                if label >= 0:
                    made[i, :4, b, a] = torch.tensor([x - left, y - top, right - x, bottom - y])
                    made[i, 4 + int(label), b, a] = 4.0 - 0.1 * j
        self.made = made

    def forward(self, x: Tensor) -> Tensor:
        return self.made


def precision(model: nn.Module, y: Tensor, task: Detection | None = None) -> dict[str, float]:
    metric = (task or Detection()).metric()
    metric.update(model, (torch.zeros(len(y), 3, 64, 64), y))
    return {name: float(v) for name, v in metric.compute().items()}


def test_average_precision() -> None:
    y = torch.zeros(2, 4, 5)
    y[..., 1:] = random_boxes(2, 4, seed=5, side=40) + 12
    y[..., 0] = torch.tensor([[0, 1, 1, -1], [1, 0, -1, -1]])
    found = precision(Perfect(y, 2), y)
    assert found == {"ap": pytest.approx(1), "ap50": pytest.approx(1)}
    wrong = y.clone()
    wrong[..., 0] = torch.where(y[..., 0] < 0, -1, 1 - y[..., 0])
    assert precision(Perfect(wrong, 2), y)["ap"] == 0
    # Half of the width is missing: an IoU of 0.6 counts at 0.5, 0.55 and 0.6, of ten thresholds.
    narrow = y.clone()
    narrow[..., 3] = y[..., 1] + 0.6001 * (y[..., 3] - y[..., 1])
    found = precision(Perfect(narrow, 2), y)
    assert found == {"ap": pytest.approx(0.3, abs=1e-3), "ap50": pytest.approx(1)}
    one = y.clone()
    one[..., 0] = torch.where(y[..., 0] == 1, -1, y[..., 0])  # only the class 0 is found
    assert precision(Perfect(one, 2), y)["ap"] == pytest.approx(0.5)
    # A box that nobody drew costs precision, unless it lies in one around many objects.
    more = y.clone()
    more[1, 2] = torch.tensor([0, 1.0, 20, 21, 31])
    first = Perfect(more, 2)
    first.made[1, 4, 26, 10] = 5.0  # the surest of all
    assert precision(first, y)["ap"] < 0.95
    crowd = torch.cat((y, torch.zeros(2, 4, 1)), -1)
    crowd[1, 2] = torch.tensor([0, 0.0, 18, 25, 32, 1])
    assert precision(first, crowd)["ap"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("text", "a detector returns maps"),
        ([], "a detector returns maps"),
        (torch.zeros(2, 7), r"not \(2, 7\)"),
        ([torch.zeros(2, 4, 3, 3)], r"not \(2, 4, 3, 3\)"),
        ([torch.zeros(2, 7, 3, 3), torch.zeros(2, 8, 3, 3)], "same classes, not 3 and 4"),
        ([torch.zeros(2, 7, 3, 3), 5], "a detector returns maps"),
    ],
)
def test_an_output_that_is_not_of_a_detector(output: Any, message: str) -> None:
    y = torch.tensor([0.0, 1, 1, 2, 2]).expand(2, 1, 5)
    with pytest.raises(InputError, match=message):
        Detection().loss(lambda _: output, (torch.zeros(2, 3, 32, 64), y))
    with pytest.raises(InputError, match=message):
        Detection().metric().update(lambda _: output, (torch.zeros(2, 3, 32, 64), y))


def test_boxes_that_cannot_be_used() -> None:
    x = torch.zeros(2, 3, 32, 64)
    for shape in ((2, 4), (2, 1, 4), (2, 1, 7), (3, 1, 5)):
        with pytest.raises(InputError, match="boxes are"):
            Detection().loss(lambda _: maps(), (x, torch.zeros(shape)))
    y = torch.tensor([3.0, 1, 1, 2, 2]).expand(2, 1, 5)
    for call in (Detection().loss, Detection().metric().update):
        with pytest.raises(InputError, match="class 3 is out of range: the model has 3 classes"):
            call(lambda _: maps(), (x, y))
    for bad in (
        [0.0, 5, 5, 5, 9],
        [0.0, 9, 5, 5, 9],
        [0.0, math.nan, 1, 2, 2],
        [math.nan, 1, 1, 2, 2],
    ):
        with pytest.raises(InputError, match="no area, or is not finite"):
            Detection().loss(lambda _: maps(), (x, torch.tensor(bad).expand(2, 1, 5)))
    none = Detection().loss(lambda _: maps(), (x, torch.zeros(2, 0, 5)))
    padding = Detection().loss(lambda _: maps(), (x, torch.full((2, 3, 5), -1.0)))
    assert float(none) == float(padding)
    with pytest.raises(InputError, match="takes batches"):
        Detection().loss(lambda _: maps(), x)


def test_distillation_is_the_mean_difference_of_the_maps() -> None:
    given = maps()
    other = [given[0] + 1, given[1] - 3]
    assert float(Detection().distance(given, other)) == pytest.approx(2)
    assert float(Detection().distance(given, given)) == 0


@pytest.mark.parametrize("threshold", [0.01, 0.5, 0.9])
def test_the_metric_leaves_out_only_what_is_no_box(threshold: float) -> None:
    """It looks at the boxes above the threshold alone; suppression of all finds the same."""
    task = Detection(threshold=threshold)
    given = maps(3)
    y = torch.zeros(2, 1, 5)
    y[:, 0, 3:] = 9
    metric = task.metric()
    metric.update(lambda _: given, (torch.zeros(2, 3, 32, 64), y))
    boxes, scores, classes = best(given, (32, 64), task)
    for i, found in enumerate(metric.found):
        kept = scores[i] > 0
        torch.testing.assert_close(found["boxes"], boxes[i, kept])
        torch.testing.assert_close(found["scores"], scores[i, kept])
        assert torch.equal(found["labels"], classes[i, kept])


@pytest.mark.slow
@pytest.mark.parametrize("block", ["repvgg", "qarepvgg", "mobileone", "acnet"])
def test_the_whole_way_of_a_detector(block: str, tmp_path: Path) -> None:
    """Trained, merged, quantized and lowered, with its boxes and without."""
    from repfx.data.packaged import digit_scenes

    torch.manual_seed(0)
    train, test = digit_scenes(images=(64, 8))
    net = detector(block, depth=1)
    options: dict[str, Any] = {"progress": False, "device": "cpu", "optimizer": "adamw"}
    history = repfx.fit(net, "detection", train, valid=test, epochs=3, batch=8, lr=0.003, **options)
    assert history[-1].loss < 0.8 * history[0].loss and set(history[0].metrics) == {"ap", "ap50"}
    x = test[0][:4]
    merged = repfx.transform(net.eval(), ["fuse"], example=x)
    assert not [m for m in merged.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        gaps = [float((a - b).abs().max()) for a, b in zip(merged(x), net(x), strict=True)]
    assert max(gaps) < 1e-3
    model = repfx.transform(net, ["repq"], example=x)
    repfx.fit(model, "detection", train, epochs=1, batch=16, lr=1e-4, teacher=net, **options)
    model = repfx.transform(model.eval(), ["fuse"])
    for suppress in (True, False) if block == "repvgg" else ():
        whole = Boxed(model, suppress=suppress)
        file = repfx.lower(whole, tmp_path / "net.onnx", example=x)
        with torch.no_grad():
            said = whole(x)
        # Random order among equal scores aside, the runtime has the same boxes.
        run = session("onnxruntime", file.onnx)((x,))
        assert len(run) == len(said) == (3 if suppress else 2)
        scores: list[Tensor] = [said[1], run[1]]
        if suppress:
            scores = [s.sort(-1).values for s in scores]
        assert float((scores[0] - scores[1]).abs().max()) < 0.05


def test_sizes_on_the_command_line() -> None:
    """docs/detection.md has the whole way from a zip to an INT8 file, and runs in test_docs.py."""
    assert pixels("224") == 224 and pixels("48x80") == pixels("48X80") == (48, 80)
    for text in ("48by80", "48x", "x", "0", "48x80x3", "-4", "4.5", ""):
        with pytest.raises(InputError, match="--size is a side in pixels or HEIGHTxWIDTH"):
            pixels(text)
