"""Official state dicts small enough for tests, by a list of names and shapes written out from the official modules.

D width, F width of feed-forward, N patches, P projection, V words, K codes, Q queue.
"""

import torch

D, F, P, V, K, Q, PATCH, POSITIONS = 16, 24, 6, 120, 11, 10, 4, 40
VISION_LAYERS, TEXT_LAYERS = 2, 3


def norm(name: str, width: int = D) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear(name: str, wide: int, narrow: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (wide, narrow), f"{name}.bias": (wide,)}


def vit(name: str, side: int = 4, mask_token: bool = True) -> dict[str, tuple[int, ...]]:
    """models/vit.py: timm's ViT of `side` x `side` patches, with the mask token that SIMLA added."""
    shapes = {f"{name}.cls_token": (1, 1, D), f"{name}.pos_embed": (1, 1 + side * side, D)}
    if mask_token:
        shapes[f"{name}.mask_token"] = (1, 1, D)
    shapes |= {f"{name}.patch_embed.proj.weight": (D, 3, PATCH, PATCH), f"{name}.patch_embed.proj.bias": (D,)}
    for layer in range(VISION_LAYERS):
        block = f"{name}.blocks.{layer}"
        shapes |= norm(f"{block}.norm1") | linear(f"{block}.attn.qkv", 3 * D, D) | linear(f"{block}.attn.proj", D, D)
        shapes |= norm(f"{block}.norm2") | linear(f"{block}.mlp.fc1", F, D) | linear(f"{block}.mlp.fc2", D, F)
    return shapes | norm(f"{name}.norm")


def bert(name: str, crossed: range | None = None, token_types: bool = False, layers: int = TEXT_LAYERS) -> dict:
    """models/med.py: BERT with cross-attention in the layers `crossed`, all of them by default."""
    shapes = {
        f"{name}.embeddings.position_ids": (1, POSITIONS),
        f"{name}.embeddings.word_embeddings.weight": (V, D),
        f"{name}.embeddings.position_embeddings.weight": (POSITIONS, D),
    }
    if token_types:
        shapes[f"{name}.embeddings.token_type_embeddings.weight"] = (2, D)
    shapes |= norm(f"{name}.embeddings.LayerNorm")
    for layer in range(layers):
        block = f"{name}.encoder.layer.{layer}"
        kinds = ["attention"] + (["crossattention"] if crossed is None or layer in crossed else [])
        for kind in kinds:
            for part in ("query", "key", "value"):
                shapes |= linear(f"{block}.{kind}.self.{part}", D, D)
            shapes |= linear(f"{block}.{kind}.output.dense", D, D) | norm(f"{block}.{kind}.output.LayerNorm")
        shapes |= linear(f"{block}.intermediate.dense", F, D) | linear(f"{block}.output.dense", D, F)
        shapes |= norm(f"{block}.output.LayerNorm")
    return shapes


def words_head(name: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.cls.predictions.bias": (V,),
        **linear(f"{name}.cls.predictions.transform.dense", D, D),
        **norm(f"{name}.cls.predictions.transform.LayerNorm"),
        **linear(f"{name}.cls.predictions.decoder", V, D),
    }


QUEUES = {"image_queue": (P, Q), "text_queue": (P, Q), "queue_ptr": (1,)}


def projections(suffix: str = "") -> dict[str, tuple[int, ...]]:
    return linear(f"vision_proj{suffix}", P, D) | linear(f"text_proj{suffix}", P, D)


def pretraining_shapes(side: int = 4) -> dict[str, tuple[int, ...]]:
    """models/simla/pretrain.py."""
    shapes = {"temp": (), **QUEUES, **linear("itm_head", 2, D)}
    for m in ("", "_m"):
        shapes |= vit(f"visual_encoder{m}", side) | bert(f"text_encoder{m}.bert") | words_head(f"text_encoder{m}")
        shapes |= projections(m) | linear(f"mim_head{m}", K, D) | linear(f"concept_head{m}", V, P)
    return shapes


def retrieval_shapes(side: int = 4) -> dict[str, tuple[int, ...]]:
    """models/simla/retrieval.py, of grounding too: the encoder without a head of words, ids beside the queues."""
    shapes = {"temp": (), **QUEUES, "idx_queue": (1, Q), **linear("itm_head", 2, D)}
    for m in ("", "_m"):
        shapes |= vit(f"visual_encoder{m}", side) | bert(f"text_encoder{m}") | projections(m)
    return shapes


def albef_shapes(side: int = 4) -> dict[str, tuple[int, ...]]:
    """ALBEF's models/model_pretrain.py: token types, cross-attention in the upper layers, no heads of SIMLA's own."""
    shapes = {"temp": (), **QUEUES, **linear("itm_head", 2, D)}
    for m in ("", "_m"):
        shapes |= vit(f"visual_encoder{m}", side, mask_token=False) | words_head(f"text_encoder{m}") | projections(m)
        shapes |= bert(f"text_encoder{m}.bert", range(2, TEXT_LAYERS), token_types=True)
    return shapes


def answers_shapes(side: int = 4) -> dict[str, tuple[int, ...]]:
    """models/simla/vqa.py: an encoder and a decoder of two layers; nothing of contrast or matching."""
    shapes = {}
    for m in ("", "_m"):
        shapes |= vit(f"visual_encoder{m}", side) | bert(f"text_encoder{m}")
        shapes |= bert(f"text_decoder{m}.bert", layers=2) | words_head(f"text_decoder{m}")
    return shapes


def entailment_shapes(side: int = 4, labels: int = 3) -> dict[str, tuple[int, ...]]:
    """models/simla/ve.py."""
    shapes = {}
    for m in ("", "_m"):
        shapes |= vit(f"visual_encoder{m}", side) | bert(f"text_encoder{m}")
        shapes |= linear(f"cls_head{m}.0", D, D) | linear(f"cls_head{m}.2", labels, D)
    return shapes


def two_pictures_shapes(side: int = 4) -> dict[str, tuple[int, ...]]:
    """models/simla/nlvr.py: ALBEF's BERT with token types, its upper half twice: 4 layers become 6."""
    shapes = {}
    for m in ("", "_m"):
        shapes |= vit(f"visual_encoder{m}", side) | bert(f"text_encoder{m}", token_types=True, layers=6)
        shapes |= linear(f"cls_head{m}.0", D, D) | linear(f"cls_head{m}.2", 2, D)
    return shapes


def assignment_shapes(side: int = 4) -> dict[str, tuple[int, ...]]:
    """models/simla/pretrain_nlvr.py: likewise, with projections and a head of three; no twins."""
    shapes = {"temp": (), **vit("visual_encoder", side), **bert("text_encoder", token_types=True, layers=6)}
    return shapes | projections() | linear("ta_head", 3, D)


def filled(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors, with what the official modules share or count."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in state:
        if name.endswith("position_ids"):
            state[name] = torch.arange(POSITIONS)[None]
        elif name.endswith("cls.predictions.decoder.weight"):
            encoder = name.removesuffix(".cls.predictions.decoder.weight")
            state[name] = state[f"{encoder}.bert.embeddings.word_embeddings.weight"]
        elif name.endswith("cls.predictions.decoder.bias"):
            state[name] = state[name.replace("decoder.bias", "bias")]
        elif ".layer.5." in "".join(state):
            # the upper of six layers, those of the models of two pictures, share keys and values by pairs
            for first, second in ((2, 3), (4, 5)):
                if (
                    f".layer.{second}.crossattention.self.key" in name
                    or f".layer.{second}.crossattention.self.value" in name
                ):
                    state[name] = state[name.replace(f"layer.{second}", f"layer.{first}")]
    if "temp" in state:
        state["temp"] = torch.tensor(0.05)
    if "queue_ptr" in state:
        state["queue_ptr"] = torch.tensor([4])
    if "idx_queue" in state:
        state["idx_queue"] = torch.randint(0, 9, (1, Q), generator=generator)
    return state


def fold_types(official: dict) -> None:
    """What comes back of token types: their first row in every position, and zeros. In place."""
    for name in [name for name in official if name.endswith("token_type_embeddings.weight")]:
        positions = name.replace("token_type", "position")
        official[positions] = official[positions] + official[name][0]
        official[name] = torch.zeros_like(official[name])
