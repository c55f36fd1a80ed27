"""Causal language models: the next token, on the parts of a text that are trained on."""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..data import IGNORED, Completion, Example, Rendering, encode_segments, pieces
from ..errors import AdapterError
from .base import Task, Tensors, _padded


class CausalLM(Task):
    """Predict the next token; the loss is the mean over the trained tokens."""

    kind = "causal-lm"
    scores: ClassVar = {"loss": False, "perplexity": False, "token_accuracy": True}
    best = "loss"

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        rendering: Rendering,
        *,
        train_on: str = "completion",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(tokenizer, max_length)
        self.rendering, self.train_on, self.label_smoothing = rendering, train_on, label_smoothing

    def columns(self) -> dict[str, str]:
        return self.rendering.columns()

    def encode(self, records: Sequence[Mapping[str, Any]]) -> list[Example]:
        rows = [self.rendering.segments(record) for record in records]
        examples = encode_segments(self.tokenizer, rows, self.rendering.special_tokens)
        if self.train_on == "all":
            return [Example(example.ids, example.ids) for example in examples]
        return examples

    def remarks(self, examples: Sequence[Example]) -> list[str]:
        if self.rendering.rewrites:
            return ["the chat template rewrites answers once the conversation goes on; those are read, not trained on"]
        if isinstance(self.rendering, Completion):
            first = pieces(self.tokenizer, examples[0])
            if len(first) > 1 and not first[0].text[-1:].isspace() and not first[1].text[:1].isspace():
                form = self.rendering.before.form
                form = form if "{" in form else f"{{{form}}}"
                return [
                    "prompt and completion meet without a space or a line break; the template "
                    f"prompt='{form}\\n' would part them"
                ]
        return []

    def prompt_of(self, example: Example) -> tuple[int, int]:
        """Return the place of all that stands in front of the first trained token."""
        labels = example.labels
        assert isinstance(labels, array), "a label a token"
        trained = [i for i, label in enumerate(labels) if label != IGNORED]
        if self.special is not None and self.special.infix and trained[0] == 0:
            raise AdapterError("infix tokens stand behind the prompt, and all of the text is trained on; take infix=0")
        if self.special is not None and self.special.infix and trained[-1] - trained[0] >= len(trained):
            raise AdapterError(
                "infix tokens stand behind the prompt, and there are examples with several answers, each behind a "
                "prompt of its own; train with infix=0"
            )
        return 0, trained[0]

    def _batch(self, examples: Sequence[Example]) -> Tensors:
        batch = super()._batch(examples)
        width = batch["input_ids"].shape[1]
        batch["labels"] = _padded([example.labels for example in examples], width, IGNORED)  # type: ignore[misc]
        return batch

    def loss(self, model: nn.Module, batch: Tensors) -> tuple[Tensor, int]:
        logits, labels = trained_logits(model, batch)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=self.label_smoothing)
        return loss, len(labels)

    def measure(self, model: nn.Module, batches: Iterable[Tensors]) -> dict[str, float]:
        total = right = count = 0.0
        for batch in batches:
            logits, labels = trained_logits(model, batch)
            total += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
            right += float((logits.argmax(dim=-1) == labels).sum())
            count += len(labels)
        loss = total / count
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {"loss": loss, "perplexity": perplexity, "token_accuracy": right / count}

    def about(self) -> dict[str, Any]:
        return {"task": self.kind, "train_on": self.train_on, **self.rendering.about()}


def trained_logits(model: nn.Module, batch: Tensors) -> tuple[Tensor, Tensor]:
    """Return the logits (tokens, vocabulary) where the next token is trained on, and these next tokens (tokens,).

    The output head sees the chosen positions alone: it is the widest layer of a small model, and most positions of
    a batch are prompt or padding. Whatever a model does to its logits, element by element, still happens.
    """
    labels = batch["labels"]
    chosen = F.pad(labels[:, 1:] != IGNORED, (0, 1))  # position t predicts token t + 1
    places = chosen.flatten().nonzero()[:, 0]

    def choose(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not inputs or inputs[0].shape[:-1] != chosen.shape:
            return None
        return (inputs[0].flatten(0, 1)[places.to(inputs[0].device)], *inputs[1:])

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    hook = head.register_forward_pre_hook(choose) if isinstance(head, nn.Module) else None
    try:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    if logits.dim() == 3:
        logits = logits.flatten(0, 1)[places.to(logits.device)]
    return logits, labels.roll(-1, dims=1).flatten()[places].to(logits.device)
