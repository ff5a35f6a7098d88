#!/usr/bin/env bash
# One machine's share of a training run. Start the same line on every machine, one copy each; interrupted, it goes on from its last checkpoint.
#
#   bash train.sh DATA SAVE_DIR [flags of fairseq-train]
#
# Environment: NODES (default 1), NODE_RANK (this one's number from 0, default SLURM's), HEAD (HOST:PORT of node 0, default localhost:29500),
# GPUS (processes here, default: its GPUs), ADDRESS (this machine's, where its name does not resolve to it), JOB (a name that the run's
# machines share), RESTARTS (of all workers after one died, default 3).
set -euo pipefail
data=$1 save=$2
shift 2
rank=${NODE_RANK:-${SLURM_NODEID:-0}}
gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Otherwise torch 2.13 starts workers again on the store that still holds the dead ones' addresses, and they hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
schedule="--lr-scheduler polynomial_decay --warmup-updates 20000 --total-num-update 500000"
[[ " $*" != *" --lr-scheduler"* ]] || schedule="" # another one does not know these flags
trap '' USR1 # workers save and end on it; torchrun would die of it
exec torchrun --nnodes "${NODES:-1}" --nproc_per_node "$gpus" --max-restarts "${RESTARTS:-3}" --monitor-interval 1 \
    --rdzv_backend c10d --rdzv_endpoint "${HEAD:-localhost:29500}" --rdzv_id "${JOB:-momentum_lm}" \
    --rdzv_conf "is_host=$((rank == 0))" ${ADDRESS:+--local-addr "$ADDRESS"} \
    --no-python fairseq-train "$data" --save-dir "$save" \
    --task momentum_language_modeling --criterion chunked_cross_entropy --arch momentum_lm_350m \
    --tokens-per-sample 1024 --batch-size 8 --update-freq 8 \
    --optimizer fused_adamw --adam-betas '(0.9, 0.98)' --adam-eps 1e-6 --weight-decay 0.01 --clip-norm 2.0 \
    --lr 3e-4 $schedule --max-update 500000 \
    --save-interval-updates 1000 --keep-interval-updates 2 --no-epoch-checkpoints --log-interval 10 --log-format simple \
    --tensorboard-logdir "$save/tensorboard" "$@"
