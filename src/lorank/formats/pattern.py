"""Regular expressions that come with a file, matched in linear time.

PEFT runs the keys of `rank_pattern` and `alpha_pattern` through `re`, so a file could keep a loader busy for
ever. Here they are compiled to a small automaton of which all states advance together (Thompson 1968): the work
is at most the length of the name times the length of the pattern. What such an automaton cannot do (look-around,
back-references) is refused; nobody needs it to name a layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import AdapterError

_LIMIT = 2_000  # instructions, and pieces written to make them; {m,n} is written out
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}

Test = Callable[[str], bool]


@dataclass
class _Program:
    """Instructions: ("char", test), ("split", a, b), ("jump", a), ("start",), ("end",), ("match",)."""

    code: list[tuple] = field(default_factory=list)
    pieces: int = 0

    def count_piece(self) -> None:
        """Bound the work for what is repeated and writes no instruction, such as `()`."""
        self.pieces += 1
        if self.pieces > 10 * _LIMIT:
            raise AdapterError("the pattern is too long")

    def emit(self, *instruction: object) -> int:
        if len(self.code) >= _LIMIT:
            raise AdapterError("the pattern is too long")
        self.code.append(instruction)
        return len(self.code) - 1


class Pattern:
    """One pattern of a file, tested the way PEFT tests it."""

    def __init__(self, text: str):
        self.text = text
        self._program = _Program()
        parser = _Parser(text)
        try:
            tree = parser.alternatives()
            if parser.position < len(text):
                raise AdapterError("unbalanced )")
            _write(tree, self._program)
        except AdapterError as error:
            raise AdapterError(f"pattern {text!r} in the file cannot be used: {error}") from None
        self._program.emit("match")

    def matches_end(self, name: str) -> bool:
        """Tell whether the pattern matches the whole name, or whole dotted components at its end.

        The same as `re.match(rf"(.*\\.)?({pattern})$", name)`, which is PEFT's rule.
        """
        code = self._program.code
        states: set[int] = set()
        for position in range(len(name) + 1):
            if position == 0 or name[position - 1] == ".":
                states.add(0)
            states = self._spread(states, position, len(name))
            if position == len(name):
                return any(code[state][0] == "match" for state in states)
            states = {state + 1 for state in states if code[state][0] == "char" and code[state][1](name[position])}
        return False

    def _spread(self, states: set[int], position: int, length: int) -> set[int]:
        """Follow every instruction that reads no character."""
        reached: set[int] = set()
        pending = list(states)
        while pending:
            state = pending.pop()
            if state in reached:
                continue
            reached.add(state)
            instruction = self._program.code[state]
            if instruction[0] in ("split", "jump"):
                pending.extend(instruction[1:])
            elif (instruction[0] == "start" and position == 0) or (instruction[0] == "end" and position == length):
                pending.append(state + 1)
        return reached


class _Parser:
    """Recursive descent over the subset of Python's syntax; returns nested tuples."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0
        self.depth = 0

    def peek(self) -> str:
        return self.text[self.position] if self.position < len(self.text) else ""

    def take(self) -> str:
        character = self.peek()
        if not character:
            raise AdapterError("it ends too early")
        self.position += 1
        return character

    def alternatives(self) -> tuple:
        branches = [self.sequence()]
        while self.peek() == "|":
            self.take()
            branches.append(self.sequence())
        return ("either", branches)

    def sequence(self) -> tuple:
        items = []
        while self.peek() not in ("", "|", ")"):
            items.append(self.repeated())
        return ("sequence", items)

    def repeated(self) -> tuple:
        item = self.atom()
        if self.peek() not in ("*", "+", "?", "{"):
            return item
        if item[0] in ("start", "end"):
            raise AdapterError("an anchor cannot be repeated")
        item = ("repeat", item, *self.bounds())
        if self.peek() == "?":  # lazy: which match is found first makes no difference here
            self.take()
        elif self.peek() == "+":
            raise AdapterError("possessive repetition is not supported")
        if self.peek() and self.peek() in "*+?{":
            raise AdapterError("multiple repeat")
        return item

    def bounds(self) -> tuple[int, int | None]:
        character = self.take()
        if character != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
        end = self.text.find("}", self.position)
        low, comma, high = self.text[self.position : end].partition(",") if end >= 0 else ("", "", "")
        if not (low or comma) or not all(not n or (n.isascii() and n.isdecimal()) for n in (low, high)):
            raise AdapterError("a { that is no repetition must be written \\{")
        self.position = end + 1
        if max(len(low), len(high)) > 4:
            raise AdapterError("its repetition is out of range")
        bounds = (int(low or 0), (int(high) if high else None) if comma else int(low))
        if max(bounds[0], bounds[1] or 0) > 1000 or (bounds[1] is not None and bounds[1] < bounds[0]):
            raise AdapterError("its repetition is out of range")
        return bounds

    def atom(self) -> tuple:
        character = self.take()
        if character == "(":
            return self.group()
        if character == "[":
            return ("char", self.character_class())
        if character == "\\":
            escaped = self.escape()
            return ("char", _is(escaped) if isinstance(escaped, str) else escaped)
        if character in "*+?{":
            raise AdapterError("nothing to repeat")
        return {"^": ("start",), "$": ("end",), ".": ("char", lambda c: c != "\n")}.get(character) or (
            "char",
            _is(character),
        )

    def group(self) -> tuple:
        self.depth += 1
        if self.depth > 50:
            raise AdapterError("its groups are nested too deep")
        if self.peek() == "?":
            self.take()
            if self.take() != ":":
                raise AdapterError("only plain and (?:...) groups are supported")
        tree = self.alternatives()
        if self.take() != ")":
            raise AdapterError("unbalanced (")
        self.depth -= 1
        return tree

    def escape(self) -> str | Test:
        """Return the character that was escaped, or the test that a class like \\d stands for."""
        character = self.take()
        if character.lower() in _CLASSES:
            test = _CLASSES[character.lower()]
            return test if character.islower() else lambda c: not test(c)
        if character.isalnum():
            raise AdapterError(f"\\{character} is not supported")
        return character

    def member(self) -> str | Test:
        """Return one member of a [...]."""
        character = self.take()
        return self.escape() if character == "\\" else character

    def character_class(self) -> Test:
        negated = self.peek() == "^"
        if negated:
            self.take()
        tests: list[Test] = []
        while self.peek() != "]" or not tests:
            first = self.member()
            if self.peek() == "-" and self.text[self.position + 1 : self.position + 2] not in ("]", ""):
                self.take()
                last = self.member()
                if not isinstance(first, str) or not isinstance(last, str) or last < first:
                    raise AdapterError("bad character range")
                tests.append(_between(first, last))
            else:
                tests.append(_is(first) if isinstance(first, str) else first)
        self.take()
        return lambda c: any(test(c) for test in tests) != negated


def _is(character: str) -> Test:
    return lambda c: c == character


def _between(first: str, last: str) -> Test:
    return lambda c: first <= c <= last


def _write(tree: tuple, program: _Program) -> None:
    program.count_piece()
    kind = tree[0]
    if kind == "sequence":
        for item in tree[1]:
            _write(item, program)
    elif kind == "either":
        _write_alternatives(tree[1], program)
    elif kind == "repeat":
        _write_repetition(*tree[1:], program=program)
    else:
        program.emit(*tree)


def _write_alternatives(branches: list[tuple], program: _Program) -> None:
    exits = []
    for branch in branches[:-1]:
        split = program.emit("split", 0, 0)
        _write(branch, program)
        exits.append(program.emit("jump", 0))
        program.code[split] = ("split", split + 1, len(program.code))
    _write(branches[-1], program)
    for position in exits:
        program.code[position] = ("jump", len(program.code))


def _write_repetition(item: tuple, low: int, high: int | None, program: _Program) -> None:
    for _ in range(low):
        _write(item, program)
    if high is None:
        split = program.emit("split", 0, 0)
        _write(item, program)
        program.emit("jump", split)
        program.code[split] = ("split", split + 1, len(program.code))
        return
    splits = []
    for _ in range(high - low):
        splits.append(program.emit("split", 0, 0))
        _write(item, program)
    for split in splits:
        program.code[split] = ("split", split + 1, len(program.code))
