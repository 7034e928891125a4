#!/bin/sh
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

# Trains on all nodes of a job; the output folder must be one that all of them see.
#
#     sbatch slurm.sh unet/train.py --data-path data --output-dir runs/unet --amp --channels-last
#
# Two minutes before the time is over, or when the job is preempted, the run saves and the job goes
# back into the queue; there it goes on from what was saved.

# The store of the rendezvous must outlive a node: else a replacement waits in vain for its peers.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FIRST

# Since Slurm 22.05 srun does not take this from sbatch, and would give a node's task one core.
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

# is_host and local-addr: a node does not always recognise itself by the name that others call it.
srun sh -c 'exec torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" --max-restarts=10 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$FIRST:29400" \
    --rdzv-conf="is_host=$((SLURM_NODEID == 0)),join_timeout=300" \
    --local-addr="$SLURMD_NODENAME" "$@"' sh "$@" --resume auto &
run=$!

stopped=
trap 'stopped=yes; kill -TERM $run' USR1 TERM
wait $run
code=$?
if [ -n "$stopped" ]; then  # the signal ended that wait, before the run has saved
    wait $run
    code=$?
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
