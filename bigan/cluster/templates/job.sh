# shellcheck shell=bash
# A job of SLURM that trains or evaluates one run: ranks, logs, signals, requeue.
#
#   train_job CONFIG [a.b=value ...]      evaluate_job RUN [options of `bigan evaluate`]
#   trial_job SWEEP_DIR                   an element of the job array of a sweep
#
# Variables (docs/cluster.md): BIGAN_RUN_DIR, BIGAN_LAUNCHER, BIGAN_PROCESSES, BIGAN_PYTHON,
# BIGAN_CONTAINER, BIGAN_IMAGE, BIGAN_MOUNTS, BIGAN_CONTAINER_OPTIONS, BIGAN_LAUNCH_FILE,
# BIGAN_MAX_REQUEUES, BIGAN_CHAIN, BIGAN_CHAIN_LINK, BIGAN_CHAIN_LENGTH, BIGAN_TRAINING_JOB.
# The arguments of the user are words of "$@" everywhere: no shell reads them a second time.

set -uo pipefail

MAX_IDLE=3 # attempts in a row without a new checkpoint that are interrupted from outside
SIGNALLED="" # " USR1", " TERM": the signals so far
CHILD=""     # pid of what runs in the background, and the function that ends it
STOP_CHILD=""
KEEPER=""
CODE=1 # exit code of CHILD

say() { printf 'bigan job %s: %s\n' "$JOB" "$*"; }

fail() { # MESSAGE: end the job as FAILED, with the reason in the log and in attempts.tsv
    say "FAILED: $1" >&2
    record failed "$1"
    if [ "$KIND" = trial ]; then on_trial end; fi
    exit 1
}

# --- what the run folder has -------------------------------------------------------------------

images_seen() { # of the newest complete checkpoint, or 0
    local newest=0 folder name
    for folder in "${BIGAN_RUN_DIR:-}"/checkpoints/*/; do
        name=${folder%/}
        name=${name##*/}
        case $name in *[!0-9]*) continue ;; esac
        if [ -e "$folder/COMPLETE" ] && ((10#$name > newest)); then newest=$((10#$name)); fi
    done
    echo "$newest"
}

measured() { # number of evaluated snapshots
    local found=("$BIGAN_RUN_DIR"/evaluation/*.json)
    if [ -e "${found[0]}" ]; then echo "${#found[@]}"; else echo 0; fi
}

# A column of attempts.tsv; of an evaluator the number of evaluated snapshots, which is its progress.
progress() { if [ "$KIND" = evaluate ]; then measured; else images_seen; fi; }

record() { # EVENT [REASON]: append a line to attempts.tsv, if the run has a folder
    local reason=${2:-} file=${BIGAN_RUN_DIR:-}/slurm/attempts.tsv
    if [ ! -d "${file%/*}" ]; then return; fi
    reason=${reason:0:500}
    if [ -s "$file" ] && [ -n "$(tail -c 1 "$file")" ]; then echo >>"$file"; fi # was cut off
    printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$1" "$KIND" \
        "$JOB" "$RESTART" "$(progress)" "${reason//[[:cntrl:]]/ }" >>"$file"
}

idle_attempts() { # attempts of this kind, this one included, that started where the run is now
    awk -F '\t' -v kind="$KIND" -v now="$(progress)" '
        $3 == kind && $2 == "started" { idle = $6 == now ? idle + 1 : 0 }
        $3 == kind && ($2 == "failed" || $2 == "stopped") { idle = 0 }
        END { print idle + 0 }' "$BIGAN_RUN_DIR/slurm/attempts.tsv" 2>/dev/null
}

first_failure() { # [KINDS]: the failure file that was written first, of these kinds
    local file kind
    for file in "$BIGAN_LOG_DIR"/failure-*-rank-*.txt; do # their names begin with the time
        [ -e "$file" ] || return 1
        IFS= read -r kind <"$file" || continue
        if [ $# = 0 ] || [[ " $1 " == *" $kind "* ]]; then
            echo "$file"
            return 0
        fi
    done
    return 1
}

reason_of() { sed -n 2p "$1"; } # FAILURE_FILE

show_failure() { # the last lines of the rank that failed first, or of the launchers
    local file rank
    if [ -n "$SIGNALLED" ]; then return; fi
    if ! file=$(first_failure); then
        for file in "$BIGAN_LOG_DIR"/launcher-*.log; do show_end "$file"; done
        return
    fi
    rank=${file##*-rank-}
    rank=${rank%.txt}
    say "rank $rank failed first: $(reason_of "$file")" >&2
    if [ "$rank" != 0 ]; then show_end "$BIGAN_LOG_DIR/rank-$rank.log"; fi
}

show_end() { # LOG: its last lines
    if [ ! -s "$1" ]; then return; fi
    printf -- '--- last lines of %s\n' "$1" >&2
    tail -n 20 "$1" >&2
    printf -- '---\n' >&2
}

# --- the job and its nodes ----------------------------------------------------------------------

enter_job() { # the log folder of this attempt, its nodes and processes
    BIGAN_RUN_DIR=${BIGAN_RUN_DIR%/}
    if [[ $BIGAN_RUN_DIR != /* ]]; then BIGAN_RUN_DIR=$PWD/$BIGAN_RUN_DIR; fi
    export BIGAN_LOG_DIR=$BIGAN_RUN_DIR/slurm/logs/$JOB-$RESTART
    mkdir -p "$BIGAN_LOG_DIR" || fail "$BIGAN_LOG_DIR cannot be made"
    # Of a job with the same number, on another cluster.
    rm -f "$BIGAN_LOG_DIR/training-ended" "$BIGAN_LOG_DIR"/failure-*-rank-*.txt
    PROCESSES=${BIGAN_PROCESSES:-$((GPUS > 0 ? GPUS : 1))}
    [[ $PROCESSES =~ ^[1-9][0-9]*$ ]] || fail "BIGAN_PROCESSES=$PROCESSES is not a number of processes"
    if [ "$GPUS" = 0 ]; then export ACCELERATE_USE_CPU=true; fi
    if [ -z "${OMP_NUM_THREADS:-}" ]; then
        local threads=$((${SLURM_CPUS_PER_TASK:-1} / PROCESSES))
        export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
    fi
    find_address
}

find_address() { # ADDRESS of the first node, as the other nodes reach it
    ADDRESS=127.0.0.1
    if [ "$NUM_NODES" = 1 ]; then return; fi
    ADDRESS=$(getent ahostsv4 "${NODES[0]}" | awk 'NR == 1 { print $1 }')
    case $ADDRESS in
    "" | 127.*) # its name does not resolve, or only to itself
        ADDRESS=$(scontrol show node "${NODES[0]}" |
            sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1)
        ADDRESS=${ADDRESS:-${NODES[0]}}
        ;;
    esac
}

free_port() { # [OFFSET]: a port of this job on which nothing listens; this is the first node
    local port=$((20000 + (31 * SLURM_JOB_ID + ${1:-0}) % 12000))
    while (exec 3<>"/dev/tcp/$ADDRESS/$port") 2>/dev/null; do port=$((port + 1)); done
    echo "$port"
}

container_commands() { # SRUN: srun and its options; INSIDE: prefix of a command in a container
    # The tasks may end at different times: that of a node which has all shards, and those of others.
    SRUN=(srun --kill-on-bad-exit=1 --wait=0)
    INSIDE=()
    local options=("${BIGAN_CONTAINER_OPTIONS[@]+"${BIGAN_CONTAINER_OPTIONS[@]}"}")
    case ${BIGAN_CONTAINER:-none} in
    none) ;;
    pyxis) # options of srun: in a container, the batch script could not call srun
        SRUN+=("--container-image=${BIGAN_IMAGE:-}")
        if [ -n "${BIGAN_MOUNTS:-}" ]; then SRUN+=("--container-mounts=$BIGAN_MOUNTS"); fi
        SRUN+=("${options[@]+"${options[@]}"}")
        ;;
    apptainer)
        INSIDE=(apptainer exec)
        if [ "$GPUS" != 0 ]; then INSIDE+=(--nv); fi
        if [ -n "${BIGAN_MOUNTS:-}" ]; then INSIDE+=(--bind "$BIGAN_MOUNTS"); fi
        INSIDE+=("${options[@]+"${options[@]}"}" "${BIGAN_IMAGE:-}")
        ;;
    *) fail "BIGAN_CONTAINER=$BIGAN_CONTAINER is not none, pyxis or apptainer" ;;
    esac
    if [ "${BIGAN_CONTAINER:-none}" != none ] && [ -z "${BIGAN_IMAGE:-}" ]; then
        fail "BIGAN_CONTAINER=$BIGAN_CONTAINER needs BIGAN_IMAGE"
    fi
}

on_each_node() { # COMMAND ...: one task per node
    "${SRUN[@]}" --nodes="$NUM_NODES" --ntasks="$NUM_NODES" --ntasks-per-node=1 --overlap \
        "${INSIDE[@]+"${INSIDE[@]}"}" "$@"
}

on_first_node() { # COMMAND ...: one task on this node
    "${SRUN[@]}" --nodes=1 --ntasks=1 --nodelist="${NODES[0]}" --overlap \
        "${INSIDE[@]+"${INSIDE[@]}"}" "$@"
}

launch() { # PORT COMMAND ...: `python -m bigan COMMAND ...` on all ranks
    local port=$1 total=$((NUM_NODES * PROCESSES)) options=()
    shift
    # SIGUSR1 would kill a launcher, whose processes then continue without it: it is ignored.
    if [ "$total" = 1 ]; then
        # shellcheck disable=SC2016  # expanded on the node
        on_each_node bash -c 'trap "" USR1; exec "$0" "$@"' "$PYTHON" -m bigan "$@"
    elif [ "${BIGAN_LAUNCHER:-accelerate}" = srun ]; then
        options=(--nodes="$NUM_NODES" --ntasks="$total" --ntasks-per-node="$PROCESSES" --overlap)
        if ((${SLURM_CPUS_PER_TASK:-0} >= PROCESSES)); then
            options+=(--cpus-per-task="$((SLURM_CPUS_PER_TASK / PROCESSES))")
        else
            unset SRUN_CPUS_PER_TASK
            options+=(--overcommit)
        fi
        export MASTER_ADDR=$ADDRESS MASTER_PORT=$port
        # shellcheck disable=SC2016
        "${SRUN[@]}" "${options[@]}" "${INSIDE[@]+"${INSIDE[@]}"}" \
            bash -c 'trap "" USR1; exec "$0" "$@"' "$PYTHON" -m bigan "$@"
    else
        options=(--config_file "$BIGAN_LAUNCH_FILE" --num_machines "$NUM_NODES"
            --num_processes "$total" --main_process_ip "$ADDRESS" --main_process_port "$port")
        # The launcher prints tracebacks of its own, also at a preemption: into a log of its own.
        # shellcheck disable=SC2016
        on_each_node bash -c 'trap "" USR1
            exec >>"$BIGAN_LOG_DIR/launcher-$SLURM_NODEID.log" 2>&1
            exec "$0" -m accelerate.commands.launch --machine_rank "$SLURM_NODEID" "$@"' \
            "$PYTHON" "${options[@]}" -m bigan "$@"
    fi
}

# --- signals ------------------------------------------------------------------------------------

is_own_stop() { [ -s "$BIGAN_RUN_DIR/STOP" ] && grep -q '^SLURM job' "$BIGAN_RUN_DIR/STOP"; }

is_users_stop() { [ -e "$BIGAN_RUN_DIR/STOP" ] && ! is_own_stop; }

keep_stop() { # ask the trainer to save and stop; one that is starting deletes STOP: until it ends
    if [ -n "$KEEPER" ]; then return; fi
    (
        trap '' TERM
        while kill -0 $$ 2>/dev/null; do
            if [ ! -e "$BIGAN_RUN_DIR/STOP" ]; then # renamed: an empty STOP is that of a user
                echo "SLURM job $JOB: signal$SIGNALLED" >"$BIGAN_LOG_DIR/stop"
                mv -n "$BIGAN_LOG_DIR/stop" "$BIGAN_RUN_DIR/STOP"
            fi
            sleep 2
        done
    ) &
    KEEPER=$!
}

end_child() { kill -TERM "$CHILD" 2>/dev/null; } # its tasks end with the job

on_signal() { # NAME
    if [ -n "$CHILD" ] && [ -z "$SIGNALLED" ]; then say "signal $1: saves and stops"; fi
    SIGNALLED+=" $1"
    if [ -n "$CHILD" ]; then "$STOP_CHILD"; fi
}

await_child() { # FUNCTION, which ends CHILD at a signal; sets CODE
    STOP_CHILD=$1
    if [ -n "$SIGNALLED" ]; then "$STOP_CHILD"; fi # it came before CHILD was set
    while :; do # a signal ends `wait`, not the child
        wait "$CHILD"
        CODE=$?
        kill -0 "$CHILD" 2>/dev/null || break
    done
    CHILD=""
}

supervise() { # FUNCTION COMMAND ...: run it to its end, with the log of rank 0; sets CODE
    STOP_CHILD=$1
    "${@:2}" &
    CHILD=$!
    : >>"$BIGAN_LOG_DIR/rank-0.log"
    tail -n +1 --sleep-interval=1 --pid="$CHILD" -F "$BIGAN_LOG_DIR/rank-0.log" 2>/dev/null &
    local tail=$!
    await_child "$1"
    if [ -n "$KEEPER" ]; then
        kill -KILL "$KEEPER" 2>/dev/null
        wait "$KEEPER" 2>/dev/null
        KEEPER=""
    fi
    while kill -0 "$tail" 2>/dev/null; do wait "$tail" 2>/dev/null; done
}

# --- after an attempt -----------------------------------------------------------------------------

node_is_lost() { # whether a node of the job has failed or does not respond
    local state
    state=$(sinfo -h -N -o %T -n "$SLURM_JOB_NODELIST" 2>/dev/null) || return 1
    if [[ $state == *down* || $state == *fail* || $state == *\** ]]; then return 0; fi
    # SLURM notices after minutes that a node does not respond: a task on each node shows it at once.
    [ "$NUM_NODES" -gt 1 ] && ! timeout -k 5 60 srun --nodes="$NUM_NODES" --ntasks="$NUM_NODES" \
        --ntasks-per-node=1 --overlap true >/dev/null 2>&1
}

job_field() { # NAME: of `scontrol show job`
    scontrol show job "$JOB" 2>/dev/null | sed -n "s/.*\\b$1=\\([^ ]*\\).*/\\1/p" | head -n 1
}

is_preempted() { [[ $(job_field PreemptTime) == [0-9]* ]]; }

leave_if_slurm_ends_job() { # it was requeued, cancelled or timed out: nothing is left to decide
    if [ "$(job_field JobState)" != COMPLETING ]; then return; fi
    if [ "$(job_field Restarts)" -gt "$RESTART" ] 2>/dev/null; then
        record requeued "by SLURM"
        say "requeued by SLURM at images_seen = $(images_seen)"
    elif [[ $SIGNALLED == *USR1* ]]; then
        record limit "the time limit was reached before the run had saved; raise --signal"
    else
        record stopped "cancelled"
        say "cancelled at images_seen = $(images_seen)"
    fi
    exit 1
}

is_interrupted() { # whether something outside of the run ended this attempt
    [[ $SIGNALLED == *TERM* ]] || [ -e "$BIGAN_RUN_DIR/REQUEUE" ] || is_preempted || node_is_lost
}

require_restart() { # BEFORE AFTER: end the job as FAILED unless another attempt makes sense
    local file why idle
    file=$(first_failure "input run taken_over") && fail "$(reason_of "$file")"
    if file=$(first_failure); then
        why=$(reason_of "$file")
    elif [ -n "$SIGNALLED" ]; then
        why="signal$SIGNALLED"
    else
        why="exit code $CODE without a message; see the end of the logs in $BIGAN_LOG_DIR"
    fi
    if [ "$2" -le "$1" ]; then
        if ! is_interrupted; then
            if [ -n "$SIGNALLED" ]; then
                why="the time limit ended this attempt before it saved anything: raise --time, or lower train.checkpoint_images"
            fi
            fail "$why"
        fi
        idle=$(idle_attempts)
        if [ "${idle:-0}" -ge "$MAX_IDLE" ]; then
            fail "$idle attempts in a row made no progress; the last one: $why"
        fi
    fi
    WHY=$why
}

restart() { # run the job again, or leave that to the next link of a chain; does not return
    local answer tries=0
    if [ -n "${BIGAN_CHAIN:-}" ]; then
        if [ "$BIGAN_CHAIN_LINK" -lt "$BIGAN_CHAIN_LENGTH" ]; then
            record limit "$WHY"
            say "link $BIGAN_CHAIN_LINK of $BIGAN_CHAIN_LENGTH ends at images_seen = $(images_seen); the next link continues"
            exit 0
        fi
        fail "the last link of the chain ended at images_seen = $(images_seen) ($WHY); submit the same command again"
    fi
    if [ "$RESTART" -ge "${BIGAN_MAX_REQUEUES:-50}" ]; then
        fail "restarted $RESTART times (BIGAN_MAX_REQUEUES); the last attempt: $WHY"
    fi
    record requeued "$WHY"
    say "requeued at images_seen = $(images_seen) ($WHY)"
    # An element of an array by its number: its SLURM_JOB_ID may be that of the whole array.
    until answer=$(scontrol requeue "$JOB" 2>&1); do
        tries=$((tries + 1))
        if [[ $answer == *contact* || $answer == *timed\ out* ]] && [ "$tries" -lt 30 ]; then
            sleep 10 # the controller is restarted
            continue
        fi
        fail "SLURM does not requeue this job ($answer); submit a chain instead: bigan submit ... --chain N"
    done
    trap - TERM
    sleep 120 # until SLURM ends this script
    exit 1
}

# --- training -------------------------------------------------------------------------------------

begin_attempt() { # resolve what earlier attempts left
    if [ -e "$BIGAN_RUN_DIR/DONE" ] && [ "${BIGAN_CHAIN_LINK:-1}" -gt 1 ]; then
        say "the run is complete"
        exit 0
    fi
    if is_own_stop; then rm -f "$BIGAN_RUN_DIR/STOP"; fi
    if [ "${BIGAN_CHAIN_LINK:-1}" -gt 1 ] || [ "$RESTART" -gt 0 ]; then
        if is_users_stop; then
            record stopped "STOP"
            say "STOP: not continued; to continue, submit the same command again"
            exit 0
        fi
    fi
    if [ "${BIGAN_CHAIN_LINK:-1}" -gt 1 ]; then
        local last
        last=$(awk -F '\t' '$3 == "train"' "$BIGAN_RUN_DIR/slurm/attempts.tsv" 2>/dev/null | tail -n 1)
        case $last in
        *$'\t'failed$'\t'*) fail "not continued after the failure of an earlier link: ${last##*$'\t'}" ;;
        *$'\t'stopped$'\t'*)
            say "not continued: an earlier link was stopped (${last##*$'\t'})"
            exit 0
            ;;
        esac
    fi
    record started "$(hostname -s)"
    say "attempt $((RESTART + 1)) on ${SLURM_JOB_NODELIST}: $NUM_NODES node(s) of $PROCESSES process(es), from images_seen = $(images_seen)"
}

caches() { # CONFIG [a.b=value ...]: whether data.cache may be set, by the text
    printf '%s\n' "$@" | cat - "$1" 2>/dev/null | grep -w cache | grep -qv null
}

train() { # CONFIG [a.b=value ...]: returns if the run is complete or was stopped on purpose
    local before file was_done=""
    before=$(images_seen)
    if [ -e "$BIGAN_RUN_DIR/DONE" ]; then was_done=yes; fi
    if [ -z "$SIGNALLED" ] && caches "$@"; then
        supervise end_child on_each_node "$PYTHON" -m bigan stage "$@"
        if [ "$CODE" != 0 ] && [ -z "$SIGNALLED" ]; then
            file=$(first_failure) && fail "$(reason_of "$file")"
            fail "staging the shards failed; see above"
        fi
    fi
    if [ -z "$SIGNALLED" ]; then
        rm -f "$BIGAN_RUN_DIR/REQUEUE" # of the former attempt
        supervise keep_stop launch "$(free_port)" train "$@"
    fi
    OUTCOME=""
    # DONE of an earlier attempt says nothing about one that has failed before it deleted DONE.
    if [ -e "$BIGAN_RUN_DIR/DONE" ] && { [ -z "$was_done" ] || [ "$CODE" = 0 ]; }; then
        OUTCOME=completed
    elif is_users_stop; then
        OUTCOME=stopped
    fi
    if is_own_stop; then rm -f "$BIGAN_RUN_DIR/STOP"; fi
    if [ -z "$OUTCOME" ]; then
        leave_if_slurm_ends_job
        show_failure
        require_restart "$before" "$(images_seen)"
        restart
    fi
}

begin_job() { # KIND: names, nodes and commands of this job; from here on a signal does not end it
    KIND=$1 JOB=$SLURM_JOB_ID RESTART=${SLURM_RESTART_COUNT:-0}
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    PYTHON=${BIGAN_PYTHON:-python}
    GPUS=${SLURM_GPUS_ON_NODE:-0}
    mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    NUM_NODES=${#NODES[@]}
    container_commands
    case ${BIGAN_LAUNCHER:-accelerate} in
    accelerate | srun) ;;
    *) fail "BIGAN_LAUNCHER=$BIGAN_LAUNCHER is not accelerate or srun" ;;
    esac
}

find_run_dir() { # CONFIG [a.b=value ...]: set BIGAN_RUN_DIR, unless it is set
    if [ -n "${BIGAN_RUN_DIR:-}" ]; then return; fi
    begin_job train
    BIGAN_RUN_DIR=$(on_first_node "$PYTHON" -m bigan.cluster.run_dir "$@") && return
    if [ -n "$SIGNALLED" ]; then
        WHY="signal$SIGNALLED"
        leave_if_slurm_ends_job
        restart
    fi
    fail "the config has no run folder; see above"
}

train_job() { # CONFIG [a.b=value ...]
    begin_job train
    enter_job
    begin_attempt
    train "$@"
    record "$OUTCOME"
    say "$OUTCOME at images_seen = $(images_seen)"
}

# --- evaluation -----------------------------------------------------------------------------------

training_has_ended() { # whether none of the jobs BIGAN_TRAINING_JOB is queued or running
    local job answer
    IFS=, read -ra jobs <<<"$BIGAN_TRAINING_JOB"
    for job in "${jobs[@]}"; do
        if answer=$(squeue -h -j "$job" -o %T 2>&1); then
            if [ -n "$answer" ]; then return 1; fi
        elif [[ $answer != *"Invalid job id"* ]]; then
            return 1 # the controller does not answer
        fi
    done
}

watch_training() { # make the file that ends the evaluator, once training has ended
    until training_has_ended; do sleep "${BIGAN_POLL_SECONDS:-15}"; done
    : >"$BIGAN_LOG_DIR/training-ended"
}

evaluate_job() { # RUN [options of `bigan evaluate`]
    local before watcher="" ending=()
    begin_job evaluate
    BIGAN_RUN_DIR=${BIGAN_RUN_DIR:-$1}
    if [ ! -d "$BIGAN_RUN_DIR" ] && [[ " ${BIGAN_TRAINING_JOB:+--watch} $* " != *" --watch "* ]]; then
        fail "$BIGAN_RUN_DIR: no such folder"
    fi
    enter_job
    record started "$(hostname -s)"
    before=$(progress)
    if [ -n "${BIGAN_TRAINING_JOB:-}" ]; then
        watch_training &
        watcher=$!
        ending=(--watch --until "$BIGAN_LOG_DIR/training-ended")
    fi
    if [ -z "$SIGNALLED" ]; then
        supervise end_child launch "$(free_port)" evaluate "$@" "${ending[@]+"${ending[@]}"}"
    fi
    if [ -n "$watcher" ]; then kill "$watcher" 2>/dev/null; fi
    if [ "$CODE" = 0 ]; then
        record completed
        say "$(measured) snapshots are measured"
        exit 0
    fi
    leave_if_slurm_ends_job
    show_failure
    if [ -n "${BIGAN_TRAINING_JOB:-}" ] && [ -n "$SIGNALLED" ] && ! training_has_ended; then
        WHY="signal$SIGNALLED while training continues" # also if there was nothing to measure
    else
        require_restart "$before" "$(measured)"
    fi
    restart
}

# --- sweeps -----------------------------------------------------------------------------------------

on_trial() { # begin | watch | end: of the trial of this element (bigan/cluster/trial.py)
    on_first_node "$PYTHON" -m bigan.cluster.trial "$1" "$SWEEP" "$INDEX"
}

is_pruned() { grep -qs pruned "$BIGAN_RUN_DIR/STOP"; }

launch_evaluator() { # LOGS [OPTIONS]: with logs of its own; a port that no trainer of this job uses
    BIGAN_LOG_DIR=$1 launch "$(free_port 15)" evaluate "$BIGAN_RUN_DIR" "${@:2}"
}

train_trial() { # WHEN: during | after: train, and evaluate every snapshot
    local before logs=$BIGAN_LOG_DIR/evaluate ended=$BIGAN_LOG_DIR/training-ended evaluator=""
    mkdir -p "$logs"
    before=$(($(images_seen) + $(measured)))
    if [ "$1" = during ]; then
        launch_evaluator "$logs" --watch --until "$ended" &
        evaluator=$!
        on_trial watch &
    fi
    train "$SWEEP/slurm/trials/$(printf '%03d' "$INDEX").yaml"
    if [ "$OUTCOME" = stopped ] && ! is_pruned; then
        record stopped
        say "stopped at images_seen = $(images_seen); submit the sweep again to continue"
        exit 0
    fi
    : >"$ended"
    export BIGAN_LOG_DIR=$logs
    if [ -n "$evaluator" ]; then
        CHILD=$evaluator
        await_child end_child
    elif [ -z "$SIGNALLED" ]; then
        supervise end_child launch_evaluator "$logs"
    else
        CODE=1
    fi
    if [ "$CODE" = 0 ]; then return; fi
    leave_if_slurm_ends_job
    show_failure
    require_restart "$before" $(($(images_seen) + $(measured)))
    restart
}

trial_job() { # SWEEP_DIR: the trial of this element
    local when
    SWEEP=$1 INDEX=$SLURM_ARRAY_TASK_ID
    BIGAN_RUN_DIR=$SWEEP/$(printf '%03d' "$INDEX")
    begin_job trial
    enter_job
    when=$(on_trial begin) || fail "the trial could not be set up; see above"
    when=${when##*$'\n'}
    if [ "$when" = ended ]; then
        say "trial $INDEX has a result"
        exit 0
    fi
    OUTCOME=stopped
    if ! is_pruned; then # by an earlier attempt, which was interrupted afterwards
        begin_attempt
        train_trial "$when"
    fi
    on_trial end || fail "the result could not be recorded"
    record "$OUTCOME"
    say "trial $INDEX: $OUTCOME at images_seen = $(images_seen)"
    exit 0 # also ends `watch`
}
