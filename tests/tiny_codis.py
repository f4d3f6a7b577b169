"""A CODIS small enough to check by hand: SIMLA's little pairs, and twelve codes.

B pairs, N = 16 patches of 4 pixels, W word slots, D = 32, V = 50 tokens, K = 12 codes. Dropout is off.
"""

from functools import partial

from tiny_oner import CLS, IMAGE, MASK, VOCAB
from tiny_simla import APART, DRAWN, SEP, in_one_process, simla_batch

from oner import CodisConfig

CODES = 12
# arguments of examples/pretrain.py, with real images and a model of some thousand weights
SHRUNK = {
    "model_config": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_text_layers": 1,
        "num_fusion_layers": 1,
        "max_position_embeddings": 32,
        "image_size": 32,
        "projection_dim": 16,
        "num_codes": CODES,
        "max_text_length": 16,
    },
    "queue_size": 32,
}
RUN = {"losses": ["ica", "code", "itm", "mlm"]}
OBJECTIVE = {"queue_size": 32, "losses": ["ica", "code", "itm", "mlm"]}

make_batch = partial(simla_batch, codes=False)


def tiny_config(**overrides) -> CodisConfig:
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_text_layers": 2,
        "num_fusion_layers": 2,
        "text_attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "max_position_embeddings": 32,
        "max_text_length": 12,
        "image_size": 16,
        "patch_size": 4,
        "projection_dim": 8,
        "num_codes": CODES,
        "answer_decoder_layers": 2,
        "grounding_layer": 3,
        "cls_token_id": CLS,
        "image_token_id": IMAGE,
        "sep_token_id": SEP,
        "mask_token_id": MASK,
    }
    return CodisConfig(**{**fields, **overrides})


def stand_ins() -> dict[str, str]:
    """A run reads nothing beside its data."""
    return {}


__all__ = ["APART", "DRAWN", "OBJECTIVE", "RUN", "SHRUNK", "in_one_process", "make_batch", "stand_ins", "tiny_config"]
