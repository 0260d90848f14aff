# nmoe on a GPU host: the driver comes from the host, everything else from here.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends git python3 python3-venv \
  && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/nmoe-venv/bin:$PATH NMOE_ROOT=/data NVSHMEM_DISABLE_NVLS=1 NCCL_NVLS_ENABLE=0
WORKDIR /opt/nmoe
COPY . .
RUN python3 -m venv /opt/nmoe-venv && pip install --no-cache-dir -e '.[cuda]'
VOLUME /data
ENTRYPOINT ["nmoe"]
