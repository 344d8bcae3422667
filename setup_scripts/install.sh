#!/bin/sh
# Makes .venv in this checkout and installs nnunet-dp into it (editable); done again, it does nothing.
# Usage: ./setup_scripts/install.sh [test]      "test" adds the tools of the tests; PYTHON chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."

extra="${1:-}"
python="${PYTHON:-python3}"
wanted="$(cksum < pyproject.toml)"
for done in ".venv/.installed-$extra" .venv/.installed-test; do
    if [ -f "$done" ] && [ "$(cat "$done")" = "$wanted" ]; then
        exit 0
    fi
done

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "Python should be 3.10 or newer, found $("$python" --version); type: PYTHON=python3.11 $0" >&2
    exit 1
fi
if [ ! -x .venv/bin/python ]; then
    echo "Making .venv"
    "$python" -m venv .venv || {
        rm -rf .venv
        echo "python3 should have the module venv; on Debian and Ubuntu type: sudo apt install python3-venv" >&2
        exit 1
    }
fi
echo "Installing nnunet-dp${extra:+ and what its tests need} (PyTorch is large: the first time takes minutes)"
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --progress-bar on --editable ".${extra:+[$extra]}"
has_browser() {
    command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null
}
install_browser() {
    apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium
}
if [ "$extra" = test ] && ! has_browser; then # one test opens the privacy card in it, and is skipped without
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        echo "Installing chromium, in which a test opens the privacy card"
        install_browser > /dev/null 2>&1 || true
    fi
    has_browser || echo "No Chromium: one test is skipped; on Debian and Ubuntu type: sudo apt install chromium" >&2
fi
echo "$wanted" > ".venv/.installed-$extra"
echo "Installed. Next: . .venv/bin/activate && nnunet-dp link"
