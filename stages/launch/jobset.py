"""A production run as a Kubernetes JobSet (jobset.x-k8s.io/v1alpha2): a document, and its creation.

One indexed job, a pod a host. Its name is the run's, so the API server itself refuses a second one.
Pods that end with 76 end the JobSet; evictions restart it whatever the count; all else restarts it.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from nmoe.config.sections import Config
from nmoe.errors import ConfigError, RunError
from stages.launch.local import SAVE_S

CREATE_S = 60
DIGEST = re.compile(r".+@sha256:[0-9a-f]{64}")
ATTEMPT = "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"


def document(
  config: Config, run_id: str, root: Path, first: int, preflight: bool = False
) -> dict[str, Any]:
  """The JobSet of a run whose next attempt is number `first`. ConfigError without a digest.

  preflight: see stages.prod.hosts.generate; nothing restarts it.
  """
  if not DIGEST.fullmatch(config.jobset.image):
    raise ConfigError(
      f'jobset.image = "{config.jobset.image}" must name an image by its digest '
      "(NAME@sha256:…): a tag can be another image after a restart"
    )
  name = f"nmoe-{run_id}"
  job = {
    "completionMode": "Indexed",
    "completions": config.nodes,
    "parallelism": config.nodes,
    "backoffLimit": 0,
    "podFailurePolicy": {
      "rules": [
        {
          "action": "FailJob",
          "onExitCodes": {"containerName": "node", "operator": "In", "values": [76]},
        },
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
      ]
    },
    "template": {"spec": _pod(config, run_id, root, first, name, preflight)},
  }
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": name, "namespace": config.jobset.namespace},
    "spec": {
      "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
      "failurePolicy": {
        "maxRestarts": 0 if preflight else config.prod.max_attempts,
        "restartStrategy": "BlockingRecreate",
        "rules": [
          {
            "name": "forgood",
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": ["exit code 76"],
          },
          {
            "name": "evicted",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
          },
        ],
      },
      "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
    },
  }


def _pod(
  config: Config, run_id: str, root: Path, first: int, name: str, preflight: bool
) -> dict[str, Any]:
  head = f"{name}-node-0-0.{name}:{config.launch.port}"
  place = f"{run_id} --root {root}"
  script = (
    f"A=$((RESTART + {first})); "
    f'if [ "$JOB_COMPLETION_INDEX" = 0 ]; then nmoe prod begin {place} --engine jobset '
    f"--job {name}; fi; "
    f"nmoe prod node {place} --attempt $A --head {head} --node $JOB_COMPLETION_INDEX; "
    f"nmoe prod end {place} --attempt $A --node $JOB_COMPLETION_INDEX"
  )
  if preflight:
    script = f"nmoe prod node {place} --attempt 0 --head {head} --node $JOB_COMPLETION_INDEX"
  container: dict[str, Any] = {
    "name": "node",
    "image": config.jobset.image,
    "command": ["bash", "-c", script],
    "env": [{"name": "RESTART", "valueFrom": {"fieldRef": {"fieldPath": ATTEMPT}}}],
    "volumeMounts": [
      {"name": "root", "mountPath": str(root)},
      {"name": "shared-memory", "mountPath": "/dev/shm"},
    ],
  }
  if config.target.arch != "cpu":
    container["resources"] = {"limits": {config.jobset.gpu_resource: config.node_ranks}}
  return {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": int(SAVE_S) + 30,
    "containers": [container],
    "volumes": [
      {"name": "root", "persistentVolumeClaim": {"claimName": config.jobset.claim}},
      {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
    ],
  }


def text(config: Config, run_id: str, root: Path, first: int, preflight: bool = False) -> str:
  return json.dumps(document(config, run_id, root, first, preflight), indent=2) + "\n"


def create(path: Path) -> None:
  """Hand a document to kubectl. RunError with what it said, such as that the run is there."""
  _kubectl("create", path)


def over(path: Path) -> bool:
  """Whether the JobSet of a document has completed or failed: its controller says so."""
  return bool(_kubectl("get", path, "-o", "jsonpath={.status.terminalState}"))


def _kubectl(verb: str, path: Path, *more: str) -> str:
  """What it prints. RunError with what it complains of."""
  command = ["kubectl", verb, "-f", str(path), *more]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=CREATE_S)
  except FileNotFoundError as error:
    raise RunError(f"{path}: no kubectl here; run it where the cluster can be reached") from error
  except subprocess.TimeoutExpired as error:
    raise RunError(f"kubectl did not answer within {CREATE_S} s; is the API server up?") from error
  if done.returncode:
    raise RunError(f"kubectl refused {path}: {done.stderr.strip()}")
  return done.stdout.strip()
