#!/usr/bin/env bash
# SALT end to end on two CPU cores: train a teacher and a student, probe three encoders, draw pictures: out/demo.
# SEED=7 ./runs/demo.sh runs another training seed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
source runs/presets.sh
OUT=${1:-out/demo} SEED=${SEED:-0}
rm -rf "$OUT"

train() { # script, further flags
    torchrun --nproc_per_node="$processes" "$1" --replicate "${model[@]}" "${learning[@]}" --seed "$SEED" "${@:2}"
}
probe() { # run folder, folder for the results, further flags
    python probe.py --checkpoint "$1" "${probing[@]}" --seed "$SEED" --out "$2" "${@:3}"
}

echo "[1/4] train the teacher to reconstruct masked pixels (about 2 minutes)"
train train_teacher.py --steps "$teacher_steps" --out "$OUT/teacher"
echo "[2/4] train the student to predict the frozen teacher's latents (about 4 minutes)"
train train_student.py --steps "$student_steps" --teacher "$OUT/teacher" --out "$OUT/student"
echo "[3/4] probe an untrained encoder, the teacher and the student; draw pictures (about 2 minutes)"
probe "$OUT/student" "$OUT/probe-untrained" --untrained >"$OUT/probe-untrained.log" & # two at a time, one per core
probe "$OUT/teacher" "$OUT/probe-teacher"
wait $!
probe "$OUT/student" "$OUT/probe-student" &
python -m tools.analyze curves "$OUT/teacher" "$OUT/student" --save "$OUT/curves.png"
python -m tools.analyze picture "$OUT/teacher" "$OUT/student" --first 2 --save "$OUT/salt"
wait $!
echo "[4/4] write the table"
python -m tools.analyze table "$OUT/probe-untrained" "$OUT/probe-teacher" "$OUT/probe-student" --save "$OUT/table.md"
