#!/usr/bin/env bash
# SALT end to end on two CPU cores: train a teacher and a student, probe three encoders, draw pictures: out/demo.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 # two processes of one thread: a little slower than two threads on idle cores, far faster on shared ones
OUT=${1:-out/demo}
rm -rf "$OUT"

model=(--model vit_ti --width 96 --depth 4 --heads 4 --patch-size 8 --num-frames 8 --resolution 32
       --predictor-width 48 --predictor-depth 2 --predictor-heads 4)
learning=(--batch-size 32 --lr 3e-3 --clip-grad 1 --final-weight-decay 0.04 --workers 0 --log-every 100)
probing=(--task synthetic-motion synthetic-shape --seeds 3 --batch-size 100 --lr 2e-3 --train-clips 1500
         --probe-depth 1 --probe-heads 4 --standardize --workers 0)

echo "[1/4] train the teacher to reconstruct masked pixels (about 2 minutes)"
torchrun --nproc_per_node=2 train_teacher.py --replicate "${model[@]}" "${learning[@]}" \
    --steps 1200 --warmup-steps 120 --out "$OUT/teacher"
echo "[2/4] train the student to predict the frozen teacher's latents (about 4 minutes)"
torchrun --nproc_per_node=2 train_student.py --replicate "${model[@]}" "${learning[@]}" --teacher "$OUT/teacher" \
    --steps 2400 --warmup-steps 240 --out "$OUT/student"
echo "[3/4] probe an untrained encoder, the teacher and the student (about a minute)"
python probe.py --checkpoint "$OUT/student" --untrained "${probing[@]}" --out "$OUT/probe-untrained"
python probe.py --checkpoint "$OUT/teacher" "${probing[@]}" --out "$OUT/probe-teacher"
python probe.py --checkpoint "$OUT/student" "${probing[@]}" --out "$OUT/probe-student"
echo "[4/4] draw pictures and the table"
python -m tools.analyze curves "$OUT/teacher" "$OUT/student" --save "$OUT/curves.png"
python -m tools.analyze reconstruct "$OUT/teacher" --save "$OUT/reconstruction.png"
python -m tools.analyze features "$OUT/student" --save "$OUT/features.png"
python -m tools.analyze table "$OUT/probe-untrained" "$OUT/probe-teacher" "$OUT/probe-student" --save "$OUT/table.md"
