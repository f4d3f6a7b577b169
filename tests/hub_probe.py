"""Loads a published model through every auto class and pipeline, and records what comes out.

    python hub_probe.py local|remote MODEL PICTURE OUT.safetensors

`remote` stands for a machine with transformers only: `oner` cannot be imported, and the model's own code is trusted.
`local` has `import oner` and trusts nothing. What differs between the two outputs is a broken publication.
"""

import sys
import warnings
from pathlib import Path

TEXTS = ["a red apple", "green tree"]
MASKED = "a red {}"


class NoOner:
    """An import hook under which `oner` does not exist."""

    def find_spec(self, name: str, path=None, target=None):
        if name.split(".")[0] == "oner":
            raise ModuleNotFoundError(f"No module named {name!r} (hidden by the test)", name="oner")


def model_outputs(model_id: str, picture: str, trust: dict) -> dict:
    import torch
    import transformers
    from PIL import Image

    processor = transformers.AutoProcessor.from_pretrained(model_id, **trust)
    image_processor = transformers.AutoImageProcessor.from_pretrained(model_id, **trust)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_id, **trust)
    config = transformers.AutoConfig.from_pretrained(model_id, **trust)
    image = Image.open(picture)
    both = processor(images=[image, image], text=TEXTS)
    text, pixels = processor(text=TEXTS), processor(images=[image])
    out = {
        "processor.input_ids": both["input_ids"],
        "processor.pixel_values": both["pixel_values"],
        "image_processor.pixel_values": image_processor(images=[image], return_tensors="pt")["pixel_values"],
        "tokenizer.input_ids": tokenizer(TEXTS, return_tensors="pt", padding=True)["input_ids"],
        "config.hidden_size": torch.tensor(config.hidden_size),
    }
    offered = [name for name in config.auto_map if name.startswith("AutoModel") and name in AUTO_CLASSES]
    load = {name: getattr(transformers, name).from_pretrained(model_id, **trust).eval() for name in offered}
    with torch.no_grad():
        pair, padding = load["AutoModel"](**both), 3
        out["AutoModel.last_hidden_state"] = pair.last_hidden_state * (pair.token_types != padding)[..., None]
        retrieval = load["AutoModelForZeroShotImageClassification"]
        out["retrieval.logits"] = retrieval(**text, pixel_values=pixels["pixel_values"]).logits_per_image
        out["retrieval.text"] = retrieval.get_text_features(**text).pooler_output
        out["retrieval.image"] = retrieval.get_image_features(**pixels).pooler_output
        out["retrieval.both"] = retrieval.get_multimodal_features(**both).pooler_output
        out["AutoModelForMaskedLM.logits"] = load["AutoModelForMaskedLM"](**text).logits
        if "AutoModelForImageClassification" in load:  # its head is new: shape only
            out["classes"] = load["AutoModelForImageClassification"](**pixels).logits * 0
    out |= {f"state.{name}": tensor.clone() for name, tensor in load["AutoModelForPreTraining"].state_dict().items()}
    return out


# those that a pretrained model of some family offers
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForPreTraining",
    "AutoModelForZeroShotImageClassification",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
)


def pipeline_outputs(model_id: str, picture: str, trust: dict) -> dict:
    import torch
    from PIL import Image
    from transformers import pipeline

    classify = pipeline("zero-shot-image-classification", model=model_id, **trust)
    scores = {row["label"]: row["score"] for row in classify(picture, candidate_labels=TEXTS)}
    features = pipeline("image-feature-extraction", model=model_id, **trust)
    words = pipeline("feature-extraction", model=model_id, **trust)
    fill = pipeline("fill-mask", model=model_id, **trust)
    search = pipeline("image-text-retrieval", model=model_id, **trust)
    search.index_texts(TEXTS)
    answers = search(image=Image.open(picture), top_k=2)
    by_item = {answer["item"]: answer["score"] for answer in answers}
    return {
        "pipeline.zero-shot": torch.tensor([scores[text] for text in TEXTS]),
        "pipeline.image-features": torch.tensor(features(picture)),
        "pipeline.features": torch.tensor(words(TEXTS[0])),
        "pipeline.fill-mask": torch.tensor([row["score"] for row in fill(MASKED.format(fill.tokenizer.mask_token))]),
        "pipeline.retrieval": torch.tensor([by_item[text] for text in TEXTS]),
    }


def main(mode: str, model_id: str, picture: str, out: str) -> None:
    warnings.simplefilter("ignore")
    root = str(Path(__file__).resolve().parents[1])
    if mode == "remote":
        sys.meta_path.insert(0, NoOner())
        trust = {"trust_remote_code": True}
    else:
        import oner  # noqa: F401

        trust = {}
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    outputs = model_outputs(model_id, picture, trust) | pipeline_outputs(model_id, picture, trust)
    modules = {name for name, m in list(sys.modules.items()) if (getattr(m, "__file__", None) or "").startswith(root)}
    ours = {name for name in modules if "main__" not in name and "site-packages" not in sys.modules[name].__file__}
    remote = {name for name in sys.modules if name.startswith("transformers_modules.")}
    if mode == "remote":
        assert not ours, f"code of the checkout was loaded: {sorted(ours)}"
    else:
        assert not remote, f"code of the model was run without trust: {sorted(remote)}"
    save_file({name: tensor.detach().contiguous() for name, tensor in outputs.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
