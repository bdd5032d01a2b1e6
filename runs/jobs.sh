# What study.sh and real.sh share: run functions in the background, JOBS (2) at a time; compare at equal executed FLOPs.
JOBS=${JOBS:-2}
exec 3>&1
set -m # gives each job a process group, so that it can be killed with its children
trap 'for job in $(jobs -p); do kill -- "-$job" 2>/dev/null || true; done' EXIT

# queue FUNCTION FOLDER SEED ...: run it when a process is free, with its output in FOLDER/seedSEED.log
queue() {
    while (($(jobs -rp | wc -l) >= JOBS)); do finish_one; done
    mkdir -p "$2"
    echo "$(date +%H:%M) $*"
    (
        trap '(($? == 0)) || echo "failed: see '"$2/seed$3.log"'" >&3' EXIT
        "$@" >"$2/seed$3.log" 2>&1
    ) &
}
finish_one() {
    wait -n || exit 1
}
finish_all() {
    while [ -n "$(jobs -rp)" ]; do finish_one; done
}

steps_of_equal_flops() { # EMA steps that execute as many FLOPs as teacher and student together
    python flops.py --match "${model[@]}" "${learning[@]}" --teacher-steps "$teacher_steps" --steps "$student_steps" |
        awk '/executed/ { print $1 }'
}
