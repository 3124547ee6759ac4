"""The public benchmarks end to end, on a few made samples with the embedded model; prompts, files and errors."""

import collections
import copy
import csv
import dataclasses
import json
import re
import sys
import types

import jax
import numpy as np
import oracle
import pytest
from chat_models import CONTEXT, KINDS, TEMPLATES, make_tokenizer

import squeezejax
from benchmarks.public import __main__ as public
from benchmarks.public import leval, likelihood, longbench, metrics, prefixqa, prompts, ruler, run, summary
from benchmarks.public.samples import Item
from benchmarks.quality import report
from squeezejax import models
from squeezejax.chat import prompts as chat
from squeezejax.models import embedded

REPLY_LENGTH = 16
SEEDS = (3, 4, 5)  # of the documents
WITHOUT_TEMPLATE = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
RULER_TASKS = ("niah_single_1", "vt", "cwe", "fwe", "qa_1")


@pytest.fixture(scope="module")
def tokenizer():
    return chat.load_tokenizer(embedded.PATH)


def write_lines(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def longbench_line(dataset, document, fact, number=0):
    """A sample of one dataset; the model's reply will be " " + fact.reply."""
    kind = longbench.METRICS[dataset]
    answers = {"retrieval": "Paragraph 3", "count": "3", "classification": fact.answer}
    answer = answers.get(kind, " " + fact.reply)
    classes = [fact.answer, "granite"] if kind == "classification" else None
    record = {"input": fact.question, "context": document.text, "answers": [answer], "all_classes": classes}
    return record | {"length": 3999 + number, "dataset": dataset, "language": "en", "_id": f"{dataset}{number}"}


def write_config(folder):
    """Prompts that the embedded model knows; few-shot and code tasks write out its format by themselves."""
    folder.mkdir()
    templates = dict.fromkeys(longbench.METRICS, "{context}\n\n{input}")
    templates |= dict.fromkeys(WITHOUT_TEMPLATE, "<bos>{context}\n\n{input}\nAnswer:")
    (folder / "dataset2prompt.json").write_text(json.dumps(templates))
    (folder / "dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(longbench.METRICS, REPLY_LENGTH)))
    return folder


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Files of every task, and the command that runs them: three documents, one for prompts without template."""
    folder = tmp_path_factory.mktemp("sets")
    town, harbour, plain = (embedded.make_document(seed, 330, 5) for seed in SEEDS)
    files = []
    for name in longbench.METRICS:
        document = plain if name in WITHOUT_TEMPLATE else town
        files.append(write_lines(folder / f"{name}.jsonl", longbench_line(name, document, document.facts[0])))
    even = [longbench_line("hotpotqa", harbour, harbour.facts[i], i) for i in range(2)]
    files.append(write_lines(folder / "hotpotqa_e.jsonl", *even))
    fact = plain.facts[0]
    needle = f"<bos>{plain.text}\n\n{fact.question}"
    for name in RULER_TASKS:
        prompt = needle if name == "niah_single_1" else needle.replace(fact.question, f"Question: {fact.question}")
        record = {"index": 0, "input": prompt, "answer_prefix": "\nAnswer:", "outputs": [fact.answer], "length": 360}
        write_lines(folder / name / "validation.jsonl", record)
    questions = [{"question": one.question, "answers": [one.reply]} for one in harbour.facts[2:]]
    questions[0] |= {"metric": "contains_any", "answers": [harbour.facts[2].answer.upper()]}
    many = {"id": "harbour", "context": harbour.text, "questions": questions, "max_new_tokens": REPLY_LENGTH}
    arguments = ["--model", "embedded", "--sparsities", "0.5", "0.8", "--multiple", "256", "--batch", "5"]
    arguments += ["--longbench-config", str(write_config(folder / "config")), "--longbench", *map(str, files)]
    arguments += ["--ruler", *(str(folder / name / "validation.jsonl") for name in RULER_TASKS)]
    return [*arguments, "--prefixqa", str(write_lines(folder / "many.jsonl", many))]


@pytest.fixture
def builds(monkeypatch):
    """Lengths of the contexts that are squeezed."""
    lengths, squeeze = [], squeezejax.squeeze

    def counted(params, tokens, config):
        lengths.append(len(tokens))
        return squeeze(params, tokens, config)

    monkeypatch.setattr(squeezejax, "squeeze", counted)
    # jieba is optional: words of the Chinese tasks are split at spaces here.
    monkeypatch.setitem(sys.modules, "jieba", types.SimpleNamespace(cut=str.split, __spec__=types.SimpleNamespace()))
    short = {name: task._replace(max_new_tokens=REPLY_LENGTH) for name, task in ruler._TASKS.items()}
    monkeypatch.setattr(ruler, "_TASKS", short)  # one length of replies compiles once
    return lengths


def test_every_task_end_to_end_interrupted_and_resumed(command, builds, tmp_path, monkeypatch, capsys):
    out, trees = tmp_path / "out", tmp_path / "trees"
    command = [*command, "--trees", str(trees), "--out", str(out)]

    answer = run.answer

    def interrupt(*arguments):
        if len(builds) == 2:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(run, "answer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        public.main(command)
    records = out / "records.jsonl"
    before = records.read_text().splitlines()
    # Killed earlier, while it wrote: the last six answers at sparsity 0.8 are lost, one of them not quite.
    kept = before[:-6]
    records.write_text("\n".join(kept) + "\n" + before[-6][:50])

    monkeypatch.setattr(run, "answer", answer)
    public.main(command)
    assert builds == [256, 256, 256]  # three distinct contexts; the tree of the second, asked again, was kept
    assert records.read_text().splitlines()[: len(kept)] == kept
    found = report.load(records)
    # 21 datasets, 2 questions of an _e file, RULER's 5, and 3 of the many; densely and at two sparsities.
    assert len(found) == len({(one["key"], one["sparsity"]) for one in found}) == 3 * (21 + 2 + 5 + 3)
    assert {one["sparsity"] for one in found} == {None, 0.5, 0.8}
    again = {(one["key"], one["sparsity"]): one for one in map(json.loads, before)}
    assert all(again.get((one["key"], one["sparsity"]), one) == one for one in found)
    contexts = collections.defaultdict(set)
    for one in found:
        contexts[one["suite"]].add(one["context"])
    assert contexts["ruler"] < contexts["longbench"]
    assert contexts["prefixqa"] == contexts["longbench-e"]
    assert len(set.union(*contexts.values())) == 3
    check_scores(found)
    check_table(out, found, capsys.readouterr().out)

    builds.clear()
    public.main(command)  # nothing is left to do
    assert len(report.load(records)) == len(found)
    assert builds == []


def check_scores(found):
    dense = [one for one in found if one["sparsity"] is None]
    assert {one["kept"] for one in dense} == {1.0}
    right = {" " + fact.reply for seed in SEEDS for fact in embedded.make_document(seed, 330, 5).facts}
    assert np.mean([one["reply"] in right for one in dense]) > 0.5  # all, with the weights of today
    for one in found:
        if one["reply"] in right:
            is_number = one["dataset"].startswith("passage")  # asked for, but the model says a fact
            assert one["score"] == pytest.approx(0.0 if is_number else 1.0, abs=1e-7), one
    means = collections.defaultdict(list)
    for record in found:
        means[record["sparsity"]].append(record["kept"])
    assert np.mean(means[0.8]) < np.mean(means[0.5]) < 1


def check_table(out, found, printed):
    with (out / "summary.csv").open() as file:
        columns = ("suite", "dataset", "subset", "sparsity")
        rows = {tuple(row[name] for name in columns): row for row in csv.DictReader(file)}
    names = {("longbench", name, "") for name in (*longbench.METRICS, "average")} | {("prefixqa", "many", "")}
    names |= {("ruler", name, "512") for name in (*RULER_TASKS, "average")}
    names |= {("longbench-e", "hotpotqa", subset) for subset in ("0-4k", "4-8k")}  # of 3,999 and 4,000 words
    assert {row[:3] for row in rows} == names
    assert rows["prefixqa", "many", "", "dense"]["lost"] == "0"
    many = [one["score"] for one in found if one["dataset"] == "many" and one["sparsity"] == 0.8]
    assert float(rows["prefixqa", "many", "", "0.8"]["score"]) == pytest.approx(100 * np.mean(many), 1e-4)
    assert "ruler niah_single_1 512" in printed


def test_a_table_by_hand():
    item = Item("prefixqa", "set", "", "1", "context", "one", ("yes",), "f1", 8, chat=True)
    items = [dataclasses.replace(item, dataset=name, question=q) for name, q in (("a", "1"), ("a", "2"), ("b", "3"))]

    def record(item, sparsity, score):
        return {"key": item.key, "sparsity": sparsity, "score": score, "kept": 0.5, "kept_reading": 1, "context": "c"}

    records = [record(one, None, 1) for one in items] + [record(items[0], 0.9, 0.5), record(items[1], 0.9, 1)]
    records += [record(items[2], 0.9, 0), record(dataclasses.replace(item, id="of another command"), 0.9, 0)]
    rows = {(row["dataset"], row["sparsity"]): row for row in summary.summarize(records, items, (0.9,))}
    numbers = lambda name, sparsity: [rows[name, sparsity][x] for x in ("questions", "score", "lost", "low", "high")]
    assert numbers("a", "dense") == [2, 100, 0, 0, 0]
    assert numbers("a", 0.9) == [2, 75, 25, 25, 25]  # one context: no other could have been drawn
    assert numbers("b", 0.9) == [1, 0, 100, 100, 100]
    assert numbers("average", 0.9) == [3, 37.5, 62.5, "", ""]
    assert len(rows) == 6


# ---- Prompts


def ask(context, *questions, is_chat=True):
    item = Item("suite", "set", "", "1", context, "", ("yes",), "f1", 8, chat=is_chat)
    return [dataclasses.replace(item, question=question) for question in questions]


def test_fixed_part_and_question_are_the_whole_prompt(tokenizer):
    context = embedded.make_document(1, 300, 4).text
    items = ask(context, "\n\nWho?", "\n\nWhat is this? " * 9)
    made = prompts.tokenize(tokenizer, items)
    assert chat.decode(tokenizer, made.fixed) == context
    assert made.dropped == 0
    for item, ids in zip(items, made.questions, strict=True):
        whole = chat.whole_prompt_ids(tokenizer, [chat.user(context + item.question)])
        assert [*made.fixed, *ids] == whole
    # As it stands: no template around it.
    plain = prompts.tokenize(tokenizer, ask(context, "\nQ:", is_chat=False))
    assert tokenizer.decode(plain.questions[0]) == "\nQ:"
    # A question that continues the context's last word takes that word along.
    joined = prompts.tokenize(tokenizer, ask(context + " Fal", "con Falcon", is_chat=False))
    whole = tokenizer(context + " Falcon Falcon")["input_ids"]
    assert [*joined.fixed, *joined.questions[0]] == whole
    assert len(joined.questions[0]) == 2


def total(made):
    """Tokens of the longest prompt and its reply, which may have 8."""
    return len(made.fixed) + max(map(len, made.questions)) + 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["headers", "inst", "plain"])
def test_prompts_of_every_make_of_tokenizer(kind, template):
    tokenizer = make_tokenizer(kind, TEMPLATES[template], add_bos=template == "plain")
    for is_chat in (True, False):
        items = ask(CONTEXT, "\n\nWhy?", "7 sacks: ", "'s", is_chat=is_chat)
        made = prompts.tokenize(tokenizer, items)
        for item, ids in zip(items, made.questions, strict=True):
            prompt = CONTEXT + item.question
            if is_chat and TEMPLATES[template]:
                assert [*made.fixed, *ids] == chat.whole_prompt_ids(tokenizer, [chat.user(prompt)])
            else:
                assert [*made.fixed, *ids] == tokenizer(prompt)["input_ids"]
        assert CONTEXT[:-8] in tokenizer.decode(made.fixed)  # up to what its last token may share with a question
        positions = total(made) - 10
        cut = prompts.tokenize(tokenizer, items, positions=positions)
        assert cut.dropped >= 10
        assert positions - 2 * prompts.SEAM <= total(cut) <= positions
        assert tokenizer.decode(cut.fixed)[:40] == tokenizer.decode(made.fixed)[:40]
        assert CONTEXT[-20:-8] in tokenizer.decode(cut.fixed)


def test_fixed_parts_round_down_to_a_multiple(tokenizer):
    context = embedded.make_document(1, 300, 4).text
    exact, rounded = (prompts.tokenize(tokenizer, ask(context, "\n\nWho?"), multiple=m) for m in (1, 64))
    assert len(rounded.fixed) == len(exact.fixed) // 64 * 64
    assert [*rounded.fixed, *rounded.questions[0]] == [*exact.fixed, *exact.questions[0]]
    short = prompts.tokenize(tokenizer, ask("So short.", "\n\nWho?"), multiple=64)
    assert chat.decode(tokenizer, short.fixed) == "So short."


def test_contexts_are_cut_in_the_middle_as_by_longbench(tokenizer):
    context, question = embedded.make_document(2, 300, 4).text, "\n\nWhat is the signal of Amber Falcon?"
    whole = tokenizer(context + question)["input_ids"]
    expected = tokenizer.decode(whole[:50]) + tokenizer.decode(whole[-50:])
    made = prompts.tokenize(tokenizer, ask(context, question), max_length=100)
    assert [*made.fixed, *made.questions[0]] == chat.whole_prompt_ids(tokenizer, [chat.user(expected)])
    assert made.dropped == len(whole) - 100
    assert chat.decode(tokenizer, made.questions[0]) == question + "\nAnswer:"
    # Many questions: the longest decides for all, so that there is one context.
    both = prompts.tokenize(tokenizer, ask(context, "\n\nWho?", question), max_length=100)
    np.testing.assert_array_equal(both.fixed, made.fixed)
    np.testing.assert_array_equal(both.questions[1], made.questions[0])
    # What the model can handle, replies (8 tokens) and template (3: <bos>, line break, Answer:) included.
    most = prompts.tokenize(tokenizer, ask(context, question), positions=150)
    assert 130 < len(most.fixed) + len(most.questions[0]) + 8 <= 150
    long = "\n\n" + question * 6
    kept = prompts.tokenize(tokenizer, ask(context, long), max_length=100)  # more than half, and not cut
    assert chat.decode(tokenizer, kept.questions[0]) == long + "\nAnswer:"
    with pytest.raises(ValueError, match="no context fits"):
        prompts.tokenize(tokenizer, ask(context, long), max_length=40)


def test_templates_that_strip_or_hide_messages(tokenizer):
    stripping = copy.deepcopy(tokenizer)
    stripping.chat_template = "{{ bos_token }}[{{ messages[0]['content'] | trim }}]"
    made = prompts.tokenize(stripping, ask("  Some context.", "\n\nWho? "))
    assert [*made.fixed, *made.questions[0]] == chat.encode(tokenizer, "<bos>[Some context.\n\nWho?]")
    assert tokenizer.decode(made.fixed) == "<bos>[Some context."
    stripping.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ValueError, match="does not write the user's message"):
        prompts.tokenize(stripping, ask("Some context.", "\n\nWho?"))


@pytest.mark.parametrize(("length", "window"), [(3, 1), (100, 50), (101, 100), (5000, 100)])
def test_contexts_no_longer_than_the_window_have_a_smaller_one(length, window, monkeypatch):
    monkeypatch.setattr(squeezejax, "squeeze", lambda params, tokens, config: (len(tokens), config.observation_window))
    assert run.context_tree(run.Setup(None, None, ()), np.zeros(length, np.int32)) == (length, window)


# ---- Files


def test_longbench_prompts_and_rules(tmp_path):
    config = longbench.read_config(write_config(tmp_path / "config"))
    document = embedded.make_document(0, 100, 1)
    fact = document.facts[0]
    read = lambda name: longbench.read(
        write_lines(tmp_path / f"{name}.jsonl", longbench_line(name.removesuffix("_e"), document, fact)), config
    )[0]
    assert len(longbench.METRICS) == 21
    for name in longbench.METRICS:
        item = read(name)
        assert item.chat == (name not in WITHOUT_TEMPLATE)
        assert item.first_line == (name in ("trec", "triviaqa", "samsum", "lsht"))
        assert item.stop_at_newline == (name == "samsum")
        assert item.metric in metrics.METRICS
        assert item.context.removeprefix("<bos>") == document.text
    one = read("qasper_e")
    assert (one.suite, one.dataset, one.subset) == ("longbench-e", "qasper", "0-4k")
    assert read("trec").classes == (fact.answer, "granite")
    # A prompt with the question first: it belongs to what is fixed. Braces in texts are no fields.
    first = config._replace(prompts={"qmsum": "Q: {input}\n{context}\nA {{short}} answer:"})
    line = longbench_line("qmsum", document, fact) | {"context": "a {context} of {input}"}
    item = longbench.read(write_lines(tmp_path / "q.jsonl", line), first)[0]
    assert item.context == f"Q: {fact.question}\na {{context}} of {{input}}"
    assert item.question == "\nA {short} answer:"


def test_ruler_questions_begin_where_they_ask(tmp_path):
    def read(name, text, **fields):
        return ruler.read(write_lines(tmp_path / name, {"index": 7, "input": text, "outputs": ["x"], **fields}))[0]

    one = read("niah_multikey_2.jsonl", "What a text.\nWhat is it in the text?", answer_prefix=" It is", length=4090)
    assert (one.context, one.question) == ("What a text.", "\nWhat is it in the text? It is")
    assert (one.dataset, one.subset, one.metric, one.max_new_tokens) == ("niah_multikey_2", "4096", "contains_all", 128)
    one = read("vt/validation.jsonl", "Question: old one\nText.\nQuestion: Find all. Answer: they are", length=4097)
    assert (one.context, one.question) == ("Question: old one\nText.", "\nQuestion: Find all. Answer: they are")
    assert (one.dataset, one.subset, one.max_new_tokens, one.chat) == ("vt", "8192", 30, False)
    one = read("qa_2/test.jsonl", "[INST] Documents.\n\nQuestion: Who? [/INST]")
    assert (one.question, one.metric, one.max_new_tokens) == ("\n\nQuestion: Who? [/INST]", "contains_any", 32)
    assert [read(f"{name}.jsonl", "Words. Question: ?").max_new_tokens for name in ("cwe", "fwe")] == [120, 50]


def test_prefixqa_schema(tmp_path):
    line = {"id": "a", "context": "Text.", "questions": [{"question": "Who?", "answers": ["x", "y"]}]}
    line["questions"].append({"question": "Which?", "answers": ["x"], "metric": "contains_all"})
    one, other = prefixqa.read(write_lines(tmp_path / "leases.jsonl", line))
    assert (one.dataset, one.id, one.context, one.question) == ("leases", "a/1", "Text.", "\n\nWho?")
    assert (one.answers, one.metric, one.max_new_tokens) == (("x", "y"), "f1", 64)
    assert (other.id, other.metric) == ("a/2", "contains_all")


BAD = {  # what stands in the file, or is given -> what is said
    "{": "line 1 is not JSON",
    "[1]": "line 1 is not a JSON object",
    "": "bad.jsonl is empty",
    '{"context": "a"}': "line 1 has no field 'input'",
    "dataset=chess": "no dataset 'chess' in LongBench; there are narrativeqa, ",
    "context= ": "the context is empty",
    "answers=[]": "'answers' must be a list of one or more strings",
    "answers=yes": "'answers' must be a list, got",
    "dataset=trec": "'all_classes' must be a list, got null",
    "dataset=passage_count": "has no entry for passage_count",
    "--longbench missing.jsonl": "there is no file missing.jsonl",
    "--longbench-config .": "has no dataset2prompt.json: give the folder LongBench/config",
    "--model nowhere": "no model directory at nowhere",
    "--max-length 5": "a prompt may have 5, so no context fits",
    "--multiple 0": "--multiple must be at least 1, got 0",
    "--cluster-fractions 2": "cluster_fractions must be fractions",
}


@pytest.mark.parametrize("given", BAD)
def test_bad_input_is_refused_before_the_model_is_loaded(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the model was loaded"))
    config = write_config(tmp_path / "config")
    lengths = dict.fromkeys(longbench.METRICS, 8) | {"passage_count": None}
    (config / "dataset2maxlen.json").write_text(json.dumps(lengths))
    document = embedded.make_document(0, 100, 1)
    record = longbench_line("hotpotqa", document, document.facts[0])
    name, equals, value = given.partition("=")
    record |= {name: json.loads(value) if value == "[]" else value} if equals and given[0] != "{" else {}
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(record) if equals or given.startswith("--") else given)
    command = ["--model", "embedded", "--out", str(tmp_path / "out"), "--longbench", str(path)]
    command += ["--longbench-config", str(config), *(given.split() if given.startswith("--") else ())]
    with pytest.raises(SystemExit) as stopped:
        public.main(command)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert BAD[given] in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("read", "name", "record", "said"),
    [
        (ruler, "chess.jsonl", {"input": "Question: ?", "outputs": ["x"]}, "RULER has no task 'chess'; name the file"),
        (ruler, "vt.jsonl", {"input": "no", "outputs": ["x"]}, "no 'Question:' in its input"),
        (ruler, "vt.jsonl", {"input": " Question: ?", "outputs": ["x"]}, "the text before the question is empty"),
        (ruler, "vt.jsonl", {"input": "a Question: ?", "outputs": [1]}, "'outputs' must be a list of one or more"),
        (prefixqa, "x.jsonl", {"id": "a", "context": " ", "questions": [{}]}, "the context is empty"),
        (prefixqa, "x.jsonl", {"id": "a", "context": "a", "questions": []}, "has no questions"),
        (prefixqa, "x.jsonl", {"id": "a", "context": "a", "questions": [{}]}, "question 1 has no field 'question'"),
        (
            prefixqa,
            "x.jsonl",
            {"id": "a", "context": "a", "questions": [{"question": "?", "answers": ["x"], "metric": "bleu"}]},
            "no metric 'bleu'; there are f1, ",
        ),
    ],
)
def test_lines_of_other_formats_are_refused(read, name, record, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)):
        read.read(write_lines(tmp_path / name, record))


def test_records_of_other_settings_are_not_continued(tmp_path):
    path = tmp_path / "settings.json"
    public.check_settings(path, {"model": "a", "multiple": 1})
    path.write_text('{"model": "a", "multiple": 1}')
    public.check_settings(path, {"model": "a", "multiple": 1})
    with pytest.raises(ValueError, match="with another multiple: name another --out"):
        public.check_settings(path, {"model": "a", "multiple": 512})


# ---- L-Eval


def test_leval_questions_of_every_kind(tmp_path):
    records = [
        {"input": " A lecture. ", "instructions": ["Who?\nA. she\nB. he", "Both?"], "outputs": ["B", "AC"]},
        {
            "input": "A story.",
            "instructions": ["Why?", "It rains?"],
            "outputs": ["(B) They did.", "True [fact: False]"],
        },
        {"input": "Sums.", "instructions": ["How many?", "And what?"], "outputs": ["18", ""]},
    ]
    records = [record | {"evaluation": "exam"} for record in records]
    records.append({"input": "A call.", "instructions": ["What?"], "outputs": ["Much."], "evaluation": "f1"})
    records.append({"input": "A bill.", "instructions": ["Sum up."], "outputs": ["Law."], "evaluation": "rouge"})
    items = leval.read(write_lines(tmp_path / "tpo.jsonl", *records))
    assert [(item.metric, item.answers) for item in items] == [
        ("choice", ("B",)),
        ("choice", ("AC",)),
        ("choice", ("B",)),
        ("contains_any", ("True",)),
        ("contains_any", ("18",)),
        ("f1", ("Much.",)),
        ("rouge_l", ("Law.",)),
    ]
    assert len({item.context for item in items}) == 5
    assert items[0].context == "Document is as follows.\nA lecture."
    assert items[0].question.startswith("\n\nQuestion: Who?\nA. she\nB. he\nPlease")
    for change, sentence in (
        ({"outputs": ["B"]}, "2 instructions and 1 outputs"),
        ({"evaluation": "taste"}, 'no evaluation "taste"'),
        ({"input": " "}, "the input is empty"),
    ):
        with pytest.raises(ValueError, match=sentence):
            leval.read(write_lines(tmp_path / "bad.jsonl", records[0] | change))


def test_letters_of_choices():
    for reply, answer, right in (
        ("B", "B", 1),
        (" (B) he did", "B", 1),
        ("B. he", "B", 1),
        ("A, C", "AC", 1),
        ("A and C", "AC", 1),
        ("AC", "AC", 1),
        ("A", "AC", 0),
        ("Because B", "B", 0),
        ("C", "B", 0),
        ("", "B", 0),
    ):
        assert metrics.choice(reply, answer) == right, reply


def test_the_likelihood_of_answers_is_the_dense_models():
    params = oracle.make_model(seed=2)
    ids = np.random.default_rng(1).integers(0, 31, 60)
    config = squeezejax.SqueezeConfig(cluster_fractions=(0.2,), observation_window=8)
    tree = squeezejax.squeeze(params, ids[:40], config)
    questions, answers = np.stack([ids[40:46], ids[46:52]]), [ids[52:56].tolist(), ids[56:58].tolist()]
    lengths = np.array([6, 4])
    options = {"sparsity": 0.0, "implementation": "xla"}
    found = likelihood.of_answers(params, tree, questions, lengths, answers, **options)
    for row, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
        whole = np.concatenate([ids[:40], questions[row, :length], answer])[None]
        log_p = jax.nn.log_softmax(models.logits(params, whole)[0])
        start = len(whole[0]) - len(answer) - 1
        expected = np.mean([log_p[start + i, token] for i, token in enumerate(answer)])
        assert found[row] == pytest.approx(expected, abs=1e-4)


def test_other_configurations_by_name():
    base = squeezejax.SqueezeConfig()
    made = public.parse_config("cluster_fractions=(0.1,),sparsity=0.8", base)
    assert made == dataclasses.replace(base, cluster_fractions=(0.1,), sparsity=0.8)
    assert public.parse_config("", base) == base
    for wrong in ("sparsity", "nothing=1", "sparsity=f()", "observation_window=-1", "a b"):
        with pytest.raises(ValueError, match="--config"):
            public.parse_config(wrong, base)
