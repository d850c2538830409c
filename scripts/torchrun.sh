#!/usr/bin/env bash
# Trains on all GPUs of this machine: scripts/torchrun.sh configs/clip.yaml [key=value ...]
# RANKS=n takes n processes instead, RESTARTS=n how often a run that loses a process goes on from its last checkpoint.
# Logs of each process: $LOG_DIR/<run>/attempt_*/<rank>/stderr.log
set -euo pipefail
ranks=${RANKS:-$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # each attempt has a store of its own
exec torchrun --standalone --nproc-per-node "$ranks" --max-restarts "${RESTARTS:-3}" \
    --log-dir "${LOG_DIR:-logs}" --redirects 2 --tee 2 --local-ranks-filter 0 \
    -m vlpfast.cli.train "$@"
