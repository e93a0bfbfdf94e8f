#!/usr/bin/env bash
# One node. One process drives all its GPUs:
#
#   launch/local.sh --config stage1 --model 7b --weights DIR --data FILE
#
# With PROCESSES=N as many processes on this machine, process I with GPU I, or the I-th of CUDA_VISIBLE_DEVICES
# where that is set: what SLURM would start, and the way to try a job of several processes on one machine. The
# exit code is the first one that is not 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

processes=${PROCESSES:-1}
if [ "$processes" -eq 1 ]; then
    exec "${python[@]}" -m "${MODULE:-mmrstraj_jax.train}" "$@"
fi

IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES-}"
if [ "${#gpus[@]}" -gt 0 ] && [ "${#gpus[@]}" -lt "$processes" ]; then # set and empty: nobody has a GPU
    echo "error: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: expected one GPU for each of PROCESSES=$processes;" \
        "name more GPUs, or start fewer processes" >&2
    exit 2
fi

port=${PORT:-$((20000 + $$ % 20000))}
pids=()
# Ctrl-C comes to the processes by itself: passed on, it would be the second signal, at which they do not save
trap 'interrupted=1' INT
trap 'interrupted=1; kill -TERM "${pids[@]}" 2> /dev/null || true' TERM

for ((i = 0; i < processes; i++)); do
    (
        trap - INT # ignored behind an &
        CUDA_VISIBLE_DEVICES=${gpus[i]-${CUDA_VISIBLE_DEVICES-$i}} exec "${python[@]}" \
            -m "${MODULE:-mmrstraj_jax.train}" "$@" \
            --coordinator "127.0.0.1:$port" --num-processes "$processes" --process-id "$i"
    ) &
    pids+=($!)
done

result=0
for pid in "${pids[@]}"; do
    interrupted=1
    while [ -n "$interrupted" ]; do # a signal ends `wait` before the process has ended
        interrupted='' code=0
        wait "$pid" || code=$?
    done
    [ "$result" -ne 0 ] || result=$code
done
exit "$result"
