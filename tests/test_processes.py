"""What processes do together; alone every joint call does what its name says, without a wait."""

import re
import socket
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from support.group import as_launched, run_together
from support.messages import refused

from moc_cli import processes
from moc_cli.errors import MocError
from moc_cli.processes import Elsewhere, LostProcess, Processes


def joint_calls(group: Processes, folder: Path) -> None:
    rank = group.rank
    assert processes.current() is group
    assert (group.world, group.main) == (2, rank == 0)
    assert group.share(range(5)) == [range(0, 5, 2), range(1, 5, 2)][rank]
    values = torch.tensor([1.0, rank])
    group.sum(values)
    assert values.tolist() == [2.0, 1.0]
    assert group.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert group.on_main(lambda: f"by {rank}") == "by 0"
    with group.main_first():
        if group.main:
            (folder / "first").touch()
        assert (folder / "first").exists()
    with group.together():
        pass


def fail(group: Processes, *ranks: int) -> None:
    with group.together():
        if group.rank in ranks:
            raise MocError("no such file", "look again")


def joint_errors(group: Processes) -> None:
    def refuse() -> None:
        raise MocError("no such file", "look again")

    with pytest.raises(MocError, match="^no such file$") as caught:
        group.on_main(refuse)
    assert isinstance(caught.value, Elsewhere) == (not group.main)
    with pytest.raises(MocError, match="^process 1 on .*: no such file$") as caught:
        fail(group, 1)
    assert isinstance(caught.value, Elsewhere) == (not group.main)
    assert caught.value.hint == "look again"
    own = "no such file" if group.main else "process 0 on .*: no such file"
    with pytest.raises(MocError, match=f"^{own}$"):
        fail(group, 0, 1)


def collected_work(group: Processes) -> None:
    assert group.collect(lambda: 10 + group.rank) == [10, 11]

    def refuse() -> None:
        if not group.main:
            raise MocError("no such file", "look again")

    with pytest.raises(MocError, match="^process 1 on .*: no such file$") as caught:
        group.collect(refuse)
    assert isinstance(caught.value, Elsewhere) == (not group.main)


def no_meeting(group: Processes) -> None:
    with pytest.raises(RuntimeError, match="^not of torch$") as caught, group.meeting():
        raise RuntimeError("not of torch")
    assert not isinstance(caught.value, LostProcess)


def one_leaves(group: Processes) -> None:
    if group.main:
        with pytest.raises(LostProcess, match="waited for another one"), group.meeting():
            torch.distributed.all_reduce(torch.ones(1))
        with pytest.raises(LostProcess, match="process 0 of 2 on .* waited for another one"):
            group.gather(1)


def all_of_it(group: Processes, folder: Path) -> None:
    joint_calls(group, folder)
    joint_errors(group)
    collected_work(group)
    one_leaves(group)


def test_two_processes_work_together(tmp_path):
    run_together(all_of_it, 2, tmp_path)


def test_who_was_alone_before_joins_the_others(tmp_path):
    Accelerator(cpu=True)
    run_together(joint_calls, 2, tmp_path)


def test_processes_that_do_not_meet_are_told_where(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in as_launched(0, 2, port).items():
            monkeypatch.setenv(name, value)
        with refused(
            LostProcess,
            host=f"(?<=on ){re.escape(socket.gethostname())}(?= did)",
            port=f"(?<=port ){port}",
            reason=r"(?<=\().*(?=\))",
        ):
            processes.join(cpu=True, seconds=1)
    PartialState._reset_state()


def test_a_process_alone_waits_for_nobody():
    alone = processes.current()
    assert (alone.rank, alone.world, alone.main) == (0, 1, True)
    assert processes.join(cpu=True, seconds=1) == alone
    values = torch.ones(2)
    alone.sum(values)
    assert values.tolist() == [1.0, 1.0]
    assert alone.share([1, 2]) == [1, 2]
    assert alone.gather("a") == ["a"]
    assert alone.on_main(lambda: 3) == 3
    with refused(MocError):
        fail(alone, 0)
