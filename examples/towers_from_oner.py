"""Initialises a SIMLA or CODIS from a OneR: vision tower and word embeddings are the OneR's, the rest is random.

    python examples/towers_from_oner.py examples/checkpoints/oner-scenes runs/simla_scenes_start
    python examples/towers_from_oner.py examples/checkpoints/oner-scenes runs/codis_scenes_start --family codis

Trained from scratch, two small towers learn only backgrounds and sizes for hundreds of steps; with a vision tower that
is already trained, words are learned within a hundred (docs/training_small.md). The directory is the `initial_model`
of examples/configs/simla_scenes.yaml or codis_scenes.yaml. Both papers likewise start from DeiT, which was trained on
images alone.

D width, N patches.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoProcessor, set_seed

from oner import CodisConfig, CodisForPreTraining, OneRForPreTraining, SimlaConfig, SimlaForPreTraining
from oner.training.publishing.model_loading import load_model

INITIALIZER_RANGE = 0.06  # .02 is for width 768; at 256 the [CLS] of a text would depend little on its words
# configuration, model, and the family's own fields: image tokens (none here), a number of codes for batches of 128
FAMILIES = {
    "simla": (SimlaConfig, SimlaForPreTraining, {"num_visual_codes": 1}),
    "codis": (CodisConfig, CodisForPreTraining, {"num_fusion_layers": 2, "num_codes": 128}),
}
# fields shared by both configurations
TRUNK = ("hidden_size", "num_attention_heads", "intermediate_size", "image_size", "patch_size", "num_channels", "stem")
WORDS = ("vocab_size", "max_text_length", "pad_token_id", "image_token_id", "cls_token_id", "mask_token_id")


def build(
    trunk: OneRForPreTraining, layers: int, text_layers: int, family: str = "simla"
) -> SimlaForPreTraining | CodisForPreTraining:
    """
    A model with the trunk's width and vocabulary, whose vision tower is the trunk's first `layers`.

    With all layers, its image states equal the trunk's; with fewer, the final norm was trained on deeper states and
    must adapt. The text tower takes the trunk's word embeddings, rescaled.

    Raises:
        ValueError: `layers` is less than 1 or more than the trunk has.
    """
    config = trunk.config
    if not 1 <= layers <= config.num_hidden_layers:
        raise ValueError(f"layers is {layers}; expected 1 to the {config.num_hidden_layers} of the OneR")
    configuration, model_class, own = FAMILIES[family]
    model = model_class(
        configuration(
            **{name: getattr(config, name) for name in TRUNK + WORDS},
            num_hidden_layers=layers,
            num_text_layers=text_layers,
            max_position_embeddings=config.max_text_length + 1,
            initializer_range=INITIALIZER_RANGE,
            text_attention_dropout=0.0,
            hidden_dropout=0.0,
            sep_token_id=None,
            **own,
        )
    )
    with torch.no_grad():
        _fill(model, trunk)
    return model


def _fill(model: SimlaForPreTraining | CodisForPreTraining, trunk: OneRForPreTraining) -> None:
    # in the trunk, [CLS] is a word, without a position embedding
    embeddings = trunk.oner.embeddings
    vision = model.base_model.vision
    vision.embeddings.cls_token.copy_(embeddings.embed_cls(1))  # (1, 1, D)
    vision.embeddings.position_embeddings.zero_()
    vision.embeddings.position_embeddings[0, 1:] = embeddings.image_positions  # (N, D)

    # stem, layers, and the final norm
    vision.embeddings.stem.load_state_dict(embeddings.stem.state_dict())
    for layer, source in zip(vision.layers, trunk.oner.layers, strict=False):
        layer.load_state_dict(source.state_dict())
    vision.norm.load_state_dict(trunk.oner.norm.state_dict())

    # words keep the similarities that the trunk has learned
    words = embeddings.word_embeddings.weight  # (V, D)
    model.base_model.text.embeddings.word_embeddings.weight.copy_(words / words.std() * INITIALIZER_RANGE)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("oner", help="model directory of a OneR, or its name on the Hub")
    parser.add_argument("output", type=Path, help="folder of the new model")
    parser.add_argument("--family", choices=FAMILIES, default="simla", help="(default %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the vision tower (default %(default)s)")
    parser.add_argument("--text_layers", type=int, default=2, help="of the text tower (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    a = parser.parse_args(arguments)
    set_seed(a.seed)
    trunk = load_model(OneRForPreTraining, a.oner).float()
    processor = AutoProcessor.from_pretrained(a.oner)
    model = build(trunk, a.layers, a.text_layers, a.family)
    model.save_pretrained(a.output)
    processor.save_pretrained(a.output)
    print(f"{a.output}: {model.num_parameters() / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
