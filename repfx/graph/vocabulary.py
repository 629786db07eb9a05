"""The vocabulary: one row per operator, with its spellings, its rule and its traits.

    spelling    F.relu, torch.relu_, x.relu(), aten.relu.default, nn.ReLU, and Relu in ONNX
    rule        what the operator means to the algebra: a function with the operator's signature
    traits      other facts: it clips, it moves values, it returns fresh memory, ...

All other code asks this table, usually through a `GraphView`. A layer of torch.nn is read as a call
of the function that it stands for.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from repfx.algebra import pad_with
from repfx.graph import channels, pointwise, spatial, traits, wiring
from repfx.graph.guards import holds
from repfx.graph.modes import TrainOnly
from repfx.graph.ops import Op
from repfx.graph.traits import Trait

Rule = Callable[..., Op]
aten = torch.ops.aten


@dataclass(frozen=True)
class Leaf:
    """Layers of torch.nn that stand for a function, and the attributes that are its arguments.

    `tensors` names the arguments that are passed as paths into the module, `values` those passed by
    value. If an attribute and its argument have different names, write attribute:argument. `fixed`
    holds arguments that are the same for all these layers.
    """

    classes: tuple[type[nn.Module], ...]
    tensors: str = ""
    values: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, path: str, module: nn.Module) -> dict[str, Any]:
        """The arguments of the layer at this path, without the input."""
        found = {
            n: None if getattr(module, n, None) is None else f"{path}.{n}"
            for n in self.tensors.split()
        }
        for name in self.values.split():
            attribute, _, argument = name.partition(":")
            if hasattr(module, attribute):
                found[argument or attribute] = getattr(module, attribute)
        return {**found, **self.fixed}


@dataclass(frozen=True)
class Kind:
    """One operator: a row of the table.

    `traits` hold for every call, and `when` adds those of one call. `names` stands for all
    functions, methods and aten overloads with these names, `also` for exactly the ones listed.
    `onnx` names operators of ONNX. `wiring` tells how the axes of the value are moved.
    """

    name: str
    traits: Trait = Trait.NONE
    names: str = ""
    rule: Rule | None = None
    when: Callable[..., Trait] | None = None
    also: Iterable[Any] = ()
    leaf: Leaf | None = None
    onnx: str = ""
    wiring: Callable[..., wiring.Wiring | None] | None = None

    @property
    def spelled(self) -> tuple[Any, ...]:
        """Every function, method and aten overload that spells this operator."""
        named = (s for name in self.names.split() for s in spellings(name))
        return tuple(dict.fromkeys((*named, *self.also)))

    def of_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trait:
        """The traits of one call."""
        if self.when is None:
            return self.traits
        try:
            return self.traits | self.when(*args, **kwargs)
        except TypeError:  # the arguments belong to another overload
            return self.traits

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by their names in the rule, with its defaults.

        Raises TypeError for arguments that the rule does not have."""
        assert self.rule is not None
        call = inspect.signature(self.rule).bind(None, *args, **kwargs)
        call.apply_defaults()
        return dict(list(call.arguments.items())[1:])


def spellings(name: str) -> Iterator[Any]:
    """Every function, method and aten overload with this name, in place or not.

    >>> [s for s in spellings("relu") if isinstance(s, str)]
    ['relu', 'relu_']
    """
    for n in (name, f"i{name}"):
        if hasattr(torch.Tensor, f"__{n}__") and hasattr(operator, n):
            yield getattr(operator, n)
    for n in (name, f"{name}_"):
        for space in (torch, F):
            if callable(found := getattr(space, n, None)):
                yield found
        if hasattr(torch.Tensor, n) and not isinstance(getattr(torch.Tensor, n), property):
            yield n
        if (packet := getattr(aten, n, None)) is not None:
            yield from (getattr(packet, overload) for overload in packet.overloads())


T = Trait
_CONV = "stride padding dilation groups padding_mode:mode"
_CONV_T = "stride padding output_padding groups dilation"
_POOL = "kernel_size stride padding ceil_mode count_include_pad divisor_override"
_NORM = "running_mean running_var weight bias"
_MOVED = T.MOVES | T.KEEPS_SIGN
_SHAPED = _MOVED | T.RESHAPES
_CURVE = T.ACTIVATION | T.FRESH
_RECTIFIED = _CURVE | T.NON_NEGATIVE


def _pads(modes: str, classes: Iterable[type[nn.Module]]) -> Leaf:
    values = "padding:pad value" if modes == "constant" else "padding:pad"
    return Leaf(tuple(classes), values=values, fixed={"mode": modes})


def _each(name: str) -> tuple[type[nn.Module], ...]:
    """The layers with this name in one, two and three dimensions."""
    return tuple(getattr(nn, f"{name}{n}d") for n in (1, 2, 3))


LAYERS = (
    Kind(
        "conv", T.LAYER | T.FRESH, "conv1d conv2d conv3d", rule=spatial.convolution,
        leaf=Leaf(_each("Conv"), "weight bias", _CONV), onnx="Conv",
    ),
    Kind(
        "conv_transpose", T.LAYER | T.FRESH, "conv_transpose1d conv_transpose2d conv_transpose3d",
        rule=spatial.transposed_convolution,
        leaf=Leaf(_each("ConvTranspose"), "weight bias", _CONV_T), onnx="ConvTranspose",
    ),
    Kind(
        "linear", T.LAYER | T.FRESH, "linear", rule=spatial.linear,
        leaf=Leaf((nn.Linear,), "weight bias"), onnx="Gemm MatMul",
    ),
)  # fmt: skip

NORMS = (
    *(
        Kind(
            "bn", T.FRESH, rule=partial(spatial.batch_norm, axes=axes),
            leaf=Leaf(classes, _NORM, "eps"),
        )
        for axes, classes in (
            (None, (nn.BatchNorm1d, nn.SyncBatchNorm)),
            (2, (nn.BatchNorm2d,)),
            (3, (nn.BatchNorm3d,)),
        )
    ),
    Kind("bn", T.FRESH, rule=spatial.batch_norm, also=[F.batch_norm], onnx="BatchNormalization"),
    Kind(
        "bn", T.FRESH, rule=spatial.aten_batch_norm,
        also=[torch.batch_norm, aten.batch_norm.default],
    ),
    Kind(
        "norm", T.FRESH,
        "layer_norm group_norm instance_norm local_response_norm normalize rms_norm",
    ),
)  # fmt: skip

POINTWISE = (
    Kind("add", T.FRESH, "add", rule=pointwise.add, onnx="Add Sum"),
    Kind("sub", T.FRESH, "sub subtract", rule=pointwise.sub, onnx="Sub"),
    Kind("rsub", T.FRESH, "rsub", rule=pointwise.rsub),
    Kind(
        "mul", T.FRESH, "mul multiply", rule=pointwise.mul, when=traits.product, onnx="Mul",
    ),
    Kind(
        "div", T.FRESH, "div divide true_divide truediv", rule=pointwise.div, onnx="Div",
    ),
    Kind("neg", T.FRESH, "neg negative", rule=pointwise.neg, onnx="Neg"),
    Kind(
        "identity", T.SAME, "contiguous alias positive pos", rule=pointwise.identity,
        leaf=Leaf((nn.Identity,)), onnx="Identity", wiring=wiring.same,
    ),
    Kind("clone", T.SAME | T.FRESH, "clone", rule=pointwise.identity, wiring=wiring.same),
    Kind(
        "dropout", T.RANDOM,
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout",
        rule=pointwise.dropout,
    ),
    Kind(
        "dropout", T.SAME, rule=pointwise.train_only,
        leaf=Leaf(
            (*_each("Dropout"), nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout, TrainOnly)
        ),
        onnx="Dropout",
    ),
)  # fmt: skip

ACTIVATIONS = (
    Kind("relu", _RECTIFIED | T.CLIPS, "relu", leaf=Leaf((nn.ReLU,)), onnx="Relu"),
    Kind("relu6", _RECTIFIED | T.CLIPS, "relu6", leaf=Leaf((nn.ReLU6,))),
    Kind("clamp", _CURVE, "clamp clip", when=traits.clamp, onnx="Clip"),
    Kind("clamp_min", _CURVE, "clamp_min", when=traits.clamp_min),
    Kind("clamp_max", _CURVE, "clamp_max"),
    Kind(
        "hardtanh", _CURVE, "hardtanh", when=traits.hardtanh,
        leaf=Leaf((nn.Hardtanh,), values="min_val max_val"),
    ),
    Kind(
        "threshold", _CURVE, "threshold", when=traits.threshold,
        leaf=Leaf((nn.Threshold,), values="threshold value"), onnx="ThresholdedRelu",
    ),
    Kind(
        "sigmoid", _RECTIFIED | T.TABLE, "sigmoid special_expit", also=[torch.special.expit],
        leaf=Leaf((nn.Sigmoid,)), onnx="Sigmoid",
    ),
    Kind(
        "leaky_relu", _CURVE | T.TABLE, "leaky_relu", leaf=Leaf((nn.LeakyReLU,)),
        onnx="LeakyRelu",
    ),
    Kind("silu", _CURVE | T.SWISH, "silu", leaf=Leaf((nn.SiLU,)), onnx="Swish"),
    Kind(
        "hardsigmoid", _RECTIFIED, "hardsigmoid", leaf=Leaf((nn.Hardsigmoid,)),
        onnx="HardSigmoid",
    ),
    Kind("softplus", _RECTIFIED, "softplus", leaf=Leaf((nn.Softplus,)), onnx="Softplus"),
    Kind("hardswish", _CURVE, "hardswish", leaf=Leaf((nn.Hardswish,)), onnx="HardSwish"),
    Kind("tanh", _CURVE, "tanh", leaf=Leaf((nn.Tanh,)), onnx="Tanh"),
    Kind("gelu", _CURVE, "gelu", leaf=Leaf((nn.GELU,)), onnx="Gelu"),
    Kind("elu", _CURVE, "elu", leaf=Leaf((nn.ELU,)), onnx="Elu"),
    Kind("selu", _CURVE, "selu", leaf=Leaf((nn.SELU,)), onnx="Selu"),
    Kind("celu", _CURVE, "celu", leaf=Leaf((nn.CELU,)), onnx="Celu"),
    Kind("mish", _CURVE, "mish", leaf=Leaf((nn.Mish,)), onnx="Mish"),
    Kind("softsign", _CURVE, "softsign", leaf=Leaf((nn.Softsign,)), onnx="Softsign"),
    Kind("prelu", _CURVE, "prelu", leaf=Leaf((nn.PReLU,)), onnx="PRelu"),
    Kind("softmax", T.FRESH | T.NON_NEGATIVE, "softmax", leaf=Leaf((nn.Softmax, nn.Softmax2d))),
    Kind("log_softmax", T.FRESH, "log_softmax", leaf=Leaf((nn.LogSoftmax,))),
    Kind("abs", T.FRESH | T.NON_NEGATIVE, "abs absolute"),
    Kind("square", T.FRESH | T.NON_NEGATIVE, "square"),
    Kind("sqrt", T.FRESH | T.NON_NEGATIVE, "sqrt rsqrt exp exp2"),
    Kind("pow", T.FRESH, "pow", when=traits.power),
)  # fmt: skip

POOLS = (
    *(
        Kind(
            "avgpool", T.AVERAGES | T.KEEPS_SIGN | T.FRESH, f"avg_pool{n}d",
            rule=partial(spatial.avg_pool, axes=n),
            leaf=Leaf((getattr(nn, f"AvgPool{n}d"),), values=_POOL),
            onnx="AveragePool GlobalAveragePool" if n == 2 else "",
            wiring=partial(wiring.avg_pool, axes=n),
        )
        for n in (1, 2, 3)
    ),
    *(
        Kind(
            "average", T.AVERAGES | T.KEEPS_SIGN | T.FRESH, f"adaptive_avg_pool{n}d",
            leaf=Leaf((getattr(nn, f"AdaptiveAvgPool{n}d"),), values="output_size"),
            wiring=partial(wiring.adaptive_pool, axes=n),
        )
        for n in (1, 2, 3)
    ),
    Kind(
        "average", T.AVERAGES | T.KEEPS_SIGN | T.FRESH, "mean", onnx="ReduceMean",
        wiring=wiring.mean,
    ),
    Kind(
        "max_pool", _MOVED | T.MAXIMUM | T.FRESH, "max_pool1d max_pool2d max_pool3d",
        leaf=Leaf(_each("MaxPool")), onnx="MaxPool",
    ),
    Kind(
        "adaptive_max_pool", T.KEEPS_SIGN | T.FRESH,
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
        leaf=Leaf(_each("AdaptiveMaxPool")),
    ),
    Kind("reduction", T.FRESH | T.KEEPS_SIGN, "amax amin sum", onnx="GlobalMaxPool ReduceMax"),
    Kind("variance", T.FRESH | T.NON_NEGATIVE, "var std"),
)  # fmt: skip

PADS = (
    *(
        Kind(
            "pad", T.FRESH | T.PADS, names, rule=spatial.pad, leaf=_pads(mode, classes), onnx=onnx,
            wiring=wiring.pad,
        )
        for names, mode, classes, onnx in (
            ("pad", "constant", (*_each("ConstantPad"), *_each("ZeroPad")), "Pad"),
            ("", "reflect", _each("ReflectionPad"), ""),
            ("", "replicate", _each("ReplicationPad"), ""),
            ("", "circular", _each("CircularPad"), ""),
        )
    ),
    Kind(
        "pad", T.FRESH | T.PADS, "constant_pad_nd", rule=spatial.constant_pad,
        wiring=wiring.constant_pad,
    ),
    Kind("pad", T.FRESH | T.PADS, rule=spatial.pad_own, also=[pad_with]),
)  # fmt: skip

CHANNELS = (
    Kind("cat", T.JOINS | T.FRESH, "cat concat concatenate", rule=channels.cat, onnx="Concat"),
    Kind("stack", T.JOINS | T.FRESH | T.KEEPS_SIGN, "stack hstack vstack dstack"),
    Kind("chunk", _MOVED, "chunk", rule=channels.chunk),
    Kind("split", _MOVED, "split split_with_sizes", rule=channels.split, onnx="Split"),
    Kind(
        "getitem", T.KEEPS_SIGN, "getitem", rule=channels.getitem, wiring=wiring.getitem,
    ),
    Kind(
        "slice", _MOVED, "slice", rule=channels.slice_dim, onnx="Slice", wiring=wiring.along,
    ),
    Kind("narrow", _MOVED, "narrow", rule=channels.narrow, wiring=wiring.along),
    Kind(
        "index_select", _MOVED, "index_select", rule=channels.index_select, onnx="Gather",
        wiring=wiring.along,
    ),
    Kind("flip", _MOVED, "flip", rule=channels.flip, wiring=wiring.flip),
    Kind(
        "channel_shuffle", _MOVED, "channel_shuffle native_channel_shuffle",
        rule=channels.channel_shuffle, leaf=Leaf((nn.ChannelShuffle,), values="groups"),
    ),
    Kind(
        "permute", _MOVED, "permute", rule=channels.permute, onnx="Transpose",
        wiring=wiring.permute,
    ),
    Kind(
        "transpose", _MOVED, "transpose swapaxes swapdims", rule=channels.transpose,
        wiring=wiring.transpose,
    ),
    Kind("movedim", _MOVED, "movedim moveaxis", rule=channels.movedim, wiring=wiring.movedim),
)  # fmt: skip

SHAPES = (
    Kind(
        "flatten", _SHAPED, "flatten", leaf=Leaf((nn.Flatten,), values="start_dim end_dim"),
        onnx="Flatten", wiring=wiring.flatten,
    ),
    Kind("reshape", _SHAPED, "reshape", onnx="Reshape", wiring=wiring.reshape),
    Kind("reshape", _SHAPED, "reshape_as view_as", wiring=wiring.reshape_as),
    Kind("reshape", _SHAPED, "unflatten", leaf=Leaf((nn.Unflatten,))),
    Kind("reshape", names="view", when=traits.view, wiring=wiring.reshape),
    Kind("squeeze", _SHAPED, "squeeze", onnx="Squeeze", wiring=wiring.squeeze),
    Kind("squeeze", _SHAPED, "unsqueeze", onnx="Unsqueeze", wiring=wiring.unsqueeze),
    Kind("expand", _MOVED | T.SPREADS, "expand expand_as", onnx="Expand Tile"),
    Kind(
        "pixel_shuffle", _MOVED | T.FRESH, "pixel_shuffle pixel_unshuffle",
        leaf=Leaf((nn.PixelShuffle, nn.PixelUnshuffle)), onnx="DepthToSpace SpaceToDepth",
    ),
    Kind(
        "resize", T.FRESH, "interpolate", when=traits.interpolate,
        leaf=Leaf(
            (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
            values="size scale_factor mode",
        ),
        wiring=wiring.spatial,
    ),
    Kind(
        "resize", _MOVED | T.FRESH, "upsample_nearest1d upsample_nearest2d upsample_nearest3d",
        wiring=wiring.spatial,
    ),
    Kind(
        "resize", T.KEEPS_SIGN | T.FRESH,
        "upsample_linear1d upsample_bilinear2d upsample_trilinear3d", wiring=wiring.spatial,
    ),
    Kind("store", T.STORES, "setitem copy slice_scatter", also=[aten.copy_.default]),
)  # fmt: skip

OTHERS = (
    Kind("product of matrices", T.FRESH, "matmul bmm mm addmm"),
    Kind(
        "random", T.RANDOM,
        "rand rand_like randn randn_like randint randint_like randperm normal bernoulli poisson "
        "multinomial binomial gumbel_softmax rrelu uniform exponential cauchy geometric log_normal "
        "random fractional_max_pool2d fractional_max_pool3d",
    ),
    Kind("empty", T.UNSET | T.FRESH, "empty empty_like empty_strided new_empty new_empty_strided"),
    Kind("size", T.MEASURES, "size dim ndimension numel nelement is_floating_point"),
    Kind("attribute", when=traits.attribute, also=(getattr,)),
    Kind("guard", also=[holds]),
    Kind(
        "check", T.CHECKS,
        also=[
            torch._assert, aten._assert_async.msg, aten._assert_scalar.default,
            aten._assert_tensor_metadata.default, aten.sym_constrain_range_for_size.default,
        ],
    ),
)  # fmt: skip

KINDS = (*LAYERS, *NORMS, *POINTWISE, *ACTIVATIONS, *POOLS, *PADS, *CHANNELS, *SHAPES, *OTHERS)
UNKNOWN = Kind("")


def _by(spelled: Callable[[Kind], Iterable[Any]]) -> dict[Any, Kind]:
    found: dict[Any, Kind] = {}
    for row in KINDS:
        for spelling in spelled(row):
            assert found.setdefault(spelling, row) is row, f"{spelling} stands in two rows"
    return found


_CALLS = _by(lambda row: row.spelled)
_LEAVES = _by(lambda row: row.leaf.classes if row.leaf else ())


def layers() -> frozenset[type[nn.Module]]:
    """The classes of torch.nn that are a convolution or linear layer."""
    return frozenset(cls for cls, row in _LEAVES.items() if Trait.LAYER in row.traits)


def kind_of(node: fx.Node, module: nn.Module | None = None) -> Kind:
    """The row of the operator that a node calls, or UNKNOWN.

    `module`: the module that a call_module node calls.
    """
    if module is not None:
        return kind_of_layer(module)
    return (
        _CALLS.get(node.target, UNKNOWN) if node.op in ("call_function", "call_method") else UNKNOWN
    )


def kind_of_layer(module: nn.Module) -> Kind:
    """The row of a layer: that of its class, or of a base class whose forward it still uses."""
    cls: Any = type(module)
    for base in cls.__mro__:
        if base in _LEAVES:
            kept = cls.forward is base.forward and "forward" not in module.__dict__
            return _LEAVES[base] if kept else UNKNOWN
    return UNKNOWN


def with_trait(some: Trait) -> frozenset[str]:
    """The ONNX operators that have one of these traits."""
    return frozenset(name for row in KINDS for name in row.onnx.split() if row.traits & some)


def overrides(module: nn.Module) -> bool:
    """Whether the module derives from a known layer but has a forward of its own."""
    return (
        any(base in _LEAVES for base in type(module).__mro__) and kind_of_layer(module) is UNKNOWN
    )
