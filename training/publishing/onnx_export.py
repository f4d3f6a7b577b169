"""ONNX: a graph for each kind of input, from tensors to unit vectors, which onnxruntime runs without torch.

B rows, L positions of `input_ids`, P embedding width. B is free in every graph, and L up to the model's longest text;
pictures have the size that the model was made for.
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

# graph -> what of a model embeds its kind of input
METHODS = {"text": "get_text_features", "image": "get_image_features", "image_text": "get_multimodal_features"}
RECORD = "onnx.json"
OUTPUT = "vectors"  # torch calls some of a graph's own values `embedding`
# a graph that says something else than the model is not left
TOLERANCE = 1e-4
# protobuf holds 2 GiB; what comes near it has its weights in a file beside the graph
LARGE = 1 << 30
# texts of several lengths, since what all examples share becomes a constant of the graph
EXAMPLE, OTHERS = ("a red apple on a table", "a green tree", "x y z w"), ("one", "two words")


class Embedding(nn.Module):
    """One kind's embedding: the tensors called `names` -> unit vectors (B, P)."""

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
    torch's graph of a module for any number of rows.

    Args:
        inputs: An example, of several rows and of texts of several lengths; `input_ids` (B, L) and what goes along.
        longest (`int`): Tokens of the longest text, [CLS] not counted.
    """
    # of a picture's placeholders, which come before the text, there are always as many
    placed = 0
    if "input_ids" in inputs and "pixel_values" in inputs:
        is_placeholder = inputs["input_ids"] == module.model.config.image_token_id  # (B, L)
        placed = int(is_placeholder.sum(1).max())

    # one row is no example: torch.export would make it a constant
    rows = Dim("batch", min=2)
    length = Dim("length", min=placed + 2, max=placed + 1 + longest)
    shapes = tuple({0: rows} if name == "pixel_values" else {0: rows, 1: length} for name in inputs)
    with torch.no_grad():
        return torch.export.export(module.eval(), tuple(inputs.values()), dynamic_shapes=(shapes,))


def write_graph(program: ExportedProgram, names: tuple[str, ...], path: Path) -> None:
    """The ONNX graph of a program, whose inputs are called `names` and whose output `vectors`."""
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
    Writes `text.onnx`, `image.onnx` and, where the model reads both as one, `image_text.onnx`, with the processor
    beside them and `onnx.json`, which names their inputs.

    Args:
        int8: Also `*_int8.onnx`: weights of matrix products in 8 bits (onnxruntime's dynamic quantisation).
        kinds: Of "text", "image" and "image_text" those that are wanted.

    Yields:
        (file name, largest difference of any number from torch's) of each graph, as it is written.

    Raises:
        FileExistsError: `directory` holds something else than such an export.
        ValueError: the model has no embeddings.
        RuntimeError: a graph's vectors are more than 1e-4 from torch's.
        ImportError: onnxruntime or onnxscript is missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ImportError(f"graphs are written by onnxscript and tried by onnxruntime: {error.name} is missing; "
                          f"pip install 'oner[onnx]'") from error  # fmt: skip
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()) and not (directory / RECORD).is_file():
        raise FileExistsError(f"{directory} holds something else than exported graphs; expected a new directory")
    methods = {kind: METHODS[kind] for kind in kinds if hasattr(model, METHODS[kind])}
    if not methods:
        raise ValueError(f"{type(model).__name__} has no embeddings; expected one of {', '.join(METHODS.values())}")

    # the processor, by which a program makes what the graphs read
    directory.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(directory)
    record: dict[str, Any] = {}
    for kind, method in methods.items():
        given = example_of(processor, kind, EXAMPLE)
        module = Embedding(model, method, tuple(given)).eval()
        path = directory / f"{kind}.onnx"
        write_graph(export_program(module, given, processor.max_text_length), module.names, path)
        record[kind] = {"file": path.name, "inputs": list(given), "output": OUTPUT}

        # against torch, with another number of rows and other lengths
        distance = distance_of(onnxruntime.InferenceSession(path), module, example_of(processor, kind, OTHERS))
        if distance > TOLERANCE:
            raise RuntimeError(f"{path} differs by {distance:.2g} from torch; expected at most {TOLERANCE}")
        yield path.name, distance
        if int8:
            small = directory / f"{kind}_int8.onnx"
            # a convolution of 8 bits is slower than one of 32 on a CPU, and one stem is all that there is
            quantize_dynamic(path, small, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8)
            session = onnxruntime.InferenceSession(small)
            yield small.name, distance_of(session, module, example_of(processor, kind, OTHERS))
    text = json.dumps(record | {"dimensions": model.config.projection_dim}, indent=2)
    (directory / RECORD).write_text(text + "\n", encoding="utf-8")


def example_of(processor: ProcessorMixin, kind: str, texts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What a graph reads, of as many rows as there are texts."""
    pictures = [Image.new("RGB", (48, 40), (90 * number, 160, 60)) for number in range(len(texts))]
    if kind == "image":
        # placeholders of pictures alone say nothing
        return {"pixel_values": processor(images=pictures)["pixel_values"]}
    return dict(processor(text=list(texts), images=pictures) if kind == "image_text" else processor(text=list(texts)))


def distance_of(session: Any, module: Embedding, inputs: Mapping[str, torch.Tensor]) -> float:
    """The largest difference between a session's vectors and torch's."""
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        return float((torch.from_numpy(found) - module(*inputs.values())).abs().max())
