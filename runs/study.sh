#!/usr/bin/env bash
# SALT against V-JEPA 2 (EMA) at equal executed FLOPs on built-in videos: three seeds, two budgets, about an hour on two
# CPU cores. Writes a table, a Pareto figure, and figures of accuracy against loss to out/study.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 # SALT and EMA run side by side, on one core each
OUT=${1:-out/study}
rm -rf "$OUT"
mkdir -p "$OUT"

if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then # has never run on a GPU
    model=(--model vit_s --patch-size 8 --num-frames 8 --resolution 64 --predictor-width 192 --predictor-depth 6
           --predictor-heads 6)
    learning=(--batch-size 256 --micro-batch-size 256 --lr 1e-3 --workers 8)
    probing=(--train-clips 4000)
    budgets=("1500 3000" "3000 6000")
else # the demo's networks
    model=(--model vit_ti --width 96 --depth 4 --heads 4 --patch-size 8 --num-frames 8 --resolution 32
           --predictor-width 48 --predictor-depth 2 --predictor-heads 4)
    learning=(--batch-size 32 --lr 3e-3 --workers 0)
    probing=(--train-clips 1500 --probe-depth 1 --probe-heads 4 --workers 0)
    budgets=("600 1200" "1200 2400") # teacher and student steps
fi
learning+=(--clip-grad 1 --final-weight-decay 0.04 --log-every 100)
probing+=(--task synthetic-motion synthetic-shape --batch-size 100 --lr 2e-3 --standardize)
ema=(--ema-momentum 0.9998) # the best of six settings (docs/NOTES.md)

train() { # script, seed, steps, run folder, further flags
    python "$1" "${model[@]}" "${learning[@]}" --seed "$2" --steps "$3" --warmup-steps $(($3 / 10)) --out "$4" "${@:5}"
}
probe() { # checkpoint, seed, folder for the results, further flags
    python probe.py --checkpoint "$1" --seed "$2" "${probing[@]}" --out "$3" "${@:4}"
}

# Run two commands side by side; end if either fails.
set -m # gives each a process group, so that it can be killed with its children
trap 'for job in $(jobs -p); do kill -- "-$job"; done' EXIT
both() {
    "$1" & "$2" &
    wait -n
    wait -n
}

salt() {
    train train_teacher.py "$seed" "$teacher" "$run/teacher"
    train train_student.py "$seed" "$student" "$run/student" --teacher "$run/teacher" --snapshot-every 300
    probe "$run/teacher" "$seed" "$run/probe-teacher"
    probe "$run/student" "$seed" "$run/probe-student"
}
baseline() {
    train train_ema_baseline.py "$seed" "$matched" "$run/ema" "${ema[@]}"
    probe "$run/ema" "$seed" "$run/probe-ema"
    probe "$run/ema" "$seed" "$run/probe-ema-student" --weights student
}
for budget in "${budgets[@]}"; do
    read -r teacher student <<<"$budget"
    matched=$(python flops.py --match "${model[@]}" "${learning[@]}" --teacher-steps "$teacher" --steps "$student" |
        awk '/executed/ { print $1 }')
    for seed in 0 1 2; do
        run=$OUT/$teacher+$student/seed$seed
        echo "[seed $seed: $teacher teacher + $student student steps against $matched EMA steps]"
        both salt baseline
    done
done
for seed in 0 1 2; do
    probe "$run/student" "$seed" "$OUT/untrained/probe-seed$seed" --untrained
done

echo "[does the loss predict the accuracy? checkpoints of one student, then the students of all teachers]"
run=$OUT/$teacher+$student/seed0
for checkpoint in "$run"/student/checkpoint-*.pt; do
    probe "$checkpoint" 0 "$run/course/$(basename "$checkpoint" .pt)"
done

probes=("$OUT"/*/seed*/probe-{teacher,student,ema,ema-student} "$OUT"/untrained/*)
python -m tools.analyze table "${probes[@]}" --save "$OUT/table.md"
python -m tools.analyze pareto "${probes[@]}" --save "$OUT/pareto.png"
python -m tools.analyze correlate "$run"/course/* --against loss rankme --save "$OUT/course.png"
python -m tools.analyze correlate "$OUT"/*/seed*/probe-student --against loss teacher-loss teacher-rankme --save "$OUT/teachers.png"
