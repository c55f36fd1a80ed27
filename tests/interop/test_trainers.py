"""The trainers of transformers and TRL train an adapted model as they would any other."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import lorank
from lorank import LoRA

from .. import checkpoints


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Return the names of all tensors that are not as they were, to the bit."""
    now = tensors(model)
    assert now.keys() == before.keys()
    return {name for name in now if not torch.equal(now[name], before[name])}


def adapted(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints.causal(folder))
    lorank.adapt(model, LoRA(rank=4, dropout=0.05), "all-linear", train_also="model.norm")
    return model


SETTINGS: dict[str, Any] = {
    "max_steps": 12,
    "learning_rate": 2e-2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "weight_decay": 0.1,
    "logging_steps": 1,
    "save_steps": 6,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 0,
}


def require_trained(trainer: Any, model: Any, before: dict[str, Tensor], folder: Path) -> None:
    """Check what training an adapted model must do, and no more than that."""
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.25
    parameters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert parameters == set(lorank.adapter_parameters(model))
    assert changed(model, before) == parameters
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-12"}
    stored = load_file(folder / "checkpoint-12" / "model.safetensors")
    now = tensors(model)
    assert parameters < stored.keys() and all(torch.equal(tensor, now[name]) for name, tensor in stored.items())
    lorank.save(model, folder / "adapter")
    other = transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    lorank.load(other, folder / "adapter")
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # trl trains in bfloat16's autocast
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(other.eval()(ids).logits, model.eval()(ids).logits)


def test_transformers_trainer_trains_an_adapted_model(tmp_path: Path) -> None:
    model, tokenizer = adapted(tmp_path / "base"), checkpoints.causal_tokenizer()
    before = tensors(model)
    rows = [tokenizer(text)["input_ids"][:12] for text in checkpoints.TEXTS * 6]
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path / "out"), **SETTINGS)
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    data = datasets.Dataset.from_dict({"input_ids": rows})
    trainer = transformers.Trainer(model, arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    require_trained(trainer, model, before, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # trl sets what transformers deprecates
def test_trl_sft_trainer_trains_an_adapted_model(tmp_path: Path) -> None:
    model = adapted(tmp_path / "base")
    before = tensors(model)
    data = datasets.Dataset.from_list(
        [{"prompt": f"what is {i} and two?", "completion": f" {i % 7} four"} for i in range(30)]
    )
    arguments = SFTConfig(output_dir=str(tmp_path / "out"), max_length=64, **SETTINGS)
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=checkpoints.causal_tokenizer())
    trainer.train()
    require_trained(trainer, model, before, tmp_path / "out")
