"""What all commands have in common: help, usage, errors, and what goes to which stream."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorank.cli import app

from .. import checkpoints
from .running import run

COMMANDS = [
    *("train", "compare", "reproduce", "eval", "score", "generate", "merge", "inspect", "plan"),
    *("combine", "resize", "scale", "extract", "diff", "push", "pull"),
]
# What words of a command line come out of its help as they are; rich would take some brackets for markup.
EXAMPLES = {
    "train": ["lorank train recipe.yaml --dry-run"],
    "compare": [
        "lorank compare sst2.yaml --methods 'lora{rank: 4},adapter-h{size: 16},prefix-layer' --rates 0.1,0.3,1,3"
    ],
    "reproduce": [
        "lorank reproduce recipes/paper/table-2/deberta-xxl-lora.yaml --hyperparameters repository --dry-run"
    ],
    "eval": ["lorank eval --adapter runs/sst2 --data dev.tsv"],
    "score": ["lorank score e2e.jsonl --metrics e2e"],
    "generate": ["lorank generate --adapter runs/e2e --prompt 'name[The Eagle], food[French]'"],
    "merge": ["lorank merge --adapter runs/e2e --out merged"],
    "inspect": ["lorank inspect adapters/sst2 --all --json"],
    "plan": ["lorank plan path/to/model --targets 'c_attn[q,v]' --rank 4 --json"],
    "combine": ["lorank combine adapters/sst2 adapters/polite --weights 0.7,0.3 --output adapters/both"],
    "resize": ["lorank resize runs/e2e --energy 0.99 --output adapters/small"],
    "scale": ["lorank scale adapters/toxic -1 --output adapters/less-toxic"],
    "extract": ["lorank extract path/to/base path/to/tuned --rank 16 --output adapters/tuned"],
    "diff": ["lorank diff adapters/sst2 adapters/mnli"],
    "push": ["lorank push runs/e2e my-name/e2e-lora --license apache-2.0"],
    "pull": ["lorank pull my-name/many --path checkpoint-500"],
}


def lorank(*words: object, **options: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a process of its own."""
    command = [sys.executable, "-m", "lorank", *map(str, words)]
    environment = {**os.environ, "COLUMNS": "100", **options}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def fastest(*words: str) -> float:
    """Return the seconds of work of the fastest of several runs of Python: others on the machine only add to them."""
    import resource

    def worked() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    seconds = []
    for _ in range(5):
        before = worked()
        subprocess.run([sys.executable, *words], capture_output=True, check=True)
        seconds.append(worked() - before)
    return min(seconds)


@pytest.mark.skipif(os.name != "posix", reason="counts the work of processes as POSIX does")
def test_help_comes_at_once() -> None:
    assert fastest("-m", "lorank", "--help") - fastest("-c", "pass") < 0.5


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_imports_nothing_heavy(command: str | None) -> None:
    code = (
        "import sys\nfrom lorank.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    words = [sys.executable, "-c", code, *([command] if command else []), "--help"]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "Usage:" in found.stdout
    loaded = set(found.stderr.split())
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "datasets", "tokenizers", "safetensors", "matplotlib"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_examples_and_has_json(command: str) -> None:
    found = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "250", "TERMINAL_WIDTH": "250"})
    assert found.exit_code == 0
    assert "--json" in found.stdout
    assert f"lorank {command}" in found.stdout.partition("Examples:")[2]
    for example in EXAMPLES[command]:
        assert example in re.sub(r"\s+", " ", found.stdout)


def test_the_list_of_commands_is_complete() -> None:
    found = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "250"})
    assert set(COMMANDS) <= set(found.stdout.split())
    bare = CliRunner().invoke(app, [])
    assert "Usage:" in bare.output and bare.exit_code == 2
    version = CliRunner().invoke(app, ["--version"])
    assert re.fullmatch(r"lorank \d+\.\d+\S*\n", version.stdout) and version.exit_code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["plan", "--rnak", "4", "model"], "--rank"),
        (["merge", "--adaptor", "x", "--out", "y"], "--adapter"),
        (["train", "--learning-rat", "1"], "--learning-rate"),
        (["plan", "--rank", "0", "model"], "--rank"),
        (["plan", "--rank", "many", "model"], "--rank"),
        (["merge", "--out", "y"], "--adapter"),
        (["insect", "x"], "insect"),
        (["plan"], "model"),
    ],
)
def test_wrong_usage_is_told(words: list[str], says: str) -> None:
    found = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert found.exit_code == 2
    assert says in found.stderr and found.stdout == ""


def test_an_error_is_one_line_on_standard_error(tmp_path: Path) -> None:
    for words, code in ((["plan", tmp_path / "no-model"], 1), (["train"], 2)):
        found = lorank(*words)
        assert found.returncode == code and found.stdout == ""
        assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1


def test_wrong_usage_is_another_exit_code() -> None:
    found = lorank("plan", "--rnak", "4")
    assert found.returncode == 2 and found.stdout == "" and "--rank" in found.stderr


def test_results_and_remarks_go_to_streams_of_their_own(tmp_path: Path) -> None:
    base = checkpoints.causal(tmp_path / "base")
    (tmp_path / "data.jsonl").write_text('{"prompt": "a good", "completion": " film"}\n' * 40)
    words = ["train", "--model", base, "--data", tmp_path / "data.jsonl", "--dry-run"]
    plain = run(*words)
    assert "dry run" in plain.stdout and "example:" not in plain.stdout
    assert "example: " in plain.stderr and "note: " in plain.stderr
    as_json = run(*words, "--json")
    assert json.loads(as_json.stdout)["examples"] == 38
    assert "example: " not in as_json.stdout


def on_a_terminal(*words: object, **options: str) -> bytes:
    """Return what a command writes to a terminal."""
    parent, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **options}
    command = [sys.executable, "-m", "lorank", *map(str, words)]
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, stdin=terminal, env=environment)
    os.close(terminal)
    written = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not piece:
            break
        written += piece
    process.wait(60)
    os.close(parent)
    return written


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    colour = re.compile(rb"\x1b\[[0-9;]*3[0-9]m")
    assert colour.search(on_a_terminal("train"))
    assert not colour.search(on_a_terminal("train", NO_COLOR="1"))
    assert "\x1b" not in lorank("train").stderr


def test_output_that_nobody_reads_is_no_fault() -> None:
    command = f"{sys.executable} -m lorank train --help | head -c 10"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert len(found.stdout) == 10 and "Traceback" not in found.stderr and "Exception" not in found.stderr
