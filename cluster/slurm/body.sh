# shellcheck shell=bash disable=SC2154,SC2329
# What follows is the same in every script: cluster/slurm/body.sh.

# Nothing is cut off in a pipe here: who writes to a reader that has gone fails, and with it the script.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*}
port=$((20000 + 3 * (SLURM_JOB_ID % 4000)))
folder=$TANDEM_HOME/slurm/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
umask 077
mkdir -p "$folder"
# Ray asks everybody for this token; it goes with the allocation.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/auth_token
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"

# The address of a node, as the others reach it: Debian's 127.0.1.1 for a machine's own name is none.
address_of() {
    getent ahostsv4 "$1" | awk '!found && $1 !~ /^127\.0\.1\./ {print $1; found = 1}'
}
head_address=$(address_of "$head")
head_address=${head_address:-$head}
export head_address port cpus_per_node gpus_per_node
export RAY_ADDRESS=$head_address:$port
export -f address_of

steps=()
asked_to_save=no
signals=0
job=

end_ray() {
    for step in "${steps[@]}"; do
        kill "$step" 2> /dev/null || true
    done
    wait "${steps[@]}" 2> /dev/null || true
    rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap end_ray EXIT

# The signal before the limit (--signal=B:USR1@…): save, stop, and go on in the next allocation.
save_and_stop() {
    echo "$(date +%T) the limit is near: the job saves and stops"
    asked_to_save=yes
    signals=$((signals + 1))
    if [ -n "$job" ]; then
        python -m tandem jobs stop "$job" || true
    fi
}
trap save_and_stop USR1

start_head() {
    # shellcheck disable=SC2016
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" bash -c '
        unset RAY_ADDRESS
        ulimit -n 65536 2> /dev/null || true
        exec python -m ray.scripts.scripts start --head --block --disable-usage-stats \
            --node-ip-address="$head_address" --port="$port" --dashboard-host=127.0.0.1 \
            --dashboard-port=$((port + 1)) --ray-client-server-port=$((port + 2)) \
            --temp-dir="/tmp/tandem-$SLURM_JOB_ID" --num-cpus="$cpus_per_node" --num-gpus="$gpus_per_node"
    ' > "$folder/head.log" 2>&1 &
    steps+=("$!")
}

start_workers() {
    local others=$((SLURM_JOB_NUM_NODES - 1))
    [ "$others" -gt 0 ] || return 0
    # shellcheck disable=SC2016
    srun --overlap --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --exclude="$head" bash -c '
        unset RAY_ADDRESS
        ulimit -n 65536 2> /dev/null || true
        own=$(address_of "$SLURMD_NODENAME")
        exec python -m ray.scripts.scripts start --address="$head_address:$port" --block --disable-usage-stats \
            ${own:+--node-ip-address="$own"} --temp-dir="/tmp/tandem-$SLURM_JOB_ID-$SLURM_PROCID" \
            --num-cpus="$cpus_per_node" --num-gpus="$gpus_per_node"
    ' > "$folder/workers.log" 2>&1 &
    steps+=("$!")
}

# A job looks once whether it fits: it is sent when all nodes are there.
wait_for_nodes() {
    if ! python -m cluster.slurm.wait --nodes "$SLURM_JOB_NUM_NODES" --seconds "$start_timeout_s"; then
        echo "see $folder/head.log and workers.log"
        exit 1
    fi
}

start_head
start_workers
wait_for_nodes

code=1
if [ "$asked_to_save" = no ]; then
    python -m tandem jobs submit "$spec" "${options[@]}" --follow > "$folder/job" &
    follower=$!
    while [ -z "$job" ] && kill -0 "$follower" 2> /dev/null; do
        job=$(head -n 1 "$folder/job")
        [ -n "$job" ] || sleep 0.5
    done
    echo "$(date +%T) job $job"
    # A signal that comes before the job has a name is kept until here.
    [ "$asked_to_save" = no ] || python -m tandem jobs stop "$job" || true
    # A trapped signal ends `wait` with a number above 128, and the job goes on.
    interrupted=yes
    while [ "$interrupted" = yes ]; do
        before=$signals code=0 interrupted=no
        wait "$follower" || code=$?
        if [ "$code" -gt 128 ] && [ "$signals" -ne "$before" ]; then
            interrupted=yes
        fi
    done
    tail -n +2 "$folder/job"
fi

if [ "$asked_to_save" = yes ] && [ "$code" -ne 0 ] && [ "$requeue" = yes ]; then
    echo "$(date +%T) back into the queue; the next allocation goes on from the newest checkpoint"
    end_ray
    trap - EXIT
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
