#!/usr/bin/env bash
# make.sh PYTHON FOLDER REQUIREMENTS: an environment with packages of its own before those of
# PYTHON's. It takes seconds, where a whole one would install torch again.
set -euo pipefail
"$1" -m venv --without-pip "$2"
own="$("$2/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
"$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$own/shared.pth"
"$1" -m pip --python "$2/bin/python" install --quiet --no-deps --requirement "$3"
