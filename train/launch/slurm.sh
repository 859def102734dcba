#!/usr/bin/env bash
#SBATCH --job-name=lvface
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=lvface-%j.log
# One task a rank. From the repository root:
#
#   sbatch train/launch/slurm.sh --config R.yaml --deepspeed_config ds_configs/zero1_bf16.json data.path=SHARDS output=RUN
#
# Two minutes before the time limit, or at a preemption, Slurm signals the ranks; they save a checkpoint within checkpoint.grace_s and end
# with exit code 75, and the job goes back into the queue, to go on from there. Any other exit code is the job's.
set -u

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs that share a node do not meet
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over from sbatch by itself

# Ranks end by themselves when one is lost: srun must not kill them before they have said why. Its exit code is the highest of theirs.
# shellcheck disable=SC2016 # the variables are the tasks'
srun --kill-on-bad-exit=0 --wait=60 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python -m train "$@"' train "$@" checkpoint.grace_s=110
code=$?

if ((code == 75)) && [[ $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then # not where it was cancelled
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
