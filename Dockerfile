# The package with its command line, and the demo as what it does by itself.
#   docker build --tag trl-apa .
#   docker build --tag trl-apa:cuda --build-arg BASE=docker.io/nvidia/cuda:13.0.2-base-ubuntu24.04 --build-arg TORCH_INDEX= .
ARG BASE=docker.io/library/python:3.11-slim
FROM ${BASE}

# Where torch comes from, besides PyPI: builds without CUDA are much smaller. Empty: from PyPI, with CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# A CUDA base brings Ubuntu's Python, or none. On a GPU Triton compiles its launcher with a C compiler and Python's headers.
RUN if ! python3 -m venv --help >/dev/null 2>&1 || ! python3 -m ensurepip --version >/dev/null 2>&1; then \
        apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    fi
RUN if [ -z "$TORCH_INDEX" ]; then \
        headers=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["include"])') \
        && apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
            $(test -e "$headers/Python.h" || echo python3-dev) \
        && rm -rf /var/lib/apt/lists/*; \
    fi

RUN useradd --create-home apa \
    && mkdir /runs && chown apa:apa /runs
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 MPLCONFIGDIR=/tmp/matplotlib

WORKDIR /src
COPY constraints/ci.txt constraints/ci.txt
COPY pyproject.toml hatch_build.py README.md LICENSE CITATION.cff ./
COPY trl_apa trl_apa
RUN python3 -m venv /opt/venv \
    && PIP_EXTRA_INDEX_URL=$TORCH_INDEX pip install --no-cache-dir --constraint constraints/ci.txt '.[demo,judge,quantization]' \
    && rm -rf /src/*

USER apa
WORKDIR /runs
VOLUME /runs
ENTRYPOINT ["trl-apa"]
CMD ["demo", "--output_dir", "/runs/demo"]
