#!/bin/sh
# From a fresh clone to a private model: installs, draws artificial patients, trains, predicts, refines, evaluates,
# accounts.
# Stages that are done are skipped when it runs again; a trained model is never trained twice, that would spend budget.
# Usage: ./setup_scripts/quickstart.sh [--fresh]     --fresh deletes quickstart_data first (nothing else)
set -eu
cd "$(dirname "$0")/.."

patients=120
test_patients=12
shape=24,32,24
seed=1
dataset=301
configuration=3d_fullres
fold=0
epsilon=8
trainer=nnUNetTrainerDP_AutoS
plans=nnUNetPlansDP_eps$epsilon
processes=2
stages=10
export nnUNet_def_n_proc=$processes nnUNet_n_proc_DA=$processes  # nnU-Net would start more than two cores can feed

data="$PWD/quickstart_data"
start="$(date +%s)"
number=0

case "${1:-}" in
    "") ;;
    --fresh) rm -rf "$data" ;;
    *) echo "The only argument is --fresh, found $1; type: $0 [--fresh]" >&2; exit 2 ;;
esac

# Announces the next stage: its number, the seconds since the start, what it does.
stage() {
    number=$((number + 1))
    printf '\n==> [%d/%d, %d s] %s\n' "$number" "$stages" "$(($(date +%s) - start))" "$1"
}

# Runs a function unless an earlier run finished it.
once() {
    if [ -f "$data/.done/$1" ]; then
        echo "    done already"
        return
    fi
    "$1"
    mkdir -p "$data/.done"
    touch "$data/.done/$1"
}

draw() {
    rm -rf "$data/phantom"
    nnunet-dp phantom "$data/phantom" --kind hippocampus --id $dataset --patients $patients --seed $seed \
        --test-patients $test_patients --shape $shape
}

convert() {
    rm -rf "$nnUNet_raw/Dataset${dataset}_"*
    nnUNetv2_convert_MSD_dataset -i "$task" -np $processes
    cp "$task/patients.csv" "$raw/patients.csv"
}

preprocess() {
    nnUNetv2_plan_and_preprocess -d $dataset -c $configuration -np $processes -npfp $processes
}

train() {
    if [ -f "$model/fold_$fold/checkpoint_final.pth" ]; then
        return
    fi
    if [ -f "$model/fold_$fold/checkpoint_latest.pth" ]; then
        echo "    going on from the last checkpoint"
        set -- --c
    else
        set --
    fi
    nnUNetv2_train $dataset $configuration $fold -tr $trainer -p $plans -device "$device" "$@"
}

predict() {
    nnUNetv2_predict -d $dataset -c $configuration -f $fold -tr $trainer -p $plans -device "$device" \
        -i "$raw/imagesTs" -o "$predictions" -npp $processes -nps $processes
}

refine() {
    nnunet-dp morph apply -i "$predictions" -o "$refined" -m "$model/morphology.json"
}

evaluate() {
    nnunet-dp evaluate -r "$task/labelsTs" -p "$refined" --compare "$predictions" -d "$model/dataset.json" \
        --patients "$task/patients_test.csv" --json > "$data/evaluation.json"
}

summarise() {
    nnunet-dp status "$model/fold_$fold" --json > "$data/status.json"
    python - "$data/evaluation.json" "$data/status.json" <<'PYTHON'
import json
import sys

found, status = (json.load(open(path)) for path in sys.argv[1:])
before, after = found["compare"], found
print(f"On {found['patients']} held-out patients      before DP-Morph   after (in the same budget)")
for metric, unit in (("dice", ""), ("hd95", " mm")):
    for label, values in [("mean", before["mean"]), *before["per_class"].items()]:
        refined = after["mean"] if label == "mean" else after["per_class"][label]
        name = f"{metric} {'mean' if label == 'mean' else 'of class ' + label}"
        print(f"  {name:<28}{values[metric]:10.3f}{unit:<4}{refined[metric]:12.3f}{unit}")
print(
    f"Privacy spent: epsilon {status['epsilon_spent']:.3f} of {status['epsilon_target']:g} "
    f"at delta {status['delta']:g}, per {status['unit']} ({status['relation']})"
)
PYTHON
    cat <<TEXT
Model:  $model/fold_$fold/checkpoint_final.pth
Ledger: $nnUNet_preprocessed/$name/privacy_ledger.jsonl
All of it was artificial data. With your own dataset 4, in the Decathlon's layout or nnU-Net's raw one:
  . .venv/bin/activate && eval "\$(./setup_scripts/environment.sh YOUR_FOLDER)"
  nnUNetv2_convert_MSD_dataset -i YOUR_FOLDER/Task04_Name        (only from the Decathlon's layout)
  nnUNetv2_plan_and_preprocess -d 4 -c $configuration
  nnunet-dp plan -d 4 -c $configuration --epsilon 8 --patients YOUR_FOLDER/patients.csv
  nnUNetv2_train 4 $configuration 0 -tr $trainer -p nnUNetPlansDP_eps8
  nnunet-dp predict -d 4 -c $configuration -f 0 -tr $trainer -p nnUNetPlansDP_eps8 -i IMAGES -o OUT
TEXT
}

stage "Install nnunet-dp and nnU-Net into .venv"
./setup_scripts/install.sh
PATH="$PWD/.venv/bin:$PATH"
eval "$(./setup_scripts/environment.sh "$data")"
device="$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')"
echo "    training will run on: $device"

stage "Make the private trainers visible to nnU-Net"
nnunet-dp link

stage "Draw $patients artificial patients, and $test_patients to test on"
once draw
task="$(echo "$data/phantom/Task${dataset}_"*)"
name="Dataset${dataset}_${task##*_}"
raw="$nnUNet_raw/$name"
model="$nnUNet_results/$name/${trainer}__${plans}__$configuration"
predictions="$data/predictions"
refined="$data/refined"

stage "Convert and preprocess with nnU-Net"
once convert
once preprocess

stage "Turn the privacy budget into plans"
# No public start: it would learn from phantoms of the very kind that plays the patients here.
nnunet-dp plan -d $dataset -c $configuration --epsilon $epsilon --no-start

stage "Train privately"
once train

stage "Predict the held-out patients"
once predict

stage "Refine the predictions with what the training learnt (DP-Morph)"
once refine

stage "Evaluate against their labels"
once evaluate

stage "What came out"
summarise
