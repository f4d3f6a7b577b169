"""SIMLA's networks, derived anew and naively: an oracle that shares no line with the project.

Weights are a flat dict of tensors under the official names (`visual_encoder.blocks.0.attn.qkv.weight`,
`text_encoder.bert.encoder.layer.0.crossattention.self.query.weight`, `vision_proj.weight`, ..., the teacher's with
`_m` after the first word, `image_queue` (P, Q), `temp` 0-dim). Every formula is written out: heads one after another,
sums over axes by hand. No dropout. Order and readings are those of SIMLA's code, its faults included.

B pairs, N patches, T = 1 + words of the longest text, D width, P projection, V words, K codes, Q queue.
"""

import math
from dataclasses import dataclass

import torch

Weights = dict[str, torch.Tensor]
# first words of the names that the teacher has too, in the order of their averaging
MODULES = ("visual_encoder", "vision_proj", "text_encoder", "text_proj", "mim_head", "concept_head")
# what is trained without a teacher's twin
UNPAIRED = ("itm_head", "temp")
TIED = {
    "text_encoder.cls.predictions.decoder.weight": "text_encoder.bert.embeddings.word_embeddings.weight",
    "text_encoder.cls.predictions.decoder.bias": "text_encoder.cls.predictions.bias",
}


@dataclass
class Sizes:
    """What the weights' shapes do not tell."""

    vision_heads: int
    text_heads: int
    patch_size: int
    vision_eps: float = 1e-6
    text_eps: float = 1e-12
    pad_id: int = 0
    cls_id: int = 101
    momentum: float = 0.995
    text: str = "text_encoder.bert"  # "text_encoder" in the retrieval model, which has no head of words


def twin(name: str) -> str:
    """The teacher's name of a student's weight."""
    first, dot, rest = name.partition(".")
    return f"{first}_m{dot}{rest}"


def trained(weights: Weights) -> list[str]:
    """Names of the weights that get gradients, each tensor once."""
    return [name for name in weights if name.split(".")[0] in (*MODULES, *UNPAIRED) and name not in TIED]


def random_weights(
    width: int,
    vision_layers: int,
    text_layers: int,
    vocab: int,
    image_size: int,
    patch_size: int,
    projection: int = 8,
    codes: int = 24,
    queue: int = 12,
    positions: int = 32,
    text_inner: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> Weights:
    """
    Every entry of an official checkpoint, drawn so that nothing is at rest: norms off 1, biases off 0, the teacher
    off the student. Tied entries are one tensor under two names, as in the official state dict.
    """
    shapes = _shapes(width, vision_layers, text_layers, vocab, (image_size // patch_size) ** 2, patch_size)
    inner = text_inner or 4 * width
    shapes |= _text_shapes(width, text_layers, vocab, positions, inner)
    shapes |= {"vision_proj": (projection, width), "text_proj": (projection, width), "itm_head": (2, width)}
    shapes |= {"mim_head": (codes, width), "concept_head": (vocab, projection)}
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}

    def draw(name: str, shape: tuple[int, ...], around: float = 0.0, spread: float = 0.1) -> None:
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        weights[name] = (around + scale * spread * noise).to(dtype)

    for name, shape in shapes.items():
        if len(shape) == 2 and not name.endswith("weight"):  # a linear map
            draw(f"{name}.weight", shape, spread=1 / math.sqrt(shape[1]))
            draw(f"{name}.bias", shape[:1])
        elif "norm" in name.lower():
            draw(f"{name}.weight", shape, around=1.0)
            draw(f"{name}.bias", shape)
        else:
            draw(name, shape, spread=0.5 if "embed" in name or "token" in name else 0.1)
    for name in trained(weights):
        if name.split(".")[0] in MODULES:
            noise = torch.randn(weights[name].shape, generator=generator, dtype=torch.float64)
            weights[twin(name)] = weights[name] + (0.02 * noise).to(dtype)
    for tied, owner in TIED.items():
        weights[tied], weights[twin(tied)] = weights[owner], weights[twin(owner)]
    for name in ("image_queue", "text_queue"):
        keys = torch.randn(projection, queue, generator=generator, dtype=torch.float64)
        weights[name] = (keys / keys.square().sum(0, keepdim=True).sqrt()).to(dtype)
    weights["queue_ptr"] = torch.zeros(1, dtype=torch.long)
    weights["temp"] = torch.tensor(0.07, dtype=dtype)
    return weights


def _shapes(width: int, layers: int, text_layers: int, vocab: int, patches: int, side: int) -> dict:
    shapes = {
        "visual_encoder.cls_token": (1, 1, width),
        "visual_encoder.pos_embed": (1, 1 + patches, width),
        "visual_encoder.mask_token": (1, 1, width),
        "visual_encoder.patch_embed.proj.weight": (width, 3, side, side),
        "visual_encoder.patch_embed.proj.bias": (width,),
        "visual_encoder.norm": (width,),
    }
    for i in range(layers):
        block = f"visual_encoder.blocks.{i}"
        shapes |= {f"{block}.norm1": (width,), f"{block}.norm2": (width,)}
        shapes |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        shapes |= {f"{block}.mlp.fc1": (4 * width, width), f"{block}.mlp.fc2": (width, 4 * width)}
    return shapes


def _text_shapes(width: int, layers: int, vocab: int, positions: int, inner: int) -> dict:
    bert, head = "text_encoder.bert", "text_encoder.cls.predictions"
    shapes = {
        f"{bert}.embeddings.word_embeddings.weight": (vocab, width),
        f"{bert}.embeddings.position_embeddings.weight": (positions, width),
        f"{bert}.embeddings.LayerNorm": (width,),
    }
    for i in range(layers):
        layer = f"{bert}.encoder.layer.{i}"
        for attention in (f"{layer}.attention", f"{layer}.crossattention"):
            shapes |= {f"{attention}.self.{part}": (width, width) for part in ("query", "key", "value")}
            shapes |= {f"{attention}.output.dense": (width, width), f"{attention}.output.LayerNorm": (width,)}
        shapes |= {f"{layer}.intermediate.dense": (inner, width), f"{layer}.output.dense": (width, inner)}
        shapes[f"{layer}.output.LayerNorm"] = (width,)
    shapes |= {f"{head}.bias": (vocab,), f"{head}.transform.dense": (width, width)}
    shapes[f"{head}.transform.LayerNorm"] = (width,)
    return shapes


class Network:
    """One of the two networks in a dict of weights, the student ("") or the teacher ("_m"), and its passes."""

    def __init__(self, weights: Weights, sizes: Sizes, suffix: str = ""):
        self.weights, self.sizes, self.suffix = weights, sizes, suffix

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights[twin(name) if self.suffix else name]

    def has(self, name: str) -> bool:
        return (twin(name) if self.suffix else name) in self.weights

    def linear(self, name: str, states: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...i,oi->...o", states, self[f"{name}.weight"]) + self[f"{name}.bias"]

    def norm(self, name: str, states: torch.Tensor, eps: float) -> torch.Tensor:
        centred = states - states.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)
        return centred / (variance + eps).sqrt() * self[f"{name}.weight"] + self[f"{name}.bias"]

    def picture(self, pixels: torch.Tensor, masked: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 3, H, W), masked patches (B, N) -> states after the final norm (B, 1 + N, D)."""
        name, side = "visual_encoder", self.sizes.patch_size
        kernel, bias = self[f"{name}.patch_embed.proj.weight"], self[f"{name}.patch_embed.proj.bias"]
        patches = []
        for top in range(0, pixels.shape[2], side):
            for left in range(0, pixels.shape[3], side):
                window = pixels[:, :, top : top + side, left : left + side]
                patches.append(torch.einsum("bchw,dchw->bd", window, kernel) + bias)
        states = torch.stack(patches, dim=1)
        if masked is not None:
            states = torch.where(masked[..., None], self[f"{name}.mask_token"], states)
        cls = torch.cat([self[f"{name}.cls_token"]] * len(states))
        states = torch.cat([cls, states], dim=1) + self[f"{name}.pos_embed"]
        index = 0
        while self.has(f"{name}.blocks.{index}.norm1.weight"):
            states = self._block(f"{name}.blocks.{index}", states)
            index += 1
        return self.norm(f"{name}.norm", states, self.sizes.vision_eps)

    def _block(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Pre-norm: attention, then two linear maps, each added to what came in."""
        inputs = self.norm(f"{name}.norm1", states, self.sizes.vision_eps)
        query, key, value = self.linear(f"{name}.attn.qkv", inputs).split(states.shape[-1], dim=-1)
        mixed, _ = attend(query, key, value, self.sizes.vision_heads)
        states = states + self.linear(f"{name}.attn.proj", mixed)
        inner = gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", states, self.sizes.vision_eps)))
        return states + self.linear(f"{name}.mlp.fc2", inner)

    def embed(self, ids: torch.Tensor | None = None, embeds: torch.Tensor | None = None) -> torch.Tensor:
        """Words, or states in their place, with learned positions from 0 and a norm. -> (B, L, D)."""
        name = f"{self.sizes.text}.embeddings"
        if embeds is None:
            # the row of [PAD] is no function of itself here: torch's padding_idx
            table = self[f"{name}.word_embeddings.weight"]
            embeds = torch.where((ids == self.sizes.pad_id)[..., None], table.detach()[ids], table[ids])
        if self.has(f"{name}.token_type_embeddings.weight"):  # ALBEF's; all of a text is of the first type
            embeds = embeds + self[f"{name}.token_type_embeddings.weight"][0]
        places = self[f"{name}.position_embeddings.weight"][: embeds.shape[1]]
        return self.norm(f"{name}.LayerNorm", embeds + places, self.sizes.text_eps)

    def text(
        self,
        embedded: torch.Tensor,
        mask: torch.Tensor,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The post-norm stack, with cross-attention where there is a context. -> (B, L, D), the last layer's
        self-attention (B, heads, L, L)."""
        states, probabilities = embedded, None
        for layer in self.text_layers():
            states, probabilities = self._text_layer(layer, states, mask, context, context_mask)
        return states, probabilities

    def text_layers(self) -> list[str]:
        """Their names, from below."""
        layers = []
        while self.has(f"{self.sizes.text}.encoder.layer.{len(layers)}.output.dense.weight"):
            layers.append(f"{self.sizes.text}.encoder.layer.{len(layers)}")
        return layers

    def _text_layer(
        self,
        layer: str,
        states: torch.Tensor,
        mask: torch.Tensor,
        context: torch.Tensor | None,
        context_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Post-norm: self-attention, cross-attention where there is a context, two linear maps."""
        states, probabilities = self._attention(f"{layer}.attention", states, states, mask)
        if context is not None:
            states, _ = self._attention(f"{layer}.crossattention", states, context, context_mask)
        inner = self.linear(f"{layer}.output.dense", gelu(self.linear(f"{layer}.intermediate.dense", states)))
        return self.norm(f"{layer}.output.LayerNorm", states + inner, self.sizes.text_eps), probabilities

    def _attention(
        self, name: str, states: torch.Tensor, context: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query = self.linear(f"{name}.self.query", states)
        key, value = self.linear(f"{name}.self.key", context), self.linear(f"{name}.self.value", context)
        mixed, probabilities = attend(query, key, value, self.sizes.text_heads, mask)
        mixed = self.linear(f"{name}.output.dense", mixed)
        return self.norm(f"{name}.output.LayerNorm", states + mixed, self.sizes.text_eps), probabilities

    def words(self, states: torch.Tensor) -> torch.Tensor:
        """The head of masked words, tied to their embeddings. (..., D) -> (..., V)."""
        name = "text_encoder.cls.predictions"
        states = gelu(self.linear(f"{name}.transform.dense", states))
        states = self.norm(f"{name}.transform.LayerNorm", states, self.sizes.text_eps)
        table = self["text_encoder.bert.embeddings.word_embeddings.weight"]
        return torch.einsum("...d,vd->...v", states, table) + self[f"{name}.bias"]

    def unimodal(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """States of the picture (B, 1 + N, D), and unit vectors of picture and text (B, P)."""
        picture = self.picture(pixels)
        text, _ = self.text(self.embed(ids), mask)
        return picture, unit(self.linear("vision_proj", picture[:, 0])), unit(self.linear("text_proj", text[:, 0]))

    def fuse(self, ids: torch.Tensor, mask: torch.Tensor, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        everywhere = torch.ones(picture.shape[:2], dtype=torch.long)
        return self.text(self.embed(ids), mask, picture, everywhere)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.square().sum(-1, keepdim=True).sqrt()


def log_softmax(logits: torch.Tensor, axis: int) -> torch.Tensor:
    shifted = logits - logits.detach().amax(axis, keepdim=True)
    return shifted - shifted.exp().sum(axis, keepdim=True).log()


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One head after another; keys of mask 0 have no weight. (B, L, D), (B, S, D) -> (B, L, D), (B, heads, L, S)."""
    d = query.shape[-1] // heads
    mixed, probabilities = [], []
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        scores = torch.einsum("bqd,bkd->bqk", query[..., part], key[..., part]) / math.sqrt(d)
        if mask is not None:
            scores = torch.where(mask[:, None, :].bool(), scores, scores.new_tensor(float("-inf")))
        weights = log_softmax(scores, -1).exp()
        mixed.append(torch.einsum("bqk,bkd->bqd", weights, value[..., part]))
        probabilities.append(weights)
    return torch.cat(mixed, dim=-1), torch.stack(probabilities, dim=1)
