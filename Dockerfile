# syntax=docker/dockerfile:1
# Octavo's image, for a GPU or for a CPU. docs/deploy.md says how to use it, scripts/build_image builds, tries and measures it.
#
#   docker build --tag octavo:gpu .
#   docker build --tag octavo:cpu --build-arg VARIANT=cpu .
#
# VARIANT      gpu: torch's CUDA build, which brings CUDA's libraries, and the C compiler and Python.h that Triton needs at run
#              time. cpu: torch's CPU build, and the C++ compiler that makes the CPU kernels at the first start, for the CPU they
#              run on (an image is built on one machine and runs on others).
# BASE_IMAGE   Debian, or an image of Python (3.11 or later) on Debian; nothing of CUDA.
# TORCH_INDEX  the package index of torch's CPU build; empty: the one that pip is set up with.
# A pip.conf for the build, with another index or a proxy, comes as the secret `pip_conf` and does not stay in the image.
ARG BASE_IMAGE=debian:bookworm-slim
ARG VARIANT=gpu

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS base
ARG DEBIAN_FRONTEND=noninteractive
# No versions: those of the base's release, with its security fixes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates \
    && if ! command -v python3; then apt-get install --yes --no-install-recommends python3; fi \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log /var/cache/debconf/*-old


FROM base AS build
# hadolint ignore=DL3008
RUN if ! python3 -c 'import ensurepip'; then \
        apt-get update && apt-get install --yes --no-install-recommends python3-venv python3-dev; fi \
    && python3 -m venv /opt/octavo
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml scripts/constraints.txt ./
COPY configs/image/requirements configs/image/requirements
ARG VARIANT
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# torch first and by itself: it changes least and weighs most. --no-deps, because an index of torch alone has nothing else.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    python3 configs/image/requirements pyproject.toml >requirements.txt \
    && torch=$(sed -n 's/^torch==//p' requirements.txt) \
    && if [ "$VARIANT" = gpu ]; then /opt/octavo/bin/pip install --constraint constraints.txt "torch==$torch"; \
       elif [ -n "$TORCH_INDEX" ]; then /opt/octavo/bin/pip install --no-deps --index-url "$TORCH_INDEX" "torch==$torch+cpu"; \
       else /opt/octavo/bin/pip install --constraint constraints.txt "torch==$torch"; fi
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    /opt/octavo/bin/pip install --constraint constraints.txt --requirement requirements.txt
COPY README.md ./
COPY engine engine
COPY server server
COPY configs configs
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    /opt/octavo/bin/pip install --no-deps .
# What nobody needs to serve: torch's C++ headers and test programs, and the packages' own tests.
RUN site=$(/opt/octavo/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
    && rm -rf "$site/torch/include" "$site/torch/test" "$site/torch/share" \
    && find "$site/torch/bin" -mindepth 1 ! -name torch_shm_manager -delete \
    && find "$site/sympy" "$site/mpmath" "$site/networkx" "$site/numpy" -depth -type d -name tests -exec rm -rf {} + \
    && /opt/octavo/bin/python -c 'import torch, transformers.generation' \
    && mkdir /headers \
    && find /usr/include /usr/local/include -maxdepth 2 -type d -name 'python3*' -exec cp --recursive --parents {} /headers \; \
    && chmod -R u=rwX,go=rX /headers


FROM base AS octavo-gpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log /var/cache/debconf/*-old
# What the driver's libraries are brought in for, where the container runtime brings them in.
ENV OCTAVO_DEVICE=cuda NVIDIA_DRIVER_CAPABILITIES=compute,utility


FROM base AS octavo-cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log /var/cache/debconf/*-old
ENV OCTAVO_DEVICE=cpu


# hadolint ignore=DL3006
FROM octavo-${VARIANT}
# /models and the cache are volumes. A fresh one is filled from here, so that it belongs to the user.
RUN groupadd --gid 10001 octavo && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin octavo \
    && install --directory --owner 10001 --group 10001 /models /home/octavo/.cache
COPY --from=build /headers /
COPY --from=build /opt/octavo /opt/octavo
COPY configs/image/health /usr/local/bin/octavo-health
ENV PATH=/opt/octavo/bin:$PATH \
    OCTAVO_HOST=0.0.0.0 \
    OCTAVO_DOWNLOAD_DIR=/models \
    TRITON_CACHE_DIR=/home/octavo/.cache/triton \
    CUDA_CACHE_PATH=/home/octavo/.cache/nv \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /home/octavo
VOLUME ["/models", "/home/octavo/.cache"]
EXPOSE 8000
# Ready, not merely alive. A large model may load for long: in its first half hour a container is "starting", not "unhealthy".
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 CMD ["octavo-health"]
ENTRYPOINT ["octavo"]
CMD ["serve"]
