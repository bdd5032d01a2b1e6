# The settings of demo.sh and study.sh. PRESET=gpu selects the larger ones, which have only run a few steps on a CPU.
case ${PRESET:-laptop} in
laptop)
    processes=2 # of one thread: about as fast as two threads on idle cores, far faster on shared ones
    export OMP_NUM_THREADS=1
    model=(--model vit_ti --width 96 --depth 4 --heads 2 --patch-size 8 --num-frames 16 --resolution 32
           --predictor-width 96 --predictor-depth 2 --predictor-heads 2)
    learning=(--batch-size 24 --lr 2e-3 --workers 0)
    probing=(--train-clips 350 --workers 0)
    teacher_steps=400 student_steps=800
    small=(--width 48 --heads 1) large=(--width 192 --heads 4 --lr 1e-3)
    ;;
gpu)
    processes=1
    model=(--model vit_s --patch-size 8 --num-frames 16 --resolution 64)
    learning=(--batch-size 256 --micro-batch-size 256 --lr 1e-3 --workers 12)
    probing=(--train-clips 2000)
    teacher_steps=3000 student_steps=6000
    small=(--width 192 --heads 3) large=(--width 768 --heads 12)
    ;;
*)
    echo "PRESET=$PRESET: laptop or gpu" >&2
    exit 2
    ;;
esac
learning+=(--final-weight-decay 0.04 --log-every 50)
probing+=(--task synthetic-motion synthetic-shape --batch-size 25 --lr 8e-3 --probe-depth 1 --probe-heads 4 --standardize
          --seeds 8)
