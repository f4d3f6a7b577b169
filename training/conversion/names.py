"""Maps official weight names to ours. Only names: `checkpoints.py` changes the layout of tensors."""

import re
from collections.abc import Iterable

# timm's ViT, which both repositories copy -> VisionEncoder; `#` is a layer's number
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
# MAE's decoder, facebook's names without "decoder_" -> our decoder
MAE_DECODER = (
    ("mask_token", "mask_token"),
    ("embed", "embed"),
    *(pair for pair in VISION if pair[0].startswith("blocks.") or pair[0] == "norm"),
    ("pred", "pixel_head"),
)
# BERT's encoder, with cross-attention as in BLIP's copy -> TextEncoder
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
# BERT's language-model head; a file stores its bias twice, under its own name and as the decoder's
LANGUAGE_HEAD = (
    ("predictions.transform.dense", "dense"),
    ("predictions.transform.LayerNorm", "norm"),
    ("predictions.decoder", "decoder"),
)


class Names:
    """Translates names between two layouts by pairs of patterns, in which `#` is a number."""

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        self.pairs = list(pairs)
        self._rules = [
            (re.compile(re.escape(left).replace(r"\#", r"(\d+)") + r"(\.weight|\.bias)?"), right)
            for left, right in self.pairs
        ]

    def __call__(self, name: str) -> str | None:
        """The name in the other layout, None if no pattern matches."""
        for pattern, right in self._rules:
            if match := pattern.fullmatch(name):
                # layer numbers and the suffixes .weight and .bias stay
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
    The names of the student in an official state dict of SIMLA or ALBEF.

    Args:
        prefix: Name of our tower.
        heads: Official name -> ours, for the heads.
        bert: Prefix of the text encoder's parts: "bert." in pretraining, "" in downstream checkpoints, whose encoder
            has no language-model head.
        stack: Text layers of a model of two images, 1.5 times those of the encoder; 0 for other models.
    """
    # the text encoder; in a model of two images each layer is mapped by its number
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

    # towers, language-model heads, the answer decoder, and the family's own heads
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
    """Our name for a layer of the official model of two images, which has each upper layer twice in a row."""
    # the lower third reads only the text; the rest are pairs with one layer per image
    lower = stack // 3
    if layer < lower:
        return f"{prefix}.text.layers.{layer}"
    place, second = divmod(layer - lower, 2)
    return f"second_layers.{place}" if second else f"{prefix}.text.layers.{lower + place}"


def ties(weights: Iterable[str], prefix: str) -> dict[str, str]:
    """Maps each tied weight (our names) to the weight it equals. A safetensors file stores such weights once."""
    # a language-model head shares the word embeddings of its tower
    weights = set(weights)
    found = {}
    for head, words in (("lm_head", f"{prefix}.text"), ("decoder.lm_head", "decoder")):
        if f"{head}.decoder.bias" in weights:
            found[f"{head}.decoder.weight"] = f"{words}.embeddings.word_embeddings.weight"
    # the two layers of a pair share the keys and values with which they read the images
    second = {int(name.split(".")[1]) for name in weights if name.startswith("second_layers.")}
    for place in second:
        for part in ("key.weight", "key.bias", "value.weight", "value.bias"):
            first = f"{prefix}.text.layers.{len(second) + place}.cross_attention.{part}"
            found[f"second_layers.{place}.cross_attention.{part}"] = first
    return found


__all__ = ["BERT", "LANGUAGE_HEAD", "MAE_DECODER", "VISION", "Names", "official_names", "stacked_layer", "ties"]
