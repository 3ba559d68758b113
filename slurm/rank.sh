# One task of a training: srun starts `bash slurm/rank.sh COMMAND` once per GPU.
# shellcheck shell=bash
trap "" USR1 # says that the time is nearly up; until Python listens for it, it must not kill
echo "rank $SLURM_PROCID of $SLURM_NTASKS on $SLURMD_NODENAME"
exec "$@"
