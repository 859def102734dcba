"""The backbone as an ONNX graph: ``build_graph``, made by torch's exporter, and ``store_weights_as_float16``.

Of torch's two exporters this takes the one on ``torch.export``, which needs onnxscript; the other, on TorchScript, is deprecated, and for
this network writes three times the nodes. It knows operator set 18 and later, while onnxruntime 1.8, which MFR-Ongoing runs, reads 14 at
most. Two operators of the network are newer than 14, so they are given to the exporter in older ones:

- LayerNormalization (17) as mean, difference, power, root and quotient, the form that onnxruntime knows and joins into one kernel again;
- attention, which torch writes with operators on shapes, as two matrix products and a softmax.

Of the rest only ReduceMean changed in between (its axes became an input), and is turned back.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from eval.errors import EvalError
from model.vit import IMAGE_SIZE, PatchProjection, Vit

INPUT, OUTPUT = "image", "embedding"
OPSETS = range(14, 23)  # 23 has an operator for attention, which is not made use of here
_EXPORTERS_OPSET = 18  # the oldest that the exporter writes


def build_graph(net: Vit, opset: int) -> onnx.ModelProto:
    """The network in eval mode: one input ``image`` float32 [batch, 3, 112, 112] in -1..1, one output ``embedding`` float32 [batch, D].

    The batch size is dynamic, all weights are inside, and the IR version is the oldest of the operator set. The network is left as it was,
    but for its mode. Takes the memory of the weights about twice besides the network.
    Args:
        opset: of ``OPSETS``.
    """
    patches = net.patch_embed["proj"]
    net.eval().patch_embed["proj"] = _Convolution(patches)
    try:
        with _without_chatter():
            program = torch.onnx.export(
                net,
                (torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE, device=patches.weight.device),),
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=max(opset, _EXPORTERS_OPSET),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                custom_translation_table=_translations(opset),
                verbose=False,
            )
    finally:
        net.patch_embed["proj"] = patches
    model = program.model_proto
    del program
    _drop_descriptions(model)
    if opset < _EXPORTERS_OPSET:
        _axes_as_attributes(model.graph)
        model.opset_import[0].version = opset
    model.ir_version = helper.find_min_ir_version_for(list(model.opset_import))
    return model


def store_weights_as_float16(graph: onnx.GraphProto) -> None:
    """Keep the matrices of all products as float16, each followed by a Cast: half the file, and the arithmetic stays float32.

    So the graph runs wherever the float32 one does, its input and output are the same, and what is lost is the rounding of the weights
    alone. onnxruntime casts once, when it opens the graph. Biases, norms and positions stay float32.
    Raises: EvalError for a weight beyond float16.
    """
    products = {name for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul") for name in node.input}
    casts = []
    for tensor in graph.initializer:
        if tensor.name not in products or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        values = numpy_helper.to_array(tensor)
        largest, limit = np.abs(values).max(), np.finfo(np.float16).max
        if largest > limit:
            raise EvalError(f"{tensor.name}: a weight of {largest:g} is beyond float16 ({limit:g}); export without --fp16")
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_float16"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], name=f"{name}_cast", to=TensorProto.FLOAT))
    first = list(graph.node)
    del graph.node[:]
    graph.node.extend(casts + first)


class _Convolution(nn.Module):
    """The patch projection as the one convolution that it is: every runtime has a kernel for it, and none for cutting patches."""

    def __init__(self, patches: PatchProjection):
        super().__init__()
        self.patches = patches

    def forward(self, images: Tensor) -> Tensor:
        return nn.Conv2d.forward(self.patches, images).flatten(2).transpose(1, 2)


def _translations(opset: int) -> dict[Callable, Callable]:
    """How two of torch's operators are written; see above."""
    from onnxscript import opset18 as op  # here, because it takes a second to import

    # Both are called with the arguments of torch's operators, by position.
    def layer_norm(x: Any, shape: Any, weight: Any, bias: Any, eps: float = 1e-5, cudnn_enable: bool = True) -> Any:
        difference = op.Sub(x, op.ReduceMean(x, [-1], keepdims=1))
        # A power and no product: a Sub with a Mul among the first nodes is how evaluators know graphs that normalise their input.
        variance = op.ReduceMean(op.Pow(difference, 2.0), [-1], keepdims=1)
        return op.Add(op.Mul(op.Div(difference, op.Sqrt(op.Add(variance, op.Constant(value_float=eps)))), weight), bias)

    def attention(
        q: Any,
        k: Any,
        v: Any,
        mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: Any = None,
        enable_gqa: bool = False,
    ) -> Any:
        scores = op.MatMul(op.Mul(q, op.Constant(value_float=q.shape[-1] ** -0.5)), op.Transpose(k, perm=[0, 1, 3, 2]))
        return op.MatMul(op.Softmax(scores, axis=-1), v)

    translations: dict[Callable, Callable] = {torch.ops.aten.scaled_dot_product_attention.default: attention}
    if opset < 17:
        translations[torch.ops.aten.layer_norm.default] = layer_norm
    return translations


def _axes_as_attributes(graph: onnx.GraphProto) -> None:
    """ReduceMean of operator set 18 to that of 13 to 17."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    used = {name for node in graph.node if node.op_type != "ReduceMean" for name in node.input}
    for node in graph.node:
        if node.op_type == "ReduceMean":
            axes = numpy_helper.to_array(constants[node.input.pop()]).tolist()
            keepdims = next(each.i for each in node.attribute if each.name == "keepdims")
            del node.attribute[:]
            node.attribute.extend([helper.make_attribute("axes", axes), helper.make_attribute("keepdims", keepdims)])
    used |= {name for node in graph.node for name in node.input}
    for name in constants.keys() - used:
        graph.initializer.remove(constants[name])


def _drop_descriptions(model: onnx.ModelProto) -> None:
    """The exporter notes lines of source with the folders of this machine at every node, which IR versions before 10 don't allow."""
    graph = model.graph
    del graph.value_info[:]
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""


@contextmanager
def _without_chatter() -> Iterator[None]:
    """The exporter warns of libraries that it could do without, and of itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
