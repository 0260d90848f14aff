# nmoe on a GPU host: the driver comes from the host, everything else from here.
#   docker build -t nmoe .                                      the product
#   docker build --build-arg BASE=debian:12 --build-arg EXTRAS= .   for target.arch = "cpu"
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE}
ARG EXTRAS=[cuda]
RUN apt-get update && apt-get install -y --no-install-recommends git python3 python3-venv \
  && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/nmoe-venv/bin:$PATH NMOE_ROOT=/data NVSHMEM_DISABLE_NVLS=1 NCCL_NVLS_ENABLE=0
WORKDIR /opt/nmoe
COPY . .
RUN python3 -m venv /opt/nmoe-venv && pip install --no-cache-dir -e ".${EXTRAS}"
VOLUME /data
ENTRYPOINT ["nmoe"]
