#!/usr/bin/env bash
# Trains on every GPU of a SLURM allocation, one task for each:
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 scripts/slurm.sh configs/clip.yaml [key=value ...]
# SLURM warns the processes two minutes before the time is over; they save, end with 75, and the job is queued again and goes on.
# Every other end, a crash included, is the job's own: it is not queued again.
#SBATCH --job-name=vlpfast
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
export MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it from sbatch
fi
# Each task is told what torchrun would tell it: SLURM's signal reaches the processes themselves.
# The first task that ends leaves the others two minutes. To kill them for its code would be to kill with 143 those that are about
# to end with 75 too, and srun gives the largest code.
# shellcheck disable=SC2016 # each task's own variables
srun --kill-on-bad-exit=0 --wait=120 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    exec python3 -m vlpfast.cli.train "$@"' vlpfast "$@"
code=$?
if [ "$code" -eq 75 ]; then
    # A job that is being cancelled has saved too, and SLURM queues one that it has preempted again itself.
    if scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
