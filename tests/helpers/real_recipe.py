"""A recipe that runs every real evaluation file through its suite.

All rows of every file with the real model: python -m tests.helpers.real_recipe runs/real
"""

import sys
from pathlib import Path
from typing import Any

import yaml


def write_recipe(path: Path, models: dict[str, Any], data: Path, out: Path, limits: dict[str, int | None]) -> Path:
    """Write the recipe; return its path.

    Args:
        path: of the recipe.
        models: name to settings; the first one is the baseline and the judge.
        data: folder of the evaluation files.
        out: folder of the report.
        limits: rows per suite or benchmark, "*" for the others; None for all rows.
    """

    def limit(name: str) -> int | None:
        return limits.get(name, limits.get("*"))

    def suite(name: str, kind: str, file: str, **more: Any) -> dict[str, Any]:
        settings = {"path": str(data / file), "limit": limit(name), **more}
        return {"class_path": f"lit_rlhf.evaluation.{kind}", "init_args": settings}

    def benchmark(task: str, file: str, shots: list[int]) -> dict[str, Any]:
        return {"task": task, "path": str(data / file), "shots": shots, "limit": limit(task)}

    tasks = [
        benchmark("squadv2", "squad2_first8.json.gz", [0]),
        benchmark("hellaswag", "hellaswag.jsonl.gz", [0, 1]),
        benchmark("sst", "sentence_polarity.jsonl.gz", [0, 2]),
        benchmark("fr_en", "tatoeba_eng_fra.txt.gz", [0, 2]),
        benchmark("bbh", "bbh_all.jsonl.gz", [0]),
        benchmark("ifeval", "ifeval.jsonl", [0]),
        benchmark("drop", "rc_fixtures/drop.json", [0]),
        benchmark("quac", "rc_fixtures/dialog_qa_quac_sample.json", [0]),
        benchmark("rte", "rc_fixtures/superglue_rte.jsonl", [0, 1]),
    ]
    first = next(iter(models.values()))["path"]
    prompts = data.parent / "prompts" / "prompt_lottery_en_250_text.jsonl"
    suites = {
        "preference": suite(
            "preference",
            "PairwisePreference",
            str(prompts),
            judges={"model": {"class_path": "lit_rlhf.evaluation.HuggingFaceJudge", "init_args": {"model": first}}},
            max_new_tokens=24,
            temperatures=[1.0],
        ),
        "truthfulness": suite(
            "truthfulness",
            "TruthfulQA",
            "truthfulqa_first400.csv",
            judge={"class_path": "lit_rlhf.evaluation.ReferenceTruthJudge"},
            max_new_tokens=24,
        ),
        "toxicity": suite(
            "toxicity",
            "RealToxicityPrompts",
            "realtoxicityprompts.jsonl.gz",
            scorer={"class_path": "lit_rlhf.evaluation.KeywordToxicity"},
        ),
        "CrowS-Pairs": suite("CrowS-Pairs", "CrowSPairs", "crows_pairs_anonymized.csv"),
        "Winogender": suite(
            "Winogender", "Winogender", "all_sentences.tsv", occupations=str(data / "occupations-stats.tsv")
        ),
        "benchmarks": {"class_path": "lit_rlhf.evaluation.Benchmarks", "init_args": {"tasks": tasks}},
    }
    recipe = {"models": models, "baseline": next(iter(models)), "suites": suites, "out": str(out), "seed": 1}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def run_all_rows(folder: Path) -> int:
    """Convert the real model, write the recipe and run it on all rows; cached results are reused."""
    from lit_rlhf.cli import main
    from tests.helpers.stories import convert

    data = Path(__file__).resolve().parents[3] / "shared" / "data"
    model = str(convert(data / "models" / "stories260K", folder / "stories260K"))
    models = {"stories": {"path": model}}
    recipe = write_recipe(folder / "recipe.yaml", models, data / "evaluation", folder / "evaluate", {"*": None})
    return main(["evaluate", "-c", str(recipe)])


if __name__ == "__main__":
    sys.exit(run_all_rows(Path(sys.argv[1])))
