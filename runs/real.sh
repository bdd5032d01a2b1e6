#!/usr/bin/env bash
# Learn from real videos without labels, and probe what was learned, on two CPU cores.
#
#   ./runs/real.sh                  # ../shared/data: 922 clips of 21 HMDB51 classes (JHMDB, official split 1), 394 of
#                                   # three UCF-101 classes, 99 of Panda-70M without labels
#   ./runs/real.sh data/mine ...    # your own folders, as tools.prepare folder writes them (docs/your-videos.md)
#
# Each folder has train.csv, and val.csv if its videos are labeled. Training uses the videos of all train.csv, but no
# labels. Then each labeled folder is a task for an untrained encoder, the teacher, the student, and both encoders of
# V-JEPA 2 (EMA and online), trained with equal executed FLOPs: once with clips, and once with a single frame of each
# clip, which shows how much of a task is motion. All train with causal masks: with the paper's, runs of this length learn
# hardly anything (docs/NOTES.md). SEEDS: training seeds, five by default. STEPS: steps of a teacher, and of a student.
#
# Writes to out/real, for each task, a figure, a table of accuracies, and one of their paired differences with intervals
# over seeds and sources of videos. SOURCE=REGEX: the part of a path that names the source, for your own folders. The same
# command continues where it stopped. docs/replication.md has the results.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
source runs/jobs.sh
OUT=${OUT:-out/real} seeds=(${SEEDS:-0 1 2 3 4})
folders=("$@")
if [ $# -eq 0 ]; then
    folders=(../shared/data/{jhmdb,ucf3,panda_samples})
    SOURCE='[^/]+(?=_[fhlu]_[cn]m_np|_c[0-9])' # a recording of HMDB51 or UCF-101
fi

teacher_steps=${STEPS:-1500} student_steps=${STEPS:-1500} momentum=0.999
model=(--model vit_ti --width 96 --depth 4 --heads 2 --patch-size 8 --num-frames 8 --resolution 64
       --predictor-width 96 --predictor-depth 2 --predictor-heads 2)
dtype=$(grep -q amx_bf16 /proc/cpuinfo && echo bfloat16 || echo float32) # with AMX, bfloat16 is 1.4 times as fast
learning=(--mask causal --batch-size 24 --lr 2e-3 --final-weight-decay 0.04 --workers 0 --dtype "$dtype")
probing=(--segments 2 --augment none --batch-size 25 --lr 8e-3 --probe-depth 1 --probe-heads 4 --standardize --seeds 3
         --workers 0 --dtype "$dtype")

train() { # script, run folder, seed, steps, further flags
    python "$1" "${model[@]}" "${learning[@]}" --data "${folders[@]/%//train.csv}" --log-every 50 \
        --out "$2" --seed "$3" --steps "$4" "${@:5}"
}
probe() { # run folder, name of the encoder, seed, further flags
    local folder input out flags
    for folder in "${folders[@]}"; do
        [ -e "$folder/val.csv" ] || continue
        for input in clips single-frame; do
            out=$OUT/$(basename "$folder")/$input/$2-seed$3 flags=("${@:4}")
            [ "$input" = clips ] || flags+=(--single-frame)
            [ -e "$out/results.json" ] || python probe.py --checkpoint "$1" --out "$out" --seed "$3" "${probing[@]}" \
                --train-data "$folder/train.csv" --val-data "$folder/val.csv" \
                --num-classes "$(awk '{ print $NF }' "$folder/train.csv" | sort -u | wc -l)" "${flags[@]}"
        done
    done
}
salt() { # folder, seed
    train train_teacher.py "$1/teacher-seed$2" "$2" "$teacher_steps"
    train train_student.py "$1/student-seed$2" "$2" "$student_steps" --teacher "$1/teacher-seed$2"
    probe "$1/teacher-seed$2" teacher "$2"
    probe "$1/student-seed$2" student "$2"
    probe "$1/student-seed$2" untrained "$2" --untrained
}
ema() { # folder, seed
    train train_ema_baseline.py "$1/ema-seed$2" "$2" "$ema_steps" --ema-momentum "$momentum"
    probe "$1/ema-seed$2" ema "$2"
    probe "$1/ema-seed$2" online "$2" --weights student
}

ema_steps=$(steps_of_equal_flops)
for seed in "${seeds[@]}"; do queue salt "$OUT/salt" "$seed"; done
for seed in "${seeds[@]}"; do queue ema "$OUT/ema" "$seed"; done
finish_all
for task in "$OUT"/*/clips; do
    task=$(dirname "$task")
    python -m tools.analyze compare "$task/clips" "$task/single-frame" --save "$task.png"
    python -m tools.analyze differences "$task/clips" "$task/single-frame" ${SOURCE:+--source "$SOURCE"} \
        --save "$task-differences.md"
done
python -m tools.analyze picture "$OUT/salt/teacher-seed0" "$OUT/salt/student-seed0" --data "${folders[0]}/train.csv" \
    --save "$OUT/real"
