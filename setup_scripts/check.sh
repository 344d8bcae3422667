#!/bin/sh
# Runs what CI runs: style, types, tests and doctests. Needs ./setup_scripts/install.sh test.
# Usage: ./setup_scripts/check.sh [pytest arguments, such as -m slow]
set -eu
cd "$(dirname "$0")/.."
python="$PWD/.venv/bin/python"

echo "1/3 ruff"
"$python" -m ruff check .
echo "2/3 pyright"
"$python" -m pyright --pythonpath "$python"
echo "3/3 pytest"
exec "$python" -m pytest -n 2 --dist loadfile "$@" # the tests of one file stay together: they share datasets
