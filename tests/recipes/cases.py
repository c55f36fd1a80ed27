"""The rows' files, and what stands in for the paper's models and data: small models of the same architectures."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from lorank.reproduction.row import Row

from .. import checkpoints

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes" / "paper").glob("table-*/*.yaml"))
# (table, name) of each file
NAMES = [f"{path.parent.name}-{path.stem}" for path in FILES]

TRIPLES = [{"subject": "Aarhus", "property": "leaderName", "object": "Jacob_Bundsgaard"}]
# A record of each data set as it is published; those of E2E and WebNLG are in files that a reader opens by itself.
RECORDS: dict[str, Any] = {
    "e2e": {
        "mr": "name[The Vaults], eatType[pub], near[Café Adriatic]",
        "ref": "The Vaults is a pub near Café Adriatic.",
    },
    "webnlg": {
        "category": "Airport",
        "modifiedtripleset": TRIPLES,
        "lexicalisations": [{"comment": "good", "lex": "The leader of Aarhus is Jacob Bundsgaard."}],
    },
    "dart": {
        "tripleset": [["Ben Mauk", "High school", "Kenton"], ["Ben Mauk", "College", "Wake Forest Cincinnati"]],
        "annotations": [{"source": "WikiTableQuestions_lily", "text": "Ben Mauk attended Kenton High School."}],
    },
    "samsum": {
        "dialogue": "Amanda: I baked cookies. Do you want some?\r\nJerry: Sure!",
        "summary": "Amanda baked cookies and will bring Jerry some.",
    },
    "wikisql": {
        "question": "Tell me what the notes are for South Australia ",
        "table": {"header": ["State/territory", "Text/background colour", "Format", "Current slogan", "Notes"]},
        "sql": {"human_readable": "SELECT Notes FROM table WHERE Current slogan = SOUTH AUSTRALIA"},
    },
    "mnli": {"premise": "The dog sleeps.", "hypothesis": "The dog is awake.", "label": "contradiction"},
}
# What is otherwise in a second record: one of a category that WebNLG's training data has not.
OTHER = {"webnlg": {"category": "Artist", "modifiedtripleset": [{**TRIPLES[0], "subject": "Aarhus_Airport"}]}}


@cache
def row(path: Path) -> Row:
    return Row.read(path)


def records(folder: Path, name: str, keys: dict[str, Any], labels: int) -> Path:
    """Write a few records for a task, with the columns that its recipe names."""
    path = folder / f"{name}.jsonl"
    if reader := keys.get("reader"):
        record = RECORDS[reader]
        other = {**record, **OTHER.get(reader, {})}
        made = [record, other] * 3
    else:
        columns = [keys["text"], *([keys["text_pair"]] if "text_pair" in keys else [])]
        words = ["a good film", "a bad film", "the lazy dog", "two and two"]
        label = (lambda i: i / 2) if keys["task"] == "regression" else (lambda i: f"label {i % labels}")
        made = [
            {column: words[(i + j) % 4] for j, column in enumerate(columns)} | {keys["label"]: label(i)}
            for i in range(12)
        ]
    path.write_text("".join(json.dumps(record) + "\n" for record in made))
    return path


def bases(folder: Path) -> dict[str, Path]:
    """Save small models of the paper's architectures, by the beginning of their names."""
    torch.manual_seed(0)
    tokenizer = _words()
    shared: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48}
    shared |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 66, "pad_token_id": 0}
    relative: dict[str, Any] = {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 8}
    relative |= {"norm_rel_ebd": "layer_norm", "share_att_key": True, "conv_kernel_size": 3, "conv_act": "gelu"}
    relative |= {"position_biased_input": False, "type_vocab_size": 0}
    encoders = {
        "roberta": RobertaModel(RobertaConfig(**shared, type_vocab_size=1)),
        "microsoft": DebertaV2Model(DebertaV2Config(**shared, **relative)),
    }
    for name, model in encoders.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    letters = checkpoints.causal_tokenizer()
    config = GPT2Config(
        vocab_size=len(letters),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        eos_token_id=letters.eos_token_id,
        bos_token_id=letters.eos_token_id,
        pad_token_id=letters.pad_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    letters.save_pretrained(folder / "gpt2")
    return {name: folder / name for name in ("roberta", "microsoft", "gpt2")} | {"gpt3": folder / "gpt2"}


def _words() -> Any:
    """Return a tokenizer of words with signs around a text, and no types of tokens, as RoBERTa has none."""
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    made.train_from_iterator(checkpoints.TEXTS, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )
