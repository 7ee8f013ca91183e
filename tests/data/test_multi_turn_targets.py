"""Conversations: which tokens are targets, by hand; and templates that leave out or change a turn."""

import pytest

from lit_rlhf.data import ComparisonDataModule, DemonstrationDataModule, PromptDataModule
from lit_rlhf.data.preprocessing.settings import DemonstrationPreprocessing
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.errors import UserError

GENERATION_PROMPT = "{% if add_generation_prompt %}[assistant]{% endif %}"
# a turn ends with EOS and a line; with "|" and a line; with a line alone
EOS_ENDS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>\n{% endfor %}" + GENERATION_PROMPT
BAR_ENDS = EOS_ENDS.replace("<eos>", "|")
LINE_ENDS = EOS_ENDS.replace("<eos>", "")
# the oldest kind: no generation prompt, a space before each reply
OLD = (
    "{% for m in messages %}{% if m.role == 'user' %}[I]{{ m.content }}[/I]"
    "{% else %} {{ m.content | trim }} <eos>{% endif %}{% endfor %}"
)
ALWAYS_PROMPTS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
DROPS_REPLIES = "{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}"
DROPS_QUESTIONS = (
    "{% for m in messages[:-1] %}{{ m.content }}\n{% endfor %}"
    "{% if messages[-1].role == 'assistant' %}{{ messages[-1].content }}{% endif %}"
)
# reasoning is left out once another turn follows, as in templates of reasoning models
DROPS_REASONING = EOS_ENDS.replace("m.content", "(m.content.split('/')[-1] if not loop.last else m.content)")
TURNS = ["hi", "ho", "and", "so", "on", "end"]
MESSAGES = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(TURNS)]


def load_training_rows(attach, tokenizer, path, **settings):
    return attach(DemonstrationDataModule(path, micro_batch_size=1, **settings), tokenizer).training_rows


def mark_targets(tokenizer, row):
    """Return the text with its targets in angle brackets; "$" is EOS."""
    text, inside = "", False
    for token, target in zip(row.input_ids, row.loss_mask):
        text += ">" * (inside and not target) + "<" * (target and not inside)
        text += "$" if token == tokenizer.eos_token_id else tokenizer.decode([token])
        inside = target
    return text + ">" * inside


@pytest.mark.parametrize(
    ("chat_template", "expected"),
    [
        (EOS_ENDS, "[user]hi$\n[assistant]<ho$>\n[user]and$\n[assistant]<so$>\n[user]on$\n[assistant]<end$>"),
        (BAR_ENDS, "[user]hi|\n[assistant]<ho|>\n[user]and|\n[assistant]<so|>\n[user]on|\n[assistant]<end|$>"),
        (LINE_ENDS, "[user]hi\n[assistant]<ho>\n[user]and\n[assistant]<so>\n[user]on\n[assistant]<end$>"),
        (OLD, "[I]hi[/I] <ho $>[I]and[/I] <so $>[I]on[/I]<end$>"),
        (ALWAYS_PROMPTS, "user: hi\nassistant: <ho>\nuser: and\nassistant: <so>\nuser: on\nassistant: <end$>"),
        (
            None,
            "### Instruction:\nhi\n\n### Response:\n<ho>\n\n### Instruction:\nand\n\n### Response:\n<so>\n\n"
            "### Instruction:\non\n\n### Response:\n<end$>",
        ),
    ],
)
def test_every_reply_and_its_end_are_targets(attach, write, tokenizer, chat_template, expected):
    tokenizer.chat_template = chat_template
    path = write([{"messages": MESSAGES}])
    (row,) = load_training_rows(attach, tokenizer, path)
    assert mark_targets(tokenizer, row) == expected
    (last,) = load_training_rows(
        attach, tokenizer, path, preprocessing=DemonstrationPreprocessing(train_on_replies="last")
    )
    start = expected.rindex("<")
    assert mark_targets(tokenizer, last) == expected[:start].replace("<", "").replace(">", "") + expected[start:]
    prompt = attach(PromptDataModule(path), tokenizer).prompts.prompts[0].input_ids
    assert row.input_ids[: len(prompt)] == last.input_ids[: len(prompt)] == prompt


def test_a_chat_template_from_the_recipe(attach, write, tokenizer):
    path = write([{"messages": MESSAGES[:4]}])
    (row,) = load_training_rows(attach, tokenizer, path, template=BAR_ENDS)
    assert mark_targets(tokenizer, row) == "[user]hi|\n[assistant]<ho|>\n[user]and|\n[assistant]<so|$>"
    template = PromptTemplate(tokenizer, "{{ bos_token }}" + EOS_ENDS)
    assert template.render("q") == "<bos>[user]q<eos>\n[assistant]"


def test_a_reply_ends_alike_in_demonstrations_and_comparisons(attach, write, tokenizer):
    tokenizer.chat_template = BAR_ENDS
    prompt = [{"role": "user", "content": "q"}]
    path = write([{"prompt": prompt, "chosen": "good", "rejected": "bad", "completion": "good"}])
    (row,) = attach(ComparisonDataModule(path, micro_batch_size=1), tokenizer).training_rows
    (demonstration,) = load_training_rows(attach, tokenizer, path)
    assert demonstration.input_ids == row.prompt + row.completions[0]
    assert mark_targets(tokenizer, demonstration) == "[user]q|\n[assistant]<good|$>"
    # plain text has no turns
    (plain,) = load_training_rows(attach, tokenizer, write([{"prompt": "q ", "completion": "c"}], "plain.jsonl"))
    assert mark_targets(tokenizer, plain) == "q <c$>"


def test_a_prompt_truncated_from_the_left_keeps_its_targets(attach, write, bos_tokenizer):
    bos_tokenizer.chat_template = EOS_ENDS
    path = write([{"messages": MESSAGES}])
    full = "<bos>[user]hi$\n[assistant]<ho$>\n[user]and$\n[assistant]<so$>\n[user]on$\n[assistant]<end$>"
    (row,) = load_training_rows(attach, bos_tokenizer, path)
    assert mark_targets(bos_tokenizer, row) == full
    (truncated,) = load_training_rows(attach, bos_tokenizer, path, max_prompt_length=26, overlong_prompts="truncate")
    assert mark_targets(bos_tokenizer, truncated) == "<bos><so$>\n[user]on$\n[assistant]<end$>"
    assert len(truncated.input_ids) == 26 + 4


def test_a_reply_that_the_template_changes_is_no_target_and_counted(attach, write, tokenizer, caplog):
    tokenizer.chat_template = DROPS_REASONING
    turns = [{"role": each["role"], "content": each["content"]} for each in MESSAGES[:4]]
    turns[1]["content"] = "reasoning/ho"
    with caplog.at_level("INFO"):
        (row,) = load_training_rows(attach, tokenizer, write([{"messages": turns}]))
    assert mark_targets(tokenizer, row) == "[user]hi$\n[assistant]ho$\n[user]and$\n[assistant]<so$>"
    assert "an earlier reply is not trained on: the template changes its text  1  first: rows.jsonl:1" in caplog.text


def test_templates_that_leave_out_the_last_turn_are_refused(attach, write, tokenizer):
    path = write([{"messages": MESSAGES[:2]}])
    tokenizer.chat_template = DROPS_REPLIES
    with pytest.raises(UserError, match="template: the chat template leaves out the last turn where that is a reply"):
        load_training_rows(attach, tokenizer, path)
    tokenizer.chat_template = DROPS_QUESTIONS
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: the chat template leaves out the last turn, which begins 'hi'"
    ):
        load_training_rows(attach, tokenizer, path)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the chat template leaves out the last turn"):
        attach(PromptDataModule(path), tokenizer)


def test_the_real_tokenizer_finds_every_reply(gpt2, shared, attach, write):
    """Text that a byte-pair tokenizer would merge across turns: prompts have the same ids as by themselves."""
    turns = [
        {"role": "user", "content": "Say it."},
        {"role": "assistant", "content": "It"},
        {"role": "user", "content": "Again!"},
        {"role": "assistant", "content": "It, again."},
    ]
    path = write([{"messages": turns}])
    (row,) = attach(DemonstrationDataModule(path, micro_batch_size=1), gpt2).training_rows
    replies = gpt2.decode([token for token, target in zip(row.input_ids, row.loss_mask) if target])
    assert replies == "ItIt, again.<|endoftext|>"
    prompt = (
        attach(PromptDataModule(write([{"messages": turns[:1]}], "first.jsonl")), gpt2).prompts.prompts[0].input_ids
    )
    first = row.loss_mask.index(True)
    assert row.input_ids[:first] == prompt
