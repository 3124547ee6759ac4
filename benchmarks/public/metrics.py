"""How a reply is scored, in [0, 1]: the metrics of LongBench (https://github.com/THUDM/LongBench) and RULER.

LongBench's numbers come out to the last digit: ROUGE-L by the package that LongBench uses, `rouge` (words at white
space, each counted once); code similarity as `fuzzywuzzy` computes it where LongBench's requirements are installed,
difflib's ratio in whole per cent. Three things differ. Where several class names are part of the right one's,
none of them counts (LongBench skips every second one). A sentence may have any length in ROUGE-L (LongBench gives 0
where Python's limit of recursion is met, at about a thousand words). Punctuation in Chinese words is what Unicode calls
so, but for `_COUNTED` (LongBench has a list, which lacks rare signs as well).
"""

import collections
import contextlib
import difflib
import importlib.util
import re
import string
import sys
import unicodedata

from benchmarks.public.samples import Item

_COUNTED = "《〈〉·・"  # punctuation that LongBench's Chinese F1 leaves in words, or counts as words

# ---- One reply, one right answer


def f1(reply: str, answer: str) -> float:
    """Words in common (SQuAD): without case, punctuation and articles."""
    return _overlap(_english_words(reply), _english_words(answer))


def f1_chinese(reply: str, answer: str) -> float:
    """Words in common, of those that jieba finds, without punctuation."""
    return _overlap(_chinese_words(reply), _chinese_words(answer))


def rouge_l(reply: str, answer: str) -> float:
    """ROUGE-L, F1 of the longest common subsequences of sentences (which end with a full stop)."""
    from rouge import Rouge

    try:
        with _deep_recursion(len(reply.split()) + len(answer.split())):
            return Rouge(metrics=["rouge-l"]).get_scores(reply, answer)[0]["rouge-l"]["f"]
    except ValueError:  # nothing but full stops on one side
        return 0.0


def rouge_l_chinese(reply: str, answer: str) -> float:
    """ROUGE-L of the words that jieba finds."""
    return rouge_l(" ".join(_segment(reply)), " ".join(_segment(answer)))


def count(reply: str, answer: str) -> float:
    """The share of the reply's numbers that are the answer."""
    numbers = re.findall(r"\d+", reply)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(reply: str, answer: str) -> float:
    """The share of the reply's numbers that are the number in the answer, "Paragraph 7" or "段落7"."""
    return count(reply, re.search(r"\d+", answer)[0])


def code_similarity(reply: str, answer: str) -> float:
    """Similarity to the reply's first line that is neither comment nor fence."""
    lines = reply.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, code, answer).ratio()) / 100


def contains(reply: str, answer: str) -> float:
    """Whether the answer is somewhere in the reply, in any case."""
    return float(answer.lower() in reply.lower())


def classification(reply: str, answer: str, classes: tuple[str, ...]) -> float:
    """1 / (number of classes named) where the right one is; a class that is part of the right one's name is none."""
    named = [name for name in classes if name in reply and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def choice(reply: str, answer: str) -> float:
    """Whether the letters of choices that a reply begins with, "B", "(B)", "A, C" or "AC", are the answer's."""
    found = re.match(r"\W*((?:\(?[A-H]{1,4}\)?(?![a-zA-Z'’])(?:\s*(?:,|and|&)\s*)?)+)", reply)
    return float(bool(found) and set(re.findall("[A-H]", found[1])) == set(answer))


# ---- All right answers of a question

_BEST = {  # the answer that fits best counts
    "f1": f1,
    "f1_chinese": f1_chinese,
    "rouge_l": rouge_l,
    "rouge_l_chinese": rouge_l_chinese,
    "count": count,
    "retrieval": retrieval,
    "code_similarity": code_similarity,
    "contains_any": contains,
    "choice": choice,
}
METRICS = (*_BEST, "contains_all", "classification")
_NEEDS = {
    "rouge_l": ("rouge",),
    "rouge_l_chinese": ("rouge", "jieba"),
    "f1_chinese": ("jieba",),
}


def score(item: Item, reply: str) -> float:
    """The score of a reply to a question."""
    if item.first_line:
        reply = reply.lstrip("\n").split("\n")[0]
    if item.metric == "classification":
        return max(classification(reply, answer, item.classes) for answer in item.answers)
    if item.metric == "contains_all":  # the share of answers that are there
        return sum(contains(reply, answer) for answer in item.answers) / len(item.answers)
    return max(_BEST[item.metric](reply, answer) for answer in item.answers)


def check_installed(items: list[Item]):
    """Raises ValueError where a question's metric needs a package that is not installed."""
    for metric in sorted({item.metric for item in items}):
        for package in _NEEDS.get(metric, ()):
            if importlib.util.find_spec(package) is None:
                dataset = next(item.dataset for item in items if item.metric == metric)
                raise ValueError(
                    f"{dataset} is scored by {metric}, which needs {package}: pip install 'squeezejax[benchmarks]'"
                )


# ---- Words


def _overlap(reply: list[str], answer: list[str]) -> float:
    """F1 of two bags of words."""
    common = (collections.Counter(reply) & collections.Counter(answer)).total()
    return 2 * common / (len(reply) + len(answer)) if common else 0.0


def _english_words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _chinese_words(text: str) -> list[str]:
    words = ("".join(letter for letter in word.lower() if not _skipped(letter)) for word in _segment(text))
    return [word for word in words if word]


def _skipped(letter: str) -> bool:
    """White space or punctuation, of any width."""
    if letter in _COUNTED:
        return False
    plain = unicodedata.normalize("NFKC", letter)
    return letter.isspace() or plain in string.punctuation or unicodedata.category(letter).startswith("P")


def _segment(text: str) -> list[str]:
    import jieba

    return list(jieba.cut(text))


@contextlib.contextmanager
def _deep_recursion(extra: int):
    """Lets `rouge` recurse once for every word. Python's own frames take none of the C stack."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + extra)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
