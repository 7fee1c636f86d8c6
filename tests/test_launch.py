"""Launch scripts: they are sound shell, and print what they would do."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from cgs_jax.training.loop import RESULTS
from configs import acdc
from runs import REPOSITORY

LAUNCH = REPOSITORY / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", REPOSITORY / ".ci" / "run"]


def run(*line):
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True)


def test_shellcheck():
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists() and not (shellcheck := shutil.which("shellcheck")):
        pytest.skip("shellcheck is not installed")
    checked = run(shellcheck, *SCRIPTS)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("create", "tpu-vm create cgs --zone=us-west4-a --accelerator-type=v5litepod-16"),
        ("install", "--worker=all '--command=set -e; mkdir -p cgs_jax && tar xzf"),
        ("run", r"cgs_jax.main --multihost --config configs/acdc.py --config.data.root=/a\ b"),
        ("resume", r"cgs_jax.main --multihost --config configs/acdc.py --config.data.root=/a\ b"),
        ("log", "--worker=0 '--command=tail -n 100 -F cgs_jax/train.log'"),
        ("stop", "--worker=all '--command=pkill -TERM -f [c]gs_jax.main'"),
        ("delete", "tpu-vm delete cgs --zone=us-west4-a --quiet"),
    ],
)
def test_tpu_pod_prints_its_lines(command, line):
    arguments = ["--config", "configs/acdc.py", "--config.data.root=/a b"]
    printed = run("bash", "launch/tpu_pod.sh", "--dry-run", command, *arguments)
    assert printed.returncode == 0, printed.stderr
    assert line in printed.stdout


def test_tpu_workers_may_have_another_python(monkeypatch):
    monkeypatch.setenv("PYTHON", "python3.11")
    printed = run("bash", "launch/tpu_pod.sh", "--dry-run", "install")
    assert "cd cgs_jax && PYTHON=python3.11 source launch/venv.sh -r" in printed.stdout


def test_a_job_of_slurm_is_queued_until_it_is_finished(tmp_path):
    """With stand-ins for the programs of SLURM."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("launch", "cgs_jax"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    for name, does in {
        ".venv/bin/python": f'exec {sys.executable} "$@"',
        "srun": 'echo srun "$@" >> done',
        "scontrol": 'echo scontrol "$@" >> done',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    line = ["bash", "launch/slurm.sbatch", "--workdir", "run", "--config", "configs/acdc.py"]
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    for i in range(3):
        ended = subprocess.run(line, cwd=tmp_path, env=path, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        (tmp_path / "run").mkdir(exist_ok=True)
        for name in RESULTS[: i + 1]:  # the report comes last
            (tmp_path / "run" / name).touch()
    trained, queued, *more = (tmp_path / "done").read_text().splitlines()
    program = "srun --kill-on-bad-exit=1 .venv/bin/python -m cgs_jax.main --multihost"
    assert trained == " ".join([program, *line[2:]])
    assert queued == "scontrol requeue 7"
    assert more == [trained, queued, trained]


def test_kubernetes_pods_make_up_the_slice():
    jobset = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == int(rows) * int(columns) // chips
    script = pod["containers"][0]["args"][0]
    assert run("bash", "-n", "-c", script).returncode == 0
    assert "--multihost" in script
    assert "finished python" in script
    (space,) = map(int, re.findall(r"--config.mesh.space=(\d+)", script))
    assert acdc.get_config().batch.labelled % (int(rows) * int(columns) // space) == 0


def test_folders_of_runs_in_the_home_folder():
    """A shell leaves ~ in --workdir=~/RUN, which the program takes for the home folder."""
    for argument in ("--workdir=~/runs/a", "--workdir ~/runs/a"):
        line = f"source launch/workdir.sh {argument} && echo $workdir"
        assert run("bash", "-c", line).stdout == f"{os.environ['HOME']}/runs/a\n"


@pytest.mark.parametrize("script", ["local_processes.sh", "slurm.sbatch", "tpu_pod.sh"])
def test_usage(script):
    wrong = run("bash", f"launch/{script}", "nonsense")
    assert wrong.returncode == 1
    assert script in wrong.stdout + wrong.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "error: no folder OUT"),
        (["OUT", "--minutes"], "error: --minutes needs a value"),
        (["OUT", "--minutes=3"], "error: unknown --minutes=3"),
        (["OUT", "--minutes", "ten"], "error: --minutes ten: give a number from 1 on"),
        (["OUT", "--acdc", "/nowhere"], "error: no such folder of --acdc"),
    ],
)
def test_accelerator_says_what_it_needs(options, message, tmp_path):
    options = [tmp_path / "out" if option == "OUT" else option for option in options]
    done = run("bash", LAUNCH / "accelerator.sh", *options)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_accelerator_does_what_is_left(tmp_path):
    """Its own lines, with a program that writes what it was asked, and fails once."""
    python, asked = tmp_path / "python", tmp_path / "asked"
    python.write_text(
        f'echo "$*" >> {asked}\n'
        "case $* in *torch*) exit 1 ;; *transunet*) [ -e again ] && exit; touch again; exit 1 ;;"
        " esac\n"
    )
    python.chmod(0o755)
    no_gpu = tmp_path / "nvidia-smi"  # so one part follows the other
    no_gpu.write_text("#!/bin/sh\nexit 1\n")
    no_gpu.chmod(0o755)
    for folder in ("launch", "acdc"):
        (tmp_path / folder).mkdir()
    shutil.copy(LAUNCH / "accelerator.sh", tmp_path / "launch")
    line = ["bash", tmp_path / "launch" / "accelerator.sh", "out", "--acdc", "acdc", "--tiny"]
    counts, codes = [], []
    for _ in range(2):
        done = subprocess.run(
            line,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={"JAX_PYTHON": str(python), "PATH": f"{tmp_path}:/usr/bin:/bin"},
        )
        codes.append(done.returncode)
        lines = [x for x in asked.read_text().splitlines() if "cgs_jax" in x]
        counts.append(len(lines))
    assert codes == [1, 0], done.stderr
    assert counts == [4, 5]  # two benchmarks and two sweeps; and what had failed
    assert "step_transunet_float32 did not finish" in (tmp_path / "out" / "log.txt").read_text()
    assert "model=transunet" in lines[-1]
    sweep = f"configs/sweeps/ablation.py --rows=cgs --workdir {tmp_path}/out/acdc_7 --seeds 3"
    assert sweep in lines[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "error: no folder "),
        (["/nowhere"], "error: no folder /nowhere"),
        ([".", "--seeds"], "error: --seeds needs a value"),
        ([".", "--seeds=0"], "error: --seeds 0: give a number from 1 on"),
        ([".", "--labelled", "5"], "error: --labelled 5: the paper has 3 and 7"),
        ([".", "--recipe=fast"], "error: --recipe fast: there are paper and patches"),
        ([".", "--config.seed", "3"], "error: --config.seed is no OPTION: write --name=value"),
    ],
)
def test_reproduce_acdc_says_what_it_needs(options, message):
    done = run("bash", LAUNCH / "reproduce_acdc.sh", *options)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_reproduce_acdc_asks_for_the_sweep(tmp_path):
    """Its own lines, with a program that only writes what it was asked."""
    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCH / "reproduce_acdc.sh", tmp_path / "launch")
    (tmp_path / "launch" / "venv.sh").touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('echo "$*" >> asked; [ $2 != cgs_jax.benchmark ]\n')
    python.chmod(0o755)
    line = ["bash", tmp_path / "launch" / "reproduce_acdc.sh", tmp_path, "--labelled=3", "--seeds"]
    line += ["2", "--recipe", "patches", "--workdir", "work dir", "--rows=cgs", "--config.seed=3"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    benchmark, sweep = (tmp_path / "asked").read_text().splitlines()
    config = f"acdc.py:labelled=3,recipe=patches --config.data.root={tmp_path} --config.seed=3"
    assert f"cgs_jax.benchmark --config configs/{config} --stages step" in benchmark
    assert f"cgs_jax.sweep --config configs/{config} --sweep configs/sweeps/ablation.py" in sweep
    assert sweep.endswith(f"--workdir {tmp_path}/work dir --seeds 2 --rows=cgs")
