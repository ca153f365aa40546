# shellcheck shell=bash
# Sourced by the other scripts: which Python they run, and what is installed for it.

python_with() { # python_with REQUIREMENTS: makes or updates .venv, prints nothing when there is nothing to do
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    "${PYTHON:-python3}" -c "import sys; sys.exit(sys.version_info < (3, 11))" || {
      echo "Python 3.11 or newer is needed, and ${PYTHON:-python3} is not: name one, PYTHON=python3.12 bash $0" >&2
      exit 1
    }
    "${PYTHON:-python3}" -m venv .venv || {
      echo "cannot make .venv: install Python's venv module (on Debian and Ubuntu: apt install python3-venv)" >&2
      exit 1
    }
  fi
  # a file may take in the others
  if ! cat "$1" requirements*.txt | cmp -s - ".venv/$1.installed"; then
    echo "installing $1 into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1" || exit 1
    cat "$1" requirements*.txt >".venv/$1.installed"
  fi
}

run_python() { # runs a script with $PYTHON, the Python in .venv, or the system's
  local python=${PYTHON:-python3}
  if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then
    python=.venv/bin/python
  fi
  "$python" -c "import torch" 2>/dev/null || {
    echo "$python has no PyTorch: run scripts/quickstart.sh first, or name another with PYTHON=..." >&2
    exit 1
  }
  exec "$python" "$@"
}
