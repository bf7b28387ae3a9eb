"""Networks as ONNX graphs, each compared with torch before it is used."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from raresynth.errors import CheckpointError

TOLERANCE = 1e-4
"""Largest difference between the graph's outputs and torch's, in absolute terms and relative to the output."""


@torch.no_grad()
def export_onnx(network: nn.Module, example: Tensor, name: str, outputs: Sequence[str], path: Path) -> None:
    """Write `network` as one ONNX file with a free batch dimension.

    Args:
        example: an input, at least two rows.
        name: name of the graph's input.

    Raises:
        CheckpointError: the graph's outputs differ from torch's by more than `TOLERANCE`.
    """
    with _silence():
        torch.onnx.export(
            network,
            (example,),
            str(path),
            input_names=[name],
            output_names=list(outputs),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
            external_data=False,
            dynamo=True,
        )
    _strip(path)
    session = onnxruntime.InferenceSession(str(path))
    for batch in (example, example[:1]):
        expected = network(batch)
        expected = [expected] if isinstance(expected, Tensor) else expected
        for output, got, want in zip(outputs, session.run(None, {name: batch.numpy()}), expected, strict=True):
            if not np.allclose(got, want.numpy(), rtol=TOLERANCE, atol=TOLERANCE):
                worst = float(np.abs(got - want.numpy()).max())
                raise CheckpointError(
                    f"the ONNX graph {path.name} differs from torch by {worst:.1e} in {output}; "
                    "choose another model, its graph cannot be trusted"
                )


def _strip(path: Path) -> None:
    """Drop the exporter's notes: they hold source paths of the machine that exported."""
    import onnx

    model = onnx.load(path)
    for holder in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del holder.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    onnx.save(model, path)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter reports each of its steps; only errors matter here."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
