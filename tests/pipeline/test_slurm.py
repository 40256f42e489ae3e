"""The Slurm scripts of docs/parallel.md, with an `sbatch` that runs each array at once."""

import re
import subprocess

from tests.pipeline import small
from tests.pipeline.repository import ROOT

# Knows the options of the documented commands; fails where a wave names a job that it has not run.
SBATCH = """#!/bin/bash
while [[ $1 == --* ]]; do
  case $1 in
    --dependency=afterok:*) [ -e "jobs/${1##*:}" ] || exit 1 ;;
    --array) last=${2#0-}; last=${last%%%*}; shift ;;
    --gres | --cpus-per-task) shift ;;
  esac
  shift
done
for ((i = 0; i <= last; i++)); do SLURM_ARRAY_TASK_ID=$i bash "$@" >&2 & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || exit 1; done
mkdir -p jobs
job=$(($(ls jobs | wc -l) + 1))
touch "jobs/$job"
echo $job
"""


def test_the_documented_scripts_run_all_stages_wave_by_wave(tmp_path):
    text = (ROOT / "docs" / "parallel.md").read_text()
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    (stage,) = [block for block in blocks if block.startswith("#!/bin/bash")]
    (submit,) = [block for block in blocks if block.startswith("after=")]
    repo = small.make(tmp_path / "repo")
    (repo / ".venv" / "bin").mkdir(parents=True)
    (repo / ".venv" / "bin" / "activate").touch()
    (repo / "stage.sbatch").write_text(stage)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text(SBATCH)
    (tools / "sbatch").chmod(0o755)
    env = small.environment()
    env["PATH"] = f"{tools}:{env['PATH']}"
    done = subprocess.run(["bash", "-c", submit], cwd=repo, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((repo / "jobs").iterdir())) == 4, done.stderr
    assert len(small.starts(repo)) == 8
    left = subprocess.run(
        ["dvc", "status", "--json"], cwd=repo, env=env, capture_output=True, text=True, check=True
    )
    assert left.stdout.strip() == "{}"
