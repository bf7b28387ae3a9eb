"""ONNX graphs of a bundle, opened with threads set on purpose."""

from pathlib import Path

import onnxruntime


def open_graph(path: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """A session that runs one graph.

    Args:
        threads: CPU threads of one run; 0 for one a core.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin while they wait take the cores from decoding and from other sessions.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options)
