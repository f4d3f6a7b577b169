"""Exports ONNX graphs, one per kind of input, that map tensors to unit vectors and run in onnxruntime without torch.

B rows, L positions of `input_ids`, P embedding width. In every graph B is dynamic, and L up to the model's longest
text; images must have the model's image size.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel, ProcessorMixin

# graph -> the model's method for its kind of input
METHODS = {"text": "get_text_features", "image": "get_image_features", "image_text": "get_multimodal_features"}
RECORD = "onnx.json"
OUTPUT = "vectors"  # torch names some internal values of a graph `embedding`
# largest allowed difference between a graph and the model
TOLERANCE = 1e-4
# protobuf is limited to 2 GiB; larger models get their weights in a file beside the graph
LARGE = 1 << 30
# texts of several lengths, since a size that all examples share becomes a constant of the graph
EXAMPLE, OTHERS = ("a red apple on a table", "a green tree", "x y z w"), ("one", "two words")


class Embedding(nn.Module):
    """Embeds one kind of input: the tensors called `names` -> unit vectors (B, P)."""

    def __init__(self, model: PreTrainedModel, method: str, names: tuple[str, ...]):
        super().__init__()
        self.model = model
        self.method = method
        self.names = names

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        features = getattr(self.model, self.method)(**dict(zip(self.names, given, strict=True)))
        return nn.functional.normalize(features.pooler_output, dim=-1)  # (B, P)


def export_program(module: Embedding, inputs: Mapping[str, torch.Tensor], longest: int) -> ExportedProgram:
    """
    Exports a module as a torch graph for any number of rows.

    Args:
        inputs: An example with several rows and texts of several lengths: `input_ids` (B, L) and the other inputs.
        longest (`int`): Tokens of the longest text, without [CLS].
    """
    # an image always has the same number of placeholders, before the text
    placed = 0
    if "input_ids" in inputs and "pixel_values" in inputs:
        is_placeholder = inputs["input_ids"] == module.model.config.image_token_id  # (B, L)
        placed = int(is_placeholder.sum(1).max())

    # at least two rows: torch.export would make a single one a constant
    rows = Dim("batch", min=2)
    length = Dim("length", min=placed + 2, max=placed + 1 + longest)
    shapes = tuple({0: rows} if name == "pixel_values" else {0: rows, 1: length} for name in inputs)
    with torch.no_grad():
        return torch.export.export(module.eval(), tuple(inputs.values()), dynamic_shapes=(shapes,))


def write_graph(program: ExportedProgram, names: tuple[str, ...], path: Path) -> None:
    """Writes the ONNX graph of a program, with inputs called `names` and the output `vectors`."""
    weights = sum(one.numel() * one.element_size() for one in program.state_dict.values())
    named = {"input_names": names, "output_names": [OUTPUT]}
    graph = torch.onnx.export(program, (), **named, dynamo=True, verbose=False)
    graph.save(path, external_data=weights > LARGE)


def export_onnx(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    directory: str | Path,
    int8: bool = False,
    kinds: Iterable[str] = tuple(METHODS),
) -> Iterator[tuple[str, float]]:
    """
    Writes `text.onnx`, `image.onnx` and, if the model embeds both together, `image_text.onnx`, with the processor
    and `onnx.json`, which names their inputs.

    Args:
        int8: Also write `*_int8.onnx`: weights of matrix products in 8 bits (onnxruntime's dynamic quantisation).
        kinds: The graphs to write, of "text", "image" and "image_text".

    Yields:
        (file name, largest absolute difference from torch's output) for each graph, as it is written.

    Raises:
        FileExistsError: `directory` contains something other than such an export.
        ValueError: the model has no embeddings.
        RuntimeError: a graph's vectors differ by more than 1e-4 from torch's.
        ImportError: onnxruntime or onnxscript is missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ImportError(f"the export needs onnxscript and onnxruntime: {error.name} is missing; "
                          f"pip install 'oner[onnx]'") from error  # fmt: skip
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()) and not (directory / RECORD).is_file():
        raise FileExistsError(f"{directory} contains something other than exported graphs; expected a new directory")
    methods = {kind: METHODS[kind] for kind in kinds if hasattr(model, METHODS[kind])}
    if not methods:
        raise ValueError(f"{type(model).__name__} has no embeddings; expected one of {', '.join(METHODS.values())}")

    # the processor prepares the inputs of the graphs
    directory.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(directory)
    record: dict[str, Any] = {}
    for kind, method in methods.items():
        given = example_of(processor, kind, EXAMPLE)
        module = Embedding(model, method, tuple(given)).eval()
        path = directory / f"{kind}.onnx"
        write_graph(export_program(module, given, processor.max_text_length), module.names, path)
        record[kind] = {"file": path.name, "inputs": list(given), "output": OUTPUT}

        # compared with torch for another number of rows and other lengths
        distance = distance_of(onnxruntime.InferenceSession(path), module, example_of(processor, kind, OTHERS))
        if distance > TOLERANCE:
            raise RuntimeError(f"{path} differs by {distance:.2g} from torch; expected at most {TOLERANCE}")
        yield path.name, distance
        if int8:
            small = directory / f"{kind}_int8.onnx"
            # the stem, the only convolution, stays in fp32: int8 convolutions are slower on a CPU
            quantize_dynamic(path, small, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8)
            session = onnxruntime.InferenceSession(small)
            yield small.name, distance_of(session, module, example_of(processor, kind, OTHERS))
    text = json.dumps(record | {"dimensions": model.config.projection_dim}, indent=2)
    (directory / RECORD).write_text(text + "\n", encoding="utf-8")


def example_of(processor: ProcessorMixin, kind: str, texts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Example inputs of a graph, one row per text."""
    pictures = [Image.new("RGB", (48, 40), (90 * number, 160, 60)) for number in range(len(texts))]
    if kind == "image":
        # without the placeholder tokens, which carry no information here
        return {"pixel_values": processor(images=pictures)["pixel_values"]}
    return dict(processor(text=list(texts), images=pictures) if kind == "image_text" else processor(text=list(texts)))


def distance_of(session: Any, module: Embedding, inputs: Mapping[str, torch.Tensor]) -> float:
    """The largest absolute difference between a session's vectors and torch's."""
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        return float((torch.from_numpy(found) - module(*inputs.values())).abs().max())
