"""Entropies in bits against closed forms and a direct float64 sum; the data sets' rows."""

import math

import pytest

from lit_rlhf.data.sources import read_rows
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.suites.bias import (
    PREFIXES,
    CrowSPairs,
    Winogender,
    entropy_bits,
    group_by_template,
    pearson_correlation,
    read_female_fractions,
)
from tests.helpers.float64 import logprob


def test_entropy_in_bits_by_hand() -> None:
    assert entropy_bits([-700.0, -700.0]) == 1.0
    assert entropy_bits([math.log(0.25) - 900, math.log(0.75) - 900]) == pytest.approx(0.8112781244591328, abs=1e-12)
    assert entropy_bits([-1000.0, 0.0]) == 0.0
    assert entropy_bits([-5.0] * 3) == pytest.approx(math.log2(3), abs=1e-12)


def reference_entropy(stories: str, prefix: str, sentences: list[str]) -> float:
    """From float64 log-probabilities, without the code under test."""
    values = [logprob(stories, prefix, sentence)[0] for sentence in sentences]
    total = math.log(sum(math.exp(value - max(values)) for value in values)) + max(values)
    return -sum(math.exp(value - total) * (value - total) / math.log(2) for value in values)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_crows_pairs_on_twenty_rows_in_float64(evaluated_model, stories, evaluation_data, prefix) -> None:
    path = str(evaluation_data / "crows_pairs_anonymized.csv")
    result = CrowSPairs(path, prefixes=[prefix], limit=20).run(evaluated_model, evaluated_model)
    pairs = [[row.fields["sent_more"], row.fields["sent_less"]] for row in read_rows(path)[:20]]
    expected = [reference_entropy(stories, PREFIXES[prefix], pair) for pair in pairs]
    assert result.metrics[prefix].value == pytest.approx(sum(expected) / 20, abs=1e-5)
    if prefix == "basic":
        assert [s["verdict"]["entropy"] for s in result.samples] == pytest.approx(expected, abs=1e-4)
        likelier = [logprob(stories, "", one)[0] > logprob(stories, "", other)[0] for one, other in pairs]
        assert result.metrics["basic, stereotype"].value == sum(likelier) / 20
        assert [s["answer"] for s in result.samples] == [pair[not first] for pair, first in zip(pairs, likelier)]


def test_winogender_on_twenty_rows_in_float64(evaluated_model, stories, evaluation_data) -> None:
    path = str(evaluation_data / "all_sentences.tsv")
    result = Winogender(path, str(evaluation_data / "occupations-stats.tsv"), ["basic"], limit=20).run(
        evaluated_model, evaluated_model
    )
    groups = group_by_template(read_rows(path))[0]
    triples = [[group[gender] for gender in ("male", "female", "neutral")] for group in list(groups.values())[:20]]
    two = [reference_entropy(stories, "", triple[:2]) for triple in triples]
    three = [reference_entropy(stories, "", triple) for triple in triples]
    assert result.metrics["basic"].value == pytest.approx(sum(two) / 20, abs=1e-5)
    assert result.metrics["basic, three ways"].value == pytest.approx(sum(three) / 20, abs=1e-5)
    assert result.metrics["basic"].count == result.metrics["basic, correlation with jobs"].count == 20


def test_every_row_of_the_files_is_used(evaluation_data) -> None:
    rows = read_rows(str(evaluation_data / "all_sentences.tsv"))
    named, someone = group_by_template(rows)
    assert (len(rows), len(named), len(someone)) == (720, 120, 120)
    assert len(read_rows(str(evaluation_data / "templates.tsv"))) == 120
    assert len(read_rows(str(evaluation_data / "occupations-stats.tsv"))) == 60
    assert len(read_rows(str(evaluation_data / "crows_pairs_anonymized.csv"))) == 1508


def test_the_sentences_are_those_of_the_templates(evaluation_data) -> None:
    forms = {
        "male": ("he", "his", "him"),
        "female": ("she", "her", "her"),
        "neutral": ("they", "their", "them"),
    }
    named, _ = group_by_template(read_rows(str(evaluation_data / "all_sentences.tsv")))
    for row in read_rows(str(evaluation_data / "templates.tsv")):
        job, other, answer = (row.fields[key] for key in ("occupation(0)", "other-participant(1)", "answer"))
        for gender, (nominative, possessive, accusative) in forms.items():
            text = row.fields["sentence"].replace("$OCCUPATION", job).replace("$PARTICIPANT", other)
            text = text.replace("$NOM_PRONOUN", nominative).replace("$POSS_PRONOUN", possessive)
            text = text.replace("$ACC_PRONOUN", accusative)
            assert named[job, other, answer][gender].split()[:3] == text.split()[:3]
            assert len(named[job, other, answer][gender].split()) == len(text.split())


def test_correlation_by_hand() -> None:
    assert pearson_correlation([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]) == pytest.approx(1.0)
    assert pearson_correlation([(0.0, 0.0), (1.0, 1.0), (2.0, 0.0)]) == pytest.approx(0.0)
    assert pearson_correlation([(1.0, 0.0), (1.0, 1.0)]) is None


def test_a_malformed_id_and_a_missing_gender_are_reported(tmp_path) -> None:
    path = tmp_path / "sentences.tsv"
    path.write_text("sentid\tsentence\ncook.guest.1.male\tHe cooks.\n")
    with pytest.raises(UserError, match=r"sentences.tsv:2: sentid must be profession\.other"):
        group_by_template(read_rows(str(path)))
    path.write_text("sentid\tsentence\ncook.guest.1.male.txt\tHe cooks.\n")
    with pytest.raises(UserError, match=r"cook\.guest\.1 has the genders \['male'\]"):
        group_by_template(read_rows(str(path)))


@pytest.mark.parametrize("percent", ["n/a", "", "101", "-1", "nan", "inf"])
def test_a_percentage_that_is_none_is_one_line(tmp_path, percent) -> None:
    (tmp_path / "jobs.tsv").write_text(f"occupation\tbls_pct_female\nnurse\t90.4\nclerk\t{percent}\n")
    with pytest.raises(UserError, match=r"^jobs\.tsv:3: bls_pct_female must be a number from 0 to 100, got"):
        read_female_fractions(str(tmp_path / "jobs.tsv"))


def test_a_sentence_given_twice_or_of_one_kind_alone_is_one_line(tmp_path) -> None:
    genders = ("male", "female", "neutral")
    lines = [f"a.{other}.1.{gender}.txt\tx" for other in ("b", "someone") for gender in genders]
    for content, message in (
        ([*lines, lines[0]], r"^s\.tsv:8: sentid 'a\.b\.1\.male\.txt' is given twice"),
        (lines[:3], r"^s\.tsv:2: there must be sentences with 'someone'"),
        (lines[1:], r"^s\.tsv:2: a\.b\.1 has the genders \['female', 'neutral'\]"),
    ):
        (tmp_path / "s.tsv").write_text("sentid\tsentence\n" + "\n".join(content) + "\n")
        with pytest.raises(UserError, match=message):
            group_by_template(read_rows(str(tmp_path / "s.tsv")))
