# How the tables of the paper are made; the scripts beside this file read it, nobody runs it. It goes on from launch.sh.
#
#   sbatch slurm/paper/<table>.sh ARGUMENTS                    one bound on the kept tokens after the other, then the table
#   sbatch --array=0-2 slurm/paper/<table>.sh ARGUMENTS        11.1%, 22.2% and 33.3% side by side (prose only)
# shellcheck shell=bash

# In prose: ARGUMENTS are further ones of `python -m src.evaluate`, those of the judge among them. A family of models may
# have bounds of its own.
bounds() {
    bounds=(11 22 33)
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || bounds=("${bounds[SLURM_ARRAY_TASK_ID]}")
}

check_freeform() {
    bounds
    for bound in "${bounds[@]}"; do
        "${PYTHON[@]}" -m src.preflight evaluate "conf/paper/$table.yaml" "conf/paper/retention_$bound${family:+_$family}.yaml" "$@" \
            "out=runs/paper/$table/$bound" resume=true
    done
}

run_freeform() {
    bounds
    one_per_gpu
    for bound in "${bounds[@]}"; do
        run srun "${options[@]}" "${PYTHON[@]}" -m src.evaluate "conf/paper/$table.yaml" \
            "conf/paper/retention_$bound${family:+_$family}.yaml" "$@" "out=runs/paper/$table/$bound" resume=true
    done
    side_by_side
}

# Short answers: what is run is a list of runs of lmms-eval, which are on one node; there are no ARGUMENTS.
check_short() {
    [ $# = 0 ] || fail "there are no arguments: conf/paper/$table.yaml says it all"
    "${PYTHON[@]}" -c "import lmms_eval" || fail "there is no lmms-eval: pip install --no-deps -r requirements/lmms-eval.txt"
}

run_short() {
    local gpus=${SLURM_GPUS_ON_NODE:-1}
    run "${PYTHON[@]}" -m torch.distributed.run --standalone "--nproc-per-node=$gpus" -m lmms_eval \
        --config "conf/paper/$table.yaml"
    side_by_side
}

side_by_side() { run "${PYTHON[@]}" -m src.reproduce "conf/paper/published/$table.yaml" "runs/paper/$table"; }
