#!/bin/sh
# Makes nnU-Net's three folders below a base folder and prints the lines that tell nnU-Net of them.
# Usage: eval "$(./setup_scripts/environment.sh BASE_FOLDER)"
set -eu
if [ $# -ne 1 ]; then
    echo "One folder should be given, found $# arguments; type: eval \"\$($0 BASE_FOLDER)\"" >&2
    exit 2
fi
mkdir -p "$1/nnUNet_raw" "$1/nnUNet_preprocessed" "$1/nnUNet_results"
base="$(cd "$1" && pwd | sed "s/'/'\\\\''/g")"
for name in nnUNet_raw nnUNet_preprocessed nnUNet_results; do
    echo "export $name='$base/$name'"
done
