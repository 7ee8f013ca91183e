"""docs/feedback.md: the loop from a model to labels to a reward model to PPO, with a scripted labeler in a browser."""

import html
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_rlhf.cli import main
from lit_rlhf.data import ComparisonDataModule
from lit_rlhf.labeling import serving
from lit_rlhf.labeling.database import Database
from lit_rlhf.labeling.exports import export_answers
from lit_rlhf.labeling.server import LabelSettings, create_label_app
from lit_rlhf.labeling.tasks import read_tasks
from lit_rlhf.modules import RewardModule
from lit_rlhf.synthetic import responses
from lit_rlhf.synthetic.labelers import Response, build_training_labelers, rank_responses
from lit_rlhf.synthetic.rankings import make_ranking_row
from lit_rlhf.synthetic.tasks import sample_prompt
from lit_rlhf.synthetic.tokenizer import build_tokenizer
from tests.helpers.browser import BROWSER, Chromium
from tests.helpers.pages import ROOT, commands
from tests.helpers.small_runs import full_weights, largest_change, quiet_trainer, write_rows
from tests.labeling.conftest import Browser

PAGE = ROOT / "docs" / "feedback.md"
PROMPTS = 8
SMALL = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.max_epochs=1"]
OWN = {
    "label": ["--max-new-tokens", "6"],
    "reward": [*SMALL, "--data.validation_fraction=0.0", "--data.micro_batch_size=2", "--trainer.callbacks=[]"],
    "ppo": [
        *SMALL,
        "--model.sampling.max_new_tokens=4",
        "--model.ppo.rollout_batch_size=4",
        "--model.ppo.micro_batch_size=2",
        "--trainer.callbacks=[]",
    ],
}
EXPORT = "--trainer.callbacks+=lit_rlhf.callbacks.ExportModel"

# a person who likes w3: more of it is better
RANK = """(() => {
  const texts = [...document.querySelectorAll(".card .text")].map(e => e.textContent);
  const counts = texts.map(text => text.split(/\\s+/).filter(w => w === "w3").length);
  const order = [...new Set(counts)].sort((a, b) => b - a);
  counts.forEach((count, place) =>
    document.querySelector(`input[name=rank-${place}][value="${order.indexOf(count) + 1}"]`).click());
})()"""


@pytest.fixture
def labeled(tmp_path: Path) -> Callable[..., None]:
    """In place of serving until interrupted: serve until a scripted labeler has ranked everything."""

    def serve(app: Any, listener: Any) -> None:
        import uvicorn

        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        browser = Chromium(tmp_path / "profile")
        try:
            tab = browser.open_tab(1000)
            tab.open(address)
            while tab.evaluate("Boolean(document.getElementById('task-form'))"):
                tab.evaluate(RANK)
                with tab.next_page():
                    tab.press("Enter")
            assert "All done" in tab.evaluate("document.body.innerText") and tab.console() == []
        finally:
            browser.close()
            server.should_exit = True
            thread.join(10)

    return serve


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt-get install chromium")
def test_the_loop_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: str, labeled: Callable[..., None]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serving, "serve", labeled)
    (tmp_path / "runs/small/sft").mkdir(parents=True)
    (tmp_path / "runs/small/sft/model").symlink_to(llama)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"w{n} w3 w{n + 2}"} for n in range(PROMPTS)])
    loop = [line.split() for line in commands(PAGE)[1:5]]
    assert [words[1] for words in loop] == ["label", "label", "fit", "fit"]
    label, export, reward, ppo = (words[1:] for words in loop)
    assert main([*label, *OWN["label"]]) == 0
    answers = Database("runs/labels.db").list_answers()
    assert 1 <= len(answers) <= PROMPTS
    assert main(export) == 0
    rows = [json.loads(line) for line in Path("rankings.jsonl").read_text().splitlines()]
    for row in rows:
        counts = [text.split().count("w3") for text in row["completions"]]
        order = sorted(set(counts), reverse=True)
        assert row["ranks"] == [order.index(count) for count in counts] and row["labeler"] == "labeler"
    # the tiny model writes w3 rarely: enough rankings that differ are needed to train on
    more = [{"prompt": f"w{n}", "completions": ["w3 w1", "w2 w1", "w4"], "ranks": [0, 1, 1]} for n in range(6)]
    with Path("rankings.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in more))
    assert main([*reward, *OWN["reward"], EXPORT]) == 0
    assert (tmp_path / "runs/small/reward/model/config.json").exists()
    assert main([*ppo, *OWN["ppo"], EXPORT]) == 0
    assert (tmp_path / "runs/small/ppo/model/config.json").exists()


WRITERS = (
    responses.write_good_response,
    responses.write_false_response,
    responses.write_incomplete_response,
    responses.write_lazy_response,
    responses.write_rude_response,
    responses.write_rambling_response,
)


@pytest.fixture
def world_model(tmp_path: Path) -> str:
    """A small language model with the words of the synthetic world."""
    torch.manual_seed(0)
    tokenizer, folder = build_tokenizer(), str(tmp_path / "world_model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_page_gives_the_reward_model_what_the_file_gives(tmp_path: Path, world_model: str):
    """The synthetic world's labelers rank on the page: the reward model is that of their rankings, bit for bit."""
    random, labelers = Random("page"), build_training_labelers(0)
    prompts = {prompt.text: prompt for prompt in (sample_prompt(random) for _ in range(40))}
    rows = [
        make_ranking_row(
            prompt,
            [Response(write(random, prompt)) for write in random.sample(WRITERS, random.randint(4, 6))],
            random.choice(labelers),
        )
        for prompt in prompts.values()
    ]
    path = write_rows(tmp_path / "file.jsonl", rows)
    unranked = [{name: row[name] for name in ("prompt", "completions")} for row in rows]
    file = read_tasks(write_rows(tmp_path / "tasks.jsonl", unranked))
    database = Database(tmp_path / "labels.db")
    database.add_tasks("rank", file.tasks, [1] * len(file.tasks))
    only = database.add_labeler("ann")
    browser = Browser(create_label_app(database, LabelSettings("rank", "", only, ("127.0.0.1",))))
    judge_of = {row["prompt"]: next(each for each in labelers if each.name == row["labeler"]) for row in rows}
    browser.open()
    while "All done" not in browser.page:
        prompt, *texts = map(
            html.unescape, re.findall(r'<pre class="text" dir="auto">\n(.*?)</pre>', browser.page, re.S)
        )
        ranks = rank_responses(judge_of[prompt], prompts[prompt], [(text, True) for text in texts])
        browser.send(action="submit", **{f"rank-{place}": str(rank + 1) for place, rank in enumerate(ranks)})
        assert browser.status == 200
    export_answers(database, tmp_path / "page.jsonl")
    exported = [json.loads(line) for line in (tmp_path / "page.jsonl").read_text().splitlines()]
    names = ("prompt", "completions", "ranks")
    assert [[row[name] for name in names] for row in exported] == [[row[name] for name in names] for row in rows]
    before, *after = (
        train(world_model, source, tmp_path, epochs)
        for source, epochs in ((path, 0), (path, 1), (str(tmp_path / "page.jsonl"), 1))
    )
    assert largest_change(before, after[0]) > 1e-2
    assert all(torch.equal(one, other) for one, other in zip(*after, strict=True))


def train(model: str, path: str, folder: Path, epochs: int) -> list[torch.Tensor]:
    module = RewardModule(model, lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    data = ComparisonDataModule(path, micro_batch_size=8)
    quiet_trainer(folder, max_epochs=epochs).fit(module, datamodule=data)
    return full_weights(module)
