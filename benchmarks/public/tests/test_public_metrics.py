"""Every metric of the public benchmarks against values worked out by hand."""

import dataclasses
import sys
import types

import pytest

from benchmarks.public import metrics
from benchmarks.public.samples import Item

ITEM = Item("suite", "set", "", "1", "context", "question", ("yes",), "f1", 8, chat=True)


@pytest.fixture
def word_by_word(monkeypatch):
    """A stand-in for jieba, which is optional: words end at "|", which is dropped."""
    monkeypatch.setitem(sys.modules, "jieba", types.SimpleNamespace(cut=lambda text: iter(text.split("|"))))


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("The cat, a big one!", "Cat", 2 * 1 / (3 + 1)),  # cat big one | cat
        ("cat cat dog", "cat cat cat", 2 * 2 / 6),  # two in common, not three
        ("an answer.", "The Answer", 1),
        ("there", "the re", 0),  # articles are words, not letters
        ("", "answer", 0),
        ("the", "a", 0),  # nothing is left on either side
    ],
)
def test_f1(reply, answer, score):
    assert metrics.f1(reply, answer) == pytest.approx(score)


@pytest.mark.usefixtures("word_by_word")
def test_f1_of_chinese_words():
    # 北京 是 首都 | 首都: the full stop and the wide comma are no words.
    assert metrics.f1_chinese("北京|是|，|首都|。", "首都。") == pytest.approx(2 * 1 / (3 + 1))
    assert metrics.f1_chinese("ＡＢ|c", "C") == pytest.approx(2 / 3)  # small letters
    assert metrics.f1_chinese("。", "首都") == 0
    # As in LongBench, the opening bracket of a title counts as a word, the closing one does not.
    assert metrics.f1_chinese("《|红楼梦|》", "红楼梦") == pytest.approx(2 * 1 / (2 + 1))


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        # the cat on (the) mat: 4 different words in order, of 5 and 5.
        ("the cat lay on the mat", "the cat sat on the mat", 2 * 0.8 * 0.8 / (1.6 + 1e-8)),
        # In another order only two words are: c d, of 4 and 4.
        ("c d a b", "a b c d", 2 * 0.5 * 0.5 / (1 + 1e-8)),
        # Sentences end at full stops: a b from one, c d from the other, of 4 and 4.
        ("c d. a b", "a b. c d", 2 * 1 / (2 + 1e-8)),
        # A word counts once: a, of {a} and {a, b}.
        ("a a a", "a b", 2 * 1 * 0.5 / (1.5 + 1e-8)),
        ("", "a b", 0),
        ("...", "a b", 0),
        ("x", "a b", 0),
    ],
)
def test_rouge_l(reply, answer, score):
    assert metrics.rouge_l(reply, answer) == pytest.approx(score, abs=1e-12)


def test_rouge_l_of_one_very_long_sentence():
    limit = sys.getrecursionlimit()
    words = " ".join(f"w{number}" for number in range(limit // 2 + 100))
    assert metrics.rouge_l(words, words[::-1]) < 0.02  # as many steps as both have words
    assert metrics.rouge_l(words, words) == pytest.approx(1, abs=1e-7)
    assert sys.getrecursionlimit() == limit


@pytest.mark.usefixtures("word_by_word")
def test_rouge_l_of_chinese_words():
    assert metrics.rouge_l_chinese("北京|是|首都", "首都|是|北京|市") == pytest.approx(2 * (1 / 3) * (1 / 4) / (7 / 12))


def test_count_and_retrieval_share_a_score_among_the_numbers():
    assert metrics.count("There are 12.", "12") == 1
    assert metrics.count("12 of 13", "12") == 0.5
    assert metrics.count("121", "12") == 0
    assert metrics.count("twelve", "12") == 0
    assert metrics.retrieval("Paragraph 7", "Paragraph 7") == 1
    assert metrics.retrieval("Paragraphs 7, 8, 7", "Paragraph 7") == pytest.approx(2 / 3)
    assert metrics.retrieval("段落7", "段落17") == 0
    assert metrics.retrieval("是段落17", "段落17") == 1


def test_code_similarity_of_the_first_line_of_code():
    # Of 5 + 6 letters "x = 1" is in both: 10/11, in whole per cent.
    assert metrics.code_similarity("x = 1", "x = 12") == 0.91
    assert metrics.code_similarity("\n\n```python\n# sum\n// or so\ntotal += 1\nrest", "total += 1") == 1
    assert metrics.code_similarity("# nothing", "total += 1") == 0
    # "ab" and "cd" are in both, but only one of them after the other: 2 · 2 / 8.
    assert metrics.code_similarity("abcd", "cdab") == 0.5


def test_classification_counts_the_classes_named():
    classes = ("Food", "Fast food", "City", "State")
    score = lambda reply, answer: metrics.classification(reply, answer, classes)
    assert score("It is Food", "Food") == 1
    assert score("Food or City", "Food") == 0.5
    assert score("City", "Food") == 0
    assert score("It is city", "City") == 0  # the case matters
    assert score("Food, City and State", "State") == pytest.approx(1 / 3)
    # A class whose name is part of the right one's does not count.
    nested = ("City", "State", "City of State")
    assert metrics.classification("City of State", "City of State", nested) == 1
    assert metrics.classification("City of State", "City", nested) == pytest.approx(1 / 3)


def test_a_question_takes_its_best_answer_or_all_of_them():
    ask = lambda reply, **changes: metrics.score(dataclasses.replace(ITEM, **changes), reply)
    assert ask("yes", answers=("no", "yes indeed", "maybe")) == pytest.approx(2 / 3)
    assert ask("Both A17 and b9.", answers=("a17", "B9", "c3"), metric="contains_all") == pytest.approx(2 / 3)
    assert ask("only b9", answers=("a17", "B9"), metric="contains_any") == 1
    assert ask("neither", answers=("a17", "B9"), metric="contains_any") == 0
    assert ask("City", answers=("Food", "City"), metric="classification", classes=("Food", "City")) == 1
    assert ask("\n\nyes\nno no no", first_line=True) == 1
    assert ask("\n\nyes\nno no no") == pytest.approx(2 / 5)
    names = [name for name in metrics.METRICS if "chinese" not in name and name != "choice"]  # that wants letters
    assert {ask("yes 1", answers=("1",), metric=name, classes=("1",)) > 0 for name in names} == {True}


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    chinese = dataclasses.replace(ITEM, dataset="vcsum", metric="rouge_l_chinese")
    find = lambda name: None if name == "jieba" else types.ModuleType(name)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", find)
    metrics.check_installed([ITEM, dataclasses.replace(ITEM, metric="rouge_l")])
    with pytest.raises(ValueError, match=r"vcsum .* needs jieba: pip install 'squeezejax\[benchmarks\]'"):
        metrics.check_installed([ITEM, chinese])
