#!/usr/bin/env bash
# torch 2.13.0, Python 3.11, CPU: `torchrun script.py --r 4` ends with "ambiguous option: --r could match --rdzv-backend, ...", though
# --r stands behind the script and is the script's. So does any option of a script that is the beginning of two options of
# torchrun: --r (the rank, as peft calls it), --m, --no, --log. `--rank 4` and `--lr 1` reach the script.
#
# torchrun takes all that follows the script as a remainder, but argparse looks every word up among its options first, and
# raises for an ambiguous beginning before it knows that the word belongs to the remainder. The same script runs without
# torchrun. Options with such names have to come from a file, or be spelled otherwise.
#
# Fails if that changes. Run by hand: bash findings/torchrun_refuses_a_scripts_short_options.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
echo 'import sys; print("the script got", sys.argv[1:])' >"$folder/script.py"
"$folder/venv/bin/python" -c 'import sys, torch; print("torch", torch.__version__, "Python", sys.version.split()[0])'
run() { # its last line; an error is what is looked for
  { "$folder/venv/bin/torchrun" --standalone --nproc-per-node 1 "$folder/script.py" "$@" || true; } 2>&1 | tail -n 1
}

"$folder/venv/bin/python" "$folder/script.py" --r 4 | grep -F "['--r', '4']"
for option in --rank --lr; do
  run "$option" 4 | grep -F "the script got ['$option', '4']"
done
for option in --r --m --no --log; do
  run "$option" 4 | cut -c1-90 | grep -F "torchrun: error: ambiguous option: $option could match"
done
