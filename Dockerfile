# amalgam on CPUs, or with TORCH_INDEX on NVIDIA GPUs too. `docker build -t amalgam .`; docs/production.md says how to
# run it.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# PyTorch without CUDA, which is a tenth of the size. Another index brings another build: https://pypi.org/simple has
# the one with CUDA, which brings Triton.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
# The compiler stays in this stage, so that whichever one Debian has is right.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/amalgam
WORKDIR /src
# Dependencies first: they change less often than the code. PyTorch is most of it, and has a layer of its own.
COPY requirements.txt ./
RUN grep '^torch==' requirements.txt > torch.txt \
 && /opt/amalgam/bin/pip install --extra-index-url "${TORCH_INDEX}" -r torch.txt
RUN grep -v '^-e' requirements.txt > packages.txt \
 && /opt/amalgam/bin/pip install -r packages.txt
COPY CMakeLists.txt LICENSE README.md pyproject.toml ./
COPY src src
# Without a compiler the package installs without its kernels, which is not meant here.
RUN /opt/amalgam/bin/pip install --no-deps . \
 && /opt/amalgam/bin/python -c 'import amalgam._mapping, amalgam._native'

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="amalgam" \
      org.opencontainers.image.description="Serves one language model made of checkpoints in several precisions" \
      org.opencontainers.image.licenses="MIT"
RUN groupadd --gid 10001 amalgam \
 && useradd --uid 10001 --gid amalgam --no-create-home --home-dir /cache --shell /usr/sbin/nologin amalgam \
 && install --directory --owner amalgam --group amalgam /cache \
 && install --directory /config /models
COPY --from=build /opt/amalgam /opt/amalgam
# Triton compiles a launcher in C for each kernel, where it runs. Python's headers are in the base image.
# hadolint ignore=DL3008
RUN if /opt/amalgam/bin/python -c 'import sys, importlib.util as u; sys.exit(u.find_spec("triton") is None)'; then \
      apt-get update \
   && apt-get install --yes --no-install-recommends gcc libc6-dev \
   && rm -rf /var/lib/apt/lists/*; \
    fi
# All that is written goes to /cache: packed and derived weights, downloads, statistics, compiled kernels. The driver's
# libraries are the host's, of which NVIDIA's container toolkit mounts those that are named.
ENV PATH=/opt/amalgam/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/hub \
    TRITON_CACHE_DIR=/cache/triton \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    AMALGAM_SERVER_HOST=0.0.0.0 \
    AMALGAM_SERVER_PORT=8080 \
    AMALGAM_INFERENCE_PACKED_CACHE=/cache/packed
USER 10001:10001
WORKDIR /cache
VOLUME ["/models", "/cache"]
EXPOSE 8080
# Alive, which loading is too: /ready says whether requests are taken.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT ["amalgam"]
CMD ["serve", "--config", "/config/model_config.yaml"]
