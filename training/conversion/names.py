"""Official names of weights and ours. Nothing but names: what is laid out otherwise is `convert_checkpoints`' work."""

import re
from collections.abc import Iterable

# timm's ViT, which both repositories carry a copy of -> VisionEncoder; `#` is a layer's number
VISION = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("mask_token", "embeddings.mask_token"),
    ("patch_embed.proj", "embeddings.stem.projection"),
    ("blocks.#.norm1", "layers.#.norm1"),
    ("blocks.#.attn.qkv", "layers.#.attention.qkv"),
    ("blocks.#.attn.proj", "layers.#.attention.proj"),
    ("blocks.#.norm2", "layers.#.norm2"),
    ("blocks.#.mlp.fc1", "layers.#.feed_forward.fc1"),
    ("blocks.#.mlp.fc2", "layers.#.feed_forward.fc2"),
    ("norm", "norm"),
)
# MAE's decoder, by facebook's names less "decoder_" -> a decoder of ours
MAE_DECODER = (
    ("mask_token", "mask_token"),
    ("embed", "embed"),
    *(pair for pair in VISION if pair[0].startswith("blocks.") or pair[0] == "norm"),
    ("pred", "pixel_head"),
)
# BERT's encoder, with the cross-attention of BLIP's copy of it -> TextEncoder
BERT = (
    ("embeddings.word_embeddings", "embeddings.word_embeddings"),
    ("embeddings.position_embeddings", "embeddings.position_embeddings"),
    ("embeddings.LayerNorm", "embeddings.norm"),
    ("encoder.layer.#.attention.self.query", "layers.#.attention.query"),
    ("encoder.layer.#.attention.self.key", "layers.#.attention.key"),
    ("encoder.layer.#.attention.self.value", "layers.#.attention.value"),
    ("encoder.layer.#.attention.output.dense", "layers.#.attention.proj"),
    ("encoder.layer.#.attention.output.LayerNorm", "layers.#.attention_norm"),
    ("encoder.layer.#.crossattention.self.query", "layers.#.cross_attention.query"),
    ("encoder.layer.#.crossattention.self.key", "layers.#.cross_attention.key"),
    ("encoder.layer.#.crossattention.self.value", "layers.#.cross_attention.value"),
    ("encoder.layer.#.crossattention.output.dense", "layers.#.cross_attention.proj"),
    ("encoder.layer.#.crossattention.output.LayerNorm", "layers.#.cross_norm"),
    ("encoder.layer.#.intermediate.dense", "layers.#.feed_forward.fc1"),
    ("encoder.layer.#.output.dense", "layers.#.feed_forward.fc2"),
    ("encoder.layer.#.output.LayerNorm", "layers.#.output_norm"),
)
# BERT's head of words; its bias stands in a file twice, under its own name and as the decoder's
LANGUAGE_HEAD = (
    ("predictions.transform.dense", "dense"),
    ("predictions.transform.LayerNorm", "norm"),
    ("predictions.decoder", "decoder"),
)


class Names:
    """Names of one layout in another, by pairs of patterns in which `#` is a number. `reverse` is the way back."""

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        self.pairs = list(pairs)
        self._rules = [
            (re.compile(re.escape(left).replace(r"\#", r"(\d+)") + r"(\.weight|\.bias)?"), right)
            for left, right in self.pairs
        ]

    def __call__(self, name: str) -> str | None:
        """The name in the other layout, None if no pattern fits."""
        for pattern, right in self._rules:
            if match := pattern.fullmatch(name):
                # layers keep their numbers, weight and bias their endings
                *numbers, suffix = match.groups()
                for number in numbers:
                    right = right.replace("#", number, 1)
                return right + (suffix or "")
        return None

    @property
    def reverse(self) -> "Names":
        return Names((right, left) for left, right in self.pairs)


def official_names(prefix: str, heads: Iterable[tuple[str, str]], bert: str = "bert.", stack: int = 0) -> Names:
    """
    Of the student in an official state dict of SIMLA's and ALBEF's form.

    Args:
        prefix: What our tower is called.
        heads: Official name -> ours, of what stands on the towers.
        bert: What stands before the names of the text encoder's parts: "bert." in pretraining, "" in downstream
            checkpoints, whose models hold the encoder without a head of words.
        stack: Layers of the model of two pictures, which are one and a half times the encoder's; 0 for other models.
    """
    # the text encoder; in the model of two pictures each layer has a place of its own
    text = [(left, f"{prefix}.text.{right}") for left, right in BERT]
    if stack:
        text = [pair for pair in text if "#" not in pair[0]]
        for layer in range(stack):
            ours = f"{stacked_layer(layer, stack, prefix)}."
            text += [
                (left.replace("#", str(layer)), right.replace("layers.#.", ours))
                for left, right in BERT
                if "#" in left
            ]

    # towers, heads of words, the decoder of answers, and what the family adds
    return Names(
        [
            *((f"visual_encoder.{left}", f"{prefix}.vision.{right}") for left, right in VISION),
            *((f"text_encoder.{bert}{left}", right) for left, right in text),
            *((f"text_encoder.cls.{left}", f"lm_head.{right}") for left, right in LANGUAGE_HEAD),
            *((f"text_decoder.bert.{left}", f"decoder.{right}") for left, right in BERT),
            *((f"text_decoder.cls.{left}", f"decoder.lm_head.{right}") for left, right in LANGUAGE_HEAD),
            *heads,
        ]
    )


def stacked_layer(layer: int, stack: int, prefix: str) -> str:
    """Which of ours is a layer of the official model of two pictures, whose upper layers stand twice in a row."""
    # a third reads the text alone, two thirds are pairs: one layer for each picture
    lower = stack // 3
    if layer < lower:
        return f"{prefix}.text.layers.{layer}"
    place, second = divmod(layer - lower, 2)
    return f"second_layers.{place}" if second else f"{prefix}.text.layers.{lower + place}"


def ties(weights: Iterable[str], prefix: str) -> dict[str, str]:
    """Of weights by our names, those that are another weight too: which one. A safetensors file holds them once."""
    # a head of words draws from the table that its tower reads
    weights = set(weights)
    found = {}
    for head, words in (("lm_head", f"{prefix}.text"), ("decoder.lm_head", "decoder")):
        if f"{head}.decoder.bias" in weights:
            found[f"{head}.decoder.weight"] = f"{words}.embeddings.word_embeddings.weight"
    # a pair of layers reads its two pictures with the same keys and values
    second = {int(name.split(".")[1]) for name in weights if name.startswith("second_layers.")}
    for place in second:
        for part in ("key.weight", "key.bias", "value.weight", "value.bias"):
            first = f"{prefix}.text.layers.{len(second) + place}.cross_attention.{part}"
            found[f"second_layers.{place}.cross_attention.{part}"] = first
    return found


__all__ = ["BERT", "LANGUAGE_HEAD", "MAE_DECODER", "VISION", "Names", "official_names", "stacked_layer", "ties"]
