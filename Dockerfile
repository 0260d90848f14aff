# nmoe on a GPU host: the driver comes from the host, everything else from here.
#   docker build -t nmoe .                                              the product
#   docker build --build-arg BASE=debian:12 --build-arg EXTRAS=viz .    for target.arch = "cpu"
# With --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu the latter has a torch
# without CUDA. Any user may run it: docker run --user 1234 -v /where/runs/go:/data nmoe ...
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE}
ARG EXTRAS=cuda,viz
ARG PIP_EXTRA_INDEX_URL
RUN apt-get update && apt-get install -y --no-install-recommends git python3 python3-venv \
  && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/nmoe-venv/bin:$PATH NMOE_ROOT=/data NVSHMEM_DISABLE_NVLS=1 NCCL_NVLS_ENABLE=0
WORKDIR /opt/nmoe
COPY . .
RUN python3 -m venv /opt/nmoe-venv && pip install --no-cache-dir -e ".[${EXTRAS}]" \
  && case "${EXTRAS}" in *cuda*) \
  pip install --no-cache-dir --no-deps nvidia-nvshmem-cu13==3.8.0;; esac
RUN mkdir -m 1777 -p /data
VOLUME /data
ENTRYPOINT ["nmoe"]
