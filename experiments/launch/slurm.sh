#!/usr/bin/env bash
# Trains on the nodes of a SLURM job, one process for each GPU:
#
#     sbatch --nodes=2 experiments/launch/slurm.sh experiments/wsd.yaml --run.directory=/shared/runs/wsd --mesh.fsdp=-1
#
# Submit it from the repository, with the environment of cpmjax active; the run directory lies on a disk that all nodes
# share. JAX finds the processes by SLURM's variables, and gives each task of a node a GPU of its own: ask for GPUs by
# node, as here, not by task. On CPUs drop the line with gpus.
#
# Five minutes before its time is over, or when it is preempted, the job saves, exits with 75 and is queued again: it
# goes on from there. A task that dies ends all the others within CPMJAX_HEARTBEAT_TIMEOUT seconds (100); the job then
# fails, and the same sbatch goes on from the newest checkpoint.
#SBATCH --job-name=cpmjax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

trap : TERM # what SLURM sends to all of a job is for the tasks
# Each of them ends by itself; what --kill-on-bad-exit does would come before its last words.
srun --kill-on-bad-exit=0 python -m cpmjax.train "$@"
code=$?
if [ "$code" = 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
