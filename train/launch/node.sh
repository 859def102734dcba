#!/usr/bin/env bash
# Start the ranks of one node, pass signals on to them, wait for all, and end with the highest of their exit codes.
#
#   NODE_RANK=0 NODES=2 RANKS_HERE=8 MASTER_ADDR=node0 train/launch/node.sh --config R.yaml --deepspeed_config J.json key=value ...
#
# Once on every node, from the repository root, with the NODE_RANK of each. It is made to be the first process of a container: the
# launchers of DeepSpeed and torch are not. As PID 1 `deepspeed` ignores SIGTERM, and torchrun makes 1 of a rank's exit code 75.
set -u
: "${NODE_RANK:?0 on the first node, 1 on the next}" "${NODES:?how many nodes}" "${RANKS_HERE:?ranks on each node: its GPUs}"
: "${MASTER_ADDR:?name or address of the first node}"
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500} WORLD_SIZE=$((NODES * RANKS_HERE)) LOCAL_WORLD_SIZE=$RANKS_HERE

ranks=()
# shellcheck disable=SC2317 # the traps call it
pass_on() {
    interrupted=1
    kill -s "$1" "${ranks[@]}" 2>/dev/null # those that have ended already do not matter
}
trap 'pass_on TERM' TERM
trap 'pass_on USR1' USR1
trap 'pass_on INT' INT

for ((local_rank = 0; local_rank < RANKS_HERE; local_rank++)); do
    RANK=$((NODE_RANK * RANKS_HERE + local_rank)) LOCAL_RANK=$local_rank python -m train "$@" &
    ranks+=($!)
done

highest=0
for rank in "${ranks[@]}"; do
    interrupted=1
    while ((interrupted)); do # a signal ends `wait` before the rank does
        interrupted=0
        wait "$rank"
        code=$?
    done
    ((code > highest)) && highest=$code
done
exit "$highest"
