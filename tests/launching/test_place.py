"""Every way in: what becomes of a process that finds a launcher's variables."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from support.messages import refused

from moc_cli.cli import run
from moc_cli.errors import MocError
from moc_cli.launching import together
from moc_cli.launching.place import ProcessRank, find_place, known_place, take_place
from moc_cli.recipe.launch import LaunchSection

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MVAPICH = {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
ONE_HOST = SRUN | {"SLURM_STEP_NUM_NODES": "1"}
SBATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False"}
HALF = ACCELERATE | {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}
SECOND = (2, 1, 1, 2)  # world, rank, local rank, processes on the machine


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        (TORCHRUN, ProcessRank("torchrun or accelerate launch", 4, 3, 1, 2)),
        (OPEN_MPI, ProcessRank("mpirun", *SECOND)),
        (MVAPICH, ProcessRank("mpirun of MVAPICH", *SECOND)),
        (MPICH, ProcessRank("mpirun of MPICH or Intel MPI", *SECOND)),
        (ONE_HOST, ProcessRank("srun", *SECOND)),
        # srun with MPI's own way to meet
        (
            {"PMI_SIZE": "2", "PMI_RANK": "1"} | ONE_HOST,
            ProcessRank("mpirun of MPICH or Intel MPI", *SECOND),
        ),
        # srun has started the launcher
        (TORCHRUN | SRUN, ProcessRank("torchrun or accelerate launch", 4, 3, 1, 2)),
    ],
)
def test_one_of_several_gets_the_variables_of_torchrun(
    environ: dict[str, str], place: ProcessRank
) -> None:
    environ = environ | ({"MASTER_ADDR": "10.0.0.1"} if "RANK" in environ else {})
    assert known_place(environ) == take_place(environ) == place
    assert {name: environ[name] for name in TORCHRUN} == {
        "WORLD_SIZE": str(place.world),
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_world),
    }
    assert environ["MASTER_ADDR"] == ("10.0.0.1" if place.world == 4 else "127.0.0.1")
    assert environ["MASTER_PORT"] == "29500"
    assert find_place(environ) == place  # with the launcher's own name
    assert int(environ["OMP_NUM_THREADS"]) >= 1


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({}, ["starts 2"]),
        (SBATCH, ["starts 2"]),
        (SBATCH | {"SLURM_STEP_NUM_TASKS": "1"}, ["starts 2"]),
        (
            {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
            ["not used: --set launch.num_processes=2; the launcher has started 1 process"],
        ),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, ["not used: --set launch.num_processes=2; the launcher"]),
        (
            ACCELERATE,
            ["not used: --set launch.num_processes=2; the launcher has started 1 process"],
        ),
        (
            {"LOCAL_RANK": "1"},
            ["LOCAL_RANK is set, and WORLD_SIZE is not: this runs as a single process"],
        ),
        (HALF, ["accelerate launch --cpu starts only one process; moc starts several itself"]),
    ],
)
def test_a_process_that_is_alone(
    environ: dict[str, str],
    says: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It starts others, or trains alone where a launcher has started no other."""
    alone = dict(environ)
    assert take_place(alone) is None
    assert alone == environ
    monkeypatch.setattr(together, "os", SimpleNamespace(environ=environ))
    monkeypatch.setattr("moc_cli.launching.start.start", lambda plan, *_, **__: 7)
    code = together.run_together(LaunchSection(device="cpu", num_processes=2), ["train"])
    error = capsys.readouterr().err
    if says == ["starts 2"]:
        assert code == 7
        assert "2 processes (--set launch.num_processes); only one: --set launch.num_proc" in error
    else:
        assert code is None
        assert all(word in error for word in says)


@pytest.mark.parametrize("read", [find_place, take_place])
@pytest.mark.parametrize(
    "environ",
    [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "0"}, {"PMI_SIZE": "2", "PMI_RANK": "0"}],
)
def test_half_of_a_place_is_refused(
    read: Callable[[dict], ProcessRank | None], environ: dict[str, str]
) -> None:
    with refused(MocError):
        read(dict(environ))
    assert known_place(environ) is None


def test_processes_on_several_machines_need_the_address_of_the_first() -> None:
    with refused(MocError):
        take_place(dict(SRUN))
    environ = SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000", "OMP_NUM_THREADS": "3"}
    assert take_place(environ) is not None
    assert (environ["MASTER_PORT"], environ["OMP_NUM_THREADS"]) == ("4000", "3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "--model", "m"], "--num-processes: found 'x'; allowed: auto or a whole number"),
        (["eval", "--model", "m", "--harness", "piqa"], "--num-processes: found 'x'"),
        (["inspect-routing", "r"], "--num-processes: found 'x'"),
    ],
)
def test_a_wrong_number_of_processes_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--num-processes", "x"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["eval", "--model", "m", "--harness", "piqa"], ["inspect-routing", "r", "--text", "t"]],
)
def test_what_runs_in_one_process_refuses_several(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--num-processes", "2"]) == 2
    assert "leave out --num-processes" in capsys.readouterr().err
