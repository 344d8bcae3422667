#!/bin/sh
# Makes what the tests need and runs them, from a fresh clone with python3 and git only.
# Usage: ./setup_scripts/test.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
./setup_scripts/install.sh test
exec ./setup_scripts/check.sh "$@"
