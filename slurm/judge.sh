#!/usr/bin/env bash
# A judge of free-form answers for stage 2: a vLLM server that speaks OpenAI's protocol.
#
#   sbatch --gpus-per-node=4 slurm/judge.sh Qwen/Qwen2.5-72B-Instruct [options of vllm serve]
#
# When it answers, logs/judge-<job>.args holds the arguments that a training needs to use it:
#   sbatch slurm/stage2.sh init_from=... out=... $(cat logs/judge-<job>.args)
# An OPENAI_API_KEY in the environment is asked of those who call. The server ends with `scancel <job>`.
#SBATCH --job-name=judge
#SBATCH --output=logs/%x-%j.out
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --no-requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source slurm/launch.sh

check_judge() {
    [[ -n ${1:-} && $1 != -* ]] || fail "give a model: sbatch slurm/judge.sh <folder or hub id> [options of vllm serve]"
    command -v "${VLLM[0]}" > /dev/null || fail "there is no ${VLLM[0]}: install vLLM there, or set VLLM in slurm/env.sh"
}

run_judge() {
    local model=$1 gpus=${SLURM_GPUS_PER_NODE:-1} port=$((8000 + ${SLURM_JOB_ID:-0} % 1000)) # another port for each job
    shift
    local url=http://${SLURMD_NODENAME:-NODE}:$port
    file=logs/judge-${SLURM_JOB_ID:-JOB}.args
    export VLLM_API_KEY=${OPENAI_API_KEY:-}
    [ -n "$VLLM_API_KEY" ] || unset VLLM_API_KEY
    local server=("${VLLM[@]}" serve "$model" --port "$port" --tensor-parallel-size "${gpus##*:}" "$@")
    if [ -n "${DRY_RUN:-}" ]; then run "${server[@]}" && return; fi
    "${server[@]}" &
    trap 'rm -f "$file"' EXIT
    until "${PYTHON[@]}" -c "import urllib.request as u; u.urlopen('$url/health', timeout=5)" 2> /dev/null; do
        kill -0 $! 2> /dev/null || fail "the server has ended before it answered, see above"
        sleep 5
    done
    echo "rewards.judge.base_url=$url/v1 rewards.judge.model=$model" | tee "$file"
    wait $!
}

go judge "$@"
