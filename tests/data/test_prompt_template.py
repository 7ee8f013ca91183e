"""From prompts to token ids: templates, the begin-of-text token, and the length policy."""

import pytest

from lit_rlhf.data.prompt_template import PromptTemplate, find_bos_ids
from lit_rlhf.data.records import Instruction
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.truncation import TruncationPolicy
from lit_rlhf.errors import UserError

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "v"},
]


@pytest.mark.parametrize(
    ("template", "prompt", "text"),
    [
        (None, "as it is ", "as it is "),
        (None, Instruction("do", "it"), "### Instruction:\ndo\n\n### Input:\nit\n\n### Response:\n"),
        (None, Instruction("do"), "### Instruction:\ndo\n\n### Response:\n"),
        (None, TURNS, "s\n\n### Instruction:\nu\n\n### Response:\na\n\n### Instruction:\nv\n\n### Response:\n"),
        ("instruction", "do", "### Instruction:\ndo\n\n### Response:\n"),
        ("plain", Instruction("do", "it"), "do\n\nit"),
        ("plain", TURNS[1:], "u\n\na\n\nv"),
        ("Q: {{ prompt }}\nA:", "why", "Q: why\nA:"),
        ("{{ instruction }}|{{ input }}|{{ topic }}\n", Instruction("do", "it"), "do|it|t\n"),
        ("{% for m in messages %}{{ m.content }}.{% endfor %}", TURNS, "s.u.a.v."),
    ],
)
def test_templates_without_a_chat_template(tokenizer, template, prompt, text):
    assert PromptTemplate(tokenizer, template).render(prompt, {"topic": "t"}) == text


def test_chat_template(tokenizer):
    tokenizer.chat_template = CHAT
    by_kind = PromptTemplate(tokenizer)
    assert by_kind.render("as it is") == "as it is"
    assert by_kind.render(Instruction("do", "it")) == "<bos>[user]do\n\nit[assistant]"
    assert by_kind.render(TURNS) == "<bos>[system]s[user]u[assistant]a[user]v[assistant]"
    assert PromptTemplate(tokenizer, "chat").render("text") == "<bos>[user]text[assistant]"
    assert PromptTemplate(tokenizer, "instruction").render("do") == "### Instruction:\ndo\n\n### Response:\n"


def test_bos_comes_once(tokenizer, bos_tokenizer):
    assert find_bos_ids(tokenizer) == [] and find_bos_ids(bos_tokenizer) == [2]
    plain = PromptTemplate(tokenizer).encode(["ab"])[0]
    assert PromptTemplate(bos_tokenizer).encode(["ab", "<bos>ab"]) == [[2, *plain], [2, *plain]]
    assert PromptTemplate(tokenizer).encode([]) == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("chat", "template: 'chat' needs a tokenizer with a chat template, this one has none"),
        ("instructions", r"template: 'instructions' names no template .* \(did you mean 'instruction'\?\)"),
        ("zzz", "known are plain, instruction, chat"),
        ("a\n{{ prompt", "template: line 2 does not parse as jinja"),
    ],
)
def test_bad_templates(tokenizer, template, message):
    with pytest.raises(UserError, match=message):
        PromptTemplate(tokenizer, template)


def test_templates_that_fail_on_a_row(tokenizer):
    with pytest.raises(UserError, match=r"rows\.jsonl:4: the setting template fails on this row: 'topic' is undefined"):
        PromptTemplate(tokenizer, "{{ topic }}").render("p", {}, "rows.jsonl:4")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"rows\.jsonl:4: the tokenizer's chat template refuses .*roles must alternate"):
        PromptTemplate(tokenizer).render(TURNS, {}, "rows.jsonl:4")


def test_long_prompts_are_dropped_or_truncated_and_counted():
    report = DatasetReport("rows")
    assert TruncationPolicy(3).fit_prompt([5, 6, 7], [], "rows:1", report) == [5, 6, 7]
    assert TruncationPolicy(2).fit_prompt([5, 6, 7], [], "rows:2", report) is None
    assert TruncationPolicy(2, overlong_prompts="truncate").fit_prompt([5, 6, 7], [], "rows:3", report) == [6, 7]
    assert TruncationPolicy(2, overlong_prompts="truncate").fit_prompt([2, 5, 6, 7], [2], "rows:4", report) == [2, 7]
    assert TruncationPolicy(1, overlong_prompts="truncate").fit_prompt([2, 5, 6, 7], [2], "rows:4", report) == [2]
    assert TruncationPolicy(2).fit_prompt([], [], "rows:5", report) is None
    assert report.skipped == {"prompt longer than 2 tokens": 1, "prompt without a token": 1}
    assert report.flagged == {"prompt truncated to its last 2 tokens": 2, "prompt truncated to its last 1 tokens": 1}


def test_completions_end_with_eos_unless_cut():
    report = DatasetReport("rows")
    policy = TruncationPolicy(9, max_completion_length=3)
    assert policy.fit_completion([5, 6], 1, "rows:1", report) == [5, 6, 1]
    assert policy.fit_completion([5, 6, 1], 1, "rows:2", report) == [5, 6, 1]  # not doubled
    assert report.flagged == {}
    assert policy.fit_completion([5, 6, 7], 1, "rows:3", report) == [5, 6, 7]
    assert policy.fit_completion([5, 1, 7], 1, "rows:4", report) == [5, 1, 7]
    assert report.flagged == {"completion cut to 3 tokens": 2, "completion spells the EOS token before its end": 1}


def test_bad_limits():
    with pytest.raises(UserError, match="max_completion_length: 0 must be at least 1"):
        TruncationPolicy(4, 0).validated()


def test_report_is_an_aligned_table():
    report = DatasetReport("rows.json")
    report.num_read = 1100
    for number in range(6):
        report.skip("chosen equals rejected", f"rows.json row {number + 5}")
    report.flag("completion cut to 9 tokens", "rows.json row 1")
    report.add_line("end")
    assert report.format_table() == (
        "rows.json\n"
        "rows read                               1,100\n"
        "  skipped: chosen equals rejected           6  first: rows.json row 5\n"
        "rows kept                               1,094\n"
        "  of these: completion cut to 9 tokens      1  first: rows.json row 1\n"
        "end"
    )
    assert report.format_summary() == "rows read 1,100 · kept 1,094 · 6 chosen equals rejected"
