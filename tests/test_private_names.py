"""Names of other libraries that begin with an underscore: where they stand, and that they are still there.

What does not travel to the Hub has them in training/private_names.py alone. What travels cannot import it;
`TRAVELLING` lists what is used there, mostly the methods and attributes by which transformers lets its classes be
extended.
"""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from tiny_oner import tiny_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, BertConfig, BertModel, Pipeline, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.image_processing_backends import TorchvisionBackend

from oner import OneRModel
from oner.training import private_names

ROOT = Path(__file__).resolve().parents[1]
MODULE = ROOT / "training" / "private_names.py"
ROOMS = ("oner", "modeling", "processing", "training", "examples")
SOURCES = [*ROOT.glob("oner_*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
TRAVELS = [path for path in SOURCES if path.parent in (ROOT / "modeling", ROOT / "processing")]
# older releases have no such name, and so nothing to extend
NEWER = {name for name in ("_load_video_processor",) if not hasattr(Pipeline, name)}
# documented in spite of their underscore: namedtuple, os, and torch's page "Foreach Operations"
PUBLIC = {"_replace", "_exit"}
PUBLIC_PREFIX = "_foreach_"
# what made by a decorator or a registration looks like ours
NOT_WRITTEN = {"_abc_impl", "_auto_class"}
TRAVELLING = {
    PreTrainedModel: {
        "_can_compile_fullgraph",
        "_can_record_outputs",
        "_get_resized_embeddings",
        "_init_weights",
        "_keep_in_fp32_modules_strict",
        "_keys_to_ignore_on_load_unexpected",
        "_no_split_modules",
        "_resize_token_embeddings",
        "_supports_attention_backend",
        "_supports_flash_attn",
        "_supports_flex_attn",
        "_supports_sdpa",
        "_tied_weights_keys",
    },
    PreTrainedConfig: {"_attn_implementation"},
    ProcessorMixin: {"_merge_kwargs"},
    TorchvisionBackend: {"_prepare_image_like_inputs", "_preprocess", "_validate_preprocess_kwargs"},
    Pipeline: {
        "_batch_size",
        "_forward",
        "_forward_params",
        "_load_feature_extractor",
        "_load_image_processor",
        "_load_processor",
        "_load_tokenizer",
        "_load_video_processor",
        "_postprocess_params",
        "_preprocess_params",
        "_sanitize_parameters",
    },
}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith(("__", PUBLIC_PREFIX)) and name not in PUBLIC


def defined(tree: ast.Module) -> set[str]:
    """Names that a file makes: functions, classes, variables, arguments, attributes of `self` and `cls`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                names.add(node.attr)
    return names


def used(tree: ast.Module) -> set[str]:
    """Private names that a file reaches for: attributes, imports, and strings given to `getattr` and its kin."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names} | set((node.module or "").split("."))
        elif isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            names |= {argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)}
    return set(filter(private, names))


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
OWN = set().union(*(defined(tree) for path, tree in TREES.items() if path != MODULE))


def overridden(path: Path) -> set[str]:
    """Private names of transformers' classes that the classes of a travelling file, or its mixins, define again."""
    module = importlib.import_module(f"oner.{path.parent.name}.{path.stem}")
    classes = [one for one in vars(module).values() if inspect.isclass(one) and one.__module__ == module.__name__]
    names = {name for one in classes for name in filter(private, vars(one))} - NOT_WRITTEN
    return {name for name in names if any(hasattr(base, name) for base in TRAVELLING)}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("x._mapping", {"_mapping"}),
        ("from torch._dynamo import reset", {"_dynamo"}),
        ("import torch._dynamo", {"_dynamo"}),
        ("from torch.nn.modules.batchnorm import _BatchNorm as B", {"_BatchNorm"}),
        ("getattr(x, '_mapping', None)", {"_mapping"}),
        ("x._replace(a=1), torch._foreach_add_(a, b), x.__class__, x.public", set()),
    ],
)
def test_private_names_are_seen(source, names):
    assert used(ast.parse(source)) == names


@pytest.mark.parametrize("path", [path for path in SOURCES if path not in TRAVELS and path != MODULE], ids=str)
def test_other_files_reach_for_none(path):
    foreign = used(TREES[path]) - OWN
    assert not foreign, f"{path.relative_to(ROOT)}: {sorted(foreign)} belong into training/private_names.py"


def test_what_travels_uses_what_is_listed():
    found = set().union(*(used(TREES[path]) - OWN | overridden(path) for path in TRAVELS if path.stem != "__init__"))
    assert found == set().union(*TRAVELLING.values()) - NEWER


@pytest.mark.parametrize("base", TRAVELLING, ids=lambda base: base.__name__)
def test_what_travels_finds_what_it_uses(base):
    """On the class, or set by its methods."""
    source = "".join(inspect.getsource(one) for one in base.__mro__ if one.__module__.startswith("transformers"))
    missing = {name for name in TRAVELLING[base] if not hasattr(base, name) and f"self.{name}" not in source}
    assert not missing - NEWER


def test_every_name_of_the_module_is_tried_here():
    here = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in private_names.__all__ if f"private_names.{name}" not in here] == []
    assert used(TREES[MODULE])


def test_registered_models():
    models = private_names.registered_models(AutoModel)
    assert models[BertConfig] is BertModel and BertConfig in models and str not in models


def test_attention_implementation():
    model = OneRModel(tiny_config())
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert private_names.attention_implementation(model.config) == name


def test_undivided_layers():
    assert private_names.undivided_layers(OneRModel(tiny_config())) == ("PreNormLayer",)
    assert private_names.undivided_layers(nn.Linear(1, 1)) == ()


def test_fast_bf16_is_what_linux_names():
    cpu = Path("/proc/cpuinfo")
    flags = set(cpu.read_text().split()) if cpu.is_file() else set()
    named = bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})
    assert private_names.has_fast_bf16() in (named, False)
    # torch may be built without what uses them, but where it has both there is no reason to say no
    if named and torch.backends.mkldnn.is_available() and hasattr(torch.cpu, "get_capabilities"):
        assert private_names.has_fast_bf16()


@pytest.mark.parametrize("able", ["amx_bf16", "avx512_bf16", "bf16", None])
@pytest.mark.parametrize("library", [True, False])
def test_bf16_is_fast_by_an_instruction_and_the_library_that_uses_it(monkeypatch, able, library):
    told = {"avx512_f": True, "amx_tile": True, **dict.fromkeys(private_names.BF16_INSTRUCTIONS, False)}
    told |= {able: True} if able else {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: library)
    assert private_names.has_fast_bf16() == (able is not None and library)


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_older_torch_is_asked_by_its_private_names(monkeypatch, units, wide):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: units)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: wide)
    assert private_names.has_fast_bf16() == (units or wide)


def test_raise_recompile_limit():
    was = torch._dynamo.config.recompile_limit
    try:
        private_names.raise_recompile_limit(was + 24)
        assert torch._dynamo.config.recompile_limit == was + 24
        private_names.raise_recompile_limit(1)
        assert torch._dynamo.config.recompile_limit == was + 24
    finally:
        torch._dynamo.config.recompile_limit = was


def test_fused_attention_of_the_cpu():
    """It is what torch calls there, forward and backward."""
    seen = set()

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.overloadpacket)
            return function(*args, **(kwargs or {}))

    queries = torch.randn(1, 2, 4, 8, requires_grad=True)
    with Spy():
        nn.functional.scaled_dot_product_attention(queries, queries, queries).sum().backward()
    assert set(private_names.fused_attention_of_the_cpu()) <= seen


def test_local_part(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        whole = torch.arange(6.0)
        spread = distribute_tensor(whole, init_device_mesh("cpu", (1,)))
        assert torch.equal(private_names.local_part(spread), whole)
        private_names.local_part(spread).zero_()
        assert not spread.full_tensor().any()
    finally:
        destroy_process_group()


def test_storage_id():
    with private_names.FakeTensorMode():
        one, other = torch.empty(4), torch.empty(4)
        assert private_names.storage_id(one) == private_names.storage_id(one[1:])
        assert private_names.storage_id(one) != private_names.storage_id(other)


def test_most_alive():
    """Three of 4 KiB, of which two live at once; a view and what is done in place cost nothing."""

    def work():
        one = torch.zeros(1024)
        two = one[:4].view(2, 2) + one.add_(1)[:4].view(2, 2)
        del one
        return two.sum() + torch.ones(1024).sum() + torch.ones(1024)[:1]

    assert 4096 <= private_names.most_alive(work) < 4096 + 256


def test_fake_tensor_mode():
    with private_names.FakeTensorMode():
        huge = torch.empty(1 << 40) + 1
    assert huge.shape == (1 << 40,)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_batch_norm(norm):
    assert isinstance(norm(2), private_names.BatchNorm) and not isinstance(nn.LayerNorm(2), private_names.BatchNorm)


@pytest.mark.usefixtures("fresh_accelerator")
def test_set_distributed_type():
    Accelerator(cpu=True)
    private_names.set_distributed_type(DistributedType.FSDP)
    assert PartialState().distributed_type == DistributedType.FSDP


@pytest.mark.parametrize(
    ("function", "module", "names"),
    [
        (private_names.write_zero_3_master, "runtime.zero.stage3", ("_z3_optimizer", "set_local_hp_param")),
        (private_names.has_full_precision_state, "utils.tensor_fragment", ("_hp_mapping",)),
        (
            private_names.link_moments,
            "runtime.zero.stage_1_and_2",
            ("_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state"),
        ),
        (private_names.drop_overflown_step, "runtime.zero.stage3", ("_loss_scale_update_and_overflow_cleanup",)),
        (private_names.drop_overflown_step, "runtime.engine", ("_step_applied",)),
    ],
)
def test_deepspeed_s_names_are_in_its_source(function, module, names):
    """What they do is tried by the runs of tests/distributed under ZeRO."""
    pytest.importorskip("deepspeed")
    source = inspect.getsource(importlib.import_module(f"deepspeed.{module}"))
    assert function.__module__ in sys.modules and [name for name in names if name not in source] == []
