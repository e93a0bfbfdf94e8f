#!/usr/bin/env bash
# Environment of a training process. Source it: `source launch/environment.sh`.
#
# Each XLA flag is tried in a child process first, because XLA aborts on a flag that it does not know; a flag
# unknown to this version is a warning here. Set before sourcing what you want otherwise: nothing that is set
# is replaced, and flags in XLA_FLAGS come last, where XLA lets them win.
#
#   PYTHON     the interpreter that has mmrstraj_jax (default: python3)
#   IMAGE      a container of launch/apptainer.def to run in; its python3 is taken instead
#   SCRATCH    a node-local folder for compiled programs (default: TMPDIR, else /tmp)

: "${PYTHON:=python3}"
: "${SCRATCH:=${TMPDIR:-/tmp}}"
python=("$PYTHON")
[ -z "${IMAGE:-}" ] || python=(apptainer exec --nv --bind "$PWD,$SCRATCH" "$IMAGE" python3)

mmrstraj_environment() {
    local flags=(
        # collectives run behind the arithmetic
        --xla_gpu_enable_latency_hiding_scheduler=true
        --xla_gpu_enable_pipelined_all_reduce=true
        --xla_gpu_enable_pipelined_all_gather=true
        --xla_gpu_enable_pipelined_reduce_scatter=true
        --xla_gpu_enable_while_loop_double_buffering=true
        # all adapter gradients (17 MB) in one all-reduce
        --xla_gpu_all_reduce_combine_threshold_bytes=134217728
        # a peer that never comes to the first collective ends the process
        --xla_gpu_first_collective_call_terminate_timeout_seconds=600
    )
    local known
    known=$("${python[@]}" -m mmrstraj_jax.environment "${flags[@]}" ${XLA_FLAGS:-}) || return
    export XLA_FLAGS=$known
}

mmrstraj_environment || return
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
