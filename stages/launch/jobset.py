"""A production run as a Kubernetes JobSet (jobset.x-k8s.io/v1alpha2): a document, and its creation.

One indexed job, a pod a host. Its name is the run's, so the API server itself refuses a second one;
one that has ended gives way to the next launch, and one that lives never does. Pods that end with
76 end the JobSet; evictions restart it whatever the count; all else restarts it.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

from nmoe.config.sections import Config
from nmoe.errors import ConfigError, RunError
from stages.launch.local import SAVE_S

VERSION = "jobset.x-k8s.io/v1alpha2"
KUBECTL_S = 60
GONE_S = 120  # the pods of a JobSet that has ended may take this long to be deleted with it
CHECKED_S = 3600  # one that only checked hosts is kept so long
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
    "template": {"spec": _pod(config, run_id, root, first, preflight)},
  }
  return {
    "apiVersion": VERSION,
    "kind": "JobSet",
    "metadata": {"name": name(run_id), "namespace": config.jobset.namespace},
    "spec": {
      **({"ttlSecondsAfterFinished": CHECKED_S} if preflight else {}),
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


def name(run_id: str) -> str:
  return f"nmoe-{run_id}"


def _pod(config: Config, run_id: str, root: Path, first: int, preflight: bool) -> dict[str, Any]:
  container: dict[str, Any] = {
    "name": "node",
    "image": config.jobset.image,
    "command": ["bash", "-c", _script(config, run_id, root, first, preflight)],
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


def _script(config: Config, run_id: str, root: Path, first: int, preflight: bool) -> str:
  """What a pod does: begin the attempt (the first pod), be a host of it, ask what its end means.

  The shell is the pod's process 1, to which the kernel delivers a SIGTERM only where it has a trap:
  it passes it on, so that ranks save.
  """
  head = f"{name(run_id)}-node-0-0.{name(run_id)}:{config.launch.port}"
  place, own = f"{run_id} --root {root}", "--attempt $A --node $JOB_COMPLETION_INDEX"
  number = "0" if preflight else f"$((RESTART + {first}))"
  begin = f"nmoe prod begin {place} --engine jobset --job {name(run_id)} --attempt $A"
  lines = [
    f"A={number}",
    f'[ "$JOB_COMPLETION_INDEX" != 0 ] || {begin} || exit 76',
    f"nmoe prod node {place} --head {head} {own} & NODE=$!",
    "trap 'kill -TERM $NODE' TERM",
    "wait $NODE; STATUS=$?",
    "while kill -0 $NODE 2>/dev/null; do wait $NODE; STATUS=$?; done",
    f"nmoe prod end {place} {own}",
  ]
  if preflight:
    lines[1], lines[-1] = "", "exit $STATUS"
  return "\n".join(filter(None, lines)) + "\n"


def text(config: Config, run_id: str, root: Path, first: int, preflight: bool = False) -> str:
  return json.dumps(document(config, run_id, root, first, preflight), indent=2) + "\n"


class Seen(NamedTuple):
  """A JobSet of the cluster: its identity, and whether it has completed or failed."""

  uid: str
  ended: bool


def seen(config: Config, run_id: str) -> Seen | None:
  """The JobSet of a run as its controller tells it; None: there is none. RunError."""
  told = _kubectl(
    *("get", f"jobsets.{VERSION.partition('/')[0]}/{name(run_id)}"),
    *("--namespace", config.jobset.namespace, "--ignore-not-found"),
    *("--output", "jsonpath={.metadata.uid} {.status.terminalState}"),
  )
  uid, _, state = told.partition(" ")
  return Seen(uid, bool(state)) if told else None


def living(config: Config, run_id: str) -> str:
  """The run's JobSet by name, unless there is none or it has ended: ""."""
  found = seen(config, run_id)
  return f"JobSet {name(run_id)}" if found is not None and not found.ended else ""


def create(config: Config, run_id: str, path: Path) -> None:
  """Hand a document to kubectl; a JobSet of the run that has ended goes before. RunError with what
  kubectl said, such as that the run is there.
  """
  old = seen(config, run_id)
  if old is not None and old.ended:
    _remove(config, run_id, old)
  _kubectl("create", "--filename", str(path))


def _remove(config: Config, run_id: str, old: Seen) -> None:
  """Delete a JobSet with its pods, and wait until they are gone. The API server deletes this very
  one or none: by now another launch may have put a living one into its place.
  """
  place = f"/apis/{VERSION}/namespaces/{config.jobset.namespace}/jobsets/{name(run_id)}"
  options = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Foreground"}
  options["preconditions"] = {"uid": old.uid}
  deadline = time.monotonic() + GONE_S
  try:
    _kubectl("delete", "--raw", place, "--filename", "-", told=json.dumps(options))
  except RunError:
    if seen(config, run_id) == old:
      raise  # else it is gone
  while (found := seen(config, run_id)) is not None and found.uid == old.uid:
    if time.monotonic() > deadline:
      raise RunError(
        f"JobSet {name(run_id)} has ended and was deleted, but is there after {GONE_S} s: see "
        f"`kubectl --namespace {config.jobset.namespace} get pods`, then launch again"
      )
    time.sleep(1.0)


def _kubectl(*arguments: str, told: str = "") -> str:
  """What it prints, with `told` on its standard input. RunError with what it complains of."""
  try:
    done = subprocess.run(
      ["kubectl", *arguments], input=told, capture_output=True, text=True, timeout=KUBECTL_S
    )
  except FileNotFoundError as error:
    raise RunError("no kubectl here; run this where the cluster can be reached") from error
  except subprocess.TimeoutExpired as error:
    raise RunError(f"kubectl did not answer within {KUBECTL_S} s; is the API server up?") from error
  if done.returncode:
    raise RunError(f"`kubectl {' '.join(arguments)}` failed: {done.stderr.strip()}")
  return done.stdout.strip()
