#!/usr/bin/env bash
# Trains on every GPU of a SLURM allocation, one task for each:
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 scripts/slurm.sh configs/clip.yaml [key=value ...]
# SLURM warns the processes two minutes before the time is over; they save, end with 75, and the job is queued again and goes on.
#SBATCH --job-name=vlpfast
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
export MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# Each task is told what torchrun would tell it: SLURM's signal reaches the processes themselves.
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    exec python3 -m vlpfast.cli.train "$@"' vlpfast "$@"
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
