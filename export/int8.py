"""Eight-bit weights for CPUs: ONNX Runtime's dynamic quantization of the tower's linear layers.

Weights are quantized per channel, activations at run time by their range in the batch: so an answer depends a little
on what else is in the batch. Attention, the patch embedding, the projection and everything that belongs to the edit
stay in float32: a latent must fire where it fires in torch.
"""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

_LINEAR = "aten.linear.default"


def quantize(model: Path, quantized: Path) -> None:
    """Write `model` with its linear layers in int8 as `quantized`."""
    proto = onnx.load(model)
    del proto.graph.value_info[:]  # the quantizer transposes weights, and would be told shapes they had before
    matrix_products = [node for node in proto.graph.node if node.op_type in ("MatMul", "Gemm")]
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # its advice to run a preprocessing that an exported graph went through already
    try:
        quantize_dynamic(
            proto,
            quantized,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=[node.name for node in matrix_products if not _is_linear(node)],
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logger.setLevel(level)


def _is_linear(node: onnx.NodeProto) -> bool:
    """Whether a matrix product is that of a linear layer of the tower, by what the exporter says of its origin."""
    origin = next((entry.value for entry in node.metadata_props if entry.key == "namespace"), "")
    return _LINEAR in origin
