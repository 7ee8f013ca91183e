"""From prompts to token ids: templates and the BOS token."""

import pytest

from lit_rlhf.data.prompt_template import PromptTemplate, find_bos_ids
from lit_rlhf.data.records import Instruction
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
    by_default = PromptTemplate(tokenizer)
    assert by_default.render("as it is") == "as it is"
    assert by_default.render(Instruction("do", "it")) == "<bos>[user]do\n\nit[assistant]"
    assert by_default.render(TURNS) == "<bos>[system]s[user]u[assistant]a[user]v[assistant]"
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
