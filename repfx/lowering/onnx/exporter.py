"""Runs torch.onnx quietly, for opset 13 and later, and puts each failure into one line."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings

import onnx
import torch
from torch import Tensor, nn
from torch.export.graph_signature import ConstantArgument, TensorArgument

from repfx.errors import InputError
from repfx.lowering.onnx import finish, older, sizes

FIXED = (
    "it computes with a fixed batch size; x.shape[0], or -1 in a view, would leave the batch "
    "dynamic"
)


class ExportError(InputError):
    """The exporter failed with these sizes free. With a fixed batch size it may not fail."""


def export(
    model: nn.Module, args: tuple[Tensor, ...], opset: int, free: sizes.Free
) -> onnx.ModelProto:
    """The graph of a model, with the sizes dynamic that are `free` (see `sizes`).

    Raises ExportError where the exporter fails or the model fixes a size, and InputError where an
    operator has no form in the opset."""
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(model, args, dynamic_shapes=sizes.free(args, free))
            _leave_out_numbers(exported)
            program = torch.onnx.export(
                exported, dynamo=True, opset_version=max(opset, older.WRITTEN), verbose=False
            )
    except InputError:
        raise
    except Exception as error:
        kind = (
            " in float16"
            if any(p.dtype == torch.float16 for p in (*model.parameters(), *args))
            else ""
        )
        kind += " with dynamic sizes" if free == "all" else ""
        raise ExportError(f"torch.onnx cannot export the model{kind}: {_why(error)}") from error
    finally:
        quiet.setLevel(level)
    assert program is not None
    proto = program.model_proto
    finish.name_codes(proto)
    sizes.name(proto, args, free)
    older.to_opset(proto, opset)
    return proto


def _leave_out_numbers(exported: torch.export.ExportedProgram) -> None:
    """Replaces numbers and texts among the outputs by None, which the exporter leaves out."""
    output = next(node for node in exported.graph.nodes if node.op == "output")
    values = list(output.args[0])
    for i, spec in enumerate(exported.graph_signature.output_specs):
        if not isinstance(spec.arg, TensorArgument):
            spec.arg, values[i] = ConstantArgument("", None), None
    output.args = (tuple(values),)


def _why(error: BaseException) -> str:
    """Why an export failed, in one line: the first and last error of torch's chain, no advice."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if re.search(r"specialized it to be a constant|Constraints violated \(batch\)", str(cause)):
        return FIXED
    said = [
        re.sub(r"\x1b\[[0-9;]*m", "", str(e)).strip().partition("\n")[0] for e in (error, cause)
    ]
    said = [
        re.sub(r"\s*(This is step \d/\d|See the stack trace|For more information).*", "", line)[
            :300
        ]
        for line in said
    ]
    return (
        "; ".join(dict.fromkeys(filter(None, (line.strip(" .;") for line in said))))
        or type(error).__name__
    )
