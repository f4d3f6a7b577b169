"""torch.export and ONNX of every family's text, image and pair, for batches and lengths that no example had.

B rows and L positions are dynamic; pixels have the size that the model was made for.
"""

import pytest
import torch
from families import KINDS, MASKED_LM, RETRIEVAL, inputs_of
from tiny_oner import joint_batch, text_of
from torch.export import Dim

from oner.training.publishing.onnx_export import METHODS, Embedding, export_program, write_graph

# kind of `families.KINDS` -> graph
GRAPHS = {"text": "text", "image": "image", "pair": "image_text"}
# lengths of captions: those that are exported with, and others that the program meets
EXAMPLE, OTHERS = [5, 3, 4], ([2, 0, 3, 1, 7], [1, 1], [9, 11, 0])


@pytest.fixture(scope="module", params=KINDS)
def exported(request, family):
    """A kind's module, the inputs of every batch, and the program of the first."""
    kind = request.param
    model = family.build(RETRIEVAL)
    batches = [inputs_of(model, kind, joint_batch(lengths)) for lengths in (EXAMPLE, *OTHERS)]
    module = Embedding(model, METHODS[GRAPHS[kind]], tuple(batches[0])).eval()
    return module, batches, export_program(module, batches[0], longest=12)


@torch.no_grad()
def test_an_exported_program_takes_other_batches_and_lengths(exported):
    module, batches, program = exported
    for inputs in batches:
        torch.testing.assert_close(program.module()(*inputs.values()), module(*inputs.values()), rtol=0, atol=1e-5)


@torch.no_grad()
def test_onnxruntime_gives_the_same(exported, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, batches, program = exported
    write_graph(program, module.names, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    # one row too, which no example of torch.export may be
    alone = {name: value[:1] for name, value in batches[1].items()}
    for inputs in (*batches, alone):
        (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(found), module(*inputs.values()), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("head", [RETRIEVAL, MASKED_LM])
def test_heads_are_exported_whole(family, head):
    """Logits of two texts and three images, of each token of a text: other numbers of either afterwards."""
    model = family.build(head)
    batch, other = joint_batch(EXAMPLE), joint_batch(OTHERS[0])
    rows, length = Dim("rows", min=2, max=64), Dim("length", min=2, max=13)
    shapes = {name: {0: rows, 1: length} for name in ("input_ids", "attention_mask")}
    given, asked = text_of(batch), text_of(other)
    if head == RETRIEVAL:
        given = {name: value[:2] for name, value in given.items()} | {"pixel_values": batch["pixel_values"]}
        asked = asked | {"pixel_values": other["pixel_values"][:2]}
        shapes["pixel_values"] = {0: Dim("images", min=2, max=64)}
    name = "logits_per_image" if head == RETRIEVAL else "logits"
    program = torch.export.export(model, (), given, dynamic_shapes=shapes)
    found = program.module()(**asked)
    torch.testing.assert_close(found[name], model(**asked)[name], rtol=0, atol=1e-5)
