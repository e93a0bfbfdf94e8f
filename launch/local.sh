#!/usr/bin/env bash
# One node. One process drives all its GPUs:
#
#   launch/local.sh --config stage1 --model 7b --weights DIR --data FILE
#
# With PROCESSES=N as many processes on this machine, process I with GPU I: what SLURM would start, and the way
# to try a job of several processes on one machine. The exit code is the first one that is not 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

processes=${PROCESSES:-1}
if [ "$processes" -eq 1 ]; then
    exec "$PYTHON" -m "${MODULE:-mmrstraj_jax.train}" "$@"
fi

port=${PORT:-$((20000 + $$ % 20000))}
pids=()
stop() {
    kill -TERM "${pids[@]}" 2> /dev/null || true
}
trap stop TERM INT

for ((i = 0; i < processes; i++)); do
    CUDA_VISIBLE_DEVICES=$i "$PYTHON" -m "${MODULE:-mmrstraj_jax.train}" "$@" \
        --coordinator "127.0.0.1:$port" --num-processes "$processes" --process-id "$i" &
    pids+=($!)
done

result=0
for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    # a signal interrupts `wait` before the process has ended
    while [ "$code" -gt 128 ] && kill -0 "$pid" 2> /dev/null; do
        code=0
        wait "$pid" || code=$?
    done
    [ "$result" -ne 0 ] || result=$code
done
exit "$result"
