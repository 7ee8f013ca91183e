"""A command at a terminal of some width: what it writes, and what a person sees."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

CONTROL = re.compile(r"\x1b\[(\d*)([A-Za-z])")


class Recording(NamedTuple):
    """A command at a terminal."""

    code: int
    text: str  # as written, control characters included
    lines: list[str]  # that are left on the screen and above it
    wrapped: list[str]  # of these, every one that was wider than the terminal
    frames: list[str]  # every line that a carriage return has overwritten


def record(
    *words: str, columns: int, folder: Path, environment: Mapping[str, str] | None = None, answers: str = ""
) -> Recording:
    """Run `lit-rlhf` at a terminal.

    Args:
        words: its arguments.
        columns: of the terminal.
        folder: the working directory.
        environment: in addition to this process's.
        answers: what a person types, line by line.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    settings = termios.tcgetattr(theirs)
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    root = str(Path(__file__).parents[2])
    variables |= {"PYTHONPATH": root, "TERM": "xterm", "CUDA_VISIBLE_DEVICES": ""}
    variables |= {"OMP_WAIT_POLICY": "passive", **(environment or {})}  # a busy machine prints one line more
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_rlhf", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env=variables,
    )
    os.close(theirs)
    os.write(ours, answers.encode())
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    text = written.decode(errors="replace")
    return Recording(process.wait(), text, *draw(text, columns))


def draw(text: str, columns: int) -> tuple[list[str], list[str], list[str]]:
    """Return the lines that a terminal shows after a text, those that it had to wrap, and those overwritten."""
    lines, wrapped, frames = [""], set[int](), []
    row = column = 0
    position = 0
    while position < len(text):
        control = CONTROL.match(text, position)
        if control is not None:
            position = control.end()
            if control[2] == "K":
                frames.append(lines[row])
                lines[row] = lines[row][:column]
            elif control[2] == "A":
                row = max(row - int(control[1] or 1), 0)
            continue
        character = text[position]
        position += 1
        if character == "\r":
            if lines[row].strip():
                frames.append(lines[row].rstrip())
            column = 0
        elif character == "\n":
            row, column = row + 1, column
        else:
            if column == columns:
                wrapped.add(row)
                row, column = row + 1, 0
            if row == len(lines):
                lines.append("")
            line = lines[row].ljust(column)
            lines[row] = line[:column] + character + line[column + 1 :]
            column += 1
        while row >= len(lines):
            lines.append("")
    return [line.rstrip() for line in lines], [lines[row] for row in sorted(wrapped)], frames


if __name__ == "__main__":  # python -m tests.helpers.terminal COLUMNS ARGUMENTS: look at a command's output
    start = time.perf_counter()
    recording = record(*sys.argv[2:], columns=int(sys.argv[1]), folder=Path.cwd())
    print("\n".join(recording.lines))
    print(f"--- {len(recording.lines)} lines, {len(recording.wrapped)} wrapped, {time.perf_counter() - start:.0f} s")
    print("\n".join(dict.fromkeys(recording.frames[:: max(len(recording.frames) // 40, 1)])))
