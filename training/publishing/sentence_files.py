"""Writes the three files with which sentence-transformers loads an export: `SentenceTransformer(path).encode(...)`.

They name the methods that embed each kind of input, and a second module that normalises to unit vectors. Without
them sentence-transformers would treat the model as a text encoder and average its states.
"""

import json
from pathlib import Path
from typing import Any

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.sentence_transformer.modules.Transformer"},
    # it has no settings, so there is no file at its path
    {
        "idx": 1,
        "name": "1",
        "path": "1_Normalize",
        "type": "sentence_transformers.sentence_transformer.modules.Normalize",
    },
]
# kind of input, as sentence-transformers calls it -> our method
METHODS = {"text": "get_text_features", "image": "get_image_features", "image+text": "get_multimodal_features"}
TRANSFORMER = {
    "transformer_task": "feature-extraction",
    "modality_config": {
        kind: {"method": method, "method_output_name": "pooler_output"} for kind, method in METHODS.items()
    },
    "module_output_name": "sentence_embedding",
}
SETTINGS = {
    "model_type": "SentenceTransformer",
    "similarity_fn_name": "cosine",
    "prompts": {},
    "default_prompt_name": None,
}
FILES: dict[str, Any] = {
    "modules.json": MODULES,
    "sentence_bert_config.json": TRANSFORMER,
    "config_sentence_transformers.json": SETTINGS,
}


def write_sentence_files(directory: Path) -> None:
    """Writes the files beside a model whose `AutoModel` has `METHODS`."""
    for name, content in FILES.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
