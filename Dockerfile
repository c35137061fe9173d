# An environment for real training; torch's wheels bring CUDA, the host its driver and nvidia-container-toolkit.
# docker build -t luciole .    (behind a mirror: --build-arg PIP_INDEX_URL=https://…/simple)
FROM python:3.12-slim
# Triton builds its kernels' launchers with a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /luciole
ARG PIP_INDEX_URL
COPY requirements.txt .
RUN pip install --no-cache-dir --requirement requirements.txt
COPY . .
ENTRYPOINT ["python", "train_qlora.py"]
