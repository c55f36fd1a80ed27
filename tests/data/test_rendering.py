"""Rendering: columns and templates make texts, and the tokenizer's chat template says what is trained on."""

from typing import Any

import pytest

from lorank import AdapterError
from lorank.data import Completion, PlainText, Rendering, Segment, Text, rendering_of

from ..checkpoints import CHAT, causal_tokenizer

# As Qwen3's and DeepSeek's: the thoughts of all turns but the last are dropped.
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As Gemma's: it takes no system message and wants the turns to alternate.
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def chat(template: str | None = CHAT) -> Rendering:
    tokenizer = causal_tokenizer()
    tokenizer.chat_template = template
    return rendering_of({"messages": "messages"}, tokenizer)


def whole(rendering: Any, messages: list[dict[str, str]]) -> str:
    return rendering.tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_text_is_a_column_or_a_template() -> None:
    record = {"q": "why?", "n": 3, "x": 0.5, "b": True}
    assert Text("q").of(record) == "why?" and Text("q").columns == ["q"]
    assert Text("Q: {q}\nA:").of(record) == "Q: why?\nA:" and Text("{q} {n}").columns == ["q", "n"]
    assert Text("n").of(record) == "3"
    assert Text("{n} {x} {b} {q}").of(record) == "3 0.5 True why?"
    assert Text("{q:>6}").of(record) == "  why?"


def test_doubled_braces_are_braces() -> None:
    assert Text('{{"q": "{q}"}}').of({"q": "why?"}) == '{"q": "why?"}'
    assert Text("{{q}}").columns == [] and Text("{{q}}").of({}) == "{q}"


def test_braces_in_a_value_mean_nothing() -> None:
    assert Text("{q}!").of({"q": "{n} }{"}) == "{n} }{!"
    assert Text("q").of({"q": "{n}"}) == "{n}"


@pytest.mark.parametrize("form", ["Q: {q", "{q}}", "{", "a {q} } b{"])
def test_a_template_that_cannot_be_read_is_said(form: str) -> None:
    with pytest.raises(AdapterError, match=r"the template .* cannot be read: .*; double a brace to mean it"):
        Text(form).of({"q": "why?"})


@pytest.mark.parametrize("form", ["{q:d}", "{q:.2f}", "{q:{width}}", "{q!z}"])
def test_a_template_that_cannot_be_filled_is_said(form: str) -> None:
    with pytest.raises(AdapterError, match=r"the template .* cannot be filled with texts: "):
        Text(form).of({"q": "why?"})


@pytest.mark.parametrize(("value", "kind"), [(["a"], "list"), ({"a": 1}, "dict"), (None, "NoneType")])
@pytest.mark.parametrize("form", ["q", "{q}"])
def test_what_is_no_text_and_no_number_is_refused(form: str, value: Any, kind: str) -> None:
    with pytest.raises(AdapterError, match=f"column 'q' holds a {kind} where text is needed"):
        Text(form).of({"q": value})


def test_plain_text_is_trained_on_whole() -> None:
    rendering = rendering_of({"text": "{a}-{b}"}, None)
    assert isinstance(rendering, PlainText)
    assert rendering.columns() == {"a": "text", "b": "text"}
    assert rendering.segments({"a": 1, "b": 2}) == [Segment("1-2", True)]
    assert rendering.prompt({"a": 1, "b": 2}) == "1-2"


def test_of_prompt_and_completion_the_completion_is_trained_on() -> None:
    rendering = rendering_of({"prompt": "Q: {q}\nA:", "completion": " {a}"}, None)
    assert isinstance(rendering, Completion)
    assert rendering.columns() == {"q": "prompt", "a": "completion"}
    assert rendering.segments({"q": "why?", "a": 4}) == [Segment("Q: why?\nA:", False), Segment(" 4", True)]
    assert rendering.prompt({"q": "why?"}) == "Q: why?\nA:"


def test_every_answer_of_a_conversation_is_trained_on_through_its_end() -> None:
    rendering = chat()
    messages = [user("one"), assistant("two"), user("three"), assistant("four")]
    assert rendering.segments({"messages": messages}) == [
        Segment("<|user|>\none<|end|>\n<|assistant|>\n", False),
        Segment("two<|end|>", True),
        Segment("\n<|user|>\nthree<|end|>\n<|assistant|>\n", False),
        Segment("four<|end|>", True),
    ]
    assert not rendering.special_tokens


def test_the_segments_are_the_whole_text_up_to_the_last_answer() -> None:
    rendering = chat()
    messages = [{"role": "system", "content": "be short"}, user("a"), assistant("b \n"), user("c")]
    segments = rendering.segments({"messages": messages})
    joined = "".join(segment.text for segment in segments)
    assert joined == "<|system|>\nbe short<|end|>\n<|user|>\na<|end|>\n<|assistant|>\nb \n<|end|>"
    assert whole(rendering, messages).startswith(joined)


@pytest.mark.parametrize("end", ["<|end|>\n", "\n", ""])
@pytest.mark.parametrize("answers", [("", "x"), ("x", ""), ("  ", "\n"), ("a\n\n", "b ")])
def test_segments_never_repeat_or_lose_text(end: str, answers: tuple[str, str]) -> None:
    rendering = chat(CHAT.replace("<|end|>\n", end))
    messages = [user("one"), assistant(answers[0]), user("two"), assistant(answers[1])]
    segments = rendering.segments({"messages": messages})
    joined = "".join(segment.text for segment in segments)
    text = whole(rendering, messages)
    assert text.startswith(joined) and not text[len(joined) :].strip()
    assert [segment.trained for segment in segments] == [False, True] * 2
    for answer, segment in zip(answers, segments[1::2], strict=True):
        assert segment.text.startswith(answer.rstrip())


def test_answers_in_a_row_are_trained_on_one_by_one() -> None:
    segments = chat().segments({"messages": [user("a"), assistant("b"), assistant("c")]})
    assert [segment.text for segment in segments if segment.trained] == ["b<|end|>", "c<|end|>"]


def test_an_answer_that_the_template_rewrites_later_is_only_read() -> None:
    rendering = chat(FORGETFUL)
    messages = [user("a"), assistant("<think>hm</think>b"), user("c"), assistant("<think>so</think>d")]
    segments = rendering.segments({"messages": messages})
    assert [segment.text for segment in segments if segment.trained] == ["<think>so</think>d<|end|>"]
    assert "".join(segment.text for segment in segments) == whole(rendering, messages).rstrip()
    assert rendering.rewrites and not chat(FORGETFUL).rewrites
    untouched = [user("a"), assistant("b"), user("c"), assistant("d")]
    trained = [segment.text for segment in rendering.segments({"messages": untouched}) if segment.trained]
    assert trained == ["b<|end|>", "d<|end|>"]


def test_a_template_that_asks_in_another_way_than_it_answers_is_refused() -> None:
    odd = CHAT.replace("<|assistant|>\n", "<|answer|>\n")
    with pytest.raises(AdapterError, match="writes the last answer in another way than it is asked for"):
        chat(odd).segments({"messages": [user("a"), assistant("b")]})


def test_a_chat_needs_a_template() -> None:
    with pytest.raises(AdapterError, match="the tokenizer has no chat template; use prompt and completion"):
        chat(None)
    tokenizer = causal_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(AdapterError, match="the tokenizer has no chat template"):
        rendering_of({"prompt": "q", "completion": "a", "chat": True}, tokenizer)


@pytest.mark.parametrize(
    "messages",
    ["hello", [], None, ["hello"], [{"role": "user"}], [{"content": "x"}], [[user("a")]], {"role": "user"}, 3],
)
def test_what_is_no_list_of_messages_is_refused(messages: Any) -> None:
    with pytest.raises(AdapterError, match=r"column 'messages' holds no list of {role, content}"):
        chat().segments({"messages": messages})


def test_a_conversation_without_an_answer_is_refused() -> None:
    with pytest.raises(AdapterError, match="without a turn of the assistant has nothing to train on"):
        chat().segments({"messages": [user("a")]})


def test_what_the_template_refuses_is_passed_on() -> None:
    rendering = chat(STRICT)
    assert rendering.segments({"messages": [user("a"), assistant("b")]})[1].text == "b<|end|>"
    with pytest.raises(AdapterError, match="the chat template does not take these messages: System role not supp"):
        rendering.segments({"messages": [{"role": "system", "content": "x"}, user("a"), assistant("b")]})
    with pytest.raises(AdapterError, match="roles must alternate"):
        rendering.prompt({"messages": [user("a"), user("b")]})


def test_keys_without_a_value_are_no_keys() -> None:
    seen = "{% for m in messages %}{% if m.tool_calls is defined %}CALL{% endif %}" + CHAT.partition("%}")[2]
    messages = [user("a") | {"tool_calls": None}, assistant("b") | {"tool_calls": None}]
    assert "CALL" not in "".join(segment.text for segment in chat(seen).segments({"messages": messages}))


def test_tools_of_a_record_reach_the_template() -> None:
    template = "{% if tools %}tools: {{ tools | length }}\n{% endif %}" + CHAT
    record = {"messages": [user("a"), assistant("b")], "tools": [{"type": "function", "function": {"name": "f"}}]}
    rendering = chat(template)
    assert rendering.segments(record)[0].text.startswith("tools: 1\n<|user|>")
    assert rendering.prompt(record | {"tools": None}).startswith("<|user|>")


def test_the_prompt_of_a_conversation_leaves_out_the_last_answer() -> None:
    rendering = chat()
    messages = [user("one"), assistant("two"), user("three"), assistant("four")]
    asked = "<|user|>\none<|end|>\n<|assistant|>\ntwo<|end|>\n<|user|>\nthree<|end|>\n<|assistant|>\n"
    assert rendering.prompt({"messages": messages}) == rendering.prompt({"messages": messages[:3]}) == asked
    segments = rendering.segments({"messages": messages})
    assert "".join(segment.text for segment in segments[:-1]) == asked


def test_a_prompt_and_a_completion_make_a_turn() -> None:
    tokenizer = causal_tokenizer()
    about = {"prompt": "Say {q}", "completion": "a", "chat": True, "system": "be short"}
    rendering = rendering_of(about, tokenizer)
    before = "<|system|>\nbe short<|end|>\n<|user|>\nSay hi<|end|>\n<|assistant|>\n"
    assert rendering.segments({"q": "hi", "a": "ho"}) == [Segment(before, False), Segment("ho<|end|>", True)]
    assert rendering.prompt({"q": "hi", "a": "ho"}) == rendering.prompt({"q": "hi"}) == before
    assert rendering.columns() == {"q": "prompt", "a": "completion"}
    without = rendering_of(about | {"system": None}, tokenizer)
    assert without.prompt({"q": "hi"}) == "<|user|>\nSay hi<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize(
    "about",
    [
        {"text": "{a}!"},
        {"prompt": "q", "completion": " {a}"},
        {"messages": "turns"},
        {"prompt": "q", "completion": "a", "chat": True, "system": None},
        {"prompt": "q", "completion": "a", "chat": True, "system": "be short"},
    ],
)
def test_a_rendering_can_be_made_again_from_what_it_says(about: dict[str, Any]) -> None:
    tokenizer = causal_tokenizer()
    rendering = rendering_of(about, tokenizer)
    assert rendering.about() == about
    again = rendering_of(rendering.about(), tokenizer)
    record = {"a": "x", "q": "y", "turns": [user("a"), assistant("b")]}
    assert type(again) is type(rendering) and again.segments(record) == rendering.segments(record)


def test_a_rendering_needs_its_columns() -> None:
    with pytest.raises(AdapterError, match="a completion is missing"):
        rendering_of({"prompt": "q"}, None)
    with pytest.raises(AdapterError, match="a prompt is missing"):
        rendering_of({"completion": "a", "text": None}, None)
    with pytest.raises(AdapterError, match="nothing says which columns to use"):
        rendering_of({"chat": False}, None)
