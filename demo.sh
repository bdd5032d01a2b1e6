#!/usr/bin/env bash
# SALT end to end on two CPU cores: teacher, student, three probed encoders, pictures and one table in out/demo.
set -euo pipefail
cd "$(dirname "$0")"
PATH="$PWD/.venv/bin:$PATH"
OUT=out/demo
rm -rf "$OUT"

model=(--model vit_ti --width 96 --depth 4 --heads 4 --patch-size 8 --num-frames 8 --resolution 48
       --predictor-width 48 --predictor-depth 2 --predictor-heads 4)
learning=(--batch-size 32 --micro-batch-size 16 --lr 3e-3 --clip-grad 1 --final-weight-decay 0.04 --log-every 50)
probing=(--task synthetic-motion synthetic-shape --seeds 3 --epochs 12 --batch-size 100 --train-clips 3000
         --probe-depth 1 --probe-heads 4 --standardize)

echo "[1/4] stage 1: the teacher fills in masked pixels"
python train_teacher.py "${model[@]}" "${learning[@]}" --steps 800 --warmup-steps 80 --out $OUT/teacher
echo "[2/4] stage 2: the student predicts the frozen teacher's latents"
python train_student.py --teacher $OUT/teacher "${model[@]}" "${learning[@]}" --steps 1000 --warmup-steps 100 --out $OUT/student
echo "[3/4] probing the untrained encoder, the teacher and the student"
python probe.py --checkpoint $OUT/student --untrained "${probing[@]}" --out $OUT/probe-untrained
python probe.py --checkpoint $OUT/teacher "${probing[@]}" --out $OUT/probe-teacher
python probe.py --checkpoint $OUT/student "${probing[@]}" --out $OUT/probe-student
echo "[4/4] pictures and the table, in $OUT"
python analyze.py curves $OUT/teacher $OUT/student --save $OUT/curves.png
python analyze.py reconstruct $OUT/teacher --save $OUT/reconstruction.png
python analyze.py features $OUT/student --save $OUT/features.png
python analyze.py table $OUT/probe-untrained $OUT/probe-teacher $OUT/probe-student --save $OUT/table.md
