"""Benchmarks through lm-eval: prompts, rows, shots, and the same numbers as lm-eval's own model and metrics."""

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.registry import get_aggregation
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.tydiqa.utils import exact_match_score, f1_score
from transformers import AutoModelForCausalLM

from lit_rlhf.data.sources import read_rows
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.suites.benchmarks import TASKS_DIR, Benchmark, Benchmarks, compute_task_metrics
from lit_rlhf.evaluation.suites.bias import CrowSPairs, entropy_bits
from lit_rlhf.evaluation.suites.lm_eval_model import LMEvalAdapter
from lit_rlhf.evaluation.suites.truthfulness import TruthfulQA, read_question
from lit_rlhf.evaluation.tasks import metrics, readers
from lit_rlhf.evaluation.tasks.constraints import CONSTRAINTS, REQUIRED_SETTINGS
from lit_rlhf.evaluation.tasks.metrics import OptionScore

FILES = {  # task -> file, rows in it
    "squadv2": ("squad2_first8.json.gz", 2805),
    "hellaswag": ("hellaswag.jsonl.gz", 4000),
    "bbh": ("bbh_all.jsonl.gz", 6511),
    "sst": ("sentence_polarity.jsonl.gz", 10662),
    "ifeval": ("ifeval.jsonl", 541),
    "fr_en": ("tatoeba_eng_fra.txt.gz", 5000),
    "drop": ("rc_fixtures/drop.json", 19),
    "quac": ("rc_fixtures/dialog_qa_quac_sample.json", 12),
    "rte": ("rc_fixtures/superglue_rte.jsonl", 4),
}
READERS = {"sst": readers.sentiment, "fr_en": readers.translation, "squadv2": readers.squad}


@pytest.fixture(scope="module")
def hflm(evaluated_model) -> HFLM:
    """lm-eval's own model class on the same weights."""
    model = AutoModelForCausalLM.from_pretrained(evaluated_model.spec.path)
    return HFLM(pretrained=model, tokenizer=evaluated_model.tokenizer, batch_size=4, device="cpu", max_length=512)


def build_prompts(loaded) -> list[str]:
    ((_, task),) = loaded["tasks"].items()
    task.build_all_requests(limit=2, rank=0, world_size=1)
    return [instance.args[0] for instance in task.instances]


@pytest.mark.parametrize("name", FILES)
def test_every_row_of_every_file(evaluation_data, name) -> None:
    file, rows = FILES[name]
    read = READERS.get(name, getattr(readers, name, None))
    assert {split: len(docs) for split, docs in read(str(evaluation_data / file)).items()} == {
        "test": rows,
        "shots": rows,
    }


def test_the_prompts_are_those_of_the_paper(evaluation_data) -> None:
    def first(name: str, shots: int = 0) -> str:
        benchmark = Benchmark(name, str(evaluation_data / FILES[name][0]))
        return build_prompts(Benchmarks([benchmark])._load_task(benchmark, shots))[0]

    squad = first("squadv2")
    head = "Answer each question using information in the preceding background paragraph. If there is not enough "
    head += 'information provided, answer with "Not in background."\n\nTitle: Normans\n\nBackground: The Normans ('
    assert squad.startswith(head)
    assert squad.endswith("\n\nQ: In what country is Normandy located?\n\nA:")
    assert squad.count("Q: ") == 1
    assert first("fr_en") == "Translate the following sentences from French into English.\n\nFrench: Va !\n\nEnglish:"
    assert first("rte").endswith('one reasonably conclude that "Weapons of Mass Destruction Found in Iraq"?\n\nAnswer:')
    assert first("quac").startswith("Answer each question") and "TITLE: The break\n\nPARAGRAPH: DJ Kool" in first(
        "quac"
    )
    assert first("drop").startswith(
        "Answer each question using information from the preceding passage.\n\nPassage: The"
    )
    assert first("sst", 2).count("\n\nText: ") == 3 and first("sst", 2).count("\n\nLabel: ") == 2
    assert first("hellaswag").startswith(
        "Complete each independent paragraph using common-sense reasoning.\n\nClean and"
    )


def test_questions_of_a_paragraph_have_the_answered_ones_as_history(evaluation_data) -> None:
    docs = readers.squad(str(evaluation_data / FILES["squadv2"][0]))["test"]
    assert docs[1]["history"] == "Q: In what country is Normandy located?\n\nA: France\n\n"
    assert sum(not doc["answers"] for doc in docs) == 1527
    assert all(doc["target"] == "Not in background." for doc in docs if not doc["answers"])


def test_shots_are_never_the_row_itself_and_may_come_from_another_file(evaluation_data, tmp_path) -> None:
    rows = [{"premise": f"premise {i}", "hypothesis": f"thought {i}.", "label": i % 2} for i in range(6)]
    for name, part in (("test", rows[:4]), ("train", rows[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    own = Benchmark("rte", str(tmp_path / "test.jsonl"))
    other = Benchmark("rte", str(tmp_path / "test.jsonl"), shots_path=str(tmp_path / "train.jsonl"))
    for benchmark, shots, allowed in ((own, 3, {0, 1, 2, 3}), (other, 2, {4, 5})):
        for prompt in build_prompts(Benchmarks([benchmark])._load_task(benchmark, shots)):
            *before, last = prompt.split("Passage: premise ")[1:]
            numbers = [int(part[0]) for part in before]
            assert len(set(numbers)) == shots and set(numbers) <= allowed - {int(last[0])}
    same = [build_prompts(Benchmarks([own], seed=s)._load_task(own, 2)) for s in (1, 1, 2)]
    assert same[0] == same[1] != same[2]


@pytest.mark.parametrize("name, shots", [("hellaswag", 0), ("rte", 1), ("sst", 2)])
def test_the_same_choice_scores_as_lm_evals_model(evaluated_model, hflm, evaluation_data, name, shots) -> None:
    benchmark = Benchmark(name, str(evaluation_data / FILES[name][0]), [shots])
    suite = Benchmarks([benchmark])
    both = [
        evaluate(model, suite._load_task(benchmark, shots), limit=12, bootstrap_iters=0)
        for model in (hflm, LMEvalAdapter(evaluated_model))
    ]
    rows = [found["samples"][name] for found in both]
    for theirs, mine in zip(*rows, strict=True):
        assert [each[0] for each in mine["filtered_resps"]] == pytest.approx(
            [each[0] for each in theirs["filtered_resps"]], rel=4e-6, abs=1e-4
        )
        assert mine["unnormalized accuracy"] == theirs["unnormalized accuracy"]
        assert "accuracy" in mine and "accuracy" not in theirs
    suite.tasks[0].limit = 12
    value = suite.run(evaluated_model, evaluated_model).metrics[
        f"{name}{f', {shots}-shot' if shots else ''}: unnormalized accuracy"
    ]
    assert value.value == both[0]["results"][name]["unnormalized accuracy,none"]


def test_answers_are_those_of_lm_evals_model(evaluated_model, hflm, evaluation_data) -> None:
    benchmark = Benchmark("squadv2", str(evaluation_data / FILES["squadv2"][0]))
    both = [
        evaluate(model, Benchmarks([benchmark])._load_task(benchmark, 0), limit=4, bootstrap_iters=0)["samples"][
            "squadv2"
        ]
        for model in (hflm, LMEvalAdapter(evaluated_model))
    ]
    assert [row["filtered_resps"] for row in both[0]] == [row["filtered_resps"] for row in both[1]]


def own_task(file: str, split: str, rows: list[dict[str, Any]]) -> Any:
    """A task of lm-eval's own, as it stands there, on these rows."""
    config = load_yaml(f"{lm_eval.__path__[0]}/tasks/{file}")
    config = {key: each for key, each in config.items() if key not in ("tag", "dataset_path", "dataset_name")}
    splits = {"training_split": None, "validation_split": split, "test_split": None}
    config |= {**splits, "custom_dataset": lambda **_: {split: Dataset.from_list(rows)}}
    return TaskManager(include_defaults=False).load([config])


def test_truthfulqa_scores_as_lm_evals_own_task(evaluated_model, hflm, evaluation_data) -> None:
    path, rows = str(evaluation_data / "truthfulqa_first400.csv"), 6

    def targets(right, wrong):
        return {"choices": [*right, *wrong], "labels": [1] * len(right) + [0] * len(wrong)}

    docs = [
        {
            "question": q.text,
            "mc1_targets": targets([q.best], q.incorrect),
            "mc2_targets": targets(q.correct, q.incorrect),
        }
        for q in map(read_question, read_rows(path)[:rows])
    ]
    mine = TruthfulQA(path, prompts=["qa"], boundary="joint", limit=rows).run(evaluated_model, evaluated_model).metrics
    for name, label in (("truthfulqa_mc1", "qa: MC1"), ("truthfulqa_mc2", "qa: MC2")):
        task = own_task(f"truthfulqa/{name}.yaml", "validation", docs)
        found = evaluate(hflm, task, bootstrap_iters=0)
        assert mine[label].value == pytest.approx(found["results"][name]["acc,none"], abs=1e-5)


def test_crows_pairs_scores_as_lm_evals_own_task(evaluated_model, hflm, evaluation_data) -> None:
    path = str(evaluation_data / "crows_pairs_anonymized.csv")
    docs = [{key: row.fields[key] for key in ("sent_more", "sent_less")} for row in read_rows(path)[:12]]
    found = evaluate(hflm, own_task("crows_pairs/crows_pairs_english.yaml", "validation", docs), bootstrap_iters=0)
    mine = CrowSPairs(path, ["basic"], limit=12).run(evaluated_model, evaluated_model)
    assert mine.metrics["basic, stereotype"].value == found["results"]["crows_pairs_english"]["pct_stereotype,none"]
    pairs = [[logprob for logprob, _ in row["filtered_resps"]] for row in found["samples"]["crows_pairs_english"]]
    assert mine.metrics["basic"].value == pytest.approx(sum(map(entropy_bits, pairs)) / 12, abs=1e-5)


def test_hellaswag_scores_as_lm_evals_own_task(evaluated_model, hflm, evaluation_data) -> None:
    rows = read_rows(str(evaluation_data / FILES["hellaswag"][0]))[:12]
    docs = [
        {"activity_label": "A", "ctx_a": row.fields["ctx"], "ctx_b": "then", "endings": row.fields["endings"]}
        | {"label": str(row.fields["label"])}
        for row in rows
    ]
    theirs, mine = (
        evaluate(model, own_task("hellaswag/hellaswag.yaml", "validation", docs), bootstrap_iters=0)["results"]
        for model in (hflm, LMEvalAdapter(evaluated_model))
    )
    for metric in ("acc,none", "acc_norm,none"):
        assert mine["hellaswag"][metric] == theirs["hellaswag"][metric]


TEXT = st.text(alphabet="aAbc theTHEan.,'-12é \n", max_size=24)


@given(TEXT, TEXT)
def test_squad_f1_and_exact_match_are_lm_evals(answer, reference) -> None:
    assert metrics.exact_match(answer, reference) == float(exact_match_score(answer, reference, "en"))
    mine, theirs = metrics.f1(answer, reference), f1_score(answer, reference, "en")
    if metrics.normalize_words(answer) and metrics.normalize_words(reference):
        assert mine == pytest.approx(float(theirs), abs=1e-12)
    else:  # SQuADv2: no answer is right where there is none
        assert mine == float(metrics.normalize_words(answer) == metrics.normalize_words(reference))


def test_squad_on_the_real_references_is_torchmetrics(evaluation_data) -> None:
    from torchmetrics.functional.text import squad

    docs = [doc for doc in readers.squad(str(evaluation_data / FILES["squadv2"][0]))["test"] if doc["answers"]]
    docs = docs[:150]
    said = [
        (doc["answers"][-1] + " of the " + doc["title"]) if i % 3 else doc["question"] for i, doc in enumerate(docs)
    ]
    theirs = squad(
        [{"prediction_text": text, "id": str(i)} for i, text in enumerate(said)],
        [
            {"answers": {"answer_start": [0] * len(doc["answers"]), "text": doc["answers"]}, "id": str(i)}
            for i, doc in enumerate(docs)
        ],
    )
    mine = [metrics.squad(doc, [text]) for doc, text in zip(docs, said)]
    assert 100 * sum(each["f1"] for each in mine) / 150 == pytest.approx(float(theirs["f1"]), abs=1e-4)
    assert 100 * sum(each["exact"] for each in mine) / 150 == pytest.approx(float(theirs["exact_match"]), abs=1e-4)


def test_the_fallback_of_the_prompt_is_no_answer() -> None:
    no, yes = {"answers": []}, {"answers": ["in Rome", "Rome"]}
    assert metrics.squad(no, [" Not in background."]) == {"f1": 1, "exact": 1, "f1 of unanswerable": 1}
    assert metrics.squad(no, [" Rome"])["f1"] == 0
    assert metrics.squad(yes, [" not in background"]) == {"f1": 0, "exact": 0, "f1 of answerable": 0}
    assert metrics.squad(yes, [" The Rome."])["exact"] == 1
    assert metrics.quac({"answers": ["I don't know."]}, [" i don't know"])["f1"] == 1
    assert metrics.drop({"answers": [["3"], ["three", "four"]]}, [" 3 "]) == {"exact": 1.0, "f1": 1.0}


def test_multiple_choice_takes_the_highest_mean_not_the_lowest() -> None:
    options = [OptionScore.make(-6.0, False, 6), OptionScore.make(-5.0, False, 2), OptionScore.make(-30.0, False, 10)]
    assert metrics.multiple_choice({"gold": 0}, options) == {"unnormalized accuracy": 0.0, "accuracy": 1.0}
    assert metrics.multiple_choice({"gold": 1}, [(-6.0, False), (-5.0, True)]) == {"unnormalized accuracy": 1.0}


def test_wsc_counts_a_named_noun_where_the_pronoun_means_it(tmp_path) -> None:
    target = {"span1_text": "the old cat", "span2_text": "it", "span2_index": 6}
    row = {"text": "the old cat slept because it's it was tired", "target": target, "label": True}
    (tmp_path / "wsc.jsonl").write_text(json.dumps(row) + "\n")
    (doc,) = readers.wsc(str(tmp_path / "wsc.jsonl"))["test"]
    assert doc["passage"] == "the old cat slept because it's **it** was tired"
    answers = {" The cat": True, " the old cat, of course": True, " dog": False, "": False, " ol": False, " c": False}
    for answer, named in answers.items():
        assert metrics.wsc(doc, [answer])["accuracy"] == float(named)
        assert metrics.wsc({**doc, "same": False}, [answer])["accuracy"] == float(not named)


def test_rouge_and_bleu_reach_their_ends(tmp_path, tiny) -> None:
    assert metrics.summary({"summary": "the cat sat down"}, [" the cat sat down"])["rouge-l"] == 1.0
    assert metrics.summary({"summary": "the cat sat down"}, ["the dog sat"])["rouge-l"] == pytest.approx(2 * 2 / 7)
    (tmp_path / "news.jsonl").write_text('{"article": "w1 w2 w3", "highlights": "w4"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"translation": {"fr": "w1 w2", "en": "w3"}}\n')
    tasks = [Benchmark("tldr", str(tmp_path / "news.jsonl")), Benchmark("fr_en", str(tmp_path / "pairs.jsonl"))]
    result = Benchmarks(tasks).run(tiny, tiny)
    assert set(result.metrics) == {"tldr: rouge-l", "fr_en: bleu"}
    assert result.metrics["fr_en: bleu"].unit == "points"
    assert (result.num_rows, result.metrics["tldr: rouge-l"].count) == (2, 1)


def test_ifeval_counts_prompts_and_single_constraints() -> None:
    constraints = [
        ("punctuation:no_comma", {}),
        ("length_constraints:number_words", {"relation": "at least", "num_words": 3}),
    ]
    doc = {"constraints": json.dumps(constraints)}
    assert metrics.ifeval(doc, ["one, two three"]) == {
        "prompts": 0.0,
        "prompts, loose": 0.0,
        "constraints": [False, True],
        "constraints, loose": [False, True],
    }
    assert metrics.ifeval(doc, ["Sure, here it is:\none two three"])["prompts, loose"] == 1.0
    assert metrics.mean_over_constraints([[True, False], [True], [True]]) == 0.75


def test_a_task_of_ones_own_and_an_unknown_one(tmp_path, tiny, monkeypatch) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "w1", "label": 1}\n{"text": "w2", "label": 0}\n')
    text = (TASKS_DIR / "sst.yaml").read_text().replace("task: sst", "task: my_sentiment").replace("Text:", "w5")
    (tmp_path / "my_sentiment.yaml").write_text(text)
    suite = Benchmarks([Benchmark("my_sentiment", str(tmp_path / "rows.jsonl"))], include=str(tmp_path))
    assert suite.run(tiny, tiny).metrics["my_sentiment: accuracy"].count == 2
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: TaskManager(include_defaults=False))  # seconds less
    with pytest.raises(UserError, match="no task 'hellaswga'; there are bbh, "):
        Benchmarks([Benchmark("hellaswga")]).run(tiny, tiny)
    monkeypatch.undo()
    with pytest.raises(UserError, match="a benchmark needs the path of its data file"):
        Benchmarks([Benchmark("rte")]).run(tiny, tiny)
    (tmp_path / "bad.jsonl").write_text('{"text": "w1", "label": 7}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:1: label is 7"):
        Benchmarks([Benchmark("sst", str(tmp_path / "bad.jsonl"))]).run(tiny, tiny)


def test_bbh_has_a_metric_for_each_task(evaluation_data, tiny, tmp_path) -> None:
    rows = read_rows(str(evaluation_data / "bbh_all.jsonl.gz"))
    tasks = Counter(row.fields["task"] for row in rows)
    assert len(tasks) == 27
    first = {row.fields["task"]: row.fields for row in rows}.values()
    (tmp_path / "bbh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in first))
    result = Benchmarks([Benchmark("bbh", str(tmp_path / "bbh.jsonl"))]).run(tiny, tiny)
    assert len(result.metrics) == 28 and result.num_rows == 27


RTE, WSC_TARGET = {"premise": "p", "hypothesis": "h"}, {"span1_text": "cat", "span2_text": "it", "span2_index": 2}
ANSWERED = {"question": "q", "answers": [{"text": "a"}]}


def article(**question: Any) -> dict[str, Any]:
    return {"data": [{"title": "T", "paragraphs": [{"context": "c", "qas": [{**ANSWERED, **question}]}]}]}


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (readers.rte, {**RTE, "label": "n/a"}, ":1: label is n/a; it must be one of entailment, 0, not_ent"),
        (readers.rte, {**RTE, "label": -1}, ":1: label is -1"),
        (readers.rte, {**RTE, "label": float("nan")}, ":1: the row has no 'label'"),
        (readers.rte, {**RTE, "label": 0, "premise": 3}, ":1: 'premise' must be text, got '3'"),
        (readers.sentiment, {"text": "a", "label": 1.7}, ":1: label is 1.7; it must be one of 0, 1"),
        (readers.sentiment, {"text": "a", "label": "positive"}, ":1: label is positive"),
        (readers.sentiment, {"text": float("nan"), "label": 1}, ":1: the row has no 'text' or 'sentence'"),
        (readers.hellaswag, {"ctx": "c", "endings": "ab", "label": 0}, ":1: 'endings' must be a list of str, got 'ab'"),
        (readers.hellaswag, {"ctx": "c", "endings": ["a", "b"], "label": 2}, ":1: label is 2; it must be one of 0, 1"),
        (readers.hellaswag, {"ctx": "c", "endings": ["a", "b"], "label": ""}, ":1: label is ;"),
        (readers.wsc, {"text": "a b it", "target": "it", "label": True}, ":1, target: the row has no 'span2_text'"),
        (
            readers.wsc,
            {"text": "a b", "target": WSC_TARGET, "label": True},
            ":1, target: span2_index is 2; it must be one of 0, 1",
        ),
        (readers.wsc, {"text": "a b it", "target": WSC_TARGET, "label": "?"}, ":1: label is ?"),
        (readers.bbh, {"task": "t", "input": "i", "target": ["a"]}, ":1: 'target' must be a text or a number"),
        (readers.summaries, {"post": "a", "summary": 5}, ":1: 'highlights' or 'summary' or 'label' must be text"),
        (readers.translation, {"translation": "a"}, ":1: the row has no 'fr' or 'french'"),
        (readers.squad, {"data": 5}, ": 'data' must be a list of dict"),
        (readers.squad, ["data"], ": not in the format of SQuAD"),
        (readers.squad, article(question=None), ", article 1, paragraph 1, question 1: the row has no 'question'"),
        (readers.squad, article(answers=[{"text": 5}]), ", article 1, paragraph 1, question 1, answer 1: 'text'"),
        (readers.quac, article(answers=[]), ", article 1, paragraph 1, question 1: a question needs an answer"),
        (readers.quac, article(orig_answer="a"), ", question 1, orig_answer: the row has no 'text'"),
        (
            readers.drop,
            {"p": {"passage": "x", "qa_pairs": [{"question": "q", "answer": {}}]}},
            ", passage 'p', question 1",
        ),
        (readers.drop, {"p": []}, ": not in DROP's format"),
    ],
)
def test_data_of_another_kind_is_one_line_with_the_row(tmp_path, read, content, message) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(content))
    if read not in (readers.squad, readers.quac, readers.drop):
        message = message.replace(":1", ".json row 1", 1)
        (tmp_path / "rows.json").write_text(json.dumps([content]))
    with pytest.raises(UserError) as caught:
        read(str(tmp_path / "rows.json"))
    assert message in str(caught.value) and str(caught.value).startswith("rows.json") and "\n" not in str(caught.value)


def test_labels_of_a_table_with_missing_values_are_whole_numbers(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 1.0}\n{"sentence": "b", "text": NaN, "label": "0"}\n')
    assert [(doc["text"], doc["gold"]) for doc in readers.sentiment(str(tmp_path / "rows.jsonl"))["test"]] == [
        ("a", 1),
        ("b", 0),
    ]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("length_constraints:number_words", {"relation": "at least", "num_words": "many"}, "num_words .* whole number"),
        ("length_constraints:number_words", {"relation": "at least", "num_words": float("nan")}, "num_words of"),
        ("length_constraints:number_words", {"relation": "at most", "num_words": 3}, "relation of .* 'less than' or"),
        ("keywords:existence", {"keywords": "word"}, "keywords of .* a list of texts"),
        ("startend:end_checker", {}, "end_phrase of startend:end_checker must be a text, got 'None'"),
        ("no:such", {}, "unknown constraint 'no:such'"),
    ],
)
def test_constraints_that_cannot_be_checked_are_refused_before_a_model_runs(tmp_path, name, settings, message) -> None:
    row = {"prompt": "p", "instruction_id_list": [name], "kwargs": [settings]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"^rows\.jsonl:1: {message}"):
        Benchmarks([Benchmark("ifeval", str(tmp_path / "rows.jsonl"))]).check([])


def test_every_setting_that_a_constraint_reads_is_checked() -> None:
    class Reads(dict):
        def __missing__(self, name: str) -> Any:
            number = "num" in name or "nth" in name or "frequency" in name
            return self.setdefault(name, 1 if number else ["w"] if "words" in name else "at least")

    for name, check in CONSTRAINTS.items():
        settings = Reads()
        check("W w. W", settings)
        assert set(settings) <= {*REQUIRED_SETTINGS.get(name, ()), "section_splitter"}, name


OWN_TASK = """
task: own
custom_dataset: !function lit_rlhf.evaluation.tasks.readers.sentiment
dataset_kwargs: {}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["w1"], max_gen_toks: 3, do_sample: false}
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: nothing, filter: [{function: regex, regex_pattern: "(none)"}, {function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: bleu, aggregation: bleu, higher_is_better: true}
"""


def test_each_filter_of_a_task_has_its_own_metrics(tmp_path, tiny) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "w{n} w3", "label": 0}}\n' for n in range(4)))
    (tmp_path / "own.yaml").write_text(OWN_TASK)
    result = Benchmarks([Benchmark("own", str(tmp_path / "rows.jsonl"))], include=str(tmp_path)).run(tiny, tiny)
    assert {name: metric.count for name, metric in result.metrics.items()} == {
        f"own, {name}: {metric}": 4 for name in ("whole", "nothing") for metric in ("exact_match", "bleu")
    }
    assert (result.num_rows, len(result.samples)) == (4, 4)


def test_only_metrics_that_are_means_are_averaged_over_rows() -> None:
    rows = [{"metrics": ["ppl", "error", "odd"], "doc": {}, "ppl": -3.0, "error": n, "odd": n} for n in (0, 1)]
    task = SimpleNamespace(
        aggregation=lambda: {"ppl": get_aggregation("perplexity"), "error": get_aggregation("mean")},
        higher_is_better=lambda: {"ppl": False, "error": False},
    )
    found = compute_task_metrics("own", rows, {"ppl": 20.1, "error": 0.5, "odd": 0.5}, task)
    assert (found["own: ppl"].value, found["own: ppl"].better, found["own: ppl"].unit) == (20.1, "lower", "points")
    assert (found["own: error"].value, found["own: error"].better, found["own: error"].unit) == (0.5, "lower", "share")
    assert (found["own: odd"].better, found["own: error"].low is None) == ("higher", False)


def test_a_group_is_refused_before_any_model_is_loaded(tmp_path, tiny) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "w1", "label": 0}\n')
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(OWN_TASK.replace("task: own", f"task: {name}"))
    (tmp_path / "both.yaml").write_text("group: both\ntask: [one, two]\n")
    suite = Benchmarks([Benchmark("both", str(tmp_path / "rows.jsonl"))], include=str(tmp_path))
    with pytest.raises(UserError, match="tasks: 'both' is a group; name its tasks, each a benchmark: one, two"):
        suite.check([tiny])
