"""Ways to run a whole sampling loop: each builder turns a loop module into a plain callable.

A builder takes the module and example inputs of the one batch size that it will be called with, and
returns a function of the same tensors. Nothing here checks shapes or pads rows; that is
:mod:`diffpolicy.runtime.compile`.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffpolicy.extras import installed, need
from diffpolicy.runtime.exported import cpu_session
from diffpolicy.runtime.graph import LoopGraph

Run = Callable[..., Tensor]  # of the example's tensors, in their order
Builder = Callable[[nn.Module, Sequence[Tensor], int], Run]

# The packages that a backend cannot do without.
REQUIRES = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
OPSET = 17  # the first with LayerNormalization; old enough for every runtime in use


def missing(backend: str) -> list[str]:
    """The packages that ``backend`` lacks here."""
    return [name for name in REQUIRES.get(backend, ()) if not installed(name)]


def eager(module: nn.Module, example: Sequence[Tensor], threads: int) -> Run:
    """PyTorch as it is, without autograd."""

    def run(*inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            output: Tensor = module(*inputs)
            return output

    return run


def inductor(module: nn.Module, example: Sequence[Tensor], threads: int) -> Run:
    """``torch.compile`` of the whole loop; builds for minutes, needs a C++ compiler on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates what its own compiler imports
        compiled: Any = torch.compile(module, dynamic=False)
        run = eager(compiled, example, threads)
        for _ in range(2):
            run(*example)
    return run


def cuda_graph(module: nn.Module, example: Sequence[Tensor], threads: int) -> Run:
    """Every kernel of the whole loop recorded once as one CUDA graph, then replayed.

    Inputs are copied into fixed buffers, so the launches of K steps cost as much as one.

    Raises:
        ValueError: the loop is not on a CUDA device.
    """
    _check_device("cuda_graph", "cuda", "'onnxruntime' or 'openvino' on a CPU", example)
    device = example[0].device
    buffers = [tensor.clone() for tensor in example]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.no_grad():
        # Libraries pick kernels and allocate workspaces in their first calls, which must not be
        # recorded; PyTorch asks for a stream of its own for these warm-up calls.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                module(*buffers)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            output: Tensor = module(*buffers)

    def run(*inputs: Tensor) -> Tensor:
        for buffer, tensor in zip(buffers, inputs, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        graph.replay()
        return output.clone()  # the next replay overwrites it

    return run


def onnxruntime(module: nn.Module, example: Sequence[Tensor], threads: int) -> Run:
    """The whole loop as one ONNX graph on ONNX Runtime's CPU provider."""
    _check_device("onnxruntime", "cpu", "'cuda_graph'", example)
    session = cpu_session(_graph(module, example), threads)
    wanted = {entry.name for entry in session.get_inputs()}
    return lambda *inputs: torch.from_numpy(session.run(None, _feed(inputs, wanted))[0])


def openvino(module: nn.Module, example: Sequence[Tensor], threads: int) -> Run:
    """The whole loop as one ONNX graph, compiled by OpenVINO for this CPU in float32."""
    _check_device("openvino", "cpu", "'cuda_graph'", example)
    core = _openvino_core()
    model = core.read_model(_graph(module, example))
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # the default may be bfloat16, which misses 1e-4
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()
    wanted = {name for port in model.inputs for name in port.get_names()}

    def run(*inputs: Tensor) -> Tensor:
        result = request.infer(_feed(inputs, wanted), share_inputs=True, share_outputs=True)
        return torch.from_numpy(result[0].copy())  # the next call overwrites the shared output

    return run


def _feed(inputs: Sequence[Tensor], wanted: set[str]) -> dict[str, Any]:
    """The inputs that are left in a graph, by name: the exporter drops those that do not matter."""
    named = {f"input_{i}": tensor for i, tensor in enumerate(inputs)}
    return {name: named[name].contiguous().numpy() for name in named if name in wanted}


def _graph(module: nn.Module, example: Sequence[Tensor]) -> bytes:
    """The ONNX graph of a loop: its step once where that pays and the network allows it."""
    names = [f"input_{i}" for i in range(len(example))]
    form = module.rolled() if isinstance(module, LoopGraph) else module
    try:
        return to_onnx(form, example, names, ["plan"])
    except RuntimeError:  # of the exporter: within a loop it wants constants of some operators
        return to_onnx(module, example, names, ["plan"])


BUILDERS: Mapping[str, Builder] = {
    "eager": eager,
    "torch.compile": inductor,
    "cuda_graph": cuda_graph,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def to_onnx(
    module: nn.Module,
    example: Sequence[Tensor],
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> bytes:
    """A module as the bytes of an ONNX file.

    PyTorch's tracing exporter is used: the loop has no control flow that depends on data, and the
    newer ``torch.export`` route takes ten times as long for the same graph.

    Args:
        module: to be traced in inference mode.
        example: its inputs.
        inputs: their names; the exporter leaves inputs that do not matter out of the file.
        outputs: names of its outputs.
        dynamic: free axes by name of input or output, e.g. ``{"plan": {0: "batch"}}``.

    Raises:
        ImportError: the package ``onnx`` is missing.
    """
    need("onnx")
    module.eval()  # or the exporter leaves it, and the policy it shares weights with, in training
    buffer = io.BytesIO()
    # The exporter puts the outermost module's mode back into all of its parts: a policy's encoder
    # would crop at random ever after.
    module.eval()
    with warnings.catch_warnings(), torch.no_grad():
        # Shape checks are Python branches on constants, which the tracer reports one by one, and
        # the exporter announces its successor.
        warnings.simplefilter("ignore")
        if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
            trace: Any = torch.jit.trace  # which keeps the loops of such parts
            module = trace(module, tuple(example), check_trace=False)
        torch.onnx.export(
            module,
            tuple(example),
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={k: dict(v) for k, v in dynamic.items()} if dynamic else None,
        )
    return buffer.getvalue()


@functools.cache
def _openvino_core() -> Any:
    """One core for the life of the process.

    OpenVINO's CPU plugin gives the thread that first uses it an alternate signal stack, and frees
    that stack with the last model of its core. With several cores the thread is left with a stack
    that is gone, and the next signal (a SIGTERM to a server) kills the process.
    """
    return need("openvino").Core()


def _check_device(backend: str, kind: str, instead: str, example: Sequence[Tensor]) -> None:
    device = example[0].device
    if device.type != kind:
        where = f"backend {backend!r} runs on {kind}, and this policy is on {device}"
        raise ValueError(f"{where}; load it with device={kind!r}, or use {instead}")
