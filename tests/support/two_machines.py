"""Train on two machines, which are two network namespaces here: stopped, killed and resumed.

    python tests/support/two_machines.py [--folder DIR]

The same command is started in both, with its own launch.machine_rank. SIGTERM to the second `moc`
must stop both at one step with a checkpoint; after a resume SIGKILL to the second one's process
must end both soon, each with its own sentence; a second resume trains to the end, and the run must
be equal to one of two processes on one machine. Says so and does nothing where namespaces are not
allowed.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from support.kill_trials import differences, fingerprint, make_model, write_recipe

NAMES, ADDRESSES = ("moc-0", "moc-1"), ("10.77.0.1", "10.77.0.2")
STEPS = 40
SECONDS = 180.0


def ip(command: str) -> None:
    """Run `ip COMMAND`; raises CalledProcessError where it is refused."""
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


@contextlib.contextmanager
def two_namespaces() -> Iterator[None]:
    """Within it there are two network namespaces with a cable between them."""
    try:
        for name in NAMES:
            ip(f"netns add {name}")
        ip(f"link add eth9 netns {NAMES[0]} type veth peer name eth9 netns {NAMES[1]}")
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip(f"-n {name} address add {address}/24 dev eth9")
            ip(f"-n {name} link set eth9 up")
            ip(f"-n {name} link set lo up")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


class Machine:
    """`moc train` on one of the two machines."""

    def __init__(self, rank: int, recipe: Path, *options: str) -> None:
        self.log = recipe.with_name(f"machine-{rank}.log")
        place = {"num_machines": 2, "machine_rank": rank, "main_process_ip": ADDRESSES[0]}
        sets = [f"--set=launch.{key}={value}" for key, value in place.items()]
        words = [sys.executable, "-m", "moc_cli", "train", str(recipe), *sets, *options]
        with self.log.open("w") as log:
            self.moc = psutil.Popen(
                ["ip", "netns", "exec", NAMES[rank], *words],
                env={**os.environ, "GLOO_SOCKET_IFNAME": "eth9", "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )

    def end(self) -> tuple[int, str]:
        """Wait; return the exit code, and the last lines that are no progress."""
        code = self.moc.wait(SECONDS)
        lines = self.log.read_text().splitlines()
        return code, "\n".join(line for line in lines if not line.startswith("train "))


def start(recipe: Path, *options: str) -> list[Machine]:
    """Start both machines."""
    return [Machine(rank, recipe, *options) for rank in (0, 1)]


def wait_for_step(folder: Path, step: int, machines: list[Machine]) -> None:
    """Wait until a step is logged; raises RuntimeError where a machine ends before."""
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or not any(line["step"] >= step for line in steps(metrics)):
        if any(machine.moc.poll() is not None for machine in machines):
            raise RuntimeError(str([machine.end() for machine in machines]))
        time.sleep(0.05)


def steps(metrics: Path) -> list[dict]:
    """The complete lines of metrics."""
    return [json.loads(line) for line in metrics.read_text().splitlines(True) if line[-1] == "\n"]


def check(name: str, machines: list[Machine], codes: list[int], said: list[str]) -> bool:
    """Print how the machines have ended; return whether it is as it should be."""
    began = time.monotonic()
    ends = [machine.end() for machine in machines]
    seconds = time.monotonic() - began
    good = [code for code, _ in ends] == codes and not any("Traceback" in text for _, text in ends)
    good = good and all(words in text for words, (_, text) in zip(said, ends, strict=True))
    print(f"{name}: exit codes {[code for code, _ in ends]} after {seconds:.1f} s: ", end="")
    print("as it should be" if good else f"WRONG\n{ends}", flush=True)
    return good


def main() -> int:
    """Run all of it; return 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        try:
            stack.enter_context(two_namespaces())
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"skipped: no network namespaces here ({error})")
            return 0
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = make_model(folder / "model")
        run, reference = folder / "run", folder / "reference"
        recipe = write_recipe(run, model, STEPS)

        machines = start(recipe, "--set=launch.num_processes=2")
        wait_for_step(run, 4, machines)
        machines[1].moc.send_signal(signal.SIGTERM)
        good = check("SIGTERM on machine 1", machines, [143, 143], ["stopped after step", ""])

        machines = start(recipe, "--set=launch.num_processes=2", "--resume=auto")
        wait_for_step(run, 12, machines)
        psutil.Process(machines[1].moc.pid).children()[0].kill()
        told = ["process 0 of 2 on", "was ended by SIGKILL after step"]
        good &= check("SIGKILL on machine 1", machines, [2, 137], told)

        machines = start(recipe, "--set=launch.num_processes=2", "--resume=auto")
        good &= check("resumed to the end", machines, [0, 0], ["", ""])

        one = ["--set", "launch.num_processes=2"]
        words = [
            sys.executable,
            "-m",
            "moc_cli",
            "train",
            str(write_recipe(reference, model, STEPS)),
        ]
        subprocess.run([*words, *one], check=True, capture_output=True)
        far = differences(fingerprint(reference), fingerprint(run))
        print(f"differs from one machine: {', '.join(far[:4]) or 'nothing'}")
    return 0 if good and not far else 1


if __name__ == "__main__":
    sys.exit(main())
