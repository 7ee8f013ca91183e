"""Conversations: which tokens are learnt, by hand; and templates that would leave out or change what was said."""

import pytest

from lit_rlhf.data import ComparisonDataModule, DemonstrationDataModule, PromptDataModule
from lit_rlhf.data.preprocessing.settings import DemonstrationPreprocessing
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.errors import UserError

ASKS = "{% if add_generation_prompt %}[assistant]{% endif %}"
# a turn ends with EOS and a line; with "|" and a line; with a line alone
EOS_ENDS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>\n{% endfor %}" + ASKS
BAR_ENDS = EOS_ENDS.replace("<eos>", "|")
LINE_ENDS = EOS_ENDS.replace("<eos>", "")
# the oldest kind: no generation prompt, a space before each reply
OLD = (
    "{% for m in messages %}{% if m.role == 'user' %}[I]{{ m.content }}[/I]"
    "{% else %} {{ m.content | trim }} <eos>{% endif %}{% endfor %}"
)
ALWAYS_ASKS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
FORGETS_REPLIES = "{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}"
FORGETS_QUESTIONS = (
    "{% for m in messages[:-1] %}{{ m.content }}\n{% endfor %}"
    "{% if messages[-1].role == 'assistant' %}{{ messages[-1].content }}{% endif %}"
)
# what was thought is left out once the conversation goes on, as reasoning models have it
FORGETS_THOUGHTS = EOS_ENDS.replace("m.content", "(m.content.split('/')[-1] if not loop.last else m.content)")
TURNS = ["hi", "ho", "and", "so", "on", "end"]
MESSAGES = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(TURNS)]


def make_decode_batch(attach, tokenizer, path, **settings):
    return attach(DemonstrationDataModule(path, micro_batch_size=1, **settings), tokenizer).training_rows


def learnt(tokenizer, row):
    """The text with what is learnt in angle brackets; "$" is EOS."""
    text, inside = "", False
    for token, target in zip(row.ids, row.targets):
        text += ">" * (inside and not target) + "<" * (target and not inside)
        text += "$" if token == tokenizer.eos_token_id else tokenizer.decode([token])
        inside = target
    return text + ">" * inside


@pytest.mark.parametrize(
    ("chat_template", "every"),
    [
        (EOS_ENDS, "[user]hi$\n[assistant]<ho$>\n[user]and$\n[assistant]<so$>\n[user]on$\n[assistant]<end$>"),
        (BAR_ENDS, "[user]hi|\n[assistant]<ho|>\n[user]and|\n[assistant]<so|>\n[user]on|\n[assistant]<end|$>"),
        (LINE_ENDS, "[user]hi\n[assistant]<ho>\n[user]and\n[assistant]<so>\n[user]on\n[assistant]<end$>"),
        (OLD, "[I]hi[/I] <ho $>[I]and[/I] <so $>[I]on[/I]<end$>"),
        (ALWAYS_ASKS, "user: hi\nassistant: <ho>\nuser: and\nassistant: <so>\nuser: on\nassistant: <end$>"),
        (
            None,
            "### Instruction:\nhi\n\n### Response:\n<ho>\n\n### Instruction:\nand\n\n### Response:\n<so>\n\n"
            "### Instruction:\non\n\n### Response:\n<end$>",
        ),
    ],
)
def test_every_reply_and_its_end_are_learnt(attach, write, tokenizer, chat_template, every):
    tokenizer.chat_template = chat_template
    path = write([{"messages": MESSAGES}])
    (row,) = make_decode_batch(attach, tokenizer, path)
    assert learnt(tokenizer, row) == every
    (last,) = make_decode_batch(
        attach, tokenizer, path, preparation=DemonstrationPreprocessing(train_on_replies="last")
    )
    start = every.rindex("<")
    assert learnt(tokenizer, last) == every[:start].replace("<", "").replace(">", "") + every[start:]
    asked = attach(PromptDataModule(path), tokenizer).prompts.prompts[0].ids
    assert row.ids[: len(asked)] == last.ids[: len(asked)] == asked


def test_a_chat_template_from_the_recipe(attach, write, tokenizer):
    path = write([{"messages": MESSAGES[:4]}])
    (row,) = make_decode_batch(attach, tokenizer, path, template=BAR_ENDS)
    assert learnt(tokenizer, row) == "[user]hi|\n[assistant]<ho|>\n[user]and|\n[assistant]<so|$>"
    template = PromptTemplate(tokenizer, "{{ bos_token }}" + EOS_ENDS)
    assert template.render("q") == "<bos>[user]q<eos>\n[assistant]"


def test_a_reply_ends_alike_in_demonstrations_and_comparisons(attach, write, tokenizer):
    tokenizer.chat_template = BAR_ENDS
    asked = [{"role": "user", "content": "q"}]
    path = write([{"prompt": asked, "chosen": "good", "rejected": "bad", "completion": "good"}])
    (row,) = attach(ComparisonDataModule(path, micro_batch_size=1), tokenizer).training_rows
    (demonstration,) = make_decode_batch(attach, tokenizer, path)
    assert demonstration.ids == row.prompt + row.completions[0]
    assert learnt(tokenizer, demonstration) == "[user]q|\n[assistant]<good|$>"
    # text as it is knows of no turns
    (plain,) = make_decode_batch(attach, tokenizer, write([{"prompt": "q ", "completion": "c"}], "plain.jsonl"))
    assert learnt(tokenizer, plain) == "q <c$>"


def test_a_prompt_cut_to_its_end_keeps_what_is_learnt(attach, write, bos_tokenizer):
    bos_tokenizer.chat_template = EOS_ENDS
    path = write([{"messages": MESSAGES}])
    whole = "<bos>[user]hi$\n[assistant]<ho$>\n[user]and$\n[assistant]<so$>\n[user]on$\n[assistant]<end$>"
    (row,) = make_decode_batch(attach, bos_tokenizer, path)
    assert learnt(bos_tokenizer, row) == whole
    (cut,) = make_decode_batch(attach, bos_tokenizer, path, max_prompt_length=26, overlong_prompts="truncate")
    assert learnt(bos_tokenizer, cut) == "<bos><so$>\n[user]on$\n[assistant]<end$>"
    assert len(cut.ids) == 26 + 4


def test_a_reply_that_the_template_changes_is_not_learnt_and_counted(attach, write, tokenizer, caplog):
    tokenizer.chat_template = FORGETS_THOUGHTS
    turns = [{"role": each["role"], "content": each["content"]} for each in MESSAGES[:4]]
    turns[1]["content"] = "thought/ho"
    with caplog.at_level("INFO"):
        (row,) = make_decode_batch(attach, tokenizer, write([{"messages": turns}]))
    assert learnt(tokenizer, row) == "[user]hi$\n[assistant]ho$\n[user]and$\n[assistant]<so$>"
    assert "an earlier reply is not learnt: the template changes what was said  1  first: rows.jsonl:1" in caplog.text


def test_templates_that_leave_out_the_last_turn_are_refused(attach, write, tokenizer):
    path = write([{"messages": MESSAGES[:2]}])
    tokenizer.chat_template = FORGETS_REPLIES
    with pytest.raises(UserError, match="template: the chat template leaves out the last turn where that is a reply"):
        make_decode_batch(attach, tokenizer, path)
    tokenizer.chat_template = FORGETS_QUESTIONS
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: the chat template leaves out the last turn, which begins 'hi'"
    ):
        make_decode_batch(attach, tokenizer, path)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the chat template leaves out the last turn"):
        attach(PromptDataModule(path), tokenizer)


def test_the_real_tokenizer_finds_every_reply(gpt2, shared, attach, write):
    """Words that a byte-pair tokenizer would join across turns: prompts stay what they are when asked alone."""
    turns = [
        {"role": "user", "content": "Say it."},
        {"role": "assistant", "content": "It"},
        {"role": "user", "content": "Again!"},
        {"role": "assistant", "content": "It, again."},
    ]
    path = write([{"messages": turns}])
    (row,) = attach(DemonstrationDataModule(path, micro_batch_size=1), gpt2).training_rows
    said = gpt2.decode([token for token, target in zip(row.ids, row.targets) if target])
    assert said == "ItIt, again.<|endoftext|>"
    asked = attach(PromptDataModule(write([{"messages": turns[:1]}], "first.jsonl")), gpt2).prompts.prompts[0].ids
    first = row.targets.index(True)
    assert row.ids[:first] == asked
