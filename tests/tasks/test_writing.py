"""What a model writes is asked once for each prompt, and scored against all that the data has after it."""

from typing import Any

import datasets
import pytest
import torch

from lorank import AdapterError
from lorank.data import Completion, PlainText, Text
from lorank.data.rendering import Chat, Turn
from lorank.evaluation import Decoding, complete, text_scores
from lorank.models import load_base
from lorank.tasks import CausalLM, Output, Question, generate_and_score
from lorank.tasks.writing import questions

from .. import checkpoints

RECORDS = [
    {"mr": "name[The Eagle]", "ref": "The Eagle is a pub."},
    {"mr": "name[The Cricketers]", "ref": "The Cricketers is cheap."},
    {"mr": "name[The Eagle]", "ref": "There is a pub, The Eagle."},
]
NEW = Decoding(max_new_tokens=6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_base(str(checkpoints.causal(tmp_path_factory.mktemp("base"))), "causal-lm")


def task(base: Any, before: str = "mr", after: str = " {ref}") -> CausalLM:
    return CausalLM(base.tokenizer, 64, Completion(Text(before), Text(after)))


def test_references_of_one_prompt_come_together(base: Any) -> None:
    wanted = [
        Question("name[The Eagle]", ("The Eagle is a pub.", "There is a pub, The Eagle.")),
        Question("name[The Cricketers]", ("The Cricketers is cheap.",)),
    ]
    assert questions(task(base), RECORDS) == wanted
    assert questions(task(base), datasets.Dataset.from_list(RECORDS)) == wanted
    (one,) = questions(task(base, "Say it:"), [{**record, "Say it:": "x"} for record in RECORDS])
    assert len(one.references) == 3


def test_a_conversation_is_asked_for_its_last_answer(base: Any) -> None:
    said = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": " 1 "}]
    more = [*said, {"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"}]
    chat = CausalLM(base.tokenizer, 64, Chat(base.tokenizer, "talk"))
    (first, second) = questions(chat, [{"talk": said}, {"talk": more}])
    assert first.references == ("1",) and second.references == ("2",)
    assert second.prompt.startswith(first.prompt) and second.prompt.endswith("<|assistant|>\n")
    turn = CausalLM(base.tokenizer, 64, Turn(base.tokenizer, Text("mr"), Text("ref"), None))
    assert questions(turn, RECORDS)[0].references == ("The Eagle is a pub.", "There is a pub, The Eagle.")
    with pytest.raises(AdapterError, match="record 2: a conversation that does not end"):
        questions(chat, [{"talk": said}, {"talk": more[:3]}])


def test_outputs_are_what_the_model_adds_and_scores_are_theirs(base: Any) -> None:
    base.model.train()
    scores, outputs = generate_and_score(base.model, task(base), RECORDS, NEW, "bleu,ter,exact-match", batch_size=1)
    assert base.model.training and torch.is_grad_enabled()
    asked = questions(task(base), RECORDS)
    base.model.eval()
    texts = dict(complete(base.model, base.tokenizer, [one.prompt for one in asked], NEW))
    assert outputs == [Output(one, texts[i].strip()) for i, one in enumerate(asked)]
    assert scores == text_scores([one.text for one in outputs], [q.references for q in asked], "bleu,ter,exact-match")
    wanted = [{"mr": one.question.prompt, "ref": f" {one.text} "} for one in outputs]
    right, _ = generate_and_score(base.model, task(base), wanted, NEW, ["exact-match"])
    assert right == {"exact-match": 1.0}


def test_what_cannot_be_asked_or_scored_is_told_before(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.model, "generate", None)  # nothing is written
    with pytest.raises(AdapterError, match="no score 'blew'; nearest: bleu"):
        generate_and_score(base.model, task(base), RECORDS, NEW, "blew")
    with pytest.raises(AdapterError, match="there is no record"):
        generate_and_score(base.model, task(base), [], NEW, "bleu")
    with pytest.raises(AdapterError, match="record 2: column 'ref' holds a NoneType"):
        generate_and_score(base.model, task(base), [RECORDS[0], {"mr": "x", "ref": None}], NEW, "bleu")
    with pytest.raises(AdapterError, match="completion column 'reff' is not in the data; nearest: ref"):
        questions(task(base, after="reff"), datasets.Dataset.from_list(RECORDS))
    with pytest.raises(AdapterError, match="record 1: a text without a prompt"):
        questions(CausalLM(base.tokenizer, 64, PlainText(Text("ref"))), RECORDS)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AdapterError, match="no program `java`"):
        generate_and_score(base.model, task(base), RECORDS, NEW, "e2e")
