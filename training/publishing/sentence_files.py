"""Three files by which sentence-transformers reads an export: `SentenceTransformer(path).encode(...)`.

They name the methods that give the embedding of each kind of input, and a second module that makes it a unit vector.
Without them sentence-transformers takes a model for one of texts and averages its states, which is another vector.
"""

import json
from pathlib import Path
from typing import Any

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.sentence_transformer.modules.Transformer"},
    # it has no settings, hence no file at its path
    {
        "idx": 1,
        "name": "1",
        "path": "1_Normalize",
        "type": "sentence_transformers.sentence_transformer.modules.Normalize",
    },
]
# kinds of input as sentence-transformers spells them -> what of ours embeds them
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
    """Writes them beside a model whose `AutoModel` has `METHODS`."""
    for name, content in FILES.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
