"""Threads where others compute: what the command changes, and what it leaves as it is."""

import os
import sys
from pathlib import Path

import pytest

from lit_rlhf import cli
from lit_rlhf.commands.support import busy_machine
from lit_rlhf.commands.support.busy_machine import read_cpu_quota, settle_threads


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a machine with four cores on which nothing else runs."""
    monkeypatch.setattr(busy_machine, "SAMPLE_SECONDS", 0)
    monkeypatch.setattr(busy_machine, "count_cores", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    set_running(tmp_path, 1)
    return tmp_path


def set_running(machine: Path, threads: int) -> None:
    (machine / "proc" / "stat").write_text(f"cpu 1 2 3\nprocs_running {threads}\nprocs_blocked 0\n")


def set_quota(machine: Path, limits: dict[str, str]) -> None:
    (machine / "proc" / "self" / "cgroup").write_text("0::/pod/container\n")
    for group, limit in limits.items():
        folder = machine / "sys" / "fs" / "cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(f"{limit}\n")


def test_a_free_machine_changes_nothing(machine: Path) -> None:
    environment: dict[str, str] = {}
    assert settle_threads(environment, machine) is None
    assert environment == {}


@pytest.mark.parametrize("given, busy", [({}, True), ({"OMP_NUM_THREADS": "1"}, False)])
def test_waiting_changes_where_threads_outnumber_cores(machine: Path, given: dict[str, str], busy: bool) -> None:
    """Two others and four of ours on four cores; with one of ours there is a core for everyone."""
    set_running(machine, 3)
    environment = dict(given)
    line = settle_threads(environment, machine)
    assert line == ("2 other threads on 4 cores: OMP_WAIT_POLICY=passive, the numbers stay the same" if busy else None)
    assert environment == given | ({"OMP_WAIT_POLICY": "passive"} if busy else {})


@pytest.mark.parametrize(
    "limits, quota, threads",
    [
        ({"pod/container": "max 100000"}, None, None),
        ({"pod/container": "150000 100000"}, 1.5, "2"),
        ({"pod/container": "max 100000", "pod": "50000 100000"}, 0.5, "1"),  # of a group around it
        ({"pod/container": "800000 100000"}, 8.0, None),
        ({"pod/container": "nonsense"}, None, None),
    ],
)
def test_a_quota_below_the_cores_sets_the_threads(
    machine: Path, limits: dict[str, str], quota: float | None, threads: str | None
) -> None:
    set_quota(machine, limits)
    environment: dict[str, str] = {}
    line = settle_threads(environment, machine)
    assert read_cpu_quota(machine) == quota and environment.get("OMP_NUM_THREADS") == threads
    said = f"this container may use {quota:g} of 4 cores: OMP_NUM_THREADS={threads}" if threads and quota else None
    assert line == said


def test_the_quota_of_control_groups_of_version_1(machine: Path) -> None:
    (machine / "proc" / "self" / "cgroup").write_text("4:memory:/x\n3:cpu,cpuacct:/docker/a\n")
    folder = machine / "sys" / "fs" / "cgroup" / "cpu"
    folder.mkdir(parents=True)  # in the container, its own group is the top
    (folder / "cpu.cfs_quota_us").write_text("200000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert read_cpu_quota(machine) == 2
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert read_cpu_quota(machine) is None


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "OMP_WAIT_POLICY"])
def test_a_setting_of_the_users_wins(machine: Path, name: str) -> None:
    set_running(machine, 9)
    set_quota(machine, {"pod/container": "100000 100000"})
    environment = {name: "4" if name == "OMP_NUM_THREADS" else "active"}
    before = dict(environment)
    settle_threads(environment, machine)
    assert environment[name] == before[name]
    assert len(environment) == 2  # the other one is settled


def test_a_rank_takes_the_environment_of_its_launcher(machine: Path) -> None:
    set_running(machine, 9)
    environment = {"LOCAL_RANK": "1"}
    assert settle_threads(environment, machine) is None and environment == {"LOCAL_RANK": "1"}


def test_the_load_decides_where_the_system_counts_no_threads(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "proc" / "stat").unlink()
    monkeypatch.setattr(os, "getloadavg", lambda: (3.2, 0.0, 0.0))
    environment: dict[str, str] = {}
    assert settle_threads(environment, machine) is not None and environment == {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize(
    "args, looks", [("fit -c x", 1), ("quickstart --tiny", 1), ("fit --help", 0), ("recipes ls", 0), ("", 0)]
)
def test_only_a_command_that_computes_looks_at_the_machine(
    args: str, looks: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "settle_threads", lambda environment: "what it found")
    monkeypatch.setattr(cli, "main", lambda args: 0)
    monkeypatch.setattr(sys, "argv", ["lit-rlhf", *args.split()])
    with pytest.raises(SystemExit):
        cli.entry()
    assert capsys.readouterr().err == "what it found\n" * looks
