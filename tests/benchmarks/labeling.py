"""Scripted labelers at one labeling server: answers per second, and how long a page takes."""

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers.scripted_labelers import LabelServer, ScriptedLabeler, work_together

TASKS, PEOPLE = 500, 20


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [
            {"prompt": f"question {n}", "completions": [f"{n} " + "word " * (50 + k) for k in range(4)]}
            for n in range(TASKS)
        ]
        (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names = ",".join(f"p{n}" for n in range(PEOPLE))
        server = LabelServer(["tasks.jsonl", "--db=labels.db", "--overlap=0.2", f"--labelers={names}"], folder)
        labelers = [
            ScriptedLabeler(link, lambda prompt, outputs: [1] * len(outputs))
            for person, link in server.links.items()
            if person != "overview"
        ]
        begin = time.perf_counter()
        work_together(labelers)
        seconds = time.perf_counter() - begin
        server.stop()
    answers = sum(len(each.sent) for each in labelers)
    pages = sorted(value for each in labelers for value in each.page_seconds)
    p50, p95 = (pages[int(share * len(pages))] for share in (0.5, 0.95))
    print(
        f"{answers} answers in {seconds:.1f} s: {answers / seconds:.1f} per second; page: median {1000 * p50:.0f} ms, "
        f"95th percentile {1000 * p95:.0f} ms"
    )


if __name__ == "__main__":
    main()
