"""Encoding: training sees the prompt's tokens as generation does, and marks exactly what follows them."""

import itertools
from array import array
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lorank.data import IGNORED, Example, Segment, encode_segments, pieces, prompt_ids

from ..checkpoints import TEXTS, causal_tokenizer

LETTERS = st.text("ab cd\n.", max_size=12)
ANYTHING = st.text(max_size=12)


@cache
def over_spaces(kind: str) -> Tokenizer:
    """Return a tokenizer as SentencePiece makes them, whose tokens may reach over spaces: `bpe` or `unigram`."""
    alphabet = list("abcdefghijklmnopqrstuvwxyz.?0123456789\n▁")
    texts = [*TEXTS, "ab cd. ab cd. abab cd\nab. a b c d. cdcd ab", "ab cd ab cd ab cd ab cd"] * 5
    if kind == "bpe":
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer: Any = trainers.BpeTrainer(
            vocab_size=140,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=alphabet,
            show_progress=False,
        )
    else:
        made = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=140,
            special_tokens=["<unk>", "<s>", "</s>"],
            unk_token="<unk>",
            initial_alphabet=alphabet,
            show_progress=False,
        )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.train_from_iterator(texts, trainer)
    return made


def with_signs(kind: str, around: str) -> Any:
    """Return a tokenizer that puts these signs around a text, `$A` standing for it."""
    made = Tokenizer.from_str((over_spaces(kind) if kind != "bytes" else causal_tokenizer()._tokenizer).to_str())
    begin, end = ("<s>", "</s>") if kind != "bytes" else ("<|system|>", "<|end|>")
    form = around.replace("<s>", begin).replace("</s>", end)
    signs = [(sign, made.token_to_id(sign)) for sign in (begin, end) if sign in form]
    if signs:
        made.post_processor = processors.TemplateProcessing(single=form, special_tokens=signs)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=begin, eos_token=end)


TOKENIZERS = {
    (kind, around): with_signs(kind, around)
    for kind in ("bytes", "bpe", "unigram")
    for around in ("$A", "<s> $A", "$A </s>", "<s> $A </s>")
}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=[" ".join(key) for key in TOKENIZERS])


def encoded(tokenizer: Any, *segments: tuple[str, bool], special_tokens: bool = True) -> Example:
    (example,) = encode_segments(tokenizer, [[Segment(*segment) for segment in segments]], special_tokens)
    return example


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_these_tokenizers_do_merge_over_the_boundary(kind: str) -> None:
    tokenizer = TOKENIZERS[kind, "$A"]
    inside, outside = (tokenizer(text)["input_ids"] for text in ("ab cd.", "ab "))
    assert inside[: len(outside)] != outside


@each_tokenizer
@given(before=LETTERS, after=LETTERS)
@settings(max_examples=40, deadline=None)
def test_the_prompt_has_its_own_tokens_and_the_rest_is_trained_on(tokenizer: Any, before: str, after: str) -> None:
    example = encoded(tokenizer, (before, False), (after, True))
    prompt = prompt_ids(tokenizer, before, True)
    count = len(prompt)
    assert list(example.ids[:count]) == prompt
    assert set(example.labels[:count]) <= {IGNORED}  # type: ignore[index]
    assert example.labels[count:] == example.ids[count:]  # type: ignore[index]
    assert example.ids[-1] == tokenizer.eos_token_id
    assert list(example.ids).count(tokenizer.eos_token_id) == 1


@given(before=ANYTHING, after=ANYTHING, more=ANYTHING)
@settings(max_examples=150, deadline=None)
def test_bytes_lose_nothing_at_a_boundary(before: str, after: str, more: str) -> None:
    tokenizer = causal_tokenizer()
    example = encoded(tokenizer, (before, False), (after, True), (more, False), special_tokens=False)
    assert tokenizer.decode(example.ids) == before + after + more
    trained = [i for i in example.labels if i != IGNORED]  # type: ignore[union-attr]
    assert tokenizer.decode(trained) == after


@each_tokenizer
def test_the_beginning_comes_once_and_the_end_once(tokenizer: Any) -> None:
    bare = tokenizer("ab cd", add_special_tokens=False)["input_ids"]
    around = tokenizer("ab cd")["input_ids"]
    begin = [tokenizer.bos_token_id] if around[0] == tokenizer.bos_token_id else []
    example = encoded(tokenizer, ("ab cd", True))
    assert list(example.ids) == [*begin, *bare, tokenizer.eos_token_id]
    assert prompt_ids(tokenizer, "ab cd", True) == [*begin, *bare]
    assert list(encoded(tokenizer, ("ab cd", True), special_tokens=False).ids) == bare
    assert prompt_ids(tokenizer, "ab cd", False) == bare


@each_tokenizer
def test_an_empty_prompt_and_an_empty_completion(tokenizer: Any) -> None:
    begin = prompt_ids(tokenizer, "", True)
    assert begin in ([], [tokenizer.bos_token_id])
    example = encoded(tokenizer, ("", False), ("ab", True))
    assert list(example.labels) == [IGNORED] * len(begin) + list(example.ids[len(begin) :])  # type: ignore[arg-type]
    example = encoded(tokenizer, ("ab", False), ("", True))
    assert [i for i in example.labels if i != IGNORED] == [tokenizer.eos_token_id]  # type: ignore[union-attr]


def test_the_end_is_trained_on_with_what_it_ends() -> None:
    tokenizer = causal_tokenizer()
    end = tokenizer.eos_token_id
    assert encoded(tokenizer, ("a", False), ("b", True)).labels[-1] == end  # type: ignore[index]
    assert encoded(tokenizer, ("a", True), ("b", False)).labels[-1] == IGNORED  # type: ignore[index]
    assert encoded(tokenizer, ("a", True), ("b", False)).ids[-1] == end
    assert end not in encoded(tokenizer, ("a", False), ("b", True), special_tokens=False).ids


def test_without_an_end_token_there_is_none() -> None:
    tokenizer = causal_tokenizer()
    tokenizer.eos_token = None
    example = encoded(tokenizer, ("a", False), ("b", True))
    assert tokenizer.decode(example.ids) == "ab"
    assert list(example.labels) == [IGNORED, example.ids[1]]  # type: ignore[arg-type]


def test_the_signs_of_a_chat_template_are_single_tokens() -> None:
    tokenizer = causal_tokenizer()
    example = encoded(tokenizer, ("<|user|>\nhi", False), ("ho<|end|>", True), special_tokens=False)
    assert example.ids[0] == tokenizer.convert_tokens_to_ids("<|user|>")
    assert example.labels[-1] == tokenizer.eos_token_id  # type: ignore[index]


def test_a_token_over_the_boundary_is_parted_there() -> None:
    tokenizer = causal_tokenizer()
    whole = tokenizer("the quick")["input_ids"]
    example = encoded(tokenizer, ("the qu", False), ("ick", True))
    assert list(example.ids[:-1]) != whole
    assert tokenizer.decode(example.ids[:-1]) == "the quick"
    assert tokenizer.decode([i for i in example.labels if i != IGNORED]) == "ick<|end|>"  # type: ignore[union-attr]
    parted = encoded(tokenizer, ("the", False), (" quick", True))
    assert list(parted.ids[:-1]) == whole


def test_rows_are_encoded_together_as_one_by_one() -> None:
    tokenizer = TOKENIZERS["bpe", "<s> $A"]
    rows = [
        [Segment("ab cd", False), Segment(" ab", True)],
        [Segment("ab", True)],
        [Segment("ab ", False), Segment("cd", True), Segment(". ab", False), Segment("cd", True)],
    ]
    together = encode_segments(tokenizer, rows, True)
    assert together == [encode_segments(tokenizer, [row], True)[0] for row in rows]
    assert encode_segments(tokenizer, [], True) == []


@each_tokenizer
@given(texts=st.lists(LETTERS.filter(str.strip), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_pieces_are_the_text_cut_at_the_marks(tokenizer: Any, texts: list[str]) -> None:
    example = encoded(tokenizer, *((text, i % 2 == 1) for i, text in enumerate(texts)))
    found = pieces(tokenizer, example)
    assert "".join(piece.text for piece in found) == tokenizer.decode(example.ids)
    marks = [piece.trained for piece in found]
    assert all(a != b for a, b in itertools.pairwise(marks))


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
def test_pieces_keep_the_space_in_front(kind: str) -> None:
    tokenizer = TOKENIZERS[kind, "$A"]
    example = encoded(tokenizer, ("a good", False), (" film", True), special_tokens=False)
    assert pieces(tokenizer, example) == [Segment("a good", False), Segment(" film", True)]


def test_pieces_of_a_character_that_is_cut() -> None:
    tokenizer = causal_tokenizer()
    ids = tokenizer("aü!")["input_ids"]
    found = pieces(tokenizer, Example(array("i", ids), array("i", [IGNORED, IGNORED, *ids[2:]])))
    assert [piece.trained for piece in found] == [False, True]
    assert found[0].text.startswith("a") and found[1].text.endswith("!")


def test_pieces_of_a_record_with_one_label() -> None:
    tokenizer = causal_tokenizer()
    example = Example(array("i", tokenizer("a good film")["input_ids"]), 1)
    assert pieces(tokenizer, example) == [Segment("a good film", False)]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_no_space_is_added_where_a_text_goes_on(kind: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=over_spaces(kind), eos_token="</s>")
    for before, after in (("ab ", "cd"), ("ab c", "d."), ("ab ", "cd ab cd")):
        example = encoded(tokenizer, (before, False), (after, True))
        assert tokenizer.decode(list(example.ids[:-1])) == before + after
