"""Loads the fine-tuned models of three directories on a machine that has transformers and not oner, and says what each
answers.

    python task_probe.py VQA ENTAILMENT REASONING INPUTS.safetensors OUT.safetensors
"""

import sys


def main(answering: str, entailment: str, reasoning: str, inputs: str, out: str) -> None:
    from hub_probe import NoOner

    sys.meta_path.insert(0, NoOner())
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    given = load_file(inputs)
    one = {name: given[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    two = {**one, "pixel_values": torch.stack([one["pixel_values"], one["pixel_values"].flip(0)], 1)}
    trust = {"trust_remote_code": True}
    # of two pictures there is no auto class: its file is named
    kind = get_class_from_dynamic_module("modeling_simla_tasks.SimlaForVisualReasoning", reasoning)
    said = {}
    with torch.no_grad():
        model = transformers.AutoModelForVisualQuestionAnswering.from_pretrained(answering, **trust).eval()
        candidates = {name: given[name] for name in ("candidate_ids", "candidate_mask")}
        said["scores"] = model.rank_answers(**one, **candidates).scores
        said["written"] = model.generate_answers(**one).sequences
        model = transformers.AutoModelForSequenceClassification.from_pretrained(entailment, **trust).eval()
        said["entailment"] = model(**one).logits
        said["reasoning"] = kind.from_pretrained(reasoning).eval()(**two).logits
    assert not any(name.split(".")[0] == "oner" for name in sys.modules)
    save_file({name: value.contiguous() for name, value in said.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
