#!/bin/bash
# Train on two nodes of four GPUs each under SLURM; more arguments go to scripts/train.py:
#   sbatch accelerate_configs/slurm.sh --config configs/pretrain/train.yaml
# Submit from the repository, on a file system that all nodes see.
#SBATCH --job-name=codex-accel
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail

export GPUS_PER_NODE=${GPUS_PER_NODE:-4}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK / GPUS_PER_NODE))}
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MAIN_HOST=${HOSTS%%$'\n'*} # the first line; a pipe into head may end in SIGPIPE, and the script with it
export MAIN_HOST
# another port for each job, so that two jobs that share a node do not meet
export MAIN_PORT=${MAIN_PORT:-$((20000 + SLURM_JOB_ID % 20000))}

# One launcher a node; those of all nodes meet at the first. SIGTERM, 120 s before the end, saves and stops the run
# (docs/train.md): put the same command into the queue again to go on.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file accelerate_configs/multi_node.yaml \
  --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS_PER_NODE))" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$MAIN_HOST" --main_process_port "$MAIN_PORT" scripts/train.py "$@"' train "$@"
