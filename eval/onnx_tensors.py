"""The numbers in an ONNX file, wherever it keeps them."""

from collections.abc import Iterator

import onnx


def tensors(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, bool]]:
    """Every tensor in the file, those of subgraphs too, and whether it is an initializer. Attributes that are not set yield empty ones."""
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            nodes.extend(graph.node)
            yield from ((tensor, True) for tensor in graph.initializer)
            yield from ((tensor, True) for sparse in graph.sparse_initializer for tensor in (sparse.values, sparse.indices))
        else:
            for attribute in nodes.pop().attribute:
                graphs.extend([attribute.g, *attribute.graphs])
                yield from ((tensor, False) for tensor in (attribute.t, *attribute.tensors))
                sparse_tensors = (attribute.sparse_tensor, *attribute.sparse_tensors)
                yield from ((tensor, False) for sparse in sparse_tensors for tensor in (sparse.values, sparse.indices))


def external_files(model: onnx.ModelProto) -> list[str]:
    """Where, relative to the file, others hold numbers of it; onnxruntime sees to it that they lie beside it."""
    elsewhere = (tensor for tensor, _ in tensors(model) if tensor.data_location == onnx.TensorProto.EXTERNAL)
    return sorted({entry.value for tensor in elsewhere for entry in tensor.external_data if entry.key == "location"})
