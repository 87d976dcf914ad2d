# What train.sbatch and export.sbatch share: their settings, questions to Slurm, notes on the run, a site's notification.
#
# `megatron-eagle submit` puts this text into each script in the place of its `source`: the job is whole in the run's
# folder, whatever is installed while it runs. By hand it is read from where the project lies, at each start of the job.
# Before it: RUN_FOLDER, STAGE.

PYTHON=${PYTHON:-python}                # the interpreter that has megatron-eagle, inside the container
CONTAINER=${CONTAINER:-}                # what stands before it: "apptainer exec --nv image.sif", or nothing
SRUN_OPTIONS=${SRUN_OPTIONS:-}          # of the site, and pyxis' --container-image=... ; both are words as bash reads them
LOG_PREFIX=${LOG_PREFIX:-}              # the job's log is this and -<job>.log; if empty, Slurm is asked for it
FAILURES=${FAILURES:-10}                # restarts after failures
WITHOUT_PROGRESS=${WITHOUT_PROGRESS:-3} # starts in a row without a new checkpoint
NOTIFY=${NOTIFY:-}                      # a command for bash at these ends: failed, complete
NOTIFY_OF=${NOTIFY_OF:-failed complete}
ASK_SECONDS=${ASK_SECONDS:-3600}        # how long to go on asking a Slurm that does not answer

srun_options=() eagle=()
eval "srun_options=($SRUN_OPTIONS) eagle=($CONTAINER)" # a word may hold spaces
eagle+=("$PYTHON" -m megatron_eagle)
restart=${SLURM_RESTART_COUNT:-0}

ask() {  # a question to Slurm; again and again while its controller is away. While it is, nobody else gets these nodes.
    local said pause=1 until=$((SECONDS + ASK_SECONDS))
    until said=$("$@" 2>&1); do
        case $said in *"Invalid job id"*) echo "$said" >&2; return 1 ;; esac
        if [ "$SECONDS" -ge "$until" ]; then
            echo "Slurm cannot be asked: no answer to '$*' in $ASK_SECONDS s: $said" >&2
            return 1
        fi
        sleep "$pause"
        pause=$((pause < 30 ? pause * 2 : 30))
    done
    echo "$said"
}

job_is() {  # one value of what Slurm knows of this job
    local said
    said=$(ask scontrol show job --oneliner "$SLURM_JOB_ID") || return 1
    grep -o " $1=[^ ]*" <<<" $said" | head -n 1 | cut -d= -f2-
}

ours() {  # whether Slurm still runs this start of the job; a lost node's script may live on beside the next start
    local state restarts
    if ! state=$(job_is JobState) || ! restarts=$(job_is Restarts); then
        echo "nobody can say what became of the job"
        return 1
    fi
    case $state in RUNNING | SIGNALING) ;; *) echo "job is $state: nothing to decide"; return 1 ;; esac
    [ "$restarts" = "$restart" ] || { echo "start $((restart + 1)) is over, Slurm is at $((restarts + 1))"; return 1; }
}

leave() {  # where the job is no longer ours. While it waits again Slurm has to end this script: word that it ended by
    # itself may arrive late, from beside an absent controller, and Slurm 22.05 then takes the job for cancelled. Where a
    # newer start runs, or nothing will, nobody is waited for.
    local give_up=$((SECONDS + 300))
    trap 'ended=1' TERM USR1
    while [ -z "${ended:-}" ] && [ "$SECONDS" -lt "$give_up" ]; do
        case $(ASK_SECONDS=$((give_up - SECONDS)) job_is JobState) in PENDING | COMPLETING) sleep 1 ;; *) break ;; esac
    done
    exit 1
}

log=${LOG_PREFIX:+$LOG_PREFIX-$SLURM_JOB_ID.log}
[ -n "$log" ] || log=$(job_is StdOut)

note() {  # megatron-eagle job, in one process on this node. A signal for the ranks may reach it, too: it has to survive.
    local said status killed=0 failed=0 pause=1 until=$((SECONDS + ASK_SECONDS))
    trap '' USR1 TERM # of the $(...) around it
    while :; do
        said=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "${srun_options[@]}" \
            bash -c 'trap "" USR1 TERM; echo noting; exec "$@"' note "${eagle[@]}" job "$@" \
            --run "$RUN_FOLDER" --stage "$STAGE" --job "$SLURM_JOB_ID" --log "$log" \
            --failures "$FAILURES" --without-progress "$WITHOUT_PROGRESS")
        status=$?
        if [ "$status" -gt 128 ] && [ "$killed" -lt 2 ]; then
            killed=$((killed + 1))
            echo "megatron-eagle job $1 was killed, time $killed of 3" >&2
        elif [ "$status" -ne 0 ] && [ "$said" = "${said#noting}" ] && [ "$SECONDS" -lt "$until" ] && [ "$failed" -lt 6 ]; then
            ours >&2 || break # nobody starts it for a job that waits again
            failed=$((failed + 1))
            sleep "$pause"
            pause=$((pause < 30 ? pause * 2 : 30))
        else
            break
        fi
    done
    tail -n 1 <<<"$said"
    return "$status"
}

tell() {  # OUTCOME: failed or complete, to the site's own command
    case " $NOTIFY_OF " in *" $1 "*) ;; *) return ;; esac
    [ -n "$NOTIFY" ] || return
    OUTCOME=$1 STAGE=$STAGE LOG=$log EVENT=$(tail -n 1 "$RUN_FOLDER/events.jsonl") RUN_FOLDER=$RUN_FOLDER \
        timeout 60 bash -c "$NOTIFY" || echo "notify: exit $?"
}
