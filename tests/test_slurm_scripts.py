"""The scripts of slurm/ without SLURM: what they would submit and run. With it: tests/slurm."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "slurm").rglob("*.sh"))
JOBS = [path for path in SCRIPTS if "\n#SBATCH" in path.read_text()]
YAML = "conf/backbones/qwen2_5_vl_7b.yaml"


@pytest.fixture
def bash(tmp_path):
    """Run a script of slurm/ where python only prints its arguments and no SLURM command works."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho python "$@"\n')
    broken = tmp_path / "sinfo"
    broken.write_text("#!/bin/sh\nexit 1\n")
    for path in (python, broken):
        path.chmod(0o755)

    def run(script: str, *args: str, code: int = 0, **env: str) -> str:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        clean |= {"PYTHON": str(python), "VLLM": str(python), "DRY_RUN": "1", "PATH": f"{tmp_path}:{clean['PATH']}"}
        done = subprocess.run(
            ["bash", f"slurm/{script}.sh", *args], cwd=ROOT, env=clean | env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, done.stdout + done.stderr
        return (done.stdout + done.stderr).replace(str(python), "python")

    return run


def job(**more: object) -> dict[str, str]:
    """What SLURM tells a job of two nodes."""
    facts = {"JOB_ID": 7, "SUBMIT_DIR": ROOT, "CPUS_ON_NODE": 32, "NNODES": 2, "SLURMD_NODENAME": "n1"} | more
    return {name if name.startswith("SLURM") else f"SLURM_{name}": str(value) for name, value in facts.items()}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_is_sound_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", script.relative_to(ROOT)], cwd=ROOT, check=True)


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_headers_are_what_every_job_needs(script):
    text = script.read_text()
    header = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", text, re.MULTILINE))
    assert header["output"] == "logs/%x-%j.out" and (ROOT / "logs" / ".gitignore").is_file()  # or there is no output
    assert header["job-name"] == script.stem and "time" in header and "nodes" in header
    assert "ntasks" not in header  # Lightning wants --ntasks-per-node
    assert re.search(r"^set -euo pipefail$", text, re.MULTILINE)  # or a job that failed counts as completed
    if script.stem.startswith("stage"):
        assert {"requeue", "signal", "open-mode"} <= set(header)


def test_arguments_and_options_pass_through(bash):
    check, submit, run = bash("stage1", "--nodes=4", "--time=1:00:00", YAML, "data.path=a b", "out=x").splitlines()
    assert check == f"python -m src.preflight train conf/stage1.yaml {YAML} data.path=a b out=x"
    assert submit.split("slurm/")[0] == "sbatch --nodes=4 --time=1:00:00 "
    assert submit.endswith(f"slurm/stage1.sh {YAML} data.path=a\\ b out=x ")
    assert run.endswith(f"slurm/rank.sh python -m src.train conf/stage1.yaml {YAML} data.path=a\\ b out=x ")
    assert "conf/stage2.yaml init_from=x" in bash("stage2", "init_from=x")


@pytest.mark.parametrize("recipe", ["conf/smoke.yaml", "conf/stage1_boxes.yaml"])
def test_a_recipe_stands_in_for_the_stage(bash, recipe):
    assert f"src.train {recipe} out=x" in bash("stage1", recipe, "out=x")


def test_a_missing_file_or_environment_is_told_before_anything_is_queued(bash):
    assert bash("stage1", "conf/smok.yaml", code=2).strip() == "error: there is no file conf/smok.yaml"
    assert "make install" in bash("stage1", "conf/smoke.yaml", PYTHON="/nowhere/python", code=2)
    assert "make install" in bash("pipeline", "out=x", PYTHON="/nowhere/python", code=2)
    assert "vllm" in bash("judge", "some/model", VLLM="/nowhere/vllm", code=2).lower()
    failed = bash("stage1", "conf/smoke.yaml", PYTHON="/bin/false", code=1)
    assert "sbatch" not in failed


def test_in_a_job_the_command_runs_on_all_nodes(bash):
    check, run = bash("stage1", "conf/smoke.yaml", **job()).splitlines()
    assert check == "python -m src.preflight train conf/smoke.yaml"
    expected = "srun --ntasks-per-node=1 --kill-on-bad-exit=1 --label --cpus-per-task=32 bash slurm/rank.sh python -m "
    assert run == expected + "src.train conf/smoke.yaml "


def test_one_task_per_gpu_that_answers(bash, tmp_path):
    idle = bash("stage1", "conf/smoke.yaml", **job(GPUS_ON_NODE=8))
    assert "--ntasks-per-node=1 " in idle and "--gpus-per-node=8" in idle
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    whole = bash("stage1", "conf/smoke.yaml", **job(GPUS_ON_NODE=8))
    assert "--ntasks-per-node=8 " in whole and "--gpus-per-node=8" in whole and "--cpus-per-task=4" in whole
    part = bash("stage1", "conf/smoke.yaml", **job(GPUS_ON_NODE=8, GPUS_PER_NODE="a100:2"))
    assert "--ntasks-per-node=2 " in part and "--gpus-per-node=2" in part
    assert "--ntasks-per-node=3 " in bash("stage1", "conf/smoke.yaml", TASKS_PER_NODE="3", **job(GPUS_ON_NODE=8))
    assert "--ntasks-per-node=4 " in bash("evaluate", "ckpt=x", **job(GPUS_PER_NODE=4))


def test_an_array_sweeps_over_seeds(bash):
    said = bash("stage1", "conf/smoke.yaml", "seed=9", "out=runs/s", **job(ARRAY_TASK_ID=3))
    assert said.splitlines()[1].endswith("src.train conf/smoke.yaml seed=9 out=runs/s seed=3 out=runs/s-3 ")
    assert "give out=" in bash("stage1", "conf/smoke.yaml", code=2, **job(ARRAY_TASK_ID=3))


def test_data_are_made_before_the_ranks_start(bash, tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\necho srun "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    first, second = bash("stage1", "conf/smoke.yaml", DRY_RUN="", **job()).splitlines()
    assert first == "python -m src.preflight train conf/smoke.yaml make_data=true" and second.startswith("srun ")


def test_other_commands(bash):
    assert "src.preflight evaluate ckpt=x" in bash("evaluate", "ckpt=x")
    said = bash("evaluate", "ckpt=x", **job(CPUS_ON_NODE=4))
    assert "srun --ntasks-per-node=1 --kill-on-bad-exit=1 --cpus-per-task=4 python -m src.evaluate ckpt=x" in said
    assert "resume" not in said
    again = bash("evaluate", "ckpt=x", **job(RESTART_COUNT=1)).splitlines()
    assert all(line.strip().endswith("ckpt=x resume=true") for line in again) and len(again) == 2
    said = bash("prepare", "source=tags", "out=x", **job(CPUS_PER_TASK=16))
    assert "--cpus-per-task=16 python -m src.prepare workers=16 source=tags out=x" in said and "resume" not in said
    again = bash("prepare", "source=tags", "out=x", **job(CPUS_PER_TASK=16, RESTART_COUNT=1))
    assert "workers=16 source=tags out=x resume=true" in again
    said = bash("judge", "org/model", "--max-model-len", "4096", **job(GPUS_PER_NODE=4))
    assert "serve org/model --port 8007 --tensor-parallel-size 4 --max-model-len 4096" in said
    assert "give a model" in bash("judge", code=2)


@pytest.mark.parametrize("model", ["qwen2_5_vl_7b", "llava1_5_7b"])
def test_tables_of_the_paper(bash, model):
    """What is checked, submitted and run, bound by bound; the last command puts it beside what is published."""
    name = f"freeform_{model}"
    own = "_llava1_5" if "llava" in model else ""
    both = [f"conf/paper/{name}.yaml conf/paper/retention_{bound}{own}.yaml judge.model=x" for bound in (11, 22, 33)]
    places = [f"out=runs/paper/{name}/{bound} resume=true" for bound in (11, 22, 33)]
    said = bash(f"paper/{name}", "judge.model=x").splitlines()
    checks, (submit, *runs, last) = said[:3], said[3:]
    assert checks == [f"python -m src.preflight evaluate {a} {b}" for a, b in zip(both, places)]
    assert submit.strip() == f"sbatch slurm/paper/{name}.sh judge.model=x"
    assert [run.split("src.evaluate ")[1].strip() for run in runs] == [f"{a} {b}" for a, b in zip(both, places)]
    assert last.strip() == f"python -m src.reproduce conf/paper/published/{name}.yaml runs/paper/{name}"
    of_one = bash(f"paper/{name}", "judge.model=x", **job(ARRAY_TASK_ID=1))
    assert "retention_22" in of_one and "retention_11" not in of_one

    name = f"short_{model}"
    _, submit, run, last = bash(f"paper/{name}").splitlines()
    assert submit.strip() == f"sbatch slurm/paper/{name}.sh"
    assert run.strip().endswith(f"--nproc-per-node=1 -m lmms_eval --config conf/paper/{name}.yaml")
    assert last.strip() == f"python -m src.reproduce conf/paper/published/{name}.yaml runs/paper/{name}"
    assert "--nproc-per-node=8" in bash(f"paper/{name}", **job(GPUS_ON_NODE=8))
    assert "there are no arguments" in bash(f"paper/{name}", "x=1", code=2)
    assert "pip install --no-deps -r requirements/lmms-eval.txt" in bash(f"paper/{name}", PYTHON="/bin/false", code=2)


def test_help_is_the_head_of_the_script(bash):
    said = bash("stage1", "--help")
    assert said.startswith("Stage 1 on a cluster") and "sbatch --array=0-2" in said and "#" not in said


def test_gpus_are_not_asked_of_a_cluster_that_has_none(bash, tmp_path):
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho '(null)'\n")
    assert "sbatch --gpus-per-node=0 slurm/evaluate.sh" in bash("evaluate", "ckpt=x")
    assert "--gpus" not in bash("stage1", "conf/smoke.yaml")  # whole nodes, as they are
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho gpu:a100:8\n")
    assert "--gpus" not in bash("evaluate", "ckpt=x")


def test_pipeline_queues_three_jobs_behind_each_other(bash):
    said = bash("pipeline", "--nodes=4", "out=runs/x", YAML, "a=1", "--", "b=2", "--", "c=3").splitlines()
    checks, jobs = said[:3], said[3:6]
    both = f"conf/stage1.yaml {YAML} a=1 conf/stage2.yaml b=2"  # for stage 1 has not said yet what stage 2 inherits
    assert checks[1] == f"python -m src.preflight train {both} out=runs/x/stage2"
    assert checks[2] == "python -m src.preflight evaluate ckpt=runs/x/stage2 c=3 planned=true"
    assert jobs[0].endswith(f"--nodes=4 slurm/stage1.sh {YAML} a=1 out=runs/x/stage1 ") and "afterok" not in jobs[0]
    assert "--dependency=afterok:stage1 --nodes=4 slurm/stage2.sh init_from=runs/x/stage1 b=2 out=runs/x/s" in jobs[1]
    assert jobs[2].endswith("--dependency=afterok:stage2 slurm/evaluate.sh ckpt=runs/x/stage2 c=3 ")
    assert all("--kill-on-invalid-dep=yes" in command for command in jobs)
    assert "give out=" in bash("pipeline", "a=1", code=2)


def test_judge_writes_its_address_once_it_answers(tmp_path):
    """With a server of ten lines in place of vLLM."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "logs").mkdir()
    (tmp_path / "vllm.py").write_text(
        "import http.server, sys\n"
        "assert sys.argv[1:4] == ['serve', 'org/model', '--port']\n"
        "class Health(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200 if self.path == '/health' else 404)\n"
        "        self.end_headers()\n"
        "http.server.HTTPServer(('', int(sys.argv[4])), Health).serve_forever()\n"
    )
    (tmp_path / "vllm").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/vllm.py" "$@"\n')
    (tmp_path / "vllm").chmod(0o755)
    env = os.environ | {"PYTHON": sys.executable, "VLLM": str(tmp_path / "vllm")}
    env |= job(JOB_ID=34567, SUBMIT_DIR=tmp_path, SLURMD_NODENAME="localhost")
    server = subprocess.Popen(["bash", "slurm/judge.sh", "org/model"], cwd=tmp_path, env=env, start_new_session=True)
    file = tmp_path / "logs" / "judge-34567.args"
    try:
        for _ in range(600):
            if file.is_file() and file.read_text():
                break
            time.sleep(0.1)
        expected = "rewards.judge.base_url=http://localhost:8567/v1 rewards.judge.model=org/model\n"
        assert file.read_text() == expected
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    assert not file.exists()
